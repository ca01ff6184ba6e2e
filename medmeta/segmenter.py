"""Models: what `train` makes, what `adapt` makes, and the folder either lives in."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medmeta.data.preprocess import Preprocess
from medmeta.data.volume import Volume
from medmeta.episode import State
from medmeta.errors import InputError
from medmeta.files import read_json, read_tensors, write_json, write_tensors
from medmeta.learners import MetaLearner, build_learner
from medmeta.networks import build_network

FORMAT = 1
WEIGHTS, STATE, DESCRIPTION = "weights.safetensors", "state.safetensors", "model.json"


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

    def save(self, folder: str | Path) -> None:
        """Write the model folder. Raises InputError where something stands already."""
        _write(folder, self._description("meta-learned"), {WEIGHTS: self.learner.state_dict()})

    def _description(self, kind: str) -> dict[str, Any]:
        return {
            "kind": kind,
            "network": self.learner.net.spec,
            "learner": {"name": self.learner.name, "options": self.learner.options},
            "voxels": self.voxels,
            "card": self.card,
        }


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
    """

    model: Model
    state: State
    preprocess: Preprocess
    targets: dict[str, tuple[int, ...]]
    labels: tuple[int, ...]
    channels: tuple[str, ...]
    patch: tuple[int, int, int]
    card: dict[str, Any] = field(default_factory=dict)

    @torch.inference_mode()
    def probabilities(
        self,
        scan: Volume,
        *,
        overlap: float = 0.25,
        device: torch.device | str = "cpu",
        precision: torch.dtype = torch.float32,
    ) -> Volume:
        """Class probabilities (1+K, *S) on the working grid.

        Args:
            scan: (C, X, Y, Z) with the channels the segmenter was adapted to.
            overlap: share of a window that the next one covers again.
            device: where the network runs.
            precision: bfloat16 runs it under autocast.

        Raises:
            ValueError: the scan has another number of channels.
        """
        from monai.inferers import sliding_window_inference

        if scan.channels != len(self.channels):
            raise ValueError(
                f"a scan with {scan.channels} channels; required: {len(self.channels)} ({', '.join(self.channels)})"
            )
        working = self.preprocess.forward(scan)
        learner = self.model.learner.to(device).eval()
        state = {name: tensor.to(device) for name, tensor in self.state.items()}
        two_dimensional = learner.net.spatial_dims == 2

        def window_probabilities(image: Tensor) -> Tensor:
            with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == torch.bfloat16):
                if two_dimensional:
                    slices = image.movedim(-1, 1).flatten(0, 1)
                    logits = learner.segment(slices, state)
                    logits = logits.unflatten(0, (image.shape[0], image.shape[-1])).movedim(1, -1)
                else:
                    logits = learner.segment(image, state)
            return logits.float().softmax(dim=1)

        # Windows at the edge of a small scan repeat its border, as the patches of the sampler do.
        probabilities = sliding_window_inference(
            working.data.unsqueeze(0).to(device),
            self.patch,
            1,
            window_probabilities,
            overlap=overlap,
            mode="gaussian",
            padding_mode="replicate",
        )
        return Volume(probabilities[0].cpu(), working.affine)

    def predict(self, scan: Volume, **options: Any) -> Volume:
        """Label map (1, X, Y, Z) int32 on exactly the scan's grid. Options as of `probabilities`."""
        classes = self.preprocess.inverse_labels(self.probabilities(scan, **options), scan)
        return Volume(torch.tensor([0, *self.labels], dtype=torch.int32)[classes.long()], scan.affine)

    def save(self, folder: str | Path) -> None:
        """Write the model folder. Raises InputError where something stands already."""
        adapted = {
            "preprocess": self.preprocess.to_dict(),
            "targets": self.targets,
            "labels": self.labels,
            "channels": self.channels,
            "patch": self.patch,
            "card": self.card,
        }
        description = self.model._description("adapted") | {"adapted": adapted}
        _write(folder, description, {WEIGHTS: self.model.learner.state_dict(), STATE: self.state})


def load(folder: str | Path) -> Model | Segmenter:
    """Read a model folder.

    Raises:
        InputError: a file is missing, changed or of another format.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(folder, "no such folder", "a model folder that `medmeta train` or `medmeta adapt` wrote")
    description = read_json(folder / DESCRIPTION)
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        found = description.get("format") if isinstance(description, dict) else type(description).__name__
        raise InputError(folder / DESCRIPTION, f"format {found}", f"format {FORMAT}", "Update medmeta.")
    try:
        tensors = {name: _read_checked(folder / name, digest) for name, digest in description["files"].items()}
        net = build_network(description["network"]["name"], **description["network"]["options"])
        learner = build_learner(description["learner"]["name"], net, **description["learner"]["options"])
        learner.load_state_dict(tensors[WEIGHTS])
        model = Model(learner.eval(), description["voxels"], description["card"])
        if description["kind"] == "meta-learned":
            return model
        adapted = description["adapted"]
        return Segmenter(
            model,
            tensors[STATE],
            Preprocess.from_dict(adapted["preprocess"]),
            {name: tuple(values) for name, values in adapted["targets"].items()},
            tuple(adapted["labels"]),
            tuple(adapted["channels"]),
            tuple(adapted["patch"]),
            adapted["card"],
        )
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise InputError(
            folder, f"a description and weights that do not fit ({error})", "a whole model folder", "Copy it again."
        ) from error


def as_model(thing: Model | Segmenter) -> Model:
    """The meta-learned model of either kind of model."""
    return thing.model if isinstance(thing, Segmenter) else thing


def _read_checked(path: Path, digest: str) -> dict[str, Tensor]:
    if path.name not in (WEIGHTS, STATE):
        raise InputError(path, "an unknown file in the description", f"{WEIGHTS} or {STATE}")
    if not path.is_file():
        raise InputError(path, "no such file", "every file that model.json names", "Copy the model folder again.")
    if _digest(path) != digest:
        raise InputError(path, "other bytes than were written", "an unchanged file", "Copy the model folder again.")
    return read_tensors(path)[0]


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(folder: str | Path, description: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
    from medmeta import __version__

    folder = Path(folder)
    refuse_existing(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=".writing-", dir=folder.parent))
    try:
        for name, content in tensors.items():
            write_tensors(beside / name, content)
        files = {name: _digest(beside / name) for name in tensors}
        write_json(beside / DESCRIPTION, {"format": FORMAT, "medmeta": __version__, **description, "files": files})
        beside.chmod(0o755)
        if folder.is_dir():
            folder.rmdir()
        os.rename(beside, folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def refuse_existing(folder: Path) -> None:
    """Raise InputError where `folder` holds anything: nothing is overwritten unasked."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(folder, "something that stands there already", "a new or empty folder", "Name another one.")
