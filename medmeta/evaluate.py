"""How well label maps agree: Dice, surface Dice and HD95 with stated rules for empty masks, intervals and paired tests.

The rules, once, for every figure this package prints:

- Both masks empty: the target is *absent* from the case; the figures are NaN and enter no mean, the case is counted.
- Only the prediction empty: the target is *missed*; Dice 0, surface Dice 0, HD95 = the diagonal of the image.
- Only the reference empty: the target is *invented*; Dice 0, surface Dice 0, HD95 = the diagonal of the image.

Without them a missed organ drops out of the mean HD95 and an invented one out of the mean Dice, and both flatter.
"""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from medmeta.data.folders import listed, some, stem
from medmeta.data.manifests import as_targets
from medmeta.data.store import read_case
from medmeta.data.tasks import Case, Task
from medmeta.data.volume import Volume, grid_difference, read_labels
from medmeta.episode import IGNORED
from medmeta.errors import InputError
from medmeta.files import write_json

if TYPE_CHECKING:
    from medmeta.segmenter import Segmenter

METRICS = ("dice", "surface_dice", "hd95_mm")


@dataclass(frozen=True)
class Scores:
    """The agreement of two masks of one target in one case.

    Args:
        dice: 2 |R and P| / (|R| + |P|), 0..1.
        surface_dice: the part of both surfaces that lies within the tolerance of the other one, 0..1.
        hd95_mm: the larger of the two directed 95th percentiles of the surface distances, mm.
        reference_ml: volume of the reference, ml.
        prediction_ml: volume of the prediction, ml.
        missed: the reference holds the target, the prediction does not.
        invented: the prediction holds the target, the reference does not.
        absent: neither holds the target; the three figures are NaN.
    """

    dice: float
    surface_dice: float
    hd95_mm: float
    reference_ml: float
    prediction_ml: float
    missed: bool = False
    invented: bool = False
    absent: bool = False


def score_masks(
    reference: np.ndarray, prediction: np.ndarray, spacing_mm: Sequence[float], tolerance_mm: float = 2.0
) -> Scores:
    """Compares two masks on one grid.

    Both empty: all figures NaN, absent=True, to be counted apart. Prediction empty: Dice 0, surface Dice 0, HD95 the
    diagonal of the image, missed=True. Reference empty: the same with invented=True. The diagonal is that of the whole
    image, spacing times voxels along each axis.

    Distances run between the centres of surface voxels: voxels of the mask with a face neighbour outside it, where
    outside the image counts as outside the mask. An axis of one voxel has no neighbours, so a single slice is scored by
    its outline. Surface Dice counts surface voxels (Nikolov et al. 2021, not weighted by surface area); HD95 is the
    maximum of the two directed 95th percentiles, linearly interpolated (Maier-Hein et al., Metrics Reloaded, 2024), not
    the percentile of the pooled distances.

    Args:
        reference: (X, Y, Z) bool.
        prediction: (X, Y, Z) bool.
        spacing_mm: the voxel size along X, Y, Z, mm.
        tolerance_mm: the distance up to which two surfaces are taken to agree, mm, inclusive.

    Raises:
        ValueError: the shapes differ, or spacing or tolerance make no sense.
    """
    reference, prediction = np.asarray(reference, dtype=bool), np.asarray(prediction, dtype=bool)
    spacing = np.asarray(spacing_mm, dtype=float)
    if reference.ndim != 3 or reference.shape != prediction.shape:
        raise ValueError(f"masks {reference.shape} and {prediction.shape}; required: two masks of one shape (X, Y, Z)")
    if spacing.shape != (3,) or not (np.isfinite(spacing) & (spacing > 0)).all() or not tolerance_mm >= 0:
        raise ValueError(
            f"spacing {spacing_mm}, tolerance {tolerance_mm}; required: 3 lengths over 0 mm, a tolerance from 0 mm"
        )
    voxels = int(reference.sum()), int(prediction.sum())
    reference_ml, prediction_ml = (count * float(spacing.prod()) / 1000 for count in voxels)
    if not any(voxels):
        return Scores(math.nan, math.nan, math.nan, 0.0, 0.0, absent=True)
    if not all(voxels):
        diagonal = float(np.linalg.norm(spacing * reference.shape))
        missed, invented = not voxels[1], not voxels[0]
        return Scores(0.0, 0.0, diagonal, reference_ml, prediction_ml, missed=missed, invented=invented)
    dice = 2 * int((reference & prediction).sum()) / sum(voxels)
    to_prediction, to_reference = _surface_distances(reference, prediction, spacing)
    # A distance equal to the tolerance agrees, whatever its last bit says.
    within = sum(int((distances <= tolerance_mm + 1e-9).sum()) for distances in (to_prediction, to_reference))
    hd95 = max(float(np.percentile(distances, 95)) for distances in (to_prediction, to_reference))
    surface_dice = within / (to_prediction.size + to_reference.size)
    return Scores(dice, surface_dice, hd95, reference_ml, prediction_ml)


