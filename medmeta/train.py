"""The one training loop: any learner, any episodes, killed and resumed at any moment."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypedDict

import torch
from torch import Tensor, nn

from medmeta.episode import IGNORED, Episode
from medmeta.errors import InputError
from medmeta.files import read_tensors, sweep, write_tensors


class Episodes(Protocol):
    """Anything that gives episode i."""

    def __getitem__(self, index: int) -> Episode: ...


class Learner(Protocol):
    """What the loop needs of a learner; `medmeta.learners.MetaLearner` has it, all but two as a `torch.nn.Module`."""

    def meta_loss(self, episode: Episode) -> Tensor: ...
    def query_logits(self, episode: Episode) -> Tensor: ...
    def parameters(self) -> Iterator[nn.Parameter]: ...
    def state_dict(self) -> dict[str, Tensor]: ...
    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> object: ...
    def to(self, device: torch.device | str) -> object: ...
    def train(self) -> object: ...
    def eval(self) -> object: ...
    def zero_grad(self, set_to_none: bool = True) -> None: ...


class Row(TypedDict):
    """One step of the history of a training; the Dice is None between validations."""

    phase: str
    step: int
    loss: float
    validation_dice: float | None
    rate: float
    seconds: float


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train.

    Args:
        steps: meta-steps at most.
        minutes: wall-clock minutes of training at most, over all resumed parts; None for no limit. Only a run that is
            limited by steps gives the same result again.
        rate: AdamW's step size, after a warm-up over the first 2 % and before a cosine to nothing.
        weight_decay: AdamW's.
        episodes_per_step: episodes whose gradients make one step.
        clip: largest global norm of the meta-gradient.
        validate_every: steps between validations.
        patience: training stops after so many validations in a row without a better Dice; None to train to the end.
        checkpoint_every: steps between checkpoints.
    """

    steps: int
    minutes: float | None = None
    rate: float = 1e-3
    weight_decay: float = 1e-4
    episodes_per_step: int = 2
    clip: float = 5.0
    validate_every: int = 100
    patience: int | None = None
    checkpoint_every: int = 25

    def __post_init__(self) -> None:
        if min(self.steps, self.episodes_per_step, self.validate_every, self.checkpoint_every) < 1 or self.rate <= 0:
            raise ValueError(
                f"{self}; required: steps, episodes_per_step, validate_every, checkpoint_every of 1 or more, rate > 0"
            )
        if (self.patience is not None and self.patience < 1) or (self.minutes is not None and self.minutes <= 0):
            raise ValueError(f"{self}; required: patience of 1 or more and minutes > 0, or none")

    def progress(self, step: int, seconds: float) -> float:
        """The part of the budget that is used, 0 to 1."""
        spent = 0.0 if self.minutes is None else seconds / (60.0 * self.minutes)
        return min(1.0, max(step / self.steps, spent))

    def rate_at(self, progress: float) -> float:
        """Step size after a part of the budget: linear warm-up over 2 %, then a cosine."""
        warm = min(1.0, (progress + 1e-3) / 0.02)
        return self.rate * warm * 0.5 * (1.0 + math.cos(math.pi * progress))


@dataclass
class _Run:
    """Everything a checkpoint holds, beside the learner and the optimiser."""

    step: int = 0
    seconds: float = 0.0
    best_dice: float = -1.0
    since_best: int = 0
    history: list[Row] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)

    def finished(self, schedule: Schedule) -> bool:
        """Whether the budget or the patience is used up."""
        impatient = schedule.patience is not None and self.since_best >= schedule.patience
        return impatient or schedule.progress(self.step, self.seconds) >= 1.0


