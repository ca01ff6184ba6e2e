"""YAML manifests of public data sets: where they come from, under which terms, and what their label values mean."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from medmeta.errors import InputError

Modality = Literal["CT", "MR"]
Targets = dict[str, tuple[int, ...]]

MAX_LABEL = 65535
"""Largest label value that a target may name, so that a lookup table of the values stays small."""


class Manifest(BaseModel):
    """A public data set in one YAML file. Unknown keys are refused.

    Args:
        name: name of the task.
        organ: what is segmented.
        modality: "CT" or "MR".
        folder: the unpacked data set with its dataset.json, relative to a data root that the caller names.
        channels: names of the image channels, in order.
        labels: label value -> name.
        targets: structure -> the label values that make it up; one target for each label where there are none.
        ignored: label values that count neither as background nor as a target.
        patient_pattern: regular expression with one group that matches the patient in a case id.
        source: URL of the archive, where anybody may fetch it.
        checksum: MD5 or SHA-256 sum of the archive.
        size_gb: approximate size of the archive in GB.
        obtain: how to come by the data where there is no `source`, and into which layout to bring them.
        licence: the terms of use.
        reference: the publication to cite.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: str
    organ: str
    modality: Modality
    folder: str
    channels: list[str]
    labels: dict[int, str]
    targets: dict[str, list[int]] = {}
    ignored: list[int] = []
    patient_pattern: str | None = None
    source: str = ""
    checksum: str = Field(default="", pattern=r"^([0-9a-f]{32}|[0-9a-f]{64})?$")
    size_gb: float | None = Field(default=None, gt=0)
    obtain: str = ""
    licence: str = ""
    reference: str = ""


def load_manifest(path: str | Path) -> Manifest:
    """Read and check a YAML manifest; missing targets are filled in from the labels.

    Raises:
        InputError: no such file, not YAML, an unknown or a missing key, targets that name values without a label.
    """
    path = Path(path)
    text = read_text(path)
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(path, f"text that is not YAML ({error})", "a YAML manifest") from error
    if not isinstance(content, dict):
        raise InputError(path, f"{type(content).__name__} at the top level", "keys and values")
    try:
        manifest = Manifest.model_validate(content)
    except ValidationError as error:
        raise _manifest_error(path, error) from error
    targets = as_targets(manifest.targets or label_targets(manifest.labels.items()), manifest.ignored, path)
    named = {value for values in targets.values() for value in values} | set(manifest.ignored)
    if strangers := sorted(named - set(manifest.labels)):
        raise InputError(path, f"values without a label: {strangers}", f"values of {sorted(manifest.labels)}")
    if not manifest.channels:
        raise InputError(path, "no channels", "the name of each image channel")
    relative_path(manifest.folder, path)
    return manifest.model_copy(update={"targets": {name: list(values) for name, values in targets.items()}})


def _manifest_error(path: Path, error: ValidationError) -> InputError:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    known = ", ".join(Manifest.model_fields)
    if first["type"] == "extra_forbidden":
        return InputError(path, f"the unknown key {key!r}", f"only the known keys: {known}")
    if first["type"] == "missing":
        needed = ", ".join(name for name, field in Manifest.model_fields.items() if field.is_required())
        return InputError(path, f"no key {key!r}", f"at least {needed}")
    return InputError(path, f"{key} = {first['input']!r}", first["msg"])


def manifest_names() -> tuple[str, ...]:
    """The manifests that come with the package, such as "Task04_Hippocampus"."""
    return tuple(sorted(path.stem for path in _manifest_folder().glob("*.yaml")))


def find_manifest(name: str) -> Path:
    """The file of a manifest that comes with the package.

    Raises:
        InputError: no manifest of that name.
    """
    names = manifest_names()
    if name not in names:
        raise InputError(name, "no manifest of that name", f"one of {', '.join(names)}")
    return _manifest_folder() / f"{name}.yaml"


def _manifest_folder() -> Path:
    package = Path(__file__).resolve().parents[1]
    checkout = package.parent / "data_manifests"
    return checkout if checkout.is_dir() else package / "data_manifests"


def label_targets(labels: Iterable[tuple[int, str]]) -> Targets:
    """One target for each label but the background; labels of one name make one target."""
    targets: Targets = {}
    for value, name in labels:
        if value != 0:
            targets[name] = (*targets.get(name, ()), value)
    return targets


def as_targets(targets: Mapping[str, int | Sequence[int]], ignored: Sequence[int], where: str | Path) -> Targets:
    """Check what a task calls its targets, and bring each to a tuple of label values.

    Raises:
        InputError: no target; a target without values, or with a value that comes twice or is not a whole number in
            1..65535; an ignored value that a target names, or that is 0.
    """
    if not targets:
        raise InputError(where, "no targets", "at least one structure with its label values", "Such as liver=1,2.")
    checked: Targets = {}
    for name, given in targets.items():
        values = tuple(given) if isinstance(given, Sequence) and not isinstance(given, str) else (given,)
        if not values:
            raise InputError(where, f"target {name!r} without values", "the label values that make it up")
        _check_values(values, f"target {name!r}", where)
        if len(set(values)) < len(values):
            raise InputError(where, f"target {name!r} = {list(values)}", "each label value once")
        checked[name] = values
    _check_values(ignored, "ignored", where)
    for name, values in checked.items():
        if both := sorted(set(values) & set(ignored)):
            raise InputError(where, f"ignored values {both} in target {name!r}", "values either ignored or named")
    return checked


def _check_values(values: Sequence[int], what: str, where: str | Path) -> None:
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_LABEL:
            required = f"whole label values in 1..{MAX_LABEL}" + (" (0 is the background)" if value == 0 else "")
            raise InputError(where, f"{what} with the value {value!r}", required)


def relative_path(entry: object, where: Path) -> PurePosixPath:
    """A path inside a data set, as its description gives it.

    Raises:
        InputError: an entry that is no path, is absolute, or climbs out of the folder with "..".
    """
    if not isinstance(entry, str) or not entry.strip():
        raise InputError(where, f"the entry {entry!r} in place of a path", "a path relative to the folder")
    windows = PureWindowsPath(entry)
    # The Windows reading also sees "/x", "C:x" and "a\..\b".
    if windows.anchor or ".." in windows.parts:
        raise InputError(where, f"the path {entry!r}", "paths inside the folder, without a root and without '..'")
    return PurePosixPath(entry)


def read_text(path: Path) -> str:
    """Read a small UTF-8 file.

    Raises:
        InputError: the file is missing or not text.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(path, error.strerror or str(error), "a file that can be read") from error
    except UnicodeDecodeError as error:
        raise InputError(path, "bytes that are not UTF-8", "a text file") from error
