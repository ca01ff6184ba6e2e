from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "benchmark_meta_step.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("benchmark_meta_step", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_short_mode_prints_the_whole_table(script, capsys) -> None:
    threads = torch.get_num_threads()
    try:
        script.main(["--short", "--threads", "1"])
    finally:
        torch.set_num_threads(threads)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    header, ruler, *rows = rows
    assert len(header) == len(ruler) == 8
    assert [row[:2] + row[4:5] for row in rows] == [
        [net, *step]
        for net in ("se_unet_3d", "scse_unet_2d")
        for step in (["forward + backward", "1"], ["order 2, K = 1", "4"], ["order 1, K = 1", "2"])
    ]
    for row in rows:
        assert all(float(row[column]) > 0 for column in (3, 5, 6, 7))
        # A step keeps at least what the plain pass keeps.
        assert float(row[7]) >= 1


def test_peak_memory_counts_what_lives_together(script) -> None:
    def step() -> None:
        first = torch.ones(2**18)  # 1 MiB
        second = torch.ones(2**18)
        del first, second
        third = torch.ones(2**18)
        third.add_(1)

    assert script.peak_memory(step, torch.device("cpu")) == pytest.approx(2 * 2**20, rel=0.01)
