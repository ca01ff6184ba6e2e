from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from medmeta.config import BenchmarkConfig, TrainConfig, load_config
from medmeta.data.phantoms import write_phantoms
from medmeta.data.tasks import load_task
from medmeta.errors import InputError

CONFIGS = Path(__file__).parents[1] / "configs"
MINIMAL = {
    "data": "sets",
    "tasks": [{"path": "Task01"}],
    "phases": [{"name": "pretrain", "learner": "transfer", "schedule": {"steps": 3}}],
}


def written(folder: Path, values: object) -> Path:
    path = folder / "config.yaml"
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values))
    return path


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_config_is_valid(path):
    kind = BenchmarkConfig if "held_out" in yaml.safe_load(path.read_text()) else TrainConfig
    assert load_config(kind, path).tasks


def benchmark_config(folder: Path, **changes: object) -> BenchmarkConfig:
    # No task is read where none is named.
    values = MINIMAL | {"tasks": [], "held_out": {"path": "Task02"}} | changes
    return load_config(BenchmarkConfig, written(folder, values))


def test_every_learner_of_a_benchmark_goes_through_the_same_phases(tmp_path):
    meta = {"episodes": {"shots": 2, "queries": 2, "ways": 2, "mirror": True}, "schedule": {"steps": 5}}
    learners = {"scratch": None, "transfer": {}, "maml": {"inner_steps": 2}, "prototypical": None}
    arms = {"plain": [], "more": MINIMAL["phases"]}
    plans = benchmark_config(tmp_path, meta=meta, learners=learners, arms=arms).plans()
    assert plans.keys() == {*learners, *arms}
    assert plans["scratch"].phases == plans["plain"].phases == ()
    for name in ("transfer", "maml", "prototypical"):
        first, last = plans[name].phases
        assert (first.name, first.learner, last.name, last.learner) == ("pretrain", "transfer", "meta", name)
        assert last.schedule.steps == 5
    assert plans["maml"].phases[1].options == {"inner_steps": 2}
    assert plans["maml"].phases[1].episodes == plans["prototypical"].phases[1].episodes
    # A head for each task needs all of its classes, under their own numbers.
    joint = plans["transfer"].phases[1].episodes
    assert (joint.shots, joint.queries, joint.ways, joint.mirror) == (2, 2, None, False)
    assert plans["maml"].key(1) == plans["transfer"].key(1)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, "learners and arms: found neither"),
        ({"learners": {"maml": {}}}, "meta: found nothing"),
        ({"learners": {"mmal": {}}}, r"learners.mmal: found no such learner; required: one of \['anil', "),
        ({"learners": {"scratch": {"adapt_steps": 3}}}, "learners.scratch: found options"),
        ({"learners": {"scratch": {}}, "arms": {"scratch": []}}, "found scratch in both"),
    ],
)
def test_arms_that_make_no_sense_are_refused(tmp_path, changes, says):
    with pytest.raises(InputError, match=says):
        benchmark_config(tmp_path, **changes).plans()


def test_data_is_relative_to_the_config(tmp_path):
    assert load_config(TrainConfig, written(tmp_path, MINIMAL)).data == tmp_path.resolve() / "sets"


def test_set_reaches_into_lists_and_keys(tmp_path):
    changes = ["seed=7", "phases.0.schedule.steps=9", "network.options.channels=[4, 8]"]
    config = load_config(TrainConfig, written(tmp_path, MINIMAL), changes)
    assert (config.seed, config.phases[0].schedule.steps) == (7, 9)
    assert config.network.options == {"channels": [4, 8]}


@pytest.mark.parametrize(
    ("values", "changes", "named"),
    [
        (MINIMAL | {"sead": 1}, [], "sead"),
        (MINIMAL | {"tasks": [{"path": "a", "organs": 1}]}, [], "organs"),
        (MINIMAL | {"phases": [{"name": "a", "learner": "maml", "schedule": {"step": 1}}]}, [], "step"),
        (MINIMAL | {"precision": "float16"}, [], "precision"),
        (MINIMAL | {"voxels": 3}, [], "voxels"),
        (MINIMAL | {"phases": [{"name": "a", "learner": "maml", "schedule": {"steps": 0}}]}, [], "schedule"),
        ("- a\n- b\n", [], "config.yaml"),
        ("a: [", [], "YAML"),
        (MINIMAL, ["seed"], "key=value"),
        (MINIMAL, ["phases.7.learner=maml"], "7"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, values, changes, named):
    with pytest.raises(InputError, match=named) as caught:
        load_config(TrainConfig, written(tmp_path, values), changes)
    assert "\n" not in str(caught.value)


def test_a_missing_config_is_one_line(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        load_config(TrainConfig, tmp_path / "none.yaml")


def test_the_held_out_set_is_not_trained_on(tmp_path):
    folders = write_phantoms(tmp_path / "sets", tasks=2, cases=2, size_mm=60)
    values = MINIMAL | {"tasks": [{"path": folders[0].name}], "held_out": {"path": folders[0].name}, "arms": {"a": []}}
    values.pop("phases")
    with pytest.raises(InputError, match="not trained on"):
        load_config(BenchmarkConfig, written(tmp_path, values)).held_out_task()
    values["held_out"] = {"path": folders[1].name, "organ": load_task(folders[0]).organ}
    with pytest.raises(InputError, match="not trained on"):
        load_config(BenchmarkConfig, written(tmp_path, values)).held_out_task()
    values["held_out"] = {"path": folders[1].name}
    task = load_config(BenchmarkConfig, written(tmp_path, values)).held_out_task()
    assert len(task.cases) == 2
