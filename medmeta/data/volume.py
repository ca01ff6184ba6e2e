"""Scans and label maps on disk: NIfTI through nibabel; NRRD, MHA and DICOM series through SimpleITK.

NIfTI counts millimetres to the right, anterior and superior (RAS), ITK to the left, posterior and superior (LPS). The
two meet in this file and nowhere else: outside it every affine is RAS. Headers are judged before any voxel is
allocated, because nibabel and SimpleITK both allocate whatever a damaged header claims.
"""

from __future__ import annotations

import math
import os
import stat
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from torch import Tensor

from medmeta.data import itk, nifti
from medmeta.data.stored import UNREADABLE, Stored, by, reason
from medmeta.errors import InputError
from medmeta.representation import volume_html, volume_line

VOXEL_LIMIT_BYTES = 8 * 2**30
"""Largest scan that is read, in bytes as float32 or as it is stored, whichever is more. Every reader asks
`_require_size`, which knows no other limit than the one it is given."""

SUFFIXES = (".nii.gz", ".nii", ".seg.nrrd", ".nrrd", ".mha", ".mhd")
WRITABLE_SUFFIXES = tuple(suffix for suffix in SUFFIXES if suffix != ".mhd")  # .mhd is two files: never atomic

_AXIS_LIMIT = 32766  # the longest axis a NIfTI-1 header can state, less the value damaged headers hold
_SPACING_RANGE_MM = (1e-3, 1e3)
_ROUNDING = 1e-3  # label values stored with a slope miss their integer by about 1e-7
_EXPORT = "Export the scan again from its source."
_RAS_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


