from __future__ import annotations

import json
import math
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from medmeta.data.volume import Volume, write_volume
from medmeta.errors import InputError
from medmeta.evaluate import bootstrap_interval, evaluate_folders, holm, paired_wilcoxon, score_masks

SPACING = (0.8, 1.5, 4.0)


def cube(shape: tuple[int, ...], corner: tuple[int, ...], size: tuple[int, ...]) -> np.ndarray:
    mask = np.zeros(shape, dtype=bool)
    mask[tuple(slice(start, start + length) for start, length in zip(corner, size, strict=True))] = True
    return mask


def surface_points(mask: np.ndarray, spacing: tuple[float, ...]) -> np.ndarray:
    """Voxel by voxel: in the mask, with a face neighbour that is outside the mask or outside the image."""
    points = []
    for index in zip(*np.nonzero(mask), strict=True):
        neighbours = [tuple(np.add(index, step)) for step in np.vstack([np.eye(3, dtype=int), -np.eye(3, dtype=int)])]
        inside = [all(0 <= i < n for i, n in zip(place, mask.shape, strict=True)) for place in neighbours]
        if not all(ok and mask[place] for ok, place in zip(inside, neighbours, strict=True)):
            points.append(np.multiply(index, spacing))
    return np.array(points)


def nearest(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1)).min(1)


@pytest.mark.parametrize("seed", range(6))
def test_distances_equal_those_of_all_pairs(seed: int) -> None:
    rng = np.random.default_rng(seed)
    shape = tuple(rng.integers(4, 10, size=3))
    spacing = tuple(rng.uniform(0.5, 5.0, size=3))
    reference, prediction = (cube(shape, (0, 0, 0), (3, 3, 3)) | (rng.random(shape) < 0.5) for _ in range(2))
    a, b = surface_points(reference, spacing), surface_points(prediction, spacing)
    to_b, to_a = nearest(a, b), nearest(b, a)

    scores = score_masks(reference, prediction, spacing, tolerance_mm=1.2)

    expected = ((to_b <= 1.2).sum() + (to_a <= 1.2).sum()) / (len(a) + len(b))
    assert scores.surface_dice == pytest.approx(expected)
    assert scores.hd95_mm == pytest.approx(max(np.percentile(to_b, 95), np.percentile(to_a, 95)))
    both = np.logical_and(reference, prediction).sum()
    assert scores.dice == pytest.approx(2 * both / (reference.sum() + prediction.sum()))
    assert scores.reference_ml == pytest.approx(reference.sum() * np.prod(spacing) / 1000)


@pytest.mark.parametrize("axis", range(3))
def test_a_shifted_cube_by_hand(axis: int) -> None:
    step = [int(k == axis) for k in range(3)]
    reference = cube((16, 16, 16), (2, 2, 2), (10, 10, 10))
    prediction = cube((16, 16, 16), tuple(np.add((2, 2, 2), step)), (10, 10, 10))

    scores = score_masks(reference, prediction, SPACING, tolerance_mm=SPACING[axis])

    assert scores.dice == pytest.approx(0.9)
    # The faces across the shift are a fifth of the surface, and each lies one voxel from the other.
    assert scores.hd95_mm == pytest.approx(SPACING[axis])
    assert scores.surface_dice == 1.0, "a distance equal to the tolerance agrees"
    assert score_masks(reference, prediction, SPACING, tolerance_mm=0.99 * min(SPACING)).surface_dice < 1


def test_hd95_is_the_larger_of_the_two_directions() -> None:
    reference = cube((40, 8, 8), (1, 1, 1), (6, 6, 6))
    prediction = reference | cube((40, 8, 8), (30, 1, 1), (6, 6, 6))
    forth = score_masks(reference, prediction, (1, 1, 1))
    back = score_masks(prediction, reference, (1, 1, 1))
    # Half of the predicted surface is the second cube, 24 to 29 voxels away; every reference voxel is at distance 0.
    assert 28 <= forth.hd95_mm <= 29
    assert forth.hd95_mm == back.hd95_mm and forth.surface_dice == back.surface_dice


