"""Model-based learners against loops in NumPy, GRU cells and torch.func, in float64."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, hessian

from medmeta.episode import Examples
from medmeta.learners.base import MetaLearner
from medmeta.learners.memory import MemoryAugmented, MetaNetworks, Recurrent, read, slopes_by_example, write
from medmeta.losses import dice_cross_entropy
from medmeta.networks import build_network

LEARNERS = [MemoryAugmented, MetaNetworks, Recurrent]
SIZES = {2: (7, 6), 3: (5, 6, 3)}


@pytest.fixture(params=[2, 3])
def axes(request: pytest.FixtureRequest) -> int:
    return request.param


def make(learner: type[MetaLearner], axes: int, **options) -> MetaLearner:
    if axes == 3:
        net = build_network("se_unet_3d", seed=0, channels=[4, 8], se_ratio=2)
    else:
        net = build_network("scse_unet_2d", seed=0, encoder_depth=1, decoder_channels=[16])
    return learner(net, **options).to(torch.float64).eval()


def draw(axes: int, seed: int = 0, *, classes: int = 2, count: int = 2) -> Examples:
    """Noise; every voxel has a random label, the last class only in the first image."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(count, 1, *SIZES[axes], generator=generator, dtype=torch.float64)
    mask = torch.randint(-1, classes + 1, (count, *SIZES[axes]), generator=generator)
    mask[1:][mask[1:] == classes] = 0
    return Examples(image, mask, classes)


def logits_of(learner: MetaLearner, support: Examples, image: Tensor) -> Tensor:
    with torch.no_grad():
        return learner.segment(image, learner.adapt(support))


def embedded(learner: MetaLearner, image: Tensor) -> np.ndarray:
    """Features with the voxel first: (N, *S, F)."""
    with torch.no_grad():
        return learner.features(image).movedim(1, -1).numpy()


