"""Oracles: nibabel and SimpleITK used directly, and each voxel's position computed one at a time from the affine."""

from __future__ import annotations

import gzip
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from medmeta.data.volume import (
    VOXEL_LIMIT_BYTES,
    WRITABLE_SUFFIXES,
    Volume,
    grid_difference,
    is_volume,
    read_channels,
    read_header,
    read_labels,
    read_volume,
    volume_suffix,
    write_volume,
)
from medmeta.errors import InputError

NIFTI = (".nii", ".nii.gz")
ORIENTATIONS = ["".join(p) for signs in itertools.product("LR", "AP", "IS") for p in itertools.permutations(signs)]


def make_affine(orientation="RAS", spacing=(1.0, 1.0, 1.0), origin=(0.0, 0.0, 0.0), degrees=(0.0, 0.0, 0.0), shear=0.0):
    axes = nib.orientations.inv_ornt_aff(nib.orientations.axcodes2ornt(orientation), (1, 1, 1))[:3, :3].T
    affine = np.eye(4)
    skew = np.eye(3)
    skew[0, 1] = shear
    affine[:3, :3] = Rotation.from_euler("xyz", degrees, degrees=True).as_matrix() @ skew @ axes @ np.diag(spacing)
    affine[:3, 3] = origin
    return affine


def make_volume(affine=None, shape=(4, 5, 6), channels=1, labels=False, seed=0) -> Volume:
    generator = torch.Generator().manual_seed(seed)
    data = torch.randn((channels, *shape), generator=generator)
    if labels:
        data = torch.randint(0, 4, (channels, *shape), generator=generator)
    return Volume(data, torch.from_numpy(np.eye(4) if affine is None else np.array(affine, dtype=float)))


@st.composite
def affines(draw, shear=False) -> np.ndarray:
    spacing = draw(st.tuples(*[st.floats(0.05, 12.0)] * 3))
    origin = draw(st.tuples(*[st.floats(-600.0, 600.0)] * 3))
    degrees = draw(st.one_of(st.just((0.0, 0.0, 0.0)), st.tuples(*[st.floats(-180.0, 180.0)] * 3)))
    return make_affine(
        draw(st.sampled_from(ORIENTATIONS)), spacing, origin, degrees, draw(st.floats(-0.5, 0.5)) if shear else 0.0
    )


shapes = st.tuples(*[st.integers(1, 5)] * 3)
thorough = settings(max_examples=40, deadline=None, derandomize=True)


@contextmanager
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def naive_points(affine: np.ndarray, shape) -> dict[tuple[int, int, int], list[float]]:
    """RAS mm of every voxel, in plain arithmetic."""
    return {
        index: [sum(affine[row][axis] * index[axis] for axis in range(3)) + affine[row][3] for row in range(3)]
        for index in itertools.product(*map(range, shape))
    }


def itk_point(image: sitk.Image, index: tuple[int, int, int]) -> list[float]:
    x, y, z = image.TransformIndexToPhysicalPoint(index)
    return [-x, -y, z]


def nifti_bytes(**fields) -> bytes:
    """An int16 NIfTI of 4x5x6 voxels with header fields overwritten."""
    image = nib.Nifti1Image(np.arange(120, dtype=np.int16).reshape(4, 5, 6), np.eye(4))
    content = image.to_bytes()
    header = nib.Nifti1Header(content[:348])
    for name, value in fields.items():
        header[name] = value
    return header.binaryblock + content[348:]


def nrrd_bytes(content=bytes(24), **fields) -> bytes:
    header = {
        "type": "uchar",
        "dimension": "3",
        "space": "left-posterior-superior",
        "sizes": "4 3 2",
        "space directions": "(1,0,0) (0,1,0) (0,0,1)",
        "kinds": "domain domain domain",
        "encoding": "raw",
        "space origin": "(1,2,3)",
    } | {name.replace("_", " "): value for name, value in fields.items()}
    return "\n".join(["NRRD0004", *(f"{key}: {value}" for key, value in header.items()), "", ""]).encode() + content


def mha_bytes(content=bytes(24), **fields) -> bytes:
    header = {
        "ObjectType": "Image",
        "NDims": "3",
        "BinaryData": "True",
        "TransformMatrix": "1 0 0 0 1 0 0 0 1",
        "Offset": "0 0 0",
        "ElementSpacing": "1 1 1",
        "DimSize": "4 3 2",
    } | fields
    lines = [f"{key} = {value}" for key, value in header.items()]
    return "\n".join([*lines, "ElementType = MET_UCHAR", "ElementDataFile = LOCAL", ""]).encode() + content


def dicom_series(folder: Path, positions, uid="1.2.3", direction=(1, 0, 0, 0, 1, 0), size=(6, 7)) -> np.ndarray:
    """CT slices at the given LPS positions, file names in reverse order; returns voxels (X, Y, Z) in HU."""
    folder.mkdir(exist_ok=True)
    values = np.random.default_rng(0).integers(-1000, 1000, (*size, len(positions))).astype(np.int16)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for number, position in enumerate(positions):
        image = sitk.GetImageFromArray(values[:, :, number].T)
        image.SetSpacing((0.7, 0.9))
        tags = {
            "0008|0060": "CT",
            "0010|0010": "DOE^JANE",
            "0010|0020": "ID-4711",
            "0008|103e": "head of Jane",
            "0020|000d": "1.2.9",
            "0020|000e": uid,
            "0008|0018": f"{uid}.{number + 1}",
            "0020|0013": str(number),
            "0020|0032": "\\".join(f"{value:.6f}" for value in position),
            "0020|0037": "\\".join(f"{value:.8f}" for value in direction),
            "0028|1052": "-1024",
            "0028|1053": "1",
        }
        for tag, value in tags.items():
            image.SetMetaData(tag, value)
        writer.SetFileName(str(folder / f"DOE^JANE_{uid}_{len(positions) - number:03d}.dcm"))
        writer.Execute(image)
    return values


def refusal(call, *args, **kwargs) -> str:
    with pytest.raises(InputError) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message and "Traceback" not in message
    assert str(args[0]) in message or str(args[-1]) in message
    assert caught.value.found and caught.value.required
    return message


