"""From a scan to the working grid, and exactly back. Fitted on support scans only; travels with the model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medmeta.data.volume import Volume
from medmeta.episode import IGNORED

ORGAN_VOXELS = 32
"""Working voxels along the longest side of a task's smallest structure, where the scans resolve that many."""

SLICED = 0.8
"""Side of a pixel of a single slice, relative to that of a working voxel."""

COARSEST = 3.5
"""Working voxels are at most this wide, mm, where the scans are finer: the border of a large organ needs that much, and
two kidneys under one label are no organ as large as the way from one to the other."""

UNEQUAL = 1.5
"""Sides of a voxel count as equal up to this ratio."""

ANISOTROPY = 2.5
"""Thick slices keep their spacing up to this multiple of the finest working spacing."""

SEEN = 0.25
"""Share of a scan that a patch shows where no overview is needed."""

COARSER = 2.0
"""How much coarser the grid of an overview is than the finest side of a working voxel."""


@dataclass(frozen=True)
class Preprocess:
    """Orientation, spacing and intensity of the working grid.

    CT is clipped to a window in HU and scaled by fixed numbers, since HU mean the same in every scan. MR is clipped to
    percentiles and scaled to zero mean and unit deviation for each scan and channel, since its units mean nothing.

    Args:
        modality: "CT" or "MR".
        spacing: working voxel size in mm along the axes R, A, S.
        window: (lowest, highest) HU for CT, None for MR.
        percentiles: clipping percentiles of the nonzero voxels (MR).
    """

    modality: str
    spacing: tuple[float, float, float]
    window: tuple[float, float] | None = None
    percentiles: tuple[float, float] = (0.5, 99.5)

    @property
    def thick(self) -> bool:
        """Whether slices are thick: one side of a voxel is longer than both others, beyond `UNEQUAL`."""
        _, middle, longest = sorted(self.spacing)
        return longest > UNEQUAL * middle

    @classmethod
    def fit(cls, scans: Sequence[tuple[Volume, Tensor]], modality: str, *, sliced: bool = False) -> Preprocess:
        """Choose spacing and intensity rule from scans and their masks.

        The spacing lets the smallest structure span about `ORGAN_VOXELS` voxels, more where they would be wider than
        `COARSEST`, but never resolves finer than the scans do; axes with thick slices keep them up to `ANISOTROPY`
        times that.

        Args:
            scans: pairs of scan (C, X, Y, Z) and mask (1, X, Y, Z) with values 0..K, -1 ignored.
            modality: "CT" or "MR".
            sliced: for single slices: pixels are `SLICED` times as wide, and slices as thick as they are.

        Raises:
            ValueError: no foreground in any scan, or for CT no finite intensity inside it.
        """
        extents: dict[int, list[float]] = {}
        spacings, inside = [], []
        for scan, mask in scans:
            spacings.append(_ras_spacing(scan.affine))
            for label, longest in _extents(mask, scan.affine).items():
                extents.setdefault(label, []).append(longest)
            if modality == "CT":
                inside.append(scan.data[0][mask[0] > 0].float())
        if not extents:
            raise ValueError("no foreground in any support scan; required: at least one labelled voxel")
        native = torch.tensor(spacings, dtype=torch.float64).median(dim=0).values.tolist()
        smallest = min(float(torch.tensor(sizes).median()) for sizes in extents.values())
        wanted = min(smallest / ORGAN_VOXELS, COARSEST) * (SLICED if sliced else 1.0)
        finest = max(wanted, min(native))
        thickest = math.inf if sliced else ANISOTROPY * finest
        spacing = tuple(round(min(max(side, finest), thickest), 3) for side in native)
        if modality != "CT":
            return cls(modality, spacing)
        # At least 400 HU wide, so that what surrounds the organ keeps its contrast.
        values = torch.cat(inside)
        values = values[values.isfinite()]
        if not values.numel():
            raise ValueError("NaN or infinity in every voxel of the organ; required: finite intensities in HU")
        values = values[:: max(1, values.numel() // 1_000_000)]
        low, high = torch.quantile(values, torch.tensor([0.05, 0.95])).tolist()
        widen = max(0.0, 400.0 - (high - low)) / 2
        return cls(modality, spacing, (round(low - widen), round(high + widen)))

    @property
    def across(self) -> int:
        """The axis of the longest side of a voxel: across the slices, where they are thick."""
        return int(np.argmax(self.spacing))

    def patch(
        self, voxels: int, shapes: Sequence[Sequence[int]], stride: int = 8, *, sliced: bool = False
    ) -> tuple[int, int, int]:
        """A patch of about `voxels` voxels, as near to a cube in mm as multiples of `stride` allow.

        Args:
            voxels: the budget.
            shapes: (X, Y, Z) of the volumes on the working grid; the patch is not larger than they are.
            stride: total downsampling of the network.
            sliced: of a single slice.
        """
        largest = [stride * math.ceil(int(torch.tensor(side).median()) / stride) for side in zip(*shapes, strict=True)]
        sides = [1, 1, 1]
        free = [axis for axis in range(3) if not (sliced and axis == self.across)]
        while free:
            budget = voxels / math.prod(sides[axis] for axis in range(3) if axis not in free)
            edge = (budget * math.prod(self.spacing[axis] for axis in free)) ** (1 / len(free))
            full = [axis for axis in free if edge / self.spacing[axis] >= largest[axis]]
            for axis in full or free:
                wanted = stride * max(2, round(edge / self.spacing[axis] / stride))
                sides[axis] = min(largest[axis], wanted)
            free = [axis for axis in free if axis not in full] if full else []
        x, y, z = sides
        return x, y, z

    def overview(self, patch: Sequence[int], shapes: Sequence[Sequence[int]]) -> Preprocess | None:
        """The same on a grid `COARSER` times coarser, where a patch shows less than `SEEN` of a scan; None elsewhere.

        Args:
            patch: of this working grid.
            shapes: (X, Y, Z) of the scans on it.
        """
        if math.prod(patch) >= SEEN * float(torch.tensor([math.prod(shape) for shape in shapes]).median()):
            return None
        finest = COARSER * min(self.spacing)
        x, y, z = (round(max(side, finest), 3) for side in self.spacing)
        return replace(self, spacing=(x, y, z))

    def forward(self, scan: Volume) -> Volume:
        """The scan on the working grid, RAS+, intensities scaled: (C, X, Y, Z) float32. NaN and infinity count as 0."""
        from monai.transforms import NormalizeIntensity, ScaleIntensityRange

        given = scan.data.float()
        # A copy of a large scan is half a gigabyte: only where there is something to replace.
        if not torch.stack(torch.aminmax(given)).isfinite().all():
            given = given.nan_to_num(0.0, 0.0, 0.0)
        grid = self._resample(given, scan.affine)
        if self.window is not None:
            # The window maps to -2..2, about the range that MR has after its own scaling.
            data = ScaleIntensityRange(*self.window, -2.0, 2.0, clip=True)(grid.data)
        else:
            limits, means, deviations = zip(*(_tissue(channel, self.percentiles) for channel in grid.data), strict=True)
            clipped = torch.stack([channel.clamp(*limit) for channel, limit in zip(grid.data, limits, strict=True)])
            data = NormalizeIntensity(means, deviations, channel_wise=True)(clipped)
        return Volume(_plain(data), grid.affine)

    def forward_mask(self, mask: Tensor, affine: Tensor, classes: int) -> Tensor:
        """A mask (1, X, Y, Z) of 0..classes, -1 ignored, on the working grid: (X, Y, Z) int8.

        Classes are resampled as probabilities, as the image is, and the largest wins. A structure thinner than a
        working voxel can break.
        """
        best = self._resample((mask == 0).float(), affine).data[0]
        value = torch.zeros(best.shape, dtype=torch.int8)
        for label in (IGNORED, *range(1, classes + 1)):
            share = self._resample((mask == label).float(), affine).data[0]
            wins = share > best
            best, value = torch.where(wins, share, best), torch.where(wins, label, value)
        return value.to(torch.int8)

    def inverse(self, scores: Volume, like: Volume) -> Volume:
        """Scores (1+K, *S) of the working grid on exactly the grid of `like`: (1+K, X, Y, Z)."""
        from monai.data import MetaTensor
        from monai.transforms import SpatialResample

        resample = SpatialResample(mode="bilinear", padding_mode="border", dtype=np.float32)
        source = MetaTensor(scores.data.float(), affine=scores.affine)
        return Volume(_plain(resample(source, dst_affine=like.affine, spatial_size=like.shape)), like.affine)

    def to_dict(self) -> dict[str, object]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Preprocess:
        """The inverse of `to_dict`; lists become tuples."""
        tuples = {key: tuple(value) for key, value in values.items() if isinstance(value, list)}
        return cls(**{**values, **tuples})

    def _resample(self, data: Tensor, affine: Tensor) -> Volume:
        from monai.data import MetaTensor
        from monai.transforms import Orientation, Spacing

        # A rounding difference in the spacing is no reason to interpolate.
        canonical = Orientation("RAS", labels=None)(MetaTensor(data, affine=affine))
        # Both transforms give MetaTensors; MONAI's annotations say Tensor.
        own = canonical.affine[:3, :3].norm(dim=0)  # type: ignore[attr-defined]
        wanted = [w if abs(w - o) > 0.01 * w else o for w, o in zip(self.spacing, own.tolist(), strict=True)]
        resampled = Spacing(wanted, mode="bilinear", padding_mode="border", dtype=np.float32)(canonical)
        return Volume(_plain(resampled), resampled.affine.to(torch.float64))  # type: ignore[attr-defined]


def _plain(data: np.ndarray | Tensor) -> Tensor:
    # MONAI's MetaTensors leak through higher and slow everything down.
    return (data.as_tensor() if hasattr(data, "as_tensor") else torch.as_tensor(data)).float().contiguous()


def _tissue(channel: Tensor, percentiles: tuple[float, float]) -> tuple[tuple[float, float], float, float]:
    """Clipping limits, mean and deviation of the nonzero voxels; of all, where hardly any is nonzero."""
    tissue = channel[channel != 0]
    if tissue.numel() < 0.01 * channel.numel():
        tissue = channel.flatten()
    tissue = tissue[:: max(1, tissue.numel() // 1_000_000)]
    low, high = torch.quantile(tissue, torch.tensor(percentiles) / 100.0).tolist()
    tissue = tissue.clamp(low, high)
    return (low, high), float(tissue.mean()), max(float(tissue.std(correction=0)), 1e-6)


def _axes_to_ras(affine: Tensor) -> list[int]:
    from nibabel.orientations import io_orientation

    return [int(axis) for axis in io_orientation(affine.numpy())[:, 0].argsort()]


def _ras_spacing(affine: Tensor) -> list[float]:
    own = affine[:3, :3].norm(dim=0).tolist()
    return [own[axis] for axis in _axes_to_ras(affine)]


def _extents(mask: Tensor, affine: Tensor) -> dict[int, float]:
    """Longest side in mm of the bounding box of each class of a mask (1, X, Y, Z)."""
    spacing = affine[:3, :3].norm(dim=0).tolist()
    sides: dict[int, float] = {}
    for label in mask.unique().tolist():
        if label > 0:
            where = (mask[0] == label).nonzero()
            lengths = (where.max(dim=0).values - where.min(dim=0).values + 1).tolist()
            sides[int(label)] = max(length * side for length, side in zip(lengths, spacing, strict=True))
    return sides
