from __future__ import annotations

import json

import pytest

from medmeta.demo import Plan, run_demo
from medmeta.errors import InputError
from medmeta.segmenter import Segmenter, load

SMALL = Plan(organs=6, patients=5, support=3, test=2, steps=(1, 2), pretrain_steps=3, meta_steps=2, voxels=16**3)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "story"
    return out, run_demo(out, plan=SMALL)


def test_the_demo_leaves_what_it_promises(made):
    out, result = made
    assert json.loads((out / "result.json").read_text())["dice"].keys() == {"1", "2"}
    assert all(row.keys() == {"scratch", "transfer", "meta"} for row in result["dice"].values())
    assert all(0.0 <= dice <= 1.0 for row in result["dice"].values() for dice in row.values())
    assert {"seed", "versions", "seconds"} <= result.keys()
    for picture in ("learning.png", "adaptation.png", "montage.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")
    page = (out / "report" / "data.js").read_text()
    assert "Dice forecast from the labelled scans" in page
    assert len(list((out / "segmented").glob("*.nii.gz"))) == SMALL.test


def test_the_organ_of_the_demo_was_never_trained_on(made):
    out, result = made
    adapted = load(out / "adapted")
    assert isinstance(adapted, Segmenter)
    trained = {task["name"] for task in adapted.model.card["training_tasks"]}
    assert len(trained) == SMALL.organs - 1
    assert result["task"] not in trained


def test_nothing_is_overwritten(made):
    with pytest.raises(InputError, match="stands there already"):
        run_demo(made[0], plan=SMALL)
