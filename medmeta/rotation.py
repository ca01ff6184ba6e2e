"""Test-time rotation: a scan with thick slices, segmented in the poses in which the network is surest."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

TURN, FURTHEST = 30.0, 90.0
"""Degrees from one pose to the next, and from the scan as it is to the last."""

POSES = 3
"""The surest poses, whose probabilities are averaged."""

SURE, SURER = 0.8, 0.03
"""Expected Dice from which on a scan is segmented as it is and in no other pose, and by how much another pose has to
expect more of itself to count: standing organs expect about as much a little to either side."""

MOST_BYTES = 2**29
"""Probabilities of one pose at most: those of `POSES` poses and of the scan as it is are held at a time."""

LITTLE = 1e-3
"""Weight of the scan as it is where it is none of them."""


def rotate(image: Tensor, degrees: float, spacing: Sequence[float], *, inside: bool = False) -> Tensor:
    """Channels (C, X, Y, Z) turned about their centre within the slices; the frame stays, its edge is repeated.

    Args:
        image: on a grid whose slices lie across the axis of the longest spacing.
        degrees: from the first of the other two axes towards the second.
        spacing: voxel size in mm.
        inside: what comes in from outside the frame is 0.
    """
    across = int(np.argmax(spacing))
    first, second = (axis for axis in range(3) if axis != across)
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    turn = torch.eye(3, dtype=torch.float64)
    turn[first, first] = turn[second, second] = cosine
    turn[first, second], turn[second, first] = sine, -sine
    # From millimetres to what affine_grid counts in: -1 to 1 from edge to edge, the last axis first.
    half = torch.tensor([size * side for size, side in zip(image.shape[1:], spacing, strict=True)]).double()
    turn = (turn * half / half.unsqueeze(1)).flip(0, 1)
    matrix = torch.cat([turn, torch.zeros(3, 1)], dim=1).unsqueeze(0)
    grid = F.affine_grid(matrix.to(image), [1, *image.shape], align_corners=False)
    padding = "zeros" if inside else "border"
    return F.grid_sample(image.unsqueeze(0), grid, padding_mode=padding, align_corners=False)[0]


def can_turn(shape: Sequence[int], classes: int) -> bool:
    """Whether the poses of a working grid (X, Y, Z) fit into memory, given K classes."""
    return 4 * (1 + classes) * math.prod(shape) <= MOST_BYTES


def surest_poses(
    segment: Callable[[float], Tensor], certainty: Callable[[Tensor], float], spacing: Sequence[float]
) -> Tensor:
    """Probabilities (1+K, X, Y, Z) of a scan, averaged over its `POSES` surest poses where it is not sure as it is.

    Starts from the scan as it is and goes on, `TURN` degrees at a time, as long as the next pose is surer. Test-time
    augmentation by rotation (Wang 2019, "Aleatoric uncertainty estimation with test-time augmentation for medical image
    segmentation with convolutional neural networks"), of poses that the network chooses itself.

    Args:
        segment: gives the probabilities of the scan turned by some degrees (`rotate`), in that pose.
        certainty: the Dice that probabilities expect of themselves, 0 to 1.
        spacing: voxel size in mm.
    """
    upright = segment(0.0)
    found, kept = {0.0: certainty(upright)}, {0.0: upright}
    if found[0.0] >= SURE:
        return upright
    while True:
        best = max(found, key=lambda degrees: found[degrees])
        beside = [degrees for degrees in (best - TURN, best + TURN) if abs(degrees) <= FURTHEST]
        following = [degrees for degrees in beside if degrees not in found]
        if not following:
            break
        for degrees in following:
            kept[degrees] = rotate(segment(degrees), -degrees, spacing)
            found[degrees] = certainty(kept[degrees])
        surest = sorted(kept, key=lambda degrees: found[degrees])[-POSES:]
        kept = {degrees: kept[degrees] for degrees in surest}
    if found[best] < found[0.0] + SURER:
        return upright
    # The corners that a pose does not show are those of the scan as it is.
    total, weight = LITTLE * upright, torch.full_like(upright[:1], LITTLE)
    for degrees, probabilities in kept.items():
        shown = rotate(torch.ones_like(weight), -degrees, spacing, inside=True)
        total += shown * probabilities
        weight += shown
    return total / weight
