"""Metric-based learners against loops in NumPy, written from the papers, in float64."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from medmeta.episode import Episode, Examples
from medmeta.learners import pooling
from medmeta.learners.base import MetaLearner
from medmeta.learners.metric import Attentive, ImageDeformation, Matching, Prototypical, Relation, Siamese, textures
from medmeta.networks import build_network

LEARNERS = [Prototypical, Matching, Siamese, Relation, Attentive, ImageDeformation]
SIZES = {2: (7, 6), 3: (5, 6, 3)}
QUERIES = {2: (3, 4), 3: (3, 2, 4)}


@pytest.fixture(params=[2, 3])
def axes(request: pytest.FixtureRequest) -> int:
    return request.param


def make(learner: type[MetaLearner], axes: int, dtype: torch.dtype = torch.float64, **options) -> MetaLearner:
    if axes == 3:
        net = build_network("se_unet_3d", seed=0, channels=[4, 8], se_ratio=2)
    else:
        net = build_network("scse_unet_2d", seed=0, encoder_depth=1, decoder_channels=[16])
    return learner(net, **options).to(dtype).eval()


def draw(size: tuple[int, ...], seed: int = 0, *, classes: int = 2, dtype: torch.dtype = torch.float64) -> Examples:
    """Two images of noise; classes 0, 1, .. in bands along the first axis, the last class in the first image only."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(2, 1, *size, generator=generator, dtype=dtype)
    mask = torch.arange(size[0]).mul(classes + 1).div(size[0], rounding_mode="floor")
    mask = mask.view(1, -1, *[1] * (len(size) - 1)).expand(2, *size).clone()
    mask[1][mask[1] == classes] = 0
    mask[torch.rand(mask.shape, generator=generator) < 0.2] = -1
    return Examples(image, mask, classes)


def embedded(learner: MetaLearner, image: Tensor) -> np.ndarray:
    """Features with the voxel first: (N, *S, F)."""
    with torch.no_grad():
        return learner.features(image).movedim(1, -1).numpy()