def test_equal_masks_agree_wholly_even_where_they_fill_the_image() -> None:
    for mask in (np.ones((4, 5, 6), dtype=bool), cube((4, 5, 6), (3, 4, 5), (1, 1, 1)), np.ones((1, 1, 1), dtype=bool)):
        scores = score_masks(mask, mask, SPACING, tolerance_mm=0.0)
        assert (scores.dice, scores.surface_dice, scores.hd95_mm) == (1.0, 1.0, 0.0)
        assert not (scores.missed or scores.invented or scores.absent)


def test_a_single_slice_is_scored_by_its_outline() -> None:
    reference, prediction = cube((30, 30, 1), (5, 5, 0), (20, 20, 1)), cube((30, 30, 1), (7, 5, 0), (20, 20, 1))
    flat = score_masks(reference, prediction, (1, 1, 5), tolerance_mm=0.5)
    assert flat.hd95_mm == 2.0
    # Each outline has 76 voxels; the two share 18 of the upper and 18 of the lower edge.
    assert flat.surface_dice == pytest.approx(36 / 76)
    for axes in ((2, 0, 1), (0, 2, 1)):
        turned = score_masks(
            reference.transpose(axes), prediction.transpose(axes), np.array((1, 1, 5))[list(axes)], 0.5
        )
        assert turned == flat


def test_empty_masks_follow_the_stated_rules() -> None:
    empty, mask = np.zeros((10, 20, 5), dtype=bool), cube((10, 20, 5), (1, 1, 1), (2, 2, 2))
    diagonal = math.sqrt((10 * 0.8) ** 2 + (20 * 1.5) ** 2 + (5 * 4.0) ** 2)

    both = score_masks(empty, empty, SPACING)
    assert both.absent and all(math.isnan(value) for value in (both.dice, both.surface_dice, both.hd95_mm))
    missed = score_masks(mask, empty, SPACING)
    assert (missed.dice, missed.surface_dice, missed.missed, missed.invented) == (0, 0, True, False)
    assert missed.hd95_mm == pytest.approx(diagonal) and missed.prediction_ml == 0 < missed.reference_ml
    invented = score_masks(empty, mask, SPACING)
    assert (invented.dice, invented.surface_dice, invented.missed, invented.invented) == (0, 0, False, True)
    assert invented.hd95_mm == pytest.approx(diagonal)


@pytest.mark.parametrize(
    ("shape", "spacing", "tolerance"),
    [
        ((3, 3, 4), SPACING, 2.0),
        ((3, 3, 3), (1, 0, 1), 2.0),
        ((3, 3, 3), (1, math.nan, 1), 2.0),
        ((3, 3, 3), SPACING, -1),
    ],
)
def test_unusable_masks_are_refused(shape: tuple[int, ...], spacing: tuple[float, ...], tolerance: float) -> None:
    with pytest.raises(ValueError, match="required"):
        score_masks(np.ones((3, 3, 3), dtype=bool), np.ones(shape, dtype=bool), spacing, tolerance)


def save(labels: np.ndarray, path: Path, spacing: float = 2.0, origin: float = 0.0) -> None:
    affine = np.diag([spacing, spacing, spacing, 1.0])
    affine[0, 3] = origin
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.Nifti1Image(labels.astype(np.uint8), affine).to_filename(path)


def labelled(*corners: tuple[int, tuple[int, int, int]]) -> np.ndarray:
    """Cubes of 4 voxels a side: (label value, corner) each."""
    labels = np.zeros((14, 14, 14))
    for value, corner in corners:
        labels[cube(labels.shape, corner, (4, 4, 4))] = value
    return labels


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    reference, prediction = tmp_path / "reference", tmp_path / "prediction"
    both = labelled((1, (1, 1, 1)), (2, (8, 8, 8)))
    save(both, reference / "good.nii.gz")
    save(labelled((1, (1, 1, 1)), (2, (8, 8, 9))), prediction / "good.nii.gz")
    save(both, reference / "missing_two.nii.gz")
    save(labelled((1, (1, 1, 1))), prediction / "missing_two.nii.gz")
    save(labelled((1, (1, 1, 1))), reference / "without_two.nii.gz")
    save(labelled((1, (3, 1, 1))), prediction / "without_two.nii.gz")
    return reference, prediction


