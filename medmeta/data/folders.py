"""What lies in a folder of scans: the Decathlon and nnU-Net raw layouts, and two folders that pair by file name.

Here a data set is still a list of files with a description; `medmeta.data.tasks` makes a task of it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medmeta.data.manifests import Targets, label_targets, read_text, relative_path
from medmeta.data.volume import is_volume, volume_suffix
from medmeta.errors import InputError

_CHANNEL_FILE = re.compile(r"(.+)_(\d{4})")
"""nnU-Net's name of the file of one channel, without its suffix."""


@dataclass(frozen=True)
class Files:
    """The files of one case, whether they exist or not."""

    id: str
    images: tuple[Path, ...]
    labels: Path | None


@dataclass(frozen=True)
class Layout:
    """What a dataset.json says and where its files lie."""

    name: str
    channels: tuple[str, ...]
    targets: Targets
    ignored: tuple[int, ...]
    files: tuple[Files, ...]
    terms: str
    reference: str


def read_layout(folder: Path) -> Layout:
    """Read the dataset.json of a Decathlon or an nnU-Net raw folder, and list the files of its cases.

    Targets are one for each label, the background left out; nnU-Net's label "ignore" is ignored.

    Raises:
        InputError: no folder, no dataset.json, or one that cannot be understood.
    """
    require_folder(folder)
    where = folder / "dataset.json"
    if not where.is_file():
        raise InputError(folder, "no dataset.json", "a Decathlon or an nnU-Net raw folder with its dataset.json")
    content = _read_json(where)
    nnunet = "channel_names" in content or "file_ending" in content
    for key in ("channel_names", "labels", "file_ending") if nnunet else ("modality", "labels", "training"):
        if key not in content:
            required = "channel_names, labels and file_ending (nnU-Net) or modality, labels and training (Decathlon)"
            raise InputError(where, f"no key {key!r}", required)
    channels = _channels(content["channel_names" if nnunet else "modality"], where)
    targets, ignored = (_nnunet_labels if nnunet else _decathlon_labels)(content["labels"], where)
    files = _nnunet_files(folder, content, len(channels)) if nnunet else _decathlon_files(folder, content)
    return Layout(
        name=str(content.get("name") or folder.resolve().name),
        channels=channels,
        targets=targets,
        ignored=ignored,
        files=tuple(files),
        terms=str(content.get("licence") or content.get("license") or ""),
        reference=str(content.get("reference") or ""),
    )


def _read_json(where: Path) -> dict[str, Any]:
    text = read_text(where)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(where, f"text that is not JSON ({error})", "a valid dataset.json") from error
    if not isinstance(content, dict):
        raise InputError(where, f"a {type(content).__name__} at the top level", "keys and values")
    return content


def _channels(content: object, where: Path) -> tuple[str, ...]:
    numbered = _whole_keys(content, "channels", where)
    if sorted(numbered) != list(range(len(numbered))) or not numbered:
        raise InputError(where, f"channels numbered {sorted(numbered)}", "channels numbered from 0 without a gap")
    return tuple(str(numbered[i]) for i in range(len(numbered)))


def _decathlon_labels(content: object, where: Path) -> tuple[Targets, tuple[int, ...]]:
    return label_targets((value, str(name)) for value, name in _whole_keys(content, "labels", where).items()), ()


def _whole_keys(content: object, what: str, where: Path) -> dict[int, Any]:
    try:
        return {int(key): value for key, value in content.items()}  # type: ignore[attr-defined]
    except (AttributeError, TypeError, ValueError) as error:
        raise InputError(where, f"{what} {content!r}", 'numbers with names, such as {"0": "CT"}') from error


def _nnunet_labels(content: object, where: Path) -> tuple[Targets, tuple[int, ...]]:
    if not isinstance(content, dict):
        raise InputError(where, f"labels {content!r}", 'names with values, such as {"background": 0, "liver": 1}')
    # Regions are lists of values and may overlap; 0 and [0] are the background whatever they are called.
    values = {str(name): tuple(held) if isinstance(held, list) else (held,) for name, held in content.items()}
    ignored = values.pop("ignore", ())
    return {name: held for name, held in values.items() if held != (0,)}, ignored


