from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.ndimage import affine_transform
from small import phantom, tiny_model, write_pairs

from medmeta import rotation
from medmeta.adaptation import adapt
from medmeta.data.volume import Volume
from medmeta.fine_tuning import Budget
from medmeta.rotation import FURTHEST, POSES, SURE, SURER, TURN, rotate, surest_poses
from medmeta.segmenter import Segmenter

FLAT = (1.0, 1.0, 5.0)


@pytest.mark.parametrize("across", [0, 1, 2])
def test_a_right_angle_is_a_quarter_turn_within_the_slices(across):
    first, second = (axis for axis in range(3) if axis != across)
    image = torch.rand(2, 6, 6, 6, generator=torch.Generator().manual_seed(0))
    spacing = [1.0, 1.0, 1.0]
    spacing[across] = 4.0
    made = rotate(image, 90.0, spacing)
    assert torch.allclose(made, image.rot90(1, (first + 1, second + 1)), atol=1e-5)
    assert torch.allclose(rotate(made, -90.0, spacing), image, atol=1e-5)


def test_turning_is_in_millimetres_and_keeps_the_frame():
    image = np.random.default_rng(0).random((9, 14, 4))
    spacing = np.array([1.5, 1.0, 6.0])
    cosine, sine = np.cos(np.radians(25)), np.sin(np.radians(25))
    turn = np.array([[cosine, sine, 0], [-sine, cosine, 0], [0, 0, 1]])
    matrix = turn * spacing / spacing[:, None]
    centre = (np.array(image.shape) - 1) / 2
    given = torch.from_numpy(image).float().unsqueeze(0)
    for inside, mode in ((False, "nearest"), (True, "grid-constant")):
        expected = affine_transform(image, matrix, centre - matrix @ centre, order=1, mode=mode)
        made = rotate(given, 25.0, spacing.tolist(), inside=inside)
        assert made.shape == given.shape
        assert np.allclose(made[0].numpy(), expected, atol=1e-5)


def told(certainties: dict[float, float], fallback: float = 0.1):
    """A network that expects what is told in each pose, the poses it was asked for, and what it says there."""
    asked: list[float] = []

    def segment(degrees: float) -> torch.Tensor:
        asked.append(degrees)
        level = (degrees + 180.0) / 360.0
        # Turned back, a map without any detail stays what it is.
        return torch.tensor([1.0 - level, level]).reshape(2, 1, 1, 1).expand(2, 8, 8, 2).clone()

    def certainty(probabilities: torch.Tensor) -> float:
        return certainties.get(round(float(probabilities[1, 4, 4, 0]) * 360.0 - 180.0), fallback)

    return segment, certainty, asked


def test_a_sure_scan_is_not_turned():
    segment, certainty, asked = told({0: SURE, 30: 1.0})
    assert torch.equal(surest_poses(segment, certainty, FLAT), segment(0.0))
    assert asked == [0.0, 0.0], "once by the search, once by this test"


def test_poses_that_are_hardly_surer_do_not_count():
    segment, certainty, asked = told({-30: 0.4, 0: 0.5, 30: 0.5 + 0.9 * SURER, 60: 0.5})
    assert torch.equal(surest_poses(segment, certainty, FLAT), segment(0.0))
    assert sorted(asked[:-1]) == [-30.0, 0.0, 30.0, 60.0]


def test_it_goes_where_the_network_is_surer_and_averages_the_surest():
    segment, certainty, asked = told({-30: 0.2, 0: 0.3, 30: 0.5, 60: 0.7, 90: 0.6})
    made = surest_poses(segment, certainty, FLAT)
    assert sorted(asked) == [-TURN, 0.0, TURN, 2 * TURN, 3 * TURN]
    assert max(map(abs, asked)) <= FURTHEST
    expected = sum(segment(degrees) for degrees in (30.0, 60.0, 90.0)) / POSES
    assert torch.allclose(made[:, 4, 4], expected[:, 4, 4], atol=1e-3)
    assert torch.allclose(made.sum(dim=0), torch.ones(8, 8, 2))


