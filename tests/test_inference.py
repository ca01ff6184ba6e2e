"""Bands against the whole: windows as MONAI lays them, labels as the whole volume's probabilities give them."""

from __future__ import annotations

import importlib.util
import itertools
import math

import pytest
import torch
from monai.inferers import sliding_window_inference
from torch import Tensor

from medmeta.data.preprocess import Preprocess
from medmeta.data.volume import Volume
from medmeta.errors import InputError
from medmeta.inference import (
    LEVELS,
    Layer,
    blend,
    collect,
    context_rows,
    fastest_backend,
    index_map,
    levels_of,
    openvino_predictor,
    restore_labels,
    seen_by,
    sliding_bands,
    torch_predictor,
)
from medmeta.learners.sliced import Sliced


def network(windows: Tensor) -> Tensor:
    """Not a function of the voxel alone: what a window holds and where it begins decide too."""

    def one(image: Tensor) -> Tensor:
        blurred = torch.nn.functional.avg_pool3d(image, 3, 1, 1, count_include_pad=False)
        return torch.cat([image.cos(), blurred.sin() + image.mean(), image * blurred], dim=1).softmax(dim=1)

    return torch.cat([one(window.clone()) for window in windows.split(1)])


def random_scan(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("shape", "patch", "overlap"),
    [
        ((40, 21, 17), (16, 8, 8), 0.25),
        ((33, 9, 30), (8, 16, 8), 0.5),
        ((16, 16, 16), (16, 16, 16), 0.25),
        ((5, 30, 1), (8, 8, 8), 0.25),
        ((7, 3, 2), (8, 8, 8), 0.0),
        ((50, 8, 8), (8, 8, 8), 0.9),
    ],
)
def test_bands_are_the_probabilities_of_monai_to_the_last_bit(shape, patch, overlap):
    image = random_scan(*shape)
    expected = sliding_window_inference(
        image.unsqueeze(0), patch, 1, network, overlap=overlap, mode="gaussian", padding_mode="replicate"
    )[0]
    for context in (0, 1, 3):
        bands = sliding_bands(image, patch, network, overlap=overlap, context=context)
        assert torch.equal(collect(bands, shape), expected)


def test_no_band_is_thicker_than_a_window_and_its_context():
    bands = [(first, rows.shape[1]) for first, rows in sliding_bands(random_scan(90, 8, 8), (16, 8, 8), network)]
    assert all(rows <= 16 for _, rows in bands)
    assert [first for first, _ in bands] == [0, *itertools.accumulate(rows for _, rows in bands)][:-1]
    again = [
        (first, rows.shape[1]) for first, rows in sliding_bands(random_scan(90, 8, 8), (16, 8, 8), network, context=2)
    ]
    assert again == [bands[0], *((first - 2, rows + 2) for first, rows in bands[1:])]


def test_empty_space_is_run_once_and_changes_nothing():
    image = random_scan(64, 16, 16)
    image[:, 20:] = -2.0
    seen = []

    def counting(window: Tensor) -> Tensor:
        seen.extend((window.amax((1, 2, 3, 4)) - window.amin((1, 2, 3, 4))).tolist())
        return network(window)

    expected = sliding_window_inference(image.unsqueeze(0), (8, 8, 8), 1, network, overlap=0.25, mode="gaussian")[0]
    assert torch.equal(collect(sliding_bands(image, (8, 8, 8), counting), (64, 16, 16)), expected)
    assert seen.count(0.0) == 1
    windows = math.prod(math.ceil((size - 8) / 6) + 1 for size in (64, 16, 16))
    assert len(seen) < windows / 2


@pytest.mark.parametrize("overlap", [-0.1, 1.0])
def test_an_overlap_beyond_reason_is_refused(overlap):
    with pytest.raises(ValueError, match=f"overlap={overlap}; required: 0 <= overlap < 1"):
        next(sliding_bands(random_scan(8, 8, 8), (8, 8, 8), network, overlap=overlap))


