"""What there is to do, what is remembered of it, and who may write."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small import phantom, tiny_model

from medmeta.data.preprocess import Preprocess
from medmeta.data.volume import write_volume
from medmeta.errors import InputError
from medmeta.registration import make_atlas
from medmeta.segmenter import Segmenter
from medmeta.worklist import Manifest, Scan, described, fingerprint, list_scans, locked


def touch(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"x")
    return folder


def names(scans: dict[str, Scan]) -> dict[str, list[str]]:
    return {name: [path.name for path in scan.files] for name, scan in scans.items()}


@pytest.mark.parametrize(
    ("channels", "files", "expected"),
    [
        # Twenty numbered patients are twenty scans.
        (1, [f"patient_{i:04d}" for i in range(1, 21)], {f"patient_{i:04d}": [0] for i in range(1, 21)}),
        (1, [f"patient_{i:04d}" for i in range(3)], {f"patient_{i:04d}": [0] for i in range(3)}),
        (2, [f"patient_{i:04d}" for i in range(1, 6)], {f"patient_{i:04d}": [0] for i in range(1, 6)}),
        # nnU-Net's names, whose labels have no channel number.
        (1, ["a_0000", "b_0000"], {"a": [0], "b": [0]}),
        (2, ["a_0000", "a_0001", "b_0000", "b_0001"], {"a": [0, 1], "b": [0, 1]}),
        (1, ["a_0000", "a_0001", "b_0000", "b_0001"], {"a": [0, 1], "b": [0, 1]}),
        (1, ["a_0000", "b"], {"a_0000": [0], "b": [0]}),
        (2, ["a", "b_0000", "b_0001"], {"a": [0], "b": [0, 1]}),
        (2, ["a_0000"], {"a": [0]}),
        (1, ["scan_000", "scan_00001"], {"scan_000": [0], "scan_00001": [0]}),
    ],
)
def test_digits_name_a_channel_or_belong_to_the_name(channels, files, expected, tmp_path):
    folder = touch(tmp_path / "scans", *(f"{name}.nii.gz" for name in files))
    found = names(list_scans([folder], channels))
    assert {name: list(range(len(paths))) for name, paths in found.items()} == expected
    assert sorted(name for paths in found.values() for name in paths) == sorted(f"{n}.nii.gz" for n in files)


def test_task_folders_give_their_scans_and_not_their_labels(tmp_path):
    for part, name in (("imagesTr", "a"), ("imagesTs", "b"), ("labelsTr", "a")):
        touch(tmp_path / "task" / part, f"{name}.nii.gz")
    for folder, recursive, prefix in ((tmp_path / "task", False, ""), (tmp_path, True, "task/")):
        found = list_scans([folder], 1, recursive=recursive)
        assert names(found) == {f"{prefix}a": ["a.nii.gz"], f"{prefix}b": ["b.nii.gz"]}
        assert found[f"{prefix}a"].files[0].parent.name == "imagesTr"


def test_folders_within_folders_are_searched_on_request(tmp_path):
    touch(tmp_path, "top.nii.gz", "readme.txt")
    touch(tmp_path / "a", "case.nii.gz")
    touch(tmp_path / "b" / "deep", "case.nii.gz", 'it\'s "odd"\n.. name.nrrd')
    touch(tmp_path / "out", "top.nii.gz")
    touch(tmp_path / ".hidden", "case.nii.gz")
    (tmp_path / "b" / "loop").symlink_to(tmp_path)
    assert set(list_scans([tmp_path], 1)) == {"top"}
    found = list_scans([tmp_path], 1, recursive=True, besides=tmp_path / "out")
    assert set(found) == {"top", "a/case", "b/deep/case", 'b/deep/it\'s "odd"\n.. name'}


def test_a_folder_that_may_not_be_read_is_a_scan_with_a_problem(tmp_path, monkeypatch):
    touch(tmp_path, "top.nii.gz")
    touch(tmp_path / "locked", "case.nii.gz")
    listed = Path.iterdir

    def iterdir(self: Path):
        if self.name == "locked":
            raise PermissionError(13, "Permission denied", str(self))
        return listed(self)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    found = list_scans([tmp_path], 1, recursive=True)
    assert {name: scan.problem for name, scan in found.items()} == {"top": "", "locked": "Permission denied"}
    with pytest.raises(InputError, match="Permission denied"):
        list_scans([tmp_path / "locked"], 1)


def test_scans_of_one_name_are_told_apart(tmp_path):
    for folder in ("a", "b"):
        touch(tmp_path / folder / "images", "case.nii.gz")
    touch(tmp_path / "a" / "images", "case.nrrd", "other.nii.gz")
    found = list_scans([tmp_path / "a" / "images", tmp_path / "b" / "images", tmp_path / "b/images/case.nii.gz"], 1)
    assert set(found) == {"a/images/case", "a/images/case#2", "b/images/case", "other"}
    assert "found the name of case." in found["a/images/case#2"].problem
    assert not found["b/images/case"].problem


def test_lists_of_scans(tmp_path):
    touch(tmp_path / "scans", "a.nii.gz", "b.nii.gz", "b2.nii.gz")
    (tmp_path / "list.txt").write_text("scans/a.nii.gz\n\n scans/absent.nii.gz \n")
    found = list_scans([tmp_path / "list.txt"], 1)
    assert names(found) == {"a": ["a.nii.gz"], "absent": ["absent.nii.gz"]}
    assert found["a"].files == (tmp_path / "scans" / "a.nii.gz",)
    (tmp_path / "list.csv").write_text("name,age,image_0000,image_0001\n../x,50,scans/b.nii.gz,scans/b2.nii.gz\n")
    assert names(list_scans([tmp_path / "list.csv"], 2)) == {"_x": ["b.nii.gz", "b2.nii.gz"]}
    for content, found in (("path\na.nii.gz\n", "columns"), ("image\n", "an empty list"), ("", "columns")):
        (tmp_path / "list.csv").write_text(content)
        with pytest.raises(InputError, match=found):
            list_scans([tmp_path / "list.csv"], 1)


def test_two_runs_do_not_write_into_one_folder(tmp_path):
    with locked(tmp_path / "out"):
        with pytest.raises(InputError, match="another run that is writing into it"), locked(tmp_path / "out"):
            pass
        child = os.fork()
        if not child:
            try:
                with locked(tmp_path / "out"):
                    os._exit(0)
            except InputError:
                os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    with locked(tmp_path / "out"):
        pass


def scan_of(folder: Path, name: str) -> Scan:
    write_volume(phantom(2, 0)[0], touch(folder) / f"{name}.nii.gz")
    return Scan(name, (folder / f"{name}.nii.gz",))


def finished(out: Path, scans: list[Scan]) -> Manifest:
    """The manifest of a run that made the label maps of some scans."""
    manifest = Manifest(out, "model", {"overlap": "0.25"}, overwrite=False)
    manifest.plan(scans, out, overwrite=False)
    for scan in scans:
        manifest.start(scan)
        shutil.copy(scan.files[0], out / f"{scan.name}.nii.gz")
        manifest.record(scan.name, "done", "", [described(file) for file in scan.sources()])
    manifest.write()
    return manifest


def kept(out: Path, scans: list[Scan], *, overwrite: bool = False) -> dict[str, bool]:
    manifest = Manifest(out, "model", {"overlap": "0.25"}, overwrite=overwrite)
    return {scan.name: keep for scan, keep in manifest.plan(scans, out, overwrite=overwrite)}


def test_what_is_done_is_kept_while_its_scan_is_the_same(tmp_path):
    out = touch(tmp_path / "out")
    scans = [scan_of(tmp_path / "scans", name) for name in "abc"]
    finished(out, scans)
    assert kept(out, scans) == {"a": True, "b": True, "c": True}
    os.utime(scans[0].files[0])  # touched, but of the same content
    write_volume(phantom(2, 1)[0], scans[1].files[0])
    (out / "c.nii.gz").unlink()
    assert kept(out, scans) == {"a": True, "b": False, "c": False}


def test_a_killed_run_to_overwrite_goes_on_overwriting(tmp_path):
    out = touch(tmp_path / "out")
    scans = [scan_of(tmp_path / "scans", name) for name in "ab"]
    finished(out, scans)
    assert kept(out, scans, overwrite=True) == {"a": False, "b": False}
    assert kept(out, scans) == {"a": False, "b": False}


def test_what_kills_a_run_comes_last(tmp_path):
    out = touch(tmp_path / "out")
    scans = [scan_of(tmp_path / "scans", name) for name in "abc"]
    manifest = Manifest(out, "model", {"overlap": "0.25"}, overwrite=False)
    manifest.plan(scans, out, overwrite=False)
    manifest.start(scans[0])
    for _ in range(2):
        assert list(kept(out, scans)) == ["b", "c", "a"]


def test_what_a_killed_run_wrote_down_is_known_but_for_its_last_broken_line(tmp_path):
    scans = [scan_of(tmp_path / "scans", name) for name in "abc"]
    out = touch(tmp_path / "out", "a.nii.gz", "b.nii.gz")
    manifest = Manifest(out, "model", {"overlap": "0.25"}, overwrite=False)
    manifest.plan([replace(scan, problem="new") for scan in scans], out, overwrite=False)
    begun = (out / "run.json").read_bytes()
    for scan in scans[:2]:
        manifest.start(scan)
        manifest.record(scan.name, "done", "", [described(file) for file in scan.sources()])
    assert (out / "run.json").read_bytes() == begun  # a scan adds a line and rewrites nothing
    journal = out / "run.jsonl"
    lines = journal.read_bytes()
    journal.write_bytes(lines[:-20])
    assert kept(out, scans) == {"a": True, "b": False, "c": False}
    assert not journal.exists()
    journal.write_bytes(lines)
    assert kept(out, scans) == {"a": True, "b": True, "c": False}


def test_label_maps_of_two_models_do_not_meet_in_one_folder(tmp_path):
    out = touch(tmp_path / "out")
    finished(out, [scan_of(tmp_path / "scans", "a")])
    for model, settings in (("other", {"overlap": "0.25"}), ("model", {"overlap": "0.5"})):
        with pytest.raises(InputError, match="label maps of another model or other settings"):
            Manifest(out, model, settings, overwrite=False)
        Manifest(out, model, settings, overwrite=True)
    facts = json.loads((out / "run.json").read_text(encoding="utf-8"))
    assert {"medmeta", "torch", "monai", "python"} <= facts["versions"].keys()
    assert torch.__version__.startswith(facts["versions"]["torch"])
    assert ("openvino" in facts["versions"]) == (importlib.util.find_spec("openvino") is not None)
    assert len(facts["scans"]["a"]["files"][0]["sha256"]) == 64


def test_a_fingerprint_tells_models_apart_and_not_copies():
    model = tiny_model()
    state = {name: tensor.detach().clone() for name, tensor in model.learner.net.grow(1, 1).items()}
    segmenter = Segmenter(model, state, Preprocess("MR", (2.0, 2.0, 2.0)), {"a": (1,)}, (1,), ("image",), (8, 8, 8))
    same = replace(segmenter, state={name: state[name].clone() for name in reversed(state)}, card={"seconds": 3})
    assert fingerprint(same) == fingerprint(segmenter)
    changed = {name: tensor + (name == "head.bias") * 1e-3 for name, tensor in state.items()}
    others = [
        replace(segmenter, state=changed),
        replace(segmenter, preprocess=Preprocess("MR", (2.0, 2.0, 2.5))),
        replace(segmenter, labels=(2,)),
        replace(segmenter, patch=(8, 8, 16)),
        replace(segmenter, model=tiny_model("maml")),
        replace(segmenter, atlases=(make_atlas(np.eye(4)[None], np.eye(4, dtype=np.int8)[None], (1.0, 1.0, 1.0)),)),
    ]
    assert len({fingerprint(other) for other in [segmenter, *others]}) == 7
