"""Synthetic CT and MR organ tasks: something to train, adapt and test on where there is no data set and no network.

A phantom task is an organ (its family of shapes, size, contrast, texture, place in the body) together with what makes
finding it harder than a threshold: tissue of its intensity elsewhere, its shape in another intensity, noise, a bias
field. Every patient deforms the task's anatomy smoothly. Shapes are implicit functions of millimetres, so that any grid
(anisotropic, oblique, stored in another orientation) samples the same anatomy without resampling.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter, map_coordinates
from scipy.spatial.transform import Rotation

from medmeta.data.shapes import SHAPES, Array, Part, moved, waves
from medmeta.data.volume import Volume, write_volume
from medmeta.errors import InputError

FIELD_RANGE_MM = (60.0, 300.0)
"""The fields of view that still hold an organ of a few voxels and fit in memory."""

_FAMILIES: dict[str, tuple[tuple[str, ...], tuple[str, ...], str]] = {
    "lobed": (("organ",), ("anterior", "posterior"), "halves"),
    "tube": (("tube",), ("head", "tail"), "halves"),
    "shell": (("wall",), ("wall", "cavity"), "cavity"),
    "superquadric": (("organ",), ("organ", "core"), "core"),
    "metaballs": (("organ",), ("organ", "core"), "core"),
    "paired": (("organs",), ("left", "right"), ""),
}
"""Family of organs -> names of its structures where one is labelled, where two are, and how two divide one shape."""

_SIZE_RANGE = {"tube": (0.3, 0.75), "shell": (0.26, 0.55), "paired": (0.14, 0.32)}
"""Longest diameter as a fraction of the field of view, where a family does not cover the whole range."""

# One stream of random numbers per concern: changing the grid of a task leaves its patients as they were.
_TASK, _ANATOMY, _SHAPE, _PATIENT, _GRID, _IMAGE = range(6)


@dataclass(frozen=True)
class PhantomTask:
    """What all scans of one synthetic organ share. Intensities are HU for CT, arbitrary units (0 to about 1000) for MR.

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
        orientations: storage orientations as nibabel axis codes; cases go through them in turn.
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
        # The part after "_" names the organ, and two organs of one family are two organs: the number, again.
        return f"Task{self.index + 1:02d}_{self.family.capitalize()}{self.modality}{self.index + 1}"


