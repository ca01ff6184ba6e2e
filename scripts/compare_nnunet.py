"""medmeta beside nnU-Net v2 (Isensee et al. 2021): the same support scans, the same test scans, the same scorer.

    pip install "medmeta[nnunet]"
    python scripts/compare_nnunet.py MODEL configs/hold_out_hippocampus.yaml --out DIR --shots 1 5 --minutes 3
    python scripts/compare_nnunet.py MODEL configs/hold_out_hippocampus.yaml --out DIR --full --device cuda

nnU-Net is the published package, unchanged: default plans, 3d_fullres, fold "all" (every support scan trains), its own
preprocessing, augmentation and mirrored sliding window. It starts from random weights, drawn anew each time.

With --minutes both train for one time, preparation apart: medmeta first, cross-validation included; nnU-Net then gets
those minutes, or as many as medmeta took where that is more, its learning rate brought to zero over them and without
its validation passes, of which the network learns nothing. On a CPU it computes in float32, the only precision it has
there. With --full nnU-Net keeps its own 1000 epochs (hours on a GPU), and medmeta takes the steps of `medmeta adapt`.

Printed is a Markdown table. DIR gets one JSON file for each row, and below nnunet/ the label maps and logs of nnU-Net.
Rows that are there are not made again, and a killed --full training goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from medmeta.adaptation import METHODS, adapt_to
from medmeta.benchmark import draw_supports
from medmeta.config import BenchmarkConfig, load_config
from medmeta.data.store import read_case
from medmeta.data.tasks import Task
from medmeta.data.volume import Volume, grid_difference, read_labels, write_volume
from medmeta.episode import IGNORED
from medmeta.errors import InputError, MedmetaError
from medmeta.evaluate import bootstrap_interval, mean_score, score_case, score_prediction
from medmeta.files import read_json, write_json
from medmeta.fine_tuning import Budget
from medmeta.inference import fastest_precision
from medmeta.segmenter import Model, as_model, load

NUMBER = 1
DATASET = f"Dataset{NUMBER:03}_Support"
CONFIGURATION = "3d_fullres"
PROCESSES = 2
"""Of nnU-Net's planning and preprocessing."""

LONGEST = 70
"""Characters of the folder for temporary files; the sockets in it must fit into the 108 that Linux allows."""


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model that was trained without the held-out set")
    parser.add_argument("config", type=Path, help="a benchmark config, for the held-out set and its test patients")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shots", type=int, nargs="+", default=[1, 5])
    parser.add_argument("--draws", type=int, default=1)
    parser.add_argument("--method", choices=("auto", *METHODS), default="auto", help="how medmeta adapts")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, default=3.0, help="of training, for both")
    length.add_argument("--full", action="store_true", help="nnU-Net's own schedule")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    arguments = parser.parse_args(given)
    minutes = None if arguments.full else arguments.minutes
    version, out = nnunet_version(), arguments.out.resolve()
    config = load_config(BenchmarkConfig, arguments.config)
    task, model = config.held_out_task(), as_model(load(arguments.model))
    trial = replace(config.trial, shots=tuple(arguments.shots), draws=arguments.draws)
    test, supports = draw_supports(task, trial)
    targets = list(task.targets)
    common = [task.name, task.targets, task.ignored, [case.id for case in test.cases], trial.tolerance_mm]
    common += [minutes, arguments.device]
    print(*table_head(targets), sep="\n", flush=True)
    for shots in arguments.shots:
        for draw in range(arguments.draws):
            support = task.labelled.of_patients(supports[draw][:shots])
            facts = {"shots": shots, "draw": draw, "support": [case.id for case in support.cases]}
            name = f"{shots}scans-draw{draw}"
            file = out / f"medmeta-{_key(common, facts, model.card, arguments.method)}-{name}.json"
            if not file.exists():
                result = run_medmeta(
                    model, support, test, arguments.method, minutes, trial.tolerance_mm, arguments.device, seed=draw
                )
                write_json(file, facts | result)
            ours = read_json(file)
            print(table_row(ours, targets), flush=True)
            seconds = None if minutes is None else max(60.0 * minutes, ours["training_seconds"])
            run = f"{_key(common, facts, version)}-{name}"
            file = out / f"nnunet-{run}.json"
            if not file.exists():
                result = run_nnunet(out, run, support, test, seconds, trial.tolerance_mm, arguments.device)
                write_json(file, facts | result)
            print(table_row(read_json(file), targets), flush=True)


def nnunet_version() -> str:
    """The version of the installed package.

    Raises:
        InputError: it is not installed.
    """
    try:
        return importlib.metadata.version("nnunetv2")
    except importlib.metadata.PackageNotFoundError as error:
        raise InputError("nnunetv2", "no such package", "nnU-Net v2", "pip install 'medmeta[nnunet]'") from error


def _key(*facts: object) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:8]


