from __future__ import annotations

import json
import math

import numpy as np
import pytest

from medmeta.forecast import SLOPE, SLOPE_DEVIATION, describe, forecast


def logistic(logits):
    return 1.0 / (1.0 + np.exp(-np.asarray(logits)))


def test_the_forecast_lies_near_the_scores_and_inside_its_interval():
    scores = [0.78, 0.8, 0.82, 0.79, 0.81]
    made = forecast(scores, 4, 5)
    assert made.scans == 5
    assert abs(made.dice - 0.8) < 0.03
    assert made.mean_interval[0] < made.dice < made.mean_interval[1]
    assert made.scan_interval[0] < made.mean_interval[0]
    assert made.mean_interval[1] < made.scan_interval[1]
    assert 0 < made.scan_interval[0] < made.scan_interval[1] < 1


def test_more_scans_give_a_surer_forecast_and_higher_dice():
    few, many = forecast([0.7, 0.8, 0.75], 2, 3), forecast([0.7, 0.8, 0.75] * 3, 8, 9)
    assert np.ptp(many.mean_interval) < 0.7 * np.ptp(few.mean_interval)
    assert few.dice < few.more[1][0] < few.more[2][0] < few.more[5][0]
    # From 3 to 4 scans is a larger step than from 9 to 10.
    assert few.more[1][0] - few.dice > many.more[1][0] - many.dice
    assert forecast([0.7, 0.8], 5, 5).dice < forecast([0.7, 0.8], 1, 5).dice


def test_intervals_hold_what_they_promise_where_the_model_is_true():
    """Sets drawn from the model itself: slope and level unknown to the forecast, spread near its prior."""
    rng = np.random.default_rng(0)
    hits = {"mean": [], "scan": []}
    for number in range(300):
        level, spread = rng.normal(1.2, 0.5), 0.45 * math.sqrt(4 / rng.chisquare(4))
        slope = max(0.0, rng.normal(SLOPE, SLOPE_DEVIATION))
        scores = logistic(level + spread * rng.standard_normal(4))
        unseen = logistic(level + slope * math.log(4 / 3) + spread * rng.standard_normal(4000))
        made = forecast(scores.tolist(), 3, 4, seed=number)
        hits["mean"].append(made.mean_interval[0] <= unseen.mean() <= made.mean_interval[1])
        hits["scan"].append(made.scan_interval[0] <= unseen[0] <= made.scan_interval[1])
    assert 0.84 < np.mean(hits["mean"]) < 0.96
    assert 0.84 < np.mean(hits["scan"]) < 0.96


def test_the_same_every_time_and_json():
    scores = [0.5, float("nan"), 0.6]
    made = forecast(scores, 2, 3)
    assert made == forecast(scores, 2, 3)
    assert made.scans == 2, "a scan without any target has no score"
    facts = json.loads(json.dumps(made.to_dict()))
    text = describe(facts)
    assert f"{made.dice:.2f}" in text
    assert f"5 more: {made.more[5][0]:.2f}" in text


def test_perfect_and_hopeless_scores_stay_finite():
    for score in (0.0, 1.0):
        made = forecast([score] * 3, 2, 3)
        assert all(math.isfinite(value) for value in (made.dice, *made.mean_interval, *made.scan_interval))


def test_one_score_is_not_enough():
    with pytest.raises(ValueError, match="1 scores; required: at least two"):
        forecast([0.8], 1, 1)
