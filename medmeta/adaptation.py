"""From a few labelled scans to a segmenter."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, TypedDict

import torch

from medmeta.data.store import StoredTask
from medmeta.data.tasks import Task
from medmeta.episode import State
from medmeta.errors import InputError
from medmeta.fine_tuning import Budget, fine_tune, for_network, usual_steps
from medmeta.inference import Layer
from medmeta.learners import MetaLearner
from medmeta.learners.sliced import Sliced
from medmeta.networks import can_be_sliced
from medmeta.postprocess import one_piece
from medmeta.pseudo_labels import with_pseudo_labels
from medmeta.registration import ATLASES, make_atlases
from medmeta.rehearsal import draw_folds, rehearse
from medmeta.segmenter import Model, Segmenter, as_model
from medmeta.support import prepare_support, require_targets, support_patches, support_task, with_unlabelled
from medmeta.train import autocast
from medmeta.tuning import TUNINGS

METHODS = ("inner", *TUNINGS, "self_training", "scratch")
"""The learner's own rule; every way to fine-tune; "finetune" twice, the second time from unlabelled scans too; and
fine-tuning of a network that was never trained."""

CANDIDATES = ("finetune", "lora")
"""What "auto" chooses from."""

REHEARSAL = 0.2
"""Share of the budget that each model that leaves patients out gets, so that all of it takes about twice as long as one
adaptation."""

OVERVIEW_SHARE, EVEN_SHARE = 1 / 3, 1 / 2
"""Weight of the overview's probabilities; the second with 1 and 2 scans, which teach places before borders, and for the
volume beside single slices."""

SLICES, SLICE_STEPS = 4, 2 / 3
"""Single slices of one step, for each patch of it: they come from as many scans. And the share of the steps that they
get; the volume has the rest."""

OVERVIEW_FROM = 200
"""Steps from which on an overview is learned too; fewer are all for the finer grid."""

MIXED, SEVERAL = 0.5, 5
"""Share of the steps whose patches have a box of another patch in them (`copy_paste`), where slices are thick: of all
steps from the second number of labelled patients on, with fewer of those on unlabelled scans."""

REPAINT, SURER = 0.5, 0.02
"""Where 1 or 2 MR scans are labelled, self-training fine-tunes a second network with structures of another brightness
in this share of the patches, since disease may have made the labelled organs dark. It takes the place of the first
where it expects so much more Dice of what it finds in the unlabelled scans, and goes on in the same way."""

MORE, ROUNDS, FEW_ROUNDS = 1 / 6, 3, 6
"""Self-training adds rounds of this share of the steps, in each of which the unlabelled scans are labelled and learned
from too; the second number with 1 and 2 labelled scans, which leave more to learn from the others."""


class Where(TypedDict):
    """Where and how exactly a network runs; the words are those of `adapt_to`."""

    device: torch.device | str
    precision: torch.dtype


def adapt_to(
    model: Model | Segmenter,
    task: Task,
    *,
    method: str = "auto",
    budget: Budget | None = None,
    seed: int = 0,
    atlases: int = ATLASES,
    device: torch.device | str = "cpu",
    precision: torch.dtype = torch.float32,
    progress: Callable[[int, int, float], None] | None = None,
) -> Segmenter:
    """Adapt a model to the labelled scans of a task.

    The output convolution gets one row for each class and the input convolution one slice for each channel, both grown
    from what was learned (`SegNet.grow`).

    Args:
        model: meta-learned, or adapted before (then its meta-learned part is the start).
        task: 1 to 10 labelled scans, and for self-training unlabelled ones, of which `UNLABELLED` are drawn; those that
            cannot be used are named in the card.
        method: one of `METHODS`, or "auto": the best of `CANDIDATES` by cross-validation over the labelled patients
            (`rehearse`: each left out once, with `REHEARSAL` of the steps), where there are 3 or more; "finetune" for 1
            and 2. Where that is "finetune" and there are unlabelled scans, "self_training" takes its place. The card of
            the segmenter holds the scores and the forecast that follows from them, without unlabelled scans.
        budget: how long each fine-tuning takes, self-training half as many steps again, with 1 and 2 scans as many
            again (`ROUNDS`), of MR twice as many (`REPAINT`); with "auto" the minutes are those of all of them
            together. None: as many steps as are usual for so many patients.
        seed: which patches and augmentations are drawn.
        atlases: labelled scans at most whose labels are carried to others by registration too. The segmenter then
            holds these scans, on a coarser grid; none that turns out to count for nothing (`make_atlases`; with
            self-training, none at all where they count for no unlabelled scan).
        device: where to adapt.
        precision: bfloat16 runs the network under autocast.
        progress: called with (step, steps, loss).

    Raises:
        InputError: a scan or label map cannot be used, no scan holds a target, or self-training has no unlabelled scan;
            the message names file or folder.
        ValueError: an unknown method.
        FloatingPointError: the loss is no longer finite.
    """
    if method not in ("auto", *METHODS):
        raise ValueError(f"method {method!r}; required: one of auto, {', '.join(METHODS)}")
    model = as_model(model)
    budget = budget or Budget(usual_steps(len(task.labelled.patients)))
    support = prepare_for(model, task)
    require_targets(task, support)
    where = Where(device=device, precision=precision)
    started = time.monotonic()
    folds = draw_folds(task.labelled.patients, seed) if method == "auto" else []
    rehearsals = len(CANDIDATES) * len(folds)
    minutes = None if budget.minutes is None else budget.minutes / (1 + REHEARSAL * rehearsals)
    full = replace(budget, minutes=minutes)
    part = replace(full, steps=round(REHEARSAL * full.steps), minutes=minutes and REHEARSAL * minutes)
    rehearsed = rehearsals * part.steps
    planned = _told_from(progress, 0, rehearsed + full.steps)

    def adapted(candidate: str, others: Task, rest: StoredTask, number: int) -> Segmenter:
        told = _told_from(planned, number * part.steps)
        return adapt_support(model, others, rest, candidate, part, seed, atlases=0, progress=told, **where)

    tried = rehearse(CANDIDATES, task, support, folds, atlases, adapted, **where) if folds else None
    best = tried.best if tried else "finetune" if method == "auto" else method
    chosen = best
    notes: list[str] = []
    if best == "self_training" or (method == "auto" and best == "finetune"):
        support, notes = with_unlabelled(support, task, seed)
        if support.unlabelled:
            chosen = "self_training"
        elif method != "auto":
            found = f"no unlabelled scan that can be used ({'; '.join(notes) or 'none given'})"
            raise InputError(f"task {task.name}", found, "one or more for self-training", "Use method finetune.")
    # Self-training is longer than what was planned.
    last = _told_from(progress, rehearsed)
    segmenter = adapt_support(model, task, support, chosen, full, seed, atlases=atlases, progress=last, **where)
    card: dict[str, Any] = {"method": chosen, "seed": seed, **({} if chosen == "inner" else asdict(full))}
    card["seconds"] = round(time.monotonic() - started, 1)
    if support.unlabelled or notes:
        card["unlabelled"] = {"scans": len(support.unlabelled), "unusable": notes}
    if tried:
        card |= tried.to_card(seed)
    return replace(segmenter, card=segmenter.card | card)


def adapt(
    model: Model | Segmenter,
    images: str | Path,
    labels: str | Path,
    *,
    targets: Mapping[str, Sequence[int]] | None = None,
    modality: Literal["CT", "MR"] | None = None,
    background: Sequence[int] = (),
    unlabelled: Sequence[str | Path] = (),
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
        unlabelled: scans, folders and lists of scans to learn from too; those of `images` are passed over.
        options: as of `adapt_to`.

    Raises:
        InputError: a folder, a scan or a label map cannot be used; the message names the file.
    """
    task = support_task(
        images, labels, targets=targets, modality=modality, background=background, unlabelled=unlabelled
    )
    return adapt_to(model, task, **options)