def turned(
    order: tuple[int, int, int], flips: tuple[int, ...], spacing: tuple[float, ...], shear: float = 0.0
) -> Tensor:
    affine = torch.eye(4, dtype=torch.float64)
    affine[:3, :3] = torch.diag(torch.tensor(spacing, dtype=torch.float64))[:, list(order)] * torch.tensor(flips)
    affine[:3, 3] = torch.tensor([-31.0, 17.0, 5.5])
    angle = 0.3
    rotation = torch.eye(4, dtype=torch.float64)
    rotation[:2, :2] = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    tilt = torch.eye(4, dtype=torch.float64)
    tilt[1, 2] = shear
    return rotation @ affine @ tilt


@pytest.mark.parametrize("working", [(2.0, 2.0, 4.0), (1.0, 1.0, 3.0), (3.3, 1.7, 2.0)])
@pytest.mark.parametrize(
    "affine",
    [
        turned((0, 1, 2), (1, 1, 1), (1.0, 1.0, 3.0)),
        turned((0, 1, 2), (-1, -1, 1), (1.0, 1.0, 3.0)),
        turned((2, 0, 1), (1, -1, 1), (1.3, 0.8, 2.0)),
        turned((1, 2, 0), (-1, 1, -1), (1.3, 0.8, 2.0)),
        turned((0, 1, 2), (1, 1, 1), (1.0, 1.0, 3.0), shear=0.4),
        turned((1, 0, 2), (1, 1, -1), (1.0, 1.0, 3.0), shear=-0.7),
        turned((2, 1, 0), (1, 1, 1), (1.0, 1.0, 3.0), shear=0.5),
    ],
)
def test_labels_by_bands_are_those_of_the_whole_volume(affine, working, monkeypatch):
    monkeypatch.setattr("medmeta.inference.SLAB_VOXELS", 3000)
    monkeypatch.setattr("medmeta.inference.SCORE_BYTES", 4000)
    preprocess = Preprocess("MR", working)
    scan = Volume(random_scan(24, 22, 20), affine)
    grid = preprocess.forward(scan)
    smooth = torch.nn.functional.avg_pool3d(grid.data, 3, 1, 1) * 4
    indices = index_map(grid.affine, scan.affine)
    context = context_rows(indices, scan.shape)
    whole = sliding_window_inference(smooth.unsqueeze(0), (8, 8, 8), 1, network, overlap=0.25, mode="gaussian",
                                     padding_mode="replicate")[0]  # fmt: skip
    brought = preprocess.inverse(Volume(whole, grid.affine), scan).data
    expected = brought.argmax(dim=0, keepdim=True)
    bands = sliding_bands(smooth, (8, 8, 8), network, context=context)
    labels = restore_labels(bands, grid.shape, indices, scan.shape, [0, 7, 40000])
    assert labels.dtype == torch.int32
    assert len(expected.unique()) > 1, "a test of one class would show nothing"
    assert torch.equal(labels, torch.tensor([0, 7, 40000], dtype=torch.int32)[expected])
    bands = sliding_bands(smooth, (8, 8, 8), network, context=context)
    lowered = restore_labels(bands, grid.shape, indices, scan.shape, [0, 7, 40000], lambda: [1, 2])
    best = brought[1:].argmax(dim=0)
    wins = brought[1:].amax(dim=0) > brought[0] / torch.tensor([2**0.5, 2.0])[best]
    expected = torch.where(wins, torch.tensor([7, 40000])[best], 0)
    assert not torch.equal(lowered, labels)
    # Where two of the probabilities are equal up to rounding, either class is right.
    assert float((lowered[0] != expected).float().mean()) < 1e-3


def test_a_level_is_how_much_less_the_background_has_to_count():
    scores = torch.tensor(
        [[0.6, 0.39, 0.5, 0.9, 0.0, 0.97], [0.3, 0.6, 0.5, 0.06, 0.0, 0.03], [0.1, 0.01, 0, 0.04, 0, 0]]
    )
    best, level = levels_of(scores.reshape(3, 2, 3, 1))
    assert best.flatten().tolist() == [1, 1, 1, 1, 1, 1]
    assert level.flatten().tolist() == [3, 0, 1, 8, LEVELS, LEVELS]
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(4, 5, 5, 5, generator=generator)
    best, level = levels_of(scores)
    assert torch.equal(torch.where(level == 0, best.long(), 0), scores.argmax(dim=0))


