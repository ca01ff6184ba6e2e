"""Reads every scan once and names what is wrong with each, before hours are spent on it; writes repaired copies."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar

import numpy as np
import torch
from scipy.ndimage import affine_transform
from torch import Tensor

from medmeta.data.folders import listed, some, stem
from medmeta.data.manifests import Modality
from medmeta.data.nifti import displacement
from medmeta.data.tasks import Case, Task, load_task
from medmeta.data.volume import (
    WRITABLE_SUFFIXES,
    Header,
    Volume,
    grid_difference,
    is_volume,
    read_channels,
    read_header,
    read_labels,
    read_volume,
    volume_suffix,
    write_volume,
)
from medmeta.errors import InputError
from medmeta.files import read_json

P = ParamSpec("P")
T = TypeVar("T")

PLAUSIBLE_SPACING_MM = (0.05, 20.0)
"""Voxel sizes of clinical CT and MR lie well within; what lies outside is mostly a wrong unit."""

PLAUSIBLE_HU = (-4096.0, 32768.0)
"""Air is -1000 HU and metal a few thousand; scanners pad with values down to -3024."""

NARROW_HU = 100.0
"""Fat and soft tissue alone are further apart; a narrower CT was rescaled, to 0..1 for example."""

ORTHOGONAL_TOLERANCE = 1e-3
"""Largest cosine between two voxel axes that counts as a right angle; rounding in float32 headers stays below."""

SAFE_SHIFT = 0.5
"""An affine is made orthonormal where no voxel moves by more than this part of the smallest voxel size."""

SAFE_VOLUME = 0.1
"""A label map is resampled where no label gains or loses more than this part of its volume."""

SPLITS = "splits_final.json"
"""nnU-Net's file of folds: [{"train": [case, ...], "val": [case, ...]}, ...]."""

Problem = Literal[
    "missing",
    "unreadable",
    "channels",
    "grid",
    "affine",
    "labels",
    "empty organ",
    "spacing",
    "intensity",
    "duplicate",
    "split",
]

REMEDIES: dict[Problem, str] = {
    "missing": "copy the files, or take the cases out of the dataset.json",
    "unreadable": "copy, download or export these files again",
    "channels": "give every channel that the task declares, in its order",
    "grid": "resample the label maps onto their images, or let --fix do it where that is safe",
    "affine": "convert tilted scans with resampling, or let --fix straighten them where that is safe",
    "labels": "name the values in a target, or list them as ignored",
    "empty organ": "check that these organs were annotated: what is not annotated teaches that it is not there",
    "spacing": "set the true voxel size in mm",
    "intensity": "export these scans again; CT belongs in Hounsfield units",
    "duplicate": "keep one of each, or the same scan is trained and tested on",
    "split": "keep all scans of a patient on one side",
}
"""What a person does about each kind of problem."""


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


class Report(list[Finding]):
    """The findings in the order of the scans, last those that concern the whole task.

    Attributes:
        cases: the scans that were read.
        headers: what the sound headers of their images say.
    """

    def __init__(self, findings: Iterable[Finding] = (), cases: Sequence[Case] = ()) -> None:
        super().__init__(findings)
        self.cases = tuple(cases)
        self.headers: list[Header] = []

    def advice(self) -> list[str]:
        """One line for each kind of problem: how many, and what to do."""
        counts = Counter(finding.problem for finding in self)
        return [f"{counts[problem]} x {problem}: {remedy}" for problem, remedy in REMEDIES.items() if counts[problem]]


