"""The models that come with the package."""

from __future__ import annotations

import pytest
from small import phantom, write_pairs

from medmeta.adaptation import adapt
from medmeta.fine_tuning import Budget
from medmeta.segmenter import SHIPPED, Model, load, shipped_models


@pytest.mark.parametrize("name", shipped_models())
def test_a_shipped_model_is_small_whole_and_says_what_it_comes_from(name):
    folder = SHIPPED / name
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 16 * 2**20
    model = load(name)
    assert isinstance(model, Model)
    assert all(task["terms"] for task in model.card["training_tasks"])
    card = (folder / "CARD.md").read_text(encoding="utf-8")
    assert "Not a medical device" in card
    for task in model.card["training_tasks"]:
        assert task["terms"].split()[0].removesuffix(",") in card


@pytest.mark.parametrize("name", shipped_models())
def test_a_shipped_model_adapts_to_a_new_organ_in_seconds(name, tmp_path):
    folder = write_pairs(tmp_path, cases=(0,))
    scan, labels = phantom(2, 1)
    segmenter = adapt(load(name), folder / "images", folder / "labels", budget=Budget(steps=20))
    made = segmenter.predict(scan)
    overlap = 2 * float(((made.data > 0) & (labels.data > 0)).sum())
    assert overlap / float((made.data > 0).sum() + (labels.data > 0).sum()) > 0.6
    assert made.quality > 0.3


def test_there_is_one():
    assert "organs3d" in shipped_models()
