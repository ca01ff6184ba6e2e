from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from medmeta.benchmark import (
    Trial,
    compare,
    cost_table,
    draw_curves,
    draw_supports,
    markdown_table,
    nested_interval,
    run_arms,
    summarise,
)
from medmeta.data.phantoms import write_phantoms
from medmeta.data.tasks import load_task
from medmeta.data.volume import Volume, read_labels
from medmeta.errors import InputError
from medmeta.evaluate import holm, paired_wilcoxon, score_case
from medmeta.files import read_json
from medmeta.fine_tuning import usual_steps
from medmeta.learners import build_learner
from medmeta.networks import build_network
from medmeta.recipe import EpisodeSettings, Phase, Recipe
from medmeta.segmenter import Model
from medmeta.train import Schedule

TRIAL = Trial(shots=(1, 2), methods=("inner", "finetune"), steps=(2,), draws=2, test_patients=2)


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


@pytest.mark.parametrize("surer", [-1.0, 1.0])
def test_self_training_sees_no_test_scan_and_no_label_of_another(task, arms, tmp_path, monkeypatch, surer):
    import medmeta.benchmark as module

    monkeypatch.setattr("medmeta.adaptation.SURER", surer)  # whether the second of both networks goes on
    task = replace(task, modality="MR")
    given = []
    look = module.with_unlabelled
    monkeypatch.setattr(module, "with_unlabelled", lambda *call: given.append(call[1]) or look(*call))
    trial = replace(TRIAL, shots=(1,), methods=("self_training",), steps=(3,), draws=1)
    (result,) = compare({"a": arms["a"]}, task, trial, tmp_path)
    (hidden,) = given
    assert all(case.labels is None for case in hidden.cases)
    seen = {case.id for case in hidden.cases} | set(result["support"])
    assert len(seen) == 3
    assert result["adapt_seconds"] > 0
    assert not seen & {case["case"] for case in result["cases"]}


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
    assert json.dumps(again) == json.dumps(results)
    rows = summarise(results, list(task.targets))
    ways = [("inner", 0), ("finetune", 2)]
    assert {(row["arm"], row["shots"], row["method"], row["steps"]) for row in rows} == {
        (arm, shots, *way) for arm in "ab" for shots in (1, 2) for way in ways
    }
    header, _, *lines = markdown_table(rows, ["a", "b"]).splitlines()
    assert header == "| learner | 1 scan, own rule | 1 scan, 2 steps | 2 scans, own rule | 2 scans, 2 steps |"
    assert [line.split(" | ")[0] for line in lines] == ["| a", "| b"]
    assert sum(line.count("**") for line in lines) >= 2 * 4
    costs = {"a": {"meta_seconds": 12.3, "time_ratio": 4.56, "peak_bytes": 3 * 2**20}}
    table = cost_table(costs, rows)
    assert "| a | 12 | 4.6 | 3 | own rule" in table
    assert len({line.count("|") for line in table.splitlines()}) == 1, "an arm without training has empty cells"


def test_other_weights_or_another_trial_are_other_results(task, arms, tmp_path):
    trial = Trial(shots=(1,), methods=("inner",), draws=1, test_patients=1)
    compare({"a": arms["a"]}, task, trial, tmp_path)
    compare({"a": arms["b"]}, task, trial, tmp_path)
    compare({"a": arms["a"]}, task, replace(trial, test_patients=2), tmp_path)
    compare({"a": arms["a"]}, task, replace(trial, draws=2), tmp_path)
    assert len(list(tmp_path.iterdir())) == 3 + 1


@pytest.mark.parametrize(("best_dice", "atlases"), [(False, 0), (True, 1)])
def test_the_trial_says_which_labels_are_scored(task, arms, tmp_path, monkeypatch, best_dice, atlases):
    import medmeta.benchmark as module

    scored = []
    score = module.score_case
    monkeypatch.setattr(module, "score_case", lambda *call, **where: scored.append(call[0]) or score(*call, **where))
    trial = Trial(shots=(1,), methods=("inner",), draws=1, test_patients=1, best_dice=best_dice, atlases=atlases)
    compare({"a": arms["a"]}, task, trial, tmp_path)
    assert [(segmenter.best_dice, len(segmenter.atlases)) for segmenter in scored] == [(best_dice, atlases)]


def test_what_was_adapted_is_kept_for_other_trials_and_changes_no_result(task, arms, tmp_path):
    trial = replace(TRIAL, shots=(1,), steps=(3,), draws=1)
    tuned, taught = (replace(trial, methods=(method,)) for method in ("finetune", "self_training"))
    alone = [compare({"a": arms["a"]}, task, each, tmp_path / "alone")[0] for each in (tuned, taught)]
    kept = [
        compare({"a": arms["a"]}, task, each, tmp_path / "kept", adapted=tmp_path / "a")[0] for each in (tuned, taught)
    ]
    (folder,) = (tmp_path / "a").iterdir()
    made = folder.stat().st_mtime_ns
    compare({"a": arms["a"]}, task, replace(tuned, atlases=1), tmp_path / "kept", adapted=tmp_path / "a")
    assert [each.stat().st_mtime_ns for each in (tmp_path / "a").iterdir()] == [made]
    for one, other in zip(alone, kept, strict=True):
        assert one.pop("adapt_seconds") > 0 and other.pop("adapt_seconds") > 0
        assert json.dumps(one) == json.dumps(other)