def prepare_for(model: Model, task: Task) -> StoredTask:
    """The labelled scans of a task on the grids on which `model` is to learn from them."""
    net = model.learner.net
    return prepare_support(task, model.voxels, stride=net.stride, sliced=can_be_sliced(net))


def adapt_support(
    model: Model,
    task: Task,
    support: StoredTask,
    method: str = "finetune",
    budget: Budget = Budget(),
    seed: int = 0,
    *,
    start: Segmenter | None = None,
    atlases: int = ATLASES,
    repaint: float = 0.0,
    device: torch.device | str = "cpu",
    precision: torch.dtype = torch.float32,
    progress: Callable[[int, int, float], None] | None = None,
) -> Segmenter:
    """A segmenter from prepared scans by one method, "auto" not among them. Arguments as of `adapt_to`.

    From `OVERVIEW_FROM` steps on, an overview is learned with half of them and of the minutes, of half as many patches;
    of thick slices, `SLICE_STEPS` of them are for single slices and the rest for the volume.
    `start` is a segmenter of the same classes on the same grids to go on from: then there is one if that has one. For
    self-training it is what was fine-tuned on the labelled scans with the same budget and seed, atlases included.
    `repaint` is the share of patches whose structures each get another brightness (`draw_brightness`); self-training
    has its own.
    """
    where = Where(device=device, precision=precision)
    if method == "self_training":
        return _self_train(model, task, support, budget, seed, start, atlases, where, progress)

    def learn(view: StoredTask, part: Budget, done: int, before: Segmenter | None) -> Segmenter:
        told = _told_from(progress, done, budget.steps)
        begin = before.state if before else None
        several = len(task.labelled.patients) >= SEVERAL
        mixed = MIXED if (before or several) and support.preprocess.thick and not view.sliced else 0.0
        learner = Sliced(model.learner, view.preprocess.across) if view.sliced else model.learner
        if method == "inner":
            state = _own_rule(learner, view, seed, where)
        else:
            state = fine_tune(
                learner, view, method, part, seed, begin=begin, mixed=mixed, repaint=repaint, **where, progress=told
            )
        return make_segmenter(model, task, view, state, {})

    made = make_atlases(support, atlases)
    views = support.views
    alone = len(start.views) == 1 if start else method != "inner" and budget.steps < OVERVIEW_FROM
    if support.sliced and (alone or method == "inner"):
        # The learner's own rule knows volumes alone.
        views = views[1:]
    elif alone:
        views = views[:1]
    if len(views) == 1:
        return replace(learn(views[0], budget, 0, start), atlases=made)
    fine, coarse = views
    share, patches = (SLICE_STEPS, (SLICES, 1.0)) if support.sliced else (1 / 2, (1.0, 1 / 2))
    steps = math.ceil(share * budget.steps)

    def part(steps: int, share: float, patches: float) -> Budget:
        minutes = budget.minutes and share * budget.minutes
        return replace(budget, steps=steps, minutes=minutes, patches=max(1, int(patches * budget.patches)))

    segmenter = learn(fine, part(steps, share, patches[0]), 0, start)
    overview = learn(coarse, part(budget.steps - steps, 1 - share, patches[1]), steps, start and start.overview)
    even = support.sliced or len(task.labelled.patients) < 3
    return replace(segmenter, overview=overview, overview_share=EVEN_SHARE if even else OVERVIEW_SHARE, atlases=made)