def run_medmeta(
    model: Model,
    support: Task,
    test: Task,
    method: str,
    minutes: float | None,
    tolerance_mm: float,
    device: str,
    seed: int,
) -> dict[str, Any]:
    """Adapt, segment the test scans and score them; the minutes are those of all that "auto" tries."""
    options: dict[str, Any] = {"device": device, "precision": fastest_precision(device)}
    budget = None if minutes is None else Budget(steps=10**9, minutes=minutes)
    started = time.monotonic()
    segmenter = adapt_to(model, support, method=method, budget=budget, seed=seed, **options)
    seconds = time.monotonic() - started
    return {
        "way": f"medmeta, {segmenter.card['method']}",
        "preparation_seconds": seconds - segmenter.card["seconds"],
        "training_seconds": segmenter.card["seconds"],
        "cases": [score_case(segmenter, test, case, tolerance_mm, **options) for case in test.cases],
    }


def run_nnunet(
    out: Path, run: str, support: Task, test: Task, seconds: float | None, tolerance_mm: float, device: str
) -> dict[str, Any]:
    """Train nnU-Net in a process of its own, segment the test scans and score them.

    Args:
        out: all that nnU-Net writes goes below it.
        run: name of the folder for this training.
        support, test: what to train on, what to segment.
        seconds: of training, None for nnU-Net's own schedule.
        tolerance_mm: of surface Dice.
        device: "cpu" or "cuda".

    Raises:
        InputError: the path is too long for nnU-Net's sockets, a scan cannot be used, or nnU-Net fails.
    """
    folder, scratch = out / "nnunet" / run, out / "tmp"
    if len(str(scratch)) > LONGEST:
        found = f"a path of {len(str(scratch))} characters for temporary files"
        raise InputError(scratch, found, f"at most {LONGEST}", "Name a shorter --out.")
    scratch.mkdir(parents=True, exist_ok=True)
    write_support(support, folder / "raw" / DATASET)
    scans, made = folder / "scans", folder / "labels"
    scans.mkdir(exist_ok=True)
    for number, case in enumerate(test.cases):
        _write_channels(read_case(test, case)[0], scans, f"case_{number:03}")
    # The user's own settings of nnU-Net, its logging over the network among them, stay out.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("nnUNet")}
    environment |= {f"nnUNet_{part}": str(folder / part) for part in ("raw", "preprocessed", "results")}
    environment |= dict.fromkeys(("TMPDIR", "MPLCONFIGDIR", "TRITON_CACHE_DIR"), str(scratch))
    paths = [str(Path(__file__).resolve().parent), os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    if device == "cpu":
        # More augmenting processes would take the cores from the training.
        environment["nnUNet_n_proc_DA"] = "1"
    # Not a script: every process that nnU-Net spawns would import it again.
    command = [sys.executable, "-c", "import sys, compare_nnunet; compare_nnunet.train_nnunet(*sys.argv[1:])"]
    command += [folder, device, json.dumps(seconds)]
    log = folder / "log.txt"
    with log.open("a", encoding="utf-8") as file:
        code = subprocess.run(command, env=environment, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
    if code:
        last = log.read_text(encoding="utf-8", errors="replace").split("\n")[-2:]
        raise InputError(log, f"nnU-Net ended with code {code}: {' '.join(last)}", "a whole run", "Read the log.")
    cases = []
    for number, case in enumerate(test.cases):
        path = made / f"case_{number:03}.nii.gz"
        classes, (scan, reference) = read_labels(path), read_case(test, case)
        if difference := grid_difference(classes, scan):
            raise InputError(path, f"another grid than its scan: {difference}", "the grid of the scan")
        labels = Volume(test.decode(classes.data), classes.affine)
        cases.append(score_prediction(labels, test, case, scan, reference, tolerance_mm))
    training = read_json(folder / "training.json")
    return {"way": f"nnU-Net {nnunet_version()}, {training['steps']} steps", **training, "cases": cases}


def write_support(support: Task, folder: Path) -> None:
    """Write a task as a raw data set of nnU-Net: classes 1..K, voxels that do not count as its "ignore", K + 1."""
    (folder / "imagesTr").mkdir(parents=True, exist_ok=True)
    (folder / "labelsTr").mkdir(exist_ok=True)
    cases = support.labelled.cases
    for number, case in enumerate(cases):
        scan, mask = read_case(support, case)
        _write_channels(scan, folder / "imagesTr", f"case_{number:03}")
        mask = mask.masked_fill(mask == IGNORED, support.classes + 1)
        write_volume(Volume(mask, scan.affine), folder / "labelsTr" / f"case_{number:03}.nii.gz")
    labels = {"background": 0} | {f"class {number}": number for number in range(1, support.classes + 1)}
    if support.ignored:
        labels["ignore"] = support.classes + 1
    facts = {
        # The name decides how nnU-Net scales intensities.
        "channel_names": {str(channel): support.modality for channel in range(len(support.channels))},
        "labels": labels,
        "numTraining": len(cases),
        "file_ending": ".nii.gz",
    }
    write_json(folder / "dataset.json", facts)


def _write_channels(scan: Volume, folder: Path, name: str) -> None:
    # What is not finite counts as 0, as for medmeta; nnU-Net would take its mean.
    for channel, data in enumerate(scan.data.nan_to_num(0.0, 0.0, 0.0)):
        write_volume(Volume(data[None], scan.affine), folder / f"{name}_{channel:04}.nii.gz")


def train_nnunet(folder: str, device: str, seconds: str) -> None:
    """Plan, preprocess, train and segment with nnU-Net; runs in the process whose environment names the folders.

    Args:
        folder: of the run; "scans" in it are segmented into "labels", "training.json" gets what the training took.
        device: "cpu" or "cuda".
        seconds: of training, JSON; null for nnU-Net's own schedule.
    """
    from nnunetv2.experiment_planning.plan_and_preprocess_api import (
        extract_fingerprint_dataset,
        plan_experiment_dataset,
        preprocess_dataset,
    )
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
    from nnunetv2.run.run_training import get_trainer_from_args, maybe_load_checkpoint

    run, where, limit = Path(folder), torch.device(device), json.loads(seconds)
    started = time.monotonic()
    extract_fingerprint_dataset(NUMBER, num_processes=PROCESSES, check_dataset_integrity=True)
    _, plans = plan_experiment_dataset(NUMBER)
    preprocess_dataset(NUMBER, plans, [CONFIGURATION], [PROCESSES])
    preparation = time.monotonic() - started
    torch.backends.cudnn.benchmark = True  # as its own command does
    whole = limit is None
    trainer = get_trainer_from_args(DATASET, CONFIGURATION, "all", "nnUNetTrainer", plans, whole, where)
    if whole:
        maybe_load_checkpoint(trainer, continue_training=True, validation_only=False)
        trainer.run_training()
        begun, ended = (trainer.logger.get_value(f"epoch_{side}_timestamps", None) for side in ("start", "end"))
        training, steps = sum(ended) - sum(begun), trainer.num_epochs * trainer.num_iterations_per_epoch
    else:
        training, steps = train_for(trainer, limit)
    trainer.set_deep_supervision_enabled(False)
    network = getattr(trainer.network, "_orig_mod", trainer.network)  # without torch.compile
    predictor = nnUNetPredictor(device=where, allow_tqdm=False)
    predictor.manual_initialization(
        network,
        trainer.plans_manager,
        trainer.configuration_manager,
        [network.state_dict()],
        trainer.dataset_json,
        type(trainer).__name__,
        trainer.inference_allowed_mirroring_axes,
    )
    (run / "labels").mkdir(exist_ok=True)
    predictor.predict_from_files_sequential(str(run / "scans"), str(run / "labels"))
    facts = {"preparation_seconds": preparation, "training_seconds": training, "steps": steps}
    write_json(run / "training.json", facts)


def train_for(trainer: Any, seconds: float, clock: Callable[[], float] = time.monotonic) -> tuple[float, int]:
    """Train for a time: nnU-Net's own step, and its own decay of the learning rate over the share that is gone.

    The first step is outside the clock, because a GPU compiles the network in it.

    Args:
        trainer: nnU-Net's.
        seconds: at least; the last step is finished.
        clock: seconds since some moment.

    Returns:
        The seconds taken and the number of steps.
    """
    trainer.disable_checkpointing = True
    trainer.on_train_start()
    trainer.network.train()
    trainer.train_step(next(trainer.dataloader_train))
    started, steps = clock(), 1
    while (gone := clock() - started) < seconds:
        trainer.lr_scheduler.step(trainer.num_epochs * gone / seconds)
        trainer.train_step(next(trainer.dataloader_train))
        steps += 1
    trainer.on_train_end()
    return gone, steps


def table_head(targets: Sequence[str]) -> list[str]:
    """Header and ruler of the table."""
    names = ["scans", "draw", "way", "preparation, min", "training, min", "Dice (95 % interval)", *targets, "missed"]
    return [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]


def table_row(result: Mapping[str, Any], targets: Sequence[str]) -> str:
    """A result: mean Dice over scans, each the mean of its structures; Dice of each structure; share of those missed.

    Args:
        result: as it is read back from JSON.
        targets: the structures; missed are those that a scan holds and of which not one voxel was found.
    """
    cases = result["cases"]
    dices = [mean_score(case[name]["dice"] for name in targets) for case in cases]
    low, high = bootstrap_interval(dices)
    held = [case[name] for case in cases for name in targets]
    held = [scores for scores in held if scores["dice"] is not None and not scores["invented"]]
    cells = [str(result["shots"]), str(result["draw"] + 1), result["way"]]
    cells += [f"{result[f'{part}_seconds'] / 60:.1f}" for part in ("preparation", "training")]
    cells += [f"{mean_score(dices):.3f} ({low:.2f} to {high:.2f})"]
    cells += [f"{mean_score(case[name]['dice'] for case in cases):.3f}" for name in targets]
    cells += [f"{mean_score(scores['missed'] for scores in held):.0%}"]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    try:
        main()
    except MedmetaError as error:
        sys.exit(str(error))
