"""Reads every scan once and names what is wrong with each, before hours are spent on it."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from medmeta.data.folders import listed, stem
from medmeta.data.manifests import Modality
from medmeta.data.tasks import Case, Task, load_task
from medmeta.data.volume import Header, grid_difference, is_volume, read_channels, read_header, read_labels, read_volume
from medmeta.errors import InputError

T = TypeVar("T")

PLAUSIBLE_SPACING_MM = (0.05, 20.0)
"""Voxel sizes of clinical CT and MR lie well within; what lies outside is mostly a wrong unit."""

PLAUSIBLE_HU = (-4096.0, 32768.0)
"""Air is -1000 HU and metal a few thousand; scanners pad with values down to -3024."""

NARROW_HU = 100.0
"""Fat and soft tissue alone are further apart; a narrower CT was rescaled, to 0..1 for example."""

Problem = Literal[
    "missing", "unreadable", "channels", "grid", "labels", "empty organ", "spacing", "intensity", "duplicate"
]


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with one scan.

    Args:
        file: the file, or the task for what concerns all its scans.
        problem: the kind of problem.
        message: what was found, in one line.
        severity: "error" for what stops or spoils work with the scan, "warning" for what may be intended.
    """

    file: Path
    problem: Problem
    message: str
    severity: Literal["error", "warning"] = "error"


def check_path(
    path: str | Path,
    *,
    root: str | Path | None = None,
    targets: Mapping[str, int | Sequence[int]] | None = None,
    ignored: Sequence[int] = (),
    progress: Callable[[int, int], None] | None = None,
) -> list[Finding]:
    """Read every scan of a file, a folder of scans, a task folder or a manifest, and list what is wrong.

    Args:
        path: a scan, a folder of scans, a Decathlon or nnU-Net raw folder, its dataset.json, or a YAML manifest.
        root: the folder that holds the data of a manifest.
        targets: structure -> label values, in place of those of the task.
        ignored: label values of the task that are left out on purpose.
        progress: called after every scan with (scans read, scans in all).

    Returns:
        the findings in the order of the scans, last those that concern the whole task.

    Raises:
        InputError: there is nothing to read at `path`, or its dataset.json or manifest is not usable.
    """
    path = Path(path)
    if path.suffix.lower() in (".yaml", ".yml") or path.name == "dataset.json" or (path / "dataset.json").is_file():
        task = load_task(path, targets=targets, ignored=ignored, root=root, must_exist=False)
        return check_task(task, where=path, progress=progress)
    if not path.exists():
        raise InputError(path, "nothing at this path", "a scan, a folder of scans, a task folder or a manifest")
    scans = [path] if is_volume(path) or not path.is_dir() else listed(path)
    cases = [Case(stem(scan), stem(scan), (scan,)) for scan in scans]
    return _check_cases(cases, None, progress)[0]


def check_task(
    task: Task, *, where: str | Path | None = None, progress: Callable[[int, int], None] | None = None
) -> list[Finding]:
    """As `check_path`, for a task that is already described.

    Args:
        task: the task; files of it that do not exist are findings.
        where: the file that findings about the whole task name, by default the task's name.
        progress: called after every scan with (scans read, scans in all).
    """
    findings, present = _check_cases(task.cases, task, progress)
    for target in task.targets if present else ():
        if not any(target in targets for targets in present):
            message = f"{target} = {list(task.targets[target])} is in none of the {len(present)} readable label maps"
            findings.append(Finding(Path(where or task.name), "empty organ", message))
    return findings


def _check_cases(
    cases: Sequence[Case], task: Task | None, progress: Callable[[int, int], None] | None
) -> tuple[list[Finding], list[set[str]]]:
    """The findings, and the targets that each readable label map holds."""
    findings: list[Finding] = []
    present: list[set[str]] = []
    first_with: dict[bytes, Path] = {}
    for number, case in enumerate(cases, start=1):
        found, headers = _check_headers(case, task)
        # What the header gate refuses may claim any size, so its voxels stay unread.
        if not any(finding.problem in ("missing", "unreadable", "grid") for finding in found):
            found += _check_voxels(case, task, first_with)
        if case.labels is not None and task is not None:
            of_labels, targets = _check_labels(case.labels, headers, task)
            found += of_labels
            present += [targets] if targets is not None else []
        findings += [replace(finding, message=" ".join(finding.message.split())) for finding in found]
        if progress is not None:
            progress(number, len(cases))
    return findings, present


def _check_headers(case: Case, task: Task | None) -> tuple[list[Finding], list[Header]]:
    """What the image headers say, and the sound ones."""
    findings: list[Finding] = []
    headers: list[Header] = []
    for path in case.images:
        header = _attempt(lambda path=path: read_header(path))
        if isinstance(header, Header):
            headers.append(header)
            findings += _spacing(header)
        else:
            findings.append(Finding(path, "unreadable" if path.exists() else "missing", header))
    for header in headers[1:]:
        if difference := grid_difference(header, headers[0]):
            findings.append(Finding(header.path, "grid", f"other grid than {headers[0].path.name}: {difference}"))
    channels = sum(header.channels for header in headers)
    if task is not None and len(headers) == len(case.images) and channels != len(task.channels):
        message = f"{channels} channels, {len(task.channels)} in the task ({', '.join(task.channels)})"
        findings.append(Finding(case.images[0], "channels", message))
    return findings, headers


def _spacing(header: Header) -> list[Finding]:
    low, high = PLAUSIBLE_SPACING_MM
    if all(low <= step <= high for step in header.spacing):
        return []
    steps = " x ".join(f"{step:.4g}" for step in header.spacing)
    message = f"voxels of {steps} mm, outside {low:g} to {high:g} mm: is the unit right?"
    return [Finding(header.path, "spacing", message, "warning")]


def _check_voxels(case: Case, task: Task | None, first_with: dict[bytes, Path]) -> list[Finding]:
    file = case.images[0]
    volume = _attempt(lambda: read_channels(case.images))
    if isinstance(volume, str):
        return [Finding(file, "unreadable", volume)]
    findings: list[Finding] = []
    for number, channel in enumerate(volume.data):
        name = "" if volume.channels == 1 else f"channel {number}: "
        if problem := _intensity(channel, None if task is None else task.modality):
            findings.append(Finding(file, "intensity", name + problem[0], problem[1]))
    if any(finding.severity == "error" for finding in findings):
        return findings
    digest = hashlib.blake2b(repr(volume.data.shape).encode(), digest_size=16)
    digest.update(volume.data.contiguous().numpy())
    twin = first_with.setdefault(digest.digest(), file)
    if twin != file:
        findings.append(Finding(file, "duplicate", f"the same voxels as {twin.name}"))
    return findings


def _intensity(channel: Tensor, modality: Modality | None) -> tuple[str, Literal["error", "warning"]] | None:
    low, high = (float(bound) for bound in channel.aminmax())
    # A NaN anywhere makes both bounds NaN.
    if not (torch.isfinite(torch.tensor([low, high])).all()):
        return f"{int((~channel.isfinite()).sum())} of {channel.numel()} voxels are NaN or infinite", "error"
    if low == high:
        return f"all voxels are {low:g}", "error"
    if modality == "CT":
        if low >= 0:
            return f"values {low:g} to {high:g}: a CT in HU has air or fat below 0", "warning"
        if low < PLAUSIBLE_HU[0] or high > PLAUSIBLE_HU[1] or high - low < NARROW_HU:
            return f"values {low:g} to {high:g}: not like HU (air -1000, water 0, bone about 1000)", "warning"
    return None


def _check_labels(path: Path, headers: Sequence[Header], task: Task) -> tuple[list[Finding], set[str] | None]:
    """The findings, and the targets that the label map holds; None where it cannot be read."""
    header = _attempt(lambda: read_header(path))
    if not isinstance(header, Header):
        return [Finding(path, "unreadable" if path.exists() else "missing", header)], None
    findings: list[Finding] = []
    if headers and (difference := grid_difference(header, headers[0])):
        findings.append(Finding(path, "grid", f"other grid than {headers[0].path.name}: {difference}"))
    labels = _attempt(lambda: read_labels(path))
    if isinstance(labels, str):
        # What reads as an image was readable: then the values are at fault.
        readable = not isinstance(_attempt(lambda: read_volume(path)), str)
        return [*findings, Finding(path, "labels" if readable else "unreadable", labels)], None
    values = _values(labels.data)
    refusal = _attempt(lambda: task.encode(values, path))
    if isinstance(refusal, str):
        findings.append(Finding(path, "labels", refusal))
    held = set(values.tolist())
    present = {target for target, wanted in task.targets.items() if held & set(wanted)}
    if absent := [target for target in task.targets if target not in present]:
        findings.append(Finding(path, "empty organ", f"not in this scan: {', '.join(absent)}", "warning"))
    return findings, present


def _values(labels: Tensor) -> Tensor:
    """The label values that occur, ascending."""
    if int(labels.max()) > 65535:
        return labels.unique()
    return torch.bincount(labels.reshape(-1)).nonzero().reshape(-1)


def _attempt(read: Callable[[], T]) -> T | str:
    """What `read` returns, or in one line why it could not."""
    try:
        return read()
    except InputError as error:
        return f"{error.found}; required: {error.required}. {error.remedy}".strip()
    except Exception as error:  # one bad scan never stops the others, whatever a library makes of it
        return f"{type(error).__name__}: {error}"


def summarise(findings: Sequence[Finding], scans: int) -> dict[str, Any]:
    """The findings as plain values for JSON.

    Args:
        findings: what `check_path` returned.
        scans: the number of scans read, the second argument of its `progress`.

    Returns:
        scans: the number of scans read, the second number that `progress` is told.
    """
    severities = Counter(finding.severity for finding in findings)
    return {
        "scans": scans,
        "errors": severities["error"],
        "warnings": severities["warning"],
        "problems": dict(sorted(Counter(finding.problem for finding in findings).items())),
        "findings": [asdict(finding) | {"file": str(finding.file)} for finding in findings],
    }
