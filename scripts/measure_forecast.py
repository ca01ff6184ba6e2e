"""How well the forecast of `adapt` and the certainty of a label map match the truth, on a set that the model never saw.

    python scripts/measure_forecast.py runs/hold_out_abdomen/models/transfer configs/hold_out_abdomen.yaml

For each support draw: adapt with --method auto, note what it forecasts, segment the test patients of the config, and
compare. Printed are the forecast and true mean Dice of each draw, the share of draws whose 90 % interval holds the true
mean, the share of test scans inside the interval for a single scan, and the correlation of certainty and true Dice.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from medmeta.adaptation import adapt_to
from medmeta.benchmark import draw_supports
from medmeta.config import BenchmarkConfig, load_config
from medmeta.data.store import read_case
from medmeta.evaluate import mean_score, score_prediction
from medmeta.fine_tuning import Budget
from medmeta.inference import fastest_precision
from medmeta.segmenter import load


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a model that was trained without the held-out set")
    parser.add_argument("config", type=Path, help="a benchmark config, for the held-out set and its test patients")
    parser.add_argument("--shots", type=int, nargs="+", default=[3, 5])
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--steps", type=int, help="of each adaptation; else as many as medmeta adapt takes")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="changes to the config")
    arguments = parser.parse_args(given)
    config = load_config(BenchmarkConfig, arguments.config, arguments.set)
    task, model = config.held_out_task(), load(arguments.model)
    options = {"device": arguments.device, "precision": fastest_precision(arguments.device)}
    print("| scans | draw | way | forecast (90 % interval) | true mean | scans inside their interval |")
    print("|---|---|---|---|---|---|")
    held, inside, sure, true = [], [], [], []
    trial = replace(config.trial, shots=tuple(arguments.shots), draws=arguments.draws)
    test, supports = draw_supports(task, trial)
    for shots in arguments.shots:
        for draw in range(arguments.draws):
            support = task.of_patients(supports[draw][:shots])
            budget = Budget(arguments.steps) if arguments.steps else None
            segmenter = adapt_to(model, support, budget=budget, seed=draw, **options)
            expected = segmenter.card["forecast"]
            dices = []
            for case in test.cases:
                scan, reference = read_case(task, case)
                made = segmenter.predict(scan, **options)
                row = score_prediction(made, task, case, scan, reference, 2.0)
                dices.append(mean_score(row[name]["dice"] for name in task.targets))
                sure.append(made.quality)
            true += dices
            low, high = expected["mean_interval"]
            worst, best = expected["scan_interval"]
            held.append(low <= np.mean(dices) <= high)
            inside += [worst <= dice <= best for dice in dices]
            print(
                f"| {shots} | {draw + 1} | {segmenter.card['method']} "
                f"| {expected['dice']:.3f} ({low:.2f} to {high:.2f}) | {np.mean(dices):.3f} "
                f"| {np.mean(inside[-len(dices) :]):.2f} |",
                flush=True,
            )
    print(
        f"\n90 % intervals hold the true mean in {np.mean(held):.0%} of {len(held)} draws, a single scan in "
        f"{np.mean(inside):.0%} of {len(inside)}. Certainty and true Dice over scans: correlation "
        f"{np.corrcoef(sure, true)[0, 1]:.2f}, mean difference {np.mean(np.subtract(sure, true)):+.3f}."
    )


if __name__ == "__main__":
    main()
