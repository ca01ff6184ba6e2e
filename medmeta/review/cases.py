"""What the page shows of one scan: its files, what is known of it, and its volumes as scripts."""

from __future__ import annotations

import base64
import gzip
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nibabel as nib
import numpy as np

from medmeta.data.folders import listed, stem
from medmeta.data.stored import by
from medmeta.data.volume import Volume, grid_difference, read_labels, read_volume
from medmeta.errors import InputError
from medmeta.files import replacing
from medmeta.representation import COLOURS, stretch

if TYPE_CHECKING:
    from medmeta.evaluate import Evaluation
    from medmeta.prediction import Prediction

VOXEL_LIMIT = 2**24
"""Larger volumes are shown on every second, third, ... voxel: 512 x 512 x 64 voxels, about 30 MiB in base64."""

_ROLES = {"scan": read_volume, "reference": read_labels, "prediction": read_labels}
_SCORES = ("dice", "surface_dice", "hd95_mm", "prediction_ml", "reference_ml", "missed", "invented", "absent")


@dataclass(frozen=True)
class ReviewCase:
    """One scan and what is known of it.

    Args:
        name: as shown; any text.
        scan: the file; its first channel is shown.
        reference: a label map on the grid of the scan, None where there is none.
        prediction: a label map on the grid of the scan, None where there is none.
        scores: structure -> figures, any of dice, surface_dice, hd95_mm, prediction_ml, reference_ml, missed, invented
            and absent, as in the rows of `evaluate.Evaluation`; other keys are let be, NaN is shown as a dash.
        quality: expected quality of the prediction, the larger the better.
        flags: what a reader should know about the case, a few words each.
        window: the intensities drawn black and white, such as report.CT_WINDOW in HU; by default the 1st and 99.5th
            percentile of the scan, its darkest value left out.
    """

    name: str
    scan: Path
    reference: Path | None = None
    prediction: Path | None = None
    scores: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    quality: float | None = None
    flags: Sequence[str] = ()
    window: tuple[float, float] | None = None


def predicted_cases(results: Iterable[Prediction]) -> list[ReviewCase]:
    """What a batch prediction made of each scan, failures as flags."""
    return [
        ReviewCase(
            result.name or result.scan.name,
            result.scan,
            prediction=result.output,
            scores={name: {"prediction_ml": volume} for name, volume in result.volumes_ml.items()},
            quality=result.quality,
            flags=(*result.notes, *([f"failed: {result.reason}"] if result.status == "failed" else [])),
        )
        for result in results
    ]


def evaluated_cases(evaluation: Evaluation, images: str | Path) -> list[ReviewCase]:
    """The cases of an evaluation with their scans; a case pairs with the scan of its name, or its channel 0.

    Raises:
        InputError: `images` is no folder, or holds the scan of no case.
    """
    scans = {stem(path): path for path in listed(Path(images))}
    found = {case: scans.get(case, scans.get(f"{case}_0000")) for case in evaluation.files}
    if not any(found.values()):
        required = "scans named like their label maps, the suffix aside"
        raise InputError(images, f"no scan of {len(found)} cases", required)
    scores: dict[str, dict[str, dict[str, Any]]] = {}
    for row in evaluation.rows:
        scores.setdefault(row["case"], {})[row["target"]] = row
    return [
        ReviewCase(case, scan, *evaluation.files[case], scores=scores.get(case, {}))
        for case, scan in found.items()
        if scan is not None
    ]


def write_case(
    case: ReviewCase, number: int, targets: Mapping[str, Sequence[int]], folder: Path, voxel_limit: int
) -> dict[str, Any]:
    """Writes the volumes of a case, and returns what the page knows about it."""
    volumes, problems = _read(case)
    shown: dict[str, Any] = {
        "name": case.name,
        "scores": {name: {key: row[key] for key in _SCORES if key in row} for name, row in case.scores.items()},
        "quality": case.quality,
        "flags": list(case.flags),
        "problems": problems,
        "volumes": {role: f"{number}-{role}" for role in volumes},
        "centres": {},
    }
    for role, volume in volumes.items():
        if role == "scan":
            image = _image(volume.data[0].numpy(), volume.affine.numpy(), voxel_limit)
            voxels = np.asanyarray(image.dataobj)
            shown["window"] = case.window or stretch(voxels)
            shown["reduced"] = _reduction(volume, image)
            image = nib.Nifti1Image(_in_16_bits(voxels), image.affine)
        else:
            # Both label maps lie on the grid of the scan, up to rounding; here to the last bit.
            image = _image(_coded(volume.data[0].numpy(), targets), volumes["scan"].affine.numpy(), voxel_limit)
            # The reference comes first and has the last word.
            shown["centres"] = _centres(image, targets) | shown["centres"]
        # nibabel spreads floats over the whole range of the type that they are stored in.
        image.set_data_dtype(np.int16)
        image.header.set_xyzt_units("mm")
        content = base64.b64encode(gzip.compress(image.to_bytes(), 5, mtime=0)).decode("ascii")
        name = shown["volumes"][role]
        with replacing(folder / f"{name}.js") as beside:
            beside.write_text(f'review.receive("{name}", "{content}");\n', encoding="utf-8")
    return shown


