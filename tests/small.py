"""Models and scans small enough for a test: what several test files build on."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

from medmeta.data.phantoms import draw_scan, phantom_task
from medmeta.data.volume import Volume, write_volume
from medmeta.learners import build_learner
from medmeta.networks import build_network
from medmeta.segmenter import Model

TERMS = "CC BY 4.0"


def tiny_model(learner: str = "fomaml", network: str = "se_unet_3d", **options) -> Model:
    """An untrained model whose card says what a trained one's would."""
    if network == "se_unet_3d":
        options = {"channels": (8, 16), "se_ratio": 4} | options
    trained = {"name": "Task01_Liver", "modality": "CT", "patients": 9, "targets": {"liver": [1]}, "terms": TERMS}
    net = build_network(network, seed=0, **options)
    return Model(build_learner(learner, net).eval(), 16**3, {"training_tasks": [trained]})


def tiny_2d(learner: str = "fomaml") -> Model:
    return tiny_model(learner, "scse_unet_2d", encoder_depth=3, decoder_channels=(32, 16, 16))


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether two states are equal to the last bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@cache
def phantom(index: int, case: int) -> tuple[Volume, Volume]:
    """Scan and labels of a 60 mm phantom: 2 is CT with two structures in thick slices, 1 is MR with one."""
    return draw_scan(phantom_task(index, 0, size_mm=60.0), case, 0)


def write_pairs(folder: Path, index: int = 2, cases: Sequence[int] = (0, 1), suffix: str = ".nii.gz") -> Path:
    """`folder`/images and `folder`/labels with phantoms named case0 and so on."""
    for part, name in enumerate(("images", "labels")):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for case in cases:
            write_volume(phantom(index, case)[part], folder / name / f"case{case}{suffix}")
    return folder


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its content."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def broken_scans(folder: Path) -> dict[str, Path]:
    """One file for each way in which a scan can be unusable; the key says which."""
    folder.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(np.random.default_rng(0).normal(size=(12, 12, 12)).astype(np.float32), np.eye(4))
    files = {name: folder / f"{name}.nii.gz" for name in ("truncated", "text", "giant", "affine", "spacing", "flat")}
    nib.save(image, files["truncated"])
    whole = files["truncated"].read_bytes()
    files["truncated"].write_bytes(whole[: len(whole) // 2])
    files["text"].write_text("these are not the voxels you are looking for\n")
    for name, field, value in (
        ("giant", "dim", [3, 32767, 32767, 32767, 1, 1, 1, 1]),
        ("affine", "srow_x", [np.nan, 0, 0, 0]),
        ("spacing", "pixdim", [1, 0, 1, 1, 0, 0, 0, 0]),
        ("flat", "dim", [2, 12, 144, 1, 1, 1, 1, 1]),
    ):
        header = image.header.copy()
        header["magic"], header["vox_offset"], header["sform_code"] = b"n+1", 352, 1
        header["srow_x"], header["srow_y"], header["srow_z"] = np.eye(4)[:3]
        header[field] = value
        with gzip.open(files[name], "wb") as file:
            file.write(header.binaryblock + b"\0" * 4 + np.asarray(image.dataobj).tobytes())
    return files


def nifti(path: Path, data: np.ndarray, affine: np.ndarray | None = None) -> Path:
    """Write an array of any kind and shape with nibabel, past the checks of `write_volume`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(data, np.eye(4) if affine is None else affine), path)
    return path


def like(volume: Volume, data: torch.Tensor) -> Volume:
    return Volume(data, volume.affine)