# ---- grids


def test_there_are_48_orientations_and_each_has_its_name():
    assert len(ORIENTATIONS) == 48
    for orientation in ORIENTATIONS:
        assert make_volume(make_affine(orientation, (1, 2, 3))).orientation == orientation


@pytest.mark.parametrize("suffix", WRITABLE_SUFFIXES)
def test_every_orientation_is_written_where_it_was(tmp_path, suffix):
    for orientation in ORIENTATIONS:
        affine = make_affine(orientation, (0.7, 1.3, 5.0), (-112.5, 87.25, -640.125))
        volume = make_volume(affine, (2, 3, 4), labels=True)
        path = tmp_path / f"scan{suffix}"
        write_volume(volume, path)
        back = read_labels(path)
        assert torch.equal(back.data.long(), volume.data)
        assert grid_difference(back, volume, tolerance_mm=1e-3) is None
        assert back.orientation == volume.orientation
        assert back.spacing == pytest.approx((0.7, 1.3, 5.0), rel=1e-6)


@thorough
@given(affine=affines(), shape=shapes, suffix=st.sampled_from(WRITABLE_SUFFIXES))
def test_what_is_written_is_read_back_on_the_same_grid(affine, shape, suffix):
    volume = make_volume(affine, shape, labels=suffix == ".seg.nrrd")
    with folder() as where:
        write_volume(volume, where / f"scan{suffix}")
        header, back = read_header(where / f"scan{suffix}"), read_volume(where / f"scan{suffix}")
        assert [file.name for file in where.iterdir()] == [f"scan{suffix}"]
    assert torch.equal(back.data, volume.data.float())
    # NIfTI states its affine in float32, the others in text of 17 digits.
    precision = 1e-6 if suffix in NIFTI else 1e-12
    torch.testing.assert_close(back.affine, volume.affine, rtol=precision, atol=precision * 10)
    assert torch.equal(header.affine, back.affine) and header.shape == back.shape == shape


@thorough
@given(affine=affines(), shape=shapes)
def test_a_second_trip_through_nifti_changes_nothing_at_all(affine, shape):
    with folder() as where:
        write_volume(make_volume(affine, shape), where / "one.nii")
        once = read_volume(where / "one.nii")
        write_volume(once, where / "two.nii")
        assert torch.equal(read_volume(where / "two.nii").affine, once.affine)


@thorough
@given(affine=affines(), shape=shapes, suffix=st.sampled_from(WRITABLE_SUFFIXES))
def test_other_programs_find_each_voxel_where_it_was(affine, shape, suffix):
    volume = make_volume(affine, shape, labels=True)
    with folder() as where:
        path = where / f"scan{suffix}"
        write_volume(volume, path)
        image = sitk.ReadImage(str(path))
        nifti = nib.load(path) if suffix in NIFTI else None
        tolerance = 0.02 * min(volume.spacing) + 1e-3 if nifti else 1e-6
        for index, point in naive_points(affine, shape).items():
            assert itk_point(image, index) == pytest.approx(point, abs=tolerance)
            assert image.GetPixel(index) == volume.data[(0, *index)]
            if nifti:
                assert nib.affines.apply_affine(nifti.affine, index) == pytest.approx(point, abs=1e-3)
                assert nifti.dataobj[index] == volume.data[(0, *index)]


@thorough
@given(affine=affines(shear=True), shape=shapes)
def test_files_of_nibabel_are_read_where_they_are(affine, shape):
    values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    image = nib.Nifti1Image(values, affine)
    with folder() as where:
        nib.save(image, where / "scan.nii")
        volume = read_volume(where / "scan.nii")
        expected = nib.load(where / "scan.nii").affine
    for index, point in naive_points(expected, shape).items():
        found = volume.affine @ torch.tensor([*index, 1.0], dtype=torch.float64)
        assert found[:3].tolist() == pytest.approx(point, abs=1e-9)
        assert volume.data[(0, *index)] == values[index]


@thorough
@given(affine=affines(), shape=shapes, suffix=st.sampled_from([".nrrd", ".mha", ".mhd", ".seg.nrrd"]))
def test_files_of_simpleitk_are_read_where_they_are(affine, shape, suffix):
    values = np.random.default_rng(0).integers(0, 9, shape).astype(np.int16)
    image = sitk.GetImageFromArray(values.transpose(2, 1, 0))
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetDirection((np.diag([-1, -1, 1]) @ affine[:3, :3] / spacing).ravel().tolist())
    image.SetOrigin((affine[:3, 3] * [-1, -1, 1]).tolist())
    with folder() as where:
        sitk.WriteImage(image, str(where / f"scan{suffix}"))
        volume = read_volume(where / f"scan{suffix}")
    for index in itertools.product(*map(range, shape)):
        found = volume.affine @ torch.tensor([*index, 1.0], dtype=torch.float64)
        assert found[:3].tolist() == pytest.approx(itk_point(image, index), abs=1e-6)
        assert volume.data[(0, *index)] == values[index]


@thorough
@given(affine=affines(shear=True), shape=shapes)
def test_nifti_holds_a_sheared_grid_and_itk_formats_refuse_it(affine, shape):
    volume = make_volume(affine, shape)
    cosines = (affine[:3, :3] / volume.spacing).T @ (affine[:3, :3] / volume.spacing) - np.eye(3)
    assume(np.abs(cosines).max() > 0.01)
    with folder() as where:
        write_volume(volume, where / "scan.nii")
        torch.testing.assert_close(read_volume(where / "scan.nii").affine, volume.affine, rtol=1e-6, atol=1e-5)
        assert nib.load(where / "scan.nii").header["sform_code"] == 1
        assert ".nii.gz" in refusal(write_volume, volume, where / "scan.nrrd")
        assert [file.name for file in where.iterdir()] == ["scan.nii"]


