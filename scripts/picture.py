r"""The picture of the README: test scans of a held-out set, their references, and what a few labelled ones gave.

    python scripts/picture.py runs/hold_out_hippocampus/models/transfer \
        configs/hold_out_hippocampus.yaml --out picture.png
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from medmeta.adaptation import adapt_to
from medmeta.benchmark import draw_supports
from medmeta.config import BenchmarkConfig, load_config
from medmeta.data.store import read_case
from medmeta.data.volume import read_labels
from medmeta.evaluate import mean_score, score_prediction
from medmeta.fine_tuning import Budget
from medmeta.inference import fastest_precision
from medmeta.report import Panel, montage
from medmeta.segmenter import load


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a model that was trained without the held-out set")
    parser.add_argument("config", type=Path, help="a benchmark config, for the held-out set and its test patients")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shots", type=int, default=5)
    parser.add_argument("--scans", type=int, default=2)
    parser.add_argument("--steps", type=int, help="of the adaptation; else as many as medmeta adapt takes")
    arguments = parser.parse_args(given)
    config = load_config(BenchmarkConfig, arguments.config)
    task, precision = config.held_out_task(), fastest_precision("cpu")
    test, supports = draw_supports(task, config.trial)
    support = task.of_patients(supports[0][: arguments.shots])
    budget = Budget(arguments.steps) if arguments.steps else None
    segmenter = adapt_to(load(arguments.model), support, method="finetune", budget=budget, precision=precision)
    panels = []
    for case in test.cases[: arguments.scans]:
        scan, mask = read_case(task, case)
        made = segmenter.predict(scan, precision=precision)
        row = score_prediction(made, task, case, scan, mask, config.trial.tolerance_mm)
        dice = mean_score(row[name]["dice"] for name in task.targets)
        panels.append(Panel(f"new scan, Dice {dice:.2f}", scan, read_labels(case.labels), made))
    montage(panels, arguments.out, task.targets)


if __name__ == "__main__":
    main()
