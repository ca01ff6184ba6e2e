"""What the file formats tell `volume`: a header as the file states it, in the file's own coordinates."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from nibabel.spatialimages import HeaderDataError

UNREADABLE = (OSError, EOFError, zlib.error, ValueError, OverflowError, RuntimeError, MemoryError, HeaderDataError)
"""All that nibabel, gzip and SimpleITK raise over a damaged file."""


@dataclass(frozen=True)
class Stored:
    """A header that is read but not yet judged.

    Args:
        shape: voxels along X, Y, Z.
        channels: values per voxel.
        affine: (4, 4) float64, voxel index -> mm; RAS for NIfTI, LPS for ITK.
        dtype: NumPy name of the stored values.
        source: what the format needs to read the voxels.
    """

    shape: tuple[int, int, int]
    channels: int
    affine: np.ndarray
    dtype: str
    source: Any


def by(values: Sequence[float]) -> str:
    """ "1x1x2.5"."""
    return "x".join(f"{value:.6g}" for value in values)


def reason(error: BaseException) -> str:
    """The last line of a library's message, short enough for a one-line error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:160]
