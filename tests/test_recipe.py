from __future__ import annotations

from dataclasses import replace

import pytest
from small import same

from medmeta.data.phantoms import write_phantoms
from medmeta.data.tasks import load_task
from medmeta.errors import InputError
from medmeta.files import read_json, write_json
from medmeta.recipe import EpisodeSettings, Phase, Recipe, TaskSource, prepare_tasks, train_recipe, untrained
from medmeta.train import Schedule

QUICK = Schedule(4, episodes_per_step=1, validate_every=2, checkpoint_every=1)
ONE = EpisodeSettings(shots=1, queries=1)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folders = write_phantoms(tmp_path_factory.mktemp("phantoms") / "sets", tasks=2, cases=5, size_mm=60)
    return tuple(load_task(folder) for folder in folders)


@pytest.fixture
def recipe(tasks):
    phases = (
        Phase("pretrain", "transfer", QUICK, episodes=ONE),
        Phase("meta", "maml", QUICK, {"inner_steps": 1}, ONE),
    )
    network = {"name": "se_unet_3d", "options": {"channels": [8, 16]}}
    return Recipe(tasks, phases, network, voxels=16**3, validation_episodes=2)


def weights(model):
    return model.learner.state_dict()


def test_phases_run_in_order_and_the_card_tells_what_was_done(recipe, tmp_path):
    model, history = train_recipe(recipe, tmp_path, tensorboard=True)
    assert [row["phase"] for row in history] == ["pretrain"] * 4 + ["meta"] * 4
    assert {folder.name for folder in (tmp_path / "tensorboard").iterdir()} == {"pretrain", "meta"}
    assert model.learner.name == "maml"
    assert [task["name"] for task in model.card["training_tasks"]] == [task.name for task in recipe.tasks]
    assert all(task["terms"] for task in model.card["training_tasks"])
    assert not same(weights(model), weights(untrained(recipe)))


def test_overviews_are_trained_on_beside_the_finer_grids(recipe, tmp_path):
    small = replace(recipe, voxels=8**3, phases=recipe.phases[:1], overviews=True)
    training, held_out = prepare_tasks(small, tmp_path)
    plain, _ = prepare_tasks(replace(small, overviews=False), tmp_path)
    assert len(training) == len(held_out) == 2 * len(plain)
    for fine, coarse, checked in zip(training[::2], training[1::2], held_out[1::2], strict=True):
        assert fine.preprocess in [task.preprocess for task in plain]
        assert fine.name == coarse.name == checked.name
        assert coarse.cases[0].mask.size < fine.cases[0].mask.size
        assert (checked.preprocess, checked.patch) == (coarse.preprocess, coarse.patch)
    model, history = train_recipe(small, tmp_path)
    assert len(history) == 4
    assert model.learner.options["tasks"].keys() == {task.name for task in recipe.tasks}
    assert small.key(1) != replace(small, overviews=False).key(1)


def test_a_run_killed_in_either_phase_ends_the_same(recipe, tmp_path):
    whole, _ = train_recipe(recipe, tmp_path / "whole")
    for stop in (3, 6):
        seen = []

        def killed(row, stop=stop, seen=seen):
            seen.append(row)
            if len(seen) == stop:
                raise KeyboardInterrupt

        place = tmp_path / f"stopped-{stop}"
        with pytest.raises(KeyboardInterrupt):
            train_recipe(recipe, place, log=killed)
        resumed, history = train_recipe(recipe, place)
        assert same(weights(resumed), weights(whole))
        assert len(history) == 8


def test_recipes_that_begin_alike_share_that_part(recipe, tmp_path):
    train_recipe(recipe, tmp_path)
    first = next((tmp_path / "phases").glob("1-*/checkpoint.safetensors"))
    before = first.stat().st_mtime_ns
    other = replace(recipe, phases=(recipe.phases[0], replace(recipe.phases[1], learner="fomaml")))
    train_recipe(other, tmp_path)
    assert first.stat().st_mtime_ns == before
    assert len(list((tmp_path / "phases").glob("2-*"))) == 2
    assert replace(recipe, seed=1).key(1) != recipe.key(1)


def test_the_episodes_of_a_phase_are_listed_before_it_and_guarded(recipe, tmp_path):
    class Stopped(Exception):
        pass

    def stop(row):
        raise Stopped

    with pytest.raises(Stopped):
        train_recipe(recipe, tmp_path, log=stop)
    (path,) = tmp_path.glob("phases/1-*/episodes.json")
    listed = read_json(path)
    assert len(listed) == 4
    known = {case.id for task in recipe.tasks for case in task.cases}
    assert all(set(episode["support"] + episode["query"]) <= known for episode in listed)
    listed[0]["support"] = ["another"]
    write_json(path, listed)
    with pytest.raises(InputError, match=r"episodes\.json: found other episodes"):
        train_recipe(recipe, tmp_path)


def test_a_2d_network_trains_on_slices(recipe, tmp_path):
    flat = replace(
        recipe,
        network={"name": "scse_unet_2d", "options": {"encoder_depth": 3}},
        phases=(Phase("meta", "fomaml", replace(QUICK, steps=1), {"inner_steps": 1}, ONE),),
    )
    model, history = train_recipe(flat, tmp_path)
    assert model.learner.net.spatial_dims == 2
    assert len(history) == 1


def test_unusable_recipes_are_refused(recipe, tmp_path):
    with pytest.raises(InputError, match="at least one phase"):
        train_recipe(replace(recipe, phases=()), tmp_path)
    with pytest.raises(InputError, match="maml"):
        train_recipe(replace(recipe, phases=(Phase("a", "mamml", QUICK),)), tmp_path)
    with pytest.raises(ValueError, match="inner_step"):
        wrong = Phase("a", "maml", QUICK, {"inner_stepps": 2})
        train_recipe(replace(recipe, phases=(wrong,)), tmp_path / "untouched")
    assert not (tmp_path / "untouched").exists()
    with pytest.raises(InputError, match=r"meta_transfer as the first phase; required: a body that was trained before"):
        train_recipe(replace(recipe, phases=(Phase("a", "meta_transfer", QUICK),)), tmp_path)
    few = recipe.tasks[0].of_patients(recipe.tasks[0].patients[:3])
    with pytest.raises(InputError, match="at least 4"):
        train_recipe(replace(recipe, tasks=(few,)), tmp_path)


def test_a_task_can_come_from_a_shipped_manifest(shared_data):
    task = TaskSource("Task04_Hippocampus.yaml", cases=3).load(shared_data)
    assert len(task.patients) == 3
    assert task.terms
    with pytest.raises(InputError):
        TaskSource("Task99_Nothing.yaml").load(shared_data)