def test_sform_and_qform_agree_where_both_are_written(tmp_path):
    affine = make_affine("LPI", (0.8, 0.8, 3.0), (10, 20, 30), (5, 15, -25))
    write_volume(make_volume(affine, (64, 64, 20)), tmp_path / "scan.nii.gz")
    header = nib.load(tmp_path / "scan.nii.gz").header
    assert header["sform_code"] == header["qform_code"] == 1 and header.get_xyzt_units()[0] == "mm"
    assert header.get_qform() == pytest.approx(header.get_sform(), abs=1e-4)
    sheared = make_affine(spacing=(1, 1, 2), shear=0.3)
    write_volume(make_volume(sheared), tmp_path / "sheared.nii.gz")
    header = nib.load(tmp_path / "sheared.nii.gz").header
    assert header["sform_code"] == 1 and header["qform_code"] == 0
    assert header.get_zooms() == pytest.approx(np.linalg.norm(sheared[:3, :3], axis=0))


@pytest.mark.parametrize("codes", [{"sform_code": 0, "qform_code": 1}, {"sform_code": 0, "qform_code": 0}])
def test_nifti_without_sform_is_placed_as_nibabel_places_it(tmp_path, codes):
    fields = {"pixdim": [-1, 1.5, 2, 3, 0, 0, 0, 0], "quatern_b": 0.3, "quatern_c": 0.4, "qoffset_x": 7}
    (tmp_path / "scan.nii").write_bytes(nifti_bytes(**fields, **codes))
    volume = read_volume(tmp_path / "scan.nii")
    assert np.array_equal(volume.affine.numpy(), nib.load(tmp_path / "scan.nii").affine)
    assert volume.spacing == pytest.approx((1.5, 2, 3))


# ---- values, channels, dtypes


def test_slope_and_intercept_are_applied(tmp_path):
    (tmp_path / "scan.nii").write_bytes(nifti_bytes(scl_slope=0.5, scl_inter=-100))
    stored = np.arange(120).reshape(4, 5, 6)
    assert read_volume(tmp_path / "scan.nii").data[0].numpy() == pytest.approx(stored * 0.5 - 100)
    assert read_header(tmp_path / "scan.nii").dtype == "int16"


def test_big_endian_and_nifti2_are_read(tmp_path):
    values = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    nib.save(nib.Nifti1Image(values, np.eye(4), nib.Nifti1Header(endianness=">")), tmp_path / "big.nii")
    nib.save(nib.Nifti2Image(values, np.eye(4)), tmp_path / "two.nii.gz")
    for name in ("big.nii", "two.nii.gz"):
        volume = read_volume(tmp_path / name)
        assert np.array_equal(volume.data[0].numpy(), values) and volume.data.is_contiguous()
        assert read_header(tmp_path / name).dtype == "float32"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_wanted_dtype_is_given(tmp_path, dtype):
    value = 1.0 + 2.0**-40
    nib.save(nib.Nifti1Image(np.full((2, 2, 2), value), np.eye(4)), tmp_path / "scan.nii")
    volume = read_volume(tmp_path / "scan.nii", dtype=dtype)
    assert torch.equal(volume.data, torch.full((1, 2, 2, 2), value, dtype=dtype))
    with pytest.raises(ValueError, match="read_labels"):
        read_volume(tmp_path / "scan.nii", dtype=torch.int16)


def test_nan_voxels_are_kept(tmp_path):
    volume = make_volume()
    volume.data[0, 1, 2, 3] = float("nan")
    write_volume(volume, tmp_path / "scan.nii.gz")
    assert read_volume(tmp_path / "scan.nii.gz").data.isnan().nonzero().tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize("suffix", [".nii.gz", ".nrrd", ".mha"])
def test_channels_survive_in_order(tmp_path, suffix):
    volume = make_volume(make_affine("PIL", (1, 2, 3)), channels=3)
    write_volume(volume, tmp_path / f"scan{suffix}")
    header, back = read_header(tmp_path / f"scan{suffix}"), read_volume(tmp_path / f"scan{suffix}")
    assert (header.channels, header.shape, header.nbytes) == (3, (4, 5, 6), 3 * 4 * 5 * 6 * 4)
    assert torch.equal(back.data, volume.data)
    assert "3 channels" in refusal(read_labels, tmp_path / f"scan{suffix}")


@pytest.mark.parametrize(("shape", "channels"), [((2, 3, 4, 1), 1), ((2, 3, 4, 5), 5), ((2, 3, 4, 1, 5), 5)])
def test_nifti_axes_after_z_are_channels(tmp_path, shape, channels):
    values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    nib.save(nib.Nifti1Image(values, np.eye(4)), tmp_path / "scan.nii.gz")
    volume = read_volume(tmp_path / "scan.nii.gz")
    assert volume.channels == channels
    for channel in range(channels):
        assert np.array_equal(volume.data[channel].numpy(), values.reshape(2, 3, 4, channels)[..., channel])


def test_channel_files_are_joined_and_must_share_a_grid(tmp_path):
    first, second = make_volume(seed=1), make_volume(seed=2)
    moved = Volume(second.data, torch.from_numpy(make_affine(origin=(0, 3.2, 0))))
    for name, volume in (("case_0000", first), ("case_0001", second), ("moved", moved)):
        write_volume(volume, tmp_path / f"{name}.nii.gz")
    joined = read_channels([tmp_path / "case_0000.nii.gz", tmp_path / "case_0001.nii.gz"])
    assert torch.equal(joined.data, torch.cat([first.data, second.data]))
    assert torch.equal(read_channels([tmp_path / "case_0001.nii.gz"]).data, second.data)
    with pytest.raises(InputError, match=r"moved\.nii\.gz.*case_0000\.nii\.gz: origin differs by 3\.2 mm"):
        read_channels([tmp_path / "case_0000.nii.gz", tmp_path / "moved.nii.gz"])
    with pytest.raises(InputError, match="2 channels"):
        read_channels([tmp_path / "case_0000.nii.gz", tmp_path / "case_0001.nii.gz"], limit_bytes=500)


