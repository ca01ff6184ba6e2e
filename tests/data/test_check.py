from __future__ import annotations

import gzip
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import get_args

import nibabel as nib
import numpy as np
import pytest

from medmeta.data.check import REMEDIES, Finding, Problem, Repair, Report, check_path, check_task, fix, summarise
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
    assert summary["orientations"] == {"RAS": 4}
    assert summary["images"][0] == {
        "file": str(folder / "imagesTr/a.nii.gz"), "shape": [8, 9, 10], "channels": 1, "spacing": [1.5, 1.5, 3.0],
        "orientation": "RAS", "dtype": "float32",
    }  # fmt: skip
    assert not any(summarise(Report(), scans=0).values())


def tilted(degrees: float, axis: int = 2) -> np.ndarray:
    """The affine of the task with its slices sheared along y, as a tilted gantry does."""
    affine = AFFINE.copy()
    affine[1, axis] += np.tan(np.radians(degrees)) * affine[axis, axis]
    return affine


@pytest.mark.parametrize("degrees", [0.1, 1.0, 20.0])
def test_axes_off_a_right_angle(folder, degrees):
    for kind in ("image", "label"):
        edit("b", lambda v, a: (v, tilted(degrees)), kind)(folder)
    finding = only(check_path(folder))
    assert (finding.file, finding.problem, finding.severity) == (folder / "imagesTr/b.nii.gz", "affine", "warning")
    assert f"{degrees:.3g} degrees off" in finding.message
    for kind in ("image", "label"):
        edit("b", lambda v, a: (v, tilted(0.02)), kind)(folder)
    assert check_path(folder) == []


def test_a_patient_on_two_sides(folder):
    for old, new in (("a", "p1_x"), ("b", "p1_y"), ("c", "p2_x"), ("d", "p2_y")):
        for kind in ("images", "labels"):
            (folder / f"{kind}Tr/{old}.nii.gz").rename(folder / f"{kind}Tr/{new}.nii.gz")
    names = ["p1_x", "p2_x", "p2_y"]
    cases = [{"image": f"./imagesTr/{n}.nii.gz", "label": f"./labelsTr/{n}.nii.gz"} for n in names]
    describe(folder, training=cases, test=["./imagesTr/p1_y.nii.gz"])
    assert check_path(folder) == []
    finding = only(check_path(folder, patient_pattern="^(.*)_"))
    assert (finding.file, finding.problem, finding.severity) == (folder, "split", "error")
    assert finding.message == "the patient p1: p1_x is labelled, p1_y is test"


def test_a_patient_on_two_sides_of_a_fold(folder):
    folds = [{"train": ["a", "b"], "val": ["c", "d"]}, {"train": ["a", "c"], "val": ["b", "d"]}]
    (folder / "splits_final.json").write_text(json.dumps(folds))
    assert check_path(folder) == []
    task = load_task(folder)
    cases = tuple(replace(case, patient="x" if case.id in "ab" else case.id) for case in task.cases)
    finding = only(check_task(replace(task, cases=cases)))
    assert finding.file == folder / "splits_final.json"
    assert finding.message == "the patient x: a is train of fold 1, b is val of fold 1"


@pytest.mark.parametrize("content", ["{", "[1]", "{}5", '[{"train": ["a"]}]', '[{"train": 1, "val": 2}]', "7"])
def test_a_file_of_folds_that_is_none(folder, content):
    (folder / "splits_final.json").write_text(content)
    finding = only(check_path(folder))
    assert (finding.file.name, finding.problem) == ("splits_final.json", "unreadable")


def test_folds_of_other_cases(folder):
    (folder / "splits_final.json").write_text(json.dumps([{"train": ["a", "z"], "val": ["b"]}]))
    assert only(check_path(folder)).message == "fold 0 names cases that are not there: z"


def test_advice_says_what_to_do_about_each_kind(folder):
    assert set(REMEDIES) == set(get_args(Problem))
    assert check_path(folder).advice() == []
    break_gzip(folder)
    for name in "cd":
        edit(name, with_voxel(5), "label")(folder)
    lines = check_path(folder).advice()
    assert [line.split(":")[0] for line in lines] == ["1 x unreadable", "2 x labels"]


# ---- repairs


