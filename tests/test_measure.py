from __future__ import annotations

import itertools
import statistics

import pytest
import torch

from medmeta.measure import median_seconds, peak_memory


def test_peak_memory_counts_what_lives_together() -> None:
    def step() -> None:
        first = torch.ones(2**18)  # 1 MiB
        second = torch.ones(2**18)
        del first, second
        third = torch.ones(2**18)
        third.add_(1)

    assert peak_memory(step) == pytest.approx(2 * 2**20, rel=0.01)


def test_each_step_is_measured_in_turn_with_the_first() -> None:
    called = []
    ticks = itertools.accumulate(itertools.count())  # every reading is further from the last
    steps = {name: lambda name=name: called.append(name) for name in ("plain", "a", "b")}
    seconds = median_seconds(steps, 3, clock=lambda: float(next(ticks)))
    assert called == ["plain", "a", "plain", "b"] * 4
    assert seconds.keys() == steps.keys()
    # Reading n + 1 is n + 1 after reading n; the four turns that warm up are read once, the others twice.
    assert seconds["a"] == statistics.median(4 + 2 * turn + 1 for turn in (1, 5, 9))