def phantom_task(index: int, seed: int, *, size_mm: float = 120.0) -> PhantomTask:
    """Describe task `index`: a pure function of its arguments.

    Families, sizes, contrasts, spacings and orientations follow sequences that spread evenly over any run of tasks, so
    that six tasks already differ in all of them; even tasks are CT, odd ones MR.

    Args:
        index: number of the task, from 0.
        seed: seed of the whole collection, not negative.
        size_mm: edge of the field of view; organs measure about an eighth to three quarters of it.
    """
    shared, own = _stream(seed, _TASK), _stream(seed, _TASK, index)
    family = str(shared.permutation(list(_FAMILIES))[index % len(_FAMILIES)])
    shift, starts = int(shared.integers(12)), shared.random(2)
    # Multiples of irrational numbers modulo 1: no two neighbours alike, no gap for long.
    spread_size, spread_contrast = (starts + index * np.array([0.6180339887, 0.7548776662])) % 1.0
    low, high = _SIZE_RANGE.get(family, (0.125, 0.75))
    size = size_mm * low * (high / low) ** spread_size
    modality = ("CT", "MR")[index % 2]
    tissue = own.uniform(-60, 50) if modality == "CT" else own.uniform(320, 560)
    noise = own.uniform(9, 18) if modality == "CT" else own.uniform(15, 36)
    # Thin structures lose half of their contrast to partial volume.
    least = 3.6 if family in ("shell", "tube") else 2.6
    contrast = noise * least * (8.0 / least) ** spread_contrast * (1 if (index // 2 + shift) % 2 else -1)
    one, pair, division = _FAMILIES[family]
    # A core of a small organ would be a few voxels.
    two = own.random() < 0.5 and (division != "core" or size > 0.25 * size_mm)
    main = ("RAS", "LPS", "LAS")[(index + shift) % 3]
    fine, thick = own.uniform(1.9, 2.3), own.uniform(3.4, 4.4)
    return PhantomTask(
        index=index,
        family=family,
        modality=modality,
        structures=pair if two else one,
        size_mm=float(size),
        tissue=float(tissue),
        contrast=float(np.clip(contrast, -0.6 * tissue, None) if modality == "MR" else contrast),
        texture=float(noise * own.uniform(0.2, 1.0)),
        grain_mm=float(own.uniform(3.0, 8.0)),
        noise=float(noise),
        bias=0.0 if modality == "CT" else float(own.uniform(0.1, 0.3)),
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
    """Write synthetic tasks as Decathlon folders: dataset.json, imagesTr/ and labelsTr/ with phantom_000.nii.gz and on.

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


def _grid(task: PhantomTask, case: int, seed: int) -> tuple[tuple[int, ...], NDArray[np.float64], Array]:
    """The grid of a scan: its shape, its affine, and its voxel centres (3, N) in mm from the middle of the view."""
    draw = _stream(seed, _GRID, task.index, case)
    spacing = np.round(np.array(task.spacing) * draw.uniform(0.94, 1.06), 2)
    shape = tuple(int(n) for n in np.rint(task.field_mm * draw.uniform(0.97, 1.05, 3) / spacing))
    turn = Rotation.from_rotvec(np.deg2rad(task.oblique_deg) * draw.standard_normal(3)).as_matrix()
    # Scanners put the origin anywhere: a place is only known relative to the body.
    affine = np.eye(4)
    affine[:3, :3] = turn * spacing
    middle = affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    affine[:3, 3] = np.round(draw.normal(0, 40, 3), 1) - middle
    index = np.indices(shape, dtype=np.float32).reshape(3, -1)
    return shape, affine, moved(index, affine[:3, :3], -middle)


def _deform(points: Array, task: PhantomTask, patient: np.random.Generator) -> Array:
    """Where each point of this patient lies in the task's anatomy: pose, size and a smooth elastic deformation."""
    field = task.field_mm
    turn = Rotation.from_rotvec(np.deg2rad(4) * patient.standard_normal(3)).as_matrix()
    posed = moved(points, turn / patient.uniform(0.93, 1.07), field * patient.normal(0, 0.015, 3))
    swings = waves(points, patient, (0.45 * field, 1.0 * field))
    return posed + moved(swings, field * patient.normal(0, 0.011, (3, len(swings))), np.zeros(3))


def _paint(task: PhantomTask, where: Array, patient: np.random.Generator, seed: int) -> tuple[Array, NDArray[np.int16]]:
    """Mean intensity and label value (N,) of the points `where` (3, N) of a task's anatomy."""
    plan, ct, field = _stream(seed, _ANATOMY, task.index), task.modality == "CT", task.field_mm
    lattice = patient.standard_normal((24, 24, 24), dtype=np.float32)
    enhancement, organ = patient.uniform(0.87, 1.13), task.tissue + task.contrast
    bone, fat = (plan.uniform(350, 700), -100.0) if ct else (plan.uniform(60, 140), plan.uniform(150, 950))
    semi = field * plan.uniform([0.46, 0.40, 0.46], [0.53, 0.47, 0.53])
    skin, wall = field * plan.uniform(0.02, 0.05), field * plan.uniform(0.03, 0.06)
    muscle = organ if task.size_mm > 0.4 * field or plan.random() < 0.5 else task.tissue + 1.3 * abs(task.contrast)
    used = 2 if task.body == "trunk" else 3
    scaled = np.abs(where[:used] / semi[:used, None].astype(np.float32))
    depth = (1 - (scaled**2.5).sum(axis=0) ** 0.4) * np.float32(semi.min())

    level = np.full(where.shape[1], -1000.0 if ct else 0.0, dtype=np.float32)
    labels = np.zeros(where.shape[1], dtype=np.int16)
    level[depth > 0] = fat
    level[depth > skin] = muscle if task.body == "trunk" else bone
    inside = np.flatnonzero(depth > skin + wall)
    # Fat and soft tissue mix around organs: patches as wide as a small organ, over the grain.
    patches = 0.25 * abs(task.contrast) * np.tanh(2 * _grain(lattice, where[:, inside], 0.11 * field))
    level[inside] = task.tissue + patches + 0.6 * task.texture * _grain(lattice, where[:, inside], task.grain_mm)
    if task.body == "trunk":
        # Vertebrae with discs between them, against the back wall.
        spine = np.hypot(where[0], where[1] + 0.66 * semi[1]) < 0.085 * field
        level[spine] = np.where(np.cos(where[2, spine] * (2 * np.pi / (0.2 * field))) < 0.75, bone, task.tissue)
    for part in _anatomy(task, plan, semi):
        template = _stream(seed, _SHAPE, task.index, part.key)
        near, second = part.sample(where, depth > skin + wall, template, patient)
        first, other = task.tissue + enhancement * (np.array(part.levels) - task.tissue)
        shift = patient.normal(0, 0.2 * task.noise)
        level[near] = np.where(second, other, first) + shift
        level[near] += task.texture * _grain(lattice, where[:, near], task.grain_mm)
        labels[near] = np.where(second, part.values[1], part.values[0])
    return (level if ct else np.maximum(level, 0)), labels


def _grain(lattice: Array, points: Array, size_mm: float) -> Array:
    """Random texture of about unit variance at points (3, N)."""
    return 1.8 * map_coordinates(lattice, points / np.float32(size_mm), order=1, mode="grid-wrap")


def _anatomy(task: PhantomTask, plan: np.random.Generator, semi: NDArray[np.float64]) -> list[Part]:
    """The task's structures in the order they are painted: the target last, so that nothing hides it."""
    field, half, tissue, room = task.field_mm, task.size_mm / 2, task.tissue, 0.86 * semi
    organ, cap = tissue + task.contrast, 0.17 * field
    taken = [(np.array([0, -0.7 * semi[1], z * field]), 0.09 * field) for z in np.linspace(-0.4, 0.4, 5)]
    taken = taken if task.body == "trunk" else []

    def place(half: float) -> NDArray[np.float64]:
        spot = plan.standard_normal((60, 3))
        spot *= (plan.random(60) ** (1 / 3) / np.linalg.norm(spot, axis=1))[:, None]
        spot *= np.maximum(room - 0.9 * half, 0.02 * field)
        gaps = [np.linalg.norm(spot - centre, axis=1) - half - other for centre, other in taken]
        best = spot[np.argmax(np.minimum(np.min(gaps, axis=0), 0.0))] if gaps else spot[0]
        taken.append((best, half))
        return best

    def part(shape: str, half: float, level: float, key: int) -> Part:
        # Long organs lie across or along the body: front to back there is no room for them.
        turn = np.roll(np.eye(3), int(plan.choice([0, 1] if half > 0.2 * field else [0, 1, 2])), axis=1)
        turn = Rotation.from_euler("xyz", plan.normal(0, 20, 3), degrees=True).as_matrix() @ turn
        return Part(shape, key, place(half), half, turn, (level, level))

    shape = task.family if task.family in SHAPES else "lobed"
    target = part(shape, half, organ, 0)
    two = len(task.structures) == 2
    if task.family == "paired":
        centre = np.array([max(abs(target.centre[0]), 1.05 * half), *target.centre[1:]])
        targets = [
            replace(target, centre=centre, values=(value, 0), mirrored=left)
            for value, left in ((1, True), (1 + two, False))
        ]
        taken[-1:] = [(centre, half), (centre * [-1, 1, 1], half)]
    else:
        # An unlabelled cavity is still seen: the second part of a shell always has its own intensity.
        division = _FAMILIES[task.family][2] if two or task.family == "shell" else ""
        second = organ - (0.2 if division == "halves" else 0.75) * task.contrast
        targets = [replace(target, values=(1, 2 if two else 0), division=division, levels=(organ, second))]
    others = [name for name in SHAPES if name != shape]
    alike = [part(str(plan.choice(others)), min(cap, half * plan.uniform(0.8, 1.1)), organ, key) for key in (1, 2)]
    twin = replace(part(shape, min(cap, half), tissue - task.contrast, 3), key=0)
    strange = [
        part(
            str(plan.choice(others)),
            field * plan.uniform(0.07, 0.14),
            tissue + abs(task.contrast) * plan.uniform(0.6, 1.6) * plan.choice([-1, 1]),
            key,
        )
        for key in range(4, 9)
    ]
    return [*strange, twin, *alike, *targets]


def _ct_scan(clean: Array, task: PhantomTask, draw: np.random.Generator) -> Array:
    """Gaussian noise with the short correlation that a reconstruction kernel leaves."""
    noise = gaussian_filter(draw.standard_normal(clean.shape, dtype=np.float32), 0.5)
    return np.maximum(clean + np.float32(task.noise) / noise.std() * noise, -1024)


def _mr_scan(clean: Array, points: Array, task: PhantomTask, draw: np.random.Generator) -> Array:
    """A bias field, Rician noise, and a scale that differs from scan to scan."""
    swings = waves(points, draw, (1.2 * task.field_mm, 3 * task.field_mm), 3).mean(axis=0).reshape(clean.shape)
    real, imaginary = np.float32(task.noise) * draw.standard_normal((2, *clean.shape), dtype=np.float32)
    signal = clean * np.exp(np.float32(1.7 * task.bias) * swings)
    return np.hypot(signal + real, imaginary) * np.float32(np.exp(draw.uniform(np.log(0.5), np.log(1.6))))


def _stored(grid: NDArray[np.generic], affine: NDArray[np.float64], codes: str) -> Volume:
    """A (X, Y, Z) array as a volume whose axes are stored in the orientation `codes`; the places of its voxels stay."""
    turn = ornt_transform(io_orientation(affine), axcodes2ornt(codes))
    stored = np.ascontiguousarray(apply_orientation(grid, turn))
    return Volume(torch.from_numpy(stored)[None], torch.from_numpy(affine @ inv_ornt_aff(turn, grid.shape)))