def _told_from(
    progress: Callable[[int, int, float], None] | None, done: int, steps: int | None = None
) -> Callable[[int, int, float], None] | None:
    """Progress of a part that begins after `done` steps of `steps`; of as many as it adds itself when None."""
    return progress and (lambda step, own, loss: progress(done + step, steps or done + own, loss))


@torch.no_grad()
def _own_rule(learner: MetaLearner, support: StoredTask, seed: int, where: Where) -> State:
    """What a learner makes of patches of prepared scans by its own rule."""
    learner.to(where["device"]).eval()
    examples = for_network(learner.net, support_patches(support, seed)).to(where["device"])
    with autocast(**where):
        return {name: tensor.cpu() for name, tensor in learner.adapt(examples).items()}


def make_segmenter(model: Model, task: Task, support: StoredTask, state: State, card: dict[str, object]) -> Segmenter:
    """A segmenter for `task` from what was learned on its prepared support, its overview apart."""
    facts = {"task": task.name, "support_scans": len(support.cases), "support_terms": task.terms, **card}
    values = tuple(min(atom) for atom in task.atoms)
    single = tuple(values[label - 1] for label in one_piece([case.mask for case in support.cases], support.classes))
    return Segmenter(
        model, state, support.preprocess, dict(task.targets), values, task.channels, support.patch, facts, single
    )


