"""Models that leave patients out: each once, the worse way to adapt no further than it must, scored as any other."""

from __future__ import annotations

from dataclasses import replace

import pytest
from small import same, tiny_model, write_pairs

from medmeta.adaptation import CANDIDATES, adapt_support, adapt_to, prepare_for
from medmeta.data.tasks import Case, Task
from medmeta.evaluate import score_case
from medmeta.fine_tuning import Budget
from medmeta.support import support_task

pytestmark = pytest.mark.usefixtures("overview_from_the_first_step")

TWO = {"anterior": (1,), "posterior": (2,)}


@pytest.fixture(scope="module")
def three(tmp_path_factory) -> Task:
    folder = write_pairs(tmp_path_factory.mktemp("three"), cases=(0, 1, 2))
    return support_task(folder / "images", folder / "labels", targets=TWO)


def test_auto_leaves_each_scan_out_once_and_forecasts(three, monkeypatch):
    told = []
    budget = Budget(steps=4)
    monkeypatch.setattr("medmeta.rehearsal.BEHIND", 1.0)
    segmenter = adapt_to(tiny_model(), three, budget=budget, progress=lambda *given: told.append(given[:2]))
    card = segmenter.card
    means = card["left_out"]["mean_dice"]
    assert tuple(means) == CANDIDATES
    assert card["left_out"]["behind"] == {}
    assert card["method"] == max(means, key=means.get)
    assert sorted(row["case"] for row in card["left_out"]["cases"]) == [case.id for case in three.cases]
    assert card["forecast"]["scans"] == 3
    assert 0 < card["forecast"]["mean_interval"][0] < card["forecast"]["dice"] < 1
    total = 1 * 3 * len(CANDIDATES) + 4
    assert told == [(step, total) for step in range(1, total + 1)]
    # What is chosen is then fitted on all scans.
    assert same(segmenter.state, adapt_to(tiny_model(), three, method=card["method"], budget=budget).state)


@pytest.mark.parametrize("worse", CANDIDATES)
def test_auto_does_not_go_on_with_what_is_behind(three, monkeypatch, worse):
    made, told, given = [], [], {"finetune": 0.5, "lora": 0.5, worse: 0.4}

    def noted(model, task, support, method, *rest, **options):
        made.append(method)
        return adapt_support(model, task, support, method, *rest, **options)

    monkeypatch.setattr("medmeta.adaptation.adapt_support", noted)
    scores = {name: {target: {"dice": given[name]} for target in TWO} for name in given}
    monkeypatch.setattr("medmeta.rehearsal.score_case", lambda *_, **__: scores[made[-1]])
    card = adapt_to(tiny_model(), three, budget=Budget(steps=4), progress=lambda *each: told.append(each[:2])).card
    (better,) = set(CANDIDATES) - {worse}
    assert made == [*CANDIDATES, better, better, better], "three folds, and once on all scans"
    assert card["left_out"]["mean_dice"] == {better: pytest.approx(0.5)}
    assert card["left_out"]["behind"] == {worse: {"scans": 1, "dice": pytest.approx(0.1)}}
    assert card["method"] == better
    assert told[-1] == (10, 10), "what was left out counts as done"
    assert told == sorted(told)


def test_auto_scores_a_scan_with_a_model_that_never_saw_it(three):
    card = adapt_to(tiny_model(), three, budget=Budget(steps=15)).card
    (case,) = (case for case in three.cases if case.id == card["left_out"]["cases"][0]["case"])
    others = three.of_patients([name for name in three.patients if name != case.patient])
    part = prepare_for(tiny_model(), three).only([each.id for each in others.cases])
    made = adapt_support(tiny_model(), others, part, card["method"], Budget(steps=3))  # a fifth of them
    expected = score_case(made, three, case, 2.0)
    assert card["left_out"]["cases"][0] == expected


def test_scans_of_one_patient_are_left_out_together(three):
    twin = Case("case2b", three.cases[2].patient, three.cases[2].images, three.cases[2].labels)
    four = replace(three, cases=(*three.cases, twin))
    rows = adapt_to(tiny_model(), four, budget=Budget(steps=1)).card["left_out"]["cases"]
    names = [row["case"] for row in rows]
    assert abs(names.index("case2") - names.index("case2b")) == 1
    assert len(names) == 4
