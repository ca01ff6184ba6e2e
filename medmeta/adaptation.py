"""From a few labelled scans to a segmenter."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from medmeta.data.preprocess import Preprocess
from medmeta.data.sampler import Augment, draw_patch
from medmeta.data.store import StoredCase, StoredTask, fit_preprocess, prepare
from medmeta.data.tasks import Task, pair_folders
from medmeta.data.volume import read_channels, read_labels
from medmeta.episode import Examples, State
from medmeta.errors import InputError
from medmeta.learners import MetaLearner
from medmeta.losses import dice_cross_entropy
from medmeta.segmenter import Model, Segmenter, as_model
from medmeta.train import autocast

METHODS = ("finetune", "inner")


@dataclass(frozen=True)
class Budget:
    """How long and how fast to adapt.

    Args:
        steps: optimiser steps at most.
        minutes: wall-clock minutes at most, None for no limit. Only a budget of steps gives the same result again.
        rate: AdamW's step size, before a cosine to nothing.
        patches: patches of one step.
    """

    steps: int = 200
    minutes: float | None = None
    rate: float = 2e-3
    patches: int = 2

    def __post_init__(self) -> None:
        if self.steps < 0 or self.rate <= 0 or self.patches < 1 or (self.minutes is not None and self.minutes <= 0):
            raise ValueError(f"{self}; required: steps of 0 or more, patches of 1 or more, a positive rate and minutes")


def adapt_to(
    model: Model | Segmenter,
    task: Task,
    *,
    method: str = "finetune",
    budget: Budget = Budget(),
    seed: int = 0,
    device: torch.device | str = "cpu",
    precision: torch.dtype = torch.float32,
    progress: Callable[[int, int, float], None] | None = None,
) -> Segmenter:
    """Adapt a model to the labelled scans of a task.

    The output convolution gets one row for each class and the input convolution one slice for each channel, both grown
    from what was learned (`SegNet.grow`); all of them then move freely.

    Args:
        model: meta-learned, or adapted before (then its meta-learned part is the start).
        task: 1 to 10 labelled scans; the unlabelled ones are not used.
        method: "finetune" is AdamW on augmented patches from the learned start; "inner" is the learner's own rule.
        budget: how long, for "finetune".
        seed: which patches and augmentations are drawn.
        device: where to adapt.
        precision: bfloat16 runs the network under autocast.
        progress: called with (step, steps, loss).

    Raises:
        InputError: a scan or label map cannot be used, or no scan holds a target; the message names file or folder.
        ValueError: an unknown method.
        FloatingPointError: the loss is no longer finite.
    """
    if method not in METHODS:
        raise ValueError(f"method {method!r}; required: one of {', '.join(METHODS)}")
    model = as_model(model)
    support = prepare_support(task, model.voxels, stride=model.learner.net.stride)
    _require_targets(task, support)
    started = time.monotonic()
    state = adapt_prepared(model.learner, support, method, budget, seed, device, precision, progress)
    how = {"method": method, "seed": seed, **(asdict(budget) if method == "finetune" else {})}
    return make_segmenter(model, task, support, state, {**how, "seconds": round(time.monotonic() - started, 1)})


def _require_targets(task: Task, support: StoredTask) -> None:
    # A class that no scan holds would be learned as "never", without a word.
    present = {label for case in support.cases for label in case.places}
    for name, values in task.targets.items():
        if not any(set(atom) <= set(values) for number, atom in enumerate(task.atoms, start=1) if number in present):
            found = f"no voxel of {name} = {list(values)} in any of the {len(support.cases)} label maps"
            remedy = "Label it in one scan, or leave the target out."
            raise InputError(task.labelled.cases[0].labels.parent, found, "each target in a support scan", remedy)


def adapt(
    model: Model | Segmenter,
    images: str | Path,
    labels: str | Path,
    *,
    targets: Mapping[str, Sequence[int]] | None = None,
    modality: Literal["CT", "MR"] | None = None,
    background: Sequence[int] = (),
    **options: Any,
) -> Segmenter:
    """Adapt a model to the scans of one folder and the label maps of another.

    Args:
        model: meta-learned, or adapted before.
        images: folder of scans.
        labels: folder of label maps of the same names.
        targets: structure -> label values; every value of the label maps, named "label 1" and so on, when None.
        modality: "CT" or "MR"; found from the scans (`guess_modality`) when None.
        background: label values that count as background, beside 0: other organs of the label maps.
        options: as of `adapt_to`.

    Raises:
        InputError: a folder, a scan or a label map cannot be used; the message names the file.
    """
    task = support_task(images, labels, targets=targets, modality=modality, background=background)
    return adapt_to(model, task, **options)


def support_task(
    images: str | Path,
    labels: str | Path,
    *,
    targets: Mapping[str, Sequence[int]] | None = None,
    modality: Literal["CT", "MR"] | None = None,
    background: Sequence[int] = (),
) -> Task:
    """The task that two folders of scans and label maps make. Arguments and errors as of `adapt`."""
    named = targets or {"any": (max(background, default=0) + 1,)}
    task = pair_folders(images, labels, targets=named, modality=modality or "MR", background=background)
    if targets is None:
        values = {value for case in task.cases for value in read_labels(case.labels).data.unique().tolist()}
        values -= {0, *background}
        if not values:
            remedy = "Label an organ, or name other folders."
            raise InputError(labels, "only background", "a label above 0 in some label map", remedy)
        found = {f"label {value}": (value,) for value in sorted(values)}
        task = pair_folders(images, labels, targets=found, modality=task.modality, background=background)
    if modality is None:
        task = replace(task, modality=guess_modality(task))
    return task


def guess_modality(task: Task) -> Literal["CT", "MR"]:
    """CT where every scan reaches below -50, as fat and air do in HU and MR signal does not; MR otherwise."""
    lowest = [float(read_channels(case.images).data.nan_to_num(0.0, 0.0, 0.0).min()) for case in task.cases]
    return "CT" if max(lowest) < -50 else "MR"


def prepare_support(task: Task, voxels: int, *, stride: int = 8, preprocess: Preprocess | None = None) -> StoredTask:
    """The labelled scans of a task on a working grid fitted to them, in memory."""
    cases = task.labelled.cases
    preprocess = preprocess or fit_preprocess(task)
    prepared = tuple(prepare(task, case, preprocess) for case in cases)
    patch = preprocess.patch(voxels, [case.mask.shape for case in prepared], stride)
    return StoredTask(task.name, task.classes, patch, prepared, preprocess)


def make_segmenter(model: Model, task: Task, support: StoredTask, state: State, card: dict[str, object]) -> Segmenter:
    """A segmenter for `task` from what was learned on its prepared support."""
    facts = {"task": task.name, "support_scans": len(support.cases), "support_terms": task.terms, **card}
    values = tuple(min(atom) for atom in task.atoms)
    return Segmenter(model, state, support.preprocess, dict(task.targets), values, task.channels, support.patch, facts)


def adapt_prepared(
    learner: MetaLearner,
    support: StoredTask,
    method: str = "finetune",
    budget: Budget = Budget(),
    seed: int = 0,
    device: torch.device | str = "cpu",
    precision: torch.dtype = torch.float32,
    progress: Callable[[int, int, float], None] | None = None,
) -> State:
    """What `learner` learns from prepared scans. Arguments as of `adapt_to`."""
    learner = learner.to(device).eval()
    if method == "inner":
        examples = _for_network(learner, support_patches(support, seed)).to(device)
        with torch.no_grad(), autocast(device, precision):
            return _to_cpu(learner.adapt(examples))
    augment = Augment(support.patch, support.preprocess.spacing, support.preprocess.modality)
    with torch.no_grad():
        start = learner.start(support.cases[0].image.shape[0], support.classes)
    state = {name: tensor.detach().clone().requires_grad_() for name, tensor in start.items()}
    optimiser = torch.optim.AdamW(state.values(), lr=budget.rate, weight_decay=1e-4)
    started = time.monotonic()
    for step in range(budget.steps):
        spent = 0.0 if budget.minutes is None else (time.monotonic() - started) / (60.0 * budget.minutes)
        done = max(step / budget.steps, spent)
        if done >= 1.0:
            break
        for group in optimiser.param_groups:
            group["lr"] = budget.rate * 0.5 * (1.0 + math.cos(math.pi * done))
        rng = np.random.default_rng([seed, 0, step])
        # Over one step and the next, every scan comes up as often as any other.
        chosen = [support.cases[(step * budget.patches + n) % len(support.cases)] for n in range(budget.patches)]
        examples = _for_network(
            learner, _examples([_patch(support, case, augment, rng) for case in chosen], support.classes)
        ).to(device)
        optimiser.zero_grad()
        with autocast(device, precision):
            logits = learner.segment(examples.image, state)
        loss = dice_cross_entropy(logits.float(), examples.mask)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(state.values()), 5.0)
        optimiser.step()
        value = float(loss.detach())
        if not math.isfinite(value):
            raise FloatingPointError(
                f"the loss is {value} at step {step + 1}; required: a finite loss. Adapt in float32 or at a lower rate"
            )
        if progress:
            progress(step + 1, budget.steps, value)
    return _to_cpu(state)


def support_patches(support: StoredTask, seed: int = 0, most: int = 16) -> Examples:
    """Patches that show each scan around each of its classes and once anywhere, as many as `most` or the scans."""
    rng = np.random.default_rng([seed, 1])
    cases, classes = support.cases, support.classes
    patches = []
    for number in range(max(len(cases), min(most, len(cases) * (classes + 1)))):
        label = 1 + (number // len(cases)) % (classes + 1)
        around = [label] if label <= classes else []
        patches.append(draw_patch(cases[number % len(cases)], support.patch, rng, labels=around))
    return _examples(patches, classes)


def _to_cpu(state: State) -> State:
    return {name: tensor.detach().cpu() for name, tensor in state.items()}


def _patch(
    support: StoredTask, case: StoredCase, augment: Augment | None, rng: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    image, mask = draw_patch(case, support.patch, rng)
    return augment(image, mask, rng) if augment else (image, mask)


def _examples(patches: Sequence[tuple[torch.Tensor, torch.Tensor]], classes: int) -> Examples:
    images, masks = zip(*patches, strict=True)
    return Examples(torch.stack(images), torch.stack(masks), classes)


def _for_network(learner: MetaLearner, examples: Examples) -> Examples:
    return examples if learner.net.spatial_dims == 3 else examples.slices()
