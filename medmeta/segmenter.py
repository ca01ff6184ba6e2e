"""Models: what `train` makes, what `adapt` makes, and the folder either lives in."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from medmeta.data.preprocess import Preprocess
from medmeta.data.volume import Volume
from medmeta.episode import State
from medmeta.errors import InputError
from medmeta.files import read_json, read_tensors, refuse_existing, replacing_folder, write_json, write_tensors
from medmeta.inference import (
    Band,
    Layer,
    Predictor,
    blend,
    collect,
    context_rows,
    index_map,
    restore_labels,
    seen_by,
    sliding_bands,
    timed,
    torch_predictor,
)
from medmeta.learners import MetaLearner, build_learner
from medmeta.learners.sliced import Sliced
from medmeta.networks import build_network
from medmeta.postprocess import Certainty, keep_largest
from medmeta.registration import Atlas, carry_labels
from medmeta.representation import segmentation_html, segmentation_line, segmenter_html, segmenter_line
from medmeta.rotation import can_turn, rotate, surest_poses

FORMAT = 1
WEIGHTS, STATE, DESCRIPTION = "weights.safetensors", "state.safetensors", "model.json"
OVERVIEW, ATLAS_FILE = "overview.safetensors", "atlases.safetensors"


@dataclass
class Model:
    """A meta-learned network, ready to be adapted.

    Args:
        learner: what was trained.
        voxels: patch budget in voxels it was trained with.
        card: what it was trained on, under which terms, and how long.
    """

    learner: MetaLearner
    voxels: int
    card: dict[str, Any] = field(default_factory=dict)

    def save(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Write the model folder. Raises InputError where something stands already; `overwrite` replaces a model."""
        _write(folder, self._description("meta-learned"), {WEIGHTS: self.learner.state_dict()}, overwrite)

    def _description(self, kind: str) -> dict[str, Any]:
        return {
            "kind": kind,
            "network": self.learner.net.spec,
            "learner": {"name": self.learner.name, "options": self.learner.options},
            "voxels": self.voxels,
            "card": self.card,
        }


@dataclass(frozen=True, eq=False)
class Segmentation(Volume):
    """A label map (1, X, Y, Z) that says how sure it is.

    Args:
        certainty: structure -> the Dice with the truth that the network's own probabilities expect, 0 to 1. It is an
            estimate, to find the scans to look at first.
    """

    certainty: dict[str, float] = field(default_factory=dict)

    @property
    def quality(self) -> float | None:
        """Mean certainty over the structures."""
        return sum(self.certainty.values()) / len(self.certainty) if self.certainty else None

    def __repr__(self) -> str:
        return f"Segmentation({segmentation_line(self)})"

    def _repr_html_(self) -> str:
        return segmentation_html(self)


