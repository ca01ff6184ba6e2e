"""Cases, patients and tasks: Decathlon and nnU-Net folders, pairs of folders, manifests; splits by patient.

No voxels are read here: a task is a list of files with the meaning of their label values.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from medmeta.data.folders import Files, paired_files, read_layout, refuse_repeats, some
from medmeta.data.manifests import Manifest, Modality, Targets, as_targets, load_manifest
from medmeta.data.volume import read_header
from medmeta.episode import IGNORED
from medmeta.errors import InputError
from medmeta.representation import task_html, task_line

_UNNAMED = IGNORED - 1


@dataclass(frozen=True)
class Case:
    """One scan of one patient.

    Args:
        id: name of the case, unique in its task.
        patient: who was scanned; splits never put one patient on both sides.
        images: one 3-D file per channel, or a single file that holds all channels.
        labels: the label map, None for an unlabelled scan.
    """

    id: str
    patient: str
    images: tuple[Path, ...]
    labels: Path | None = None


@dataclass(frozen=True)
class Task:
    """An organ to segment: its scans and what their label values mean.

    Args:
        name: name of the task.
        organ: what is segmented; two tasks of one organ never stand on both sides of an organ-disjoint split.
        modality: "CT" (intensities in HU) or "MR".
        targets: structure -> the label values that make it up. Targets may overlap (a tumour inside a liver).
        cases: the scans.
        ignored: label values that count neither as background nor as any target.
        background: label values that count as background, beside 0: other organs of a label map.
        channels: names of the image channels, in order.
        terms: the licence under which the data may be used.
        reference: the publication to cite.

    Raises:
        InputError: targets, ignored values, modality, channels or cases do not fit together.
    """

    name: str
    organ: str
    modality: Modality
    targets: Targets
    cases: tuple[Case, ...]
    ignored: tuple[int, ...] = ()
    channels: tuple[str, ...] = ("image",)
    terms: str = ""
    reference: str = ""
    background: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        where = f"task {self.name}"
        object.__setattr__(self, "targets", as_targets(self.targets, self.ignored, where))
        taken = {*self.ignored, *(value for values in self.targets.values() for value in values)}
        if both := sorted(taken & set(self.background)):
            raise InputError(where, f"background values {both} in a target or ignored", "each label value in one place")
        if self.modality not in ("CT", "MR"):
            raise InputError(where, f"modality {self.modality!r}", "CT or MR")
        if not self.channels:
            raise InputError(where, "no channels", "the name of each image channel")
        refuse_repeats((case.id for case in self.cases), where)

    def __repr__(self) -> str:
        return f"Task({task_line(self)})"

    def _repr_html_(self) -> str:
        return task_html(self)

    @cached_property
    def atoms(self) -> tuple[tuple[int, ...], ...]:
        """The exclusive classes: the coarsest partition of the label values of which every target is a union.

        Label values that are held by the same targets share an atom; atoms come in order of first appearance. Disjoint
        targets are their own atoms.
        """
        groups: dict[tuple[str, ...], list[int]] = {}
        for value in dict.fromkeys(value for values in self.targets.values() for value in values):
            holders = tuple(name for name, values in self.targets.items() if value in values)
            groups.setdefault(holders, []).append(value)
        return tuple(tuple(values) for values in groups.values())

    @property
    def classes(self) -> int:
        """K, the number of exclusive foreground classes."""
        return len(self.atoms)

    @cached_property
    def _table(self) -> Tensor:
        # Position v + 1 holds the class of label value v; the first and the last stand for all values out of range.
        named = [value for atom in self.atoms for value in atom]
        table = torch.full((max(*named, *self.ignored, *self.background, 0) + 3,), _UNNAMED)
        table[1] = 0
        table[[value + 1 for value in self.background]] = 0
        for number, atom in enumerate(self.atoms, start=1):
            table[[value + 1 for value in atom]] = number
        table[[value + 1 for value in self.ignored]] = IGNORED
        return table

    def encode(self, labels: Tensor, where: str | Path) -> Tensor:
        """Turn label values into classes.

        Args:
            labels: any shape, integer.
            where: the file that the labels come from, for the error.

        Returns:
            long mask of the same shape: 0 background, 1..K the atoms, -1 ignored.

        Raises:
            InputError: a value that is neither named by a target nor background nor ignored.
        """
        if labels.is_floating_point() or labels.is_complex():
            raise InputError(where, f"labels of type {labels.dtype}", "integer labels")
        # 32 bits hold every label that is stored in a file, and an index half the size of the default one.
        wide = labels if labels.dtype == torch.int64 else labels.to(torch.int32)
        index = wide.clamp(-1, len(self._table) - 2).add_(1)
        mask = self._table.to(labels.device).index_select(0, index.reshape(-1)).reshape(labels.shape)
        if mask.numel() and int(mask.min()) == _UNNAMED:
            raise self._unnamed_error(labels[mask == _UNNAMED].unique().tolist(), where)
        return mask

    def _unnamed_error(self, values: Sequence[int], where: str | Path) -> InputError:
        named = [f"{name} = {list(held)}" for name, held in self.targets.items()]
        named += [f"ignored = {list(self.ignored)}"] if self.ignored else []
        zero = ", ".join(map(str, (0, *self.background)))
        return InputError(
            where,
            f"label values that no target names: {some([str(value) for value in values])}",
            f"background {zero}, {', '.join(named)}",
            "Name them in a target, or list them under `background` or `ignored`.",
        )

    def decode(self, mask: Tensor) -> Tensor:
        """Turn classes back into label values.

        Each atom is written as its smallest value, so that every target still holds exactly its voxels; ignored voxels
        are written as the smallest ignored value.

        Args:
            mask: any shape, integer, 0..K and -1.

        Returns:
            int32 label values of the same shape.
        """
        values = torch.tensor([0, *(min(atom) for atom in self.atoms), min(self.ignored, default=0)], dtype=torch.int32)
        return values.to(mask.device)[mask.long()]

    @property
    def patients(self) -> tuple[str, ...]:
        """The patients, each once, in the order of the cases."""
        return tuple(dict.fromkeys(case.patient for case in self.cases))

    def of_patients(self, patients: Iterable[str]) -> Task:
        """The same task with the cases of these patients only.

        Raises:
            InputError: a patient whom the task does not have.
        """
        wanted = set(patients)
        if strangers := sorted(wanted - set(self.patients)):
            raise InputError(f"task {self.name}", f"unknown patients: {some(strangers)}", "patients of the task")
        return replace(self, cases=tuple(case for case in self.cases if case.patient in wanted))

    @property
    def labelled(self) -> Task:
        """The same task with its labelled cases only."""
        return replace(self, cases=tuple(case for case in self.cases if case.labels is not None))


def load_task(
    path: str | Path,
    *,
    targets: Mapping[str, int | Sequence[int]] | None = None,
    ignored: Sequence[int] = (),
    patient_pattern: str | None = None,
    name: str | None = None,
    organ: str | None = None,
    root: str | Path | None = None,
    must_exist: bool = True,
) -> Task:
    """Read the task that a folder or a manifest describes.

    Args:
        path: a Decathlon folder, an nnU-Net raw folder (each with its dataset.json), or a YAML manifest.
        targets: structure -> label values; by default the manifest's, or one target for each label of the dataset.json.
        ignored: label values that count neither as background nor as a target, besides those that the data set ignores.
        patient_pattern: regular expression with one group that matches the patient in a case id, "^(.*)_frame" for
            ACDC; by default the manifest's, or every case is a patient of its own.
        name: name of the task, by default the data set's.
        organ: the organ, by default the manifest's, or the name in lower case without its "Task04_".
        root: the folder that holds the data of a manifest, by default the manifest's own.
        must_exist: refuse the task when one of its files is missing.

    Raises:
        InputError: the description or the files of the task are not usable; the error says why.
    """
    path = Path(path)
    manifest = load_manifest(path) if path.suffix.lower() in (".yaml", ".yml") else None
    if manifest is None:
        folder = path.parent if path.name == "dataset.json" else path
    else:
        folder = (path.parent if root is None else Path(root)) / manifest.folder
        if not folder.is_dir():
            remedy = f"Unpack {manifest.source} there, or name the data root that holds {manifest.folder}."
            raise InputError(folder, "no such folder", f"the data of {manifest.name}", remedy)
        targets = manifest.targets if targets is None else targets
        ignored = (*manifest.ignored, *ignored)
        patient_pattern = patient_pattern or manifest.patient_pattern
    task = _from_folder(folder, targets, ignored, patient_pattern)
    if must_exist:
        _require_files(task.cases, folder)
    if manifest is not None:
        task = _described(task, manifest, folder)
    return replace(task, name=name or task.name, organ=organ or (task.organ if name is None else _organ(name)))


def _described(task: Task, manifest: Manifest, folder: Path) -> Task:
    if len(task.channels) != len(manifest.channels):
        found = f"{len(task.channels)} channels ({', '.join(task.channels)})"
        raise InputError(folder / "dataset.json", found, f"those of the manifest: {', '.join(manifest.channels)}")
    return replace(
        task,
        name=manifest.name,
        organ=manifest.organ,
        modality=manifest.modality,
        channels=tuple(manifest.channels),
        terms=manifest.licence or task.terms,
        reference=manifest.reference or task.reference,
    )


def _from_folder(
    folder: Path, targets: Mapping[str, int | Sequence[int]] | None, ignored: Sequence[int], patient_pattern: str | None
) -> Task:
    layout, where = read_layout(folder), folder / "dataset.json"
    ignored = tuple(dict.fromkeys((*layout.ignored, *ignored)))
    return Task(
        name=layout.name,
        organ=_organ(layout.name),
        modality="CT" if all(channel.strip().upper() == "CT" for channel in layout.channels) else "MR",
        targets=as_targets(layout.targets if targets is None else targets, ignored, where),
        cases=_cases(layout.files, patient_pattern, where),
        ignored=ignored,
        channels=layout.channels,
        terms=layout.terms,
        reference=layout.reference,
    )


def pair_folders(
    images: str | Path,
    labels: str | Path,
    *,
    targets: Mapping[str, int | Sequence[int]],
    modality: Modality,
    ignored: Sequence[int] = (),
    background: Sequence[int] = (),
    patient_pattern: str | None = None,
    name: str | None = None,
    organ: str | None = None,
) -> Task:
    """Make a task of two folders whose files pair by name.

    `case.nii.gz` pairs with `case.nii.gz`, whatever the two suffixes are; `case_0000.nii.gz`, `case_0001.nii.gz` and so
    on are the channels of the labels `case.nii.gz`.

    Args:
        images: folder of scans.
        labels: folder of label maps.
        targets: structure -> label values.
        modality: "CT" (intensities in HU) or "MR".
        ignored: label values that count neither as background nor as a target.
        background: label values that count as background, beside 0.
        patient_pattern: regular expression with one group that matches the patient in a case id; by default every case
            is a patient of its own.
        name: name of the task, by default that of the folder that holds `images`.
        organ: the organ, by default the names of the targets.

    Raises:
        InputError: a missing or empty folder, images without labels or the reverse, unusable targets.
    """
    images, labels = Path(images), Path(labels)
    cases = _cases(paired_files(images, labels), patient_pattern, images)
    _require_files(cases, images)
    # Nothing but the scans says how many channels a single file holds.
    channels = sum(read_header(path).channels for path in cases[0].images)
    return Task(
        name=name or images.resolve().parent.name,
        organ=organ or ", ".join(targets),
        modality=modality,
        targets=as_targets(targets, ignored, labels),
        cases=cases,
        ignored=tuple(ignored),
        background=tuple(background),
        channels=("image",) if channels == 1 else tuple(f"channel {i}" for i in range(channels)),
    )


def _cases(files: Sequence[Files], patient_pattern: str | None, where: Path) -> tuple[Case, ...]:
    if not files:
        raise InputError(where, "no cases", "at least one scan")
    refuse_repeats((case.id for case in files), where)
    patient = _patient_rule(patient_pattern, where)
    return tuple(Case(case.id, patient(case.id), case.images, case.labels) for case in files)


def _patient_rule(pattern: str | None, where: Path) -> Callable[[str], str]:
    if pattern is None:
        return lambda case: case
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise InputError(where, f"patient_pattern {pattern!r} ({error})", "a regular expression") from error
    if compiled.groups != 1:
        raise InputError(where, f"patient_pattern {pattern!r} with {compiled.groups} groups", "one group, (...)")

    def patient(case: str) -> str:
        match = compiled.search(case)
        if not match or not match[1]:
            raise InputError(where, f"no patient in the case {case!r}", f"names that match patient_pattern {pattern!r}")
        return match[1]

    return patient


def _require_files(cases: Sequence[Case], where: Path) -> None:
    unlabelled = [case for case in cases if case.labels and not case.labels.exists()]
    if lonely := [case.images[0].name for case in unlabelled if case.images[0].exists()]:
        raise InputError(where, f"images without labels: {some(lonely)}", "a label map for each image")
    imageless = [case for case in cases if not any(image.exists() for image in case.images)]
    if lonely := [case.labels.name for case in imageless if case.labels and case.labels.exists()]:
        raise InputError(where, f"labels without images: {some(lonely)}", "an image for each label map")
    if missing := [image.name for case in cases for image in case.images if not image.exists()]:
        raise InputError(where, f"missing image files: {some(missing)}", "every image of the task, all channels")


def _organ(name: str) -> str:
    return re.sub(r"^(Task|Dataset)\d+_", "", name).lower()


def split_patients(task: Task, parts: Sequence[float] | Sequence[int], seed: int) -> tuple[Task, ...]:
    """Divide a task so that no patient is in two parts.

    The patients are shuffled once and dealt in order: `(50, 3)` and `(50, 5)` with one seed share their first part, and
    the three patients are among the five.

    Args:
        task: the task; unlabelled cases are dealt too, so take `task.labelled` where only those count.
        parts: whole numbers of patients, or fractions of the patients, at least one for each part; what they leave over
            is in no part.
        seed: decides the order of the patients, whatever the order of the cases.

    Raises:
        InputError: more patients wanted than there are; parts that are not all counts or all fractions.
    """
    patients = sorted(task.patients)
    sizes = _part_sizes(parts, len(patients), f"task {task.name}")
    order = torch.randperm(len(patients), generator=torch.Generator().manual_seed(seed)).tolist()
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    dealt = ([patients[i] for i in order[end - size : end]] for size, end in zip(sizes, ends, strict=True))
    return tuple(task.of_patients(part) for part in dealt)


def _part_sizes(parts: Sequence[float] | Sequence[int], patients: int, where: str) -> list[int]:
    counts = all(isinstance(part, int) for part in parts)
    if (
        not parts
        or any(not part > 0 for part in parts)
        or (not counts and not all(isinstance(p, float) for p in parts))
    ):
        raise InputError(where, f"parts {list(parts)}", "positive counts or positive fractions of patients")
    if not counts and sum(parts) > 1 + 1e-9:
        raise InputError(where, f"fractions {list(parts)} with the sum {sum(parts):g}", "a sum of at most 1")
    wanted = sum(parts) if counts else len(parts)
    if wanted > patients:
        raise InputError(where, f"{patients} patients", f"at least {wanted} patients for the parts {list(parts)}")
    if counts:
        return [int(part) for part in parts]
    sizes = [max(1, math.floor(part * patients + 1e-9)) for part in parts]
    total = max(len(parts), round(sum(parts) * patients))
    while sum(sizes) != total:
        # One patient at a time, to or from the part that is furthest from its fair share.
        step = 1 if sum(sizes) < total else -1
        movable = [i for i, size in enumerate(sizes) if size + step >= 1]
        nearest = max(movable, key=lambda i: step * (parts[i] * patients - sizes[i]))
        sizes[nearest] += step
    return sizes