def _surface_distances(a: np.ndarray, b: np.ndarray, spacing: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distances (mm) from each surface voxel of a to the surface of b, and the reverse; neither mask is empty."""
    from scipy.ndimage import binary_erosion, distance_transform_edt

    flat = tuple(axis for axis in range(3) if a.shape[axis] == 1)[:2]
    a, b, spacing = np.squeeze(a, flat), np.squeeze(b, flat), np.delete(spacing, flat)
    box = _bounding_box(a | b)
    a, b = np.pad(a[box], 1), np.pad(b[box], 1)
    surface_a, surface_b = a ^ binary_erosion(a), b ^ binary_erosion(b)
    to_b = distance_transform_edt(~surface_b, sampling=spacing)[surface_a]
    to_a = distance_transform_edt(~surface_a, sampling=spacing)[surface_b]
    return to_b, to_a


def _bounding_box(mask: np.ndarray) -> tuple[slice, ...]:
    found = (np.flatnonzero(mask.any(tuple(k for k in range(mask.ndim) if k != axis))) for axis in range(mask.ndim))
    return tuple(slice(int(hits[0]), int(hits[-1]) + 1) for hits in found)


@dataclass(frozen=True)
class Evaluation:
    """What comparing two folders gave.

    Args:
        rows: one dict per case and target: "case", "target" and the fields of `Scores`.
        failures: (file, reason) of what could not be scored or looks wrong.
        targets: name -> label values, in the order they are reported.
        tolerance_mm: the tolerance of the surface Dice, mm.
        files: case -> reference and prediction.
    """

    rows: list[dict[str, Any]]
    failures: list[tuple[str, str]]
    targets: dict[str, tuple[int, ...]]
    tolerance_mm: float = 2.0
    files: dict[str, tuple[Path, Path]] = field(default_factory=dict)

    def summary(self, seed: int = 0) -> dict[str, Any]:
        """Means over cases with 95 % bootstrap intervals, per target and over all.

        Returns:
            {"targets": {name: entry}, "overall": entry, "failed": int}; an entry is {"n", "missed", "invented",
            "absent"} and for each metric {"mean", "interval": [low, high]}. n is the number of cases in the mean;
            missed and invented are among them, absent are not. "overall" first averages the targets of a case and then
            the cases, so that a case counts once however many targets it holds; its missed, invented and absent count
            targets. The intervals take cases as independent, which several scans of one patient are not.
        """
        per_target = {
            name: _entry([[row] for row in self.rows if row["target"] == name], seed) for name in self.targets
        }
        cases: dict[str, list[dict[str, Any]]] = {}
        for row in self.rows:
            cases.setdefault(row["case"], []).append(row)
        return {"targets": per_target, "overall": _entry(list(cases.values()), seed), "failed": len(self.failures)}

    def to_json(self, path: str | Path, seed: int = 0) -> None:
        """Writes rows, failures, summary and the rules of the figures; NaN becomes null, the file appears whole."""
        content = {
            "tolerance_mm": self.tolerance_mm,
            "rules": {
                "absent": "both masks empty: no figures, in no mean, counted",
                "missed": "prediction empty: dice 0, surface dice 0, hd95 = image diagonal",
                "invented": "reference empty: dice 0, surface dice 0, hd95 = image diagonal",
                "hd95_mm": "maximum of the two directed 95th percentiles of surface voxel distances",
                "interval": "95 % BCa bootstrap interval of the mean over cases",
            },
            "targets": {name: list(values) for name, values in self.targets.items()},
            "summary": self.summary(seed),
            "rows": self.rows,
            "failures": [{"file": file, "reason": reason} for file, reason in self.failures],
        }
        write_json(path, content)


def _entry(cases: Sequence[Sequence[Mapping[str, Any]]], seed: int) -> dict[str, Any]:
    """The summary of some cases, each given by its rows."""
    scored = [[row for row in rows if not row["absent"]] for rows in cases]
    scored = [rows for rows in scored if rows]
    entry: dict[str, Any] = {"n": len(scored)}
    for count in ("missed", "invented", "absent"):
        entry[count] = sum(row[count] for rows in cases for row in rows)
    for metric in METRICS:
        values = [float(np.mean([row[metric] for row in rows])) for rows in scored]
        mean = float(np.mean(values)) if values else math.nan
        entry[metric] = {"mean": mean, "interval": list(bootstrap_interval(values, seed))}
    return entry


def evaluate_folders(
    reference: str | Path,
    prediction: str | Path,
    *,
    targets: Mapping[str, Sequence[int]] | None = None,
    tolerance_mm: float = 2.0,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Compares the label maps of two folders; files pair by name without the suffix of the format.

    A case that cannot be scored (unreadable, on another grid, without a partner) is listed in `failures` and never
    stops the others. Failed cases are in no mean.

    Args:
        reference: the folder of reference label maps.
        prediction: the folder of predicted label maps, each on the grid of its reference.
        targets: name -> label values whose union is the target; targets may overlap. By default each label value that
            a paired reference holds is a target named after it, and a predicted value that none holds is a failure.
        tolerance_mm: the tolerance of the surface Dice, mm.
        progress: called as progress(done, total) after each case.

    Raises:
        InputError: a folder is missing or holds no label map, no names pair, no reference holds a label, or the targets
            are unusable.
    """
    if not (math.isfinite(tolerance_mm) and tolerance_mm >= 0):
        raise InputError("tolerance_mm", str(tolerance_mm), "a length from 0 mm")
    named = None if targets is None else as_targets(targets, (), "targets")
    failures: list[tuple[str, str]] = []
    pairs = _pair(Path(reference), Path(prediction), failures)
    chosen = _values_as_targets([files[0] for files in pairs.values()]) if named is None else named
    known = {value for values in chosen.values() for value in values}
    rows: list[dict[str, Any]] = []
    for done, (case, (expected_path, found_path)) in enumerate(pairs.items(), 1):
        try:
            expected, found = read_labels(expected_path), read_labels(found_path)
            rows += _score_case(case, expected, found, found_path, chosen, tolerance_mm)
            if named is None and (strange := _values(found) - known):
                reason = f"holds label {some([str(v) for v in sorted(strange)])}, which no reference holds: not scored"
                failures.append((str(found_path), reason))
        except InputError as error:
            failures.append((error.where, str(error).removeprefix(f"{error.where}: ")))
        except OSError as error:
            failures.append((str(error.filename or found_path), " ".join(str(error.strerror or error).split())))
        if progress is not None:
            progress(done, len(pairs))
    return Evaluation(rows, sorted(failures), chosen, tolerance_mm, pairs)


def _pair(reference: Path, prediction: Path, failures: list[tuple[str, str]]) -> dict[str, tuple[Path, Path]]:
    """Case -> (reference, prediction); files without a partner are added to the failures."""
    references, predictions = (_label_files(folder, failures) for folder in (reference, prediction))
    for ours, others, folder, missing in (
        (references, predictions, prediction, "prediction"), (predictions, references, reference, "reference")
    ):  # fmt: skip
        failures += [(str(ours[n]), f"has no {missing} of its name in {folder}") for n in ours if n not in others]
    pairs = {name: (path, predictions[name]) for name, path in references.items() if name in predictions}
    if not pairs:
        raise InputError(
            prediction,
            f"no file named like a reference in {reference}",
            "each prediction named like its reference, the suffix aside",
            f"Here are {some(list(predictions)) or 'none'}, there {some(list(references)) or 'none'}.",
        )
    return pairs


def _label_files(folder: Path, failures: list[tuple[str, str]]) -> dict[str, Path]:
    """Name without suffix -> file, sorted; a name that stands for two files is a failure and pairs with nothing."""
    by_name: dict[str, list[Path]] = {}
    for path in listed(folder):
        by_name.setdefault(stem(path), []).append(path)
    for paths in by_name.values():
        if len(paths) > 1:
            others = ", ".join(path.name for path in paths[1:])
            failures.append((str(paths[0]), f"stands for the same case as {others}; keep one of them"))
    return {name: paths[0] for name, paths in by_name.items() if len(paths) == 1}


def _values_as_targets(references: Sequence[Path]) -> dict[str, tuple[int, ...]]:
    """Each label value of the references as a target of its own. Unreadable files are the caller's to list."""
    values: set[int] = set()
    readable = 0
    for path in references:
        with contextlib.suppress(InputError, OSError):
            values |= _values(read_labels(path))
            readable += 1
    if readable and not values:
        raise InputError(
            references[0].parent, "only background", "a label above 0 in some reference", "Or name the targets."
        )
    return {str(value): (value,) for value in sorted(values)}


def _values(labels: Volume) -> set[int]:
    return {int(value) for value in labels.data.unique()} - {0}


def _score_case(
    case: str, expected: Volume, found: Volume, path: Path, targets: Mapping[str, Sequence[int]], tolerance_mm: float
) -> list[dict[str, Any]]:
    if difference := grid_difference(expected, found):
        raise InputError(path, f"another grid than its reference: {difference}", "the grid of the reference")
    maps = expected.data[0].numpy(), found.data[0].numpy()
    rows = []
    for name, values in targets.items():
        reference, prediction = (np.isin(labels, values) for labels in maps)
        scores = score_masks(reference, prediction, expected.spacing, tolerance_mm)
        rows.append({"case": case, "target": name, **asdict(scores)})
    return rows


def score_case(segmenter: Segmenter, task: Task, case: Case, tolerance_mm: float, **options: Any) -> dict[str, Any]:
    """Segment one labelled scan and score each target, as `score_prediction` does. Options as of `Segmenter.predict`.

    Raises:
        InputError: scan or label map cannot be used.
    """
    scan, reference = read_case(task, case)
    return score_prediction(segmenter.predict(scan, **options), task, case, scan, reference, tolerance_mm)


def score_prediction(
    prediction: Volume, task: Task, case: Case, scan: Volume, reference: torch.Tensor, tolerance_mm: float
) -> dict[str, Any]:
    """Score each target of a label map.

    Args:
        prediction: the label map (1, X, Y, Z).
        task, case: what was segmented.
        scan, reference: as `read_case` gives them.
        tolerance_mm: of surface Dice.

    Returns:
        {"case": id, target: {"dice", "surface_dice", "hd95_mm", "missed", "invented"}, ...}; figures that do not exist
        are NaN.
    """
    predicted = task.encode(prediction.data, case.id)
    counted = (reference != IGNORED).numpy()[0]
    row: dict[str, Any] = {"case": case.id}
    for name, values in task.targets.items():
        classes = [number for number, atom in enumerate(task.atoms, start=1) if set(atom) <= set(values)]
        masks = [torch.isin(mask, torch.tensor(classes)).numpy()[0] & counted for mask in (reference, predicted)]
        scores = score_masks(masks[0], masks[1], scan.spacing, tolerance_mm)
        row[name] = {key: getattr(scores, key) for key in ("dice", "surface_dice", "hd95_mm", "missed", "invented")}
    return row


def mean_score(values: Iterable[float | None]) -> float:
    """The mean of the figures that exist, NaN where none does; what neither mask holds has none, null in JSON."""
    present = [value for value in values if value is not None and not math.isnan(value)]
    return statistics.fmean(present) if present else math.nan


def bootstrap_interval(
    values: Sequence[float], seed: int | np.random.Generator = 0, confidence: float = 0.95
) -> tuple[float, float]:
    """The bias-corrected and accelerated bootstrap interval of the mean (Efron 1987), from 9999 resamples.

    NaN values are left out. One value has no interval: (NaN, NaN). Below about 10 values it is narrower than it claims.
    """
    from scipy.stats import bootstrap

    kept = np.asarray([value for value in values if not math.isnan(value)], dtype=float)
    if kept.size < 2:
        return math.nan, math.nan
    if np.ptp(kept) < 1e-12:
        return float(kept[0]), float(kept[0])
    interval = bootstrap(
        (kept,), np.mean, confidence_level=confidence, random_state=np.random.default_rng(seed)
    ).confidence_interval
    return float(interval.low), float(interval.high)


def paired_wilcoxon(a: Sequence[float], b: Sequence[float]) -> float:
    """The two-sided p value of Wilcoxon's signed-rank test over pairs (the same cases, two methods).

    Pairs with a NaN and pairs without a difference are left out; NaN where none is left. The smallest p value that n
    differing pairs can give is 2 / 2**n: fewer than 6 cases cannot reach 0.05, however large the difference. Exact up
    to 50 pairs; where differences tie, exact up to 13 and the normal approximation beyond.

    Raises:
        ValueError: a and b differ in length.
    """
    from scipy.stats import PermutationMethod, wilcoxon

    if len(a) != len(b):
        raise ValueError(f"{len(a)} and {len(b)} values; required: pairs")
    # Rounding keeps equal differences equal: 0.3 - 0.2 and 0.2 - 0.1 are one rank.
    differences = np.round(np.asarray(a, dtype=float) - np.asarray(b, dtype=float), 12)
    differences = differences[~np.isnan(differences) & (differences != 0)]
    if not differences.size:
        return math.nan
    ties = np.unique(np.abs(differences)).size < differences.size
    if not ties:
        method: Any = "exact" if differences.size <= 50 else "asymptotic"
    else:
        method = PermutationMethod(n_resamples=2**13) if differences.size <= 13 else "asymptotic"
    return float(wilcoxon(differences, method=method).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's (1979) adjusted p values, in the order given; they control the chance of any false claim among all tests.

    A NaN (a test that could not be made) stays NaN and does not count as a test.
    """
    order = sorted((index for index, p in enumerate(p_values) if not math.isnan(p)), key=lambda index: p_values[index])
    adjusted, highest = [math.nan] * len(p_values), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted
