"""From organ tasks to a meta-learned model: phases of training, each kept on disk and picked up where it stopped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from medmeta.data.manifests import find_manifest
from medmeta.data.preprocess import Preprocess
from medmeta.data.sampler import EpisodeSampler
from medmeta.data.store import Store, StoredTask, fit_preprocess
from medmeta.data.tasks import Task, load_task, split_patients
from medmeta.episode import Episode
from medmeta.errors import InputError
from medmeta.files import read_json, write_json
from medmeta.learners import LEARNERS, MetaLearner, Transfer, build_learner
from medmeta.networks import SegNet, build_network
from medmeta.segmenter import Model
from medmeta.train import Episodes, Row, Schedule, meta_train


@dataclass(frozen=True)
class TaskSource:
    """Where a task lies and what of it is used.

    Args:
        path: a Decathlon or nnU-Net folder below the data root, or the name of a manifest in `data_manifests/` with
            ".yaml", whose folder lies below the data root.
        name: another name than its own.
        organ: another organ than its own.
        targets: structure -> label values; every label of the set when None.
        ignored: label values that count neither as background nor as a target.
        patient_pattern: regular expression whose group gives the patient of a case id.
        cases: use the first so many patients only.
    """

    path: str
    name: str | None = None
    organ: str | None = None
    targets: dict[str, tuple[int, ...]] | None = None
    ignored: tuple[int, ...] = ()
    patient_pattern: str | None = None
    cases: int | None = None

    def load(self, root: Path) -> Task:
        """The task, from below `root`."""
        manifest = self.path.endswith(".yaml")
        task = load_task(
            find_manifest(self.path.removesuffix(".yaml")) if manifest else root / self.path,
            root=root if manifest else None,
            targets=self.targets,
            ignored=self.ignored,
            patient_pattern=self.patient_pattern,
            name=self.name,
            organ=self.organ,
        )
        return task if self.cases is None else task.of_patients(task.patients[: self.cases])


@dataclass(frozen=True)
class EpisodeSettings:
    """How episodes are drawn; the words are those of `EpisodeSampler`."""

    shots: int = 2
    queries: int = 2
    ways: int | None = None
    mirror: bool = False
    augment: bool = True


@dataclass(frozen=True)
class Phase:
    """One part of the training.

    Args:
        name: its name in histories and pictures.
        learner: a name of `LEARNERS`.
        schedule: how long and how fast.
        options: the learner's.
        episodes: how its episodes are drawn.
    """

    name: str
    learner: str
    schedule: Schedule
    options: dict[str, Any] = field(default_factory=dict)
    episodes: EpisodeSettings = EpisodeSettings()


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what a model becomes.

    Args:
        tasks: training tasks.
        phases: one after the other; each starts from the network of the one before.
        network: {"name", "options"} as `build_network` takes them.
        voxels: patch budget in voxels.
        seed: of the network, the splits and the episodes.
        validation_share: share of each task's patients that is held out for validation, at least 2 patients.
        validation_episodes: fixed episodes among them.
        precision: "float32" or "bfloat16".
        overviews: train on the overview of each task too, where it has one (`Preprocess.overview`).
    """

    tasks: tuple[Task, ...]
    phases: tuple[Phase, ...]
    network: dict[str, Any]
    voxels: int = 48**3
    seed: int = 0
    validation_share: float = 0.2
    validation_episodes: int = 24
    precision: str = "float32"
    overviews: bool = False

    def key(self, phases: int) -> str:
        """A digest of what decides the result of the first `phases` phases."""
        facts = {
            "tasks": [[task.name, task.atoms, task.ignored, [case.id for case in task.cases]] for task in self.tasks],
            "phases": [asdict(phase) for phase in self.phases[:phases]],
            "settings": [self.network, self.voxels, self.seed, self.precision],
            "validation": [self.validation_share, self.validation_episodes],
        }
        if self.overviews:
            facts["overviews"] = True
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]


Progress = Callable[[str, int, int], None]
"""Called with (what, done, total)."""


def train_recipe(
    recipe: Recipe,
    folder: Path,
    *,
    prepared: Prepared | None = None,
    device: torch.device | str = "cpu",
    tensorboard: bool = False,
    progress: Progress | None = None,
    log: Callable[[Row], None] | None = None,
) -> tuple[Model, list[Row]]:
    """Train a model, phase after phase, in `folder`; what is there already is not done again.

    Args:
        recipe: what to do.
        folder: gets `store/` (prepared scans) and `phases/` (checkpoints); recipes that begin alike share both.
        prepared: what `prepare_tasks` made of a recipe that differs in its phases only; made here when None.
        device: where to train.
        tensorboard: write the curves to `tensorboard/` too.
        progress: told how the preparation of scans goes.
        log: called with each row of the history.

    Returns:
        The model and the history of all phases.

    Raises:
        InputError: no phase, an unknown learner, a task with too few patients, a file that cannot be used.
    """
    if not recipe.phases:
        raise InputError("phases", "none", "at least one phase of training")
    for number, phase in enumerate(recipe.phases):
        if phase.learner not in LEARNERS:
            raise InputError(f"phase {phase.name}", f"learner {phase.learner!r}", f"one of {sorted(LEARNERS)}")
        if LEARNERS[phase.learner].pretrained and number == 0:
            raise InputError(
                f"phase {phase.name}",
                f"{phase.learner} as the first phase",
                "a body that was trained before",
                "Put a phase of multi-task pre-training (learner: transfer) in front of it.",
            )
    net = build_network(recipe.network["name"], **recipe.network.get("options", {}), seed=recipe.seed)
    for phase in recipe.phases:
        # A wrong option is known now, not after the scans are prepared.
        build_learner(phase.learner, net, **phase.options)
    training, held_out = prepared or prepare_tasks(recipe, folder, progress)
    precision = torch.bfloat16 if recipe.precision == "bfloat16" else torch.float32
    learner = _next_learner(recipe.phases[0], net, None, training)
    history: list[Row] = []
    for number, phase in enumerate(recipe.phases):
        if number > 0:
            learner = _next_learner(phase, net, learner, training)
        sampler = _sampler(recipe, number, training)
        settings = asdict(phase.episodes) | {"augment": False, "mirror": False}
        checks = EpisodeSampler(held_out, **settings, seed=recipe.seed + 7919)
        validation = [_Slices.of(net, checks)[index] for index in range(recipe.validation_episodes)]
        place = folder / "phases" / f"{number + 1}-{phase.name}-{recipe.key(number + 1)}"
        _list_episodes(sampler, phase.schedule, place / "episodes.json")
        rows = meta_train(
            learner,
            _Slices.of(net, sampler),
            phase.schedule,
            validation=validation,
            phase=phase.name,
            checkpoint=place / "checkpoint.safetensors",
            seed=recipe.seed,
            device=device,
            precision=precision,
            tensorboard=folder / "tensorboard" if tensorboard else None,
            log=log,
        )
        write_json(place / "history.json", rows)
        history.extend(rows)
    learner = learner.cpu().eval()
    return Model(learner, recipe.voxels, _card(recipe, history)), history


def phase_episodes(recipe: Recipe, number: int, training: Sequence[StoredTask]) -> Episodes:
    """The training episodes of phase `number` (from 0), as `train_recipe` draws them from prepared scans."""
    net = build_network(recipe.network["name"], **recipe.network.get("options", {}), seed=recipe.seed)
    return _Slices.of(net, _sampler(recipe, number, training))


def _sampler(recipe: Recipe, number: int, training: Sequence[StoredTask]) -> EpisodeSampler:
    return EpisodeSampler(training, **asdict(recipe.phases[number].episodes), seed=recipe.seed + number)


def _list_episodes(sampler: EpisodeSampler, schedule: Schedule, path: Path) -> None:
    """Write down which scans, classes and flips every episode of a phase is made of, before it begins."""
    # A phase that the clock ends has no last episode.
    if schedule.minutes is not None:
        return
    count = schedule.steps * schedule.episodes_per_step
    if path.exists():
        if read_json(path)[:1] == json.loads(json.dumps([asdict(sampler.plan(0))])):
            return
        raise InputError(path, "other episodes than this recipe draws", "the data it began with", "Name a new folder.")
    write_json(path, [asdict(sampler.plan(index)) for index in range(count)])