def cells_of(size: tuple[int, ...], cells: int):
    """The slices of every cell: n cells of a length L reach from floor(i L / n) to ceil((i + 1) L / n)."""
    sides = []
    for length in size:
        count = min(cells, length)
        sides.append([slice(i * length // count, -(-(i + 1) * length // count)) for i in range(count)])
    return list(product(*sides))


def cell_loop(features: np.ndarray, mask: np.ndarray, label: int, cells: int) -> list[tuple[np.ndarray, float]]:
    """Mean feature of a class in each cell that shows it, and its share of the cell."""
    found = []
    for number in range(len(mask)):
        for place in cells_of(mask.shape[1:], cells):
            own = mask[number][place] == label
            if own.any():
                found.append((features[number][place][own].mean(axis=0), own.mean()))
    return found


def key_loop(features: np.ndarray, mask: np.ndarray, classes: int, cells: int, coverage: float) -> list[np.ndarray]:
    """For each class its keys (P, F): the mean of all its voxels, then those of the cells it covers."""
    keys = []
    for label in range(classes + 1):
        own = [features[mask == label].mean(axis=0)]
        if cells > 1:
            own += [mean for mean, share in cell_loop(features, mask, label, cells) if share >= coverage]
        keys.append(np.array(own))
    return keys


def logits_of(learner: MetaLearner, support: Examples, query: Tensor) -> np.ndarray:
    with torch.no_grad():
        return learner.segment(query, learner.adapt(support)).movedim(1, -1).numpy()


def by_voxel(score, features: np.ndarray) -> np.ndarray:
    """A score (1+K,) of each voxel, voxel after voxel."""
    flat = features.reshape(-1, features.shape[-1])
    return np.array([score(voxel) for voxel in flat]).reshape(*features.shape[:-1], -1)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


@pytest.mark.parametrize("cells", [1, 2, 4])
def test_pooling_is_the_mean_over_the_voxels_of_a_class(axes, cells) -> None:
    support = draw(SIZES[axes], classes=2)
    features = torch.randn(2, 3, *SIZES[axes], generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    voxels, mask = features.movedim(1, -1).numpy(), support.mask.numpy()
    means, present = pooling.class_means(features, support)
    local, coverage = pooling.cell_means(features, support, cells)
    assert local.shape[1] == coverage.shape[1] == 2 * len(cells_of(SIZES[axes], cells))
    for label in range(3):
        np.testing.assert_allclose(means[label], voxels[mask == label].mean(axis=0))
        expected = cell_loop(voxels, mask, label, cells)
        shown = coverage[label] > 0
        np.testing.assert_allclose(local[label][shown], [mean for mean, _ in expected])
        np.testing.assert_allclose(coverage[label][shown], [share for _, share in expected])
        assert not local[label][~shown].any()
    assert present.tolist() == [1, 1, 1]


@pytest.mark.parametrize(("cells", "coverage"), [(1, 0.5), (2, 0.3), (4, 0.5)])
def test_prototypical_against_a_loop(axes, cells, coverage) -> None:
    learner = make(Prototypical, axes, cells=cells, coverage=coverage, scale=7.0)
    support, query = draw(SIZES[axes]), draw(QUERIES[axes], 1).image
    keys = key_loop(embedded(learner, support.image), support.mask.numpy(), 2, cells, coverage)
    assert cells == 1 or max(len(own) for own in keys) > 2

    def score(voxel: np.ndarray) -> list[float]:
        logits = []
        for own in keys:
            similarity = np.array([7.0 * cosine(voxel, key) for key in own])
            weights = np.exp(similarity) / np.exp(similarity).sum()
            logits.append(float((weights * similarity).sum()))
        return logits

    expected = by_voxel(score, embedded(learner, query))
    np.testing.assert_allclose(logits_of(learner, support, query), expected, rtol=1e-8, atol=1e-8)


def test_prototypical_with_one_cell_is_the_plain_network(axes) -> None:
    """Snell 2017, eq. 1 and 2, with the cosine as (negative) distance."""
    learner = make(Prototypical, axes, cells=1)
    support, query = draw(SIZES[axes]), draw(QUERIES[axes], 1).image
    features, voxels = embedded(learner, support.image), embedded(learner, query)
    prototypes = np.array([features[support.mask.numpy() == label].mean(axis=0) for label in range(3)])
    prototypes /= np.linalg.norm(prototypes, axis=1, keepdims=True)
    expected = 20.0 * voxels @ prototypes.T / np.linalg.norm(voxels, axis=-1, keepdims=True)
    np.testing.assert_allclose(logits_of(learner, support, query), expected, rtol=1e-8, atol=1e-8)


def test_matching_against_a_loop(axes) -> None:
    learner = make(Matching, axes, cells=3, scale=6.0)
    support, query = draw(SIZES[axes]), draw(QUERIES[axes], 1).image
    features, mask = embedded(learner, support.image), support.mask.numpy()
    pairs = []
    for label in range(3):
        pairs += [(mean, share, label) for mean, share in cell_loop(features, mask, label, 3)]

    def score(voxel: np.ndarray) -> np.ndarray:
        attention = np.array([share * math.exp(6.0 * cosine(voxel, mean)) for mean, share, _ in pairs])
        attention /= attention.sum()
        return sum(weight * np.eye(3)[label] for weight, (_, _, label) in zip(attention, pairs, strict=True))

    expected = by_voxel(score, embedded(learner, query))
    found = torch.tensor(logits_of(learner, support, query)).softmax(dim=-1)
    np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-8)


def test_matching_stays_finite_however_sharp_its_attention(axes) -> None:
    """A class whose share of the attention is nothing in float32 still has a logit."""
    learner = make(Matching, axes, torch.float32, scale=1000.0)
    support, query = (draw(SIZES[axes], seed, dtype=torch.float32) for seed in (0, 1))
    logits = learner.segment(query.image, learner.adapt(support))
    logits.sum().backward()
    assert logits.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in learner.parameters())


def test_siamese_against_a_loop(axes) -> None:
    learner = make(Siamese, axes, cells=3)
    with torch.no_grad():
        learner.log_weights.copy_(torch.linspace(-1.0, 0.5, len(learner.log_weights)))
        learner.bias.fill_(0.7)
    support, query = draw(SIZES[axes]), draw(QUERIES[axes], 1).image
    keys = key_loop(embedded(learner, support.image), support.mask.numpy(), 2, 3, learner.coverage)
    alpha = np.exp(learner.log_weights.detach().numpy())

    def score(voxel: np.ndarray) -> list[float]:
        pairs = [[1 / (1 + math.exp((alpha * abs(voxel - key)).sum() - 0.7)) for key in own] for own in keys]
        return [math.log(sum(own) / len(own)) for own in pairs]

    expected = by_voxel(score, embedded(learner, query))
    np.testing.assert_allclose(logits_of(learner, support, query), expected, rtol=1e-8, atol=1e-8)


def test_relation_is_a_module_over_the_concatenation(axes) -> None:
    learner = make(Relation, axes, hidden=5)
    with torch.no_grad():
        for number, parameter in enumerate([*learner.of_voxel.parameters(), *learner.of_class.parameters()]):
            parameter += torch.linspace(-0.3, 0.1 * number, parameter.numel()).view_as(parameter)
        learner.relate.weight.copy_(torch.linspace(-1.0, 0.5, 5))
    support, query = draw(SIZES[axes]), draw(QUERIES[axes], 1).image
    features = embedded(learner, support.image)
    prototypes = [features[support.mask.numpy() == label].mean(axis=0) for label in range(3)]
    joined = np.concatenate([learner.of_voxel.weight.detach(), learner.of_class.weight.detach()], axis=1)
    bias = learner.of_voxel.bias.detach().numpy()
    last = learner.relate.weight[0].detach().numpy()

    def score(voxel: np.ndarray) -> list[float]:
        relations = []
        for prototype in prototypes:
            relations.append(last @ np.maximum(joined @ np.concatenate([voxel, prototype]) + bias, 0))
        return relations

    expected = by_voxel(score, embedded(learner, query))
    np.testing.assert_allclose(logits_of(learner, support, query), expected, rtol=1e-8, atol=1e-8)


def test_relation_starts_as_a_distance(axes) -> None:
    """The prototype itself is related to its class the most, at 0."""
    learner = make(Relation, axes)
    support = draw(SIZES[axes])
    with torch.no_grad():
        prototypes = learner.adapt(support)["prototypes"]
        pairs = learner.of_voxel(prototypes).unsqueeze(1) + learner.of_class(prototypes)
        relations = learner.relate(pairs.relu()).squeeze(2)
    torch.testing.assert_close(relations.diagonal(), torch.zeros(3, dtype=torch.float64))
    assert (relations[~torch.eye(3, dtype=torch.bool)] < 0).all()


@pytest.mark.parametrize("attentive", [True, False])
def test_attentive_against_a_loop(axes, attentive) -> None:
    learner = make(Attentive, axes, cells=3, hidden=5)
    if not attentive:
        torch.nn.init.zeros_(learner.attention[-1].weight)
    support, query = draw(SIZES[axes]), draw(QUERIES[axes], 1).image
    features, mask = embedded(learner, support.image), support.mask.numpy()
    rows, last = learner.attention[0].weight.detach().numpy(), learner.attention[-1].weight[0].detach().numpy()
    prototypes = []
    for label in range(3):
        found = cell_loop(features, mask, label, 3)
        weights = np.array([share * math.exp(last @ np.tanh(rows @ mean)) for mean, share in found])
        prototypes.append(sum(weight * mean for weight, (mean, _) in zip(weights / weights.sum(), found, strict=True)))

    def score(voxel: np.ndarray) -> list[float]:
        return [-float(((voxel - prototype) ** 2).sum()) for prototype in prototypes]

    expected = by_voxel(score, embedded(learner, query))
    np.testing.assert_allclose(logits_of(learner, support, query), expected, rtol=1e-8, atol=1e-8)


def upsampled(cells: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """A value for every voxel of `size`: that of the patch it lies in."""
    places = np.ix_(
        *([i * count // length for i in range(length)] for count, length in zip(cells.shape, size, strict=True))
    )
    return cells[places]


def test_synthesised_images_fuse_probe_and_gallery_patch_by_patch(axes) -> None:
    learner = make(ImageDeformation, axes, gallery=2, hidden=5)
    size = SIZES[axes]
    image = draw(size).image
    with torch.no_grad():
        found = [fused.numpy() for fused in learner.synthesise(image, learner.features(image))]
    first, last = ([p.detach().numpy() for p in learner.deform[layer].parameters()] for layer in (0, 2))
    gallery = textures(2, size)
    probes, others = embedded(learner, image), embedded(learner, gallery)
    assert len(found) == 2
    for other, texture, fused in zip(others, gallery.numpy(), found, strict=True):
        for number, probe in enumerate(probes):
            weights = []
            for place in cells_of(size, 3):
                both = np.concatenate([features[place].mean(axis=tuple(range(axes))) for features in (probe, other)])
                value = last[0] @ np.maximum(first[0] @ both + first[1], 0) + last[1]
                weights.append(1 / (1 + math.exp(-value.item())))
            assert 0.6 < min(weights) < max(weights) < 0.95
            weight = upsampled(np.reshape(weights, [min(3, length) for length in size]), size)
            expected = weight * image[number].numpy() + (1 - weight) * texture
            np.testing.assert_allclose(fused[number], expected, rtol=1e-10, atol=1e-10)


def test_prototypes_come_from_the_support_and_every_synthesised_image(axes) -> None:
    learner = make(ImageDeformation, axes, gallery=2)
    support = draw(SIZES[axes])
    with torch.no_grad():
        images = torch.cat([support.image, *learner.synthesise(support.image, learner.features(support.image))])
        everything = Examples(images, support.mask.repeat(3, *[1] * axes), support.classes)
        means, _ = pooling.class_means(learner.features(images), everything)
        state = learner.adapt(support)
    assert len(images) == 6
    torch.testing.assert_close(state["keys"][:3], means)


def test_without_deformation_it_is_a_prototypical_network(axes) -> None:
    learner, plain = make(ImageDeformation, axes), make(Prototypical, axes)
    support, query = draw(SIZES[axes]), draw(QUERIES[axes], 1).image
    expected = logits_of(plain, support, query)
    assert not np.allclose(logits_of(learner, support, query), expected, atol=1e-3)
    with torch.no_grad():
        learner.deform[-1].bias.fill_(50.0)
    np.testing.assert_allclose(logits_of(learner, support, query), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("size", [(24, 16), (1, 7), (6, 5, 1), (20, 16, 12)])
def test_textures_are_smooth_fields_of_unit_variance(size) -> None:
    fields = textures(3, size)
    assert torch.equal(fields, textures(3, size))
    for field in fields:
        assert field.mean().abs() < 1e-12
        assert field.square().mean() == pytest.approx(1.0)
    assert not torch.allclose(fields[0], fields[1])
    if min(size) > 1:
        for axis in range(2, fields.ndim):
            # White noise would have a mean squared difference of 2.
            assert fields.diff(dim=axis).square().mean() < 1.0


def test_textures_of_a_single_voxel_are_finite() -> None:
    assert textures(2, (1, 1, 1)).isfinite().all()


@pytest.mark.parametrize("learner", LEARNERS)
def test_blocks_of_voxels_score_as_all_of_them_at_once(learner, axes, monkeypatch) -> None:
    learner = make(learner, axes)
    support, query = draw(SIZES[axes]), draw(QUERIES[axes], 1).image
    expected = logits_of(learner, support, query)
    monkeypatch.setattr(pooling, "_ENTRIES", 1)
    np.testing.assert_allclose(logits_of(learner, support, query), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("learner", LEARNERS)
def test_a_class_without_a_voxel_gets_nothing_and_changes_nothing(learner, axes) -> None:
    learner = make(learner, axes)
    support, query = draw(SIZES[axes], classes=1), draw(QUERIES[axes], 1).image
    logits = logits_of(learner, Examples(support.image, support.mask, 2), query)
    floor = np.minimum(logits[..., :2].min(axis=-1), 0.0) - pooling.ABSENT
    np.testing.assert_allclose(logits[..., 2], floor)
    np.testing.assert_allclose(logits[..., :2], logits_of(learner, support, query), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("learner", LEARNERS)
def test_ignoring_a_class_is_as_if_it_were_not_declared(learner, axes) -> None:
    learner = make(learner, axes)
    support, query = draw(SIZES[axes]), draw(QUERIES[axes], 1).image
    without = Examples(support.image, torch.where(support.mask == 2, -1, support.mask), 1)
    logits, fewer = (torch.tensor(logits_of(learner, given, query)) for given in (support, without))
    # Compared as probabilities of the two classes: what all classes share is of no account.
    torch.testing.assert_close(logits[..., :2].softmax(dim=-1), fewer.softmax(dim=-1))


@pytest.mark.parametrize("learner", LEARNERS)
@pytest.mark.parametrize("shown", [True, False])
def test_every_parameter_beside_the_head_learns(learner, axes, shown) -> None:
    """Also under autocast; from a support that is all ignored there is nothing to learn, and no NaN either."""
    learner = make(learner, axes, torch.float32)
    support, query = (draw(SIZES[axes], seed, dtype=torch.float32) for seed in (0, 1))
    if not shown:
        support = Examples(support.image, torch.full_like(support.mask, -1), 2)
    losses = []
    for enabled in (False, True):
        learner.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = learner.meta_loss(Episode("noise", support, query))
        loss.backward()
        losses.append(loss.item())
        assert loss.dtype == torch.float32
        for name, parameter in learner.named_parameters():
            if name.startswith("net.head"):
                assert parameter.grad is None
            else:
                assert parameter.grad.isfinite().all(), name
                assert parameter.grad.any() == shown, name
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


@pytest.mark.parametrize("learner", [Relation, Attentive, ImageDeformation])
def test_own_weights_start_the_same_and_leave_the_global_generator_alone(learner) -> None:
    before = torch.random.get_rng_state()
    first = make(learner, 3).state_dict()
    torch.rand(1)
    second = make(learner, 3).state_dict()
    torch.random.set_rng_state(before)
    own = [name for name in first if not name.startswith("net.")]
    assert own and all(torch.equal(first[name], second[name]) for name in own)
    make(learner, 3)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("learner", LEARNERS)
def test_the_state_of_many_large_patches_is_small(learner) -> None:
    learner = make(learner, 3, torch.float32)
    support = draw((64, 64, 10), classes=9, dtype=torch.float32)
    image, mask = (tensor.repeat(5, *[1] * (tensor.ndim - 1)) for tensor in (support.image, support.mask))
    with torch.no_grad():
        state = learner.adapt(Examples(image, mask, 9))
    assert sum(tensor.numel() * tensor.element_size() for tensor in state.values()) < 2**20


@pytest.mark.parametrize(
    ("learner", "options", "says"),
    [
        (Prototypical, {"cells": 0}, "cells=0, .* required: at least 1 cell"),
        (Prototypical, {"coverage": 0.0}, "coverage=0.0; required: .* 0 < coverage <= 1"),
        (Prototypical, {"scale": 0.0}, "scale=0.0; required: a positive factor"),
        (Matching, {"cells": 0}, "cells=0"),
        (Matching, {"scale": -1.0}, "scale=-1.0"),
        (Siamese, {"coverage": 1.5}, "coverage=1.5"),
        (Relation, {"hidden": 0}, "hidden=0; required: at least one"),
        (Attentive, {"cells": 0}, "cells=0"),
        (Attentive, {"hidden": 0}, "hidden=0"),
        (ImageDeformation, {"gallery": 0}, "gallery=0; required: at least one texture"),
        (ImageDeformation, {"hidden": 0}, "hidden=0"),
        (ImageDeformation, {"scale": 0.0}, "scale=0.0"),
    ],
)
def test_refuses_options_that_make_no_sense(learner, options, says) -> None:
    with pytest.raises(ValueError, match=says):
        make(learner, 3, **options)
