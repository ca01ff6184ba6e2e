"""Learners compared on an organ that none of them saw: same support scans, same adaptation budget, losers left in."""

from __future__ import annotations

import hashlib
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medmeta.adaptation import METHODS, Where, adapt_support, prepare_for
from medmeta.data.store import StoredTask
from medmeta.data.tasks import Task
from medmeta.errors import InputError
from medmeta.evaluate import holm, mean_score, paired_wilcoxon, score_case
from medmeta.files import read_json, replacing, write_json
from medmeta.fine_tuning import Budget, usual_steps
from medmeta.losses import dice_cross_entropy
from medmeta.measure import median_seconds, peak_memory
from medmeta.recipe import Prepared, Progress, Recipe, phase_episodes, prepare_tasks, train_recipe, untrained
from medmeta.registration import make_atlases
from medmeta.report import arm_panels, describe_adaptation, learning_curves
from medmeta.review import write_comparison
from medmeta.segmenter import Model, Segmenter, load
from medmeta.support import with_unlabelled
from medmeta.train import Row, autocast

BASELINE = "transfer"
"""The arm that every other is tested against."""


@dataclass(frozen=True)
class Trial:
    """What every arm is put through.

    Args:
        shots: numbers of support scans.
        methods: ways to adapt, of `medmeta.adaptation.METHODS`; "inner" is each learner's own rule and takes no steps;
            "self_training" has the scans, not the labels, of the patients who are neither in the support nor tested.
        steps: lengths of the adaptation by any other method, each a run of its own; none: `usual_steps`.
        draws: support sets for each number of scans; the larger holds the smaller.
        test_patients: patients that are segmented and scored, never in a support.
        rate: Adam's peak step size.
        patches: patches of one adaptation step.
        tolerance_mm: of surface Dice.
        best_dice: which labels are scored, see `Segmenter`.
        atlases: labelled scans at most whose labels are carried by registration too, see `adapt_to`; with 0 what was
            learned is compared alone.
        seed: decides test patients, support sets and patches.

    Raises:
        ValueError: an unknown method.
    """

    shots: tuple[int, ...] = (1, 3, 5)
    methods: tuple[str, ...] = ("finetune",)
    steps: tuple[int, ...] = (10, 30, 100)
    draws: int = 3
    test_patients: int = 50
    rate: float = 2e-3
    patches: int = 2
    tolerance_mm: float = 2.0
    best_dice: bool = True
    atlases: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        unknown = sorted(set(self.methods) - set(METHODS))
        if unknown:
            raise ValueError(f"methods {unknown}; required: among {', '.join(METHODS)}")

    def adaptations(self, shots: int) -> list[tuple[str, int]]:
        """Every (method, steps) for so many scans; the learner's own rule counts no steps."""
        lengths = self.steps or (usual_steps(shots),)
        return [(method, steps) for method in self.methods for steps in ((0,) if method == "inner" else lengths)]


Result = dict[str, Any]


