"""Learners compared on an organ that none of them saw: same support scans, same adaptation budget, losers left in."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medmeta.adaptation import Budget, adapt_prepared, make_segmenter, prepare_support
from medmeta.data.store import StoredTask, read_case
from medmeta.data.tasks import Case, Task
from medmeta.episode import IGNORED
from medmeta.errors import InputError
from medmeta.evaluate import score_masks
from medmeta.files import read_json, replacing, write_json
from medmeta.recipe import Progress, Recipe, train_recipe, untrained
from medmeta.report import curves_over_adaptation, learning_curves
from medmeta.segmenter import Model, Segmenter
from medmeta.train import Row


@dataclass(frozen=True)
class Trial:
    """What every arm is put through.

    Args:
        shots: numbers of support scans.
        steps: lengths of the adaptation, each a run of its own.
        draws: support sets for each number of scans; the larger holds the smaller.
        test_patients: patients that are segmented and scored, never in a support.
        rate: AdamW's step size.
        patches: patches of one adaptation step.
        tolerance_mm: of surface Dice.
        seed: decides test patients, support sets and patches.
    """

    shots: tuple[int, ...] = (1, 3, 5)
    steps: tuple[int, ...] = (10, 30, 100)
    draws: int = 3
    test_patients: int = 50
    rate: float = 2e-3
    patches: int = 2
    tolerance_mm: float = 2.0
    seed: int = 0


Result = dict[str, Any]


def compare(
    arms: Mapping[str, Model],
    task: Task,
    trial: Trial,
    folder: Path,
    *,
    device: torch.device | str = "cpu",
    precision: torch.dtype = torch.float32,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[Result]:
    """Adapt every arm to every support set for every length and score it on the same test scans.

    Args:
        arms: name -> model.
        task: the held-out task.
        trial: shots, lengths, draws.
        folder: gets one JSON file for each result; those that are there are not made again.
        device: where to adapt and predict.
        precision: bfloat16 runs the networks under autocast.
        progress: called with (what, done, total).

    Returns:
        One result for each arm, number of scans, draw and length, with the scores of every case.

    Raises:
        InputError: fewer patients than test set and largest support need.
    """
    test, supports = draw_supports(task, trial)
    runs = [
        (name, shots, draw, steps)
        for shots in trial.shots
        for draw in range(trial.draws)
        for name in arms
        for steps in trial.steps
    ]
    results = []
    prepared: dict[tuple[int, int], StoredTask] = {}
    for done, (name, shots, draw, steps) in enumerate(runs):
        file = folder / f"{name}-{shots}scans-draw{draw}-{steps}steps.json"
        if file.exists():
            results.append(read_json(file))
        else:
            model = arms[name]
            support_task = task.of_patients(supports[draw][:shots])
            if (shots, draw) not in prepared:
                prepared = {(shots, draw): prepare_support(support_task, model.voxels, stride=model.learner.net.stride)}
            support = prepared[shots, draw]
            started = time.perf_counter()
            budget = Budget(steps=steps, rate=trial.rate, patches=trial.patches)
            state = adapt_prepared(model.learner, support, "finetune", budget, draw, device, precision)
            seconds = time.perf_counter() - started
            segmenter = make_segmenter(model, support_task, support, state, {})
            scores = [
                score_case(segmenter, task, case, trial.tolerance_mm, device=device, precision=precision)
                for case in test.cases
            ]
            result = {"arm": name, "shots": shots, "draw": draw, "steps": steps, "adapt_seconds": round(seconds, 2)}
            result |= {"support": [case.id for case in support_task.cases], "cases": scores}
            write_json(file, result)
            results.append(result)
        if progress:
            progress(f"{name}, {shots} scans, draw {draw + 1}, {steps} steps", done + 1, len(runs))
    return results


def draw_supports(task: Task, trial: Trial) -> tuple[Task, list[list[str]]]:
    """Test patients, and for each draw an order of the others of which the first k are the support.

    Raises:
        InputError: too few patients.
    """
    patients = list(task.labelled.patients)
    most = max(trial.shots)
    if len(patients) < trial.test_patients + most:
        raise InputError(
            f"task {task.name}",
            f"{len(patients)} labelled patients",
            f"{trial.test_patients} to test on and {most} for the largest support",
            "Lower test_patients or shots.",
        )
    order = [str(name) for name in np.random.default_rng([trial.seed, 0]).permutation(sorted(patients))]
    test, pool = order[: trial.test_patients], order[trial.test_patients :]
    supports = [
        [str(name) for name in np.random.default_rng([trial.seed, 1, draw]).permutation(pool)]
        for draw in range(trial.draws)
    ]
    return task.labelled.of_patients(test), supports


def score_case(segmenter: Segmenter, task: Task, case: Case, tolerance_mm: float, **options: Any) -> dict[str, Any]:
    """Segment one labelled scan and score each target. Options as of `Segmenter.predict`."""
    scan, reference = read_case(task, case)
    prediction = segmenter.predict(scan, **options)
    predicted = task.encode(prediction.data, case.id)
    counted = (reference != IGNORED).numpy()[0]
    row: dict[str, Any] = {"case": case.id}
    for name, values in task.targets.items():
        classes = [number for number, atom in enumerate(task.atoms, start=1) if set(atom) <= set(values)]
        masks = [torch.isin(mask, torch.tensor(classes)).numpy()[0] & counted for mask in (reference, predicted)]
        scores = score_masks(masks[0], masks[1], scan.spacing, tolerance_mm)
        row[name] = {key: getattr(scores, key) for key in ("dice", "surface_dice", "hd95_mm", "missed", "invented")}
    return row


def summarise(results: Sequence[Result], targets: Sequence[str], seed: int = 0) -> list[dict[str, Any]]:
    """Mean Dice and surface Dice over targets, cases and draws, with a bootstrap interval over cases and draws.

    Returns:
        One row for each arm, number of scans and length; `by_target` holds the mean Dice of each target.
    """
    groups: dict[tuple[str, int, int], list[Result]] = {}
    for result in results:
        groups.setdefault((result["arm"], result["shots"], result["steps"]), []).append(result)
    rows = []
    for (arm, shots, steps), members in groups.items():
        cases = [case for member in members for case in member["cases"]]
        # (draws, cases); every draw is scored on the same cases.
        dice, surface = (
            np.array([[_mean(case[name][key] for name in targets) for case in member["cases"]] for member in members])
            for key in ("dice", "surface_dice")
        )
        rows.append(
            {
                "arm": arm,
                "shots": shots,
                "steps": steps,
                "dice": float(np.nanmean(dice)),
                "interval": nested_interval(dice, seed),
                "surface_dice": float(np.nanmean(surface)),
                "by_target": {name: _mean(case[name]["dice"] for case in cases) for name in targets},
                "missed": sum(case[name]["missed"] for case in cases for name in targets),
                "scored": len(cases) * len(targets),
                "adapt_seconds": statistics.fmean(member["adapt_seconds"] for member in members),
            }
        )
    return rows


def nested_interval(values: np.ndarray, seed: int = 0, samples: int = 2000) -> tuple[float, float]:
    """95 % percentile interval of a mean, resampling draws and within them cases.

    Args:
        values: (draws, cases); NaN where a case has no score.
        seed: of the resampling.
        samples: resamplings.
    """
    rng = np.random.default_rng(seed)
    draws, cases = values.shape
    rows = rng.integers(draws, size=(samples, draws, 1))
    columns = rng.integers(cases, size=(samples, 1, cases))
    low, high = np.nanpercentile(np.nanmean(values[rows, columns], axis=(1, 2)), [2.5, 97.5])
    return float(low), float(high)


def _mean(values: Iterable[float | None]) -> float:
    # A target that neither mask holds has no score; JSON writes it as null.
    present = [value for value in values if value is not None and value == value]
    return statistics.fmean(present) if present else float("nan")


def markdown_table(rows: Sequence[Mapping[str, Any]], arms: Sequence[str]) -> str:
    """The rows of `summarise` as a Markdown table: scans and length down, arms across, the best in bold."""
    lines = ["| scans | steps | " + " | ".join(arms) + " |", "|---|---|" + "---|" * len(arms)]
    found = {(row["shots"], row["steps"], row["arm"]): row for row in rows}
    for shots, steps in sorted({(row["shots"], row["steps"]) for row in rows}):
        here = [found.get((shots, steps, arm)) for arm in arms]
        best = max(row["dice"] for row in here if row)
        cells = []
        for row in here:
            if row is None:
                cells.append("")
                continue
            text = f"{row['dice']:.3f}"
            low, high = row["interval"]
            cells.append(f"{f'**{text}**' if row['dice'] == best else text} ({low:.2f} to {high:.2f})")
        lines.append(f"| {shots} | {steps} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def run_arms(
    plans: Mapping[str, Recipe],
    task: Task,
    trial: Trial,
    out: Path,
    *,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    trials: Progress | None = None,
    log: Callable[[Row], None] | None = None,
) -> list[dict[str, Any]]:
    """Train every arm, compare them, write models, `result.json`, `table.md` and curves to `out`.

    Args:
        plans: arm -> recipe; one without phases is the network as it was initialised.
        task: the held-out task.
        trial: what every arm is put through.
        out: what stands there from an earlier run is not done again.
        device: where to train and adapt.
        progress: told how the preparation of scans goes.
        trials: told how the comparison goes.
        log: called with each row of the training history.

    Returns:
        The rows of `summarise`.
    """
    arms: dict[str, Model] = {}
    for name, recipe in plans.items():
        if not recipe.phases:
            arms[name] = untrained(recipe)
            continue
        arms[name], history = train_recipe(recipe, out, device=device, progress=progress, log=log)
        learning_curves(history, out / f"learning-{name}.png")
        arms[name].save(out / "models" / name, overwrite=True)
    bfloat16 = any(recipe.precision == "bfloat16" for recipe in plans.values())
    precision = torch.bfloat16 if bfloat16 else torch.float32
    results = compare(arms, task, trial, out / "trials", device=device, precision=precision, progress=trials)
    rows = summarise(results, list(task.targets), trial.seed)
    seconds = {name: model.card.get("seconds", {}) for name, model in arms.items()}
    write_json(out / "result.json", {"task": task.name, "rows": rows, "training_seconds": seconds})
    with replacing(out / "table.md") as beside:
        beside.write_text(markdown_table(rows, list(plans)) + "\n", encoding="utf-8")
    for shots in trial.shots:
        chosen = [row for row in rows if row["shots"] == shots]
        curves_over_adaptation(
            {key: by_steps(chosen, key) for key in ("dice", "interval")}, out / f"adaptation-{shots}-scans.png"
        )
    return rows


def by_steps(rows: Sequence[Mapping[str, Any]], key: str) -> dict[str, dict[str, Any]]:
    """{steps: {arm: value}} from rows of one number of scans."""
    table: dict[str, dict[str, Any]] = {}
    for row in rows:
        table.setdefault(str(row["steps"]), {})[row["arm"]] = row[key]
    return table
