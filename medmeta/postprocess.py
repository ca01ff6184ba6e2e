"""What follows the network: the one piece an organ is, and how sure a label map is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from medmeta.inference import Band

ONE_PIECE = 0.98
"""Share of a structure that its largest piece must hold in every support scan for other pieces to be removed."""


def one_piece(masks: Iterable[np.ndarray], classes: int) -> tuple[int, ...]:
    """Classes that are one piece, `ONE_PIECE` of their voxels at least, in every mask that holds them.

    Args:
        masks: (X, Y, Z) with 0..K and -1 for ignored.
        classes: K.
    """
    whole = dict.fromkeys(range(1, classes + 1), True)
    seen = set()
    for mask in masks:
        for label in range(1, classes + 1):
            structure = np.asarray(mask) == label
            if structure.any():
                seen.add(label)
                sizes = _pieces(structure)[1]
                whole[label] &= bool(sizes.max() >= ONE_PIECE * sizes.sum())
    return tuple(label for label in sorted(seen) if whole[label])


def keep_largest(labels: Tensor, values: Iterable[int]) -> Tensor:
    """A label map (1, X, Y, Z) in which each of `values` keeps its largest piece; the others become background."""
    from scipy.ndimage import find_objects

    wanted = set(values)
    if not wanted:
        return labels
    kept = labels.clone()
    boxes = find_objects(labels[0].numpy(), max_label=max(wanted))
    for value in wanted:
        if boxes[value - 1]:
            structure = (labels[0][boxes[value - 1]] == value).numpy()
            pieces, sizes = _pieces(structure)
            kept[0][boxes[value - 1]][torch.from_numpy(structure & (pieces != 1 + int(sizes.argmax())))] = 0
    return kept


def _pieces(structure: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Connected pieces, voxels that share an edge or corner being connected, numbered from 1, and their sizes."""
    from scipy.ndimage import label

    pieces, count = label(structure, np.ones((3,) * structure.ndim))
    return pieces, np.bincount(pieces.ravel(), minlength=count + 1)[1:]


@dataclass
class Certainty:
    """The Dice that the probabilities themselves expect, gathered band by band.

    For a structure with probabilities p and the voxels M where its class is the most probable, the expected overlap
    with the truth is the sum of p over M, and the expected size of the truth the sum of p: 2 sum_M p / (|M| + sum p).
    It is as right as the probabilities are calibrated.
    """

    sums: Tensor | None = None  # (3, 1+K): sum of p over M, |M|, sum of p

    def watch(self, bands: Iterable[Band]) -> Iterator[Band]:
        """The same bands, counted on their way; rows that come again as context are counted once."""
        reached = 0
        for first, rows in bands:
            fresh = rows[:, max(0, reached - first) :]
            highest, best = (each.flatten() for each in fresh.max(dim=0))
            inside = torch.bincount(best, highest.double(), minlength=len(rows))
            size = torch.bincount(best, minlength=len(rows))
            band = torch.stack([inside, size.double(), fresh.sum((1, 2, 3)).double()]).cpu()
            self.sums = band if self.sums is None else self.sums + band
            reached = max(reached, first + rows.shape[1])
            yield first, rows

    def dice(self, classes: Sequence[int]) -> float:
        """Expected Dice of the union of some classes; of a structure that is not found, and not expected either, 1."""
        if self.sums is None:
            raise ValueError("no band was watched; required: bands that were iterated")
        inside, size, mass = (float(total[list(classes)].sum()) for total in self.sums)
        return 2.0 * inside / (size + mass) if size + mass > 0 else 1.0
