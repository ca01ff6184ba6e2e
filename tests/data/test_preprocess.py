"""Oracles: one-hot scores that go forward and come back; nibabel for orientations; arithmetic on made intensities."""

from __future__ import annotations

import itertools
import json
import math

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from medmeta.data.preprocess import ANISOTROPY, COARSEST, ORGAN_VOXELS, SLICED, Preprocess
from medmeta.data.volume import Volume
from medmeta.episode import IGNORED

ORIENTATIONS = ["".join(p) for signs in itertools.product("LR", "AP", "IS") for p in itertools.permutations(signs)]


def make_affine(orientation="RAS", spacing=(1.0, 1.0, 1.0), degrees=(0.0, 0.0, 0.0), shear=0.0) -> torch.Tensor:
    """`spacing` is along R, A, S; the voxel axes are those of `orientation`, then all is turned in space."""
    axes = nib.orientations.inv_ornt_aff(nib.orientations.axcodes2ornt(orientation), (1, 1, 1))[:3, :3].T
    skew = np.eye(3)
    skew[0, 1] = shear
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", degrees, degrees=True).as_matrix() @ skew @ np.diag(spacing) @ axes
    affine[:3, 3] = (12.3, -40.0, 7.0)
    return torch.from_numpy(affine)


def organ(shape, affine) -> torch.Tensor:
    """Mask (1, *shape): a ball of class 1 in mm with an off-centre ball of class 2 inside."""
    index = np.indices(shape).reshape(3, -1)
    places = (affine.numpy()[:3, :3] @ index).T
    places -= places.mean(axis=0)
    radius = 0.6 * np.abs(places).max(axis=0) + 0.5
    mask = np.zeros(len(places), dtype=np.int64)
    mask[((places / radius) ** 2).sum(axis=1) < 1] = 1
    mask[(((places - radius * [0.0, 0.1, 0.3]) / (0.45 * radius)) ** 2).sum(axis=1) < 1] = 2
    return torch.from_numpy(mask.reshape(shape))[None]


def forward_scores(pre: Preprocess, mask: torch.Tensor, affine: torch.Tensor, classes=2) -> Volume:
    """One-hot scores on the working grid, by the public way of an image: each class as a scan of its own."""
    onehot = torch.nn.functional.one_hot(mask[0], classes + 1).movedim(-1, 0).float()
    plain = Preprocess("CT", pre.spacing, window=(-2.0, 2.0))
    return plain.forward(Volume(onehot, affine))


def dice(a: torch.Tensor, b: torch.Tensor, label: int) -> float:
    sizes = int((a == label).sum()) + int((b == label).sum())
    return 2 * int(((a == label) & (b == label)).sum()) / sizes if sizes else 1.0


def round_trip(pre: Preprocess, mask: torch.Tensor, affine: torch.Tensor) -> torch.Tensor:
    like = Volume(torch.zeros(mask.shape), affine)
    return pre.inverse(forward_scores(pre, mask, affine), like).data.argmax(dim=0, keepdim=True)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_labels_come_back_in_every_orientation(orientation):
    shape = (15, 12, 9)
    upright = make_affine(orientation, (0.8, 1.1, 3.0))
    mask = organ(shape, upright)
    back = round_trip(Preprocess("MR", (0.8, 1.1, 3.0)), mask, upright)
    assert torch.equal(back, mask), "nothing is interpolated where the spacing is unchanged"

    oblique = make_affine(orientation, (1.0, 1.2, 1.5), degrees=(7.0, -12.0, 20.0))
    mask = organ(shape, oblique)
    back = round_trip(Preprocess("MR", (1.0, 1.0, 1.0)), mask, oblique)
    assert back.shape == mask.shape
    assert min(dice(back, mask, label) for label in (1, 2)) > 0.9