@dataclass(frozen=True)
class _Slices:
    """Episodes of axial slices for a 2-D network."""

    episodes: EpisodeSampler

    @staticmethod
    def of(net: SegNet, episodes: EpisodeSampler) -> EpisodeSampler | _Slices:
        return episodes if net.spatial_dims == 3 else _Slices(episodes)

    def __getitem__(self, index: int) -> Episode:
        episode = self.episodes[index]
        return replace(episode, support=episode.support.slices(), query=episode.query.slices())


class Prepared(NamedTuple):
    """The tasks of a recipe on their working grids."""

    training: list[StoredTask]
    held_out: list[StoredTask]


def prepare_tasks(recipe: Recipe, folder: Path, progress: Progress | None = None) -> Prepared:
    """Split the patients of every task and prepare their scans in `folder`/store. Errors as of `train_recipe`."""
    shelves = Store(folder / "store")
    training: list[StoredTask] = []
    held_out: list[StoredTask] = []
    for task in recipe.tasks:
        patients = len(task.labelled.patients)
        count = max(2, round(recipe.validation_share * patients))
        if patients - count < 2:
            raise InputError(
                f"task {task.name}", f"{patients} labelled patients", "at least 4: 2 to train on, 2 to validate on"
            )
        whole = _split(task, count, recipe.seed)
        # Fitted on training patients only.
        preprocess = fit_preprocess(whole[0])
        told = None if progress is None else partial(progress, task.name)

        def on(grid: Preprocess, whole: tuple[Task, Task] = whole, told: Any = told) -> None:
            for part, target in zip(whole, (training, held_out), strict=True):
                target.append(shelves.task(part, grid, voxels=recipe.voxels, progress=told))
            # One patch for a task, whichever patients it is drawn from.
            held_out[-1] = replace(held_out[-1], patch=training[-1].patch)

        on(preprocess)
        coarse = preprocess.overview(training[-1].patch, [case.mask.shape for case in training[-1].cases])
        if recipe.overviews and coarse is not None:
            on(coarse)
    return Prepared(training, held_out)


def _split(task: Task, held_out: int, seed: int) -> tuple[Task, Task]:
    labelled = task.labelled
    trained_on, validated_on = split_patients(labelled, [len(labelled.patients) - held_out, held_out], seed)
    return trained_on, validated_on


def _next_learner(phase: Phase, net: SegNet, before: MetaLearner | None, tasks: Sequence[StoredTask]) -> MetaLearner:
    options = dict(phase.options)
    joint = issubclass(LEARNERS[phase.learner], Transfer)
    if joint:
        options["tasks"] = {task.name: task.classes for task in tasks}
    elif isinstance(before, Transfer):
        # A meta-learner starts with a head that already tells organs from background.
        before.settle_head()
    learner = build_learner(phase.learner, net, **options)
    if before is not None and (before.name == learner.name or (joint and isinstance(before, Transfer))):
        learner.load_state_dict(before.state_dict())
    return learner


def _card(recipe: Recipe, history: Sequence[Row]) -> dict[str, Any]:
    return {
        "training_tasks": [
            {
                "name": task.name,
                "organ": task.organ,
                "modality": task.modality,
                "channels": task.channels,
                "targets": task.targets,
                "ignored": task.ignored,
                "patients": len(task.labelled.patients),
                "terms": task.terms,
                "reference": task.reference,
            }
            for task in recipe.tasks
        ],
        "phases": [asdict(phase) for phase in recipe.phases],
        "seed": recipe.seed,
        "precision": recipe.precision,
        "steps": len(history),
        "seconds": {
            phase.name: max((row["seconds"] for row in history if row["phase"] == phase.name), default=0.0)
            for phase in recipe.phases
        },
    }


def untrained(recipe: Recipe) -> Model:
    """The same network, never trained: what adapting from scratch sets out from."""
    net = build_network(recipe.network["name"], **recipe.network.get("options", {}), seed=recipe.seed)
    return Model(build_learner("scratch", net).eval(), recipe.voxels, {"training_tasks": [], "seed": recipe.seed})