def test_no_steps_are_as_many_as_adapt_takes():
    trial = Trial(methods=("inner", "finetune"), steps=())
    assert trial.adaptations(4) == [("inner", 0), ("finetune", usual_steps(4))]
    assert Trial(steps=(10, 30)).adaptations(4) == [("finetune", 10), ("finetune", 30)]


@pytest.mark.parametrize("steps", [(1000, 2000), (7, 9)])
def test_one_curve_goes_through_lengths_that_follow_the_scans(tmp_path, steps):
    figures = {"arm": "transfer", "method": "finetune", "dice": 0.5, "interval": (0.4, 0.6), "adapt_seconds": 1.0}
    draw_curves(
        [figures | {"shots": shots, "steps": each} for shots, each in zip((1, 4), steps, strict=True)], tmp_path
    )
    made = {path.name for path in tmp_path.glob("shots-*.png")}
    assert made == ({"shots-finetune.png"} if steps == (1000, 2000) else {"shots-7-steps.png", "shots-9-steps.png"})


def test_an_unknown_way_to_adapt_is_refused():
    with pytest.raises(ValueError, match=r"methods \['magic'\]; required: among"):
        Trial(methods=("inner", "magic"))


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
    results = [{"arm": "a", "shots": 1, "method": "finetune", "steps": 5, "adapt_seconds": 1.0, "cases": cases}]
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


def test_arms_are_tested_against_plain_transfer_case_by_case():
    rng = np.random.default_rng(1)
    truth = rng.uniform(0.4, 0.6, size=(2, 12))
    made = {
        "transfer": truth,
        "better": truth + rng.uniform(0.05, 0.1, (2, 12)),
        "same": truth + rng.normal(0, 0.1, 12),
    }
    results = [
        {
            "arm": arm,
            "shots": 1,
            "method": "finetune",
            "steps": 5,
            "adapt_seconds": 1.0,
            "cases": [
                {"case": str(number), "x": {"dice": value, "surface_dice": value, "missed": False}}
                for number, value in enumerate(draw)
            ],
        }
        for arm, draws in made.items()
        for draw in draws
    ]
    rows = {row["arm"]: row for row in summarise(results, ["x"])}
    plain = [paired_wilcoxon(made[arm].mean(0), truth.mean(0)) for arm in ("better", "same")]
    assert rows["transfer"]["p"] is None
    assert [rows[arm]["p"] for arm in ("better", "same")] == holm(plain)
    table = markdown_table(list(rows.values()), list(rows))
    marks = {line.split(" | ")[0][2:]: line.rstrip(" |").endswith("+") for line in table.splitlines()[2:]}
    assert marks == {"transfer": False, "better": True, "same": False}
    assert "+" not in markdown_table(list(rows.values()), list(rows), "surface_dice")


def test_arms_are_trained_on_the_same_listed_episodes_and_compared(task, tmp_path):
    folders = write_phantoms(tmp_path / "sets", tasks=2, cases=4, seed=3, size_mm=60)
    schedule = Schedule(2, episodes_per_step=1, validate_every=2, checkpoint_every=1)
    joint, drawn = EpisodeSettings(1, 1), EpisodeSettings(1, 1, ways=1)
    pretrain = Phase("pretrain", "transfer", schedule, episodes=joint)
    arms = {
        "scratch": (),
        "transfer": (pretrain, Phase("meta", "transfer", schedule, episodes=joint)),
        "fomaml": (pretrain, Phase("meta", "fomaml", schedule, {"inner_steps": 1}, drawn)),
        "maml": (pretrain, Phase("meta", "maml", schedule, {"inner_steps": 1}, drawn)),
    }
    network = {"name": "se_unet_3d", "options": {"channels": [8, 16]}}
    tasks = tuple(load_task(folder) for folder in folders)
    plans = {name: Recipe(tasks, phases, network, voxels=16**3, validation_episodes=2) for name, phases in arms.items()}
    trial = Trial(shots=(1, 2), methods=("inner", "finetune"), steps=(1,), draws=1, test_patients=2)
    out = tmp_path / "out"
    rows = run_arms(plans, task, trial, out)
    assert len(rows) == 4 * 2 * 2
    lists = [read_json(path) for path in sorted(out.glob("phases/2-meta-*/episodes.json"))]
    assert len(lists) == 3
    assert sum(each == lists[0] for each in lists) + sum(each == lists[1] for each in lists) in (3, 5), "two alike"
    episode = lists[0][0]
    assert not set(episode["support"]) & set(episode["query"])
    costs = read_json(out / "result.json")["costs"]
    assert costs.keys() == {"transfer", "fomaml", "maml"}
    assert costs["maml"]["peak_bytes"] > costs["fomaml"]["peak_bytes"] > 0
    pictures = {path.name for path in out.glob("*.png")}
    assert {"shots-own-rule.png", "shots-1-steps.png", "time-1-scans.png", "time-2-scans.png"} <= pictures
    before = {path: path.stat().st_mtime_ns for path in out.glob("trials/*.json")}
    assert json.dumps(run_arms(plans, task, trial, out)) == json.dumps(rows)
    assert {path: path.stat().st_mtime_ns for path in out.glob("trials/*.json")} == before
