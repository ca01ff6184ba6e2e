"""The whole story on phantoms: train across organs, adapt to a new one from three scans, segment, score, draw."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from medmeta.adaptation import Budget, adapt_to
from medmeta.benchmark import Trial, by_steps, compare, draw_supports, summarise
from medmeta.data.phantoms import write_phantoms
from medmeta.data.tasks import load_task
from medmeta.data.volume import read_channels, read_labels
from medmeta.evaluate import evaluate_folders
from medmeta.files import write_json
from medmeta.prediction import predict
from medmeta.recipe import EpisodeSettings, Phase, Progress, Recipe, train_recipe, untrained
from medmeta.report import CT_WINDOW, Panel, curves_over_adaptation, learning_curves, montage
from medmeta.segmenter import refuse_existing
from medmeta.train import Row, Schedule

ORGANS, PATIENTS, SUPPORT, TEST = 7, 10, 3, 6
NETWORK = {"name": "se_unet_3d", "options": {"channels": [12, 24, 48]}}
VOXELS = 24**3
LENGTHS = (5, 20, 60)


def phases() -> dict[str, tuple[Phase, ...]]:
    """The arms of the demo: both begin with the same pre-training, then go on for about as long as each other."""
    plain = EpisodeSettings(shots=2, queries=2)
    pretrain = Phase("pretrain", "transfer", Schedule(250, rate=3e-3, validate_every=50), episodes=plain)
    further = Phase("pretrain further", "transfer", Schedule(160, rate=1.5e-3, validate_every=40), episodes=plain)
    meta = Phase(
        "meta",
        "maml",
        Schedule(60, rate=1.5e-3, episodes_per_step=1, validate_every=20),
        options={"inner_steps": 2, "inner_rate": 0.1},
        episodes=EpisodeSettings(shots=2, queries=2, mirror=True),
    )
    return {"transfer": (pretrain, further), "meta": (pretrain, meta)}


def run_demo(
    out: str | Path,
    *,
    seed: int = 0,
    progress: Progress | None = None,
    log: Callable[[Row], None] | None = None,
) -> dict[str, Any]:
    """Write phantoms, train, adapt, segment and score in `out`.

    Args:
        out: a new or empty folder; gets `phantoms/`, `model/`, `adapted/`, `segmented/`, `result.json` and the pictures
            `learning.png`, `adaptation.png` and `montage.png`.
        seed: of the phantoms and the training.
        progress: called with (what, done, total).
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
        tasks=ORGANS,
        cases=PATIENTS,
        seed=seed,
        progress=lambda done, total: tell("writing phantoms", done, total),
    )
    *training, new = (load_task(folder) for folder in folders)
    seconds = {"phantoms": time.monotonic() - started}
    arms, histories = {}, {}
    for name, plan in phases().items():
        recipe = Recipe(tuple(training), plan, NETWORK, VOXELS, seed, validation_episodes=12, precision="bfloat16")
        arms.setdefault("scratch", untrained(recipe))
        arms[name], histories[name] = train_recipe(recipe, out / "training", progress=progress, log=log)
        seconds[name] = arms[name].card["seconds"]
    arms["meta"].save(out / "model")
    learning_curves(histories["meta"], out / "learning.png")
    trial = Trial(shots=(SUPPORT,), steps=LENGTHS, draws=1, test_patients=TEST, rate=3e-3, seed=seed)
    results = compare(arms, new, trial, out / "trials", precision=torch.bfloat16, progress=progress)
    rows = summarise(results, list(new.targets), seed)
    result = {
        "task": new.name,
        "support_scans": SUPPORT,
        "test_scans": TEST,
        "dice": by_steps(rows, "dice"),
        "interval": by_steps(rows, "interval"),
        "seconds": seconds,
        "seed": seed,
        "versions": _versions(),
    }
    curves_over_adaptation(result, out / "adaptation.png")
    _segment(arms["meta"], new, trial, out, seed)
    result["seconds"]["all"] = time.monotonic() - started
    write_json(out / "result.json", result)
    return result


def _segment(model, task, trial: Trial, out: Path, seed: int) -> None:
    """Adapt as a user would, segment the test scans from their files, score the folder, draw some."""
    test, supports = draw_supports(task, trial)
    support = task.of_patients(supports[0][:SUPPORT])
    budget = Budget(steps=max(LENGTHS), rate=trial.rate)
    segmenter = adapt_to(model, support, budget=budget, seed=seed, precision=torch.bfloat16)
    segmenter.save(out / "adapted")
    predict(segmenter, [case.images[0] for case in test.cases], out / "segmented")
    references = {case.id: case.labels for case in test.cases}
    evaluation = evaluate_folders(test.cases[0].labels.parent, out / "segmented", targets=task.targets)
    # The reference folder holds the support too: only what was segmented is scored.
    evaluation.failures[:] = [each for each in evaluation.failures if Path(each[0]).name.split(".")[0] in references]
    evaluation.to_json(out / "evaluation.json", seed)
    panels = [
        Panel(
            case.id,
            read_channels(case.images),
            read_labels(case.labels),
            read_labels(out / "segmented" / case.images[0].name),
            CT_WINDOW if task.modality == "CT" else None,
        )
        for case in test.cases[:4]
    ]
    montage(panels, out / "montage.png", task.targets)


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    packages = ("medmeta", "torch", "monai", "higher", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}