def compare(
    arms: Mapping[str, Model],
    task: Task,
    trial: Trial,
    folder: Path,
    *,
    adapted: Path | None = None,
    device: torch.device | str = "cpu",
    precision: torch.dtype = torch.float32,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[Result]:
    """Adapt every arm to every support set in every way and score it on the same test scans.

    Args:
        arms: name -> model.
        task: the held-out task.
        trial: shots, ways to adapt, draws.
        folder: gets one JSON file for each result; those of the same model and trial are not made again.
        adapted: folder that keeps what was adapted, some 20 MB each, so that another trial can score it otherwise, with
            atlases or without, or go on from it with unlabelled scans. None keeps nothing.
        device: where to adapt and predict.
        precision: bfloat16 runs the networks under autocast.
        progress: called with (what, done, total).

    Returns:
        One result for each arm, number of scans, draw, method and length, with the scores of every case.

    Raises:
        InputError: fewer patients than test set and largest support need.
    """
    test, supports = draw_supports(task, trial)
    setting = {key: value for key, value in asdict(trial).items() if key not in ("shots", "methods", "steps", "draws")}
    keys = {name: _key(model, task, setting) for name, model in arms.items()}
    runs = [
        (name, shots, draw, method, steps)
        for shots in trial.shots
        for draw in range(trial.draws)
        for name in arms
        for method, steps in trial.adaptations(shots)
    ]
    results = []
    prepared: dict[tuple[int, int], StoredTask] = {}
    for done, (name, shots, draw, method, steps) in enumerate(runs):
        file = folder / f"{name}-{keys[name]}-{shots}scans-draw{draw}-{describe_adaptation(method, steps, '-')}.json"
        if not file.exists():
            model = arms[name]
            support_task = task.of_patients(supports[draw][:shots])
            if (shots, draw) not in prepared:
                prepared = {(shots, draw): prepare_for(model, support_task)}
            support = prepared[shots, draw]
            if method == "self_training":
                others = task.of_patients(supports[draw][shots:])
                hidden = replace(others, cases=tuple(replace(case, labels=None) for case in others.cases))
                support, _ = with_unlabelled(support, hidden, draw)
                support_task = replace(support_task, cases=(*support_task.cases, *hidden.cases))
            budget = Budget(steps=steps, rate=trial.rate, patches=trial.patches)
            where = Where(device=device, precision=precision)
            first = "finetune" if method == "self_training" else method
            segmenter = _adapted(adapted, name, model, support_task.labelled, support, first, budget, draw, where)
            seconds, started = segmenter.card["seconds"], time.perf_counter()
            segmenter = replace(segmenter, atlases=make_atlases(support, trial.atlases))
            if method == "self_training":
                segmenter = adapt_support(model, support_task, support, method, budget, draw, start=segmenter, **where)
            seconds += time.perf_counter() - started
            segmenter = replace(segmenter, best_dice=trial.best_dice)
            scores = [score_case(segmenter, task, case, trial.tolerance_mm, **where) for case in test.cases]
            result = {"arm": name, "shots": shots, "draw": draw, "method": method, "steps": steps}
            result |= {"adapt_seconds": round(seconds, 2), "support": [case.id for case in support_task.labelled.cases]}
            write_json(file, result | {"cases": scores})
        results.append(read_json(file))
        if progress:
            what = describe_adaptation(method, steps)
            progress(f"{name}, {shots} scans, draw {draw + 1}, {what}", done + 1, len(runs))
    return results


def _adapted(
    folder: Path | None,
    arm: str,
    model: Model,
    task: Task,
    support: StoredTask,
    method: str,
    budget: Budget,
    seed: int,
    where: Where,
) -> Segmenter:
    """The arm adapted to the labelled scans alone, without atlases; the card says in how many seconds."""
    key = _key(model, task, {**asdict(budget), "seed": seed, "precision": str(where["precision"])})
    place = folder and folder / f"{arm}-{key}-{describe_adaptation(method, budget.steps, '-')}"
    if place and place.is_dir() and isinstance(kept := load(place), Segmenter):
        return kept
    started = time.perf_counter()
    segmenter = adapt_support(model, task, support, method, budget, seed, atlases=0, **where)
    segmenter = replace(segmenter, card=segmenter.card | {"seconds": time.perf_counter() - started})
    if place:
        segmenter.save(place)
    return segmenter


def _key(model: Model, task: Task, setting: dict[str, Any]) -> str:
    """A digest of what decides a result, beside what its file name says."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.learner.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    facts = [setting, model.learner.name, model.learner.options, model.voxels, [case.id for case in task.cases]]
    digest.update(json.dumps([facts, task.atoms, task.ignored], sort_keys=True).encode())
    return digest.hexdigest()[:8]


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


def summarise(results: Sequence[Result], targets: Sequence[str], seed: int = 0) -> list[dict[str, Any]]:
    """Mean Dice and surface Dice over targets, cases and draws, with bootstrap intervals over cases and draws.

    Returns:
        One row for each arm, number of scans and way to adapt; `by_target` holds the mean Dice of each target, `p` the
        p value of Wilcoxon's signed-rank test over cases (each the mean of its draws) against `BASELINE` adapted the
        same way, after Holm's correction for the number of arms; None for the baseline and where there is none.
    """
    groups: dict[tuple[str, int, str, int], list[Result]] = {}
    for result in results:
        key = (result["arm"], result["shots"], result["method"], result["steps"])
        groups.setdefault(key, []).append(result)
    scores: dict[tuple[str, int, str, int], np.ndarray] = {}
    rows = []
    for key, members in groups.items():
        arm, shots, method, steps = key
        cases = [case for member in members for case in member["cases"]]
        # (draws, cases); every draw is scored on the same cases.
        dice, surface = (
            np.array(
                [[mean_score(case[name][key] for name in targets) for case in member["cases"]] for member in members]
            )
            for key in ("dice", "surface_dice")
        )
        scores[key] = dice
        rows.append(
            {
                "arm": arm,
                "shots": shots,
                "method": method,
                "steps": steps,
                "dice": float(np.nanmean(dice)),
                "interval": nested_interval(dice, seed),
                "surface_dice": float(np.nanmean(surface)),
                "surface_interval": nested_interval(surface, seed),
                "by_target": {name: mean_score(case[name]["dice"] for case in cases) for name in targets},
                "missed": sum(case[name]["missed"] for case in cases for name in targets),
                "scored": len(cases) * len(targets),
                "adapt_seconds": statistics.fmean(member["adapt_seconds"] for member in members),
                "p": None,
            }
        )
    for setting in dict.fromkeys(key[1:] for key in groups):
        others = [row for row in rows if (row["shots"], row["method"], row["steps"]) == setting]
        others = [row for row in others if row["arm"] != BASELINE]
        if (BASELINE, *setting) in scores:
            theirs = np.nanmean(scores[BASELINE, *setting], axis=0)
            ours = [np.nanmean(scores[row["arm"], *setting], axis=0) for row in others]
            for row, p in zip(others, holm([paired_wilcoxon(each, theirs) for each in ours]), strict=True):
                row["p"] = None if math.isnan(p) else p
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


def markdown_table(rows: Sequence[Mapping[str, Any]], arms: Sequence[str], key: str = "dice") -> str:
    """The rows of `summarise` as a Markdown table: arms down, numbers of scans and ways to adapt across.

    Args:
        rows: of `summarise`.
        arms: in the order wanted.
        key: "dice" or "surface_dice".

    Returns:
        The table, the best of each column in bold; + and - mark a Dice that differs from plain transfer's (p < 0.05).
    """
    found = {(row["shots"], row["method"], row["steps"], row["arm"]): row for row in rows}
    columns = sorted({column[:3] for column in found}, key=lambda column: (column[0], column[1] != "inner", column))
    names = [f"{shots} scan{'s' * (shots > 1)}, {describe_adaptation(*how)}" for shots, *how in columns]
    best = {column: max(found[*column, arm][key] for arm in arms if (*column, arm) in found) for column in columns}
    reference = {column: found[*column, BASELINE] for column in columns if (*column, BASELINE) in found}
    band = "interval" if key == "dice" else "surface_interval"
    lines = ["| learner | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    for arm in arms:
        cells = []
        for column in columns:
            row = found.get((*column, arm))
            if row is None:
                cells.append("")
                continue
            text = f"{row[key]:.3f}"
            low, high = row[band]
            mark = ""
            if key == "dice" and row["p"] is not None and row["p"] < 0.05:
                mark = " +" if row["dice"] > reference[column]["dice"] else " -"
            cells.append(f"{f'**{text}**' if row[key] == best[column] else text} ({low:.2f} to {high:.2f}){mark}")
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cost_table(costs: Mapping[str, Mapping[str, float]], rows: Sequence[Mapping[str, Any]]) -> str:
    """What each arm costs, as a Markdown table; one meta-step is measured beside a plain pass over the same query."""
    lines = [
        "| learner | meta-training s | one meta-step, x plain pass | its peak memory, MiB | adaptation s |",
        "|---|---|---|---|---|",
    ]
    for arm in dict.fromkeys(row["arm"] for row in rows):
        own = [row for row in rows if row["arm"] == arm]
        cost = costs.get(arm)
        step = "| | | |"
        if cost:
            step = f"| {cost['meta_seconds']:.0f} | {cost['time_ratio']:.1f} | {cost['peak_bytes'] / 2**20:.0f} |"
        ways = dict.fromkeys((row["method"], row["steps"]) for row in own)
        seconds = "; ".join(
            f"{describe_adaptation(*way)} "
            f"{statistics.fmean(row['adapt_seconds'] for row in own if (row['method'], row['steps']) == way):.1f}"
            for way in ways
        )
        lines.append(f"| {arm} {step} {seconds} |")
    return "\n".join(lines)


def run_arms(
    plans: Mapping[str, Recipe],
    task: Task,
    trial: Trial,
    out: Path,
    *,
    adapted: Path | None = None,
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
        out: what stands there from an earlier run is not done again. `phases/*/episodes.json` lists the scans, classes
            and flips of every episode of a phase; arms whose last phase draws alike meet the same ones.
        adapted: as of `compare`.
        device: where to train and adapt.
        progress: told how the preparation of scans goes.
        trials: told how the comparison goes.
        log: called with each row of the training history.

    Returns:
        The rows of `summarise`.
    """
    arms: dict[str, Model] = {}
    costs: dict[str, dict[str, float]] = {}
    prepared: dict[str, Prepared] = {}
    for name, recipe in plans.items():
        if not recipe.phases:
            arms[name] = untrained(recipe)
            continue
        # Arms differ in their phases; the scans they train on are read once.
        key = recipe.key(0)
        if key not in prepared:
            prepared[key] = prepare_tasks(recipe, out, progress)
        scans = prepared[key]
        arms[name], history = train_recipe(recipe, out, prepared=scans, device=device, log=log)
        learning_curves(history, out / f"learning-{name}.png")
        arms[name].save(out / "models" / name, overwrite=True)
        costs[name] = _cost(name, recipe, arms[name], scans, out, device)
    bfloat16 = any(recipe.precision == "bfloat16" for recipe in plans.values())
    precision = torch.bfloat16 if bfloat16 else torch.float32
    where = Where(device=device, precision=precision)
    results = compare(arms, task, trial, out / "trials", adapted=adapted, progress=trials, **where)
    rows = summarise(results, list(task.targets), trial.seed)
    write_json(out / "result.json", {"task": task.name, "rows": rows, "costs": costs, "trial": asdict(trial)})
    with replacing(out / "table.md") as beside:
        tables = [markdown_table(rows, list(plans), key) for key in ("dice", "surface_dice")]
        titles = ["Dice", f"Surface Dice at {trial.tolerance_mm} mm", "Cost"]
        tables.append(cost_table(costs, rows))
        parts = [f"**{title}**\n\n{table}\n" for title, table in zip(titles, tables, strict=True)]
        beside.write_text("\n".join(parts), encoding="utf-8")
    pictures = draw_curves(rows, out)
    pictures |= {f"Learning of {name}": out / f"learning-{name}.png" for name, plan in plans.items() if plan.phases}
    facts = {"trial": asdict(trial)}
    write_comparison(out, rows, task, baseline=BASELINE, costs=costs, pictures=pictures, settings=facts)
    return rows


def _cost(
    name: str, recipe: Recipe, model: Model, scans: Prepared, out: Path, device: torch.device | str
) -> dict[str, float]:
    """Seconds of the last phase; time and memory of one of its meta-steps; measured once, kept in `costs/`."""
    file = out / "costs" / f"{name}-{recipe.key(len(recipe.phases))}.json"
    if not file.exists():
        precision = torch.bfloat16 if recipe.precision == "bfloat16" else torch.float32
        learner = model.learner.to(device).train()
        episode = phase_episodes(recipe, len(recipe.phases) - 1, scans.training)[0].to(device)

        def meta_step() -> None:
            learner.zero_grad(set_to_none=True)
            with autocast(device, precision):
                loss = learner.meta_loss(episode)
            loss.backward()

        def plain_pass() -> None:
            learner.zero_grad(set_to_none=True)
            with autocast(device, precision):
                logits = learner.net(episode.query.image, learner.net.grow(episode.query.channels, 1))
            dice_cross_entropy(logits, episode.query.mask.clamp(max=1)).backward()

        seconds = median_seconds({"plain": plain_pass, "meta": meta_step}, 3, device)
        learner.zero_grad(set_to_none=True)
        peak = peak_memory(meta_step, device)
        learner.zero_grad(set_to_none=True)
        learner.eval()
        last = recipe.phases[-1].name
        cost = {"meta_seconds": model.card["seconds"][last], "time_ratio": seconds["meta"] / seconds["plain"]}
        write_json(file, cost | {"peak_bytes": peak})
    return read_json(file)


def draw_curves(rows: Sequence[Mapping[str, Any]], out: Path) -> dict[str, Path]:
    """Dice over the number of scans and over the seconds of adaptation, one panel for each arm: title -> picture."""
    pictures: dict[str, Path] = {}
    baselines = [arm for arm in ("scratch", BASELINE) if any(row["arm"] == arm for row in rows)]
    ways: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        alike = [other for other in rows if other["method"] == row["method"]]
        # One curve also where each number of scans has a length of its own.
        usual = all(other["steps"] == usual_steps(other["shots"]) for other in alike)
        ways.setdefault(row["method"] if usual else describe_adaptation(row["method"], row["steps"]), []).append(row)
    for way, chosen in ways.items():
        path = out / f"shots-{way.replace(' ', '-')}.png"
        arm_panels(_series(chosen, "shots"), path, baselines=baselines, label="labelled scans")
        pictures[f"Dice over labelled scans, {way}"] = path
    for shots in dict.fromkeys(row["shots"] for row in rows):
        chosen = [row for row in rows if row["shots"] == shots and row["method"] != "inner"]
        if chosen:
            path = out / f"time-{shots}-scans.png"
            arm_panels(_series(chosen, "adapt_seconds"), path, baselines=baselines, label="seconds of adaptation")
            pictures[f"Dice over seconds of adaptation, {shots} scans"] = path
    return pictures


def _series(rows: Sequence[Mapping[str, Any]], key: str) -> dict[str, list[tuple[float, float, float, float]]]:
    series: dict[str, list[tuple[float, float, float, float]]] = {}
    for row in sorted(rows, key=lambda row: row[key]):
        series.setdefault(row["arm"], []).append((row[key], row["dice"], *row["interval"]))
    return series


def by_steps(rows: Sequence[Mapping[str, Any]], key: str) -> dict[str, dict[str, Any]]:
    """{steps: {arm: value}} from rows of one number of scans and one method."""
    table: dict[str, dict[str, Any]] = {}
    for row in rows:
        table.setdefault(str(row["steps"]), {})[row["arm"]] = row[key]
    return table
