"""Scans without labels, labelled by a segmenter, so that it can go on learning from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

import torch

from medmeta.data.store import StoredCase, StoredTask, find_places, read_scan
from medmeta.data.tasks import Task
from medmeta.inference import Layer
from medmeta.segmenter import Segmenter


def with_pseudo_labels(
    segmenter: Segmenter, task: Task, support: StoredTask, carried: dict[str, Layer | None], **options: Any
) -> tuple[StoredTask, float]:
    """A support with its unlabelled scans among the labelled ones, each labelled as `segmenter` labels it.

    Each grid of the support gets what `Segmenter.predict` makes of a scan: the labels whose expected Dice is best, not
    those of which the network is sure, which would teach it to find less and less of a structure.

    Args:
        segmenter: adapted to the labelled scans.
        task: holds the unlabelled scans.
        support: its scans on the working grids, `support.unlabelled` among them.
        carried: case id -> what `Segmenter.carry` gives, for the next call; cases that are missing are added.
        options: as of `Segmenter.predict`.

    Returns:
        Every other scan is a labelled one; the shorter row begins again until the longer one ends. And the Dice that
        the network expects of its labels, a mean over scans and structures; one that is not found counts 0, or a
        network that is blind to it would seem sure.
    """
    cases = {case.id: case for case in task.cases}
    guessed: list[list[StoredCase]] = [[] for _ in support.views]
    expected: list[float] = []
    for number, stored in enumerate(support.unlabelled):
        scan = read_scan(task, cases[stored.id])
        if stored.id not in carried:
            carried[stored.id] = segmenter.carry(scan)
        made = segmenter.predict(scan, carried=carried[stored.id], **options)
        found = set(made.data.unique().tolist())
        expected += [dice * bool(found & set(task.targets[name])) for name, dice in made.certainty.items()]
        mask = torch.zeros_like(made.data, dtype=torch.long)
        for label, value in enumerate(segmenter.labels, start=1):
            mask[made.data == value] = label
        for view, others in zip(support.views, guessed, strict=True):
            working = view.preprocess.forward_mask(mask, scan.affine, support.classes).numpy()
            places = find_places(working, support.classes)
            others.append(replace(view.unlabelled[number], mask=working, places=places))
    views = zip(support.views, guessed, strict=True)
    both = StoredTask.of_views(replace(view, cases=_alternating(view.cases, made)) for view, made in views)
    return both, fmean(expected)


def _alternating(labelled: Sequence[StoredCase], guessed: Sequence[StoredCase]) -> tuple[StoredCase, ...]:
    turns = max(len(labelled), len(guessed))
    return tuple(pair[turn % len(pair)] for turn in range(turns) for pair in (labelled, guessed))