def test_folders_are_scored_case_by_case_and_summed_up(folders: tuple[Path, Path], tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    result = evaluate_folders(*folders, progress=lambda done, total: calls.append((done, total)))

    assert result.targets == {"1": (1,), "2": (2,)} and result.failures == []
    assert calls == [(1, 3), (2, 3), (3, 3)]
    dice = {(row["case"], row["target"]): row["dice"] for row in result.rows}
    assert math.isnan(dice.pop(("without_two", "2")))
    assert dice == {
        ("good", "1"): 1.0,
        ("good", "2"): 0.75,
        ("missing_two", "1"): 1.0,
        ("missing_two", "2"): 0.0,
        ("without_two", "1"): 0.5,
    }
    summary = result.summary()
    one, two = summary["targets"]["1"], summary["targets"]["2"]
    assert one["dice"]["mean"] == pytest.approx(2.5 / 3) and one["n"] == 3 and one["absent"] == 0
    assert (two["n"], two["missed"], two["invented"], two["absent"]) == (2, 1, 0, 1)
    assert two["dice"]["mean"] == pytest.approx(0.375)
    assert two["hd95_mm"]["mean"] == pytest.approx((2.0 + math.sqrt(3) * 28) / 2)
    # A case counts once: 0.875, 0.5 and 0.5.
    assert summary["overall"]["dice"]["mean"] == pytest.approx(1.875 / 3) and summary["overall"]["n"] == 3
    low, high = summary["overall"]["dice"]["interval"]
    assert 0.5 <= low <= 0.625 <= high <= 0.875
    assert result.summary(seed=3) == result.summary(seed=3)

    result.to_json(tmp_path / "scores.json")
    written = json.loads((tmp_path / "scores.json").read_text(), parse_constant=pytest.fail)
    absent = next(row for row in written["rows"] if row["absent"])
    assert absent["dice"] is None and absent["case"] == "without_two"
    assert written["summary"]["targets"]["2"]["missed"] == 1 and written["tolerance_mm"] == 2.0


def test_bad_cases_are_listed_and_the_others_scored(folders: tuple[Path, Path]) -> None:
    reference, prediction = folders
    labels = labelled((1, (1, 1, 1)))
    save(labels, reference / "moved.nii.gz")
    save(labels, prediction / "moved.nii.gz", origin=3.2)
    save(labels, reference / "lonely.nii.gz")
    save(labels, prediction / "extra.nii.gz")
    save(labels, reference / "cut.nii.gz")
    (prediction / "cut.nii.gz").write_bytes((reference / "cut.nii.gz").read_bytes()[:80])
    save(labels, reference / "twice.nii.gz")
    save(labels, prediction / "twice.nii.gz")
    save(labels, prediction / "twice.nii")
    save(labelled((1, (1, 1, 1)), (7, (8, 8, 8))), prediction / "good.nii.gz")

    result = evaluate_folders(reference, prediction)

    assert {row["case"] for row in result.rows} == {"good", "missing_two", "without_two"}
    reasons = {(Path(file).parent.name, Path(file).name): reason for file, reason in result.failures}
    assert "origin differs by 3.2 mm" in reasons["prediction", "moved.nii.gz"]
    assert "no prediction" in reasons["reference", "lonely.nii.gz"]
    assert "no reference" in reasons["prediction", "extra.nii.gz"]
    assert "same case" in reasons["prediction", "twice.nii"] and "no prediction" in reasons["reference", "twice.nii.gz"]
    assert "label 7" in reasons["prediction", "good.nii.gz"]
    assert ("prediction", "cut.nii.gz") in reasons and len(reasons) == 7
    assert all("\n" not in reason for reason in reasons.values())
    assert result.summary()["failed"] == 7


def test_targets_are_unions_that_may_overlap_and_formats_may_differ(tmp_path: Path) -> None:
    tumour_in_liver = labelled((1, (1, 1, 1)), (2, (5, 1, 1)))
    save(tumour_in_liver, tmp_path / "r" / "a.nii.gz")
    (tmp_path / "p").mkdir()
    predicted = torch.from_numpy(labelled((1, (1, 1, 1)), (1, (5, 1, 1))).astype(np.int16))[None]
    write_volume(
        Volume(predicted, torch.diag(torch.tensor([2.0, 2, 2, 1], dtype=torch.float64))), tmp_path / "p" / "a.nrrd"
    )
    result = evaluate_folders(tmp_path / "r", tmp_path / "p", targets={"organ": [1, 2], "tumour": [2]})
    assert [(row["target"], row["dice"], row["missed"]) for row in result.rows] == [
        ("organ", 1.0, False),
        ("tumour", 0.0, True),
    ]


def test_what_cannot_be_evaluated_at_all_is_one_error(folders: tuple[Path, Path], tmp_path: Path) -> None:
    reference, prediction = folders
    (tmp_path / "empty").mkdir()
    save(np.zeros((4, 4, 4)), tmp_path / "other" / "unpaired.nii.gz")
    save(np.zeros((14, 14, 14)), tmp_path / "background" / "good.nii.gz")
    for arguments, found in (
        ((tmp_path / "nowhere", prediction), "nowhere"),
        ((reference, tmp_path / "empty"), "empty"),
        ((reference, reference / "good.nii.gz"), "a file"),
        ((reference, tmp_path / "other"), "unpaired"),
        ((tmp_path / "background", prediction), "only background"),
    ):
        with pytest.raises(InputError, match=found):
            evaluate_folders(*arguments)
    for targets in ({}, {"liver": []}, {"liver": [0]}):
        with pytest.raises(InputError):
            evaluate_folders(reference, prediction, targets=targets)
    with pytest.raises(InputError, match="tolerance"):
        evaluate_folders(reference, prediction, tolerance_mm=math.nan)


def test_real_references_score_perfectly_against_themselves(shared_data: Path) -> None:
    folder = shared_data / "CHAOS_AbdomenMR" / "labelsTr"
    mask = np.asarray(nib.load(next(iter(sorted(folder.glob("*.nii*"))))).dataobj)
    scores = score_masks(mask == 1, mask == 1, (1.25, 1.25, 7.7))
    assert (scores.dice, scores.surface_dice, scores.hd95_mm) == (1.0, 1.0, 0.0)
    shifted = score_masks(mask == 1, np.roll(mask == 1, 1, axis=2), (1.25, 1.25, 7.7))
    assert 0 < shifted.hd95_mm <= 7.7, "a liver moved by one slice lies within one slice"
    assert 300 < scores.reference_ml < 4000, "a liver"


def test_bootstrap_interval() -> None:
    values = np.random.default_rng(0).normal(0.8, 0.05, size=200)
    low, high = bootstrap_interval(values, seed=1)
    half = 1.96 * values.std(ddof=1) / math.sqrt(200)
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)
    assert bootstrap_interval(values, seed=1) == (low, high) != bootstrap_interval(values, seed=2)
    assert bootstrap_interval([*values, math.nan], seed=1) == (low, high)
    assert bootstrap_interval([0.3, 0.3, 0.3]) == (0.3, 0.3)
    assert all(math.isnan(end) for values in ([], [0.5], [0.5, math.nan]) for end in bootstrap_interval(values))
    low, high = bootstrap_interval([0.1, 0.9])
    assert 0.1 <= low <= high <= 0.9