@pytest.mark.parametrize(
    ("data", "stored"),
    [
        (torch.tensor([0, 255]), "uint8"),
        (torch.tensor([True, False]), "uint8"),
        (torch.tensor([0, 256]), "int16"),
        (torch.tensor([-1, 3]), "int16"),
        (torch.tensor([0, 40000], dtype=torch.int32), "int32"),
        (torch.tensor([0.5, 1.0], dtype=torch.float64), "float32"),
        (torch.tensor([0.5, 1.0], dtype=torch.float16), "float32"),
    ],
)
@pytest.mark.parametrize("suffix", [".nii.gz", ".nrrd", ".mha"])
def test_labels_stay_integers_and_images_are_float32(tmp_path, data, stored, suffix):
    write_volume(Volume(data.reshape(1, 2, 1, 1), torch.eye(4, dtype=torch.float64)), tmp_path / f"a{suffix}")
    assert read_header(tmp_path / f"a{suffix}").dtype == stored
    assert torch.equal(read_volume(tmp_path / f"a{suffix}").data.flatten(), data.float())


def test_segmentation_for_slicer_names_each_value_and_reads_back(tmp_path):
    labels = torch.zeros(1, 5, 6, 7, dtype=torch.long)
    labels[0, 1:3, 2, 3], labels[0, 4, 4, 4] = 2, 300
    volume = Volume(labels, torch.from_numpy(make_affine("LAS", (1, 1, 2.5), (5, 6, 7))))
    write_volume(volume, tmp_path / "case.seg.nrrd")
    image = sitk.ReadImage(str(tmp_path / "case.seg.nrrd"))
    assert [image.GetMetaData(f"Segment{i}_LabelValue") for i in range(2)] == ["2", "300"]
    assert image.GetMetaData("Segment1_Extent") == "0 4 0 5 0 6" and not image.HasMetaDataKey("Segment2_ID")
    assert torch.equal(read_labels(tmp_path / "case.seg.nrrd").data.long(), labels)
    assert "integers" in refusal(write_volume, make_volume(), tmp_path / "image.seg.nrrd")


def test_overlapping_or_fractional_segmentations_are_refused_as_labels(tmp_path):
    layered = {"dimension": "4", "sizes": "2 4 3 2", "kinds": "list domain domain domain"}
    layered["space_directions"] = "none (1,0,0) (0,1,0) (0,0,1)"
    (tmp_path / "layers.seg.nrrd").write_bytes(nrrd_bytes(bytes(range(48)), **layered))
    volume = read_volume(tmp_path / "layers.seg.nrrd")
    assert volume.data[:, 1, 0, 0].tolist() == [2, 3] and volume.shape == (4, 3, 2)
    assert "2 channels or layers" in refusal(read_labels, tmp_path / "layers.seg.nrrd")
    content = nrrd_bytes().replace(b"\n\n", b"\nSegmentation_MasterRepresentation:=Fractional labelmap\n\n", 1)
    (tmp_path / "fractional.seg.nrrd").write_bytes(content)
    assert "fractional" in refusal(read_labels, tmp_path / "fractional.seg.nrrd")


# ---- label maps


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        (np.array([0, 1, 7], np.uint8), torch.int16),
        (np.array([0, 1, 7], np.float64), torch.int16),
        (np.array([0, 1.0000001, 7], np.float32), torch.int16),
        (np.array([0, 33000], np.uint16), torch.int32),
        (np.array([0, 2**24 + 1], np.int32), torch.int32),
    ],
)
def test_label_values_are_exact(tmp_path, values, dtype):
    nib.save(nib.Nifti1Image(values.reshape(-1, 1, 1), np.eye(4)), tmp_path / "labels.nii.gz")
    labels = read_labels(tmp_path / "labels.nii.gz")
    assert labels.data.dtype == dtype and labels.data.flatten().tolist() == np.rint(values).astype(int).tolist()


@pytest.mark.parametrize(
    ("values", "found"),
    [
        (np.array([0, 0.5, 1.25]), "2 voxels that are not integers, such as 0.5"),
        (np.array([0, np.nan]), "1 voxels that are not integers, such as nan"),
        (np.array([0, np.inf]), "inf"),
        (np.array([-1, 2], np.int16), "label values from -1 to 2"),
        (np.array([0, 2**32 - 1], np.uint32), "4294967295"),
        (np.array([0.0, 1e12]), "1e+12"),
    ],
)
def test_values_that_are_no_labels_are_refused(tmp_path, values, found):
    nib.save(nib.Nifti1Image(values.reshape(-1, 1, 1), np.eye(4)), tmp_path / "labels.nii.gz")
    assert found in refusal(read_labels, tmp_path / "labels.nii.gz")


# ---- damaged and hostile files

