"""Models as folders: what is saved is what is loaded; what was changed, cut short or mixed up is refused."""

from __future__ import annotations

import json
import os
import stat
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small import TERMS, phantom, same, tiny_2d, tiny_model, tree, write_pairs

import medmeta.segmenter as segmenter_module
from medmeta.adaptation import adapt
from medmeta.data.preprocess import Preprocess
from medmeta.data.volume import Volume, grid_difference, read_header, write_volume
from medmeta.errors import InputError
from medmeta.fine_tuning import Budget
from medmeta.inference import torch_predictor
from medmeta.postprocess import keep_largest
from medmeta.registration import carry_labels, make_atlas
from medmeta.segmenter import (
    ATLAS_FILE,
    DESCRIPTION,
    OVERVIEW,
    STATE,
    WEIGHTS,
    Model,
    Segmenter,
    as_model,
    load,
    shipped_models,
)


@pytest.fixture(scope="module")
def support(tmp_path_factory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("support"))


@pytest.fixture(scope="module")
def segmenter(support, overview_from_the_first_step) -> Segmenter:
    targets = {"anterior": (1,), "posterior": (2,)}
    return adapt(
        tiny_model(), support / "images", support / "labels", targets=targets, budget=Budget(steps=20, rate=2e-2)
    )


@pytest.fixture
def saved(segmenter, tmp_path) -> Path:
    segmenter.save(tmp_path / "model")
    return tmp_path / "model"


def test_an_adapted_model_loads_as_it_was_saved(segmenter, saved):
    loaded = load(saved)
    assert isinstance(loaded, Segmenter)
    assert same(loaded.state, segmenter.state)
    assert same(loaded.model.learner.state_dict(), segmenter.model.learner.state_dict())
    for name in ("preprocess", "targets", "labels", "channels", "patch"):
        assert getattr(loaded, name) == getattr(segmenter, name), name
    assert loaded.card["support_scans"] == 2
    assert loaded.model.card == segmenter.model.card
    assert (loaded.model.voxels, loaded.model.learner.options) == (16**3, segmenter.model.learner.options)
    assert len(loaded.atlases) == len(segmenter.atlases) == 2
    for ours, theirs in zip(segmenter.atlases, loaded.atlases, strict=True):
        assert (ours.spacing, ours.mask_spacing) == (theirs.spacing, theirs.mask_spacing)
        assert torch.equal(ours.image, theirs.image)
        assert torch.equal(ours.mask, theirs.mask)
        assert ours.mask.dtype == theirs.mask.dtype
    scan = phantom(2, 2)[0]
    assert torch.equal(loaded.probabilities(scan).data, segmenter.probabilities(scan).data)
    assert torch.equal(loaded.predict(scan).data, segmenter.predict(scan).data)


@pytest.mark.parametrize("learner", ["maml", "fomaml", "transfer", "scratch"])
def test_a_meta_learned_model_loads_as_it_was_saved(learner, tmp_path):
    model = tiny_model(learner)
    model.save(tmp_path / "model")
    loaded = load(tmp_path / "model")
    assert isinstance(loaded, Model)
    assert type(loaded.learner) is type(model.learner)
    assert same(loaded.learner.state_dict(), model.learner.state_dict())
    assert loaded.card["training_tasks"][0]["terms"] == TERMS
    assert not loaded.learner.training
    assert as_model(loaded) is loaded


def test_nothing_pickled_and_readable_by_all(saved):
    assert sorted(path.name for path in saved.iterdir()) == sorted([DESCRIPTION, WEIGHTS, STATE, OVERVIEW, ATLAS_FILE])
    description = json.loads((saved / DESCRIPTION).read_text(encoding="utf-8"))
    assert description["format"] == 1
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(saved.stat().st_mode) == 0o777 & ~mask
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask for path in saved.iterdir())
    assert [path.name for path in saved.parent.iterdir()] == [saved.name], "no leftovers"


@pytest.mark.parametrize("name", [WEIGHTS, STATE, OVERVIEW, ATLAS_FILE, DESCRIPTION])
def test_a_missing_file_is_named(saved, name):
    (saved / name).unlink()
    with pytest.raises(InputError, match=r"no such file") as caught:
        load(saved)
    assert str(saved / name) in str(caught.value)