def test_the_working_grid_is_ras_and_no_voxel_moves():
    for orientation in ("RAS", "LPI", "SAL", "PIR"):
        affine = make_affine(orientation, (1.0, 2.0, 3.0))
        scan = Volume(torch.randn(1, 4, 5, 6, generator=torch.Generator().manual_seed(0)), affine)
        work = Preprocess("CT", (1.0, 2.0, 3.0), window=(-2.0, 2.0)).forward(scan)
        assert work.orientation == "RAS"
        assert work.spacing == pytest.approx((1.0, 2.0, 3.0))
        # The same value at the same place in space, voxel by voxel.
        for index in itertools.product(*map(range, scan.shape)):
            place = affine @ torch.tensor([*index, 1.0], dtype=torch.float64)
            x, y, z = (round(float(v)) for v in (torch.linalg.inv(work.affine) @ place)[:3])
            assert float(work.data[0, x, y, z]) == pytest.approx(float(scan.data[0][index].clamp(-2, 2)), abs=1e-5)


@pytest.mark.parametrize("shear", [0.0, 0.3])
def test_labels_come_back_from_oblique_anisotropic_and_sheared_grids(shear):
    affine = make_affine("LPS", (0.7, 0.9, 4.0), degrees=(25.0, -30.0, 10.0), shear=shear)
    mask = organ((30, 28, 10), affine)
    back = round_trip(Preprocess("MR", (1.0, 1.0, 2.0)), mask, affine)
    assert min(dice(back, mask, label) for label in (1, 2)) > 0.9


@given(
    shape=st.tuples(*[st.integers(1, 5)] * 3),
    orientation=st.sampled_from(ORIENTATIONS),
    spacing=st.tuples(*[st.sampled_from([0.5, 1.0, 3.0])] * 3),
    seed=st.integers(0, 99),
)
@settings(max_examples=25, deadline=None, derandomize=True)
def test_tiny_volumes_come_back_exactly(shape, orientation, spacing, seed):
    affine = make_affine(orientation, spacing)
    mask = torch.randint(0, 3, (1, *shape), generator=torch.Generator().manual_seed(seed))
    same = round_trip(Preprocess("MR", spacing), mask, affine)
    finer = round_trip(Preprocess("MR", tuple(side / 3 for side in spacing)), mask, affine)
    assert torch.equal(same, mask)
    assert torch.equal(finer, mask), "every voxel centre is a point of the finer grid"


@pytest.mark.parametrize("modality", ["CT", "MR"])
def test_a_single_voxel_can_be_preprocessed(modality):
    scan = Volume(torch.full((1, 1, 1, 1), 37.0), make_affine())
    pre = Preprocess.fit([(scan, torch.ones(1, 1, 1, 1, dtype=torch.long))], modality)
    assert pre.forward(scan).data.isfinite().all()
    scores = torch.tensor([0.1, 0.9]).reshape(2, 1, 1, 1)
    assert torch.equal(pre.inverse(Volume(scores, scan.affine), scan).data, scores)


def scan_and_mask(shape=(20, 20, 20), spacing=(1.0, 1.0, 1.0), size=10, orientation="RAS", value=50.0, around=-200.0):
    """A cube of class 1, `size` voxels along each axis."""
    mask = torch.zeros(1, *shape, dtype=torch.long)
    mask[(0, *(slice(2, 2 + min(size, side - 2)) for side in shape))] = 1
    data = torch.where(mask > 0, value, around) + torch.randn(mask.shape, generator=torch.Generator().manual_seed(0))
    return Volume(data, make_affine(orientation, spacing)), mask


def test_spacing_lets_the_smallest_organ_span_the_wanted_voxels():
    # 50 voxels of 2 mm are 100 mm: coarser than the scan, so that it spans 32 voxels.
    pre = Preprocess.fit([scan_and_mask((64, 64, 64), (2.0, 2.0, 2.0), size=50)], "MR")
    assert pre.spacing == pytest.approx((100 / ORGAN_VOXELS,) * 3, abs=1e-3)
    scan, mask = scan_and_mask((64, 64, 64), (2.0, 2.0, 2.0), size=50)
    mask[0, 5:9, 5:9, 5:9] = 2
    assert Preprocess.fit([(scan, mask)], "MR").spacing == (2.0, 2.0, 2.0), "a small class rules"