GZ = gzip.compress
DAMAGED = {
    "huge.nii.gz": (lambda: GZ(nifti_bytes(dim=[3, 32767, 32767, 32767, 1, 1, 1, 1])), "131060 GiB"),
    "huge.nrrd": (lambda: nrrd_bytes(sizes="32767 32767 32767"), "131060 GiB"),
    "huge.mha": (lambda: mha_bytes(DimSize="32767 32767 32767"), "131060 GiB"),
    "negative.nii": (lambda: nifti_bytes(dim=[3, 4, -5, 6, 1, 1, 1, 1]), "4x-5x6 voxels"),
    "none.mha": (lambda: mha_bytes(DimSize="0 3 2"), "0x3x2 voxels"),
    "none.nrrd": (lambda: nrrd_bytes(sizes="0 3 2"), "damaged"),
    "flat.nii": (lambda: nifti_bytes(dim=[2, 4, 30, 1, 1, 1, 1, 1]), "a 2-D file of 4x30 pixels"),
    "flat.nrrd": (
        lambda: (
            nrrd_bytes(dimension="2", sizes="4 6", space="2", space_directions="(1,0) (0,1)", kinds="domain domain")
            .replace(b"space: 2", b"space dimension: 2")
            .replace(b"(1,2,3)", b"(1,2)")
        ),
        "a 2-D file",
    ),
    "time.nii": (lambda: nifti_bytes(dim=[5, 4, 5, 1, 2, 3, 1, 1]), "4x5x1x2x3"),
    "axes.nii": (lambda: nifti_bytes(dim=[9, 4, 5, 6, 1, 1, 1, 1]), "9 axes"),
    "zero.nii": (lambda: nifti_bytes(pixdim=[1, 1, 0, 1, 0, 0, 0, 0]), "spacing 1x0x1 mm"),
    "zero.nrrd": (lambda: nrrd_bytes(space_directions="(0,0,0) (0,1,0) (0,0,1)"), "spacing 0x1x1 mm"),
    "zero.mha": (lambda: mha_bytes(ElementSpacing="1 0 1"), "spacing 1x0x1 mm"),
    "minus.mha": (lambda: mha_bytes(ElementSpacing="1 -1 1"), "spacing 1x-1x1 mm"),
    "nanspacing.nii": (lambda: nifti_bytes(pixdim=[1, 1, 1, np.nan, 0, 0, 0, 0]), "spacing 1x1xnan mm"),
    "metres.nii": (lambda: nifti_bytes(xyzt_units=1), "spacing in meter"),
    "vast.nii": (lambda: nifti_bytes(srow_x=[1e5, 0, 0, 0]), "spacing 100000x1x1 mm"),
    "nan.nii": (lambda: nifti_bytes(srow_x=[1, 0, 0, np.nan]), "NaN or infinity in the affine"),
    "inf.nii": (lambda: nifti_bytes(srow_x=[np.inf, 0, 0, 0]), "NaN or infinity in the affine"),
    "nan.nrrd": (lambda: nrrd_bytes(space_origin="(nan,0,0)"), "damaged"),
    "plane.nii": (lambda: nifti_bytes(srow_x=[1, 1, 0, 0], srow_y=[1, 1, 0, 0]), "in one plane"),
    "plane.mha": (lambda: mha_bytes(TransformMatrix="1 0 0 1 0 0 0 0 1"), "in one plane"),
    "quaternion.nii": (lambda: nifti_bytes(sform_code=0, qform_code=1, quatern_b=3), "damaged header"),
    "complex.nii": (lambda: nifti_bytes(datatype=32, bitpix=64), "complex or colour"),
    "colour.nii": (lambda: nifti_bytes(datatype=128, bitpix=24), "complex or colour"),
    "unknown.nii": (lambda: nifti_bytes(datatype=77), "damaged header"),
    "offset.nii": (lambda: nifti_bytes(vox_offset=np.nan), "damaged header"),
    "far.nii.gz": (lambda: GZ(nifti_bytes(vox_offset=1e30)), "at most 67108864 bytes"),
    "before.nii": (lambda: nifti_bytes(vox_offset=-8), "damaged"),
    "intercept.nii": (lambda: nifti_bytes(scl_slope=1, scl_inter=np.nan), "damaged header"),
    "pair.nii": (lambda: nifti_bytes(magic=b"ni1"), "no NIfTI header"),
    "empty.nii.gz": (lambda: b"", "an empty file"),
    "empty.mha": (lambda: b"", "an empty file"),
    "emptystream.nii.gz": (lambda: GZ(b""), "no NIfTI header"),
    "text.nii.gz": (lambda: b"version https://git-lfs.github.com/spec/v1\n" * 20, "no gzip stream"),
    "text.nii": (lambda: b"version https://git-lfs.github.com/spec/v1\n" * 20, "no NIfTI header"),
    "text.nrrd": (lambda: b"hello", "damaged file"),
    "text.mha": (lambda: b"hello", "damaged file"),
    "plain.nii.gz": (nifti_bytes, "rename it to .nii"),
    "cutheader.nii.gz": (lambda: GZ(nifti_bytes())[:40], "damaged file"),
    "cut.nii": (lambda: nifti_bytes()[:-1], "591 of 592 bytes"),
    "cut.nii.gz": (lambda: GZ(nifti_bytes(), 0)[:-30], "truncated or damaged voxels"),
    "short.nii.gz": (lambda: GZ(nifti_bytes()[:-1]), "truncated or damaged voxels"),
    "cut.nrrd": (lambda: nrrd_bytes(bytes(10)), "truncated or damaged voxels"),
    "colour.nrrd": (
        lambda: nrrd_bytes(
            bytes(72),
            dimension="4",
            sizes="3 4 3 2",
            kinds="RGB-color domain domain domain",
            space_directions="none (1,0,0) (0,1,0) (0,0,1)",
        ),
        "colour voxels",
    ),
    "elsewhere.nrrd": (lambda: nrrd_bytes(data_file="/etc/passwd"), "voxels in '/etc/passwd'"),
    "beside.nrrd": (lambda: nrrd_bytes(datafile="scan.raw"), "voxels in 'scan.raw'"),
    "spaced.nrrd": (lambda: nrrd_bytes().replace(b"kinds", b"Data File : /etc/passwd\nkinds"), "/etc/passwd"),
    "elsewhere.mha": (lambda: mha_bytes().replace(b"= LOCAL", b"= /etc/passwd"), "voxels in '/etc/passwd'"),
    "colon.mha": (lambda: mha_bytes().replace(b"ElementDataFile = LOCAL", b"ElementDataFile: /etc/passwd"), "passwd"),
    "elsewhere.mhd": (lambda: mha_bytes().replace(b"= LOCAL", b"= /etc/passwd"), "voxels in '/etc/passwd'"),
    "above.mhd": (lambda: mha_bytes().replace(b"= LOCAL", b"= ../x.raw"), "voxels in '../x.raw'"),
    "list.mhd": (lambda: mha_bytes().replace(b"= LOCAL", b"= LIST"), "voxels in 'LIST'"),
    "skip.nrrd": (lambda: nrrd_bytes(GZ(bytes(10**7)), encoding="gzip", byte_skip="-1"), "byteskip '-1'"),
    "lines.nrrd": (lambda: nrrd_bytes(line_skip="900000000"), "lineskip '900000000'"),
    "unsized.mha": (lambda: mha_bytes(zlib.compress(bytes(10**7)), CompressedData="True"), "CompressedDataSize"),
    "oversized.mha": (lambda: mha_bytes(CompressedData="True", CompressedDataSize="99999999999"), "99999999999"),
    "negative.mha": (lambda: mha_bytes(CompressedData="True", CompressedDataSize="-5"), "compresseddatasize '-5'"),
    "header.mha": (lambda: mha_bytes(HeaderSize="99999999999"), "headersize '99999999999'"),
    "blank.mha": (
        lambda: mha_bytes().replace(b"ElementDataFile = LOCAL", b"\nElementDataFile = /etc/passwd"),
        "passwd",
    ),
    "decoy.mha": (
        lambda: mha_bytes().replace(
            b"ElementDataFile = LOCAL",
            b"Element DataFile = LOCAL\nelementdatafile = LOCAL\nElementDataFile = /etc/passwd",
        ),
        "voxels in '/etc/passwd'",
    ),
    "return.mha": (lambda: mha_bytes(Comment="x\rElementDataFile = /etc/passwd\r"), "stray line ends"),
    "endless.mha": (lambda: mha_bytes().replace(b"ElementDataFile = LOCAL", b""), "no end of the header"),
    "axes.mha": (lambda: mha_bytes(NDims="99999999999"), "ndims '99999999999'"),
    "floating.mha": (lambda: mha_bytes(NDims="1e30"), "ndims '1e30'"),
    "channels.mha": (lambda: mha_bytes(ElementNumberOfChannels="99999999999"), "elementnumberofchannels"),
    "scan.dcm": (lambda: b"DICM", "the suffix '.dcm'"),
    "scan": (lambda: b"x", "the suffix ''"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_one_line_that_names_it(tmp_path, name, capfd):
    make, found = DAMAGED[name]
    (tmp_path / name).write_bytes(make())
    assert found in refusal(read_volume, tmp_path / name)
    assert capfd.readouterr() == ("", "")


def test_a_flipped_bit_is_found_by_the_checksum(tmp_path):
    content = bytearray(GZ(nifti_bytes(), 0))  # stored, so that the stream itself stays valid
    content[-60] ^= 1
    (tmp_path / "scan.nii.gz").write_bytes(content)
    assert "CRC" in refusal(read_volume, tmp_path / "scan.nii.gz")


@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data(), name=st.sampled_from(["scan.nii", "scan.nii.gz", "scan.nrrd"]))
def test_no_corruption_of_a_header_escapes_as_another_error(data, name):
    content = {"scan.nii": nifti_bytes, "scan.nii.gz": lambda: GZ(nifti_bytes(), 1), "scan.nrrd": nrrd_bytes}[name]()
    content = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, min(len(content), 352) - 1))] = data.draw(st.integers(0, 255))
    with folder() as where:
        (where / name).write_bytes(content)
        try:
            volume = read_volume(where / name, limit_bytes=10**6)
        except InputError as error:
            assert str(where / name) in str(error)
        else:
            assert volume.affine.isfinite().all() and volume.data.numel() * 4 <= 10**6


