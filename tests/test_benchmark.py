from __future__ import annotations

import json
import math

import numpy as np
import pytest

from medmeta.benchmark import Trial, compare, draw_supports, markdown_table, nested_interval, score_case, summarise
from medmeta.data.phantoms import write_phantoms
from medmeta.data.tasks import load_task
from medmeta.data.volume import Volume, read_labels
from medmeta.errors import InputError
from medmeta.learners import build_learner
from medmeta.networks import build_network
from medmeta.segmenter import Model

TRIAL = Trial(shots=(1, 2), steps=(0, 2), draws=2, test_patients=2)


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    (folder,) = write_phantoms(tmp_path_factory.mktemp("phantoms") / "sets", tasks=1, cases=5, size_mm=60)
    return load_task(folder)


@pytest.fixture(scope="module")
def arms():
    nets = [build_network("se_unet_3d", channels=(8, 16), seed=seed) for seed in (0, 1)]
    return {name: Model(build_learner("scratch", net), 16**3) for name, net in zip("ab", nets, strict=True)}


def test_supports_never_hold_a_test_patient_and_larger_ones_hold_smaller(task):
    test, supports = draw_supports(task, TRIAL)
    assert len(test.patients) == 2
    assert all(not set(support) & set(test.patients) for support in supports)
    assert supports == draw_supports(task, TRIAL)[1]
    with pytest.raises(InputError, match="5 labelled patients"):
        draw_supports(task, Trial(test_patients=4))


def test_every_arm_meets_the_same_scans_and_nothing_is_done_twice(task, arms, tmp_path):
    results = compare(arms, task, TRIAL, tmp_path)
    assert len(results) == 2 * 2 * 2 * 2
    by_draw = {(r["shots"], r["draw"]): {} for r in results}
    for r in results:
        by_draw[r["shots"], r["draw"]].setdefault(r["arm"], (r["support"], [case["case"] for case in r["cases"]]))
    assert all(seen["a"] == seen["b"] for seen in by_draw.values())
    times = {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    again = compare(arms, task, TRIAL, tmp_path)
    assert {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()} == times
    assert json.dumps(again) == json.dumps([json.loads(json.dumps(r).replace("NaN", "null")) for r in results])
    rows = summarise(results, list(task.targets))
    assert {(row["arm"], row["shots"], row["steps"]) for row in rows} == {
        (arm, shots, steps) for arm in "ab" for shots in (1, 2) for steps in (0, 2)
    }
    table = markdown_table(rows, ["a", "b"])
    assert table.count("\n") == 1 + 4
    assert table.count("**") >= 2 * 4


class _Oracle:
    """A segmenter that knows the answer."""

    def __init__(self, labels: Volume) -> None:
        self.labels = labels

    def predict(self, scan: Volume) -> Volume:
        return self.labels


def test_a_perfect_segmentation_scores_one_and_an_empty_one_is_missed(task):
    case = task.cases[0]
    labels = read_labels(case.labels)
    perfect = score_case(_Oracle(labels), task, case, 2.0)
    empty = score_case(_Oracle(Volume(labels.data * 0, labels.affine)), task, case, 2.0)
    for name in task.targets:
        assert perfect[name]["dice"] == 1.0
        assert perfect[name]["hd95_mm"] == 0.0
        assert empty[name]["dice"] == 0.0
        assert empty[name]["missed"]


def test_the_mean_is_over_targets_then_cases_and_skips_what_neither_mask_holds():
    def case(name, first, second):
        return {
            "case": name,
            **{
                target: {"dice": dice, "surface_dice": dice, "missed": False}
                for target, dice in zip("xy", (first, second), strict=True)
            },
        }

    cases = [case("p", 1.0, 0.5), case("q", 0.25, None)]
    results = [{"arm": "a", "shots": 1, "steps": 5, "adapt_seconds": 1.0, "cases": cases}]
    (row,) = summarise(results, ["x", "y"])
    assert math.isclose(row["dice"], (0.75 + 0.25) / 2)
    assert math.isclose(row["by_target"]["x"], 0.625)
    assert math.isclose(row["by_target"]["y"], 0.5)


def test_the_interval_knows_that_draws_differ():
    rng = np.random.default_rng(0)
    cases = rng.normal(0.7, 0.05, size=(1, 40))
    alike, apart = cases + np.zeros((3, 1)), cases + np.array([[-0.2], [0.0], [0.2]])
    widths = [high - low for low, high in (nested_interval(alike), nested_interval(apart))]
    assert widths[1] > 3 * widths[0]
    low, high = nested_interval(alike)
    standard_error = cases.std() / np.sqrt(40)
    assert math.isclose(high - low, 2 * 1.96 * standard_error, rel_tol=0.15)
    assert low < cases.mean() < high
