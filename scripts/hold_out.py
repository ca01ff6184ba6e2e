"""Dice from 1 and 5 labelled scans on five organs, each held out as a whole set, beside training from scratch.

    python scripts/hold_out.py --out runs

Trains one body for each config `configs/hold_out_*.yaml` (half an hour each on a CPU core), adapts it and a network
that was never trained to the same support scans for the same number of steps, and prints one table. Two more columns
are the same body with labels carried by registration, as `medmeta adapt` does by default, and, for the smallest
support, with unlabelled scans to learn from too, which are none of those that are tested on. What stands in the
folders below `--out` from an earlier run is not done again; `hold_out_*/adapted` holds the adapted networks, 1 GB in
all, for that. Results do not know which version of medmeta made them: after an update begin in another folder.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from medmeta.adaptation import Where
from medmeta.arguments import read_precision
from medmeta.benchmark import compare, run_arms, summarise
from medmeta.config import BenchmarkConfig, load_config
from medmeta.registration import ATLASES
from medmeta.segmenter import load

CONFIGS = Path(__file__).parents[1] / "configs"
REGISTERED = "transfer, labels carried"
UNLABELLED = "the same, and 12 unlabelled"
SETS = ("abdomen", "hippocampus", "heart", "brain", "head_neck")


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder of the runs, one folder each")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=SETS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="changes to every config")
    arguments = parser.parse_args(given)
    lines: list[str] = []
    for name in arguments.sets:
        config = load_config(BenchmarkConfig, CONFIGS / f"hold_out_{name}.yaml", arguments.set)
        task, folder = config.held_out_task(), arguments.out / f"hold_out_{name}"
        kept = folder / "adapted"
        rows = run_arms(config.plans(), task, config.trial, folder, adapted=kept, device=arguments.device)
        # The same networks once more, with labels carried from the labelled scans.
        carried = replace(config.trial, atlases=ATLASES)
        fewest = min(config.trial.shots)
        taught = replace(carried, methods=("self_training",), shots=(fewest,))
        model, precision = load(folder / "models" / "transfer"), read_precision(config.precision)
        for arm, trial in ((REGISTERED, carried), (UNLABELLED, taught)):
            where = Where(device=arguments.device, precision=precision)
            results = compare({"transfer": model}, task, trial, folder / "trials", adapted=kept, **where)
            rows += [row | {"arm": arm} for row in summarise(results, list(task.targets), trial.seed)]
        columns = [(shots, arm) for shots in config.trial.shots for arm in (*config.arms, REGISTERED)]
        columns.insert(columns.index((fewest, REGISTERED)) + 1, (fewest, UNLABELLED))
        if not lines:
            heads = [f"{shots} scan{'s' * (shots > 1)}, {arm}" for shots, arm in columns]
            lines = ["| held out | " + " | ".join(heads) + " |", "|---|" + "---|" * len(heads)]
        found = {(row["shots"], row["arm"]): row for row in rows}
        cells = []
        for column in columns:
            low, high = found[column]["interval"]
            cells.append(f"{found[column]['dice']:.2f} ({low:.2f} to {high:.2f})")
        lines.append(f"| {task.name}, mean of {len(task.targets)} | " + " | ".join(cells) + " |")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