def test_the_limit_is_the_callers(tmp_path):
    write_volume(make_volume(), tmp_path / "scan.nii.gz")
    assert read_header(tmp_path / "scan.nii.gz", limit_bytes=480).nbytes == 480
    assert "limit_bytes" in refusal(read_header, tmp_path / "scan.nii.gz", limit_bytes=479)
    assert "limit_bytes" in refusal(read_labels, tmp_path / "scan.nii.gz", limit_bytes=479)
    assert VOXEL_LIMIT_BYTES == 8 * 2**30


def test_the_limit_counts_voxels_as_they_are_stored(tmp_path):
    path = tmp_path / "scan.nii"
    nib.save(nib.Nifti1Image(np.zeros((4, 5, 6)), np.eye(4)), path)
    assert nib.load(path).get_data_dtype() == np.float64
    assert read_header(path, limit_bytes=960).nbytes == 480
    assert "limit_bytes" in refusal(read_header, path, limit_bytes=959)
    with pytest.raises(InputError, match="limit_bytes"):
        read_channels([path, path], limit_bytes=1919)


BOMB = 2**27


@pytest.mark.parametrize("name", ["bomb.nii.gz", "bomb.nrrd", "bomb.mha"])
def test_a_bomb_behind_an_honest_header_is_not_unpacked(tmp_path, name):
    packed = zlib.compress(bytes(BOMB), 9)
    (tmp_path / name).write_bytes(
        {
            "bomb.nii.gz": lambda: GZ(nifti_bytes() + bytes(BOMB), 9),
            "bomb.nrrd": lambda: nrrd_bytes(GZ(bytes(BOMB), 9), encoding="gzip"),
            "bomb.mha": lambda: mha_bytes(packed, CompressedData="True", CompressedDataSize=str(len(packed))),
        }[name]()
    )
    code = (
        "import sys, resource, SimpleITK; from medmeta.data.volume import read_volume;"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; shape = read_volume(sys.argv[1]).shape;"
        "print(max(shape), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / name)], capture_output=True, text=True, check=True
    )
    longest, kib = map(int, done.stdout.split())
    assert longest <= 6
    assert kib < BOMB // 1024 // 4


def test_voxels_beside_a_metaimage_header_are_read(tmp_path):
    header = mha_bytes(b"").replace(b"= LOCAL", b"= scan.raw")
    (tmp_path / "scan.mhd").write_bytes(header)
    assert "voxels in 'scan.raw'" in refusal(read_volume, tmp_path / "scan.mhd")
    (tmp_path / "scan.raw").write_bytes(bytes(range(24)))
    assert read_volume(tmp_path / "scan.mhd").data.flatten().sum() == sum(range(24))


def test_a_header_is_read_without_its_voxels(tmp_path):
    (tmp_path / "scan.nii").write_bytes(nifti_bytes()[:400])
    header = read_header(tmp_path / "scan.nii")
    assert (header.shape, header.spacing, header.orientation) == ((4, 5, 6), (1, 1, 1), "RAS")
    assert header.path == tmp_path / "scan.nii"