def _read(case: ReviewCase) -> tuple[dict[str, Volume], list[str]]:
    """Role -> volume, the scan first and nothing without it; and what is wrong with the others."""
    volumes: dict[str, Volume] = {}
    problems = []
    for role, read in _ROLES.items():
        path = getattr(case, role)
        if path is None:
            continue
        try:
            volume = read(path)
        except InputError as error:
            problems.append(f"{role} not shown: {str(error).removeprefix(f'{error.where}: ')}")
            continue
        if "scan" in volumes and (difference := grid_difference(volumes["scan"], volume)):
            problems.append(f"{role} not shown: another grid than the scan: {difference}")
            continue
        volumes[role] = volume
    return (volumes if "scan" in volumes else {}), problems


def _image(values: np.ndarray, affine: np.ndarray, voxel_limit: int) -> nib.Nifti1Image:
    """(X, Y, Z) on the axes nearest to RAS; every n-th voxel, taken along the axes of finest spacing, within the limit.

    Voxels are taken, not averaged: a scan and its label maps then stay on each other.
    """
    image = nib.as_closest_canonical(nib.Nifti1Image(values, affine))
    steps, spacing = np.ones(3, dtype=int), np.asarray(image.header.get_zooms())
    while np.prod(-(-np.asarray(image.shape) // steps)) > voxel_limit:
        steps[(spacing * steps).argmin()] += 1
    return image.slicer[tuple(slice(None, None, int(step)) for step in steps)]


def _reduction(volume: Volume, image: nib.Nifti1Image) -> str:
    """How the page's grid is coarser than the scan's; "" where it is not."""
    if sorted(volume.shape) == sorted(image.shape):
        return ""
    shown, taken = ([round(float(mm), 2) for mm in spacing] for spacing in (image.header.get_zooms(), volume.spacing))
    return (
        f"Shown on a coarser grid: {by(image.shape)} voxels of {by(shown)} mm; "
        f"the scan has {by(volume.shape)} of {by(taken)} mm."
    )


def _in_16_bits(voxels: np.ndarray) -> np.ndarray:
    """Integers that fit as int16; all else float, drawn in so far that 16-bit steps serve it, NaN as the least.

    What lies more than 8 widths of the central 99.8 % outside them is drawn in: those keep 12 bits.
    """
    finite = voxels[np.isfinite(voxels)]
    if not finite.size:
        return np.zeros(voxels.shape, dtype=np.int16)
    low, high = np.percentile(finite, (0.1, 99.9))
    reach = 8 * (high - low) or np.inf
    least, most = max(finite.min(), low - reach), min(finite.max(), high + reach)
    values = np.clip(np.nan_to_num(voxels, nan=least, neginf=least, posinf=most), least, most)
    whole = values.astype(np.int16) if least >= -(2**15) and most < 2**15 else values
    return whole if (whole == values).all() else values


def _codes(targets: Mapping[str, Sequence[int]]) -> list[int]:
    """The label values that are shown. In the volumes of the page a value is its place here, counted from 1."""
    return sorted({value for values in targets.values() for value in values})


def _coded(labels: np.ndarray, targets: Mapping[str, Sequence[int]]) -> np.ndarray:
    known = _codes(targets)
    return np.where(np.isin(labels, known), np.searchsorted(known, labels) + 1, 0).astype(np.int16)


def structures(targets: Mapping[str, Sequence[int]]) -> list[dict[str, Any]]:
    """Name, colour and values in the volumes of the page of each structure."""
    known = _codes(targets)
    return [
        {
            "name": name,
            "colour": COLOURS[number % len(COLOURS)],
            "codes": [known.index(value) + 1 for value in values],
        }
        for number, (name, values) in enumerate(targets.items())
    ]


def _centres(image: nib.Nifti1Image, targets: Mapping[str, Sequence[int]]) -> dict[str, list[float]]:
    """Structure -> RAS mm of its voxel nearest to its centre of mass, which may itself lie outside."""
    labels, spacing = np.asanyarray(image.dataobj), image.header.get_zooms()
    centres = {}
    for structure in structures(targets):
        voxels = np.argwhere(np.isin(labels, structure["codes"]))
        if len(voxels):
            nearest = voxels[(((voxels - voxels.mean(axis=0)) * spacing) ** 2).sum(axis=1).argmin()]
            centres[structure["name"]] = [round(float(mm), 2) for mm in nib.affines.apply_affine(image.affine, nearest)]
    return centres