@pytest.mark.parametrize("name", [WEIGHTS, STATE])
@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_a_damaged_file_is_named(saved, name, damage):
    whole = (saved / name).read_bytes()
    (saved / name).write_bytes(whole[:-100] if damage == "truncated" else whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(InputError, match="other bytes than were written") as caught:
        load(saved)
    assert str(saved / name) in str(caught.value)


def changed(folder: Path, **changes) -> None:
    """Change entries of model.json; a double underscore goes one level down."""
    description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
    for key, value in changes.items():
        place = description
        *path, last = key.split("__")
        for part in path:
            place = place[part]
        if value is ...:
            del place[last]
        else:
            place[last] = value
    (folder / DESCRIPTION).write_text(json.dumps(description), encoding="utf-8")


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"format": 99}, "format 99"),
        ({"format": ...}, "format None"),
        ({"voxels": ...}, "no 'voxels'"),
        ({"kind": "something"}, None),
        ({"files": {}}, r"no 'weights\.safetensors'"),
        ({"files": {"../elsewhere/weights.safetensors": "0"}}, "an unknown file"),
        ({"network__name": "resnet"}, "'resnet'"),
        ({"network__options__channels": [8, 32]}, "do not fit"),
        ({"network__options__colour": 1}, "'colour'"),
        ({"learner__name": "oracle"}, "'oracle'"),
        ({"learner__options": {"bogus": 1}}, "bogus"),
        ({"adapted__labels": [1]}, "1 label values"),
        ({"adapted__labels": [1, 2, 3]}, "3 label values"),
        ({"adapted__channels": ["a", "b"]}, "2 channels"),
        ({"adapted__targets": {}}, "targets"),
        ({"adapted__patch": [8, 8]}, r"patch \(8, 8\)"),
        ({"adapted__preprocess": {"zoom": 1}}, "zoom"),
        ({"adapted__atlases": [{"spacing": [1, 1], "mask_spacing": [1, 1, 1]}]}, "atlas 1"),
        ({"adapted__atlases": [{"spacing": [1, 1, 0], "mask_spacing": [1, 1, 1]}]}, "atlas 1"),
        ({"adapted__atlases": [{"spacing": [1, 1, 1], "mask_spacing": [1, 1, 1]}] * 3}, "image_2"),
        ({"adapted": ...}, "no 'adapted'"),
    ],
)
def test_a_description_that_does_not_fit_is_refused(saved, changes, found):
    changed(saved, **changes)
    if changes == {"kind": "something"}:
        load(saved)  # what is not "meta-learned" carries a task
        return
    with pytest.raises(InputError, match=found) as caught:
        load(saved)
    assert str(saved) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\xff"])
def test_a_description_that_is_not_json_is_refused(saved, text):
    (saved / DESCRIPTION).write_text(text, encoding="latin-1")
    with pytest.raises(InputError, match=DESCRIPTION):
        load(saved)


def test_a_folder_that_is_none_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    for name in ("absent", "file", "."):
        with pytest.raises(InputError):
            load(tmp_path / name)


def test_nothing_is_overwritten_unasked(segmenter, saved):
    before = tree(saved)
    for model in (segmenter, segmenter.model):
        with pytest.raises(InputError, match="stands there already"):
            model.save(saved)
    assert tree(saved) == before
    segmenter.model.save(saved, overwrite=True)
    assert isinstance(load(saved), Model)
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]
    foreign = saved.parent / "thesis"
    foreign.mkdir()
    (foreign / "chapter.tex").write_text("years of work")
    with pytest.raises(InputError, match="stands there already"):
        segmenter.save(foreign, overwrite=True)
    (saved.parent / "file").write_text("x")
    with pytest.raises(InputError, match="stands there already"):
        segmenter.save(saved.parent / "file")