def _decathlon_files(folder: Path, content: dict[str, Any]) -> list[Files]:
    where = folder / "dataset.json"
    files: list[Files] = []
    for key in ("training", "test"):
        entries = content.get(key, [])
        if not isinstance(entries, list):
            raise InputError(where, f"{key!r} of type {type(entries).__name__}", "a list of cases")
        for entry in entries:
            pair = entry if isinstance(entry, dict) else {"image": entry}
            if key == "training" and not {"image", "label"} <= set(pair):
                raise InputError(where, f"the training case {entry!r}", "an image and a label for each training case")
            image = folder / relative_path(pair.get("image"), where)
            labels = folder / relative_path(pair["label"], where) if key == "training" else None
            if not image.name.startswith("."):
                files.append(Files(stem(image), (image,), labels))
    return files


def _nnunet_files(folder: Path, content: dict[str, Any], channels: int) -> list[Files]:
    ending = str(content["file_ending"])
    files: list[Files] = []
    for images, labels in (("imagesTr", "labelsTr"), ("imagesTs", None)):
        if labels is None and not any((folder / images).glob("*")):
            continue
        present = listed(folder / images, lambda path: path.name.endswith(ending))
        named = {path: _CHANNEL_FILE.fullmatch(path.name.removesuffix(ending)) for path in present}
        if odd := [path.name for path, match in named.items() if not match or int(match[2]) >= channels]:
            required = f"case_0000{ending} to case_{channels - 1:04d}{ending} for each case"
            raise InputError(folder / images, f"image names outside the channels: {some(odd)}", required)
        ids = {match[1] for match in named.values() if match}
        if labels is not None:
            ids |= {p.name.removesuffix(ending) for p in listed(folder / labels, lambda p: p.name.endswith(ending))}
        for case in sorted(ids):
            expected = tuple(folder / images / f"{case}_{i:04d}{ending}" for i in range(channels))
            files.append(Files(case, expected, None if labels is None else folder / labels / f"{case}{ending}"))
    return files


def paired_files(images: Path, labels: Path) -> tuple[Files, ...]:
    """Pair the scans of one folder with the label maps of another by name.

    `case.nii.gz` pairs with `case.nii.gz`, whatever the two suffixes are; `case_0000.nii.gz`, `case_0001.nii.gz` and so
    on are the channels of the labels `case.nii.gz`. What lacks its partner is listed with the file that is missing.

    Raises:
        InputError: a missing or empty folder; two files for one case or one channel.
    """
    label_paths = listed(labels)
    refuse_repeats((stem(path) for path in label_paths), labels)
    of_case = {stem(path): path for path in label_paths}
    found: dict[str, dict[int, Path]] = {}
    for path in listed(images):
        case, number = stem(path), 0
        # Digits at the end name a channel only where the name without them has labels and the whole name has none.
        if case not in of_case and (match := _CHANNEL_FILE.fullmatch(case)) and match[1] in of_case:
            case, number = match[1], int(match[2])
        if number in found.setdefault(case, {}):
            raise InputError(images, f"{found[case][number].name} and {path.name}", f"one file for the case {case!r}")
        found[case][number] = path
    count = max(number for files in found.values() for number in files) + 1
    paired = []
    for case in dict.fromkeys((*found, *of_case)):
        expected = tuple(found.get(case, {}).get(i, images / f"{case}_{i:04d}") for i in range(count))
        paired.append(Files(case, expected, of_case.get(case, labels / case)))
    return tuple(paired)


def require_folder(folder: Path) -> None:
    """Raise InputError unless this is a folder."""
    if not folder.is_dir():
        raise InputError(folder, "a file" if folder.exists() else "no such folder", "a folder")


def listed(folder: Path, wanted: Callable[[Path], bool] = is_volume) -> list[Path]:
    """The wanted entries of a folder by name, without hidden ones such as the ._ files of macOS archives.

    Raises:
        InputError: no such folder, or nothing wanted in it.
    """
    require_folder(folder)
    found = [path for path in sorted(folder.iterdir()) if not path.name.startswith(".") and wanted(path)]
    if not found:
        remedy = "Scans end in .nii.gz, .nii, .nrrd, .mha or .mhd; a task folder has a dataset.json."
        raise InputError(folder, "no scans", "at least one scan", remedy)
    return found


def stem(path: Path) -> str:
    """The name of a scan without its suffix."""
    return path.name[: len(path.name) - len(volume_suffix(path))]


def some(names: Sequence[str]) -> str:
    """Up to three names, and how many there are where they are more."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more ({len(names)} in all)" if len(names) > 3 else "")


def refuse_repeats(ids: Iterable[str], where: str | Path) -> None:
    """Raise InputError where one name comes twice."""
    seen: set[str] = set()
    for case in ids:
        if case in seen:
            raise InputError(where, f"the case {case!r} twice", "each case once")
        seen.add(case)
