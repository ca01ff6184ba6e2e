"""What an adaptation learns from: the task that folders make, its scans on a working grid, patches of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np

from medmeta.data.preprocess import Preprocess
from medmeta.data.sampler import draw_patch
from medmeta.data.store import StoredCase, StoredTask, fit_preprocess, prepare, prepare_unlabelled
from medmeta.data.tasks import Case, Task, pair_folders
from medmeta.data.volume import read_channels, read_labels
from medmeta.episode import Examples
from medmeta.errors import InputError
from medmeta.worklist import list_scans

SLICE = 0.225
"""Voxels of a single slice, relative to those of a patch."""

UNLABELLED = 12
"""Unlabelled scans that self-training learns from at most."""


def support_task(
    images: str | Path,
    labels: str | Path,
    *,
    targets: Mapping[str, Sequence[int]] | None = None,
    modality: Literal["CT", "MR"] | None = None,
    background: Sequence[int] = (),
    unlabelled: Sequence[str | Path] = (),
) -> Task:
    """The task that two folders of scans and label maps make. Arguments and errors as of `adapt`."""
    named = targets or {"any": (max(background, default=0) + 1,)}
    task = pair_folders(images, labels, targets=named, modality=modality or "MR", background=background)
    if targets is None:
        paths = [case.labels for case in task.cases if case.labels is not None]
        values = {value for path in paths for value in read_labels(path).data.unique().tolist()}
        values -= {0, *background}
        if not values:
            remedy = "Label an organ, or name other folders."
            raise InputError(labels, "only background", "a label above 0 in some label map", remedy)
        found = {f"label {value}": (value,) for value in sorted(values)}
        task = pair_folders(images, labels, targets=found, modality=task.modality, background=background)
    if modality is None:
        task = replace(task, modality=guess_modality(task))
    known = {path.resolve() for case in task.cases for path in case.images}
    others = list_scans(unlabelled, len(task.channels)) if unlabelled else {}
    more = [
        Case(f"unlabelled/{name}", f"unlabelled/{name}", scan.files)
        for name, scan in others.items()
        if not known & {path.resolve() for path in scan.files}
    ]
    return replace(task, cases=(*task.cases, *more))


def guess_modality(task: Task) -> Literal["CT", "MR"]:
    """CT where every scan reaches below -50, as fat and air do in HU and MR signal does not; MR otherwise."""
    lowest = [float(read_channels(case.images).data.nan_to_num(0.0, 0.0, 0.0).min()) for case in task.cases]
    return "CT" if max(lowest) < -50 else "MR"


def prepare_support(
    task: Task, voxels: int, *, stride: int = 8, preprocess: Preprocess | None = None, sliced: bool = False
) -> StoredTask:
    """The labelled scans of a task on a working grid fitted to them, in memory.

    Where a patch shows little of a scan, there is an overview too (`Preprocess.overview`): what tells one structure
    from another is often where it lies. Its patches have twice the voxels. Where slices are thick and the network can
    be had in two dimensions (`sliced`), the patches are single slices instead, and the overview is the working grid.
    An overview needs to show every class that the finer grid shows.
    """
    preprocess = preprocess or fit_preprocess(task)
    support = _prepare_on(task, voxels, stride, preprocess)
    if sliced and preprocess.thick:
        slices = _prepare_on(task, round(SLICE * voxels), stride, fit_preprocess(task, sliced=True), sliced=True)
        return replace(slices, overview=support) if _shows_all(slices, support) else support
    coarse = preprocess.overview(support.patch, [case.mask.shape for case in support.cases])
    if coarse is None:
        return support
    overview = _prepare_on(task, 2 * voxels, stride, coarse)
    return replace(support, overview=overview) if _shows_all(support, overview) else support


def _shows_all(fine: StoredTask, coarse: StoredTask) -> bool:
    return all(set(a.places) == set(b.places) for a, b in zip(fine.cases, coarse.cases, strict=True))


def _prepare_on(task: Task, voxels: int, stride: int, preprocess: Preprocess, *, sliced: bool = False) -> StoredTask:
    cases = tuple(prepare(task, case, preprocess) for case in task.labelled.cases)
    patch = preprocess.patch(voxels, [case.mask.shape for case in cases], stride, sliced=sliced)
    return StoredTask(task.name, task.classes, patch, cases, preprocess, sliced=sliced)


def with_unlabelled(support: StoredTask, task: Task, seed: int) -> tuple[StoredTask, list[str]]:
    """The support with `UNLABELLED` scans at most of the task that have no label map, and why others cannot be used."""
    cases = [case for case in task.cases if case.labels is None]
    order = np.random.default_rng([seed, 3]).permutation(len(cases))
    made: list[tuple[StoredCase, ...]] = []
    notes = []
    for number in order:
        if len(made) == UNLABELLED:
            break
        try:
            made.append(tuple(prepare_unlabelled(task, cases[number], view.preprocess) for view in support.views))
        except InputError as error:
            notes.append(str(error))
    views = (
        replace(view, unlabelled=tuple(case[number] for case in made)) for number, view in enumerate(support.views)
    )
    return StoredTask.of_views(views), notes


def require_targets(task: Task, support: StoredTask) -> None:
    """Raise InputError where no scan holds a target: it would be learned as "never", without a word."""
    present = {label for case in support.cases for label in case.places}
    for name, values in task.targets.items():
        if not any(set(atom) <= set(values) for number, atom in enumerate(task.atoms, start=1) if number in present):
            found = f"no voxel of {name} = {list(values)} in any of the {len(support.cases)} label maps"
            folder = next(case.labels.parent for case in task.cases if case.labels is not None)
            remedy = "Label it in one scan, or leave the target out."
            raise InputError(folder, found, "each target in a support scan", remedy)


def support_patches(support: StoredTask, seed: int = 0, most: int = 16) -> Examples:
    """Patches that show each scan around each of its classes and once anywhere, as many as `most` or the scans."""
    rng = np.random.default_rng([seed, 1])
    cases, classes = support.cases, support.classes
    patches = []
    for number in range(max(len(cases), min(most, len(cases) * (classes + 1)))):
        label = 1 + (number // len(cases)) % (classes + 1)
        around = [label] if label <= classes else []
        patches.append(draw_patch(cases[number % len(cases)], support.patch, rng, labels=around))
    return Examples.of(patches, classes)