def test_an_error_while_saving_leaves_what_was_there(segmenter, saved, monkeypatch):
    before = tree(saved)
    monkeypatch.setattr("medmeta.segmenter.write_json", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(InputError, match="No space left"):
        segmenter.save(saved, overwrite=True)
    with pytest.raises(InputError, match="No space left"):
        segmenter.save(saved.parent / "second")
    assert tree(saved) == before
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_an_empty_folder_and_folders_to_make_are_fine(segmenter, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    segmenter.save(tmp_path / "empty")
    segmenter.save(tmp_path / "a" / "b" / "c")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    segmenter.save(".")
    for name in ("empty", "a/b/c", "here"):
        assert isinstance(load(tmp_path / name), Segmenter)


@pytest.mark.parametrize("case", [0, 3])
def test_the_label_map_lies_on_the_grid_of_the_scan(segmenter, case, tmp_path):
    scan, _ = phantom(2, case)
    assert scan.orientation != "RAS"
    made = segmenter.predict(scan)
    assert made.shape == scan.shape
    assert torch.equal(made.affine, scan.affine)
    assert made.data.dtype == torch.int32
    assert set(made.data.unique().tolist()) <= {0, 1, 2}
    write_volume(made, tmp_path / "labels.nii.gz")
    write_volume(scan, tmp_path / "scan.nii.gz")
    assert grid_difference(read_header(tmp_path / "labels.nii.gz"), read_header(tmp_path / "scan.nii.gz")) is None


def test_probabilities_are_probabilities_and_decide_the_labels(segmenter):
    scan, _ = phantom(2, 3)
    scores = segmenter.probabilities(scan)
    assert scores.channels == 3
    assert torch.allclose(scores.data.sum(dim=0), torch.ones(scores.shape), atol=1e-4)
    assert scores.orientation == "RAS"
    brought_back = segmenter.preprocess.inverse(scores, scan).data.argmax(dim=0)
    raw = replace(segmenter, single=(), best_dice=False)
    assert torch.equal(raw.predict(scan).data[0], torch.tensor([0, *segmenter.labels])[brought_back].int())
    # Plain tensors that may be worked on.
    scores.data.mul_(2)
    assert not scores.data.requires_grad


@pytest.mark.parametrize("index", [1, 2])
def test_an_overview_is_mixed_in_by_its_share(index, tmp_path, overview_from_the_first_step):
    """Of a volume twice as coarse, and of the volume beside its slices."""
    folder = write_pairs(tmp_path, index)
    budget = Budget(steps=20, rate=2e-2)
    segmenter = adapt(tiny_model(), folder / "images", folder / "labels", budget=budget, atlases=0)
    scan, _ = phantom(index, 3)
    alone = replace(segmenter, overview=None)
    fine, coarse = alone.probabilities(scan), segmenter.overview.probabilities(scan)
    assert coarse.shape != fine.shape
    if index == 1:
        assert min(coarse.spacing) > 1.5 * min(fine.spacing)
    assert torch.allclose(replace(segmenter, overview_share=0.0).probabilities(scan).data, fine.data, atol=5e-3)
    seen = segmenter.preprocess.inverse(coarse, fine).data
    for share in (0.3, 1.0):
        mixed = replace(segmenter, overview_share=share).probabilities(scan).data
        expected = (1 - share) * (fine.data + 1e-3).log() + share * (seen + 1e-3).log()
        assert torch.allclose(mixed, expected.softmax(dim=0), atol=5e-3)


def test_carried_labels_are_mixed_in_by_their_share(segmenter, monkeypatch):
    scan, labels = phantom(2, 3)
    alone = replace(segmenter, atlases=())
    assert alone.carry(scan) is None
    network = alone.probabilities(scan)
    mask = segmenter.preprocess.forward_mask(labels.data.long(), scan.affine, 2).numpy()
    itself = make_atlas(segmenter.preprocess.forward(scan).data[0].numpy(), mask, network.spacing)
    known = replace(segmenter, atlases=(itself,))
    carried, seconds = known.carry(scan), {}
    assert carried.share == pytest.approx(1 / 2, abs=0.02)
    mixed = known.probabilities(scan, seconds=seconds).data
    assert seconds["registration"] > 0
    there = carried.probabilities.float()
    assert there.shape == network.data.shape, "this scan is small: the grids are one"
    expected = (1 - carried.share) * (network.data + 1e-3).log() + carried.share * (there + 1e-3).log()
    assert torch.allclose(mixed, expected.softmax(dim=0), atol=5e-3)
    assert not torch.allclose(mixed, network.data, atol=0.05)
    calls = []
    monkeypatch.setattr(segmenter_module, "carry_labels", lambda *given: calls.append(given) or carry_labels(*given))
    assert torch.equal(known.probabilities(scan, carried=carried).data, mixed)
    assert torch.equal(known.predict(scan, carried=carried).data, known.predict(scan).data)
    assert len(calls) == 1, "what was carried before is not carried again"
    grids = known.prepare(scan)
    assert torch.equal(known.carry(scan, grids).probabilities, carried.probabilities)
    useless = replace(carried, share=0.0)
    assert torch.equal(known.probabilities(scan, carried=useless).data, network.data)


def test_a_scan_is_brought_onto_the_grids_once(segmenter, monkeypatch):
    scan, _ = phantom(2, 3)
    grids = segmenter.prepare(scan)
    for grid, one in zip(grids, (segmenter, segmenter.overview), strict=True):
        assert grid.shape == one.probabilities(scan).shape
    expected = segmenter.predict(scan).data
    monkeypatch.setattr(Preprocess, "forward", lambda *_: pytest.fail("prepared again"))
    assert torch.equal(segmenter.predict(scan, grids=grids, carried=None).data, expected)


def test_focus_looks_closely_where_the_overview_sees_something(segmenter):
    scan, _ = phantom(2, 3)
    segmenter = replace(segmenter, atlases=())
    windows = {focus: 0 for focus in (False, True)}
    made = {}
    for focus in windows:

        def counting(one, focus=focus):
            run = torch_predictor(one.learner, one.state)

            def predict(image):
                windows[focus] += len(image) * (one.overview is not None)
                return run(image)

            return predict

        made[focus] = segmenter.probabilities(scan, focus=focus, predictor=counting).data
    assert 0 < windows[True] <= windows[False]
    alone = replace(segmenter, overview=None)
    assert torch.equal(alone.probabilities(scan, focus=True).data, alone.probabilities(scan).data)
    blind = replace(segmenter.overview, state=segmenter.overview.state | _background(segmenter.overview.state))
    empty = replace(segmenter, overview=blind)
    assert float(empty.probabilities(scan, focus=True).data[0].min()) > 0.98
    assert float(empty.probabilities(scan).data[0].min()) < 0.98


def _background(state):
    """The output layer of a network that sees nothing."""
    bias = torch.full_like(state["head.bias"], -20.0)
    bias[0] = 20.0
    return {"head.weight": torch.zeros_like(state["head.weight"]), "head.bias": bias}


def test_predicting_changes_nothing(segmenter):
    before = {name: tensor.clone() for name, tensor in segmenter.model.learner.state_dict().items()}
    state = {name: tensor.clone() for name, tensor in segmenter.state.items()}
    scan, _ = phantom(2, 2)
    image = scan.data.clone()
    first = segmenter.predict(scan)
    assert torch.equal(segmenter.predict(scan).data, first.data)
    assert same(segmenter.model.learner.state_dict(), before)
    assert same(segmenter.state, state)
    assert torch.equal(scan.data, image)


def test_label_values_are_those_of_the_targets(segmenter):
    scan, _ = phantom(2, 2)
    values = replace(segmenter, labels=(7, 40000), single=()).predict(scan).data
    classes = replace(segmenter, single=()).predict(scan).data
    assert torch.equal(values == 7, classes == 1)
    assert torch.equal(values == 40000, classes == 2)


def test_a_model_that_comes_with_the_package_goes_by_its_name(segmenter, tmp_path, monkeypatch):
    monkeypatch.setattr(segmenter_module, "SHIPPED", tmp_path / "models")
    segmenter.model.save(tmp_path / "models" / "organs")
    assert shipped_models() == ("organs",)
    assert isinstance(load("organs"), Model)
    with pytest.raises(InputError, match=r"nothing: found no such folder; required: .*, or one of organs"):
        load("nothing")
    # A folder of that name is what is meant.
    monkeypatch.chdir(tmp_path)
    segmenter.save("organs")
    assert isinstance(load("organs"), Segmenter)


def test_structures_of_one_piece_keep_their_largest(segmenter):
    scan, _ = phantom(2, 2)
    noise = torch.randn(scan.data.shape, generator=torch.Generator().manual_seed(0))
    scan = replace(scan, data=100 * noise)
    segmenter = replace(segmenter, overview=None)
    raw = replace(segmenter, single=()).predict(scan).data
    for single in ((), (1,), (1, 2)):
        made = replace(segmenter, single=single).predict(scan).data
        assert torch.equal(made, keep_largest(raw, single))
    assert not torch.equal(made, raw), "noise has many pieces"


def test_a_segmentation_says_how_sure_it_is(segmenter):
    scan, _ = phantom(2, 2)
    targets = {"one": (1,), "both": (1, 2)}
    made = replace(segmenter, targets=targets).predict(scan)
    assert made.certainty.keys() == targets.keys()
    assert all(0 <= value <= 1 for value in made.certainty.values())
    assert made.quality == pytest.approx(sum(made.certainty.values()) / 2)
    probabilities = segmenter.probabilities(scan)
    again = replace(segmenter, targets=targets).predict(scan, probabilities=probabilities)
    assert again.certainty == pytest.approx(made.certainty, abs=1e-6)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 40, 1), (5, 5, 5), (3, 90, 4)])