def test_a_large_organ_keeps_its_border_and_two_under_one_label_are_not_one_large_one():
    scan, mask = scan_and_mask((96, 40, 40), (3.0, 3.0, 3.0), size=30)
    mask[0, 70:94, 2:26, 2:26] = 1  # 276 mm from end to end
    assert Preprocess.fit([(scan, mask)], "MR").spacing == (COARSEST,) * 3
    assert Preprocess.fit([scan_and_mask((40, 40, 40), (4.0, 4.0, 4.0), size=38)], "MR").spacing == (4.0, 4.0, 4.0)


@given(
    spacing=st.tuples(*[st.floats(0.4, 8.0)] * 3),
    size=st.integers(1, 12),
    orientation=st.sampled_from(ORIENTATIONS),
)
@settings(max_examples=30, deadline=None, derandomize=True)
def test_spacing_follows_scan_and_anisotropy(spacing, size, orientation):
    scan, mask = scan_and_mask((14, 14, 14), spacing, size, orientation)
    chosen = Preprocess.fit([(scan, mask)], "MR").spacing
    finest = max(min(size * max(spacing) / ORGAN_VOXELS, COARSEST), min(spacing))
    assert min(chosen) >= min(spacing) - 1e-3, "never finer than the scan resolves"
    assert max(chosen) <= ANISOTROPY * finest + 1e-3, "thick slices keep their spacing only up to a limit"
    for side, own in zip(chosen, spacing, strict=True):
        assert side == pytest.approx(min(max(own, finest), ANISOTROPY * finest), abs=1e-3)
    # The same scan stored in another order of its axes gives the same working grid.
    codes = nib.orientations.axcodes2ornt("LIP")
    turn = nib.orientations.ornt_transform(nib.io_orientation(scan.affine.numpy()), codes)
    turned = Volume(
        torch.from_numpy(nib.orientations.apply_orientation(scan.data[0].numpy(), turn).copy())[None],
        scan.affine @ torch.from_numpy(nib.orientations.inv_ornt_aff(turn, scan.shape)),
    )
    turned_mask = torch.from_numpy(nib.orientations.apply_orientation(mask[0].numpy(), turn).copy())[None]
    assert Preprocess.fit([(turned, turned_mask)], "MR").spacing == pytest.approx(chosen, abs=1e-3)


def test_the_fit_takes_the_median_scan():
    usual = [scan_and_mask(spacing=(1.0, 1.0, 3.0)) for _ in range(4)]
    odd = scan_and_mask(spacing=(5.0, 5.0, 5.0), size=3, value=2000.0)
    assert Preprocess.fit([*usual, odd], "MR") == Preprocess.fit(usual, "MR")


def test_ct_has_one_window_in_hu_for_all_scans():
    pre = Preprocess.fit([scan_and_mask(value=300.0)], "CT")
    low, high = pre.window
    assert high - low >= 400
    assert low < 300 < high
    wide = Preprocess.fit([scan_and_mask(value=0.0), scan_and_mask(value=1000.0)], "CT").window
    assert wide[0] < 5
    assert wide[1] > 995
    scan = Volume(torch.tensor([-3000.0, low, (low + high) / 2, high, 3000.0]).reshape(1, 5, 1, 1), make_affine())
    made = Preprocess("CT", (1.0, 1.0, 1.0), pre.window).forward(scan).data.flatten()
    assert made.tolist() == pytest.approx([-2, -2, 0, 2, 2], abs=1e-5)


