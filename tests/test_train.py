from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from medmeta.episode import Episode, Examples
from medmeta.errors import InputError
from medmeta.files import read_tensors, write_tensors
from medmeta.learners import build_learner
from medmeta.losses import dice_cross_entropy
from medmeta.networks import build_network
from medmeta.train import Row, Schedule, meta_train, validation_dice

SCHEDULE = Schedule(steps=20, rate=0.01, validate_every=4, checkpoint_every=3)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Blobs:
    """Episode i holds bright squares (or cubes) in noise, on other places for every i; remembers what was drawn."""

    def __init__(self, axes: int = 2, seed: int = 0) -> None:
        self.axes, self.seed, self.drawn = axes, seed, []

    def __getitem__(self, index: int) -> Episode:
        self.drawn.append(index)
        generator = torch.Generator().manual_seed(self.seed * 1000 + index)
        return Episode("blobs", *(self.examples(generator) for _ in range(2)))

    def examples(self, generator: torch.Generator) -> Examples:
        size = [8] * self.axes
        image, mask = torch.randn(2, 1, *size, generator=generator), torch.zeros(2, *size, dtype=torch.long)
        for number in range(2):
            blob = [slice(first, first + 3) for first in torch.randint(0, 5, (self.axes,), generator=generator)]
            mask[(number, *blob)] = 1
            image[(number, 0, *blob)] += 2.0
        return Examples(image, mask, 1)


