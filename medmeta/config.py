"""Experiments as YAML: typed, every key known, errors that name the key."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from medmeta.benchmark import Trial
from medmeta.data.tasks import Task
from medmeta.errors import InputError
from medmeta.learners import LEARNERS, Scratch, Transfer
from medmeta.recipe import EpisodeSettings, Phase, Recipe, TaskSource
from medmeta.train import Schedule


class NetworkConfig(BaseModel):
    """A network of `medmeta.networks.NETWORKS` and its options."""

    model_config = ConfigDict(extra="forbid")

    name: str = "se_unet_3d"
    options: dict[str, Any] = Field(default_factory=dict)


class TrainConfig(BaseModel):
    """What `medmeta train` reads; the words are those of `Recipe`.

    Args:
        data: folder below which the tasks lie, relative to the config file.
        tasks: training tasks.
        phases: parts of the training.
    """

    model_config = ConfigDict(extra="forbid")

    data: Path
    tasks: tuple[TaskSource, ...]
    phases: tuple[Phase, ...]
    network: NetworkConfig = NetworkConfig()
    voxels: int = Field(default=48**3, ge=16**3)
    seed: int = 0
    validation_share: float = Field(default=0.2, gt=0, lt=1)
    validation_episodes: int = Field(default=24, ge=1)
    precision: Literal["float32", "bfloat16"] = "float32"
    overviews: bool = False

    def recipe(self, phases: tuple[Phase, ...] | None = None) -> Recipe:
        """The recipe, with its tasks read; `phases` instead of the config's own where given."""
        return Recipe(
            tasks=tuple(source.load(self.data) for source in self.tasks),
            phases=self.phases if phases is None else phases,
            network=self.network.model_dump(),
            voxels=self.voxels,
            seed=self.seed,
            validation_share=self.validation_share,
            validation_episodes=self.validation_episodes,
            precision=self.precision,
            overviews=self.overviews,
        )


class MetaPhase(BaseModel):
    """A phase of training that every learner of a benchmark goes through."""

    model_config = ConfigDict(extra="forbid")

    name: str = "meta"
    schedule: Schedule
    episodes: EpisodeSettings = EpisodeSettings()


class BenchmarkConfig(TrainConfig):
    """What `medmeta benchmark` reads: training, and a task that is held out of it.

    Args:
        held_out: the task to adapt to.
        learners: learner -> its options; each is an arm: `phases` first, which all share, then the same `meta` phase
            with this learner. The joint baselines (transfer, linear) go on with all classes of a task in that phase,
            since they have an output convolution for each; scratch is the network as it was initialised.
        meta: that last phase.
        arms: other arms, name -> phases, in full; no phase is the network as it was initialised. Arms that begin alike
            share that part of the training.
        trial: shots, ways to adapt, lengths, draws.
    """

    held_out: TaskSource
    phases: tuple[Phase, ...] = ()
    learners: dict[str, dict[str, Any] | None] = Field(default_factory=dict)
    meta: MetaPhase | None = None
    arms: dict[str, tuple[Phase, ...]] = Field(default_factory=dict)
    trial: Trial = Trial()

    def plans(self) -> dict[str, Recipe]:
        """The recipe of each arm, with its tasks read.

        Raises:
            InputError: no arm, an unknown learner, `learners` without `meta`, or one name for two arms.
        """
        arms = {name: self._phases_of(name, options or {}) for name, options in self.learners.items()}
        twice = sorted(arms.keys() & self.arms.keys())
        if twice or not (arms or self.arms):
            found = f"{twice[0]} in both" if twice else "neither"
            raise InputError("learners and arms", found, "one or more arms, each with a name of its own")
        return {name: self.recipe(phases) for name, phases in {**arms, **self.arms}.items()}

    def _phases_of(self, name: str, options: dict[str, Any]) -> tuple[Phase, ...]:
        if name not in LEARNERS:
            raise InputError(f"learners.{name}", "no such learner", f"one of {sorted(LEARNERS)}")
        if LEARNERS[name] is Scratch:
            if options:
                raise InputError("learners.scratch", f"options {options}", "none: it is never trained")
            return ()
        if self.meta is None:
            raise InputError("meta", "nothing", "episodes and schedule of the phase in which the learners train")
        episodes = self.meta.episodes
        if issubclass(LEARNERS[name], Transfer):
            episodes = replace(episodes, ways=None, mirror=False)
        return (*self.phases, Phase(self.meta.name, name, self.meta.schedule, options, episodes))

    def held_out_task(self) -> Task:
        """The held-out task.

        Raises:
            InputError: it is also a training task, or shares its organ with one.
        """
        task = self.held_out.load(self.data)
        for source in self.tasks:
            if source.path == self.held_out.path or source.load(self.data).organ == task.organ:
                found = f"{source.path} with the organ {task.organ!r} in `tasks` too"
                raise InputError("held_out", found, "a set and an organ that are not trained on", "Take it out.")
        return task


def load_config(kind: type[TrainConfig], path: str | Path, changes: Sequence[str] = ()) -> Any:
    """Read a config.

    Args:
        kind: `TrainConfig` or `BenchmarkConfig`.
        path: YAML file.
        changes: `key=value` with dots into sub-keys (`phases.0.schedule.steps=50`); values are YAML.

    Raises:
        InputError: unreadable, an unknown key, or a value that does not fit; the message names the key.
    """
    path = Path(path)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(path, "no such file", "a YAML config", "configs/ holds examples.") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(path, f"unreadable YAML ({error})", "a YAML config") from error
    if not isinstance(values, dict):
        raise InputError(path, f"{type(values).__name__}", "keys and values")
    for change in changes:
        _change(values, change)
    try:
        config = kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "the whole"
        known = ", ".join(kind.model_fields)
        hint = f"Known keys at the top: {known}." if first["type"] == "extra_forbidden" else ""
        raise InputError(f"{path}: {key}", repr(first.get("input"))[:80], first["msg"], hint) from error
    except (ValueError, TypeError) as error:
        raise InputError(path, str(error), "values that fit") from error
    config.data = (path.parent / config.data).resolve() if not config.data.is_absolute() else config.data
    return config


def _change(values: dict[str, Any], change: str) -> None:
    key, equals, text = change.partition("=")
    if not equals or not key:
        raise InputError(f"--set {change}", "no key=value", "for example seed=1")
    place: Any = values
    *path, last = key.split(".")
    for part in path:
        if isinstance(place, dict):
            place = place.setdefault(part, {})
        elif isinstance(place, list) and part.isdigit() and int(part) < len(place):
            place = place[int(part)]
        else:
            raise InputError(f"--set {change}", f"no key {part!r}", "a path of keys and list positions")
    if isinstance(place, dict):
        place[last] = yaml.safe_load(text)
    elif isinstance(place, list) and last.isdigit() and int(last) < len(place):
        place[int(last)] = yaml.safe_load(text)
    else:
        raise InputError(f"--set {change}", f"no key {last!r}", "a path of keys and list positions")
