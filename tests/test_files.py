from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from medmeta.errors import InputError
from medmeta.files import (
    read_json,
    read_tensors,
    refuse_existing,
    replacing,
    replacing_folder,
    sweep,
    write_json,
    write_tensors,
)


def test_replaces_at_the_end_and_keeps_the_suffix(tmp_path) -> None:
    place = tmp_path / "new" / "folder" / "scan.nii.gz"
    with replacing(place) as beside:
        assert beside.parent == place.parent
        assert beside.name.endswith(".nii.gz")
        beside.write_text("whole")
        assert not place.exists()
    assert place.read_text() == "whole"
    assert list(place.parent.iterdir()) == [place]


def test_the_users_rule_decides_who_may_read(tmp_path) -> None:
    before = os.umask(0o027)
    try:
        write_json(tmp_path / "a.json", {})
    finally:
        os.umask(before)
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o640


def test_an_error_leaves_what_was_there(tmp_path) -> None:
    place = tmp_path / "a.txt"
    place.write_text("old")
    with pytest.raises(RuntimeError), replacing(place) as beside:
        beside.write_text("half")
        raise RuntimeError
    with pytest.raises(TypeError):
        write_json(place, {"a": object()})
    assert place.read_text() == "old"
    assert list(tmp_path.iterdir()) == [place]


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_a_kill_leaves_what_was_there(tmp_path) -> None:
    place = tmp_path / "a.txt"
    place.write_text("old")
    code = (
        "import os, signal, sys; from medmeta.files import replacing\n"
        "with replacing(sys.argv[1]) as beside: beside.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(place)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert place.read_text() == "old"
    (tmp_path / "b.txt").write_text("another file")
    with replacing(tmp_path / "b.txt"):
        assert len(list(tmp_path.iterdir())) == 4
        sweep(place)
    assert {file.name for file in tmp_path.iterdir()} == {"a.txt", "b.txt"}


def test_json_there_and_back(tmp_path) -> None:
    value = {"a": [1, 2.5, None, "ü"], "b": {"c": True}}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value


def test_json_holds_no_nan(tmp_path) -> None:
    write_json(tmp_path / "a.json", {1: (float("nan"), float("inf"), -float("inf")), "at": Path("x/y")})
    strict = json.loads((tmp_path / "a.json").read_text(), parse_constant=pytest.fail)
    assert strict == {"1": [None, None, None], "at": "x/y"}


@pytest.mark.parametrize("content", [None, b"", b"{", b"\xff\xfe{}"])
def test_what_is_no_json(tmp_path, content) -> None:
    place = tmp_path / "a.json"
    if content is not None:
        place.write_bytes(content)
    with pytest.raises(InputError, match=r"a\.json: found .* required: a JSON file"):
        read_json(place)


def test_tensors_there_and_back(tmp_path) -> None:
    whole = torch.arange(24.0).reshape(2, 3, 4)
    tensors = {
        "plain": whole,
        "turned": whole.transpose(0, 2),
        "a view of the same memory": whole[:, 1],
        "scalar": torch.tensor(3.0, dtype=torch.float64),
        "empty": torch.zeros(0, 3),
        "half": whole.bfloat16(),
        "mask": torch.tensor([-1, 5], dtype=torch.int8),
        "learned": whole.clone().requires_grad_(),
    }
    write_tensors(tmp_path / "a.safetensors", tensors, {"fact": "ü\n{}"})
    found, facts = read_tensors(tmp_path / "a.safetensors")
    assert facts == {"fact": "ü\n{}"}
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor.detach())
        assert not found[name].requires_grad


def test_what_was_read_does_not_depend_on_the_file(tmp_path) -> None:
    """A checkpoint is written over while what was read from it is in use."""
    place = tmp_path / "a.safetensors"
    write_tensors(place, {"a": torch.ones(1000)})
    found, _ = read_tensors(place)
    write_tensors(place, {"a": torch.zeros(1000)})
    assert found["a"].sum() == 1000
    found["a"].zero_()


@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "text", "folder"])
def test_unreadable_tensors(tmp_path, damage) -> None:
    place = tmp_path / "a.safetensors"
    write_tensors(place, {"a": torch.ones(1000)})
    whole = place.read_bytes()
    place.unlink()
    if damage == "folder":
        place.mkdir()
    elif damage != "missing":
        place.write_bytes({"empty": b"", "truncated": whole[:-7], "text": b"not tensors at all"}[damage])
    with pytest.raises(InputError, match=r"a\.safetensors: found .* required: .*safetensors file") as caught:
        read_tensors(place)
    assert "\n" not in str(caught.value)


def test_a_folder_is_replaced_whole(tmp_path):
    place = tmp_path / "a" / "folder"
    for content in ("first", "second"):
        with replacing_folder(place) as beside:
            (beside / content).write_text(content)
        assert [path.name for path in place.iterdir()] == [content]
    assert list(place.parent.iterdir()) == [place]


@pytest.mark.parametrize("error", [OSError(28, "No space left"), ValueError("another")])
def test_a_folder_stays_as_it_was_where_its_successor_is_not_finished(tmp_path, error):
    place = tmp_path / "folder"
    place.mkdir()
    (place / "first").write_text("first")
    with (
        pytest.raises(InputError if isinstance(error, OSError) else ValueError, match=r"No space|another"),
        replacing_folder(place) as beside,
    ):
        (beside / "second").write_text("half")
        raise error
    assert [path.name for path in place.iterdir()] == ["first"]
    assert list(tmp_path.iterdir()) == [place]


def test_a_folder_comes_back_where_its_successor_cannot_take_its_place(tmp_path, monkeypatch):
    place = tmp_path / "folder"
    place.mkdir()
    (place / "first").write_text("first")
    rename = os.rename

    def refusing(source, target):
        if Path(source).name.startswith(".writing"):
            raise OSError(13, "Permission denied")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refusing)
    with pytest.raises(InputError, match="Permission denied"), replacing_folder(place) as beside:
        (beside / "second").write_text("second")
    assert [path.name for path in place.iterdir()] == ["first"]
    assert list(tmp_path.iterdir()) == [place]


def test_a_place_that_cannot_be_made_is_known_before_the_work(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="file"):
        refuse_existing(tmp_path / "file" / "model")
    with pytest.raises(InputError):
        refuse_existing(Path("/proc/1/model") if os.geteuid() else tmp_path / "file" / "a" / "b")
    refuse_existing(tmp_path / "new" / "model")
