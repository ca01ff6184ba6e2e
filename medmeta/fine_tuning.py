"""Fine-tuning on a few prepared scans: what is drawn from them, how fast it is learned, when it ends."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from medmeta.data.sampler import Augment, copy_paste, draw_patch
from medmeta.data.store import StoredTask
from medmeta.episode import Examples, State
from medmeta.learners import MetaLearner
from medmeta.losses import dice_cross_entropy
from medmeta.networks import SegNet, build_network
from medmeta.train import autocast
from medmeta.tuning import TUNINGS, tune_all

STEPS = 1000
"""Steps for one labelled scan (`usual_steps`)."""

RATES = {"lora": 2.5, "norms": 2.5}
"""Peak step sizes relative to that of full fine-tuning: the fewer parameters move, the faster they may."""

HEAD_RATE = 10.0
"""The same of the output layer, whose classes all start from one vector and have to part first."""

WARM_UP = 10
"""Steps over which the step size rises, while the moments of the optimiser settle."""

AVERAGE = 0.98
"""Decay of the moving average of the weights, which is what fine-tuning gives."""

BALANCE = 0.5
"""How far the loss makes up for rare classes at first (`dice_cross_entropy`), down to nothing at half of the budget: a
small structure is to be found before its borders count."""

AGAIN = 0.5
"""Step size, relative, of all layers of a network that goes on from what it learned before; what is found already needs
neither a faster output layer nor more weight for rare classes."""

PULL = 0.5
"""Strength with which full fine-tuning is drawn back to its start (L2-SP)."""

NORM = 5.0
"""Longest gradient; what is longer is cut to it."""

STRENGTH = 2.0
"""Of the augmentation, relative to that of training: few scans show few of the sizes and brightnesses there are."""

RECONTRAST = 0.5
"""Share of patches that get another contrast where a single MR scan is labelled; k scans show k contrasts themselves,
and the share is k times less."""

BEND = 0.8
"""Share of patches that are deformed elastically where a single scan is labelled; k scans show k shapes themselves."""


@dataclass(frozen=True)
class Budget:
    """How long and how fast to adapt.

    Args:
        steps: optimiser steps at most; `usual_steps` says how many serve how many scans.
        minutes: wall-clock minutes at most, None for no limit. Only a budget of steps gives the same result again.
        rate: Adam's peak step size, before a cosine to nothing.
        patches: patches of one step.
    """

    steps: int = STEPS
    minutes: float | None = None
    rate: float = 2e-3
    patches: int = 2

    def __post_init__(self) -> None:
        if self.steps < 0 or self.rate <= 0 or self.patches < 1 or (self.minutes is not None and self.minutes <= 0):
            raise ValueError(f"{self}; required: steps of 0 or more, patches of 1 or more, a positive rate and minutes")

    def spend(self) -> Iterator[tuple[int, float]]:
        """One step after the other, each with the share of steps or minutes that was spent before, below 1."""
        started = time.monotonic()
        for step in range(self.steps):
            waited = 0.0 if self.minutes is None else (time.monotonic() - started) / (60.0 * self.minutes)
            done = max(step / self.steps, waited)
            if done >= 1.0:
                return
            yield step, done


def usual_steps(scans: int) -> int:
    """Optimiser steps that serve so many labelled patients: the more they show, the longer there is to learn from.

    They rise with the square root: 1,000 for one, 1,732 for three, 2,236 for five, 3,162 for ten.
    """
    return round(STEPS * math.sqrt(scans))


class Batches:
    """The augmented patches of each step, a pure function of seed and step.

    Args:
        support: the prepared scans; over one step and the next, every one of them comes up as often as any other.
        patches: patches of one step.
        seed: of what is drawn.
        mixed: share of the steps whose patches have a box of another patch in them (`copy_paste`).
        repaint: share of the patches whose structures each get another brightness (`draw_brightness`).
    """

    def __init__(
        self, support: StoredTask, patches: int, seed: int = 0, *, mixed: float = 0.0, repaint: float = 0.0
    ) -> None:
        self.support, self.patches, self.seed, self.mixed = support, patches, seed, mixed
        patients = len({case.patient for case in support.cases})
        self.augment = Augment(
            support.patch,
            support.preprocess.spacing,
            support.preprocess.modality,
            strength=STRENGTH,
            bend=BEND / patients,
            repaint=repaint,
            recontrast=RECONTRAST / patients,
        )

    def __getitem__(self, step: int) -> Examples:
        rng = np.random.default_rng([self.seed, 0, step])
        scans = len(self.support.cases)
        patches = [self._draw((step * self.patches + number) % scans, rng) for number in range(self.patches)]
        if rng.random() < self.mixed:
            pasted = [*patches[1:], patches[0]] if len(patches) > 1 else [self._draw(int(rng.integers(scans)), rng)]
            patches = copy_paste(patches, pasted, rng)
        return Examples.of(patches, self.support.classes)

    def _draw(self, number: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        return self.augment(*draw_patch(self.support.cases[number], self.support.patch, rng), rng)


def fine_tune(
    learner: MetaLearner,
    support: StoredTask,
    method: str = "finetune",
    budget: Budget = Budget(),
    seed: int = 0,
    *,
    begin: State | None = None,
    mixed: float = 0.0,
    repaint: float = 0.0,
    device: torch.device | str = "cpu",
    precision: torch.dtype = torch.float32,
    progress: Callable[[int, int, float], None] | None = None,
) -> State:
    """What a network learns from prepared scans on one grid: the moving average of its weights, on the CPU.

    Adam, a short rise and a cosine to nothing; Dice and cross entropy.

    Args:
        learner: gives the network and where to set out from.
        support: what to learn from.
        method: one of `TUNINGS`; or "scratch", everything, from random weights.
        budget: how long and how fast.
        seed: of the batches and of what starts at random.
        begin: weights to go on from, in place of the learner's own.
        mixed: as of `Batches`.
        repaint: as of `Batches`.
        device: where to learn.
        precision: bfloat16 runs the network under autocast.
        progress: called with (step, steps, loss).

    Raises:
        FloatingPointError: the loss is no longer finite.
    """
    net = learner.to(device).eval().net
    start = _start(learner, method, support, seed, begin, device)
    tuning = TUNINGS.get(method, tune_all)(net, start, torch.Generator().manual_seed(seed))
    moved = {name: tensor.requires_grad_() for name, tensor in tuning.leaves.items()}
    average = {name: tensor.detach().clone() for name, tensor in moved.items()}
    peak, head, balance = budget.rate * RATES.get(method, 1.0), budget.rate * HEAD_RATE, BALANCE
    if begin is not None:
        peak, head, balance = AGAIN * peak, AGAIN * budget.rate, 0.0
    optimiser = torch.optim.Adam(
        [
            {"params": [moved[name] for name in moved if name in net.head_names], "peak": head},
            {"params": [moved[name] for name in moved if name not in net.head_names], "peak": peak},
        ]
    )
    batches = Batches(support, budget.patches, seed, mixed=mixed, repaint=repaint)
    for step, done in budget.spend():
        schedule = min(1.0, (step + 1) / WARM_UP) * 0.5 * (1.0 + math.cos(math.pi * done))
        for group in optimiser.param_groups:
            group["lr"] = schedule * group["peak"]
        examples = for_network(net, batches[step]).to(device)
        optimiser.zero_grad()
        with autocast(device, precision):
            logits = net(examples.image, tuning.assemble(moved))
        loss = dice_cross_entropy(logits, examples.mask, balance=balance * max(0.0, 1.0 - 2.0 * done))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(moved.values()), NORM)
        optimiser.step()
        with torch.no_grad():
            for name, anchor in tuning.anchors.items():
                moved[name].lerp_(anchor, schedule * peak * PULL)
            for name, tensor in average.items():
                tensor.lerp_(moved[name], 1.0 - min(AVERAGE, (1 + step) / (10 + step)))
        value = float(loss.detach())
        if not math.isfinite(value):
            raise FloatingPointError(
                f"the loss is {value} at step {step + 1}; required: a finite loss. Adapt in float32 or at a lower rate"
            )
        if progress:
            progress(step + 1, budget.steps, value)
    with torch.no_grad():
        return {name: tensor.detach().cpu() for name, tensor in tuning.assemble(average).items()}


def for_network(net: SegNet, examples: Examples) -> Examples:
    """Volumes as a network takes them: one of two dimensions takes their slices."""
    return examples if net.spatial_dims == 3 else examples.slices(net.across)


@torch.no_grad()
def _start(
    learner: MetaLearner, method: str, support: StoredTask, seed: int, begin: State | None, device: torch.device | str
) -> State:
    """The weights from which to set out."""
    if begin is not None:
        return {name: tensor.to(device) for name, tensor in begin.items()}
    channels = support.cases[0].image.shape[0]
    if method != "scratch":
        return learner.start(channels, support.classes)
    spec = learner.net.spec
    fresh = build_network(spec["name"], seed=seed, **spec["options"])
    return fresh.to(device).grow(channels, support.classes)
