"""Foreign PyTorch checkpoints, brought in on purpose and made a model folder of tensors and JSON.

PyTorch writes pickle, which can run code as it is read. Here it is read with `weights_only=True`, which knows tensors
and plain containers and nothing else; what needs more is refused.
"""

from __future__ import annotations

import hashlib
import math
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from medmeta.errors import InputError
from medmeta.learners import build_learner
from medmeta.networks import build_network
from medmeta.segmenter import Model

LIMIT_BYTES = 4 * 2**30
"""Largest checkpoint that is read, unpacked."""

_NESTED = ("state_dict", "network_weights", "model_state_dict", "model")
_REMEDY = "Save its state_dict() with torch.save, and bring that in."


def import_checkpoint(
    path: str | Path,
    *,
    network: str,
    options: Mapping[str, Any] | None = None,
    learner: str = "fomaml",
    prefix: str = "",
    voxels: int = 48**3,
    terms: str = "",
    limit_bytes: int = LIMIT_BYTES,
) -> Model:
    """A model whose network has the weights of a checkpoint; ready to be saved and adapted.

    The checkpoint holds either every parameter of the network, or every one of its body; the head then stays as built.

    Args:
        path: a file that `torch.save` wrote: tensors by name, or a dict that holds them as "state_dict",
            "network_weights", "model_state_dict" or "model".
        network: name of a network in `medmeta.networks.NETWORKS`.
        options: its options.
        learner: how the model will be adapted, a name of `medmeta.learners.LEARNERS`.
        prefix: what stands before each name in the checkpoint, such as "module."; names without it are left out.
        voxels: patch budget in voxels.
        terms: the licence of the weights, for the model's card.
        limit_bytes: largest size, unpacked.

    Raises:
        InputError: not a checkpoint of plain tensors, larger than the limit, or of another network.
    """
    path = Path(path)
    tensors = read_checkpoint(path, limit_bytes=limit_bytes)
    named = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    net = build_network(network, **{"seed": 0, **(options or {})})
    own = net.state_dict()
    part = net.body if set(named) == set(net.body.state_dict()) else net
    wanted = part.state_dict()
    if differing := sorted(set(named) ^ set(wanted)):
        what = ", ".join(f"{'no ' if name in wanted else 'the unknown '}{name}" for name in differing[:3])
        required = f"the {len(own)} tensors of {network}, or those of its body"
        raise InputError(
            path, f"{what} ({len(differing)} names differ)", required, "Check network, options and prefix."
        )
    for name, value in named.items():
        if value.shape != wanted[name].shape or not torch.isfinite(value).all():
            found = f"{name} of shape {tuple(value.shape)}" if value.shape != wanted[name].shape else f"NaN in {name}"
            raise InputError(path, found, f"finite values of shape {tuple(wanted[name].shape)}", "Check the options.")
    part.load_state_dict(named)
    with open(path, "rb") as file:
        origin = {"file": path.name, "sha256": hashlib.file_digest(file, "sha256").hexdigest(), "terms": terms}
    return Model(build_learner(learner, net).eval(), voxels, {"training_tasks": [], "imported": origin})


def read_checkpoint(path: str | Path, *, limit_bytes: int = LIMIT_BYTES) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, on the CPU.

    Raises:
        InputError: no file that `torch.save` wrote, anything in it but plain tensors, or more than the limit.
    """
    path = Path(path)
    required = "a file that torch.save wrote (PyTorch 1.6 or later), of tensors only"
    try:
        with zipfile.ZipFile(path) as archive:
            # torch.save compresses nothing: what would unpack to more than the file holds is no checkpoint.
            nbytes = sum(member.file_size for member in archive.infolist())
        if nbytes > min(limit_bytes, path.stat().st_size):
            raise InputError(path, f"{nbytes} bytes unpacked", f"at most {limit_bytes}, and no more than packed")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except Exception as error:  # the unpickler raises whatever a hostile stream leads it to
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise InputError(path, f"what cannot be read safely ({reason})", required, _REMEDY) from error
    tensors = next((content[key] for key in _NESTED if isinstance(content, dict) and key in content), content)
    if not isinstance(tensors, dict) or not tensors:
        raise InputError(path, f"a {type(tensors).__name__} in place of weights", required, _REMEDY)
    for name, value in tensors.items():
        if (
            not isinstance(name, str)
            or type(value) not in (Tensor, nn.Parameter)
            or value.layout != torch.strided
            or value.is_meta
        ):
            raise InputError(path, f"{name!r} of type {type(value).__name__}", required, _REMEDY)
        # A view can claim any shape over a few stored bytes.
        if math.prod(value.shape) * value.element_size() > value.untyped_storage().nbytes():
            raise InputError(path, f"{name!r} with more values than are stored", required, _REMEDY)
    return {name: value.detach() for name, value in tensors.items()}
