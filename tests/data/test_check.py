from __future__ import annotations

import gzip
import json
import shutil
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from medmeta.data.check import Finding, check_path, check_task, summarise
from medmeta.data.tasks import load_task
from medmeta.errors import InputError

SHAPE = (8, 9, 10)
AFFINE = np.diag([1.5, 1.5, 3.0, 1.0])


def scan(seed: int, low: float = -1000, high: float = 400, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.random.default_rng(seed).uniform(low, high, shape).astype(np.float32)


def organs(*values: int) -> np.ndarray:
    labels = np.zeros(SHAPE, np.uint8)
    for i, value in enumerate(values):
        labels[i + 1, 2:5, 3:6] = value
    return labels


def save(path: Path, voxels: np.ndarray, affine: np.ndarray = AFFINE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(voxels, affine), path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sound CT task of four cases, a to d, with the labels liver and tumour; its files are there to be broken."""
    for seed, name in enumerate("abcd"):
        save(tmp_path / f"imagesTr/{name}.nii.gz", scan(seed))
        save(tmp_path / f"labelsTr/{name}.nii.gz", organs(1, 2))
    describe(tmp_path)
    return tmp_path


def describe(folder: Path, **changes: object) -> None:
    cases = [{"image": f"./imagesTr/{n}.nii.gz", "label": f"./labelsTr/{n}.nii.gz"} for n in "abcd"]
    labels = {"0": "background", "1": "liver", "2": "tumour"}
    content = {"name": "Toy", "modality": {"0": "CT"}, "labels": labels, "training": cases}
    (folder / "dataset.json").write_text(json.dumps({**content, **changes}))


def only(findings: list[Finding]) -> Finding:
    assert len(findings) == 1, findings
    assert "\n" not in findings[0].message
    return findings[0]


def test_a_sound_task(folder):
    seen: list[tuple[int, int]] = []
    assert check_path(folder, progress=lambda done, total: seen.append((done, total))) == []
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert check_path(folder / "dataset.json") == []
    assert check_task(load_task(folder)) == []


def break_gzip(folder: Path) -> None:
    path = folder / "imagesTr/b.nii.gz"
    path.write_bytes(path.read_bytes()[:-2000])


def break_label_gzip(folder: Path) -> None:
    path = folder / "labelsTr/b.nii.gz"
    header = gzip.decompress(path.read_bytes())[:500]
    path.write_bytes(gzip.compress(header)[:-8])


def break_header(folder: Path) -> None:
    path = folder / "imagesTr/b.nii.gz"
    raw = bytearray(gzip.decompress(path.read_bytes()))
    raw[42:48] = np.array([32767] * 3, "<i2").tobytes()
    path.write_bytes(gzip.compress(raw))


def break_affine(folder: Path) -> None:
    path = folder / "imagesTr/b.nii.gz"
    raw = bytearray(gzip.decompress(path.read_bytes()))
    raw[280:284] = np.array([np.nan], "<f4").tobytes()
    path.write_bytes(gzip.compress(raw))


def edit(name: str, change, file: str = "image"):
    def breaker(folder: Path) -> None:
        path = folder / f"{file}sTr/{name}.nii.gz"
        image = nib.load(path)
        voxels, affine = change(np.asarray(image.dataobj).copy(), image.affine.copy())
        save(path, voxels, affine)

    return breaker


def with_voxel(value: float):
    def change(voxels, affine):
        voxels = voxels.astype(np.float32)
        voxels[0, 0, 0] = value
        return voxels, affine

    return change


def shifted(voxels, affine):
    affine[0, 3] += 3.2
    return voxels, affine


@pytest.mark.parametrize(
    ("breaker", "file", "problem", "severity", "fragment"),
    [
        (break_gzip, "imagesTr/b", "unreadable", "error", ""),
        (break_label_gzip, "labelsTr/b", "unreadable", "error", ""),
        (break_header, "imagesTr/b", "unreadable", "error", "32767"),
        (break_affine, "imagesTr/b", "unreadable", "error", "NaN"),
        (lambda f: (f / "imagesTr/b.nii.gz").write_bytes(b""), "imagesTr/b", "unreadable", "error", "empty"),
        (lambda f: (f / "imagesTr/b.nii.gz").unlink(), "imagesTr/b", "missing", "error", ""),
        (lambda f: (f / "labelsTr/b.nii.gz").unlink(), "labelsTr/b", "missing", "error", ""),
        (edit("b", lambda v, a: (v[..., None].repeat(2, 3), a)), "imagesTr/b", "channels", "error", "2 channels, 1 in"),
        (edit("b", lambda v, a: (v[:, :, 0], a)), "imagesTr/b", "unreadable", "error", "2"),
        (edit("b", shifted, "label"), "labelsTr/b", "grid", "error", "origin differs by 3.2 mm"),
        (edit("b", lambda v, a: (v[1:], a), "label"), "labelsTr/b", "grid", "error", "shape differs"),
        (edit("b", with_voxel(5), "label"), "labelsTr/b", "labels", "error", "values that no target names: 5;"),
        (edit("b", with_voxel(1.5), "label"), "labelsTr/b", "labels", "error", "1.5"),
        (edit("b", with_voxel(-1), "label"), "labelsTr/b", "labels", "error", "-1"),
        (edit("b", with_voxel(np.nan), "label"), "labelsTr/b", "labels", "error", "nan"),
        (edit("b", with_voxel(np.nan)), "imagesTr/b", "intensity", "error", "1 of 720 voxels are NaN"),
        (edit("b", with_voxel(np.inf)), "imagesTr/b", "intensity", "error", "1 of 720"),
        (edit("b", lambda v, a: (np.full_like(v, 7), a)), "imagesTr/b", "intensity", "error", "all voxels are 7"),
        (edit("b", lambda v, a: (v + 1024, a)), "imagesTr/b", "intensity", "warning", "below 0"),
        (edit("b", lambda v, a: (v / 1000, a)), "imagesTr/b", "intensity", "warning", "not like HU"),
        (edit("b", with_voxel(-32768)), "imagesTr/b", "intensity", "warning", "-32768"),
        (lambda f: save(f / "imagesTr/b.nii.gz", scan(0)), "imagesTr/b", "duplicate", "error", "a.nii.gz"),
        (lambda f: save(f / "labelsTr/b.nii.gz", organs(1)), "labelsTr/b", "empty organ", "warning", "tumour"),
        (lambda f: save(f / "labelsTr/b.nii.gz", organs()), "labelsTr/b", "empty organ", "warning", "liver, tumour"),
    ],
)
def test_one_broken_file(folder, breaker, file, problem, severity, fragment):
    breaker(folder)
    finding = only(check_path(folder))
    assert finding.file == folder / f"{file}.nii.gz"
    assert (finding.problem, finding.severity) == (problem, severity)
    assert fragment in finding.message


def test_implausible_spacing(folder):
    for kind in ("image", "label"):
        edit("b", lambda v, a: (v, a * [[1], [1], [0.01], [1]]), kind)(folder)
    finding = only(check_path(folder))
    assert (finding.problem, finding.severity) == ("spacing", "warning")
    assert "1.5 x 1.5 x 0.03 mm" in finding.message


def test_one_bad_scan_does_not_stop_the_others(folder):
    break_gzip(folder)
    edit("c", shifted, "label")(folder)
    edit("d", with_voxel(5), "label")(folder)
    assert [(f.file.name[0], f.problem) for f in check_path(folder)] == [
        ("b", "unreadable"),
        ("c", "grid"),
        ("d", "labels"),
    ]


def test_an_organ_in_no_scan(folder):
    for name in "abcd":
        save(folder / f"labelsTr/{name}.nii.gz", organs(1))
    findings = check_path(folder)
    assert [f.severity for f in findings] == ["warning"] * 4 + ["error"]
    assert findings[-1] == Finding(folder, "empty organ", "tumour = [2] is in none of the 4 readable label maps")


def test_overlapping_targets_and_ignored_values(folder):
    for name in "abcd":
        save(folder / f"labelsTr/{name}.nii.gz", organs(1, 2, 3))
    assert {f.problem for f in check_path(folder)} == {"labels"}
    assert check_path(folder, ignored=[3]) == []
    assert check_path(folder, targets={"liver": (1, 2), "tumour": (2, 3)}) == []


def test_intensities_of_mr_are_free(folder):
    describe(folder, modality={"0": "T1"})
    edit("b", lambda v, a: (v / 1000 + 1, a))(folder)
    assert check_path(folder) == []


def test_channel_files_on_two_grids(folder):
    task = load_task(folder)
    case = replace(task.cases[0], images=(folder / "imagesTr/a.nii.gz", folder / "imagesTr/b.nii.gz"))
    pair = replace(task, cases=(case,), channels=("T1", "T2"))
    assert check_task(pair) == []
    edit("b", shifted)(folder)
    finding = only(check_task(pair))
    assert (finding.file.name, finding.problem) == ("b.nii.gz", "grid")
    assert "a.nii.gz: origin differs by 3.2 mm" in finding.message


def test_nnunet_folder(tmp_path):
    for i, name in enumerate(("a_0000", "a_0001", "b_0000", "b_0001")):
        save(tmp_path / f"imagesTr/{name}.nii.gz", scan(i))
    for name in "ab":
        save(tmp_path / f"labelsTr/{name}.nii.gz", organs(1, 2))
    content = {"channel_names": {"0": "T2", "1": "ADC"}, "file_ending": ".nii.gz"}
    content["labels"] = {"background": 0, "whole": [1, 2], "core": 2}
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    assert check_path(tmp_path) == []
    (tmp_path / "imagesTr/b_0001.nii.gz").unlink()
    finding = only(check_path(tmp_path))
    assert (finding.file.name, finding.problem) == ("b_0001.nii.gz", "missing")


def test_manifest_with_a_root(folder, tmp_path_factory):
    manifest = tmp_path_factory.mktemp("manifests") / "toy.yaml"
    manifest.write_text(
        f"name: toy\norgan: liver\nmodality: CT\nfolder: {folder.name}\nchannels: [CT]\n"
        "labels: {0: background, 1: liver, 2: tumour, 3: cyst}\ntargets: {liver: [1, 2], cyst: [3]}\n"
    )
    findings = check_path(manifest, root=folder.parent)
    assert findings[-1].file == manifest
    assert findings[-1].message.startswith("cyst = [3] is in none of the 4")
    with pytest.raises(InputError, match="no such folder"):
        check_path(manifest)


def test_a_folder_of_scans_and_a_single_scan(folder):
    images = folder / "imagesTr"
    (images / "._a.nii.gz").write_bytes(b"\x00\x05\x16\x07")
    (images / "notes.txt").write_text("no scan")
    assert check_path(images) == []
    assert check_path(images / "a.nii.gz") == []
    shutil.copy(images / "a.nii.gz", images / "e.nii.gz")
    assert only(check_path(images)).message == "the same voxels as a.nii.gz"
    break_gzip(folder)
    assert only(check_path(images / "b.nii.gz")).problem == "unreadable"


def test_nothing_to_check(tmp_path):
    with pytest.raises(InputError, match="nothing at this path"):
        check_path(tmp_path / "absent")
    with pytest.raises(InputError, match="no scans"):
        check_path(tmp_path)
    (tmp_path / "dataset.json").write_text("{}")
    with pytest.raises(InputError, match=r"dataset\.json"):
        check_path(tmp_path)


def test_summary_is_plain_json(folder):
    break_gzip(folder)
    save(folder / "labelsTr/c.nii.gz", organs(1))
    summary = json.loads(json.dumps(summarise(check_path(folder), scans=4)))
    assert (summary["scans"], summary["errors"], summary["warnings"]) == (4, 1, 1)
    assert summary["problems"] == {"empty organ": 1, "unreadable": 1}
    assert summary["findings"][0]["file"] == str(folder / "imagesTr/b.nii.gz")
    assert set(summary["findings"][0]) == {"file", "problem", "message", "severity"}
    assert summarise([], scans=0) == {"scans": 0, "errors": 0, "warnings": 0, "problems": {}, "findings": []}


class TestRealScans:
    def few(self, source: Path, folder: Path, count: int) -> Path:
        """The first cases of a set, linked into a folder of their own."""
        content = json.loads((source / "dataset.json").read_text())
        content["training"] = content["training"][:count]
        for path in (Path(entry[key]) for entry in content["training"] for key in ("image", "label")):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).symlink_to(source / path)
        (folder / "dataset.json").write_text(json.dumps(content))
        return folder

    @pytest.mark.parametrize(
        ("name", "count"),
        [
            ("Task04_Hippocampus", 10),
            ("ACDC_CardiacCine", 6),
            ("BRATS2015_BrainTumour", 2),
            ("CHAOS_AbdomenMR", 2),
            ("OpenKBP_HeadNeckCT", 3),
            ("STS_CT_Sarcoma", 3),
            ("SpinalCord_MR", 8),
            ("Task09_Spleen_1case", 1),
            ("TotalSegExample_CT_1case", 1),
        ],
    )
    def test_real_sets_are_sound(self, shared_data, tmp_path, name, count):
        assert check_path(self.few(shared_data / name, tmp_path, count)) == []

    def test_faults_put_into_a_real_set(self, shared_data, tmp_path):
        folder = self.few(shared_data / "Task04_Hippocampus", tmp_path, 6)
        images, labels = (sorted((folder / name).iterdir()) for name in ("imagesTr", "labelsTr"))
        image = nib.load(images[1])
        voxels, affine = shifted(image.get_fdata(), image.affine)
        truncated = images[2].read_bytes()[:3000]
        for path in (images[1], images[2], images[3]):
            path.unlink()
        save(images[1], voxels, affine)
        images[2].write_bytes(truncated)
        shutil.copy(images[0].resolve(), images[3])
        findings = check_path(folder, targets={"anterior": 1})
        of_images = [(f.file, f.problem) for f in findings if f.file in images]
        assert of_images == [(images[2], "unreadable"), (images[3], "duplicate")]
        assert sum(f.problem == "labels" for f in findings) == 6  # label 2 has no name here
        assert any(f.file == labels[1] and f.message.endswith("origin differs by 3.2 mm") for f in findings)

    def test_channels_against_the_task(self, shared_data, tmp_path):
        folder = self.few(shared_data / "BRATS2015_BrainTumour", tmp_path, 1)
        content = json.loads((folder / "dataset.json").read_text())
        (folder / "dataset.json").write_text(json.dumps(content | {"modality": {"0": "FLAIR"}}))
        assert only(check_path(folder)).message == "2 channels, 1 in the task (FLAIR)"
