"""NIfTI files through nibabel, their headers judged before nibabel repairs them."""

from __future__ import annotations

import gzip
import io
import itertools
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import nibabel as nib
import numpy as np
from nibabel.arrayproxy import ArrayProxy

from medmeta.data.stored import UNREADABLE, Stored, by, reason
from medmeta.errors import InputError

_AGAIN = "Copy or download it again."
_EXPORT = "Export the scan again from its source."
_BYTE_ORDERS: tuple[Literal["little", "big"], ...] = ("little", "big")
_OFFSET_LIMIT = 2**26  # bytes of header extensions, which are unpacked to be skipped
_NO_LOG = logging.Logger("medmeta.nifti")  # nibabel reports each header repair; the ones that matter are errors here
_NO_LOG.addHandler(logging.NullHandler())


def stored(path: Path) -> Stored:
    """The header of a NIfTI-1 or -2 file, affine in RAS+ mm as nibabel chooses it (sform, else qform, else pixdim).

    Raises:
        InputError: no NIfTI header, not 3-D with at most one axis of channels, no grey values, or spacing zero or NaN.
    """
    raw = _raw(path)
    shape, channels = _shape(path, raw)
    pixdim = raw["pixdim"][1:4]
    if not np.isfinite(pixdim).all() or not pixdim.all():  # nibabel would silently read a zero as 1 mm
        remedy = f"Set the true voxel size in pixdim. {_EXPORT}"
        raise InputError(path, f"spacing {by(pixdim)} mm", "the true voxel size along x, y and z", remedy)
    try:
        raw.check_fix(logger=_NO_LOG, error_level=40)
        unit = raw.get_xyzt_units()[0]
        affine, dtype = raw.get_best_affine().astype(np.float64), raw.get_data_dtype()
        raw.get_slope_inter()
        offset = raw.get_data_offset()
    except (*UNREADABLE, KeyError) as error:
        raise InputError(path, f"a damaged header ({reason(error)})", "a NIfTI header", _EXPORT) from error
    if not 0 <= offset <= _OFFSET_LIMIT:
        required = f"an offset of at most {_OFFSET_LIMIT} bytes"
        raise InputError(
            path, f"voxels {offset:.6g} bytes into the file", required, f"The header is damaged. {_EXPORT}"
        )
    if unit not in ("mm", "unknown"):
        raise InputError(path, f"spacing in {unit}", "millimetres", "Convert the affine and set xyzt_units to mm.")
    if dtype.kind not in "iuf":
        raise InputError(path, "complex or colour voxels", "one number per voxel", "Save the magnitude or grey values.")
    return Stored(shape, channels, affine, dtype.newbyteorder("=").name, raw)


def voxels(path: Path, header: Stored, dtype: type | None) -> np.ndarray:
    """(C, X, Y, Z), slope and intercept applied; as stored where `dtype` is None and there is no slope.

    Raises:
        InputError: the file is truncated or damaged.
    """
    required = "the voxels its header states"
    end = header.source.get_data_offset() + math.prod(header.source.get_data_shape()) * np.dtype(header.dtype).itemsize
    if not _compressed(path) and path.stat().st_size < end:
        raise InputError(path, f"truncated voxels ({path.stat().st_size} of {end} bytes)", required, _AGAIN)
    try:
        with _open(path) as stream:
            values = np.asarray(ArrayProxy(stream, header.source, mmap=False), dtype=dtype)
            stream.read(1)  # at the end of a gzip stream this compares its checksum
    except UNREADABLE as error:
        raise InputError(path, f"truncated or damaged voxels ({reason(error)})", required, _AGAIN) from error
    return np.moveaxis(values.reshape(*header.shape, header.channels, order="F"), -1, 0)


def write(values: np.ndarray, affine: np.ndarray, path: Path) -> None:
    """Write (C, X, Y, Z) with its RAS affine (4, 4); several channels become the fourth axis."""
    image = nib.Nifti1Image(values[0] if len(values) == 1 else np.moveaxis(values, 0, -1), affine)
    image.header.set_xyzt_units("mm")
    image.set_sform(affine, code=1)
    image.set_qform(affine, code=1)
    # A quaternion holds no shear, and near half turns too few digits: then it is left out rather than wrong.
    if displacement(image.get_qform(), affine, values.shape[1:]) > 0.01 * np.linalg.norm(affine[:3, :3], axis=0).min():
        image.header.set_qform(affine, code=0)
    image.to_filename(path)


def displacement(a: np.ndarray, b: np.ndarray, shape: Sequence[int]) -> float:
    """Largest distance in mm between the outer corners of two grids of one shape."""
    corners = np.array([(*corner, 1.0) for corner in itertools.product(*((-0.5, size - 0.5) for size in shape))])
    return float(np.linalg.norm(((a - b) @ corners.T)[:3], axis=0).max())


def _compressed(path: Path) -> bool:
    return path.name.lower().endswith(".gz")


def _open(path: Path) -> io.BufferedIOBase:
    return gzip.open(path, "rb") if _compressed(path) else path.open("rb")


def _raw(path: Path) -> nib.Nifti1Header:
    """The header as it stands in the file, unrepaired."""
    try:
        with _open(path) as stream:
            block = stream.read(nib.Nifti2Header.sizeof_hdr)
    except gzip.BadGzipFile as error:
        remedy = f"If it is not compressed, rename it to .nii. {_AGAIN}"
        raise InputError(path, "no gzip stream", "a gzip-compressed NIfTI file", remedy) from error
    except UNREADABLE as error:
        raise InputError(path, f"a damaged file ({reason(error)})", "a NIfTI file", _AGAIN) from error
    for kind, magic in ((nib.Nifti1Header, b"n+1"), (nib.Nifti2Header, b"n+2")):
        for order in _BYTE_ORDERS:
            if len(block) >= kind.sizeof_hdr and int.from_bytes(block[:4], order) == kind.sizeof_hdr:
                raw = kind(block[: kind.sizeof_hdr], order, check=False)
                if raw["magic"].item() == magic:
                    return raw
    raise InputError(path, f"no NIfTI header in {len(block)} bytes", "a single-file NIfTI-1 or NIfTI-2", _AGAIN)


def _shape(path: Path, raw: nib.Nifti1Header) -> tuple[tuple[int, int, int], int]:
    axes = int(raw["dim"][0])
    sizes = [int(size) for size in raw["dim"][1 : max(axes, 0) + 1]]
    if not 3 <= axes <= 7:
        found = f"a 2-D file of {by(sizes)} pixels" if axes == 2 else f"{axes} axes"
        raise InputError(path, found, "a 3-D scan", "Stack the slices of a scan into one 3-D file.")
    if sum(size != 1 for size in sizes[3:]) > 1:
        remedy = "Save one time point, or the channels along the fourth axis."
        raise InputError(path, f"{axes} axes of {by(sizes)}", "at most one axis of channels after x, y, z", remedy)
    return (sizes[0], sizes[1], sizes[2]), math.prod(sizes[3:])