def test_mr_is_scaled_for_each_scan_and_channel():
    scan, mask = scan_and_mask(value=400.0, around=100.0)
    pre = Preprocess.fit([(scan, mask)], "MR")
    assert pre.window is None
    both = Volume(torch.cat([scan.data, 3000.0 - 7 * scan.data]), scan.affine)
    made = pre.forward(both).data
    for channel in made:
        assert float(channel.mean()) == pytest.approx(0.0, abs=0.02)
        assert float(channel.std()) == pytest.approx(1.0, abs=0.02)
    # Units mean nothing: any scale and offset give the same image.
    assert torch.allclose(pre.forward(Volume(11 * scan.data + 500, scan.affine)).data, made[:1], atol=1e-3)
    # One hot voxel is clipped, and what it was hardly matters.
    hot = scan.data.clone()
    hot[0, 0, 0, 0] = 1e6
    assert torch.allclose(pre.forward(Volume(hot, scan.affine)).data[0, 1:], made[0, 1:], atol=0.05)


def test_air_around_the_patient_does_not_count():
    scan, mask = scan_and_mask(value=400.0, around=100.0)
    air = torch.zeros(1, 60, 20, 20)
    air[:, :20] = scan.data
    pre = Preprocess.fit([(scan, mask)], "MR")
    assert torch.allclose(pre.forward(Volume(air, scan.affine)).data[:, :20], pre.forward(scan).data, atol=1e-4)