def test_scans_smaller_than_the_window_and_flat_ones(segmenter, shape):
    scan = Volume(torch.randn(1, *shape, generator=torch.Generator().manual_seed(0)) * 100, phantom(2, 0)[0].affine)
    assert segmenter.predict(scan).shape == shape


def test_a_scan_with_other_channels_is_refused(segmenter):
    scan, _ = phantom(2, 2)
    with pytest.raises(ValueError, match=r"2 channels; required: 1 \(image\)"):
        segmenter.predict(Volume(torch.cat([scan.data, scan.data]), scan.affine))


def test_windows_do_not_decide_the_result():
    """A network whose logits depend on the voxel alone gives the same probabilities however windows are laid."""
    model = tiny_model("scratch")

    class Threshold(type(model.learner)):
        def segment(self, image, state):
            return torch.cat([-image[:, :1], image[:, :1]], dim=1) * state["scale"]

    learner = Threshold(model.learner.net)
    scan, _ = phantom(2, 0)
    whole, small = (
        Segmenter(replace(model, learner=learner), {"scale": torch.tensor(3.0)}, Preprocess("MR", (2.0, 2.0, 4.0)),
                  {"a": (1,)}, (1,), ("image",), patch)
        for patch in ((64, 64, 64), (8, 16, 8))
    )  # fmt: skip
    assert torch.allclose(whole.probabilities(scan).data, small.probabilities(scan, overlap=0.5).data, atol=1e-5)
    expected = (whole.preprocess.forward(scan).data[0] * 6).sigmoid()
    assert torch.allclose(whole.probabilities(scan).data[1], expected, atol=1e-5)


