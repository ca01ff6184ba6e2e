from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medmeta.data.manifests import Manifest, find_manifest, load_manifest, manifest_names
from medmeta.data.tasks import Case, Task, load_task, pair_folders, split_patients
from medmeta.errors import InputError

TARGETS = st.dictionaries(
    st.text("abcdef", min_size=1, max_size=3),
    st.lists(st.integers(1, 9), min_size=1, max_size=5, unique=True).map(tuple),
    min_size=1,
    max_size=4,
)


def make_task(targets: Mapping[str, tuple[int, ...]], ignored: tuple[int, ...] = (), patients: int = 0) -> Task:
    cases = tuple(Case(f"p{i}_{j}", f"p{i}", (Path(f"p{i}_{j}.nii.gz"),)) for i in range(patients) for j in (0, 1))
    return Task("toy", "organ", "MR", dict(targets), cases, ignored)


def touch(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()


def decathlon(folder: Path, names: tuple[str, ...] = ("a", "b"), **changes: object) -> Path:
    """A Decathlon folder of empty files; keys of dataset.json can be replaced, or left out with None."""
    touch(folder / "imagesTr", *(f"{name}.nii.gz" for name in names))
    touch(folder / "labelsTr", *(f"{name}.nii.gz" for name in names))
    content: dict[str, object] = {
        "name": "Task77_Toy",
        "licence": "CC0",
        "reference": "Nobody, 2020",
        "modality": {"0": "CT"},
        "labels": {"0": "background", "1": "liver", "2": "tumour"},
        "training": [{"image": f"./imagesTr/{n}.nii.gz", "label": f"./labelsTr/{n}.nii.gz"} for n in names],
        "test": [],
    }
    content = {key: value for key, value in {**content, **changes}.items() if value is not None}
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


def nnunet(folder: Path, **changes: object) -> Path:
    touch(folder / "imagesTr", *(f"{case}_000{i}.nii.gz" for case in "ab" for i in (0, 1)))
    touch(folder / "labelsTr", "a.nii.gz", "b.nii.gz")
    content = {
        "channel_names": {"0": "T2", "1": "ADC"},
        "labels": {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3},
        "regions_class_order": [1, 2],
        "file_ending": ".nii.gz",
        "numTraining": 2,
    }
    (folder / "dataset.json").write_text(json.dumps({**content, **changes}))
    return folder


def nifti(path: Path, shape: tuple[int, ...] = (4, 5, 6)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(np.zeros(shape, np.int16), np.eye(4)), path)
    return path


def refused(*fragments: str) -> pytest.RaisesContext[InputError]:
    """The error is one line that holds the fragments in this order."""
    return pytest.raises(
        InputError, match=r"\A[^\n]*" + "[^\n]*".join(re.escape(part) for part in fragments) + r"[^\n]*\Z"
    )


class TestAtoms:
    def test_disjoint_targets_are_their_own_atoms(self):
        task = make_task({"right": (4, 2), "left": (7,)})
        assert task.atoms == ((4, 2), (7,))
        assert task.classes == 2

    def test_nested_targets(self):
        task = make_task({"whole": (1, 2, 3), "core": (2, 3), "enhancing": (3,)})
        assert task.atoms == ((1,), (2,), (3,))

    def test_values_that_no_target_tells_apart_share_an_atom(self):
        assert make_task({"a": (1, 2, 3), "b": (3, 4)}).atoms == ((1, 2), (3,), (4,))

    @given(TARGETS)
    def test_atoms_are_the_coarsest_partition(self, targets):
        atoms = make_task(targets).atoms
        values = [value for atom in atoms for value in atom]
        assert sorted(values) == sorted({value for held in targets.values() for value in held})
        owners = [tuple(sorted(name for name in targets if atom[0] in targets[name])) for atom in atoms]
        assert len(set(owners)) == len(owners)  # no two atoms could be merged
        for atom, names in zip(atoms, owners, strict=True):
            assert all(tuple(sorted(n for n in targets if value in targets[n])) == names for value in atom)


class TestEncode:
    @given(TARGETS, st.randoms(use_true_random=False))
    @settings(max_examples=40)
    def test_against_a_loop_over_the_values(self, targets, random):
        ignored = (11, 300)
        task = make_task(targets, ignored)
        named = [value for atom in task.atoms for value in atom]
        values = [random.choice([0, *ignored, *named]) for _ in range(24)]
        labels = torch.tensor(values, dtype=torch.int16).reshape(1, 2, 3, 4)
        mask = task.encode(labels, "x.nii.gz")
        expected = [
            0 if v == 0 else -1 if v in ignored else next(i for i, a in enumerate(task.atoms, 1) if v in a)
            for v in values
        ]
        assert mask.dtype == torch.long
        assert mask.shape == labels.shape
        assert mask.flatten().tolist() == expected

    @given(TARGETS, st.randoms(use_true_random=False))
    @settings(max_examples=40)
    def test_decode_keeps_every_target(self, targets, random):
        task = make_task(targets, (11,))
        named = [value for atom in task.atoms for value in atom]
        labels = torch.tensor([random.choice([0, 11, *named]) for _ in range(30)], dtype=torch.int16)
        decoded = task.decode(task.encode(labels, "x"))
        for held in targets.values():
            assert torch.equal(torch.isin(decoded, torch.tensor(held)), torch.isin(labels, torch.tensor(held)))
        assert torch.equal(decoded == 11, labels == 11)
        assert torch.equal(task.encode(decoded, "x"), task.encode(labels, "x"))

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
    def test_integer_types(self, dtype):
        assert make_task({"a": (2,)}, (200,)).encode(torch.tensor([0, 2, 200], dtype=dtype), "x").tolist() == [0, 1, -1]

    def test_a_value_without_a_name_is_refused(self):
        task = make_task({"liver": (1, 2), "tumour": (2,)}, ignored=(4,))
        with refused("case7.nii.gz", "3, 9", "liver = [1, 2], tumour = [2]", "ignored = [4]", "`ignored`"):
            task.encode(torch.tensor([0, 1, 3, 9, 9, 4]), "case7.nii.gz")

    @pytest.mark.parametrize("value", [-1, -2, -3, 10, 2**31 - 1])
    def test_values_out_of_the_table_are_refused(self, value):
        with refused(str(value)):
            make_task({"a": (9,)}).encode(torch.tensor([0, value, 9], dtype=torch.int32), "x")

    def test_many_strange_values_are_counted(self):
        with refused("10, 11, 12 and 17 more (20 in all)"):
            make_task({"a": (1,)}).encode(torch.arange(10, 30), "x")

    def test_floats_are_refused(self):
        with refused("x", "float32", "integer"):
            make_task({"a": (1,)}).encode(torch.zeros(3), "x")


class TestTask:
    @pytest.mark.parametrize(
        ("targets", "ignored", "fragment"),
        [
            ({}, (), "no targets"),
            ({"liver": ()}, (), "'liver' without values"),
            ({"liver": (0, 1)}, (), "background"),
            ({"liver": (-1,)}, (), "-1"),
            ({"liver": (1.0,)}, (), "1.0"),
            ({"liver": (True,)}, (), "True"),
            ({"liver": "1,2"}, (), "'1,2'"),
            ({"liver": (1, 1)}, (), "each label value once"),
            ({"liver": (70000,)}, (), "65535"),
            ({"liver": (1,), "tumour": (2,)}, (2,), "ignored values [2] in target 'tumour'"),
            ({"liver": (1,)}, (0,), "background"),
        ],
    )
    def test_targets_that_cannot_be_meant(self, targets, ignored, fragment):
        with refused("task toy", fragment):
            make_task(targets, ignored)

    def test_a_single_value_is_a_target(self):
        assert Task("t", "o", "CT", {"liver": 3}, ()).targets == {"liver": (3,)}

    def test_cases_and_modality(self):
        case = Case("a", "a", (Path("a.nii.gz"),))
        with refused("'a' twice"):
            Task("t", "o", "CT", {"x": (1,)}, (case, case))
        with refused("'PET'", "CT or MR"):
            Task("t", "o", "PET", {"x": (1,)}, ())

    def test_patients_and_their_cases(self):
        task = make_task({"a": (1,)}, patients=4)
        assert task.patients == ("p0", "p1", "p2", "p3")
        assert [case.id for case in task.of_patients(["p2", "p0"]).cases] == ["p0_0", "p0_1", "p2_0", "p2_1"]
        with refused("task toy", "p9"):
            task.of_patients(["p0", "p9"])


class TestDecathlon:
    def test_folder(self, tmp_path):
        folder = decathlon(tmp_path / "toy", test=["./imagesTs/c.nii.gz"])
        touch(folder / "imagesTs", "c.nii.gz")
        task = load_task(folder)
        assert (task.name, task.organ, task.modality) == ("Task77_Toy", "toy", "CT")
        assert task.targets == {"liver": (1,), "tumour": (2,)}
        assert (task.terms, task.reference, task.channels) == ("CC0", "Nobody, 2020", ("CT",))
        assert task.cases[0] == Case("a", "a", (folder / "imagesTr/a.nii.gz",), folder / "labelsTr/a.nii.gz")
        assert task.cases[2] == Case("c", "c", (folder / "imagesTs/c.nii.gz",), None)
        assert [case.id for case in task.labelled.cases] == ["a", "b"]
        assert load_task(folder / "dataset.json") == task

    def test_what_the_caller_names_counts(self, tmp_path):
        folder = decathlon(tmp_path)
        task = load_task(folder, targets={"liver": (1, 2)}, ignored=(5,), name="Task01_Mine")
        assert (task.targets, task.ignored, task.name, task.organ) == ({"liver": (1, 2)}, (5,), "Task01_Mine", "mine")
        assert load_task(folder, organ="liver").organ == "liver"

    @pytest.mark.parametrize(
        ("modality", "expected"), [({"0": "ct "}, "CT"), ({"0": "MRI"}, "MR"), ({"0": "CT", "1": "PET"}, "MR")]
    )
    def test_modality(self, tmp_path, modality, expected):
        task = load_task(decathlon(tmp_path, modality=modality))
        assert task.modality == expected
        assert task.channels == tuple(modality.values())

    def test_labels_of_one_name_make_one_target(self, tmp_path):
        task = load_task(decathlon(tmp_path, labels={"0": "background", "1": "kidney", "2": "kidney"}))
        assert task.targets == {"kidney": (1, 2)}

    def test_patients_by_pattern(self, tmp_path):
        folder = decathlon(tmp_path, ("p1_frame01", "p1_frame02", "p2_frame01"))
        assert load_task(folder).patients == ("p1_frame01", "p1_frame02", "p2_frame01")
        assert load_task(folder, patient_pattern="^(.*)_frame").patients == ("p1", "p2")

    @pytest.mark.parametrize(
        ("pattern", "fragment"),
        [
            ("^(p1)_frame", "'p2_frame01'"),
            ("^(.*", "regular expression"),
            ("_frame", "0 groups"),
            ("(x*)", "'p1_frame01'"),
        ],
    )
    def test_unusable_patterns(self, tmp_path, pattern, fragment):
        with refused("dataset.json", fragment):
            load_task(decathlon(tmp_path, ("p1_frame01", "p2_frame01")), patient_pattern=pattern)

    def test_hidden_files_are_skipped(self, tmp_path):
        folder = decathlon(tmp_path, ("._a", "a"))
        assert [case.id for case in load_task(folder).cases] == ["a"]

    @pytest.mark.parametrize(
        ("changes", "fragment"),
        [
            ({"labels": None}, "no key 'labels'"),
            ({"modality": None}, "no key 'modality'"),
            ({"training": None}, "no key 'training'"),
            ({"training": []}, "no cases"),
            ({"training": {"image": "a"}}, "'training' of type dict"),
            ({"training": [{"image": "./imagesTr/a.nii.gz"}]}, "an image and a label"),
            ({"training": [{"image": 3, "label": "x"}]}, "the entry 3"),
            ({"training": [{"image": "/etc/a.nii.gz", "label": "x"}]}, "'/etc/a.nii.gz'"),
            ({"training": [{"image": "C:\\a.nii.gz", "label": "x"}]}, "a.nii.gz"),
            ({"training": [{"image": "imagesTr/a.nii.gz", "label": "./../b.nii.gz"}]}, "'./../b.nii.gz'"),
            ({"test": ["..\\a.nii.gz"]}, "without '..'"),
            ({"training": [{"image": "imagesTr/a.nii.gz", "label": "labelsTr/a.nii.gz"}] * 2}, "'a' twice"),
            ({"labels": {"0": "background"}}, "no targets"),
            ({"labels": {"liver": 1}}, "labels"),
            ({"labels": ["liver"]}, "labels"),
            ({"modality": {"0": "T1", "2": "T2"}}, "channels numbered [0, 2]"),
            ({"modality": "CT"}, "channels 'CT'"),
        ],
    )
    def test_a_dataset_json_that_cannot_be_meant(self, tmp_path, changes, fragment):
        with refused("dataset.json", fragment):
            load_task(decathlon(tmp_path, **changes))

    @pytest.mark.parametrize("text", ["{", "[]", "\x00", "[" * 100000])
    def test_no_json(self, tmp_path, text):
        (tmp_path / "dataset.json").write_text(text)
        with refused("dataset.json"):
            load_task(tmp_path)

    def test_no_folder(self, tmp_path):
        with refused("absent", "no such folder"):
            load_task(tmp_path / "absent")
        with refused("no dataset.json"):
            load_task(tmp_path)

    def test_missing_files_are_named_and_counted(self, tmp_path):
        folder = decathlon(tmp_path, tuple("abcdef"))
        for name in "abcd":
            (folder / f"labelsTr/{name}.nii.gz").unlink()
        with refused("images without labels: a.nii.gz, b.nii.gz, c.nii.gz and 1 more (4 in all)"):
            load_task(folder)
        (folder / "imagesTr/e.nii.gz").unlink()
        assert len(load_task(folder, must_exist=False).cases) == 6
        touch(folder / "labelsTr", *(f"{name}.nii.gz" for name in "abcd"))
        with refused("labels without images: e.nii.gz"):
            load_task(folder)
        (folder / "labelsTr/e.nii.gz").unlink()
        with refused("missing image files: e.nii.gz"):
            load_task(folder)


class TestNnUnet:
    def test_folder(self, tmp_path):
        folder = nnunet(tmp_path / "Dataset012_Prostate")
        touch(folder / "imagesTs", "c_0000.nii.gz", "c_0001.nii.gz", "._c_0000.nii.gz")
        task = load_task(folder)
        assert (task.name, task.organ, task.modality) == ("Dataset012_Prostate", "prostate", "MR")
        assert (task.targets, task.ignored) == ({"whole": (1, 2), "core": (2,)}, (3,))
        assert task.channels == ("T2", "ADC")
        assert [case.id for case in task.cases] == ["a", "b", "c"]
        assert [path.name for path in task.cases[0].images] == ["a_0000.nii.gz", "a_0001.nii.gz"]
        assert task.cases[0].labels == folder / "labelsTr/a.nii.gz"
        assert task.cases[2].labels is None

    def test_an_empty_test_folder(self, tmp_path):
        touch(nnunet(tmp_path) / "imagesTs")
        assert len(load_task(tmp_path).cases) == 2

    @pytest.mark.parametrize(
        ("remove", "fragment"),
        [
            (["labelsTr/a.nii.gz"], "images without labels: a_0000.nii.gz"),
            (["imagesTr/a_0000.nii.gz", "imagesTr/a_0001.nii.gz"], "labels without images: a.nii.gz"),
            (["imagesTr/b_0001.nii.gz"], "missing image files: b_0001.nii.gz"),
            (["labelsTr/a.nii.gz", "labelsTr/b.nii.gz"], "no scans"),
        ],
    )
    def test_missing_files(self, tmp_path, remove, fragment):
        nnunet(tmp_path)
        for name in remove:
            (tmp_path / name).unlink()
        with refused(fragment):
            load_task(tmp_path)

    @pytest.mark.parametrize("name", ["a_0002.nii.gz", "scan.nii.gz"])
    def test_names_outside_the_channels(self, tmp_path, name):
        touch(nnunet(tmp_path) / "imagesTr", name)
        with refused("imagesTr", name, "case_0000.nii.gz to case_0001.nii.gz"):
            load_task(tmp_path)

    @pytest.mark.parametrize(
        ("labels", "fragment"),
        [
            (["liver"], "labels"),
            ({"background": 0, "liver": "1"}, "'1'"),
            ({"background": 0, "liver": [1, 2], "ignore": 2}, "ignored values [2]"),
            ({"background": 0}, "no targets"),
        ],
    )
    def test_unusable_labels(self, tmp_path, labels, fragment):
        with refused("dataset.json", fragment):
            load_task(nnunet(tmp_path, labels=labels))


class TestPairFolders:
    def pair(self, folder: Path, **changes):
        return pair_folders(folder / "x", folder / "y", **({"targets": {"liver": 1}, "modality": "CT"} | changes))

    def test_by_name_whatever_the_suffix(self, tmp_path):
        touch(tmp_path / "y", "b.seg.nrrd", "a.nii", "notes.txt", "._a.nii")
        nifti(tmp_path / "x/a.nii.gz")
        touch(tmp_path / "x", "b.mha", ".DS_Store")
        task = self.pair(tmp_path)
        assert [(c.id, c.images[0].name, c.labels.name) for c in task.cases] == [
            ("a", "a.nii.gz", "a.nii"),
            ("b", "b.mha", "b.seg.nrrd"),
        ]
        assert (task.channels, task.organ, task.targets) == (("image",), "liver", {"liver": (1,)})

    def test_channels_in_files(self, tmp_path):
        for name in ("s_0007_0001", "s_0007_0000", "t_0000", "t_0001"):
            nifti(tmp_path / f"x/{name}.nii.gz")
        touch(tmp_path / "y", "s_0007.nii.gz", "t.nii.gz")
        task = self.pair(tmp_path, patient_pattern="^(.)")
        assert [path.name for path in task.cases[0].images] == ["s_0007_0000.nii.gz", "s_0007_0001.nii.gz"]
        assert task.channels == ("channel 0", "channel 1")
        assert task.patients == ("s", "t")

    def test_numbers_in_names_are_no_channels(self, tmp_path):
        for i in (1, 2):
            nifti(tmp_path / f"x/scan_000{i}.nii.gz")
        touch(tmp_path / "y", "scan_0001.nii.gz", "scan_0002.nii.gz")
        assert [case.id for case in self.pair(tmp_path).cases] == ["scan_0001", "scan_0002"]

    def test_channels_in_one_file(self, tmp_path):
        nifti(tmp_path / "x/a.nii.gz", (4, 5, 6, 3))
        touch(tmp_path / "y", "a.nii.gz")
        assert self.pair(tmp_path).channels == ("channel 0", "channel 1", "channel 2")

    @pytest.mark.parametrize(
        ("images", "labels", "fragments"),
        [
            ("ab", "a", ["x", "images without labels: b.nii.gz"]),
            ("a", "abcde", ["labels without images: b.nii.gz, c.nii.gz, d.nii.gz and 1 more (4 in all)"]),
            ("", "a", ["x", "no scans"]),
            ("a", "", ["y", "no scans"]),
        ],
    )
    def test_partners_missing(self, tmp_path, images, labels, fragments):
        touch(tmp_path / "x", *(f"{name}.nii.gz" for name in images))
        touch(tmp_path / "y", *(f"{name}.nii.gz" for name in labels))
        with refused(*fragments):
            self.pair(tmp_path)

    def test_a_channel_missing(self, tmp_path):
        touch(tmp_path / "x", "a_0000.nii.gz", "a_0001.nii.gz", "b_0000.nii.gz")
        touch(tmp_path / "y", "a.nii.gz", "b.nii.gz")
        with refused("missing image files: b_0001"):
            self.pair(tmp_path)

    def test_two_files_for_one_case(self, tmp_path):
        touch(tmp_path / "x", "a.nii.gz", "a.nrrd")
        touch(tmp_path / "y", "a.nii.gz")
        with refused("a.nii.gz and a.nrrd", "one file"):
            self.pair(tmp_path)
        touch(tmp_path / "y", "a.mha")
        with refused("y", "'a' twice"):
            self.pair(tmp_path)

    def test_no_folder(self, tmp_path):
        touch(tmp_path / "y", "a.nii.gz")
        with refused("x", "no such folder"):
            self.pair(tmp_path)

    def test_targets(self, tmp_path):
        nifti(tmp_path / "x/a.nii.gz")
        touch(tmp_path / "y", "a.nii.gz")
        with refused("background"):
            self.pair(tmp_path, targets={"liver": (0, 1)})


class TestManifests:
    def text(self, **changes: object) -> str:
        content = {"name": "Toy", "organ": "liver", "modality": "CT", "folder": "toy", "channels": ["CT"]}
        content["labels"] = {0: "background", 1: "liver", 2: "tumour"}
        return json.dumps({**content, **changes}).replace('"0":', "0:").replace('"1":', "1:").replace('"2":', "2:")

    def test_all_ten_decathlon_tasks(self):
        names = [name for name in manifest_names() if name.startswith("Task")]
        assert [name[:6] for name in names] == [f"Task{i:02d}" for i in range(1, 11)]
        for name in names:
            manifest = load_manifest(find_manifest(name))
            task = Task(name, manifest.organ, manifest.modality, manifest.targets, ())
            assert manifest.name == manifest.folder == name
            assert {value for atom in task.atoms for value in atom} == set(manifest.labels) - {0}
            assert manifest.size_gb > 0
            assert manifest.licence == "CC-BY-SA 4.0"

    def test_sets_to_be_fetched_by_hand_say_how_and_under_which_terms(self):
        names = {name for name in manifest_names() if not name.startswith("Task")}
        assert names == {
            "ACDC", "AMOS_CT", "BTCV", "BraTS2021", "CHAOS_MR", "FLARE22", "KiTS23", "LA2018", "PROMISE12",
            "TotalSegmentator",
        }  # fmt: skip
        for name in names:
            manifest = load_manifest(find_manifest(name))
            task = Task(name, manifest.organ, manifest.modality, manifest.targets, ())
            assert manifest.name == name
            assert {value for atom in task.atoms for value in atom} == set(manifest.labels) - {0}
            assert not manifest.source
            assert "https://" in manifest.obtain
            assert manifest.licence and manifest.reference

    def test_sources_are_those_that_monai_pins(self):
        from monai.apps import DecathlonDataset

        for name, checksum in DecathlonDataset.md5.items():
            manifest = load_manifest(find_manifest(name))
            assert (manifest.checksum, manifest.source) == (checksum, DecathlonDataset.resource[name])

    def test_nested_targets(self):
        brain = load_manifest(find_manifest("Task01_BrainTumour"))
        assert list(brain.targets.values()) == [[1, 2, 3], [2, 3], [3]]
        assert brain.labels[3] == "enhancing tumour"
        assert load_manifest(find_manifest("Task03_Liver")).targets == {"liver": [1, 2], "tumour": [2]}

    def test_task_under_a_root(self, tmp_path):
        decathlon(tmp_path / "data/toy", ("p1_x", "p1_y"))
        file = tmp_path / "toy.yaml"
        file.write_text(
            self.text(
                targets={"liver": [1, 2], "tumour": [2]}, patient_pattern="^(.*)_", licence="MIT", channels=["late"]
            )
        )
        task = load_task(file, root=tmp_path / "data")
        assert (task.name, task.organ, task.terms, task.reference) == ("Toy", "liver", "MIT", "Nobody, 2020")
        assert task.targets == {"liver": (1, 2), "tumour": (2,)}
        assert (task.patients, task.channels) == (("p1",), ("late",))
        assert load_task(file, root=tmp_path / "data", targets={"all": (1, 2)}).targets == {"all": (1, 2)}
        with refused(str(tmp_path / "toy"), "no such folder", "data root"):
            load_task(file)

    def test_channels_must_agree(self, tmp_path):
        decathlon(tmp_path / "toy")
        (tmp_path / "toy.yaml").write_text(self.text(channels=["T1", "T2"]))
        with refused("dataset.json", "1 channels (CT)", "T1, T2"):
            load_task(tmp_path / "toy.yaml")

    @pytest.mark.parametrize(
        ("text", "fragments"),
        [
            ("a: [", ["not YAML"]),
            ("- a", ["list at the top level"]),
            ("", ["NoneType at the top level"]),
        ],
    )
    def test_no_manifest(self, tmp_path, text, fragments):
        (tmp_path / "toy.yaml").write_text(text)
        with refused("toy.yaml", *fragments):
            load_manifest(tmp_path / "toy.yaml")

    @pytest.mark.parametrize(
        ("changes", "fragments"),
        [
            ({"licens": "MIT"}, ["unknown key 'licens'", "licence"]),
            ({"modality": "PET"}, ["modality = 'PET'", "'CT' or 'MR'"]),
            ({"targets": {"liver": [3]}}, ["[3]", "[0, 1, 2]"]),
            ({"targets": {"liver": []}}, ["without values"]),
            ({"targets": {"liver": [0]}}, ["background"]),
            ({"targets": {"liver": ["1"]}}, ["targets.liver.0 = '1'"]),
            ({"ignored": [2], "targets": {"tumour": [2]}}, ["ignored values [2]"]),
            ({"channels": []}, ["no channels"]),
            ({"folder": "../elsewhere"}, ["'../elsewhere'"]),
            ({"folder": "/elsewhere"}, ["'/elsewhere'"]),
        ],
    )
    def test_unusable_keys(self, tmp_path, changes, fragments):
        (tmp_path / "toy.yaml").write_text(self.text(**changes))
        with refused("toy.yaml", *fragments):
            load_manifest(tmp_path / "toy.yaml")

    def test_missing_key(self, tmp_path):
        (tmp_path / "toy.yaml").write_text("name: x\n")
        with refused("toy.yaml", "no key 'organ'", "labels"):
            load_manifest(tmp_path / "toy.yaml")
        with refused("absent.yaml"):
            load_manifest(tmp_path / "absent.yaml")

    def test_unknown_name(self):
        with refused("Task11_Kidney", "Task10_Colon"):
            find_manifest("Task11_Kidney")

    def test_schema_names_are_documented(self):
        assert all(f"\n        {key}: " in (Manifest.__doc__ or "") for key in Manifest.model_fields)


class TestSplit:
    @given(
        st.integers(2, 40),
        st.lists(st.floats(0.05, 1.0), min_size=1, max_size=4).map(lambda parts: [p / sum(parts) for p in parts]),
        st.integers(0, 5),
    )
    @settings(max_examples=60)
    def test_fractions_share_out_every_patient(self, patients, parts, seed):
        task = make_task({"a": (1,)}, patients=patients)
        if patients < len(parts):
            with refused(f"{patients} patients", f"at least {len(parts)}"):
                split_patients(task, parts, seed)
            return
        split = split_patients(task, parts, seed)
        dealt = [patient for part in split for patient in part.patients]
        assert sorted(dealt) == sorted(task.patients)
        assert all(len(part.cases) == 2 * len(part.patients) > 0 for part in split)
        if patients * min(parts) >= 1:
            assert all(abs(len(p.patients) - f * patients) < 1 for p, f in zip(split, parts, strict=True))

    @given(st.lists(st.integers(1, 5), min_size=1, max_size=3), st.integers(0, 100))
    @settings(max_examples=30)
    def test_counts(self, counts, seed):
        split = split_patients(make_task({"a": (1,)}, patients=15), counts, seed)
        assert [len(part.patients) for part in split] == counts
        assert len({patient for part in split for patient in part.patients}) == sum(counts)

    def test_a_seed_decides_whatever_the_order_of_the_cases(self):
        task = make_task({"a": (1,)}, patients=12)
        backwards = Task("toy", "organ", "MR", task.targets, task.cases[::-1])
        sets = [[set(part.patients) for part in split_patients(t, (4, 3), 7)] for t in (task, task, backwards)]
        assert sets[0] == sets[1] == sets[2]
        assert sets[0] != [set(part.patients) for part in split_patients(task, (4, 3), 8)]

    def test_larger_supports_hold_the_smaller(self):
        task = make_task({"a": (1,)}, patients=12)
        test, one = split_patients(task, (5, 1), 3)
        same, three = split_patients(task, (5, 3), 3)
        assert test == same
        assert set(one.patients) < set(three.patients)

    def test_fractions_may_leave_patients_over(self):
        split = split_patients(make_task({"a": (1,)}, patients=10), (0.2, 0.3), 0)
        assert [len(part.patients) for part in split] == [2, 3]

    @pytest.mark.parametrize(
        ("parts", "fragment"),
        [
            ((4, 3), "found 6 patients; required: at least 7 patients"),
            ((0.7, 0.7), "sum 1.4"),
            ((3, 0), "positive"),
            ((-0.5, 0.5), "positive"),
            ((float("nan"),), "positive"),
            ((3, 0.5), "positive"),
            ((), "positive"),
        ],
    )
    def test_what_cannot_be_dealt(self, parts, fragment):
        with refused("task toy", fragment):
            split_patients(make_task({"a": (1,)}, patients=6), parts, 0)


class TestRealSets:
    def test_hippocampus_by_manifest(self, shared_data):
        task = load_task(find_manifest("Task04_Hippocampus"), root=shared_data)
        assert (task.organ, task.modality, task.classes, len(task.cases)) == ("hippocampus", "MR", 2, 260)
        assert task.terms == "CC-BY-SA 4.0"

    def test_acdc_patients(self, shared_data):
        task = load_task(shared_data / "ACDC_CardiacCine", patient_pattern="^(.*)_frame", organ="heart")
        assert (len(task.cases), len(task.patients)) == (60, 30)
        train, test = split_patients(task, (0.8, 0.2), seed=1)
        assert (len(train.cases), len(test.cases)) == (48, 12)
        assert not set(train.patients) & set(test.patients)

    def test_brats_regions(self, shared_data):
        from medmeta.data.volume import read_labels

        regions = {"whole": (1, 2, 3, 4), "core": (1, 3, 4), "enhancing": (4,)}
        task = load_task(shared_data / "BRATS2015_BrainTumour", targets=regions)
        assert task.channels == ("FLAIR", "T1c")
        assert task.atoms == ((1, 3), (2,), (4,))
        labels = read_labels(task.cases[0].labels).data
        decoded = task.decode(task.encode(labels, task.cases[0].labels))
        for held in regions.values():
            assert torch.equal(torch.isin(decoded, torch.tensor(held)), torch.isin(labels, torch.tensor(held)))


def test_background_values_count_as_background() -> None:
    task = Task("kidneys", "kidney", "MR", {"kidney": (2, 3)}, (), background=(1, 4))
    labels = torch.tensor([0, 1, 2, 3, 4])
    assert task.encode(labels, "labels").tolist() == [0, 0, 1, 1, 0]
    with pytest.raises(InputError, match="background 0, 1, 4"):
        task.encode(torch.tensor([5]), "labels.nii.gz")
    with pytest.raises(InputError, match="one place"):
        Task("kidneys", "kidney", "MR", {"kidney": (2, 3)}, (), background=(3,))
