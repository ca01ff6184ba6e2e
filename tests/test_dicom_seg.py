"""A DICOM SEG says of every structure where it lies: its centroid comes back in millimetres, however the scan lies."""

from __future__ import annotations

import locale
import math
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from medmeta.data.volume import Volume, read_volume
from medmeta.dicom_seg import write_dicom_seg
from medmeta.errors import InputError

highdicom = pytest.importorskip("highdicom", reason="needs the extra dicom")


def turn(degrees: float, axis: int) -> np.ndarray:
    a, b = (k for k in range(3) if k != axis)
    matrix = np.eye(3)
    angle = math.radians(degrees)
    matrix[[a, a, b, b], [a, b, a, b]] = math.cos(angle), -math.sin(angle), math.sin(angle), math.cos(angle)
    return matrix


ORIENTATIONS = {
    "axial": np.eye(3),
    "sagittal": np.array([[0, 0, 1], [1, 0, 0], [0, -1, 0.0]]),
    "coronal": np.array([[1, 0, 0], [0, 0, -1], [0, -1, 0.0]]),
    "feet first": np.diag([-1.0, 1, -1]),
    "oblique": turn(20, 0) @ turn(-35, 2),
}


def write_series(folder: Path, direction: np.ndarray, slices: int = 6) -> list[Path]:
    """A CT series of 10 columns and 12 rows; files are named against the order of their slices."""
    folder.mkdir(parents=True)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    own = locale.setlocale(locale.LC_ALL)
    generator = np.random.default_rng(0)
    for number in range(slices):
        image = sitk.GetImageFromArray(generator.integers(-900, 900, (12, 10)).astype(np.int16))
        image.SetSpacing((1.5, 2.0))
        position = np.array([5.0, -20, 100]) + 3.0 * number * direction[:, 2]
        for key, value in {
            "0008|0016": "1.2.840.10008.5.1.4.1.1.2",
            "0008|0018": f"1.2.3.{number + 1}",
            "0020|000d": "1.2.9",
            "0020|000e": "1.2.3",
            "0020|0052": "1.2.4",
            "0020|0032": "\\".join(f"{value:.6f}" for value in position),
            "0020|0037": "\\".join(f"{value:.6f}" for value in direction[:, :2].T.ravel()),
            "0020|0013": str(number),
            "0018|0050": "3",
            "0008|0060": "CT",
        }.items():
            image.SetMetaData(key, value)
        writer.SetFileName(str(folder / f"{slices - number}.dcm"))
        writer.Execute(image)
    locale.setlocale(locale.LC_ALL, own)  # writing DICOM leaves the process in the C locale
    return sorted(folder.iterdir())


def label_map(series: Path) -> Volume:
    scan = read_volume(series)
    labels = torch.zeros_like(scan.data, dtype=torch.int32)
    labels[0, 1:4, 2:9, 1:3] = 1
    labels[0, 6:9, 1:3, 2:6] = 2
    return Volume(labels, scan.affine)


def centroid(mask: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Of a mask, in the millimetres of the affine (4, 4)."""
    return affine[:3, :3] @ np.argwhere(mask).mean(axis=0) + affine[:3, 3]


@pytest.mark.parametrize("name", ORIENTATIONS)
def test_the_centroids_of_all_structures_come_back(name, tmp_path):
    files = write_series(tmp_path / "series", ORIENTATIONS[name])
    labels = label_map(tmp_path / "series")
    targets = {"both": (1, 2), "second": (2,), "absent": (3,)}
    write_dicom_seg(labels, files, targets, tmp_path / "seg.dcm")
    stored = highdicom.seg.segread(tmp_path / "seg.dcm")
    assert [stored.get_segment_description(number).segment_label for number in stored.segment_numbers] == [
        "both", "second"
    ]  # fmt: skip
    to_lps = np.diag([-1.0, -1, 1, 1]) @ labels.affine.numpy()
    for number, values in ((1, (1, 2)), (2, (2,))):
        volume = stored.get_volume(segment_numbers=[number])
        mask = volume.array[..., 0] > 0
        expected = np.isin(labels.data[0].numpy(), values)
        assert mask.sum() == expected.sum()
        assert np.allclose(centroid(mask, volume.affine), centroid(expected, to_lps), atol=1e-3)


def test_a_label_map_of_another_series_is_refused(tmp_path):
    files = write_series(tmp_path / "series", np.eye(3))
    labels = label_map(tmp_path / "series")
    shifted = labels.affine.clone()
    shifted[2, 3] += 3.0
    for other, slices in ((Volume(labels.data, shifted), files), (labels, files[1:])):
        with pytest.raises(InputError, match="slices that do not lie on"):
            write_dicom_seg(other, slices, {"a": (1,)}, tmp_path / "seg.dcm")
    with pytest.raises(InputError, match="no structure in the label map"):
        write_dicom_seg(labels, files, {"a": (7,)}, tmp_path / "seg.dcm")
    assert not (tmp_path / "seg.dcm").exists()