def test_what_is_not_there_or_not_a_file(tmp_path):
    assert "nothing at this path" in refusal(read_volume, tmp_path / "none.nii.gz")
    assert "nothing at this path" in refusal(read_volume, tmp_path / ("long" * 100 + ".nii"))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("x")
    assert "a folder of 1 files without a DICOM series" in refusal(read_volume, tmp_path / "folder")
    os.mkfifo(tmp_path / "pipe.nii")
    assert "not a plain file" in refusal(read_volume, tmp_path / "pipe.nii")


@contextmanager
def unprivileged() -> Iterator[None]:
    """Root may read and write everything, so permissions are tried as another user."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder any user can reach (pytest's own is closed to others)."""
    with folder() as where:
        where.chmod(0o755)
        yield where


def test_no_permission_is_said(open_folder):
    write_volume(make_volume(), open_folder / "scan.nii.gz")
    (open_folder / "closed").mkdir()
    write_volume(make_volume(), open_folder / "closed" / "scan.nii")
    (open_folder / "scan.nii.gz").chmod(0)
    (open_folder / "closed").chmod(0)
    try:
        with unprivileged():
            for path in (open_folder / "scan.nii.gz", open_folder / "closed", open_folder / "closed" / "scan.nii"):
                assert "no permission" in refusal(read_volume, path)
            assert not is_volume(open_folder / "closed")
    finally:
        (open_folder / "closed").chmod(0o755)


# ---- writing


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".nrrd", ".mha"])
def test_a_failed_write_leaves_what_was_there(open_folder, suffix):
    path = open_folder / f"scan{suffix}"
    write_volume(make_volume(seed=1), path)
    before = path.read_bytes()
    open_folder.chmod(0o555)
    try:
        with unprivileged():
            assert "failure to write" in refusal(write_volume, make_volume(seed=2), path)
    finally:
        open_folder.chmod(0o755)
    assert path.read_bytes() == before and len(list(open_folder.iterdir())) == 1


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(self, *args, **kwargs):
        Path(args[0]).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(nib.Nifti1Image, "to_filename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_volume(make_volume(), tmp_path / "scan.nii.gz")
    assert not list(tmp_path.iterdir())


def test_a_write_replaces_and_keeps_ordinary_permissions(tmp_path):
    path = tmp_path / "SCAN.NII.GZ"
    write_volume(make_volume(seed=1), path)
    write_volume(make_volume(seed=2), path)
    assert torch.equal(read_volume(path).data, make_volume(seed=2).data)
    (tmp_path / "plain").write_bytes(b"")
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_what_cannot_be_written_is_refused(tmp_path):
    nan, flat = np.diag([np.nan, 1, 1, 1]), np.diag([1, 1, 0, 1])
    (tmp_path / "taken.nii").mkdir()
    cases = [
        (make_volume(), "scan.mhd", "the suffix"),
        (make_volume(), "scan.png", "the suffix"),
        (make_volume(), "missing/scan.nii", "no such folder"),
        (make_volume(), "taken.nii", "a folder of that name"),
        (make_volume(nan), "scan.nii", "NaN"),
        (make_volume(flat), "scan.nii", "spacing 1x1x0 mm"),
        (make_volume(shape=(0, 2, 2)), "scan.nii", "0x2x2 voxels"),
        (Volume(torch.full((1, 1, 1, 1), 2**40), make_volume().affine), "scan.nii", "1099511627776"),
        (Volume(torch.ones(1, 1, 1, 1, dtype=torch.complex64), make_volume().affine), "scan.nii", "complex"),
        (make_volume(shape=(40000, 1, 1)), "scan.nii", "40000x1x1"),
    ]
    for volume, name, found in cases:
        assert found in refusal(write_volume, volume, tmp_path / name)
    assert [file.name for file in tmp_path.iterdir()] == ["taken.nii"]


# ---- DICOM


def test_a_series_lies_where_simpleitk_puts_it(tmp_path):
    turn = Rotation.from_euler("xyz", (10, -20, 30), degrees=True).as_matrix()
    positions = [np.array([10, 20, 30]) + turn[:, 2] * 3.5 * number for number in range(5)]
    values = dicom_series(tmp_path / "ct", positions, direction=(*turn[:, 0], *turn[:, 1]))
    names = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(tmp_path / "ct"))
    image = sitk.ReadImage(names)
    header, volume = read_header(tmp_path / "ct"), read_volume(tmp_path / "ct")
    assert header.shape == volume.shape == (6, 7, 5) and header.dtype in ("int16", "int32")
    assert volume.spacing == pytest.approx((0.7, 0.9, 3.5), abs=1e-5)
    for index in itertools.product(range(6), range(7), range(5)):
        found = volume.affine @ torch.tensor([*index, 1.0], dtype=torch.float64)
        assert found[:3].tolist() == pytest.approx(itk_point(image, index), abs=1e-4)
        assert volume.data[(0, *index)] == values[index] == image.GetPixel(index)
    write_volume(volume, tmp_path / "ct.nii.gz")
    assert grid_difference(read_header(tmp_path / "ct.nii.gz"), header) is None


def test_one_slice_is_a_volume(tmp_path):
    values = dicom_series(tmp_path / "ct", [(1, 2, 3)])
    volume = read_volume(tmp_path / "ct")
    assert np.array_equal(volume.data[0].numpy(), values) and volume.affine[:3, 3].tolist() == [-1, -2, 3]


def test_a_tilted_gantry_gives_a_sheared_grid(tmp_path):
    positions = [(0, 1.0 * number, 3.0 * number) for number in range(4)]
    dicom_series(tmp_path / "ct", positions)
    volume = read_volume(tmp_path / "ct")
    for number, (x, y, z) in enumerate(positions):
        found = volume.affine @ torch.tensor([0, 0, number, 1], dtype=torch.float64)
        assert found[:3].tolist() == pytest.approx([-x, -y, z], abs=1e-6)


@pytest.mark.parametrize(
    ("positions", "found"),
    [
        ([(0, 0, z) for z in (0, 3, 6, 12, 15)], "6 mm between slices 3 and 4 of 5, 3 mm between most"),
        ([(0, 0, z) for z in (0, 0, 3, 3, 6, 6)], "missing or doubled"),
        ([(0, 0, 0)] * 3, "0 mm between slices"),
    ],
)
def test_uneven_slices_are_refused(tmp_path, positions, found):
    dicom_series(tmp_path / "ct", positions)
    assert found in refusal(read_volume, tmp_path / "ct")


