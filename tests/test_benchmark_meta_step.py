from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from medmeta.learners import LEARNERS

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
    steps = [["forward + backward", "1"], ["order 2, K = 1", "4"], ["order 1, K = 1", "2"]]
    steps += [[name, ""] for name in LEARNERS if name != "scratch"]
    expected = [[net, *step] for net in ("se_unet_3d", "scse_unet_2d") for step in steps]
    assert [row[:2] + row[4:5] for row in rows] == expected
    for row in rows:
        assert all(float(row[column]) > 0 for column in (3, 6, 7))
        if row[4]:
            # A step keeps at least what the plain pass keeps.
            assert float(row[7]) >= 1