def test_only_wanted_windows_are_segmented():
    image, ran = random_scan(40, 20, 10), []

    def counting(windows: Tensor) -> Tensor:
        ran.append(len(windows))
        return network(windows)

    def left(box) -> bool:
        assert all(0 <= side.start < side.stop <= size for side, size in zip(box, image.shape[1:], strict=True))
        return box[0].stop <= 24

    whole = collect(sliding_bands(image, (8, 8, 16), network), image.shape[1:])
    made = collect(sliding_bands(image, (8, 8, 16), counting, wanted=left, classes=2), image.shape[1:])
    everywhere = collect(sliding_bands(image, (8, 8, 16), network, wanted=lambda box: True, classes=2), made.shape[1:])
    assert torch.equal(everywhere, whole)
    assert torch.equal(made[:, :18], whole[:, :18])
    assert torch.equal(made[:, 24:], torch.tensor([1.0, 0, 0]).reshape(3, 1, 1, 1).expand(3, 16, 20, 10))
    assert torch.allclose(made.sum(dim=0), torch.ones(40, 20, 10))
    assert 0 < sum(ran) < 0.6 * 6 * 3
    nothing = collect(sliding_bands(image, (8, 8, 16), counting, wanted=lambda box: False, classes=2), made.shape[1:])
    assert torch.equal(nothing[0], torch.ones(40, 20, 10))


def test_a_box_is_seen_where_the_overview_has_foreground():
    overview = torch.zeros(2, 10, 10, 10)
    overview[1, 3, 4, 5] = 0.2
    overview[0] = 1 - overview[1]
    indices = torch.diag(torch.tensor([0.5, 0.5, 0.5, 1.0], dtype=torch.float64))
    seen = seen_by(overview, indices)
    assert seen([slice(6, 7), slice(8, 9), slice(10, 11)])
    assert seen([slice(0, 6), slice(0, 20), slice(0, 20)]), "5 lies at 2.5, between voxels"
    assert not seen([slice(0, 5), slice(0, 20), slice(0, 20)])
    assert not seen([slice(8, 40), slice(0, 20), slice(0, 20)])
    assert not seen([slice(30, 40), slice(30, 40), slice(30, 40)]), "beyond its edge"
    assert not seen_by(overview * 0.2 + torch.tensor([0.8, 0]).reshape(2, 1, 1, 1), indices)([slice(0, 20)] * 3)


@pytest.mark.parametrize("context", [0, 3])
@pytest.mark.parametrize("shear", [0.0, 0.4])
def test_an_overview_is_blended_band_by_band_as_if_whole(shear, context, monkeypatch):
    """Oracle: MONAI brings the whole overview onto the finer grid."""
    monkeypatch.setattr("medmeta.inference.SCORE_BYTES", 20_000)
    scan = Volume(random_scan(24, 22, 20), turned((2, 0, 1), (1, -1, 1), (1.3, 0.8, 2.0), shear))
    fine = Preprocess("MR", (1.2, 1.1, 2.0))
    grid, coarse = fine.forward(scan), fine.overview((2, 2, 2), [scan.shape]).forward(scan)
    overview = network(coarse.data.unsqueeze(0))[0]
    indices = index_map(coarse.affine, grid.affine)
    assert float((indices[:3, :3] - indices[:3, :3].diag().diag()).abs().max()) < 1e-9, "both grids have the same axes"
    whole = collect(sliding_bands(grid.data, (8, 8, 8), network), grid.shape)
    seen = fine.inverse(Volume(overview, coarse.affine), grid).data
    for share in (0.0, 0.4, 1.0):
        bands = sliding_bands(grid.data, (8, 8, 8), network, context=context)
        made = collect(blend(bands, grid.shape, [Layer(overview, indices, share)], context), grid.shape)
        expected = ((1 - share) * (whole + 1e-3).log() + share * (seen + 1e-3).log()).softmax(dim=0)
        assert torch.allclose(made, expected, atol=1e-4)
    layers = [Layer(overview, indices, 0.4), Layer(whole.flip(0), torch.eye(4, dtype=torch.float64), 0.25)]
    bands = sliding_bands(grid.data, (8, 8, 8), network, context=context)
    expected = ((0.6 * (whole + 1e-3).log() + 0.4 * (seen + 1e-3).log()).softmax(dim=0) + 1e-3).log()
    expected = (0.75 * expected + 0.25 * (whole.flip(0) + 1e-3).log()).softmax(dim=0)
    made = collect(blend(bands, grid.shape, layers, context), grid.shape)
    assert torch.allclose(made, expected, atol=1e-4)
    back = index_map(grid.affine, scan.affine)
    asked = context_rows(back, scan.shape)
    bands = sliding_bands(grid.data, (8, 8, 8), network, context=asked)
    labels = restore_labels(blend(bands, grid.shape, layers, asked), grid.shape, back, scan.shape, [0, 1, 2])
    assert torch.equal(labels, restore_labels([(0, made)], grid.shape, back, scan.shape, [0, 1, 2]))