def meta_train(
    learner: Learner,
    episodes: Episodes,
    schedule: Schedule,
    *,
    validation: Sequence[Episode] = (),
    phase: str = "meta",
    checkpoint: Path | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    precision: torch.dtype = torch.float32,
    log: Callable[[Row], None] | None = None,
    tensorboard: Path | None = None,
) -> list[Row]:
    """Train a learner in place on episodes; it ends with the parameters of its best validation, in evaluation mode.

    Args:
        learner: trained in place.
        episodes: episode i; step j takes the episodes j*n .. j*n+n-1.
        schedule: how long and how fast.
        validation: episodes of held-out patients; without them the last parameters are kept.
        phase: name of this part of the training, for the history.
        checkpoint: a file that is written as training goes and from which an unfinished run goes on; a finished one
            returns at once. A run that was killed and resumed equals one that was not.
        seed: seeds what is random within a step (dropout), so that a resumed run draws the same.
        device: where to train.
        precision: bfloat16 runs the networks under autocast.
        log: called with each row of the history, those of a resumed run's first part too.
        tensorboard: a folder; its subfolder `phase` gets loss, validation_dice and rate of each step as TensorBoard
            scalars, in place of the event files that lie there.

    Returns:
        The history: rows of phase, step, loss, validation_dice (None between validations), rate, seconds.

    Raises:
        InputError: the checkpoint belongs to another learner or cannot be read.
        FloatingPointError: the loss or its gradient is no longer finite; the learner is as it was before that step.
    """
    learner.to(device)
    optimiser = torch.optim.AdamW(learner.parameters(), lr=schedule.rate, weight_decay=schedule.weight_decay)
    run = _Run()
    if checkpoint is not None:
        sweep(checkpoint)
    if checkpoint is not None and checkpoint.exists():
        run = _restore(checkpoint, learner, optimiser)
        for row in run.history:
            if log:
                log(row)
    validation = [episode.to(device) for episode in validation]
    started = time.monotonic() - run.seconds
    ended = run.finished(schedule)
    with _curves(None if ended or tensorboard is None else tensorboard / phase, run) as plot:
        while not ended:
            rate = schedule.rate_at(schedule.progress(run.step, run.seconds))
            for group in optimiser.param_groups:
                group["lr"] = rate
            loss, norm = _gradient(learner, episodes, schedule, run.step, seed, device, precision)
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise FloatingPointError(
                    f"loss {loss}, gradient norm {norm} at step {run.step} of phase {phase}; required: finite ones. "
                    f"Lower the rate ({schedule.rate}) or the learner's inner rate."
                )
            optimiser.step()
            run.step += 1
            run.seconds = time.monotonic() - started
            # Decided once, before the validation: a run that ends here has been validated here.
            ended = run.finished(schedule)
            dice = None
            if validation and (run.step % schedule.validate_every == 0 or ended):
                dice = _validate(learner, validation, precision, run)
                ended = ended or run.finished(schedule)
                run.seconds = time.monotonic() - started
            seconds = round(run.seconds, 3)
            row = Row(phase=phase, step=run.step, loss=loss, validation_dice=dice, rate=rate, seconds=seconds)
            run.history.append(row)
            plot(row)
            if log:
                log(row)
            if checkpoint is not None and (run.step % schedule.checkpoint_every == 0 or ended):
                _save(checkpoint, learner, optimiser, run)
    if run.best:
        learner.load_state_dict(run.best)
    learner.eval()
    return run.history


def _gradient(
    learner: Learner,
    episodes: Episodes,
    schedule: Schedule,
    step: int,
    seed: int,
    device: torch.device | str,
    precision: torch.dtype,
) -> tuple[float, float]:
    """Leave the clipped meta-gradient of one step in `.grad`; the loss and the gradient's norm before clipping."""
    learner.train()
    learner.zero_grad(set_to_none=True)
    total = 0.0
    cuda = [torch.device(device)] if torch.device(device).type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(seed * 1_000_003 + step)
        for number in range(schedule.episodes_per_step):
            episode = episodes[step * schedule.episodes_per_step + number].to(device)
            with autocast(device, precision):
                loss = learner.meta_loss(episode) / schedule.episodes_per_step
            loss.backward()
            total += float(loss.detach())
    norm = nn.utils.clip_grad_norm_([p for p in learner.parameters() if p.grad is not None], schedule.clip)
    return total, float(norm)