def test_troubled_folders_of_dicom_name_no_patient(tmp_path, capfd):
    dicom_series(tmp_path / "two", [(0, 0, z) for z in range(3)])
    dicom_series(tmp_path / "two", [(0, 0, z) for z in range(2)], uid="1.2.4")
    dicom_series(tmp_path / "mixed", [(0, 0, z) for z in range(3)])
    dicom_series(tmp_path / "other", [(0, 0, 5)], size=(8, 8))
    shutil.copy(next((tmp_path / "other").iterdir()), tmp_path / "mixed" / "DOE^JANE_x.dcm")
    dicom_series(tmp_path / "cut", [(0, 0, z) for z in range(3)])
    for file in (tmp_path / "cut").iterdir():
        file.write_bytes(file.read_bytes()[:-20])
    found = {name: refusal(read_volume, tmp_path / name) for name in ("two", "mixed", "cut")}
    assert "2 DICOM series" in found["two"] and "SeriesInstanceUID" in found["two"] and "3" in found["two"]
    assert "differs from the first in size" in found["mixed"]
    for message in found.values():
        assert not any(word in message for word in ("DOE", "JANE", "Jane", "4711", ".dcm"))
    assert "JANE" not in "".join(capfd.readouterr())


# ---- names and differences


def test_suffixes():
    assert [volume_suffix(name) for name in ("a.nii.gz", "b/A.SEG.NRRD", "a.b.nii", "a.gz", "a", "a.json")] == [
        ".nii.gz",
        ".seg.nrrd",
        ".nii",
        "",
        "",
        "",
    ]


def test_volumes_are_told_from_other_files(tmp_path):
    dicom_series(tmp_path / "ct", [(0, 0, 0)])
    (tmp_path / "notes").mkdir()
    assert is_volume(tmp_path / "ct") and is_volume(tmp_path / "not_there_yet.mha")
    assert not is_volume(tmp_path / "notes") and not is_volume(tmp_path / "dataset.json")
    assert not is_volume(tmp_path / "._scan.nii.gz")


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"origin": (0, 3.2, 0)}, "origin differs by 3.2 mm"),
        ({"spacing": (1, 1, 1.5)}, "spacing differs by 0.5 mm (1x1x1 against 1x1x1.5)"),
        ({"degrees": (0, 0, 10)}, "direction differs by 10 degrees"),
        ({"orientation": "LPS"}, "orientation differs: RAS against LPS"),
    ],
)
def test_a_difference_is_named_and_measured(change, found):
    one, other = make_volume(make_affine()), make_volume(make_affine(**change))
    assert grid_difference(one, other) == found
    assert grid_difference(one, one) is None


def test_shape_tolerance_and_headers_in_a_difference(tmp_path):
    one = make_volume()
    assert grid_difference(one, make_volume(shape=(4, 5, 7))) == "shape differs: 4x5x6 against 4x5x7 voxels"
    near = make_volume(make_affine(origin=(0.05, 0, 0)))
    assert grid_difference(one, near) is None
    assert grid_difference(one, near, tolerance_mm=0.01) == "origin differs by 0.05 mm"
    write_volume(one, tmp_path / "scan.nrrd")
    assert grid_difference(read_header(tmp_path / "scan.nrrd"), one, tolerance_mm=1e-9) is None
    several = grid_difference(one, make_volume(make_affine("LAS", (2, 1, 1), (9, 0, 0))))
    assert all(word in several for word in ("spacing", "orientation", "origin"))
    broken = make_volume()
    broken.affine[0, 3] = float("nan")
    assert grid_difference(one, broken) is not None


@thorough
@given(affine=affines(), shape=shapes, shift=st.tuples(*[st.floats(-3, 3)] * 3))
def test_a_shift_is_a_difference_exactly_when_it_exceeds_the_tolerance(affine, shape, shift):
    moved = affine.copy()
    moved[:3, 3] += shift
    length = np.linalg.norm(moved[:3, 3] - affine[:3, 3])
    assume(abs(length - 1.0) > 1e-6)
    difference = grid_difference(make_volume(affine, shape), make_volume(moved, shape), tolerance_mm=1.0)
    assert (difference is not None) == (length > 1.0)


def test_a_volume_states_what_it_requires():
    with pytest.raises(ValueError, match="required"):
        Volume(torch.zeros(4, 5, 6), torch.eye(4, dtype=torch.float64))
    with pytest.raises(ValueError, match="float64"):
        Volume(torch.zeros(1, 4, 5, 6), torch.eye(4))


# ---- real scans


@pytest.mark.parametrize(
    ("name", "channels"),
    [("ACDC_CardiacCine", 1), ("CHAOS_AbdomenMR", 1), ("BRATS2015_BrainTumour", 2), ("OpenKBP_HeadNeckCT", 1)],
)
def test_real_scans_agree_with_nibabel_and_survive_every_format(shared_data, tmp_path, name, channels):
    path = sorted((shared_data / name / "imagesTr").glob("*.nii.gz"))[0]
    volume, labels = read_volume(path), read_labels(shared_data / name / "labelsTr" / path.name)
    image = nib.load(path)
    expected = image.get_fdata(dtype=np.float32).reshape(*volume.shape, channels, order="F")
    assert np.array_equal(volume.data.numpy(), np.moveaxis(expected, -1, 0))
    assert np.array_equal(volume.affine.numpy(), image.affine)
    assert volume.channels == channels and grid_difference(volume, labels) is None
    assert labels.data.min() == 0 and labels.data.max() > 0
    crop = Volume(labels.data[:, :60, :60, :20], labels.affine)
    for suffix in WRITABLE_SUFFIXES:
        write_volume(crop, tmp_path / f"labels{suffix}")
        back = read_labels(tmp_path / f"labels{suffix}")
        assert torch.equal(back.data, crop.data) and grid_difference(back, crop, tolerance_mm=1e-4) is None
