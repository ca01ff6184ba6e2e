"""The in-context network against direct loops, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from medmeta.episode import Examples
from medmeta.learners.in_context import CrossBlock, InContext, cross_convolution
from medmeta.losses import dice_cross_entropy
from medmeta.networks import build_network

SIZES = {2: (8, 6), 3: (6, 5, 3)}


@pytest.fixture(params=[2, 3])
def axes(request: pytest.FixtureRequest) -> int:
    return request.param


def make(axes: int, **options) -> InContext:
    if axes == 3:
        net = build_network("se_unet_3d", seed=0, channels=[4, 8], se_ratio=2)
    else:
        net = build_network("scse_unet_2d", seed=0, encoder_depth=1, decoder_channels=[16])
    return InContext(net, **{"width": 4, "levels": 2} | options).to(torch.float64).eval()


def draw(axes: int, seed: int = 0, *, classes: int = 2, count: int = 3) -> Examples:
    """Noise, with more and more foreground from one image to the next."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(count, 1, *SIZES[axes], generator=generator, dtype=torch.float64)
    mask = torch.randint(1, classes + 1, (count, *SIZES[axes]), generator=generator)
    share = torch.arange(1, count + 1).view(-1, *[1] * axes) / (count + 1)
    mask[torch.rand(mask.shape, generator=generator) > share] = 0
    return Examples(image, mask, classes)


def logits_of(learner: InContext, support: Examples, image: Tensor) -> Tensor:
    with torch.no_grad():
        return learner.segment(image, learner.adapt(support))


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("queries", "supports"), [(1, 1), (2, 1), (2, 2)])
def test_a_cross_block_against_the_paper_pair_by_pair(axes, queries, supports) -> None:
    """Every query is joined with every example by concatenation, as the paper writes it."""
    block = CrossBlock(axes, 3, 2, 4).double()
    query, support = noise(queries, 3, *SIZES[axes]), noise(supports, 5, 2, *SIZES[axes], seed=1)
    found = block(query, support)
    for number in range(queries):
        crossed, handed_on = [], []
        for example in support[number if supports > 1 else 0]:
            joined = torch.cat([query[number], example]).unsqueeze(0)
            crossed.append(functional.leaky_relu(block.cross(joined)))
            handed_on.append(functional.leaky_relu(block.support(crossed[-1]))[0])
        own = functional.leaky_relu(block.query(sum(crossed) / 5))[0]
        torch.testing.assert_close(found[0][number], own)
        torch.testing.assert_close(found[1][number], torch.stack(handed_on))


def test_cross_convolution_against_a_loop_over_voxels() -> None:
    convolution = torch.nn.Conv2d(3, 2, 3, padding=1).double()
    query, support = noise(1, 1, 4, 3), noise(1, 2, 2, 4, 3, seed=1)
    found = cross_convolution(query, support, convolution)
    assert found.shape == (1, 2, 2, 4, 3)
    for example, channel, x, y in torch.cartesian_prod(*map(torch.arange, found.shape[1:])).tolist():
        joined = functional.pad(torch.cat([query[0], support[0, example]]), (1, 1, 1, 1))
        window = joined[:, x : x + 3, y : y + 3]
        expected = (convolution.weight[channel] * window).sum() + convolution.bias[channel]
        torch.testing.assert_close(found[0, example, channel, x, y], expected)


def test_every_class_is_a_problem_of_its_own(axes) -> None:
    learner, support, query = make(axes), draw(axes, 1), draw(axes, 2).image
    logits = logits_of(learner, support, query)
    alone = Examples(support.image, torch.where(support.mask == 2, 0, support.mask), 1)
    torch.testing.assert_close(logits_of(learner, alone, query)[:, 1], logits[:, 1], rtol=1e-9, atol=1e-9)
    assert not logits[:, 0].any()
    assert not torch.allclose(logits[:, 1], logits[:, 2], atol=1e-3)


