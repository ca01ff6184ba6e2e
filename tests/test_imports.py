from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from small import tiny_model

from medmeta.errors import InputError
from medmeta.imports import import_checkpoint, read_checkpoint
from medmeta.segmenter import load

NETWORK = {"network": "se_unet_3d", "options": {"channels": (8, 16), "se_ratio": 4}}


def weights(seed: int = 3) -> dict[str, torch.Tensor]:
    """Values for the whole of the tiny network, unlike those it is built with."""
    generator = torch.Generator().manual_seed(seed)
    own = tiny_model().learner.net.state_dict()
    return {name: torch.randn(value.shape, generator=generator) for name, value in own.items()}


def saved(path: Path, content: object, **options) -> Path:
    torch.save(content, path, **options)
    return path


@pytest.mark.parametrize(
    "wrap", [lambda w: w, lambda w: {"epoch": 3, "state_dict": w}, lambda w: {"network_weights": w}]
)
@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_checkpoint_becomes_a_model(tmp_path, wrap, prefix):
    given = weights()
    named = {f"{prefix}{name}": value for name, value in given.items()}
    path = saved(tmp_path / "foreign.pt", wrap(named))
    model = import_checkpoint(path, **NETWORK, prefix=prefix, terms="MIT")
    model.save(tmp_path / "model")
    back = load(tmp_path / "model")
    own = back.learner.net.state_dict()
    assert own.keys() == given.keys()
    assert all(torch.equal(own[name], given[name]) for name in given)
    assert (back.card["imported"]["file"], back.card["imported"]["terms"]) == ("foreign.pt", "MIT")
    assert {file.suffix for file in (tmp_path / "model").iterdir()} == {".json", ".safetensors"}


def test_a_body_alone_leaves_the_head_as_built(tmp_path):
    body = {name.removeprefix("body."): value for name, value in weights().items() if name.startswith("body.")}
    net = import_checkpoint(saved(tmp_path / "body.pt", body), **NETWORK).learner.net
    assert all(torch.equal(value, body[name]) for name, value in net.body.state_dict().items())
    built = import_checkpoint(saved(tmp_path / "other.pt", body), **NETWORK).learner.net
    assert all(torch.equal(value, built.head.state_dict()[name]) for name, value in net.head.state_dict().items())


class Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


def test_code_in_a_checkpoint_never_runs(tmp_path):
    mark = tmp_path / "ran"
    evil = {**weights(), "extra": Evil(mark)}
    for name, options in (("new.pt", {}), ("old.pt", {"_use_new_zipfile_serialization": False})):
        with pytest.raises(InputError, match=name):
            read_checkpoint(saved(tmp_path / name, evil, **options))
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(evil))
    with pytest.raises(InputError, match=r"plain\.pkl"):
        read_checkpoint(tmp_path / "plain.pkl")
    assert not mark.exists()
    torch.load(tmp_path / "new.pt", weights_only=False)
    assert mark.exists(), "it is a working exploit"


@pytest.mark.parametrize(
    "content",
    [
        tiny_model().learner.net,
        [torch.ones(2)],
        {},
        {"a": "text"},
        {"a": {"b": torch.ones(2)}},
        {1: torch.ones(2)},
        {"a": torch.ones(2).to_sparse()},
        {"a": torch.ones(1).expand(2**40)},
    ],
    ids=["module", "list", "empty", "text", "nested", "number", "sparse", "expanded"],
)
def test_what_is_no_plain_dict_of_tensors(tmp_path, content):
    with pytest.raises(InputError, match=r"x\.pt.*of tensors only"):
        read_checkpoint(saved(tmp_path / "x.pt", content))


def test_bombs_and_damage(tmp_path):
    path = saved(tmp_path / "x.pt", {"a": torch.zeros(2**20)})
    with pytest.raises(InputError, match="at most 1000"):
        read_checkpoint(path, limit_bytes=1000)
    with zipfile.ZipFile(path) as archive:
        members = {member: archive.read(member) for member in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "packed.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        for member, content in members.items():
            archive.writestr(member, content)
    with pytest.raises(InputError, match="no more than packed"):
        read_checkpoint(tmp_path / "packed.pt")
    path.write_bytes(path.read_bytes()[:-200])
    for name in ("x.pt", "absent.pt"):
        with pytest.raises(InputError, match=name):
            read_checkpoint(tmp_path / name)


def test_a_checkpoint_of_another_network(tmp_path):
    given = weights()
    name = next(iter(given))
    for changed, fragment in (
        ({key: value for key, value in given.items() if key != name}, f"no {name}"),
        ({**given, "stranger": torch.ones(1)}, "the unknown stranger"),
        ({**given, name: torch.ones(7)}, r"of shape \(7,\)"),
        ({**given, name: given[name] * torch.nan}, "NaN in"),
    ):
        with pytest.raises(InputError, match=fragment):
            import_checkpoint(saved(tmp_path / "x.pt", changed), **NETWORK)
    with pytest.raises(InputError, match="names differ"):
        import_checkpoint(saved(tmp_path / "x.pt", given), **NETWORK, prefix="module.")