def test_wilcoxon_is_exact_for_few_cases() -> None:
    worse = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    gain = np.array([0.01, 0.02, 0.03, 0.04, 0.05, 0.06])
    assert paired_wilcoxon(worse + gain, worse) == pytest.approx(2 / 2**6)
    assert paired_wilcoxon(worse[:5] + gain[:5], worse[:5]) == pytest.approx(2 / 2**5)
    assert paired_wilcoxon(worse[:5] + 0.1, worse[:5]) == pytest.approx(2 / 2**5), "ties change nothing"
    assert paired_wilcoxon([*worse, 0.7, math.nan], [*(worse + gain), 0.7, 0.2]) == pytest.approx(2 / 2**6)
    assert math.isnan(paired_wilcoxon([0.1 + 0.2, 0.5], [0.3, 0.5]))
    assert math.isnan(paired_wilcoxon([], []))
    many = np.random.default_rng(0).normal(0.1, 1, size=300)
    assert 0 < paired_wilcoxon(many, np.zeros(300)) < 1
    with pytest.raises(ValueError, match="pairs"):
        paired_wilcoxon([0.1], [0.1, 0.2])


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    with_nan = holm([0.01, math.nan, 0.04])
    assert with_nan[::2] == pytest.approx([0.02, 0.04]) and math.isnan(with_nan[1])
    assert holm([]) == []