def check_path(
    path: str | Path,
    *,
    root: str | Path | None = None,
    targets: Mapping[str, int | Sequence[int]] | None = None,
    ignored: Sequence[int] = (),
    patient_pattern: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Read every scan of a file, a folder of scans, a task folder or a manifest, and list what is wrong.

    Args:
        path: a scan, a folder of scans, a Decathlon or nnU-Net raw folder, its dataset.json, or a YAML manifest.
        root: the folder that holds the data of a manifest.
        targets: structure -> label values, in place of those of the task.
        ignored: label values of the task that are left out on purpose.
        patient_pattern: as for `load_task`.
        progress: called after every scan with (scans read, scans in all).

    Raises:
        InputError: there is nothing to read at `path`, or its dataset.json or manifest is not usable.
    """
    path = Path(path)
    if path.suffix.lower() in (".yaml", ".yml") or path.name == "dataset.json" or (path / "dataset.json").is_file():
        task = load_task(
            path, targets=targets, ignored=ignored, patient_pattern=patient_pattern, root=root, must_exist=False
        )
        return check_task(task, where=path, progress=progress)
    if not path.exists():
        raise InputError(path, "nothing at this path", "a scan, a folder of scans, a task folder or a manifest")
    scans = [path] if is_volume(path) or not path.is_dir() else listed(path)
    cases = [Case(stem(scan), stem(scan), (scan,)) for scan in scans]
    return _check_cases(cases, None, progress)[0]


def check_task(
    task: Task, *, where: str | Path | None = None, progress: Callable[[int, int], None] | None = None
) -> Report:
    """As `check_path`, for a task that is already described.

    Args:
        task: the task; files of it that do not exist are findings.
        where: the file that findings about the whole task name, by default the task's name.
        progress: called after every scan with (scans read, scans in all).
    """
    where = Path(where or task.name)
    report, present = _check_cases(task.cases, task, progress)
    for target in task.targets if present else ():
        if not any(target in targets for targets in present):
            message = f"{target} = {list(task.targets[target])} is in none of the {len(present)} readable label maps"
            report.append(Finding(where, "empty organ", message))
    labelled, unlabelled = ([case for case in task.cases if (case.labels is None) == side] for side in (False, True))
    report += _shared_patients(where, ("labelled", labelled), ("test", unlabelled))
    if task.cases and (splits := _root(task.cases) / SPLITS).is_file():
        report += _check_splits(splits, task)
    return report


def _shared_patients(where: Path, *sides: tuple[str, Sequence[Case]]) -> list[Finding]:
    """A finding for each patient with scans on both of two sides."""
    (first, ours), (second, theirs) = ((name, {case.patient: case.id for case in cases}) for name, cases in sides)
    return [
        Finding(where, "split", f"the patient {patient}: {ours[patient]} is {first}, {theirs[patient]} is {second}")
        for patient in ours
        if patient in theirs
    ]


def _check_splits(file: Path, task: Task) -> list[Finding]:
    cases = {case.id: case for case in task.cases}
    findings: list[Finding] = []
    try:
        for number, fold in enumerate(read_json(file)):
            if strangers := [case for side in ("train", "val") for case in fold[side] if case not in cases]:
                findings.append(
                    Finding(file, "split", f"fold {number} names cases that are not there: {some(strangers)}")
                )
            sides = (
                (f"{side} of fold {number}", [cases[i] for i in fold[side] if i in cases]) for side in ("train", "val")
            )
            findings += _shared_patients(file, *sides)
    except (InputError, LookupError, TypeError, AttributeError):
        findings.append(Finding(file, "unreadable", "no list of folds, each with the cases of `train` and `val`"))
    return findings


def _root(cases: Sequence[Case]) -> Path:
    """The folder below which all files of some cases lie."""
    files = [path for case in cases for path in (*case.images, case.labels) if path is not None]
    return Path(os.path.commonpath([path.absolute().parent for path in files]))


def _check_cases(
    cases: Sequence[Case], task: Task | None, progress: Callable[[int, int], None] | None
) -> tuple[Report, list[set[str]]]:
    """The findings, and the targets that each readable label map holds."""
    report = Report(cases=cases)
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
        report += [replace(finding, message=" ".join(finding.message.split())) for finding in found]
        report.headers += headers
        if progress is not None:
            progress(number, len(cases))
    return report, present


def _check_headers(case: Case, task: Task | None) -> tuple[list[Finding], list[Header]]:
    """What the image headers say, and the sound ones."""
    findings: list[Finding] = []
    headers: list[Header] = []
    for path in case.images:
        header = _attempt(read_header, path)
        if isinstance(header, Header):
            headers.append(header)
            findings += _spacing(header) + _right_angles(header)
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


def _right_angles(header: Header) -> list[Finding]:
    cosine = _skew(header.affine.numpy())
    if cosine <= ORTHOGONAL_TOLERANCE:
        return []
    degrees = np.degrees(np.arcsin(cosine))
    message = f"voxel axes {degrees:.3g} degrees off a right angle: a tilted gantry, or a damaged affine"
    return [Finding(header.path, "affine", message, "warning")]


def _skew(affine: np.ndarray) -> float:
    """The largest cosine between two voxel axes of an affine (4, 4)."""
    axes = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    return float(np.abs(axes.T @ axes - np.eye(3)).max())


def _check_voxels(case: Case, task: Task | None, first_with: dict[bytes, Path]) -> list[Finding]:
    file = case.images[0]
    volume = _attempt(read_channels, case.images)
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
    digest.update(volume.data.contiguous().numpy().data)
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
    header = _attempt(read_header, path)
    if not isinstance(header, Header):
        return [Finding(path, "unreadable" if path.exists() else "missing", header)], None
    findings: list[Finding] = []
    if headers and (difference := grid_difference(header, headers[0])):
        findings.append(Finding(path, "grid", f"other grid than {headers[0].path.name}: {difference}"))
    labels = _attempt(read_labels, path)
    if isinstance(labels, str):
        # What reads as an image was readable: then the values are at fault.
        readable = not isinstance(_attempt(read_volume, path), str)
        return [*findings, Finding(path, "labels" if readable else "unreadable", labels)], None
    values = _values(labels.data)
    refusal = _attempt(task.encode, values, path)
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


def _attempt(read: Callable[P, T], *given: P.args, **named: P.kwargs) -> T | str:
    """What `read` returns, or in one line why it could not."""
    try:
        return read(*given, **named)
    except InputError as error:
        return f"{error.found}; required: {error.required}. {error.remedy}".strip()
    except Exception as error:  # one bad scan never stops the others, whatever a library makes of it
        return f"{type(error).__name__}: {error}"


@dataclass(frozen=True)
class Repair:
    """What became of one file that `fix` looked at.

    Args:
        file: the file, left as it is.
        copy: its repaired copy; None where a repair would not be safe.
        message: what was done, or why nothing was.
    """

    file: Path
    copy: Path | None
    message: str


def fix(report: Report, folder: str | Path) -> list[Repair]:
    """Write repaired copies of what can be repaired safely; the files that were checked are never touched.

    Affines whose axes are nearly perpendicular become orthonormal; label maps on another grid than their image are
    brought onto it by the nearest voxel, as their own header says where they lie.

    Args:
        report: what `check_path` or `check_task` returned.
        folder: a new or empty folder; copies lie in it as their originals lie in the folder of the task.

    Raises:
        InputError: `folder` holds something already, or cannot be written to.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(folder, "something that stands there already", "a new or empty folder", "Name another one.")
    found = {(finding.file, finding.problem) for finding in report}
    repairs: list[Repair] = []
    for case in report.cases:
        crooked = [path for path in case.images if (path, "affine") in found]
        if not crooked and (case.labels, "grid") not in found:
            continue
        sound = [path for path in (*case.images, case.labels) if path is not None and not _refused(path, report)]
        read = {path: _attempt(read_volume, path) for path in crooked if path in sound}
        straight = {path: _straightened(volume) for path, volume in read.items() if isinstance(volume, Volume)}
        for path, volume in straight.items():
            if volume is None:
                message = f"not safe: a voxel would move by more than {SAFE_SHIFT:g} of its size; resample the scan"
                repairs.append(Repair(path, None, message))
            else:
                repairs.append(_written(volume, path, folder, report, "axes made perpendicular"))
        if case.labels in sound and case.images[0] in sound:
            repairs += _fixed_labels(case, straight.get(case.images[0]), folder, report)
    return repairs


def _refused(path: Path, report: Report) -> bool:
    return any(finding.file == path and finding.problem in ("missing", "unreadable") for finding in report)


def _straightened(volume: Volume) -> Volume | None:
    """The volume on the nearest orthonormal grid around its centre; None where a voxel would move too far."""
    affine = volume.affine.numpy()
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    left, _, right = np.linalg.svd(affine[:3, :3] / spacing)
    straight = np.eye(4)
    straight[:3, :3] = left @ right * spacing
    centre = (np.array(volume.shape) - 1) / 2
    straight[:3, 3] = affine[:3, :3] @ centre + affine[:3, 3] - straight[:3, :3] @ centre
    if displacement(affine, straight, volume.shape) > SAFE_SHIFT * spacing.min():
        return None
    return Volume(volume.data, torch.from_numpy(straight))


def _fixed_labels(case: Case, straight: Volume | None, folder: Path, report: Report) -> list[Repair]:
    """The label map of a case on the grid of its image, which may have been straightened."""
    assert case.labels is not None
    image = read_header(case.images[0])
    labels = _attempt(read_labels, case.labels)
    if isinstance(labels, str):
        return [Repair(case.labels, None, f"not safe: {labels}")]
    affine = image.affine if straight is None else straight.affine
    if grid_difference(labels, image) is None:
        if straight is None:
            return []
        return [_written(Volume(labels.data, affine), case.labels, folder, report, "affine of its image")]
    step = np.linalg.inv(labels.affine.numpy()) @ affine.numpy()
    moved = affine_transform(
        labels.data[0].numpy(), step[:3, :3], step[:3, 3], image.shape, order=0, mode="grid-constant", prefilter=False
    )
    before, after = _volumes(labels.data, labels.affine), _volumes(torch.from_numpy(moved), affine)
    for value, volume in before.items():
        kept = after.get(value, 0.0) / volume
        if abs(kept - 1) > SAFE_VOLUME:
            message = f"not safe: on the grid of its image label {value} would have {kept:.0%} of its volume"
            return [Repair(case.labels, None, message)]
    resampled = Volume(torch.from_numpy(moved)[None], affine)
    return [_written(resampled, case.labels, folder, report, "resampled onto the grid of its image")]


def _volumes(labels: Tensor, affine: Tensor) -> dict[int, float]:
    """Volume in mm^3 of each label but the background."""
    voxel = abs(float(torch.linalg.det(affine[:3, :3])))
    values, counts = labels.unique(return_counts=True)
    return {int(value): int(count) * voxel for value, count in zip(values, counts, strict=True) if value != 0}


def _written(volume: Volume, file: Path, folder: Path, report: Report, message: str) -> Repair:
    place = folder / file.absolute().relative_to(_root(report.cases))
    if volume_suffix(file) not in WRITABLE_SUFFIXES:
        place = place.with_name(f"{stem(file)}.nii.gz")
    place.parent.mkdir(parents=True, exist_ok=True)
    data = volume.data
    whole = (data.clamp(-(2**30), 2**30) if data.is_floating_point() else data).int()
    # A scan of whole numbers was stored as such, and float32 would only make it larger.
    write_volume(Volume(whole if torch.equal(whole.to(data), data) else data, volume.affine), place)
    return Repair(file, place, message)


def summarise(report: Report, scans: int) -> dict[str, Any]:
    """A report as plain values for JSON.

    Args:
        report: what `check_path` returned.
        scans: the number of scans read, the second number that `progress` is told.
    """
    severities = Counter(finding.severity for finding in report)
    return {
        "scans": scans,
        "errors": severities["error"],
        "warnings": severities["warning"],
        "problems": dict(sorted(Counter(finding.problem for finding in report).items())),
        "orientations": dict(sorted(Counter(header.orientation for header in report.headers).items())),
        "images": [
            {
                "file": str(header.path),
                "shape": header.shape,
                "channels": header.channels,
                "spacing": header.spacing,
                "orientation": header.orientation,
                "dtype": header.dtype,
            }
            for header in report.headers
        ],
        "findings": [asdict(finding) | {"file": str(finding.file)} for finding in report],
    }