def _validate(learner: Learner, episodes: Sequence[Episode], precision: torch.dtype, run: _Run) -> float:
    dice = validation_dice(learner, episodes, precision)
    run.since_best += 1
    if dice > run.best_dice:
        run.best_dice, run.since_best = dice, 0
        run.best = {name: tensor.detach().cpu().clone() for name, tensor in learner.state_dict().items()}
    return dice


@contextmanager
def _curves(folder: Path | None, run: _Run) -> Iterator[Callable[[Row], None]]:
    """What writes a row for TensorBoard; the rows before a resumption are written anew."""
    if folder is None:
        yield lambda row: None
        return
    from torch.utils.tensorboard import SummaryWriter

    # The history of the checkpoint is what happened: the part that was killed went on after it, or lost its last rows.
    for events in folder.glob("events.out.tfevents.*"):
        events.unlink(missing_ok=True)
    began = time.time() - run.seconds
    # A TensorBoard that is open forgets what it showed from step 1 on.
    with SummaryWriter(str(folder), purge_step=1) as writer:

        def plot(row: Row) -> None:
            scalars = {"loss": row["loss"], "validation_dice": row["validation_dice"], "rate": row["rate"]}
            for name, value in scalars.items():
                if value is not None:
                    writer.add_scalar(name, value, row["step"], walltime=began + row["seconds"])

        for row in run.history:
            plot(row)
        yield plot


def validation_dice(learner: Learner, episodes: Sequence[Episode], precision: torch.dtype = torch.float32) -> float:
    """Mean Dice over the classes present in the queries of some episodes, without a meta-gradient."""
    learner.eval()
    scores = []
    for episode in episodes:
        with torch.no_grad(), autocast(episode.query.image.device, precision):
            found = learner.query_logits(episode).argmax(dim=1)
        counted = episode.query.mask != IGNORED
        for label in range(1, episode.query.classes + 1):
            reference, predicted = episode.query.mask == label, (found == label) & counted
            if reference.any():
                scores.append(float(2 * (reference & predicted).sum() / (reference.sum() + predicted.sum())))
    return sum(scores) / max(1, len(scores))


def autocast(device: torch.device | str, precision: torch.dtype) -> AbstractContextManager[object]:
    """Networks in `precision` where that is below float32."""
    if precision == torch.float32:
        return nullcontext()
    return torch.autocast(torch.device(device).type, precision)


def _save(path: Path, learner: Learner, optimiser: torch.optim.Optimizer, run: _Run) -> None:
    tensors = {f"learner/{name}": tensor for name, tensor in learner.state_dict().items()}
    tensors |= {f"best/{name}": tensor for name, tensor in run.best.items()}
    for number, state in optimiser.state_dict()["state"].items():
        tensors |= {f"optimiser/{number}/{key}": value for key, value in state.items()}
    facts = {
        "step": run.step,
        "seconds": run.seconds,
        "best_dice": run.best_dice,
        "since_best": run.since_best,
        "history": run.history,
    }
    write_tensors(path, tensors, {"run": json.dumps(facts)})


def _restore(path: Path, learner: Learner, optimiser: torch.optim.Optimizer) -> _Run:
    tensors, facts = read_tensors(path)
    parts: dict[str, dict[str, Tensor]] = {"learner": {}, "best": {}, "optimiser": {}}
    try:
        for name, tensor in tensors.items():
            part, key = name.split("/", 1)
            parts[part][key] = tensor
        run = _Run(best=parts["best"], **json.loads(facts["run"]))
        learner.load_state_dict(parts["learner"])
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in parts["optimiser"].items():
            number, key = name.split("/", 1)
            # A copy lies in memory as a fresh one would, which can decide the last bit.
            moments.setdefault(int(number), {})[key] = tensor.clone()
        optimiser.load_state_dict(optimiser.state_dict() | {"state": moments})
    except (KeyError, RuntimeError, ValueError, TypeError) as error:
        raise InputError(
            path, "a checkpoint of another network or learner", "one of this run", "Name a new output folder."
        ) from error
    return run
