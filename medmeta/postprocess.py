"""What follows the network: the one piece an organ is, and how sure a label map is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import threshold

from medmeta.inference import LEVELS, Band, levels_of

ONE_PIECE = 0.98
"""Share of a structure that its largest piece must hold in every support scan for other pieces to be removed."""

CRUMB = 0.05
"""Probabilities up to this count as none in the expected size of a structure: over a whole scan they add up to more
than an organ."""


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
    """The Dice that the probabilities themselves expect, gathered band by band, and the labels that it is best for.

    For a structure with probabilities p and the voxels M that get its label, the expected overlap with the truth is the
    sum of p over M, and the expected size of the truth the sum of p: 2 sum_M p / (|M| + sum p). It is as right as the
    probabilities are calibrated. The best M holds what is more probable than half of that Dice (Lipton 2014, "Optimal
    thresholding of classifiers to maximize F1 measure"): where a network is unsure, the most probable class leaves most
    of a structure out.

    Args:
        best_dice: a class gets the level (`levels_of`) that is best for its expected Dice; otherwise 0, at which the
            most probable class wins.
    """

    best_dice: bool = True
    sums: Tensor | None = None  # (2, 1+K, LEVELS + 1): over the voxels of a class and level, sum of p and their number
    mass: Tensor | None = None  # (1+K,): sum of p over all voxels

    def watch(self, bands: Iterable[Band]) -> Iterator[Band]:
        """The same bands, counted on their way; rows that come again as context are counted once."""
        reached = 0
        for first, rows in bands:
            fresh = rows[:, max(0, reached - first) :]
            best, level = levels_of(fresh)
            place = (best.long() * (LEVELS + 1) + level).flatten()
            highest = fresh[1:].amax(dim=0).flatten().double()
            cells = len(rows) * (LEVELS + 1)
            sums = torch.stack([torch.bincount(place, each, cells) for each in (highest, torch.ones_like(highest))])
            mass = torch.stack([threshold(row, CRUMB, 0.0).sum(dtype=torch.float64) for row in fresh])
            if self.sums is None or self.mass is None:
                self.sums, self.mass = torch.zeros(2, len(rows), LEVELS + 1).double(), torch.zeros(len(rows)).double()
            self.sums += sums.reshape(self.sums.shape).cpu()
            self.mass += mass.cpu()
            reached = max(reached, first + rows.shape[1])
            yield first, rows

    def levels(self) -> list[int]:
        """The level of each foreground class."""
        overlap, size, mass = self._by_level()
        if not self.best_dice:
            return [0] * (len(mass) - 1)
        dice = 2.0 * overlap / (size + mass.unsqueeze(1)).clamp_min(1e-12)
        return [int(level) for level in dice[1:].argmax(dim=1)]

    def dice(self, classes: Sequence[int]) -> float:
        """Expected Dice of the union of some classes; of a structure that is not found, and not expected either, 1."""
        overlap, size, mass = self._by_level()
        chosen = self.levels()
        inside = sum(float(overlap[label, chosen[label - 1]]) for label in classes)
        whole = sum(float(size[label, chosen[label - 1]] + mass[label]) for label in classes)
        return 2.0 * inside / whole if whole > 0 else 1.0

    def _by_level(self) -> tuple[Tensor, Tensor, Tensor]:
        """What a class holds at each level, (1+K, LEVELS) sum of p and number of voxels, and its mass (1+K,)."""
        if self.sums is None or self.mass is None:
            raise ValueError("no band was watched; required: bands that were iterated")
        overlap, size = self.sums[..., :LEVELS].cumsum(dim=-1)
        return overlap, size, self.mass