def cells_of(size: tuple[int, ...], cells: int) -> list[tuple[slice, ...]]:
    """The slices of every cell in raster order: n of a length L reach from floor(i L / n) to ceil((i+1) L / n)."""
    sides = []
    for length in size:
        count = min(cells, length)
        sides.append([slice(i * length // count, -(-(i + 1) * length // count)) for i in range(count)])
    return list(product(*sides))


def reference_read(memory: np.ndarray, key: np.ndarray, sharpness: float) -> np.ndarray:
    """Equations 2 and 3, one row after the other."""
    scores = []
    for row in memory:
        place = row[: len(key)]
        lengths = math.sqrt(place @ place + 1e-6) * math.sqrt(key @ key + 1e-6)
        scores.append(math.exp(sharpness * float(place @ key) / lengths))
    return np.array(scores) / sum(scores)


def reference_write(memory, usage, reading, row, gate, decay):
    """Equations 5 to 8, one row after the other."""
    memory, usage = memory.copy(), usage.copy()
    least = min(range(len(usage)), key=lambda slot: usage[slot])
    memory[least] = 0.0
    share = 1.0 / (1.0 + math.exp(-gate))
    for slot in range(len(memory)):
        weight = share * reading[slot] + (1.0 - share) * (slot == least)
        memory[slot] = memory[slot] + weight * row
        usage[slot] = decay * usage[slot] + reading[slot] + weight
    return memory, usage


def test_read_and_write_follow_the_paper() -> None:
    """More steps than rows, so that used rows are wiped."""
    draws = np.random.default_rng(0)
    slots, width, labels, sharpness, gate, decay = 4, 3, 2, 5.0, -0.4, 0.9
    expected, expected_usage = np.zeros((slots, width + labels)), np.zeros(slots)
    memory, usage = torch.from_numpy(expected), torch.from_numpy(expected_usage)
    for _ in range(10):
        row = draws.normal(size=width + labels)
        key = torch.from_numpy(row[:width])
        reading = read(memory, key, torch.tensor(sharpness, dtype=torch.float64))
        expected_reading = reference_read(expected, row[:width], sharpness)
        np.testing.assert_allclose(reading, expected_reading, rtol=1e-10)
        memory, usage = write(
            memory, usage, reading, torch.from_numpy(row), torch.tensor(gate, dtype=torch.float64), decay
        )
        expected, expected_usage = reference_write(expected, expected_usage, expected_reading, row, gate, decay)
        np.testing.assert_allclose(memory, expected, rtol=1e-10)
        np.testing.assert_allclose(usage, expected_usage, rtol=1e-10)


def test_a_worked_step() -> None:
    """By hand: two rows, the second used less. The gate is 1/4, the reading (0.8, 0.2)."""
    memory = torch.tensor([[1.0, 0.0], [5.0, 5.0]], dtype=torch.float64)
    usage, reading = torch.tensor([2.0, 1.0]).double(), torch.tensor([0.8, 0.2]).double()
    gate = torch.tensor(math.log(1 / 3), dtype=torch.float64)
    memory, usage = write(memory, usage, reading, torch.tensor([10.0, 20.0]).double(), gate, 0.5)
    torch.testing.assert_close(memory, torch.tensor([[3.0, 4.0], [8.0, 16.0]]).double())
    torch.testing.assert_close(usage, torch.tensor([2.0, 1.5]).double())


def test_memory_augmented_against_loops(axes) -> None:
    learner = make(MemoryAugmented, axes, cells=2, slots=6, key_width=5, decay=0.9)
    with torch.no_grad():
        learner.gate.fill_(0.3)
    support, query = draw(axes, 1), draw(axes, 2).image
    projection = learner.key.weight.detach().numpy()
    features, mask = embedded(learner, support.image), support.mask.numpy()
    rows = []
    for number in range(len(support)):
        for cell in cells_of(mask.shape[1:], 2):
            sizes = {label: int((mask[number][cell] == label).sum()) for label in range(3)}
            content = {}
            for label in range(3):
                content[label] = features[number][cell][mask[number][cell] == label].reshape(-1, features.shape[-1])
            present = [label for label in range(3) if sizes[label]]
            for label in sorted(present, key=lambda label: (-sizes[label], content[label].mean(0).sum())):
                key = projection @ content[label].mean(0)
                rows.append(np.concatenate([key / np.linalg.norm(key), np.eye(3)[label]]))
    assert len(rows) > 2 * learner.slots
    memory, usage = np.zeros((6, 8)), np.zeros(6)
    for row in rows:
        memory, usage = reference_write(memory, usage, reference_read(memory, row[:5], 15.0), row, 0.3, 0.9)
    with torch.no_grad():
        np.testing.assert_allclose(learner.adapt(support)["memory"], memory, rtol=1e-6, atol=1e-9)
    logits = logits_of(learner, support, query).movedim(1, -1).numpy()
    points = embedded(learner, query)
    for place in np.ndindex(points.shape[:-1]):
        key = projection @ points[place]
        found = reference_read(memory, key / np.linalg.norm(key), 15.0) @ memory[:, 5:]
        np.testing.assert_allclose(logits[place], np.log(found / found.sum() + 1e-6), rtol=1e-6, atol=1e-6)


def test_classes_of_one_size_are_read_in_an_order_without_names(axes) -> None:
    learner = make(MemoryAugmented, axes, cells=1)
    support, query = draw(axes, 1, count=1), draw(axes, 2).image
    mask = torch.zeros_like(support.mask)
    mask.view(-1)[:4] = torch.tensor([1, 2, 1, 2])
    renamed = torch.tensor([0, 2, 1])[mask]
    logits = logits_of(learner, Examples(support.image, mask, 2), query)
    turned = logits_of(learner, Examples(support.image, renamed, 2), query)
    torch.testing.assert_close(turned[:, [0, 2, 1]], logits, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", LEARNERS)
def test_only_sequential_learners_see_the_order_of_the_support(kind, axes) -> None:
    learner, support, query = make(kind, axes), draw(axes, 1), draw(axes, 2).image
    turned = Examples(support.image.flip(0), support.mask.flip(0), 2)
    logits = [logits_of(learner, given, query) for given in (support, turned)]
    assert torch.allclose(*logits, rtol=1e-9, atol=1e-9) != kind.sequential


def test_recurrent_against_a_cell_stepped_by_hand(axes) -> None:
    learner = make(Recurrent, axes, cells=2, width=6)
    with torch.no_grad():
        learner.initial.copy_(torch.arange(12.0).view(2, 6) / 10)
    support, query = draw(axes, 1), draw(axes, 2).image
    features, mask = torch.from_numpy(embedded(learner, support.image)), support.mask
    mask[(0, *cells_of(mask.shape[1:], 2)[1])] = -1
    width = features.shape[-1]
    cell = torch.nn.GRUCell(2 * width + 1, 6).double()
    cell.load_state_dict({name[: -len("_l0")]: tensor for name, tensor in learner.recurrence.state_dict().items()})
    expected = []
    for label in range(3):
        state = cell(torch.zeros(1, 2 * width + 1).double(), learner.initial[[min(label, 1)]])
        for number, place in product(range(len(support)), cells_of(mask.shape[1:], 2)):
            inside, labels = features[number][place].reshape(-1, width), mask[number][place].flatten()
            own, rest = inside[labels == label], inside[(labels != label) & (labels >= 0)]
            if len(own) + len(rest) == 0:
                continue
            means = [part.mean(0) if len(part) else torch.zeros(width).double() for part in (own, rest)]
            share = torch.tensor([len(own) / len(labels)]).double()
            state = cell(torch.cat([*means, share]).unsqueeze(0), state)
        weights = learner.output(state)[0]
        expected.append(torch.from_numpy(embedded(learner, query)) @ weights[:-1] + weights[-1])
    torch.testing.assert_close(logits_of(learner, support, query), torch.stack(expected, dim=1).detach())


def test_slopes_by_example_against_torch_func() -> None:
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    weights = torch.randn(2, 4, generator=generator, dtype=torch.float64, requires_grad=True)

    def loss(weights: Tensor, point: Tensor) -> Tensor:
        return (weights @ point).tanh().pow(3).sum()

    def losses(copies: Tensor) -> Tensor:
        return torch.stack([loss(copy, point) for copy, point in zip(copies, points, strict=True)])

    found = slopes_by_example(losses, weights, 3)
    torch.testing.assert_close(found, torch.stack([grad(loss)(weights, point) for point in points]))
    (second,) = torch.autograd.grad(found.sum(), weights)
    torch.testing.assert_close(second, sum(hessian(loss)(weights, point).sum((0, 1)) for point in points))
    with torch.no_grad():
        assert not slopes_by_example(losses, weights, 3).requires_grad


@pytest.mark.parametrize("entry", [0.7, -0.003, 1e-5, -1e-9, 0.0])
def test_the_generators_see_magnitude_and_sign(entry) -> None:
    """Andrychowicz 2016, appendix A, with p = 10."""
    generator = make(MetaNetworks, 3).task_generator
    if abs(entry) >= math.exp(-10):
        prepared = [math.log(abs(entry)) / 10, math.copysign(1.0, entry)]
    else:
        prepared = [-1.0, math.exp(10) * entry]
    hidden = torch.tanh(generator.hidden(torch.tensor(prepared).double()))
    expected = (generator.output.weight @ hidden)[0] - 0.1 * entry
    found = generator(torch.full((2, 3), entry, dtype=torch.float64))
    torch.testing.assert_close(found, expected.expand(2, 3), rtol=1e-6, atol=1e-9)


def test_meta_networks_against_torch_func(axes) -> None:
    """Algorithm 1 with generators that are one gradient step: every fast weight is -rate times a gradient."""
    learner = make(MetaNetworks, axes, rate=0.3)
    with torch.no_grad():
        for generator in (learner.task_generator, learner.example_generator):
            generator.output.weight.zero_()
        learner.embedding.add_(0.1 * torch.randn(learner.embedding.shape, generator=torch.Generator().manual_seed(0)))
    support, query = draw(axes, 1, count=3), draw(axes, 2).image
    head = {name.split(".")[1]: learner.net.grow(1, 2)[name].detach() for name in learner.net.head_names}
    slow = learner.embedding.detach()

    def embed(weights: Tensor, features: Tensor) -> Tensor:
        return (
            torch.einsum("oi,ni...->no...", weights[:, :-1], features) + weights[:, -1].view(1, -1, *[1] * axes)
        ).relu()

    def segment(head: dict[str, Tensor], hidden: Tensor) -> Tensor:
        return functional_call(learner.net.head, head, (hidden,))

    with torch.no_grad():
        features, points = learner.features(support.image), learner.features(query)

    def by_embedding(weights: Tensor, number: int) -> Tensor:
        hidden = embed(weights, features[[number]])
        return dice_cross_entropy(segment(head, hidden), support.mask[[number]])

    fast = -0.3 * sum(grad(by_embedding)(slow, number) for number in range(3)) / 3
    hidden = embed(slow, features) + embed(fast, features)

    def by_head(head: dict[str, Tensor], number: int) -> Tensor:
        return dice_cross_entropy(segment(head, hidden[[number]]), support.mask[[number]])

    slopes = [grad(by_head)(head, number) for number in range(3)]
    keys = []
    for number in range(3):
        keys.append(hidden[number][:, support.mask[number] >= 0].mean(1))
    found = logits_of(learner, support, query)
    answers = embed(slow, points) + embed(fast, points)
    for number, answer in enumerate(answers):
        key = answer.flatten(1).mean(1)
        attention = torch.softmax(10 * torch.stack([torch.cosine_similarity(key, other, dim=0) for other in keys]), 0)
        own = {
            name: head[name] - 0.3 * sum(a * s[name] for a, s in zip(attention, slopes, strict=True)) for name in head
        }
        torch.testing.assert_close(found[[number]], segment(own, answer[None]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", LEARNERS)
def test_an_ignored_example_counts_for_nothing(kind, axes) -> None:
    learner, support, query = make(kind, axes), draw(axes, 1), draw(axes, 2).image
    image = torch.cat([support.image[:1], 5 + 3 * query[:1], support.image[1:]])
    mask = torch.cat([support.mask[:1], torch.full_like(support.mask[:1], -1), support.mask[1:]])
    logits = [logits_of(learner, given, query) for given in (support, Examples(image, mask, 2))]
    torch.testing.assert_close(*logits, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", LEARNERS)
def test_absent_classes_lose_and_an_ignored_support_is_harmless(kind, axes) -> None:
    learner, support, query = make(kind, axes), draw(axes, 1), draw(axes, 2).image
    logits = logits_of(learner, Examples(support.image, support.mask, 3), query)
    assert logits.isfinite().all()
    assert (logits[:, 3] < logits[:, :3].amin(1) - 5).all() or (logits[:, 3] < logits[:, :3].amax(1) - 12).all()
    nothing = Examples(support.image, torch.full_like(support.mask, -1), 2)
    loss = dice_cross_entropy(learner.segment(query, learner.adapt(nothing)), support.mask)
    loss.backward()
    gradients = [parameter.grad for parameter in learner.parameters() if parameter.grad is not None]
    assert loss.isfinite()
    assert gradients
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("kind", LEARNERS)
def test_initial_weights_are_the_same_every_time(kind) -> None:
    before = torch.get_rng_state()
    first = make(kind, 3).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(int(before.sum()) + 1)
    second = make(kind, 3).state_dict()
    torch.set_rng_state(before)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("kind", "options", "says"),
    [
        (MemoryAugmented, {"cells": 0}, "cells=0, .*required: at least 1 cell"),
        (MemoryAugmented, {"decay": 1.0}, r"decay=1\.0; required: .*decay < 1"),
        (Recurrent, {"width": 0}, "width=0; required"),
        (MetaNetworks, {"rate": 0.0}, r"rate=0\.0; required: .*a positive rate"),
    ],
)
def test_refuses_options_without_sense(kind, options, says) -> None:
    with pytest.raises(ValueError, match=says):
        make(kind, 3, **options)