@dataclass(frozen=True, eq=False)
class Volume:
    """A scan or a label map with its place in the world.

    Args:
        data: (C, X, Y, Z).
        affine: (4, 4) float64, voxel index -> RAS+ mm, voxel centres.

    Raises:
        ValueError: shapes or dtype do not fit.
    """

    data: Tensor
    affine: Tensor

    def __post_init__(self) -> None:
        if self.data.ndim != 4 or self.affine.shape != (4, 4) or self.affine.dtype != torch.float64:
            raise ValueError(
                f"data {tuple(self.data.shape)}, affine {tuple(self.affine.shape)} {self.affine.dtype}; "
                "required: data (C, X, Y, Z), affine (4, 4) float64"
            )

    @property
    def shape(self) -> tuple[int, int, int]:
        """Voxels along X, Y, Z."""
        x, y, z = self.data.shape[1:]
        return x, y, z

    @property
    def channels(self) -> int:
        return self.data.shape[0]

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Distance between neighbouring voxel centres along X, Y, Z, mm."""
        return _spacing(self.affine.numpy(force=True))

    @property
    def orientation(self) -> str:
        """The direction in which each voxel axis mostly runs, such as "RAS" or "LPI"."""
        return _orientation(self.affine)

    def __repr__(self) -> str:
        return f"Volume({volume_line(self)})"

    def _repr_html_(self) -> str:
        return volume_html(self)


@dataclass(frozen=True, eq=False)
class Header:
    """What a file says about its voxels, found sound.

    Args:
        path: the file, or the folder of a DICOM series.
        shape: voxels along X, Y, Z.
        channels: values per voxel.
        spacing: mm.
        affine: (4, 4) float64, voxel index -> RAS+ mm, voxel centres.
        dtype: how voxels are stored, a NumPy name such as "int16".
        nbytes: size when loaded as float32.
    """

    path: Path
    shape: tuple[int, int, int]
    channels: int
    spacing: tuple[float, float, float]
    affine: Tensor
    dtype: str
    nbytes: int

    @property
    def orientation(self) -> str:
        """The direction in which each voxel axis mostly runs, such as "RAS" or "LPI"."""
        return _orientation(self.affine)

    @property
    def itemsize(self) -> int:
        """Bytes of a voxel as it is stored, or as float32 where that is more."""
        return _itemsize(self.dtype)


def volume_suffix(path: str | Path) -> str:
    """The suffix of a volume file in lower case, such as ".nii.gz"; "" for any other name."""
    name = Path(path).name.lower()
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), "")


def is_volume(path: str | Path) -> bool:
    """Whether a file is named like a volume, or a folder holds DICOM files. Hidden files ("._scan.nii.gz") are not."""
    path = Path(path)
    if path.name.startswith("."):
        return False
    if not path.is_dir():
        return bool(volume_suffix(path))
    try:
        return any(itk.is_dicom(file) for file in path.iterdir() if file.is_file() and not volume_suffix(file))
    except OSError:
        return False


def read_header(path: str | Path, *, limit_bytes: int = VOXEL_LIMIT_BYTES) -> Header:
    """The geometry of a scan; reads no voxels.

    Args:
        path: .nii, .nii.gz, .nrrd, .seg.nrrd, .mha, .mhd, or a folder with one DICOM series.
        limit_bytes: largest size allowed, as float32 or as stored, whichever is more.

    Raises:
        InputError: nothing readable, not 3-D, larger than the limit, or a geometry that is NaN, flat or beyond reason.
    """
    path = Path(path)
    return _stored(path, limit_bytes)[0]


def read_volume(
    path: str | Path, *, dtype: torch.dtype = torch.float32, limit_bytes: int = VOXEL_LIMIT_BYTES
) -> Volume:
    """A scan, stored slope and intercept applied. NaN voxels are kept: whether they matter is the caller's to say.

    4-D NIfTI (x, y, z, c) and ITK vector images become C channels; axes of length 1 after z are dropped.

    Args:
        path: as for `read_header`.
        dtype: a floating-point dtype.
        limit_bytes: largest size allowed, as float32 or as stored, whichever is more.

    Raises:
        InputError: as for `read_header`, or the voxels are truncated or damaged.
    """
    if not dtype.is_floating_point:
        raise ValueError(f"dtype={dtype}; required: a floating-point dtype. Label maps are read by read_labels")
    header, voxels = _read(Path(path), limit_bytes, np.float64 if dtype == torch.float64 else np.float32)
    return Volume(torch.from_numpy(voxels).to(dtype), header.affine)


def read_channels(
    paths: Sequence[str | Path], *, dtype: torch.dtype = torch.float32, limit_bytes: int = VOXEL_LIMIT_BYTES
) -> Volume:
    """One scan from one or several files, their channels in the order given; the grid is that of the first.

    Raises:
        InputError: as for `read_volume`, or the files lie on different grids.
    """
    if not paths:
        raise ValueError("no paths; required: at least one channel file")
    headers = [read_header(path, limit_bytes=limit_bytes) for path in paths]
    for header in headers[1:]:
        if difference := grid_difference(header, headers[0]):
            raise InputError(
                header.path,
                f"a grid other than that of {headers[0].path.name}: {difference}",
                "all channels of a scan on one grid",
                "Resample the channels onto one grid first.",
            )
    channels, itemsize = sum(header.channels for header in headers), max(header.itemsize for header in headers)
    _require_size(headers[0].path, headers[0].shape, channels, itemsize, limit_bytes)
    volumes = [read_volume(path, dtype=dtype, limit_bytes=limit_bytes) for path in paths]
    data = volumes[0].data if len(volumes) == 1 else torch.cat([volume.data for volume in volumes])
    return Volume(data, volumes[0].affine)


def read_labels(path: str | Path, *, limit_bytes: int = VOXEL_LIMIT_BYTES) -> Volume:
    """A label map: data (1, X, Y, Z) int16, int32 where values need it. Integers stored as floats are accepted.

    Raises:
        InputError: as for `read_header`; several channels, values that are not integers, negative or beyond int32.
    """
    path = Path(path)
    remedy = "Give the label map, not the image; label values are 0 for background and 1, 2, ... for structures."
    header, voxels = _read(path, limit_bytes, None)
    if header.channels != 1:
        remedy = "Save one 3-D label map; in 3D Slicer export the segments into a single labelmap."
        raise InputError(path, f"{header.channels} channels or layers", "one 3-D label map", remedy)
    if voxels.dtype.kind == "f":
        rounded = np.rint(voxels)
        with np.errstate(invalid="ignore"):
            odd = ~(np.abs(voxels - rounded) <= _ROUNDING)  # NaN and inf are odd too
        if odd.any():
            found = f"{int(odd.sum())} voxels that are not integers, such as {voxels[odd][0]:.6g}"
            raise InputError(path, found, "integer label values", remedy)
        voxels = rounded
    low, high = voxels.min(), voxels.max()
    if low < 0 or high > np.iinfo(np.int32).max:
        raise InputError(path, f"label values from {low:.10g} to {high:.10g}", "values from 0 to 2147483647", remedy)
    dtype = np.int16 if high <= np.iinfo(np.int16).max else np.int32
    return Volume(torch.from_numpy(voxels.astype(dtype, copy=False)), header.affine)


def write_volume(volume: Volume, path: str | Path) -> None:
    """Write a volume on exactly its own grid; the file appears whole or not at all.

    Integers are stored as uint8, int16 or int32, whichever first holds them, all else as float32. NIfTI carries the
    affine as sform, and as qform too where a rotation and voxel sizes express it.

    Args:
        volume: an image or a label map.
        path: .nii, .nii.gz, .nrrd, .seg.nrrd (label maps only) or .mha, in an existing folder.

    Raises:
        InputError: a suffix, a grid or values the format cannot hold, or the folder cannot be written to.
    """
    path = Path(path)
    suffix = volume_suffix(path)
    if suffix not in WRITABLE_SUFFIXES:
        raise InputError(path, f"the suffix {path.suffix!r}", f"one of {', '.join(WRITABLE_SUFFIXES)}", "Rename it.")
    if not path.parent.is_dir() or path.is_dir():
        found = "a folder of that name" if path.is_dir() else "no such folder to write to"
        raise InputError(path, found, "a file name in an existing folder", "Create the folder or rename the file.")
    affine = volume.affine.numpy(force=True)
    if 0 in volume.data.shape or max(volume.shape) > _AXIS_LIMIT:
        found = f"{by(volume.shape)} voxels x {volume.channels} channels"
        raise InputError(path, found, f"1 to {_AXIS_LIMIT} voxels along every axis", "Crop the volume.")
    _require_affine(path, affine)
    voxels = _storable(volume.data, path)
    temporary = path.with_name(f".{uuid.uuid4().hex}{suffix}")
    try:
        if suffix in (".nii", ".nii.gz"):
            nifti.write(voxels, affine, temporary)
        else:
            itk.write(voxels, _RAS_LPS @ affine, path, temporary, segments=suffix == ".seg.nrrd")
        os.replace(temporary, path)
    except InputError:
        raise
    except UNREADABLE as error:
        remedy = "Check permissions and free space."
        raise InputError(path, f"a failure to write ({reason(error)})", "a writable place", remedy) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def grid_difference(a: Header | Volume, b: Header | Volume, tolerance_mm: float | None = None) -> str | None:
    """How two grids differ, such as "origin differs by 3.2 mm"; None where they are one grid.

    Two grids are one when they have the same shape and no corner lies farther than `tolerance_mm` from its counterpart.

    Args:
        tolerance_mm: by default a tenth of the smallest spacing.
    """
    if a.shape != b.shape:
        return f"shape differs: {by(a.shape)} against {by(b.shape)} voxels"
    first, second = a.affine.numpy(force=True), b.affine.numpy(force=True)
    limit = 0.1 * min(*a.spacing, *b.spacing) if tolerance_mm is None else tolerance_mm
    farthest = nifti.displacement(first, second, a.shape)
    if farthest <= limit:
        return None
    differences = []
    gaps = np.abs(np.subtract(a.spacing, b.spacing))
    if (gaps * a.shape).max() > limit:
        differences.append(f"spacing differs by {gaps.max():.3g} mm ({by(a.spacing)} against {by(b.spacing)})")
    if a.orientation != b.orientation:
        differences.append(f"orientation differs: {a.orientation} against {b.orientation}")
    else:
        turn = first[:3, :3] / a.spacing - second[:3, :3] / b.spacing
        if (np.linalg.norm(turn, axis=0) * a.spacing * a.shape).max() > limit:
            degrees = np.degrees(2 * np.arcsin(np.clip(np.linalg.norm(turn, axis=0) / 2, 0, 1))).max()
            differences.append(f"direction differs by {degrees:.3g} degrees")
    shift = np.linalg.norm(first[:3, 3] - second[:3, 3])
    if shift > limit:
        differences.append(f"origin differs by {shift:.4g} mm")
    return "; ".join(differences) or f"voxel centres differ by up to {farthest:.3g} mm"


def _spacing(affine: np.ndarray) -> tuple[float, float, float]:
    x, y, z = (float(length) for length in np.linalg.norm(affine[:3, :3], axis=0))
    return x, y, z


def _orientation(affine: Tensor) -> str:
    return "".join(axis or "?" for axis in nib.aff2axcodes(affine.numpy(force=True)))


def _kind(path: Path) -> str:
    """ "nifti", "itk" or "dicom", for something that exists and may be read."""
    try:
        mode = path.stat()
        if stat.S_ISDIR(mode.st_mode):
            next(path.iterdir(), None)
            return "dicom"
        suffix = volume_suffix(path)
        if not stat.S_ISREG(mode.st_mode) or not suffix:
            found = f"the suffix {path.suffix!r}" if stat.S_ISREG(mode.st_mode) else "something not a plain file"
            remedy = "For DICOM give the folder of one series; convert other formats to .nii.gz."
            raise InputError(path, found, f"one of {', '.join(SUFFIXES)}", remedy)
        with path.open("rb"):
            pass
    except InputError:
        raise
    except PermissionError as error:
        raise InputError(path, "no permission to read", "a readable file", "Change its permissions.") from error
    except (OSError, ValueError) as error:
        required = "a volume file or the folder of a DICOM series"
        raise InputError(path, "nothing at this path", required, "Check the spelling and the folder.") from error
    if mode.st_size == 0:
        raise InputError(path, "an empty file", "a volume", "Copy or download it again.")
    return "nifti" if suffix in (".nii", ".nii.gz") else "itk"


def _require_size(path: Path, shape: Sequence[int], channels: int, itemsize: int, limit_bytes: int) -> int:
    """Bytes as float32; those of voxels of `itemsize` bytes are within the limit."""
    found = f"{by(shape)} voxels"
    if min(*shape, channels) < 1:
        raise InputError(path, found, "at least one voxel along every axis", f"The header is damaged. {_EXPORT}")
    values = math.prod(int(size) for size in shape) * channels
    if values * itemsize > limit_bytes or max(shape) > _AXIS_LIMIT:
        found += f" x {channels} channels, {values * itemsize / 2**30:.6g} GiB at {itemsize} bytes each"
        required = f"at most {limit_bytes / 2**30:.6g} GiB (limit_bytes) and {_AXIS_LIMIT} voxels along an axis"
        raise InputError(path, found, required, f"Crop the scan; if it is smaller, its header is damaged. {_EXPORT}")
    return values * 4


def _itemsize(dtype: str) -> int:
    return max(4, np.dtype(dtype).itemsize)


def _require_affine(path: Path, affine: np.ndarray) -> None:
    required = "a finite, invertible affine"
    if not np.isfinite(affine).all():
        raise InputError(path, "NaN or infinity in the affine", required, _EXPORT)
    spacing = _spacing(affine)
    _require_spacing(path, spacing)
    if abs(np.linalg.det(affine[:3, :3] / spacing)) < 1e-4:
        raise InputError(path, "an affine whose voxel axes lie in one plane", required, _EXPORT)


def _require_spacing(path: Path, spacing: Sequence[float]) -> None:
    low, high = _SPACING_RANGE_MM
    if not all(low <= value <= high for value in spacing):
        remedy = "Set the true voxel size in mm, or export the scan again from its source."
        raise InputError(path, f"spacing {by(spacing)} mm", f"{low:g} to {high:g} mm along every axis", remedy)


def _stored(path: Path, limit_bytes: int) -> tuple[Header, Stored]:
    """The header gate, and what the format needs to read the voxels."""
    kind = _kind(path)
    if kind == "nifti":
        stored = nifti.stored(path)
        affine = stored.affine
    else:
        stored = itk.stored_series(path) if kind == "dicom" else itk.stored_file(path)
        affine = _RAS_LPS @ stored.affine
    nbytes = _require_size(path, stored.shape, stored.channels, _itemsize(stored.dtype), limit_bytes)
    _require_affine(path, affine)
    affine = affine + 0.0  # no negative zeros
    header = Header(
        path, stored.shape, stored.channels, _spacing(affine), torch.from_numpy(affine), stored.dtype, nbytes
    )
    return header, stored


def _read(path: Path, limit_bytes: int, dtype: type | None) -> tuple[Header, np.ndarray]:
    """Header and voxels (C, X, Y, Z); as stored where `dtype` is None and no slope applies."""
    header, stored = _stored(path, limit_bytes)
    with np.errstate(over="ignore", invalid="ignore"):  # what float32 cannot hold becomes infinite, as NaN stays NaN
        voxels = (nifti if isinstance(stored.source, nib.Nifti1Header) else itk).voxels(path, stored, dtype)
        return header, np.ascontiguousarray(voxels, dtype=np.dtype(dtype or voxels.dtype).newbyteorder("="))


def _storable(data: Tensor, path: Path) -> np.ndarray:
    if data.is_complex():
        raise InputError(path, "complex voxels", "real numbers", "Save the magnitude.")
    if data.is_floating_point():
        return data.numpy(force=True) if data.dtype == torch.float32 else data.float().numpy(force=True)
    voxels = data.numpy(force=True)
    low, high = voxels.min(), voxels.max()
    for dtype in (np.uint8, np.int16, np.int32):
        if voxels.dtype == bool or np.iinfo(dtype).min <= low <= high <= np.iinfo(dtype).max:
            return voxels.astype(dtype, copy=False)
    raise InputError(path, f"integers from {low} to {high}", "values that fit int32", "Renumber the labels.")