def repaired(folder: Path, tmp_path_factory) -> tuple[list[Repair], Path]:
    """Repairs of a task; its own files stay as they are, bit by bit."""
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    out = tmp_path_factory.mktemp("out") / "fixed"
    repairs = fix(check_path(folder), out)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert {repair.copy for repair in repairs if repair.copy} == {path for path in out.rglob("*") if path.is_file()}
    return repairs, out


def test_a_sound_task_needs_no_repair(folder, tmp_path_factory):
    repairs, out = repaired(folder, tmp_path_factory)
    assert repairs == []
    assert not out.exists()


def test_labels_on_a_finer_turned_grid_come_onto_the_image(folder, tmp_path_factory):
    # Twice as fine and flipped along x: each voxel of the image holds 2 x 2 x 2 of one value.
    fine = organs(1, 2)[::-1].repeat(2, 0).repeat(2, 1).repeat(2, 2)
    affine = AFFINE @ np.diag([-0.5, 0.5, 0.5, 1.0])
    affine[:3, 3] = AFFINE[:3, :3] @ [7.25, -0.25, -0.25]
    save(folder / "labelsTr/b.nii.gz", fine, affine)
    (repair,), out = repaired(folder, tmp_path_factory)
    assert (repair.file, repair.copy) == (folder / "labelsTr/b.nii.gz", out / "labelsTr/b.nii.gz")
    image = nib.load(repair.copy)
    assert np.array_equal(np.asarray(image.dataobj), organs(1, 2))
    assert np.array_equal(image.affine, AFFINE)


def test_labels_that_would_be_lost_are_not_repaired(folder, tmp_path_factory):
    edit("b", lambda v, a: (v, np.eye(4)), "label")(folder)
    edit("c", shifted, "label")(folder)
    edit("d", with_voxel(1.5), "label")(folder)
    edit("d", shifted, "label")(folder)
    repairs, _ = repaired(folder, tmp_path_factory)
    assert [(repair.file.name, repair.copy is None) for repair in repairs] == [
        ("b.nii.gz", True), ("c.nii.gz", False), ("d.nii.gz", True),
    ]  # fmt: skip
    assert "of its volume" in repairs[0].message
    assert "1.5" in repairs[2].message


def test_a_nearly_orthonormal_affine_is_straightened_with_its_labels(folder, tmp_path_factory):
    for kind in ("image", "label"):
        edit("b", lambda v, a: (v, tilted(0.5)), kind)(folder)
        edit("c", lambda v, a: (v, tilted(15)), kind)(folder)
    voxels = np.asarray(nib.load(folder / "imagesTr/b.nii.gz").dataobj)
    repairs, out = repaired(folder, tmp_path_factory)
    assert [(repair.file.parent.name, repair.file.name, repair.copy is None) for repair in repairs] == [
        ("imagesTr", "b.nii.gz", False), ("labelsTr", "b.nii.gz", False), ("imagesTr", "c.nii.gz", True),
    ]  # fmt: skip
    image, labels = (nib.load(out / kind / "b.nii.gz") for kind in ("imagesTr", "labelsTr"))
    assert np.array_equal(np.asarray(image.dataobj), voxels)
    assert np.array_equal(np.asarray(labels.dataobj), organs(1, 2))
    assert np.array_equal(image.affine, labels.affine)
    axes = image.affine[:3, :3] / np.linalg.norm(image.affine[:3, :3], axis=0)
    assert np.abs(axes.T @ axes - np.eye(3)).max() < 1e-6
    corners = np.array([[x, y, z, 1] for x in (0, 7) for y in (0, 8) for z in (0, 9)])
    assert np.abs((image.affine - tilted(0.5)) @ corners.T).max() < 0.5 * 1.5
    shutil.copytree(out, folder, dirs_exist_ok=True)
    assert [finding.file.name for finding in check_path(folder)] == ["c.nii.gz"]


def test_whole_numbers_stay_whole(folder, tmp_path_factory):
    edit("b", lambda v, a: (v.astype(np.int16), tilted(0.5)))(folder)
    repairs, _ = repaired(folder, tmp_path_factory)
    assert nib.load(repairs[0].copy).get_data_dtype() == np.int16


def test_repairs_go_into_a_folder_of_their_own(folder, tmp_path_factory):
    edit("c", shifted, "label")(folder)
    for taken in (folder, folder / "imagesTr", folder / "dataset.json"):
        with pytest.raises(InputError, match="new or empty folder"):
            fix(check_path(folder), taken)
    fix(check_path(folder), tmp_path_factory.mktemp("empty"))


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