def test_corners_that_no_chosen_pose_shows_are_those_of_the_scan_as_it_is():
    segment, certainty, _ = told({0: 0.1, 30: 0.3, 60: 0.5, 90: 0.4})
    # Long and narrow: turned by 30 degrees or more, most of its length leaves the frame.
    made = surest_poses(lambda degrees: segment(degrees).repeat(1, 8, 1, 1), certainty, FLAT)
    assert torch.allclose(made[:, 0, 0], segment(0.0)[:, 0, 0])
    assert not torch.allclose(made[:, 32, 4], segment(0.0)[:, 4, 4], atol=0.05)


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory) -> Segmenter:
    pairs = write_pairs(tmp_path_factory.mktemp("support"))
    made = adapt(
        tiny_model(),
        pairs / "images",
        pairs / "labels",
        targets={"both": (1, 2)},
        budget=Budget(steps=1),
        atlases=0,
    )
    assert made.preprocess.thick
    return made


def knows_upright_bars(_: Segmenter):
    """Segments what is bright, the surer the more it lies along the first axis."""

    def predict(windows: torch.Tensor) -> torch.Tensor:
        bright = (windows[:, :1] > 0.5).float()
        extents = torch.stack([bright.amax(dim=(1, 5 - along, 4)).sum(dim=1).mean() for along in (2, 3)])
        sure = float(extents[0] / extents.sum().clamp_min(1.0))
        foreground = sure * bright + 0.02 * (1.0 - bright)
        return torch.cat([1.0 - foreground, foreground], dim=1)

    return predict


def test_a_scan_in_another_pose_is_found(segmenter):
    spacing = segmenter.preprocess.spacing
    side = segmenter.patch[0]
    data = torch.full((1, side, side, segmenter.patch[2]), -1000.0)
    data[0, side // 8 : -side // 8, side // 2 - 2 : side // 2 + 2, 2:-2] = 1000.0
    affine = torch.diag(torch.tensor([*spacing, 1.0], dtype=torch.float64))
    wide = replace(segmenter, patch=(side, side, segmenter.patch[2]), single=(), overview=None)
    bars = {"upright": data, "turned": data.transpose(1, 2).contiguous()}
    shares = {}
    for name, bar in bars.items():
        for rotations in (False, True):
            made = wide.predict(Volume(bar, affine), predictor=knows_upright_bars, rotations=rotations)
            found, truth = made.data[0] > 0, bar[0] > 500
            shares[name, rotations] = float(made.certainty["both"])
            if name == "upright" or rotations:
                assert 2 * (found & truth).sum() / (found.sum() + truth.sum()) > 0.85
    assert shares["upright", True] == shares["upright", False], "what is sure stays as it is"
    assert shares["turned", True] > shares["turned", False] + 0.2


def windows_run(segmenter: Segmenter, rotations: bool) -> int:
    """How many windows of a scan are segmented by a network that is sure of nothing."""
    seen = []

    def unsure(windows: torch.Tensor) -> torch.Tensor:
        seen.append(len(windows))
        return torch.full((len(windows), 2, *windows.shape[2:]), 1 / 2)

    segmenter.probabilities(phantom(2, 3)[0], predictor=lambda _: unsure, rotations=rotations)
    return sum(seen)


def test_only_thick_slices_are_turned(segmenter):
    assert windows_run(segmenter, True) > 2 * windows_run(segmenter, False)
    even = replace(segmenter, preprocess=replace(segmenter.preprocess, spacing=(3.0, 3.0, 3.0)), overview=None)
    assert windows_run(even, True) == windows_run(even, False)


def test_what_does_not_fit_into_memory_is_not_turned(segmenter, monkeypatch):
    monkeypatch.setattr(rotation, "MOST_BYTES", 1000)
    assert windows_run(segmenter, True) == windows_run(segmenter, False)
