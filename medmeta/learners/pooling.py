"""What metric-based learners share: features of a support pooled within its masks, and scores of a query's voxels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from medmeta.episode import Examples, State

ABSENT = 50.0
"""How far the logit of a class of which the support shows no voxel lies below the least of the others, and of 0."""

_ENTRIES = 2**22


def class_means(features: Tensor, support: Examples) -> tuple[Tensor, Tensor]:
    """Masked average pooling: the mean feature of each class over the whole support (Snell 2017, eq. 1).

    Args:
        features: (N, F, *S) of the support's images.
        support: whose mask says which voxels belong to which class; ignored ones belong to none.

    Returns:
        means (1+K, F), zero for a class without a voxel, and present (1+K,), 1 for a class with voxels and 0 without,
        in float32 or wider.
    """
    features = wide(features)
    members = _members(features, support)
    axes = [0, *range(2, features.ndim)]
    sums = torch.stack([(features * own).sum(axes) for own in members])
    counts = torch.stack([own.sum() for own in members])
    return sums / counts.clamp(min=1.0).unsqueeze(1), (counts > 0).to(features.dtype)


def cell_means(features: Tensor, support: Examples, cells: int) -> tuple[Tensor, Tensor]:
    """Masked average pooling within each cell of a regular grid over every image (the local pooling of ALPNet).

    Args:
        features: (N, F, *S) of the support's images.
        support: whose mask says which voxels belong to which class; ignored ones belong to none.
        cells: of the grid along each axis; as many as voxels along an axis that has fewer.

    Returns:
        means (1+K, M, F), zero where a class has no voxel in a cell, and coverage (1+K, M), the share of a cell that
        belongs to the class, for the M cells of all images, in float32 or wider.
    """
    features = wide(features)
    members = _members(features, support)
    coverage = torch.stack([average_cells(own, cells).flatten() for own in members])
    sums = torch.stack([average_cells(features * own, cells).movedim(1, -1).flatten(0, -2) for own in members])
    return sums / torch.where(coverage > 0, coverage, 1.0).unsqueeze(2), coverage


def average_cells(image: Tensor, cells: int) -> Tensor:
    """Mean of images (N, C, *S) in each cell of a grid, `cells` along each axis but never more than voxels."""
    pool = functional.adaptive_avg_pool2d if image.ndim == 4 else functional.adaptive_avg_pool3d
    size = [min(cells, length) for length in image.shape[2:]]
    return pool(image, size)  # type: ignore[arg-type]  # torch takes any sequence


def class_keys(features: Tensor, support: Examples, cells: int, coverage: float) -> State:
    """The keys with which voxels are compared: the mean feature of each class, and its means in single cells.

    Args:
        features, support, cells: as in `cell_means`; with one cell the class means stand alone.
        coverage: share of a cell that a class must cover for a key of its own there.

    Returns:
        keys (P, F) and labels (P, 1+K), one-hot. A class without a voxel has no key.
    """
    means, present = class_means(features, support)
    keys, labels = [means[present > 0]], [present.nonzero().flatten()]
    if cells > 1:
        local, share = cell_means(features, support, cells)
        pure = share >= coverage
        keys.append(local[pure])
        labels.append(pure.nonzero()[:, 0])
    one_hot = functional.one_hot(torch.cat(labels), len(means)).to(means.dtype)
    return {"keys": torch.cat(keys), "labels": one_hot}


def score_by_class(score: Callable[[Tensor, Tensor], Tensor], features: Tensor, state: State) -> Tensor:
    """Logits (N, 1+K, *S) of features (N, F, *S) by a rule that compares voxels (Q, F) with the keys (P, F) of a class.

    Args:
        score: (Q, F), (P, F) -> (Q,), used for one class after the other; for an absent class P is 0.
        features: of the query.
        state: from `class_keys`.
    """
    present = state["labels"].any(dim=0)
    keys = [state["keys"][own > 0] for own in state["labels"].T]

    def scores(points: Tensor) -> Tensor:
        return torch.stack([score(points, own) for own in keys], dim=1)

    return score_by_voxel(scores, features, present, entries=len(state["keys"]))


def score_by_voxel(score: Callable[[Tensor], Tensor], features: Tensor, present: Tensor, *, entries: int) -> Tensor:
    """Logits (N, 1+K, *S) of features (N, F, *S) by a rule for single voxels, in float32 or wider.

    Args:
        score: (Q, F) -> (Q, 1+K).
        features: of the query.
        present: as of `lower_absent`.
        entries: numbers that the rule holds for one voxel; the more, the fewer voxels are scored at once.
    """

    # Autocast would multiply in bfloat16, whose 8 bits are too few for a similarity times 20.
    with torch.autocast(features.device.type, enabled=False):
        points = wide(features).movedim(1, -1)
        blocks = points.flatten(0, -2).split(max(1, _ENTRIES // max(1, entries)))
        found = torch.cat([lower_absent(score(block), present) for block in blocks])
    return found.unflatten(0, points.shape[:-1]).movedim(-1, 1)


def lower_absent(scores: Tensor, present: Tensor) -> Tensor:
    """Logits (..., 1+K) in which the classes that the support does not show are the lowest, whatever their score.

    They are finite, and lower by `ABSENT` but not by more, or a query that shows such a class would drown the losses of
    all others.

    Args:
        scores: (..., 1+K).
        present: (1+K,), 0 for classes of which the support shows no voxel.
    """
    known = torch.where(present > 0, scores, 0.0)
    return torch.where(present > 0, known, known.detach().amin(dim=-1, keepdim=True) - ABSENT)


def wide(features: Tensor) -> Tensor:
    """The same in float32 or wider."""
    return features.to(torch.promote_types(features.dtype, torch.float32))


def _members(features: Tensor, support: Examples) -> list[Tensor]:
    """For each class the weight (N, 1, *S) of every voxel: 1 if it belongs to the class, else 0."""
    return [(support.mask == label).unsqueeze(1).to(features.dtype) for label in range(support.classes + 1)]