def test_bfloat16_gives_nearly_the_same(segmenter):
    scan, _ = phantom(2, 2)
    exact = segmenter.probabilities(scan).data
    rough = segmenter.probabilities(scan, precision=torch.bfloat16).data
    assert rough.dtype == torch.float32
    assert 0 < float((exact - rough).abs().max()) < 0.1


def test_a_2d_network_takes_the_same_way(support, tmp_path):
    targets = {"anterior": (1,), "posterior": (2,)}
    flat = adapt(tiny_2d(), support / "images", support / "labels", targets=targets, budget=Budget(steps=2))
    flat.save(tmp_path / "flat")
    scan, _ = phantom(2, 3)
    made = load(tmp_path / "flat").predict(scan)
    assert torch.equal(made.data, flat.predict(scan).data)
    assert made.shape == scan.shape
    # Slices are segmented one by one: what another slice holds does not matter.
    working = flat.preprocess.forward(scan)
    upside = Volume(working.data.flip(3), working.affine)
    alone = replace(flat, preprocess=_Untouched(), atlases=())
    made, turned = (alone.probabilities(one, rotations=False).data for one in (working, upside))
    assert torch.allclose(made, turned.flip(3), atol=1e-4)


class _Untouched:
    def forward(self, scan: Volume) -> Volume:
        return scan