@dataclass
class Segmenter:
    """A network adapted to one task: scan in, label map on exactly the scan's grid out.

    Args:
        model: what it was adapted from; adapting a segmenter again starts there.
        state: what was learned from the support scans.
        preprocess: how a scan comes onto the working grid, and back.
        targets: structure -> label values.
        labels: the label value written for class 1, 2, ...
        channels: names of the image channels it expects.
        patch: window of the sliding window, in working voxels.
        card: the support scans' number and how they were learned from.
        single: label values of structures that were one piece in every support scan: of each the largest piece is kept.
        overview: a segmenter of the same classes on a coarser grid, whose windows show more of the scan; its
            probabilities are mixed into those of this one (`blend`).
        overview_share: their weight, 0 to 1.
        best_dice: labels are those whose expected Dice is best (`Certainty`); otherwise the most probable class.
        atlases: labelled scans, coarse, whose labels are carried to a scan by registration of the first channel, where
            that goes well (`carry_labels`).
    """

    model: Model
    state: State
    preprocess: Preprocess
    targets: dict[str, tuple[int, ...]]
    labels: tuple[int, ...]
    channels: tuple[str, ...]
    patch: tuple[int, int, int]
    card: dict[str, Any] = field(default_factory=dict)
    single: tuple[int, ...] = ()
    overview: Segmenter | None = None
    overview_share: float = 0.5
    best_dice: bool = True
    atlases: tuple[Atlas, ...] = ()

    @property
    def learner(self) -> MetaLearner:
        """What runs on its windows: that of the model, or its 2-D counterpart where single slices were learned from."""
        learner = self.model.learner
        of_slices = learner.net.spatial_dims == 3 and any(
            self.state[name].ndim == 4 for name in learner.net.head_names if name in self.state
        )
        return Sliced(learner, self.preprocess.across) if of_slices else learner

    @property
    def views(self) -> tuple[Segmenter, ...]:
        """The segmenter itself, its overview, and that one's, as far as there are any: one for each grid."""
        return (self, *(self.overview.views if self.overview else ()))

    def __repr__(self) -> str:
        return f"Segmenter({segmenter_line(self)})"

    def _repr_html_(self) -> str:
        return segmenter_html(self)

    @torch.no_grad()
    def probabilities(
        self,
        scan: Volume,
        *,
        overlap: float = 0.25,
        focus: bool = False,
        rotations: bool = True,
        device: torch.device | str = "cpu",
        precision: torch.dtype = torch.float32,
        predictor: Callable[[Segmenter], Predictor] | None = None,
        seconds: dict[str, float] | None = None,
        grids: Sequence[Volume] = (),
        carried: Layer | None = None,
    ) -> Volume:
        """Class probabilities (1+K, *S) on the working grid.

        Args:
            scan: (C, X, Y, Z) with the channels the segmenter was adapted to.
            overlap: share of a window that the next one covers again.
            focus: where there is an overview, segment finely only the windows in which it sees something.
            rotations: segment a scan with thick slices, where the network is unsure of it, in other poses too
                (`surest_poses`), which takes three to five times as long; not a scan too large for that (`can_turn`).
            device: where the network runs.
            precision: bfloat16 runs it under autocast.
            predictor: gives for a segmenter what segments its windows, see `medmeta.inference`. None: its network, in
                torch.
            seconds: given the time of each stage.
            grids: what `prepare` gave for this scan, where it was made before.
            carried: what `carry` gave for this scan, where it was made before.

        Raises:
            ValueError: the scan has another number of channels.
        """
        seconds = {} if seconds is None else seconds
        grid, bands = self._bands(
            scan, overlap, focus, rotations, device, precision, predictor, seconds, grids, carried
        )
        return Volume(collect(bands, grid.shape), grid.affine)

    @torch.no_grad()
    def predict(
        self,
        scan: Volume,
        *,
        overlap: float = 0.25,
        focus: bool = False,
        rotations: bool = True,
        device: torch.device | str = "cpu",
        precision: torch.dtype = torch.float32,
        predictor: Callable[[Segmenter], Predictor] | None = None,
        seconds: dict[str, float] | None = None,
        grids: Sequence[Volume] = (),
        carried: Layer | None = None,
        probabilities: Volume | None = None,
    ) -> Segmentation:
        """Label map (1, X, Y, Z) int32 on exactly the scan's grid.

        Probabilities exist for a band of the scan at a time, and for all of it on the grid of the overview only.

        Args:
            probabilities: those of this scan, where they were made before; the network then does not run.
            overlap, focus, rotations, device, precision, predictor, seconds, grids, carried: as of `probabilities`.

        Raises:
            ValueError: the scan has another number of channels.
        """
        seconds = {} if seconds is None else seconds
        if probabilities is None:
            grid, bands = self._bands(
                scan, overlap, focus, rotations, device, precision, predictor, seconds, grids, carried
            )
        else:
            grid, bands = probabilities, iter([(0, probabilities.data)])
        before, started = seconds.get("network", 0.0), time.perf_counter()
        indices = index_map(grid.affine, scan.affine)
        certainty = Certainty(self.best_dice)
        values = [0, *self.labels]
        levels = certainty.levels if self.best_dice else None
        labels = restore_labels(certainty.watch(bands), grid.shape, indices, scan.shape, values, levels)
        labels = keep_largest(labels, self.single)
        seconds["restore"] = time.perf_counter() - started - (seconds.get("network", 0.0) - before)
        return Segmentation(labels, scan.affine, self._expected_dice(certainty))

    def _expected_dice(self, certainty: Certainty) -> dict[str, float]:
        """Structure -> the Dice to expect of it."""
        numbered = list(enumerate(self.labels, start=1))
        return {
            name: certainty.dice([number for number, value in numbered if value in values])
            for name, values in self.targets.items()
        }

    def prepare(self, scan: Volume) -> tuple[Volume, ...]:
        """A scan (C, X, Y, Z) on the working grid and, where there is an overview, on that of the overview."""
        own = self.preprocess.forward(scan)
        return (own, *self.overview.prepare(scan)) if self.overview else (own,)

    def carry(self, scan: Volume, grids: Sequence[Volume] = ()) -> Layer | None:
        """What the atlases say of a scan (C, X, Y, Z); None without any. The same for every state of the network.

        `grids` is what `prepare` gave for it, where it was made before.
        """
        if not self.atlases:
            return None
        working = grids[0] if grids else self.preprocess.forward(scan)
        spacing = working.affine[:3, :3].norm(dim=0).tolist()
        return carry_labels(working.data[0].numpy(), spacing, self.atlases, len(self.labels))

    def _bands(
        self,
        scan: Volume,
        overlap: float,
        focus: bool,
        rotations: bool,
        device: torch.device | str,
        precision: torch.dtype,
        predictor: Callable[[Segmenter], Predictor] | None,
        seconds: dict[str, float],
        grids: Sequence[Volume],
        carried: Layer | None,
    ) -> tuple[Volume, Iterator[Band]]:
        """The working grid, and the probabilities on it as `restore_labels` takes them."""
        if scan.channels != len(self.channels):
            raise ValueError(
                f"a scan with {scan.channels} channels; required: {len(self.channels)} ({', '.join(self.channels)})"
            )
        if not grids:
            started = time.perf_counter()
            grids = self.prepare(scan)
            seconds["preprocess"] = time.perf_counter() - started
        working = grids[0]
        context = context_rows(index_map(working.affine, scan.affine), scan.shape)
        if self.atlases and carried is None:
            started = time.perf_counter()
            carried = self.carry(scan, grids)
            seconds["registration"] = time.perf_counter() - started
        layers = [carried] if carried is not None and carried.share > 0.0 else []
        runs = [each._window_predictor(device, precision, predictor, seconds) for each in self.views]
        network = partial(self._network_bands, runs=runs, overlap=overlap, focus=focus, device=device)
        if not (rotations and self.preprocess.thick and can_turn(working.shape, len(self.labels))):
            return working, network(grids, layers=layers, context=context)

        def segment(degrees: float) -> Tensor:
            turned = [
                replace(grid, data=rotate(grid.data, degrees, grid.spacing)) if degrees else grid for grid in grids
            ]
            return collect(network(turned), working.shape)

        def certainty(probabilities: Tensor) -> float:
            watching = Certainty(self.best_dice)
            for _ in watching.watch([(0, probabilities)]):
                pass
            return mean(self._expected_dice(watching).values())

        poses = surest_poses(segment, certainty, working.spacing)
        bands: Iterator[Band] = iter([(0, poses)])
        return working, blend(bands, working.shape, layers, context) if layers else bands

    def _window_predictor(
        self,
        device: torch.device | str,
        precision: torch.dtype,
        predictor: Callable[[Segmenter], Predictor] | None,
        seconds: dict[str, float],
    ) -> Predictor:
        if predictor is None:
            run = torch_predictor(self.learner, self.state, device=device, precision=precision)
        else:
            run = predictor(self)
        return timed(run, seconds)

    def _network_bands(
        self,
        grids: Sequence[Volume],
        *,
        runs: Sequence[Predictor],
        overlap: float,
        focus: bool,
        device: torch.device | str,
        layers: Sequence[Layer] = (),
        context: int = 0,
    ) -> Iterator[Band]:
        """What the network, its overview and `layers` make of a scan's grids as they lie."""
        working, image = grids[0], grids[0].data.to(device)
        sliding = partial(sliding_bands, image, self.patch, runs[0], overlap=overlap, context=context)
        if self.overview is None:
            bands = sliding()
        else:
            coarse = collect(
                self.overview._network_bands(grids[1:], runs=runs[1:], overlap=overlap, focus=False, device=device),
                grids[1].shape,
            )
            indices = index_map(grids[1].affine, working.affine)
            overview = Layer(coarse.half(), indices, self.overview_share)
            layers = [overview, *layers]
            wanted = seen_by(overview.probabilities, indices) if focus else None
            bands = sliding(wanted=wanted, classes=len(self.labels))
        return blend(bands, working.shape, layers, context) if layers else bands

    def save(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Write the model folder. Raises InputError where something stands already; `overwrite` replaces a model."""
        adapted = {
            "preprocess": self.preprocess.to_dict(),
            "targets": self.targets,
            "labels": self.labels,
            "channels": self.channels,
            "patch": self.patch,
            "card": self.card,
            "single": self.single,
            "best_dice": self.best_dice,
        }
        files = {WEIGHTS: self.model.learner.state_dict(), STATE: self.state}
        if self.overview is not None:
            adapted["overview"] = {
                "preprocess": self.overview.preprocess.to_dict(),
                "patch": self.overview.patch,
                "share": self.overview_share,
            }
            files[OVERVIEW] = self.overview.state
        if self.atlases:
            adapted["atlases"] = [
                {"spacing": atlas.spacing, "mask_spacing": atlas.mask_spacing} for atlas in self.atlases
            ]
            files[ATLAS_FILE] = {
                f"{part}_{number}": getattr(atlas, part)
                for number, atlas in enumerate(self.atlases)
                for part in ("image", "mask")
            }
        _write(folder, self.model._description("adapted") | {"adapted": adapted}, files, overwrite)


SHIPPED = Path(__file__).parent / "models"
"""Where the models lie that come with the package."""


def shipped_models() -> tuple[str, ...]:
    """Names of the models that come with the package."""
    return tuple(sorted(path.parent.name for path in SHIPPED.glob(f"*/{DESCRIPTION}")))


def load(folder: str | Path) -> Model | Segmenter:
    """Read a model folder, or a model that comes with the package by its name.

    A folder of that name goes first.

    Raises:
        InputError: no such folder or name; a file is missing, changed or of another format.
    """
    if not Path(folder).is_dir() and str(folder) in shipped_models():
        folder = SHIPPED / str(folder)
    folder = Path(folder)
    if not folder.is_dir():
        names = ", ".join(shipped_models())
        required = "a model folder that `medmeta train` or `medmeta adapt` wrote" + (
            f", or one of {names}" if names else ""
        )
        raise InputError(folder, "no such folder", required)
    description = read_json(folder / DESCRIPTION)
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        found = description.get("format") if isinstance(description, dict) else type(description).__name__
        raise InputError(folder / DESCRIPTION, f"format {found}", f"format {FORMAT}", "Update medmeta.")
    try:
        tensors = {name: _read_checked(folder, name, digest) for name, digest in description["files"].items()}
        net = build_network(description["network"]["name"], **description["network"]["options"])
        learner = build_learner(description["learner"]["name"], net, **description["learner"]["options"])
        learner.load_state_dict(tensors[WEIGHTS])
        model = Model(learner.eval(), description["voxels"], description["card"])
        if description["kind"] == "meta-learned":
            return model
        adapted = description["adapted"]
        segmenter = Segmenter(
            model,
            tensors[STATE],
            Preprocess.from_dict(adapted["preprocess"]),
            {name: tuple(values) for name, values in adapted["targets"].items()},
            tuple(adapted["labels"]),
            tuple(adapted["channels"]),
            tuple(adapted["patch"]),
            adapted["card"],
            tuple(adapted.get("single", ())),
            best_dice=bool(adapted.get("best_dice", True)),
            atlases=_atlases(adapted.get("atlases", []), tensors.get(ATLAS_FILE, {})),
        )
        _require_fit(segmenter)
        if overview := adapted.get("overview"):
            preprocess, patch = Preprocess.from_dict(overview["preprocess"]), tuple(overview["patch"])
            coarse = replace(
                segmenter, state=tensors[OVERVIEW], preprocess=preprocess, patch=patch, card={}, atlases=()
            )
            _require_fit(coarse)
            segmenter = replace(segmenter, overview=coarse, overview_share=float(overview["share"]))
        return segmenter
    except InputError:
        raise
    except (LookupError, TypeError, ValueError, RuntimeError, AttributeError, OSError) as error:
        # torch lists every weight that is missing, over many lines.
        reason = f"no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())[:200]
        raise InputError(
            folder, f"a description and weights that do not fit ({reason})", "a whole model folder", "Copy it again."
        ) from error


def _atlases(described: list[dict[str, Any]], tensors: Mapping[str, Tensor]) -> tuple[Atlas, ...]:
    made = []
    for number, each in enumerate(described):
        image, mask = tensors[f"image_{number}"], tensors[f"mask_{number}"]
        spacing, mask_spacing = tuple(map(float, each["spacing"])), tuple(map(float, each["mask_spacing"]))
        if not (image.ndim == mask.ndim == len(spacing) == len(mask_spacing) == 3 and min(*spacing, *mask_spacing) > 0):
            raise ValueError(f"atlas {number + 1} of {tuple(image.shape)} voxels; required: three sides of some length")
        made.append(Atlas(image, spacing, mask, mask_spacing))
    return tuple(made)


def _require_fit(segmenter: Segmenter) -> None:
    """Run the smallest image through it: what does not fit shows now, not after a folder of scans was read."""
    learner = segmenter.learner
    if len(segmenter.patch) != 3 or min(segmenter.patch) < 1:
        raise ValueError(f"patch {segmenter.patch}; required: three sides of at least one voxel")
    if not segmenter.targets or any(not set(values) for values in segmenter.targets.values()):
        raise ValueError(f"targets {segmenter.targets}; required: structures with their label values")
    with torch.no_grad():
        image = torch.zeros(1, len(segmenter.channels), *[learner.net.stride] * learner.net.spatial_dims)
        classes = learner.segment(image, segmenter.state).shape[1] - 1
    if classes != len(segmenter.labels):
        raise ValueError(f"{len(segmenter.labels)} label values; required: one for each of {classes} classes")


def as_model(thing: Model | Segmenter) -> Model:
    """The meta-learned model of either kind of model."""
    return thing.model if isinstance(thing, Segmenter) else thing


def _read_checked(folder: Path, name: str, digest: str) -> dict[str, Tensor]:
    path = folder / name
    if name not in (WEIGHTS, STATE, OVERVIEW, ATLAS_FILE):
        known = f"{WEIGHTS}, {STATE}, {OVERVIEW} or {ATLAS_FILE}"
        raise InputError(path, "an unknown file in the description", known)
    if not path.is_file():
        raise InputError(path, "no such file", "every file that model.json names", "Copy the model folder again.")
    if _digest(path) != digest:
        raise InputError(path, "other bytes than were written", "an unchanged file", "Copy the model folder again.")
    # Where a tensor lies in memory decides the last bit of a convolution: a copy lies where a fresh one would.
    return {name: tensor.clone() for name, tensor in read_tensors(path)[0].items()}


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(
    folder: str | Path, description: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Tensor]], overwrite: bool
) -> None:
    from medmeta import __version__

    if not (overwrite and (Path(folder) / DESCRIPTION).is_file()):
        refuse_existing(Path(folder))
    with replacing_folder(folder) as beside:
        for name, content in tensors.items():
            write_tensors(beside / name, content)
        files = {name: _digest(beside / name) for name in tensors}
        write_json(beside / DESCRIPTION, {"format": FORMAT, "medmeta": __version__, **description, "files": files})