def test_a_class_that_wins_at_no_corner_can_win_between_them():
    """Between two classes a third, second at both, is the largest of the mixture."""
    corners = torch.tensor([[0.1, 0.5, 0.4], [0.5, 0.1, 0.4]], dtype=torch.float32)
    probabilities = corners.T.reshape(3, 2, 1, 1)
    indices = index_map(torch.diag(torch.tensor([2.0, 1, 1, 1])).double(), torch.eye(4, dtype=torch.float64))
    labels = restore_labels([(0, probabilities)], (2, 1, 1), indices, (3, 1, 1), [0, 1, 2])
    assert labels.flatten().tolist() == [1, 2, 0]


@pytest.mark.parametrize(
    ("across", "patch"), [(None, (16, 16, 8)), (0, (1, 16, 8)), (1, (16, 1, 8)), (2, (16, 16, 1)), (2, (16, 16, 3))]
)
def test_openvino_gives_the_probabilities_of_torch_and_reports_to_nobody(monkeypatch, across, patch):
    """Of volumes, and of slices across each axis."""
    pytest.importorskip("openvino", reason="needs the extra openvino")
    telemetry = pytest.importorskip("openvino_telemetry", reason="comes with openvino")
    reports = []
    monkeypatch.setattr(telemetry.Telemetry, "send_event", lambda *event, **_: reports.append(event))
    from small import tiny_model

    learner = tiny_model().learner if across is None else Sliced(tiny_model().learner, across)
    generator = torch.Generator().manual_seed(0)
    state = {name: tensor.detach().clone() for name, tensor in learner.net.grow(2, 3).items()}
    state["head.weight"] += torch.randn(state["head.weight"].shape, generator=generator)
    windows = torch.randn(3, 2, *patch, generator=generator)
    expected = torch_predictor(learner, state)(windows)
    found = openvino_predictor(learner, state, (1, 2, *patch))(windows)
    assert found.shape == (3, 4, *patch)
    assert torch.allclose(found, expected, atol=1e-4)
    assert float(expected.std()) > 0.01
    assert reports == []


def test_the_fastest_backend_is_one_that_is_there_and_fits(monkeypatch):
    from small import tiny_model

    learner = tiny_model().learner
    state, prototypes = learner.net.grow(1, 1), {"prototypes": torch.zeros(2)}
    for installed, expected in ((True, "openvino"), (False, "torch")):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, found=installed: found or None)
        assert fastest_backend(learner, state, "cpu") == expected
        assert fastest_backend(learner, prototypes, "cpu") == "torch"
        assert fastest_backend(learner, state, "cuda:0") == "torch"


def test_a_state_without_weights_is_no_network_for_openvino():
    from small import tiny_model

    with pytest.raises(InputError, match=r"a state of prototypes; required: a state of network weights"):
        openvino_predictor(tiny_model().learner, {"prototypes": torch.zeros(2)}, (1, 1, 8, 8, 8))