@pytest.mark.parametrize("modality", ["CT", "MR"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_voxels_that_are_not_finite_do_no_harm(modality, bad):
    scan, mask = scan_and_mask()
    hurt = scan.data.clone()
    hurt[0, :3] = bad
    pre = Preprocess.fit([(Volume(hurt, scan.affine), mask)], modality)
    made = pre.forward(Volume(hurt, scan.affine)).data
    assert made.isfinite().all()
    assert made.abs().max() < 20
    assert pre.spacing == Preprocess.fit([(scan, mask)], modality).spacing


def test_unusable_supports_say_so():
    scan, mask = scan_and_mask()
    with pytest.raises(ValueError, match="no foreground"):
        Preprocess.fit([(scan, torch.zeros_like(mask))], "MR")
    with pytest.raises(ValueError, match="no foreground"):
        Preprocess.fit([(scan, torch.full_like(mask, IGNORED))], "CT")
    with pytest.raises(ValueError, match="NaN or infinity in every voxel of the organ"):
        Preprocess.fit([(Volume(torch.full_like(scan.data, math.nan), scan.affine), mask)], "CT")


def test_a_mask_keeps_its_classes_and_what_is_ignored():
    affine = make_affine("LPI", (1.0, 1.0, 2.0))
    mask = organ((20, 22, 12), affine)
    mask[0, :4] = IGNORED
    same = Preprocess("MR", (1.0, 1.0, 2.0)).forward_mask(mask, affine, 2)
    assert same.dtype == torch.int8
    assert torch.equal(same, mask[0].flip([0, 1, 2]).to(torch.int8)), "LPI is RAS with every axis reversed"
    coarse = Preprocess("MR", (2.0, 2.0, 2.0)).forward_mask(mask, affine, 2)
    for label in (IGNORED, 1, 2):
        share = (coarse == label).float().mean() / (mask == label).float().mean()
        assert 0.7 < float(share) < 1.3


def test_borders_between_thick_slices_are_no_worse_than_nearest_neighbours():
    def ball(z: torch.Tensor) -> torch.Tensor:
        x = torch.arange(40.0) - 19.5
        return (x[:, None, None] ** 2 + x[None, :, None] ** 2 + (z[None, None] - 19.5) ** 2 < 15**2).long()

    thick, fine = torch.arange(0.0, 40.0, 4.0), torch.arange(37.0)
    made = Preprocess("MR", (1.0, 1.0, 1.0)).forward_mask(ball(thick)[None], make_affine(spacing=(1, 1, 4)), 1)
    nearest = ball(thick)[..., (fine / 4).round().long()]
    assert int((made != ball(fine)).sum()) <= int((nearest != ball(fine)).sum())


@given(
    spacing=st.tuples(*[st.floats(1.0, ANISOTROPY)] * 3),
    shapes=st.lists(st.tuples(*[st.integers(1, 300)] * 3), min_size=1, max_size=5),
    budget=st.integers(3, 10),
    stride=st.sampled_from([2, 8, 16]),
)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_patches(spacing, shapes, budget, stride):
    voxels = (budget * stride) ** 3
    patch = Preprocess("MR", spacing).patch(voxels, shapes, stride)
    assert all(side % stride == 0 and side >= stride for side in patch)
    medians = [sorted(sides)[(len(sides) - 1) // 2] for sides in zip(*shapes, strict=True)]
    limits = [stride * math.ceil(side / stride) for side in medians]
    assert all(side <= limit for side, limit in zip(patch, limits, strict=True))
    assert 0.5 * min(voxels, math.prod(limits)) <= math.prod(patch) <= 2 * voxels, "about the budget"


def test_an_overview_is_coarser_where_a_patch_shows_little():
    preprocess = Preprocess("CT", (1.0, 1.2, 3.0), window=(-100.0, 300.0))
    coarse = preprocess.overview((16, 16, 8), [(32, 32, 10), (32, 32, 32), (64, 64, 64)])
    assert coarse == Preprocess("CT", (2.0, 2.0, 3.0), window=(-100.0, 300.0))
    assert preprocess.overview((16, 16, 32), [(32, 32, 10), (32, 32, 32), (64, 64, 64)]) is None


def test_a_patch_is_near_a_cube_in_mm():
    sides = Preprocess("MR", (1.0, 1.0, 2.0)).patch(48**3, [(300, 300, 300)])
    assert sides == (64, 64, 32)
    # What a flat volume leaves unused goes to the other axes.
    assert Preprocess("MR", (1.0, 1.0, 1.0)).patch(48**3, [(300, 300, 16)]) == (80, 80, 16)


def test_single_slices_are_finer_and_as_thick_as_they_are():
    pair = scan_and_mask((64, 64, 20), (1.0, 1.0, 12.0), size=50)
    whole, single = (Preprocess.fit([pair], "MR", sliced=sliced) for sliced in (False, True))
    assert whole.thick and single.thick
    assert single.spacing[2] == 12.0 > whole.spacing[2]
    assert single.spacing[:2] == pytest.approx([max(1.0, SLICED * side) for side in whole.spacing[:2]], abs=1e-3)


@pytest.mark.parametrize("across", [0, 1, 2])
def test_a_patch_of_a_single_slice_is_a_square(across):
    spacing = tuple(9.0 if axis == across else 1.5 for axis in range(3))
    preprocess = Preprocess("MR", spacing)
    assert preprocess.across == across
    patch = preprocess.patch(64**2, [(300, 300, 300)], sliced=True)
    assert patch == tuple(1 if axis == across else 64 for axis in range(3))


def test_the_settings_travel():
    for pre in (Preprocess.fit([scan_and_mask()], "CT"), Preprocess("MR", (1.0, 1.5, 3.0), percentiles=(1.0, 99.0))):
        assert Preprocess.from_dict(json.loads(json.dumps(pre.to_dict()))) == pre


def test_what_comes_out_is_a_plain_tensor():
    scan, mask = scan_and_mask()
    pre = Preprocess.fit([(scan, mask)], "MR")
    made = pre.forward(scan)
    for tensor in (made.data, made.affine, pre.forward_mask(mask, scan.affine, 1), pre.inverse(made, scan).data):
        assert type(tensor) is torch.Tensor
    assert made.data.dtype == torch.float32


@pytest.mark.parametrize(
    ("spacing", "thick"),
    [((1, 1, 1), False), ((1, 1, 1.4), False), ((1, 6, 1), True), ((4, 4, 2), False), ((1.2, 1, 2.5), True)],
)
def test_slices_are_thick_where_one_side_is_longer_than_both_others(spacing, thick):
    assert Preprocess("MR", spacing).thick is thick
