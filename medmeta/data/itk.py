"""NRRD, MHA and DICOM series through SimpleITK, in ITK's own coordinates: affines here are LPS.

SimpleITK is imported on use. Nothing about a DICOM file but counts and geometry reaches an error: names, tags and even
file names can hold what identifies a patient.
"""

from __future__ import annotations

import colorsys
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from medmeta.data.stored import UNREADABLE, Stored, by, reason
from medmeta.errors import InputError

_SKEW_LIMIT = 1e-3  # cosine between two voxel axes from which other programs would misread ITK's formats
_UNEVEN_LIMIT = 0.1  # of a slice distance
_UNLIKE_LIMIT = 1e-3  # voxels, mm or direction cosines
_IMAGE_IO = {".nrrd": "NrrdImageIO", ".mha": "MetaImageIO", ".mhd": "MetaImageIO"}
_DTYPES = {"signed integer": "int", "unsigned integer": "uint", "float": "float"}
_AGAIN = "Copy or download it again."
_LINE_LIMIT, _HEADER_LIMIT = 2**20, 2**24
_NUMBERS = {
    "byteskip": (0, 0),
    "lineskip": (0, 0),
    "headersize": (0, 0),
    "compresseddatasize": (0, 0),  # up to the size of the file
    "ndims": (1, 9),
    "elementnumberofchannels": (1, 65535),
}
"""Header fields of NRRD and MetaImage that ITK believes without a look, and what they may be."""


@contextmanager
def _simpleitk() -> Iterator[ModuleType]:
    """SimpleITK, with the warnings off that it would write to stderr past any caller."""
    import SimpleITK as sitk

    shown = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        yield sitk
    finally:
        sitk.ProcessObject.SetGlobalWarningDisplay(shown)


def stored_file(path: Path) -> Stored:
    """The header of an NRRD, MHA or MHD file; affine in LPS mm.

    Raises:
        InputError: unreadable, not 3-D, complex or colour, or a Slicer segmentation of fractions.
    """
    with _simpleitk() as sitk:
        try:
            _require_own_voxels(path)
            reader = _information(sitk, path, _IMAGE_IO[path.suffix.lower()])
        except InputError:
            raise
        except UNREADABLE as error:
            found = f"a damaged file ({reason(error)})"
            raise InputError(path, found, f"a readable {path.suffix.lower()[1:].upper()} file", _AGAIN) from error
        if reader.GetDimension() != 3:
            found = f"a {reader.GetDimension()}-D file of {by(reader.GetSize())}"
            remedy = "Stack slices into one 3-D file; store channels as vector components, or as 4-D NIfTI."
            raise InputError(path, found, "a 3-D scan", remedy)
        if not min(reader.GetSpacing()) > 0:
            found = f"spacing {by(reader.GetSpacing())} mm"
            raise InputError(path, found, "the true voxel size along x, y and z", "Export the scan again.")
        if "color" in _metadata(reader, "NRRD_kinds[pixel]"):
            raise InputError(path, "colour voxels", "one number per voxel and channel", "Save grey values.")
        representation = ("Segmentation_SourceRepresentation", "Segmentation_MasterRepresentation")
        if any("fractional" in _metadata(reader, key) for key in representation):
            raise InputError(path, "a fractional segmentation", "a label map", "In 3D Slicer export it as a labelmap.")
        dtype = _dtype(sitk, path, reader)
        return Stored(reader.GetSize(), reader.GetNumberOfComponents(), _affine(reader), dtype, [path])


def stored_series(folder: Path) -> Stored:
    """The geometry of the one DICOM series in a folder, judged over all its slices; affine in LPS mm.

    The step between slices comes from their positions, so a tilted gantry gives a sheared affine and not a wrong one.

    Raises:
        InputError: no series or several, a slice missing or doubled, or slices of different size or direction.
    """
    required, remedy = "one DICOM series", "Export the series again, complete and alone in its folder."
    with _simpleitk() as sitk:
        files = _series_files(sitk, folder)
        try:
            slices = [_information(sitk, file, "GDCMImageIO") for file in files]
        except UNREADABLE as error:  # the library's message would name the file
            raise InputError(folder, "a damaged DICOM file", required, remedy) from error
        first = slices[0]
        if first.GetDimension() != 3 or first.GetNumberOfComponents() != 1:
            raise InputError(folder, "colour or 2-D images", "grey-value slices", "Choose the CT or MR series.")
        shape = first.GetSize()
        affine = _affine(first)
        if len(slices) > 1:
            affine[:3, 2] = _slice_step(folder, slices)
            shape = (shape[0], shape[1], len(slices))
        return Stored(shape, 1, affine, _dtype(sitk, folder, first), files)


