"""Synthetic CT and MR organ tasks: something to train, adapt and test on where there is no data set and no network.

A phantom task is an organ (its family of shapes, size, contrast, texture and place in the body) together with everything that makes
finding it harder than a threshold: tissue of the same intensity elsewhere, the same shape in another intensity, noise, a bias field.
Every patient deforms the task's anatomy smoothly. Shapes are implicit functions of millimetres, so that any grid (anisotropic, oblique,
stored in another orientation) samples the same anatomy without resampling.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter, map_coordinates
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation

from medmeta.data.volume import Volume, write_volume
from medmeta.errors import InputError

Array = NDArray[np.float32]

FIELD_RANGE_MM = (60.0, 300.0)
"""The fields of view that still hold an organ of a few voxels and fit in memory."""

_STRUCTURES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "lobed": (("organ",), ("anterior", "posterior")),
    "tube": (("tube",), ("head", "tail")),
    "shell": (("wall",), ("wall", "cavity")),
    "superquadric": (("organ",), ("organ", "core")),
    "metaballs": (("organ",), ("organ", "core")),
    "paired": (("organs",), ("left", "right")),
}
"""Family of shapes -> the names of its target structures where one, and where two, are labelled."""

_SIZE_RANGE = {"tube": (0.3, 0.75), "shell": (0.26, 0.55), "paired": (0.14, 0.32)}
"""Longest diameter as a fraction of the field of view, where a family does not cover the whole range."""

# One stream of random numbers per concern: changing the grid of a task leaves its patients as they were.
_TASK, _ANATOMY, _SHAPE, _PATIENT, _GRID, _IMAGE = range(6)


@dataclass(frozen=True)
class PhantomTask:
    """What all scans of one synthetic organ share. Intensities are HU for CT and arbitrary units, 0 to about 1000, for MR.

    Args:
        index: number of the task; with the seed it decides everything below.
        family: family of shapes: lobed, tube, shell, superquadric, metaballs or paired.
        modality: "CT" or "MR".
        structures: names of the target structures, one or two; structure i has label value i + 1.
        size_mm: longest diameter of the organ (of each organ of a pair).
        tissue: mean intensity of the tissue around the organ.
        contrast: mean intensity of the organ less that of the tissue; negative for a darker organ.
        texture: standard deviation of the organ's texture.
        grain_mm: size of the grains of the texture.
        noise: standard deviation of the noise.
        bias: amplitude of the logarithm of the bias field; 0 for CT.
        body: "trunk", a cylinder that leaves the field of view, or "head", an ellipsoid with a skull.
        field_mm: edge of the field of view.
        spacing: mean voxel size in mm along R, A and S.
        orientations: storage orientations as nibabel axis codes; case i is stored in `orientations[i % len(orientations)]`.
        oblique_deg: standard deviation of the rotation of the grid against the patient, about each axis.
    """

    index: int
    family: str
    modality: str
    structures: tuple[str, ...]
    size_mm: float
    tissue: float
    contrast: float
    texture: float
    grain_mm: float
    noise: float
    bias: float
    body: str
    field_mm: float
    spacing: tuple[float, float, float]
    orientations: tuple[str, ...]
    oblique_deg: float

    @property
    def name(self) -> str:
        return f"Task{self.index + 1:02d}_{self.family.capitalize()}{self.modality}"


def phantom_task(index: int, seed: int, *, size_mm: float = 120.0) -> PhantomTask:
    """Describe task `index`: a pure function of its arguments.

    Families, sizes, contrasts, spacings and orientations follow sequences that spread evenly over any run of tasks, so that six tasks
    already differ in all of them; even tasks are CT, odd ones MR.

    Args:
        index: number of the task, from 0.
        seed: seed of the whole collection, not negative.
        size_mm: edge of the field of view; organs measure about an eighth to three quarters of it.
    """
    shared, own = _stream(seed, _TASK), _stream(seed, _TASK, index)
    family = str(shared.permutation(list(_STRUCTURES))[index % len(_STRUCTURES)])
    shift, starts = int(shared.integers(12)), shared.random(2)
    # Steps of the golden ratio and of its square root: no two neighbours alike, no gap for long.
    spread_size, spread_contrast = (starts + index * np.array([0.6180339887, 0.7548776662])) % 1.0
    low, high = _SIZE_RANGE.get(family, (0.125, 0.75))
    size = size_mm * low * (high / low) ** spread_size
    modality = ("CT", "MR")[index % 2]
    tissue = own.uniform(-60, 50) if modality == "CT" else own.uniform(320, 560)
    noise = own.uniform(10, 22) if modality == "CT" else own.uniform(18, 42)
    contrast = noise * 1.6 * (7.0 / 1.6) ** spread_contrast * (1 if (index // 2 + shift) % 2 else -1)
    main = ("RAS", "LPS", "LAS")[(index + shift) % 3]
    fine, thick = own.uniform(1.9, 2.3), own.uniform(3.4, 4.4)
    return PhantomTask(
        index=index,
        family=family,
        modality=modality,
        structures=_STRUCTURES[family][int(own.integers(2))],
        size_mm=float(size),
        tissue=float(tissue),
        contrast=float(np.clip(contrast, -0.6 * tissue, None) if modality == "MR" else contrast),
        texture=float(noise * own.uniform(0.2, 1.0)),
        grain_mm=float(own.uniform(3.0, 8.0)),
        noise=float(noise),
        bias=0.0 if modality == "CT" else float(own.uniform(0.15, 0.4)),
        body="trunk" if size > 0.45 * size_mm or (index + shift) % 4 < 2 else "head",
        field_mm=float(size_mm),
        spacing=(1.7, 1.7, float(thick)) if (index + shift) % 3 == 1 else (float(fine), float(fine), float(fine)),
        orientations=(main, main, main, str(own.choice(["PIR", "ASL", "RSP", "SLA", "LIP"]))),
        oblique_deg=float(own.uniform(4, 9)) if (index + shift) % 4 == 3 else 0.0,
    )


def draw_scan(task: PhantomTask, case: int, seed: int) -> tuple[Volume, Volume]:
    """Draw the scan of patient `case`: a pure function of (seed, task, case).

    Returns:
        image: (1, X, Y, Z) float32, whole HU for CT (air is -1000) or whole arbitrary units for MR.
        labels: (1, X, Y, Z) int16 on the same grid; 0 background, i + 1 for `task.structures[i]`.
    """
    shape, affine, points = _grid(task, case, seed)
    patient = _stream(seed, _PATIENT, task.index, case)
    anatomy = _deform(points, task, patient)
    level, labels = _paint(task, anatomy, patient, seed)
    draw = _stream(seed, _IMAGE, task.index, case)
    # Half a voxel of blur stands for the scanner's point spread: it makes the partial volumes at the edges.
    clean = gaussian_filter(level.reshape(shape), 0.5)
    image = _ct_scan(clean, task, draw) if task.modality == "CT" else _mr_scan(clean, points, task, draw)
    codes = task.orientations[case % len(task.orientations)]
    return _stored(np.rint(image).astype(np.float32), affine, codes), _stored(labels.reshape(shape), affine, codes)


def write_phantoms(
    folder: Path | str,
    *,
    tasks: int = 6,
    cases: int = 8,
    seed: int = 0,
    size_mm: float = 120.0,
    progress: Callable[[int, int], None] | None = None,
) -> list[Path]:
    """Write synthetic tasks as Decathlon folders: dataset.json, imagesTr and labelsTr with phantom_000.nii.gz and so on.

    The folder appears complete or not at all. Scan i of a task is the same however many tasks and cases are written.

    Args:
        folder: where the task folders go; absent or empty.
        tasks: number of tasks, alternating CT and MR.
        cases: number of patients of each task, all labelled.
        seed: seed of the collection, not negative.
        size_mm: edge of the field of view.
        progress: called after every scan with (scans written, scans in all).

    Returns:
        the task folders, in order.

    Raises:
        InputError: the folder is not empty or cannot be written, or a number is out of its range.
    """
    _check_request(Path(folder), tasks, cases, seed, size_mm)
    target = Path(folder).resolve()
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        names = []
        for index in range(tasks):
            task = phantom_task(index, seed, size_mm=size_mm)
            names.append(task.name)
            for case in range(cases):
                _write_case(partial / task.name, case, draw_scan(task, case, seed))
                if progress is not None:
                    progress(index * cases + case + 1, tasks * cases)
            description = json.dumps(_dataset_json(task, cases, seed), indent=1)
            (partial / task.name / "dataset.json").write_text(description + "\n", encoding="utf-8")
        if target.is_dir():
            target.rmdir()
        os.replace(partial, target)
    except OSError as error:
        raise InputError(folder, str(error), "a folder that can be written", "Name another folder.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return [Path(folder) / name for name in names]


def _check_request(folder: Path, tasks: int, cases: int, seed: int, size_mm: float) -> None:
    for name, value, least in (("tasks", tasks, 1), ("cases", cases, 1), ("seed", seed, 0)):
        if value < least:
            raise InputError(name, str(value), f"a whole number of at least {least}")
    if not FIELD_RANGE_MM[0] <= size_mm <= FIELD_RANGE_MM[1]:
        raise InputError("size_mm", f"{size_mm} mm", f"{FIELD_RANGE_MM[0]:g} to {FIELD_RANGE_MM[1]:g} mm")
    if folder.exists() and not folder.is_dir():
        raise InputError(folder, "a file", "an absent or empty folder", "Name another folder.")
    if folder.is_dir() and any(folder.iterdir()):
        raise InputError(folder, "a folder with files in it", "an absent or empty folder", "Name another folder.")


def _write_case(folder: Path, case: int, scan: tuple[Volume, Volume]) -> None:
    for part, volume in zip(("imagesTr", "labelsTr"), scan, strict=True):
        (folder / part).mkdir(parents=True, exist_ok=True)
        write_volume(volume, folder / part / f"phantom_{case:03d}.nii.gz")


def _dataset_json(task: PhantomTask, cases: int, seed: int) -> dict[str, object]:
    names = [f"phantom_{case:03d}.nii.gz" for case in range(cases)]
    return {
        "name": task.name,
        "description": f"Synthetic {task.modality} scans of a {task.family} organ of about {task.size_mm:.0f} mm",
        "reference": f"medmeta phantoms, task {task.index} of seed {seed}",
        "licence": "CC0 1.0 (synthetic, no restrictions)",
        "tensorImageSize": "3D",
        "modality": {"0": "CT" if task.modality == "CT" else "MRI"},
        "labels": {"0": "background"} | {str(i): name for i, name in enumerate(task.structures, start=1)},
        "numTraining": cases,
        "numTest": 0,
        "training": [{"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"} for name in names],
        "test": [],
    }


def _stream(seed: int, *key: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))