class Plain(nn.Module):
    """The least the loop can train: supervised, with dropout, so that a step draws random numbers."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.layers = nn.Sequential(
                nn.Conv2d(1, 8, 3, padding=1), nn.SiLU(), nn.Dropout(0.3), nn.Conv2d(8, 2, 3, padding=1)
            )

    def query_logits(self, episode: Episode) -> Tensor:
        return self.layers(episode.query.image)

    def meta_loss(self, episode: Episode) -> Tensor:
        return dice_cross_entropy(self.query_logits(episode), episode.query.mask)


class Passing(nn.Module):
    """Moves steadily to the right; its Dice is best on the way, where the foreground ends at voxel 40 of 100."""

    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.zeros(()))

    def query_logits(self, episode: Episode) -> Tensor:
        foreground = self.place - torch.linspace(0, 1, 100).expand(1, 1, 1, 100)
        return torch.cat([torch.zeros_like(foreground), foreground], dim=1)

    def meta_loss(self, episode: Episode) -> Tensor:
        return -self.place


LINE = Examples(torch.zeros(1, 1, 1, 100), (torch.arange(100) < 40).long().reshape(1, 1, 100), 1)
PASSING = [Episode("line", LINE, LINE)]


class Stop(Exception):
    pass


def stop_at(step: int) -> Callable[[Row], None]:
    def log(row: Row) -> None:
        if row["step"] == step:
            raise Stop

    return log


class Untouchable:
    def __getitem__(self, index: int) -> Episode:
        raise AssertionError("a finished run draws no episode")


def facts(rows: list[Row]) -> list[Row]:
    """All but the clock."""
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def same(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def train(learner: nn.Module, schedule: Schedule = SCHEDULE, **options) -> list[Row]:
    options = {"validation": [Blobs(seed=1)[index] for index in range(3)]} | options
    return meta_train(learner, options.pop("episodes", Blobs()), schedule, **options)


# What training does


@pytest.mark.parametrize("name", ["maml", "fomaml", "transfer"])
def test_the_loss_falls_and_the_dice_rises(name) -> None:
    options = {"tasks": {"blobs": 1}} if name == "transfer" else {"inner_steps": 1, "inner_rate": 0.1}
    learner = build_learner(name, build_network("se_unet_3d", seed=0, channels=[4, 8], dropout=0.1), **options)
    episodes, validation = Blobs(axes=3), [Blobs(axes=3, seed=1)[index] for index in range(3)]
    before = validation_dice(learner, validation)
    schedule = Schedule(steps=40, rate=0.01, episodes_per_step=1, validate_every=10)
    rows = meta_train(learner, episodes, schedule, validation=validation, phase="learning")
    losses = [row["loss"] for row in rows]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    assert validation_dice(learner, validation) > before + 0.2
    assert {row["phase"] for row in rows} == {"learning"}
    assert [row["step"] for row in rows] == list(range(1, 41))
    assert [row["step"] for row in rows if row["validation_dice"] is not None] == [10, 20, 30, 40]
    assert [row["seconds"] for row in rows] == sorted(row["seconds"] for row in rows)
    assert not learner.training


def test_step_j_takes_the_episodes_from_j_n_on() -> None:
    episodes = Blobs()
    train(Plain(), replace(SCHEDULE, steps=3, episodes_per_step=4), episodes=episodes)
    assert episodes.drawn == list(range(12))


def test_a_step_is_adamw_on_the_clipped_mean_gradient() -> None:
    """Oracle: two steps written out."""
    schedule = Schedule(steps=10**6, rate=0.02, weight_decay=0.3, episodes_per_step=3, clip=0.05)
    ours, theirs, episodes = Plain().eval(), Plain().eval(), Blobs()
    ours.train = lambda mode=True: ours  # without dropout
    with pytest.raises(Stop):
        meta_train(ours, episodes, schedule, log=stop_at(2))
    optimiser = torch.optim.AdamW(theirs.parameters(), weight_decay=0.3)
    for step in range(2):
        optimiser.zero_grad()
        sum(theirs.meta_loss(episodes[3 * step + number]) / 3 for number in range(3)).backward()
        length = torch.cat([parameter.grad.flatten() for parameter in theirs.parameters()]).norm()
        assert length > schedule.clip
        for parameter in theirs.parameters():
            parameter.grad *= schedule.clip / length
        optimiser.param_groups[0]["lr"] = schedule.rate_at(schedule.progress(step, 0.0))
        optimiser.step()
    for found, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_the_same_again_and_the_process_left_alone() -> None:
    torch.manual_seed(5)
    before, first, second, third = torch.get_rng_state(), Plain(), Plain(), Plain()
    rows = train(first)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    assert facts(train(second)) == facts(rows)
    assert same(first, second)
    train(third, seed=1)
    assert not same(first, third), "dropout follows the seed"


def test_under_bfloat16() -> None:
    rows = train(Plain(), precision=torch.bfloat16)
    assert sum(row["loss"] for row in rows[-5:]) < sum(row["loss"] for row in rows[:5])


def test_the_rate_warms_up_and_falls_to_nothing() -> None:
    schedule = Schedule(steps=1000, rate=0.5)
    rates = [schedule.rate_at(schedule.progress(step, 0.0)) for step in range(1001)]
    top = rates.index(max(rates))
    assert 0 < rates[0] < 0.05
    assert 10 <= top <= 25
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert 0.49 < rates[top] <= 0.5
    assert rates[-1] == pytest.approx(0)
    assert replace(schedule, minutes=2).progress(100, 60.0) == 0.5
    assert replace(schedule, minutes=2).progress(900, 60.0) == 0.9


@pytest.mark.parametrize(
    "wrong", ["steps", "rate", "checkpoint_every", "validate_every", "episodes_per_step", "patience", "minutes"]
)
def test_refuses_a_schedule_that_goes_nowhere(wrong) -> None:
    with pytest.raises(ValueError, match="required"):
        Schedule(**{"steps": 1} | {wrong: 0})


# Validation


def test_validation_dice_against_counting() -> None:
    class Known(nn.Module):
        def query_logits(self, episode: Episode) -> Tensor:
            assert not torch.is_grad_enabled() and not self.training
            return nn.functional.one_hot(episode.query.image[:, 0].long(), 4).movedim(-1, 1).float()

    predicted = torch.tensor([[[1, 1, 1, 2, 0, 0]], [[3, 3, 1, 0, 2, 2]]])
    reference = torch.tensor([[[1, 1, 0, 0, -1, 2]], [[0, -1, -1, 1, 2, 2]]])
    known = Examples(predicted.float().unsqueeze(1), reference, 3)
    # Class 1: predicted 3 of the voxels that count, referenced 3, both 2. Class 2: 3, 3, 2. Class 3 is absent.
    assert validation_dice(Known(), [Episode("known", known, known)]) == pytest.approx((4 / 6 + 4 / 6) / 2)
    nothing = replace(known, mask=torch.zeros_like(reference))
    assert validation_dice(Known(), [Episode("nothing", nothing, nothing)]) == 0.0


def test_the_best_validation_is_kept(tmp_path) -> None:
    learner = Passing()
    schedule = Schedule(steps=60, rate=0.03, validate_every=5, weight_decay=0.0)
    at: dict[int, float] = {}
    rows = meta_train(
        learner, Blobs(), schedule, validation=PASSING, log=lambda row: at.update({row["step"]: learner.place.item()})
    )
    dice = {row["step"]: row["validation_dice"] for row in rows if row["validation_dice"] is not None}
    best = max(dice, key=dice.get)
    assert 5 < best < 60
    assert dice[60] < dice[best]
    assert learner.place.item() == at[best]
    assert validation_dice(learner, PASSING) == dice[best]
    resumed, options = Passing(), {"validation": PASSING, "checkpoint": tmp_path / "checkpoint.safetensors"}
    with pytest.raises(Stop):
        meta_train(resumed, Blobs(), replace(schedule, checkpoint_every=1), log=stop_at(best + 8), **options)
    meta_train(resumed, Blobs(), schedule, **options)
    assert same(learner, resumed), "the best was found before the interruption"


def test_without_validation_the_last_is_kept() -> None:
    learner, last = Passing(), []
    meta_train(learner, Blobs(), SCHEDULE, log=lambda row: last.append(learner.place.item()))
    assert learner.place.item() == last[-1]


@pytest.mark.parametrize("patience", [1, 3])
def test_stops_early_and_says_so_in_the_checkpoint(tmp_path, patience) -> None:
    learner, again, place = Passing(), Passing(), tmp_path / "checkpoint.safetensors"
    schedule = Schedule(
        steps=60, rate=0.03, validate_every=5, patience=patience, checkpoint_every=1000, weight_decay=0.0
    )
    rows = meta_train(learner, Blobs(), schedule, validation=PASSING, checkpoint=place)
    dice = [row["validation_dice"] for row in rows if row["validation_dice"] is not None]
    assert dice.index(max(dice)) == len(dice) - 1 - patience
    assert len(rows) < 60
    assert meta_train(again, Untouchable(), schedule, validation=PASSING, checkpoint=place) == rows
    assert same(learner, again)


def test_a_budget_of_minutes(tmp_path) -> None:
    learner, again, place = Plain(), Plain(), tmp_path / "checkpoint.safetensors"
    schedule = replace(SCHEDULE, steps=10**9, minutes=0.3 / 60, checkpoint_every=10**9, validate_every=10**9)
    rows = train(learner, schedule, checkpoint=place)
    assert rows[-1]["seconds"] >= 0.3
    assert rows[-2]["seconds"] <= 0.3
    assert [row["step"] for row in rows if row["validation_dice"] is not None] == [len(rows)]
    assert rows[-1]["rate"] < 0.5 * max(row["rate"] for row in rows)
    assert train(again, schedule, checkpoint=place, episodes=Untouchable()) == rows
    assert same(learner, again)


# Going on after a kill


@pytest.mark.parametrize("patience", [None, 2])
def test_a_run_with_accidents_equals_one_without(tmp_path, patience) -> None:
    """Accidents where a row is written and where an episode is drawn, before and after the first checkpoint."""

    class Failing(Blobs):
        def __getitem__(self, index: int) -> Episode:
            if index == 2 * 13 + 1:
                raise Stop
            return super().__getitem__(index)

    schedule = replace(SCHEDULE, patience=patience)
    whole, resumed, place = Plain(), Plain(seed=1), tmp_path / "run" / "checkpoint.safetensors"
    expected = train(whole, schedule)
    for options in ({"log": stop_at(2)}, {"log": stop_at(8)}, {"log": stop_at(9)}, {"episodes": Failing()}):
        with pytest.raises(Stop):
            train(Plain(), schedule, checkpoint=place, **options)
        torch.rand(3)
    told: list[Row] = []
    rows = train(resumed, schedule, checkpoint=place, log=told.append)
    assert facts(rows) == facts(expected)
    assert told == rows
    assert same(whole, resumed)
    assert [file.name for file in place.parent.iterdir()] == [place.name]


def test_a_meta_learner_with_dropout_resumes_to_the_bit(tmp_path) -> None:
    def learner(seed: int) -> nn.Module:
        net = build_network("se_unet_3d", seed=seed, channels=[4, 8], dropout=0.3)
        return build_learner("maml", net, inner_steps=2, inner_rate=0.1)

    options = {"validation": [Blobs(axes=3, seed=1)[0]], "checkpoint": tmp_path / "checkpoint.safetensors"}
    schedule = Schedule(steps=8, validate_every=2, checkpoint_every=3, episodes_per_step=1)
    whole, resumed = learner(0), learner(1)
    expected = meta_train(whole, Blobs(axes=3), schedule, validation=options["validation"])
    with pytest.raises(Stop):
        meta_train(learner(0), Blobs(axes=3), schedule, log=stop_at(5), **options)
    assert facts(meta_train(resumed, Blobs(axes=3), schedule, **options)) == facts(expected)
    assert same(whole, resumed)


def test_a_finished_run_returns_at_once(tmp_path) -> None:
    learner, again, place = Plain(), Plain(seed=1), tmp_path / "checkpoint.safetensors"
    rows = train(learner, checkpoint=place)
    before, told = place.read_bytes(), []
    assert train(again, checkpoint=place, episodes=Untouchable(), log=told.append) == rows == told
    assert same(learner, again)
    assert place.read_bytes() == before
    assert not again.training


def train_until_killed(folder: Path, seed: int) -> None:
    """Run by `test_killed_at_any_moment` in a process of its own: three attempts, each killed at a random moment.

    Each attempt is a fork, so that torch is imported once. It tells of each step through a pipe.
    """

    def tell(row: Row) -> None:
        os.write(writer, f"{row['step']}\n".encode())
        if row["step"] == SCHEDULE.steps - 1:
            time.sleep(60)  # never finished, however late the kill

    torch.set_num_threads(1)
    moments = random.Random(seed)
    schedule = replace(SCHEDULE, checkpoint_every=1)
    for last in sorted(moments.sample(range(2, SCHEDULE.steps - 2), 3)):
        reader, writer = os.pipe()
        attempt = os.fork()
        if attempt == 0:
            try:
                train(
                    Plain(),
                    schedule,
                    checkpoint=folder / "checkpoint.safetensors",
                    tensorboard=folder / "curves",
                    log=tell,
                )
            finally:
                os._exit(1)
        os.close(writer)
        with os.fdopen(reader) as steps:
            for step in steps:
                if int(step) >= last:
                    # Within the checkpoint or the next step, which take a few milliseconds each.
                    time.sleep(moments.uniform(0, 0.01))
                    os.kill(attempt, signal.SIGKILL)
                    break
        _, status = os.waitpid(attempt, 0)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_killed_at_any_moment(tmp_path) -> None:
    code = "import sys, pathlib, test_train; test_train.train_until_killed(pathlib.Path(sys.argv[1]), int(sys.argv[2]))"
    seed = random.randrange(10**6)
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), str(seed)], cwd=Path(__file__).parent, check=True, timeout=120
    )
    whole, resumed, place = Plain(), Plain(seed=1), tmp_path / "checkpoint.safetensors"
    assert 1 < json.loads(read_tensors(place)[1]["run"])["step"] < SCHEDULE.steps, f"seed {seed}: killed too late"
    schedule = replace(SCHEDULE, checkpoint_every=1)
    rows = train(resumed, schedule, checkpoint=place, tensorboard=tmp_path / "curves")
    assert facts(rows) == facts(train(whole, schedule)), f"seed {seed}"
    assert same(whole, resumed), f"seed {seed}"
    assert {file.name for file in tmp_path.iterdir()} == {place.name, "curves"}, "what killed writers left is swept"
    assert read_curves(tmp_path / "curves" / "meta") == curves_of(rows), f"seed {seed}"


@pytest.mark.parametrize("foreign", ["another learner", "other shapes", "other tensors", "no facts", "damaged"])
def test_a_foreign_checkpoint(tmp_path, foreign) -> None:
    place = tmp_path / "checkpoint.safetensors"
    train(Passing() if foreign == "another learner" else Plain(), checkpoint=place, validation=())
    tensors, told = read_tensors(place)
    if foreign == "other shapes":
        write_tensors(place, tensors | {"learner/layers.0.weight": torch.zeros(8, 1, 5, 5)}, told)
    elif foreign == "other tensors":
        write_tensors(place, {"weight": torch.zeros(3)}, told)
    elif foreign == "no facts":
        write_tensors(place, tensors)
    elif foreign == "damaged":
        place.write_bytes(place.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"checkpoint\.safetensors: found .* required: ") as caught:
        train(Plain(), checkpoint=place)
    assert "\n" not in str(caught.value)


# Going wrong


@pytest.mark.parametrize("wrong", ["loss", "gradient"])
def test_what_is_not_finite_stops_before_it_does_harm(tmp_path, wrong) -> None:
    class Diverging(Plain):
        def meta_loss(self, episode: Episode) -> Tensor:
            loss = super().meta_loss(episode)
            if not bad:
                return loss
            if wrong == "loss":
                return loss * math.nan
            return loss + (0.0 * loss.detach() * self.layers[0].weight.sum()).sqrt()  # 0, with an infinite slope

    bad: list[int] = []
    learner, place = Diverging(), tmp_path / "checkpoint.safetensors"
    with pytest.raises(FloatingPointError, match=r"at step 7 of phase first; required: .* Lower the rate \(0.01\)"):
        train(learner, checkpoint=place, phase="first", log=lambda row: bad.append(1) if row["step"] == 7 else None)
    assert all(parameter.isfinite().all() for parameter in learner.parameters())
    bad.clear()
    rows = train(learner, checkpoint=place)
    assert len(rows) == SCHEDULE.steps
    assert facts(rows[6:]) == facts(train(Plain())[6:])


# TensorBoard


def read_curves(folder: Path) -> dict[str, dict[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    found = {}
    for name in events.Tags()["scalars"]:
        scalars = events.Scalars(name)
        assert [scalar.step for scalar in scalars] == sorted({scalar.step for scalar in scalars}), "a step twice"
        found[name] = {scalar.step: scalar.value for scalar in scalars}
    return found


def curves_of(rows: list[Row]) -> dict[str, dict[int, float]]:
    return {
        name: {row["step"]: pytest.approx(row[name], rel=1e-6) for row in rows if row[name] is not None}
        for name in ("loss", "validation_dice", "rate")
    }


def test_tensorboard_shows_the_history_and_nothing_else(tmp_path) -> None:
    """Also after an interruption between two checkpoints, whose rows never happened."""
    place, curves = tmp_path / "checkpoint.safetensors", tmp_path / "curves"
    with pytest.raises(Stop):
        train(Plain(seed=1), tensorboard=curves, phase="first", log=stop_at(2))
    with pytest.raises(Stop):
        train(Plain(), checkpoint=place, tensorboard=curves, phase="first", log=stop_at(11))
    rows = train(Plain(), checkpoint=place, tensorboard=curves, phase="first")
    files = sorted(curves.rglob("events*"))
    assert len(files) == 1
    train(Plain(), checkpoint=place, tensorboard=curves, phase="first")
    assert sorted(curves.rglob("events*")) == files, "a finished run writes no curves again"
    other = train(Plain(seed=1), tensorboard=curves, phase="second", validation=())
    assert read_curves(curves / "first") == curves_of(rows)
    assert read_curves(curves / "second") == {
        name: points for name, points in curves_of(other).items() if name != "validation_dice"
    }