def voxels(path: Path, header: Stored, dtype: type | None) -> np.ndarray:
    """(C, X, Y, Z), in the stored dtype (a DICOM series: float32, as each slice may have its own slope).

    Raises:
        InputError: the voxels are truncated or damaged.
    """
    with _simpleitk() as sitk:
        if path.is_dir():
            reader = sitk.ImageSeriesReader() if len(header.source) > 1 else sitk.ImageFileReader()
            reader.SetImageIO("GDCMImageIO")
            reader.SetOutputPixelType(sitk.sitkFloat64 if dtype is np.float64 else sitk.sitkFloat32)
        else:
            reader = sitk.ImageFileReader()
            reader.SetImageIO(_IMAGE_IO[path.suffix.lower()])
        names = [str(file) for file in header.source]
        if len(names) > 1:
            reader.SetFileNames(names)
        else:
            reader.SetFileName(names[0])
        try:
            image = reader.Execute()
        except UNREADABLE as error:
            found = "truncated or damaged voxels"
            raise InputError(path, found, "the voxels its header states", _AGAIN) from error
        values = sitk.GetArrayFromImage(image)
    if values.ndim == 3:
        values = values[..., None]
    return values.transpose(3, 2, 1, 0)


def write(values: np.ndarray, affine: np.ndarray, path: Path, temporary: Path, *, segments: bool) -> None:
    """Write (C, X, Y, Z) with its LPS affine (4, 4) to `temporary`; errors name `path`.

    Args:
        segments: describe each label value as a segment, as 3D Slicer expects in a .seg.nrrd.

    Raises:
        InputError: voxel axes that are not perpendicular, or no label map where segments are asked for.
    """
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    direction = affine[:3, :3] / spacing
    if np.abs(direction.T @ direction - np.eye(3)).max() > _SKEW_LIMIT:
        remedy = "Write .nii.gz, which holds any affine, or resample the scan."
        raise InputError(path, "a sheared grid", "perpendicular voxel axes", remedy)
    if segments and (len(values) != 1 or values.dtype.kind == "f" or values.min() < 0):
        required = "one channel of integers, 0 and above"
        raise InputError(path, f"{len(values)} channels of {values.dtype}", required, "Write images as .nrrd.")
    with _simpleitk() as sitk:
        stacked = values.transpose(3, 2, 1, 0)
        vector = len(values) > 1
        image = sitk.GetImageFromArray(stacked if vector else stacked[..., 0], isVector=vector)
        image.SetSpacing(spacing.tolist())
        image.SetOrigin(affine[:3, 3].tolist())
        image.SetDirection(direction.ravel().tolist())
        if segments:
            for key, value in _segments(values[0]).items():
                image.SetMetaData(key, value)
        sitk.WriteImage(image, str(temporary), useCompression=True)


def is_dicom(file: Path) -> bool:
    """Whether a file bears the mark of DICOM part 10."""
    with file.open("rb") as stream:
        return stream.read(132)[128:] == b"DICM"


def _information(sitk: ModuleType, path: Path, image_io: str) -> Any:
    reader = sitk.ImageFileReader()
    reader.SetImageIO(image_io)
    reader.SetFileName(str(path))
    reader.ReadImageInformation()
    return reader


def _require_own_voxels(path: Path) -> None:
    """Refuse what would lead ITK to other files, or to inflate or skip without end.

    Raises:
        InputError: such a header.
        ValueError: no header at all.
    """
    nrrd = path.suffix.lower() == ".nrrd"
    fields = list(_fields(path, nrrd))
    if not fields:
        raise ValueError("no header")  # ITK would say so too, but on stderr and over several lines
    for key, value in fields:
        if key in ("datafile", "elementdatafile"):
            beside = path.suffix.lower() == ".mhd" and Path(value).name == value and "%" not in value
            if value != "LOCAL" and not (beside and value != "LIST" and (path.parent / value).is_file()):
                required = "them in the same file" + (", or in one beside it" if path.suffix.lower() == ".mhd" else "")
                raise InputError(path, f"voxels in {value[:80]!r}", required, "Save the scan as one file.")
        elif key in _NUMBERS:
            low, high = _NUMBERS[key]
            high = path.stat().st_size if key == "compresseddatasize" else high
            if not re.fullmatch(r"\d{1,18}", value) or not low <= int(value) <= high:
                raise InputError(path, f"{key} {value[:80]!r}", f"{low} to {high}", f"The header is damaged. {_AGAIN}")
    given = dict(fields)
    if not nrrd and "elementdatafile" not in given:
        raise ValueError("no end of the header")
    if not nrrd and given.get("compresseddata", "").lower() == "true" and "compresseddatasize" not in given:
        raise InputError(path, "compressed voxels without CompressedDataSize", "their size", "Save the scan again.")


