"""Labels carried by registration: right where scans can be registered, without weight where they cannot."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import SimpleITK
import torch
from scipy.ndimage import affine_transform, gaussian_filter
from scipy.spatial.transform import Rotation

import medmeta.registration as module
from medmeta.data.preprocess import Preprocess
from medmeta.data.store import StoredCase, StoredTask
from medmeta.inference import Layer, blend
from medmeta.registration import DOUBT, carry_labels, make_atlas, make_atlases

SHAPE, SPACING = (44, 40, 30), (1.0, 1.1, 1.6)


def head(shape=SHAPE, seed=0):
    """A textured ball with two organs in it, and their mask (X, Y, Z)."""
    x, y, z = np.meshgrid(*[np.linspace(-1, 1, size) for size in shape], indexing="ij")
    mask = np.zeros(shape, np.int8)
    mask[((x + 0.3) / 0.3) ** 2 + (y / 0.4) ** 2 + (z / 0.4) ** 2 < 1] = 1
    mask[((x - 0.3) / 0.25) ** 2 + ((y - 0.1) / 0.3) ** 2 + (z / 0.5) ** 2 < 1] = 2
    texture = gaussian_filter(np.random.default_rng(seed).normal(size=shape), 2.0)
    inside = x**2 + y**2 + z**2 < 0.8
    image = inside * (2.0 + 3.0 * texture / texture.std() * 0.2) + 1.0 * (mask == 1) - 0.8 * (mask == 2)
    return image.astype(np.float32), mask


def moved(data, order):
    """Turned by 12 degrees, 8 % larger, shifted by about three voxels."""
    turn = Rotation.from_euler("zx", (12, 5), degrees=True).as_matrix() / 1.08
    middle = (np.array(data.shape) - 1) / 2
    return affine_transform(data, turn, offset=middle - turn @ middle + (3.0, -2.0, 1.0), order=order)


def on_grid(carried: Layer, shape, classes=2):
    flat = torch.full((1 + classes, *shape), 1.0 / (1 + classes))
    ((_, made),) = blend(iter([(0, flat)]), shape, [replace(carried, share=1.0)])
    return made.argmax(dim=0).numpy()


def dices(labels, mask):
    return [2 * ((labels == k) & (mask == k)).sum() / ((labels == k).sum() + (mask == k).sum()) for k in (1, 2)]


def test_labels_follow_the_organ():
    image, mask = head()
    here, there = moved(image, 1), moved(mask, 0)
    assert max(dices(mask, there)) < 0.75, "where nothing moved nothing would be shown"
    carried = carry_labels(here * 300.0 + 40.0, SPACING, [make_atlas(image, mask, SPACING)], 2)
    assert min(dices(on_grid(carried, SHAPE), there)) > 0.9
    assert carried.share == pytest.approx(1 / 2, abs=0.1)
    assert carried.probabilities.dtype == torch.float16
    assert float((carried.probabilities.float().sum(dim=0) - 1).abs().max()) < 5e-3
    assert float(carried.probabilities.min()) >= DOUBT / 3 - 1e-3


def test_the_same_scans_give_the_same_labels_and_itk_keeps_its_threads():
    threads = SimpleITK.ProcessObject.GetGlobalDefaultNumberOfThreads()
    image, mask = head()
    first, second = (carry_labels(moved(image, 1), SPACING, [make_atlas(image, mask, SPACING)], 2) for _ in range(2))
    assert torch.equal(first.probabilities, second.probabilities)
    assert first.share == second.share
    assert SimpleITK.ProcessObject.GetGlobalDefaultNumberOfThreads() == threads


@pytest.mark.parametrize(("voxels", "pooled"), [(3000, 100), (3000, 3), (10**6, 32)])
def test_a_coarse_grid_lies_where_the_fine_one_does(voxels, pooled, monkeypatch):
    monkeypatch.setattr(module, "VOXELS", voxels)
    monkeypatch.setattr(module, "POOLED", pooled)
    image, mask = head()
    atlas = make_atlas(image, mask, SPACING)
    carried = carry_labels(image, SPACING, [atlas], 2)
    assert atlas.image.numel() <= voxels
    assert carried.probabilities[0].numel() <= atlas.mask.numel() <= module.FINER * voxels
    labels = on_grid(carried, SHAPE)
    assert min(dices(labels, mask)) > 0.9
    for label in (1, 2):
        shift = np.argwhere(labels == label).mean(axis=0) - np.argwhere(mask == label).mean(axis=0)
        assert np.abs(shift).max() < 0.3
    if voxels > image.size:
        assert torch.equal(carried.indices, torch.eye(4, dtype=torch.float64))


@pytest.mark.parametrize(
    "scan",
    [
        np.random.default_rng(1).normal(size=SHAPE),
        head(seed=5)[0][::-1],
        np.full(SHAPE, 7.0),
        np.random.default_rng(1).normal(size=(30, 30, 1)),
        np.random.default_rng(1).normal(size=(3, 4, 2)),
        np.ones((1, 1, 1)),
    ],
    ids=["noise", "another texture, mirrored", "constant", "a slice", "a few voxels", "a voxel"],
)
def test_what_cannot_be_registered_does_not_count(scan):
    carried = carry_labels(scan.astype(np.float32), SPACING, [make_atlas(*head(), SPACING)], 2)
    assert carried.share == 0.0
    assert bool(carried.probabilities.isfinite().all())
    assert torch.equal(carried.probabilities.argmax(dim=0), torch.zeros(scan.shape, dtype=torch.long))


def test_the_atlas_that_fits_counts():
    image, mask = head()
    good, bad = make_atlas(image, mask, SPACING), make_atlas(np.random.default_rng(2).normal(size=SHAPE), mask, SPACING)
    alone, both = (carry_labels(moved(image, 1), SPACING, atlases, 2) for atlases in ([good], [bad, good]))
    assert torch.equal(alone.probabilities, both.probabilities)
    of_two = 2**0.5 / (1 + 2**0.5)
    assert both.share == pytest.approx(alone.share / (1 / 2) / 2 * of_two)


def test_each_atlas_counts_where_it_looks_like_the_scan(monkeypatch):
    monkeypatch.setattr(module, "ALIKE", 0.0)
    image, mask = head()
    other, _ = head(seed=5)
    left = np.arange(SHAPE[0])[:, None, None] < SHAPE[0] // 2
    halves = [make_atlas(np.where(right, image, other), np.where(right, mask, 0), SPACING) for right in (left, ~left)]
    for atlas, alone in zip(halves, (0, 1), strict=True):
        found = dices(on_grid(carry_labels(image, SPACING, [atlas], 2), SHAPE), mask)
        assert found[alone] > 0.9
        assert found[1 - alone] < 0.1
    assert min(dices(on_grid(carry_labels(image, SPACING, halves, 2), SHAPE), mask)) > 0.9


def test_a_flat_organ_keeps_its_labels():
    image, mask = head()
    flat = np.where(mask == 1, 2.0, image).astype(np.float32)
    atlases = [make_atlas(flat, mask, SPACING), make_atlas(flat + 0.01, mask, SPACING)]
    assert min(dices(on_grid(carry_labels(flat, SPACING, atlases, 2), SHAPE), mask)) > 0.9


def test_what_is_ignored_is_no_organ_and_an_empty_mask_says_nothing():
    image, mask = head()
    ignored = np.where(mask == 1, -1, mask)
    carried = carry_labels(image, SPACING, [make_atlas(image, ignored, SPACING)], 2)
    assert set(np.unique(on_grid(carried, SHAPE))) == {0, 2}
    assert carry_labels(image, SPACING, [make_atlas(image, np.zeros_like(mask), SPACING)], 2).share == 0.0


def stored(*scans: tuple[str, np.ndarray, np.ndarray]) -> StoredTask:
    cases = (StoredCase(str(n), patient, image[None], mask, {}) for n, (patient, image, mask) in enumerate(scans))
    return StoredTask("heads", 2, (8, 8, 8), tuple(cases), Preprocess("MR", SPACING))


def test_an_atlas_that_says_nothing_of_other_patients_is_left_out():
    image, mask = head()
    alike = [("b", moved(image, 1), moved(mask, 0)), ("a", image, mask)]
    noise = ("c", np.random.default_rng(3).normal(size=SHAPE).astype(np.float32), mask)
    kept = make_atlases(stored(*alike, noise), 3)
    assert len(kept) == 1
    assert torch.equal(kept[0].mask, make_atlas(*alike[0][1:], SPACING).mask), "the second is followed by noise"
    assert not make_atlases(stored(alike[0], noise), 3)
    assert len(make_atlases(stored(*alike, noise[:1] + alike[0][1:]), 3)) == 3


def test_an_atlas_is_compared_with_another_patient_if_there_is_one():
    image, mask = head()
    noise = np.random.default_rng(3).normal(size=SHAPE).astype(np.float32)
    assert len(make_atlases(stored(("a", image, mask), ("a", noise, mask)), 3)) == 2
    assert not make_atlases(stored(("a", image, mask), ("a", image, mask), ("b", noise, mask)), 3)
