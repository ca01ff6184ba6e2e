"""A scan is the same scan however its axes are stored: over random affines, shapes, flips and permutations."""

from __future__ import annotations

import itertools
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from medmeta.config import TrainConfig, load_config
from medmeta.data.check import check_path, fix
from medmeta.data.manifests import load_manifest
from medmeta.data.preprocess import Preprocess
from medmeta.data.volume import Volume, grid_difference, read_header, read_labels, write_volume
from medmeta.errors import InputError

few = settings(max_examples=25, deadline=None, derandomize=True)
shapes = st.tuples(*[st.integers(3, 9)] * 3)
turns = st.tuples(st.permutations(range(3)), st.tuples(*[st.booleans()] * 3))


@st.composite
def affines(draw, degrees: float = 180.0) -> torch.Tensor:
    angles = draw(st.tuples(*[st.floats(-degrees, degrees)] * 3))
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix()
    affine[:3, :3] *= draw(st.tuples(*[st.floats(0.3, 6.0)] * 3))
    affine[:3, 3] = draw(st.tuples(*[st.floats(-500.0, 500.0)] * 3))
    return torch.from_numpy(affine)


def turned(volume: Volume, turn: tuple[list[int], tuple[bool, ...]]) -> Volume:
    """The same voxels at the same places, stored with other axes."""
    order, flips = turn
    step = np.zeros((4, 4))
    step[3, 3] = 1
    for new, (old, flipped) in enumerate(zip(order, flips, strict=True)):
        step[old, new] = -1 if flipped else 1
        step[old, 3] = volume.shape[old] - 1 if flipped else 0
    data = volume.data.permute(0, *(axis + 1 for axis in order)).flip([axis + 1 for axis in range(3) if flips[axis]])
    return Volume(data, volume.affine @ torch.from_numpy(step))


def values(shape: tuple[int, int, int], seed: int = 0) -> torch.Tensor:
    return torch.randn((1, *shape), generator=torch.Generator().manual_seed(seed))


@few
@given(affine=affines(), shape=shapes, turn=turns)
def test_turning_moves_no_voxel(affine, shape, turn):
    volume = Volume(values(shape), affine)
    other = turned(volume, turn)
    places = {}
    for one in (volume, other):
        for index in itertools.product(*map(range, one.shape)):
            place = one.affine @ torch.tensor([*index, 1.0], dtype=torch.float64)
            places.setdefault(float(one.data[(0, *index)]), []).append(place)
    assert all(torch.allclose(first, second, atol=1e-6) for first, second in places.values())


@few
@given(affine=affines(degrees=20.0), shape=shapes, turn=turns)
def test_the_working_grid_does_not_depend_on_the_stored_axes(affine, shape, turn):
    volume = Volume(values(shape), affine)
    preprocess = Preprocess("MR", (2.0, 2.0, 2.0))
    straight, other = preprocess.forward(volume), preprocess.forward(turned(volume, turn))
    assert grid_difference(straight, other, tolerance_mm=1e-5) is None
    assert torch.allclose(straight.data, other.data, atol=1e-4)


@few
@given(affine=affines(), shape=shapes, turn=turns)
def test_labels_with_other_axes_come_back_onto_their_image(affine, shape, turn):
    labels = torch.zeros((1, *shape), dtype=torch.int16)
    labels[0, 1, 0:2, 1] = 1
    labels[0, 0, 2, 0:2] = 2
    image = Volume(values(shape), affine)
    task = {"name": "t", "modality": {"0": "MR"}, "labels": {"0": "background", "1": "a", "2": "b"}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "task"
        folder.mkdir()
        entry = {"image": "image.nii", "label": "label.nii"}
        (folder / "dataset.json").write_text(json.dumps(task | {"training": [entry]}))
        write_volume(image, folder / "image.nii")
        write_volume(turned(Volume(labels, affine), turn), folder / "label.nii")
        report = check_path(folder)
        repairs = fix(report, Path(name) / "fixed")
        alike = grid_difference(read_header(folder / "label.nii"), read_header(folder / "image.nii")) is None
        assert [finding.problem for finding in report] == ([] if alike else ["grid"])
        assert len(repairs) == (not alike)
        for repair in repairs:
            assert torch.equal(read_labels(repair.copy).data, labels)
            assert grid_difference(read_header(repair.copy), read_header(folder / "image.nii")) is None


words = st.text(st.characters(codec="utf-8", exclude_categories=["C"]), max_size=8)
plain = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 300) | st.floats(allow_nan=False) | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words | st.integers(0, 9), inner, max_size=3),
    max_leaves=6,
)
SOUND = {
    "name": "Toy", "organ": "liver", "modality": "CT", "folder": "toy", "channels": ["CT"],
    "labels": {0: "background", 1: "liver", 2: "tumour"}, "targets": {"liver": [1, 2], "tumour": [2]},
}  # fmt: skip


def written(folder: str, content: object) -> Path:
    path = Path(folder) / "x.yaml"
    path.write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
    return path


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    changes=st.dictionaries(st.sampled_from([*SOUND, "ignored", "checksum", "size_gb", "licence"]), plain, max_size=2)
)
def test_a_manifest_is_sound_or_refused(changes):
    content = SOUND | changes
    with tempfile.TemporaryDirectory() as folder:
        try:
            manifest = load_manifest(written(folder, content))
        except InputError as error:
            assert "x.yaml" in str(error) and "\n" not in str(error)
        else:
            assert load_manifest(written(folder, manifest.model_dump())) == manifest
            named = {value for values in manifest.targets.values() for value in values}
            assert named <= set(manifest.labels) and not named & set(manifest.ignored)


CONFIG = {"data": ".", "tasks": [{"path": "a"}], "phases": [{"name": "meta", "learner": "fomaml"}], "seed": 1}


@settings(max_examples=100, deadline=None, derandomize=True)
@given(changes=st.dictionaries(st.sampled_from([*CONFIG, "voxels", "network", "precision", "x"]), plain, max_size=2))
def test_a_config_is_sound_or_refused(changes):
    with tempfile.TemporaryDirectory() as folder:
        try:
            config = load_config(TrainConfig, written(folder, CONFIG | changes))
        except InputError as error:
            assert "x.yaml" in str(error) and "\n" not in str(error)
        else:
            assert config.data.is_absolute() and config.voxels >= 16**3