def test_a_class_uses_its_richest_examples(axes) -> None:
    """The second and third have more foreground than the first; ties go by content, whatever the order."""
    learner, support, query = make(axes, examples=2), draw(axes, 1, classes=1), draw(axes, 2).image
    rich = Examples(support.image[1:], support.mask[1:], 1)
    logits = logits_of(learner, support, query)
    torch.testing.assert_close(logits, logits_of(learner, rich, query), rtol=1e-9, atol=1e-9)
    assert not torch.allclose(logits, logits_of(make(axes, examples=3), support, query), atol=1e-3)
    state = learner.adapt(support)
    assert len(state["features"]) == len(state["masks"]) == 2
    equal = support.mask[1].expand_as(support.mask)
    for order in ([0, 1, 2], [2, 0, 1], [1, 2, 0]):
        found = logits_of(learner, Examples(support.image[order], equal, 1), query)
        if order == [0, 1, 2]:
            expected = found
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_classes_choose_their_examples_apart(axes) -> None:
    learner, support, query = make(axes, examples=1), draw(axes, 1), draw(axes, 2).image
    mask = torch.zeros_like(support.mask)
    mask[0].view(-1)[:9], mask[2].view(-1)[5:9] = 1, 2
    logits = logits_of(learner, Examples(support.image, mask, 2), query)
    for label, number in ((1, [0]), (2, [2])):
        alone = Examples(support.image[number], (mask[number] == label).long(), 1)
        torch.testing.assert_close(logits_of(learner, alone, query)[:, 1], logits[:, label], rtol=1e-9, atol=1e-9)


def test_the_support_is_resized_to_the_query(axes) -> None:
    """A support of constant images and masks looks the same at every size."""
    learner = make(axes, levels=1)
    learner.features = lambda image: image.expand(-1, learner.net.features, *[-1] * axes)
    query = noise(2, 1, *SIZES[axes])
    found = []
    for length in (4, 9):
        shape = (2, *[length] * axes)
        image = torch.tensor([0.5, 2.0]).double().view(2, 1, *[1] * axes).expand(2, 1, *shape[1:])
        found.append(logits_of(learner, Examples(image, torch.ones(shape, dtype=torch.long), 1), query))
    torch.testing.assert_close(*found)


def test_ignored_voxels_show_the_network_nothing(axes) -> None:
    learner, support = make(axes), draw(axes, 1)
    support.mask[:, :3] = -1
    features = learner.features(support.image).detach()
    found = []
    for offset in (0.0, 7.0):
        features[:, :, :3] += offset
        learner.features = lambda image: features
        found.append(learner.adapt(support))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_an_ignored_example_counts_for_nothing(axes) -> None:
    learner, support, query = make(axes), draw(axes, 1), draw(axes, 2).image
    image = torch.cat([support.image[:1], 5 + 3 * query[:1], support.image[1:]])
    mask = torch.cat([support.mask[:1], torch.full_like(support.mask[:1], -1), support.mask[1:]])
    logits = [logits_of(learner, given, query) for given in (support, Examples(image, mask, 2))]
    torch.testing.assert_close(*logits, rtol=1e-9, atol=1e-9)


def test_absent_classes_lose_and_an_ignored_support_is_harmless(axes) -> None:
    learner, support, query = make(axes), draw(axes, 1), draw(axes, 2).image
    logits = logits_of(learner, Examples(support.image, support.mask, 3), query)
    assert logits.isfinite().all()
    assert (logits[:, 3] < logits[:, :3].amin(1) - 12).all()
    nothing = Examples(support.image, torch.full_like(support.mask, -1), 2)
    loss = dice_cross_entropy(learner.segment(query, learner.adapt(nothing)), support.mask)
    loss.backward()
    gradients = [parameter.grad for parameter in learner.parameters() if parameter.grad is not None]
    assert loss.isfinite()
    assert gradients
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_nothing_in_the_network_is_idle(axes, levels) -> None:
    learner, support, query = make(axes, levels=levels), draw(axes, 1), draw(axes, 2)
    dice_cross_entropy(learner.segment(query.image, learner.adapt(support)), query.mask).backward()
    for name, parameter in learner.network.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


@pytest.mark.parametrize("option", ["width", "levels", "examples"])
def test_refuses_options_without_sense(option) -> None:
    with pytest.raises(ValueError, match=f"{option}=0.*; required: at least 1 of each"):
        make(3, **{option: 0})
