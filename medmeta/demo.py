"""The whole story on phantoms: train across organs, adapt to a new one from three scans, segment, score, draw."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from medmeta.adaptation import adapt_to
from medmeta.benchmark import Trial, by_steps, compare, draw_supports, summarise
from medmeta.data.phantoms import phantom_task, write_phantoms
from medmeta.data.tasks import Task, load_task
from medmeta.data.volume import read_channels, read_labels
from medmeta.evaluate import evaluate_folders
from medmeta.files import refuse_existing, write_json
from medmeta.fine_tuning import Budget
from medmeta.prediction import predict
from medmeta.recipe import EpisodeSettings, Phase, Progress, Recipe, train_recipe, untrained
from medmeta.report import CT_WINDOW, Panel, curves_over_adaptation, learning_curves, montage
from medmeta.review import evaluated_cases, write_review
from medmeta.segmenter import Model
from medmeta.train import Row, Schedule

NETWORK = {"name": "se_unet_3d", "options": {"channels": [16, 32, 64]}}
COMPACT = ("lobed", "superquadric")
"""Families of organs that three scans can teach; tubes, shells and pairs want more."""


@dataclass(frozen=True)
class Plan:
    """How large the demo is.

    Args:
        organs: phantom tasks; one of them is held out.
        patients: scans of each.
        support: scans to adapt to.
        test: scans that are segmented and scored.
        steps: lengths of the adaptation.
        pretrain_steps: steps of multi-task pre-training.
        meta_steps: steps of meta-learning after that.
        voxels: patch budget in voxels.
    """

    organs: int = 7
    patients: int = 10
    support: int = 3
    test: int = 6
    steps: tuple[int, ...] = (30, 60, 120)
    pretrain_steps: int = 320
    meta_steps: int = 40
    voxels: int = 24**3

    def arms(self) -> dict[str, tuple[Phase, ...]]:
        """Plain transfer is multi-task pre-training; meta-learning goes on from there."""
        pretrain = Phase(
            "pretrain",
            "transfer",
            Schedule(
                self.pretrain_steps, rate=3e-3, episodes_per_step=2, validate_every=max(1, self.pretrain_steps // 5)
            ),
            episodes=EpisodeSettings(shots=1, queries=1),
        )
        meta = Phase(
            "meta",
            "fomaml",
            Schedule(self.meta_steps, rate=5e-4, episodes_per_step=1, validate_every=max(1, self.meta_steps // 4)),
            options={"inner_steps": 6, "inner_rate": 3e-3, "inner_optimiser": "adam"},
            episodes=EpisodeSettings(shots=2, queries=2, mirror=True),
        )
        return {"transfer": (pretrain,), "meta": (pretrain, meta)}


def run_demo(
    out: str | Path,
    *,
    seed: int = 0,
    plan: Plan = Plan(),
    progress: Progress | None = None,
    trials: Progress | None = None,
    log: Callable[[Row], None] | None = None,
) -> dict[str, Any]:
    """Write phantoms, train, adapt, segment and score in `out`.

    Args:
        out: a new or empty folder; gets `phantoms/`, `model/`, `adapted/`, `segmented/`, `result.json`, the pictures
            `learning.png`, `adaptation.png` and `montage.png`, and `report/index.html`, a page to look at every scan.
        seed: of the phantoms and the training.
        plan: how large.
        progress: called with (what, done, total).
        trials: told how the comparison goes.
        log: called with each row of the training history.

    Returns:
        What `result.json` holds: `dice` of each arm for each adaptation length, seeds, versions, seconds.

    Raises:
        InputError: `out` holds something already.
    """
    out = Path(out)
    refuse_existing(out)
    started = time.monotonic()
    tell = progress or (lambda what, done, total: None)
    folders = write_phantoms(
        out / "phantoms",
        tasks=plan.organs,
        cases=plan.patients,
        seed=seed,
        progress=lambda done, total: tell("writing phantoms", done, total),
    )
    tasks = [load_task(folder) for folder in folders]
    new = tasks.pop(next(index for index in range(plan.organs) if phantom_task(index, seed).family in COMPACT))
    seconds = {"phantoms": time.monotonic() - started}
    arms: dict[str, Model] = {}
    histories: dict[str, list[Row]] = {}
    for name, phases in plan.arms().items():
        recipe = Recipe(tuple(tasks), phases, NETWORK, plan.voxels, seed, validation_episodes=12, precision="bfloat16")
        arms.setdefault("scratch", untrained(recipe))
        arms[name], histories[name] = train_recipe(recipe, out / "training", progress=progress, log=log)
        seconds[name] = arms[name].card["seconds"]
    arms["meta"].save(out / "model")
    learning_curves(histories["meta"], out / "learning.png")
    trial = Trial(shots=(plan.support,), steps=plan.steps, draws=1, test_patients=plan.test, rate=3e-3, seed=seed)
    results = compare(arms, new, trial, out / "trials", precision=torch.bfloat16, progress=trials)
    rows = summarise(results, list(new.targets), seed)
    result = {
        "task": new.name,
        "support_scans": plan.support,
        "test_scans": plan.test,
        "dice": by_steps(rows, "dice"),
        "interval": by_steps(rows, "interval"),
        "seconds": seconds,
        "seed": seed,
        "versions": _versions(),
    }
    curves_over_adaptation(result, out / "adaptation.png")
    _segment(arms["meta"], new, trial, out, seed)
    seconds["all"] = time.monotonic() - started
    write_json(out / "result.json", result)
    return result


def _segment(model: Model, task: Task, trial: Trial, out: Path, seed: int) -> None:
    """Adapt as a user would, segment the test scans from their files, score the folder, draw some."""
    test, supports = draw_supports(task, trial)
    support = task.of_patients(supports[0][: trial.shots[0]])
    budget = Budget(steps=max(trial.steps), rate=trial.rate)
    # One atlas in place of three: registration would take longer here than all networks together.
    segmenter = adapt_to(model, support, budget=budget, seed=seed, atlases=1, precision=torch.bfloat16)
    segmenter.save(out / "adapted")
    predict(segmenter, [case.images[0] for case in test.cases], out / "segmented")
    references = {case.id: case.labels for case in test.cases if case.labels is not None}
    folder = references[test.cases[0].id].parent
    evaluation = evaluate_folders(folder, out / "segmented", targets=task.targets)
    # The reference folder holds the support too: only what was segmented is scored.
    evaluation.failures[:] = [each for each in evaluation.failures if Path(each[0]).name.split(".")[0] in references]
    evaluation.to_json(out / "evaluation.json", seed)
    panels = [
        Panel(
            case.id,
            read_channels(case.images),
            read_labels(references[case.id]),
            read_labels(out / "segmented" / case.images[0].name),
            CT_WINDOW if task.modality == "CT" else None,
        )
        for case in test.cases[:4]
    ]
    montage(panels, out / "montage.png", task.targets)
    reached = evaluation.summary(seed)["overall"]["dice"]["mean"]
    summary = {"Dice of the test scans": f"{reached:.2f}"}
    if "forecast" in segmenter.card:
        summary["Dice forecast from the labelled scans"] = f"{segmenter.card['forecast']['dice']:.2f}"
    pictures = {"Dice over adaptation": out / "adaptation.png", "Learning": out / "learning.png"}
    write_review(
        out,
        evaluated_cases(evaluation, test.cases[0].images[0].parent),
        targets=task.targets,
        title=f"{task.name}: {len(test.cases)} scans from {trial.shots[0]} labelled ones",
        summary=summary,
        pictures=pictures,
        settings={"adapted": segmenter.card},
    )


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    packages = ("medmeta", "torch", "monai", "higher", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}
