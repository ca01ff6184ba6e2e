"""How well label maps agree: Dice, surface Dice and HD95 with stated rules for empty masks, intervals and paired tests.

The rules, once, for every figure this package prints:

- Both masks empty: the target is *absent* from the case; the figures are NaN, enter no mean, and the case is counted as absent.
- Only the prediction empty: the target is *missed*; Dice 0, surface Dice 0, HD95 = the diagonal of the image.
- Only the reference empty: the target is *invented*; Dice 0, surface Dice 0, HD95 = the diagonal of the image.

Without them a missed organ drops out of the mean HD95 and an invented one out of the mean Dice, and both make a result look better.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medmeta.data.volume import Volume, grid_difference, is_volume, read_labels, volume_suffix
from medmeta.errors import InputError, MedmetaError

METRICS = ("dice", "surface_dice", "hd95_mm")


@dataclass(frozen=True)
class Scores:
    """The agreement of two masks of one target in one case.

    Args:
        dice: 2 |R and P| / (|R| + |P|), 0..1.
        surface_dice: the part of both surfaces that lies within the tolerance of the other one, 0..1.
        hd95_mm: the larger of the two directed 95th percentiles of the surface distances, mm.
        reference_ml: volume of the reference, ml.
        prediction_ml: volume of the prediction, ml.
        missed: the reference holds the target, the prediction does not.
        invented: the prediction holds the target, the reference does not.
        absent: neither holds the target; the three figures are NaN.
    """

    dice: float
    surface_dice: float
    hd95_mm: float
    reference_ml: float
    prediction_ml: float
    missed: bool = False
    invented: bool = False
    absent: bool = False


def score_masks(
    reference: np.ndarray, prediction: np.ndarray, spacing_mm: Sequence[float], tolerance_mm: float = 2.0
) -> Scores:
    """Compares two masks on one grid.

    Both empty: all figures NaN, absent=True, to be counted apart. Prediction empty: Dice 0, surface Dice 0, HD95 the diagonal of
    the image, missed=True. Reference empty: the same with invented=True. The diagonal is that of the whole image, spacing times
    voxels along each axis.

    Distances run between the centres of surface voxels: voxels of the mask with a face neighbour outside it, where outside the
    image counts as outside the mask. An axis of one voxel has no neighbours, so a single slice is scored by its outline. Surface Dice
    counts surface voxels (Nikolov et al. 2021, without the weighting by surface area); HD95 is the maximum of the two directed 95th
    percentiles, linearly interpolated (Maier-Hein et al., Metrics Reloaded, 2024), not the percentile of the pooled distances.

    Args:
        reference: (X, Y, Z) bool.
        prediction: (X, Y, Z) bool.
        spacing_mm: the voxel size along X, Y, Z, mm.
        tolerance_mm: the distance up to which two surfaces are taken to agree, mm, inclusive.

    Raises:
        ValueError: the shapes differ, or spacing or tolerance make no sense.
    """
    reference, prediction = np.asarray(reference, dtype=bool), np.asarray(prediction, dtype=bool)
    spacing = np.asarray(spacing_mm, dtype=float)
    if reference.ndim != 3 or reference.shape != prediction.shape:
        raise ValueError(f"masks {reference.shape} and {prediction.shape}; required: two masks of one shape (X, Y, Z)")
    if spacing.shape != (3,) or not (np.isfinite(spacing) & (spacing > 0)).all() or not tolerance_mm >= 0:
        raise ValueError(f"spacing {spacing_mm}, tolerance {tolerance_mm}; required: 3 lengths over 0 mm, a tolerance from 0 mm")
    voxels = int(reference.sum()), int(prediction.sum())
    volumes = [count * float(spacing.prod()) / 1000 for count in voxels]
    if not any(voxels):
        return Scores(math.nan, math.nan, math.nan, 0.0, 0.0, absent=True)
    if not all(voxels):
        diagonal = float(np.linalg.norm(spacing * reference.shape))
        return Scores(0.0, 0.0, diagonal, *volumes, missed=not voxels[1], invented=not voxels[0])
    dice = 2 * int((reference & prediction).sum()) / sum(voxels)
    to_prediction, to_reference = _surface_distances(reference, prediction, spacing)
    # A distance equal to the tolerance agrees, whatever its last bit says.
    within = sum(int((distances <= tolerance_mm + 1e-9).sum()) for distances in (to_prediction, to_reference))
    hd95 = max(float(np.percentile(distances, 95)) for distances in (to_prediction, to_reference))
    return Scores(dice, within / (to_prediction.size + to_reference.size), hd95, *volumes)


def _surface_distances(a: np.ndarray, b: np.ndarray, spacing: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distances (mm) from each surface voxel of a to the surface of b, and the reverse; neither mask is empty."""
    from scipy.ndimage import binary_erosion, distance_transform_edt

    axes = [axis for axis, size in enumerate(a.shape) if size > 1] or [0]
    a, b, spacing = (x.reshape([a.shape[axis] for axis in axes]) for x in (a, b)) if False else _drop_axes(a, b, spacing, axes)
    box = _bounding_box(a | b)
    a, b = np.pad(a[box], 1), np.pad(b[box], 1)
    surface_a, surface_b = a ^ binary_erosion(a), b ^ binary_erosion(b)
    to_b = distance_transform_edt(~surface_b, sampling=spacing)[surface_a]
    to_a = distance_transform_edt(~surface_a, sampling=spacing)[surface_b]
    return to_b, to_a