def _fields(path: Path, nrrd: bool) -> Iterator[tuple[str, str]]:
    """The fields of an NRRD or MetaImage header: lower case, without spaces in the key.

    Never stops before ITK does, and so misses nothing that ITK reads.
    """
    with path.open("rb") as stream:
        while (line := stream.readline(_LINE_LIMIT)) and stream.tell() <= _HEADER_LIMIT:
            text = line.decode("latin-1").removesuffix("\n").removesuffix("\r")
            if "\r" in text:
                raise ValueError("stray line ends in the header")
            if nrrd and not text:
                return
            key = re.split("[:=]", text, maxsplit=1)[0]
            separator, value = text[len(key) : len(key) + 1], text[len(key) + 1 :]
            if separator:
                yield re.sub(r"\s", "", key).lower(), value.strip()
            if not nrrd and separator and key.strip(" \t") == "ElementDataFile":
                return


def _metadata(reader: Any, key: str) -> str:
    return reader.GetMetaData(key).lower() if reader.HasMetaDataKey(key) else ""


def _affine(reader: Any) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(reader.GetDirection(), (3, 3)) * reader.GetSpacing()
    affine[:3, 3] = reader.GetOrigin()
    return affine


def _dtype(sitk: ModuleType, path: Path, reader: Any) -> str:
    name = sitk.GetPixelIDValueAsString(reader.GetPixelIDValue())
    match = re.fullmatch(r"(?:vector of )?(\d+)-bit (signed integer|unsigned integer|float)", name)
    if match is None:
        raise InputError(path, f"{name} voxels", "one real number per voxel and channel", "Save the magnitude.")
    return f"{_DTYPES[match[2]]}{match[1]}"


def _series_files(sitk: ModuleType, folder: Path) -> list[Path]:
    reader = sitk.ImageSeriesReader
    series = [reader.GetGDCMSeriesFileNames(str(folder), uid) for uid in reader.GetGDCMSeriesIDs(str(folder))]
    if not series:
        found = f"a folder of {sum(1 for _ in folder.iterdir())} files without a DICOM series"
        raise InputError(folder, found, "a volume file or the folder of one DICOM series", "Give another path.")
    if len(series) > 1:
        found = f"{len(series)} DICOM series ({', '.join(str(len(names)) for names in series)} files)"
        remedy = "Sort the files by SeriesInstanceUID into one folder each, or convert them with dcm2niix."
        raise InputError(folder, found, "one series to a folder", remedy)
    return [Path(name) for name in series[0]]


def _slice_step(folder: Path, slices: list[Any]) -> np.ndarray:
    """(3,) mm from one slice to the next, once all slices are found alike and evenly spaced."""
    remedy = "Export the series again, complete and with one acquisition to a folder."
    for name, values in (
        ("size", [item.GetSize() for item in slices]),
        ("spacing", [item.GetSpacing()[:2] for item in slices]),
        ("direction", [item.GetDirection() for item in slices]),
    ):
        odd = np.flatnonzero(np.abs(np.subtract(values, values[0])).max(axis=1) > _UNLIKE_LIMIT)
        if odd.size:
            found = f"slice {odd[0] + 1} of {len(slices)} differs from the first in {name}"
            raise InputError(folder, found, "slices of one size, spacing and direction", remedy)
    if slices[0].GetSize()[2] != 1:
        raise InputError(folder, f"{len(slices)} multi-frame files", "one volume to a folder", remedy)
    steps = np.diff([item.GetOrigin() for item in slices], axis=0)
    usual = np.median(steps, axis=0)
    distance = float(np.linalg.norm(usual))
    odd = np.flatnonzero(~(np.linalg.norm(steps - usual, axis=1) <= _UNEVEN_LIMIT * distance))
    if distance == 0 or odd.size:
        at = int(odd[0]) if odd.size else 0
        found = f"{np.linalg.norm(steps[at]):.4g} mm between slices {at + 1} and {at + 2} of {len(slices)}"
        found += f", {distance:.4g} mm between most (slices are missing or doubled)"
        raise InputError(folder, found, "evenly spaced slices", remedy)
    return steps.mean(axis=0)


def _segments(labels: np.ndarray) -> dict[str, str]:
    """The fields of 3D Slicer's segmentation format for a label map (X, Y, Z)."""
    extent = " ".join(f"0 {size - 1}" for size in labels.shape)
    fields = {
        "Segmentation_SourceRepresentation": "Binary labelmap",
        "Segmentation_MasterRepresentation": "Binary labelmap",  # older versions of 3D Slicer look here
        "Segmentation_ReferenceImageExtentOffset": "0 0 0",
    }
    for index, value in enumerate(int(value) for value in np.unique(labels) if value):
        colour = colorsys.hsv_to_rgb(value * 0.618 % 1, 0.7, 0.9)
        fields |= {
            f"Segment{index}_ID": f"label_{value}",
            f"Segment{index}_Name": f"label {value}",
            f"Segment{index}_LabelValue": str(value),
            f"Segment{index}_Layer": "0",
            f"Segment{index}_Extent": extent,
            f"Segment{index}_Color": " ".join(f"{part:.3f}" for part in colour),
        }
    return fields