def _self_train(
    model: Model,
    task: Task,
    support: StoredTask,
    budget: Budget,
    seed: int,
    start: Segmenter | None,
    atlases: int,
    where: Where,
    progress: Callable[[int, int, float], None] | None,
) -> Segmenter:
    """Fine-tune on the labelled scans, then go on in rounds, each from what the last one makes of the unlabelled scans.

    The minutes of the budget are those of all of it.

    With 1 or 2 labelled MR scans there are two networks to go on from, see `REPAINT`.

    Pseudo-labels (Lee 2013) under strong augmentation (Xie 2020, "Self-training with noisy student"). Both grids learn
    from what they make together. Every other patch of the rounds is of a labelled scan.
    """
    few = len(task.labelled.patients) < 3
    # Of CT, HU say how bright an organ is.
    starts = 1 if not few or support.preprocess.modality == "CT" else 2
    ends = [round(budget.steps * MORE * number) for number in range((FEW_ROUNDS if few else ROUNDS) + 1)]
    parts = [budget.steps] * starts + [end - before for before, end in itertools.pairwise(ends)]
    started = time.monotonic()
    carried: dict[str, Layer | None] = {}

    def learn(number: int, scans: StoredTask, before: Segmenter | None, **options: Any) -> Segmenter:
        minutes = None
        if budget.minutes is not None:
            left = budget.minutes - (time.monotonic() - started) / 60.0
            minutes = max(left * parts[number] / max(1, sum(parts[number:])), 1e-6)
        part = replace(budget, steps=parts[number], minutes=minutes)
        told = _told_from(progress, sum(parts[:number]), sum(parts))
        turn = seed + max(0, number - starts + 1)
        return adapt_support(
            model, task, scans, "finetune", part, turn, start=before, progress=told, **where, **options
        )

    tried = [start or learn(0, support, None, atlases=atlases)]
    if starts > 1:
        tried.append(replace(learn(1, support, None, atlases=0, repaint=REPAINT), atlases=tried[0].atlases))
    # Poses are for a network that knows few of them; after the first round it knows those of the unlabelled scans.
    guesses = [with_pseudo_labels(each, task, support, carried, rotations=True, **where) for each in tried]
    best = 1 if starts > 1 and guesses[1][1] > guesses[0][1] + SURER else 0
    segmenter, scans = tried[best], guesses[best][0]
    if starts > 1:
        segmenter = replace(segmenter, card=segmenter.card | {"repainted": best > 0})
    for number in range(starts, len(parts)):
        if number > starts:
            scans, _ = with_pseudo_labels(segmenter, task, support, carried, rotations=False, **where)
        made = learn(number, scans, segmenter, atlases=0, repaint=REPAINT * best)
        segmenter = replace(segmenter, state=made.state, overview=made.overview)
    if not any(layer is not None and layer.share > 0.0 for layer in carried.values()):
        segmenter = replace(segmenter, atlases=())
    return segmenter
