"""The optimisation-based learners against independent mathematics, in float64, on a network of 36 parameters."""

from __future__ import annotations

import gc
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, vjp

from medmeta.episode import Episode, Examples
from medmeta.learners import MetaLearner, build_learner
from medmeta.losses import dice_cross_entropy
from medmeta.networks import SegNet, build_network

ACTIVATIONS = {"leaky": partial(nn.LeakyReLU, 0.1), "silu": nn.SiLU}
# Through a kink a difference is right only if no activation crosses it.
WIDTHS = {"leaky": 1e-6, "silu": 1e-4}
LEARNERS = ["maml", "fomaml", "anil", "meta_sgd", "reptile", "imaml", "meta_transfer"]


def tiny_net(activation: str = "silu") -> SegNet:
    body = nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1),
        nn.GroupNorm(1, 2),
        ACTIVATIONS[activation](),
        nn.Conv2d(2, 2, 1),
        ACTIVATIONS[activation](),
    )
    net = SegNet(body, nn.Conv2d(2, 2, 1), input_weight="0.weight", stride=1).double()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(0.6 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return net


def tiny(name: str, activation: str = "silu", **options) -> MetaLearner:
    return build_learner(name, tiny_net(activation), **options).double()


def make_examples(seed: int, *, channels: int = 1, classes: int = 1, ignored: bool = False) -> Examples:
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(2, channels, 5, 4, generator=generator, dtype=torch.float64)
    mask = torch.randint(-1, classes + 1, (2, 5, 4), generator=generator)
    image[:, 0] += mask
    return Examples(image, torch.full_like(mask, -1) if ignored else mask, classes)


def make_episode(**options) -> Episode:
    return Episode("one", make_examples(1, **options), make_examples(2, **options))


SMALL, LARGE = make_episode(), make_episode(channels=2, classes=2)


def meta_gradient(learner: MetaLearner, episode: Episode) -> dict[str, Tensor | None]:
    learner.zero_grad()
    learner.meta_loss(episode).backward()
    return {name: parameter.grad for name, parameter in learner.named_parameters()}


def difference_gradient(learner: MetaLearner, episode: Episode, width: float) -> dict[str, Tensor]:
    """Central differences of the meta-loss, one coordinate at a time."""
    found = {}
    with torch.no_grad():
        for name, parameter in learner.named_parameters():
            slope = torch.zeros_like(parameter).flatten()
            coordinates = parameter.view(-1)
            for index in range(len(slope)):
                middle = float(coordinates[index])
                coordinates[index] = middle + width
                above = float(learner.meta_loss(episode))
                coordinates[index] = middle - width
                slope[index] = (above - float(learner.meta_loss(episode))) / (2 * width)
                coordinates[index] = middle
            found[name] = slope.view_as(parameter)
    return found


def furthest(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest relative error over the named tensors."""
    assert found.keys() == expected.keys()
    return max(float((found[name] - expected[name]).norm() / expected[name].norm().clamp(min=1e-3)) for name in found)


def loss_of(net: SegNet, parameters: dict[str, Tensor], examples: Examples) -> Tensor:
    """Run by the module itself, not by `SegNet.forward` with grown parameters."""
    return dice_cross_entropy(functional_call(net, parameters, (examples.image,)), examples.mask)


def own(net: SegNet) -> dict[str, Tensor]:
    """The parameters with which one channel and one class start: those of the net as they are."""
    return {name: parameter.detach().clone() for name, parameter in net.named_parameters()}


def of_net(found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("net."): gradient for name, gradient in found.items() if name.startswith("net.")}


@pytest.mark.parametrize("multi_step", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("name", "moving"), [("maml", ""), ("anil", "head.")])
def test_maml_and_anil_against_torch_func(name, moving, activation, multi_step) -> None:
    """ANIL too with the features computed anew in each step."""
    learner = tiny(name, activation, inner_steps=3, inner_rate=0.4, clip=None, multi_step=multi_step)

    def query_loss(start: dict[str, Tensor]) -> Tensor:
        now, losses = dict(start), []
        for _ in range(3):
            slope = grad(lambda parameters: loss_of(learner.net, parameters, SMALL.support))(now)
            now |= {key: now[key] - 0.4 * slope[key] for key in now if key.startswith(moving)}
            losses.append(loss_of(learner.net, now, SMALL.query))
        return multi_step * sum(losses) / 3 + (1 - multi_step) * losses[-1]

    assert learner.meta_loss(SMALL).item() == pytest.approx(query_loss(own(learner.net)).item(), rel=1e-12)
    assert furthest(of_net(meta_gradient(learner, SMALL)), grad(query_loss)(own(learner.net))) < 1e-10


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("maml", {"multi_step": 0.5}),
        ("anil", {}),
        ("anil", {"multi_step": 0.5, "clip": 0.1}),
        ("meta_sgd", {"inner_steps": 2, "clip": 0.1}),
    ],
)
def test_meta_gradient_against_finite_differences(name, options, activation) -> None:
    """With two channels and classes: the growing of parameters and rates is part of what is differentiated."""
    learner = tiny(name, activation, **{"inner_steps": 2, "inner_rate": 0.4} | options)
    expected = difference_gradient(learner, LARGE, WIDTHS[activation])
    assert furthest(meta_gradient(learner, LARGE), expected) < 1e-5
    if options:
        return
    first_order = tiny(name, activation, inner_steps=2, inner_rate=0.4, order=1)
    assert furthest(meta_gradient(first_order, LARGE), expected) > 1e-2


def test_multi_step_off_is_plain_maml() -> None:
    learner = tiny("maml", multi_step=0.0)
    expected = dice_cross_entropy(learner.query_logits(LARGE), LARGE.query.mask)
    assert torch.equal(learner.meta_loss(LARGE), expected)


@pytest.mark.parametrize("name", ["anil", "meta_transfer"])
def test_the_inner_loop_of_a_head_leaves_the_body(name) -> None:
    learner = tiny(name, inner_steps=2)
    start = learner.start(2, 2)
    adapted = learner.adapt(LARGE.support)
    assert all(torch.equal(adapted[body], start[body]) for body in learner.net.body_names)
    assert not any(torch.equal(adapted[head], start[head]) for head in learner.net.head_names)


@pytest.mark.parametrize(("name", "steps"), [("anil", "inner"), ("meta_transfer", "inner"), ("linear", "adapt")])
def test_features_of_the_support_are_computed_once(name, steps, monkeypatch) -> None:
    learner = tiny(name, **{f"{steps}_steps": 4})
    embed, seen = learner.net.embed, []
    monkeypatch.setattr(learner.net, "embed", lambda *given: seen.append(given) or embed(*given))
    learner.adapt(SMALL.support)
    assert len(seen) == 1


def test_the_rates_of_meta_sgd_grow_without_being_divided() -> None:
    learner = tiny("meta_sgd")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for rate in learner.alpha.parameters():
            rate.copy_(torch.randn(rate.shape, generator=generator, dtype=rate.dtype))
    start = learner.start(3, 2)
    rates = learner.rates(start)
    assert {name: rate.shape for name, rate in rates.items()} == {name: tensor.shape for name, tensor in start.items()}
    for channel in range(3):
        assert torch.equal(rates["body.0.weight"][:, channel], learner.alpha.body[0].weight[:, 0])
    assert torch.equal(rates["head.bias"], learner.alpha.head.bias[[0, 1, 1]])
    assert torch.equal(rates["body.3.weight"], learner.alpha.body[3].weight)


def test_meta_sgd_steps_by_its_rates() -> None:
    """One step, by hand; a negative rate climbs."""
    learner = tiny("meta_sgd", inner_steps=1, clip=None)
    with torch.no_grad():
        learner.alpha.head.bias.copy_(torch.tensor([-0.5, 2.0]))
    slope = grad(lambda parameters: loss_of(learner.net, parameters, SMALL.support))(own(learner.net))
    with torch.no_grad():
        adapted = learner.adapt(SMALL.support)
    for name, start in own(learner.net).items():
        rate = torch.tensor([-0.5, 2.0], dtype=torch.float64) if name == "head.bias" else 0.05
        torch.testing.assert_close(adapted[name], start - rate * slope[name], rtol=1e-12, atol=1e-12)


def test_meta_sgd_starts_as_maml() -> None:
    options = {"inner_steps": 2, "inner_rate": 0.3}
    maml, meta_sgd = tiny("maml", **options), tiny("meta_sgd", **options)
    expected = meta_gradient(maml, LARGE)
    found = meta_gradient(meta_sgd, LARGE)
    assert furthest(of_net(found), of_net(expected)) < 1e-12
    assert all(found[f"alpha.{name}"].any() for name, _ in maml.net.named_parameters())


def test_the_rates_of_a_first_order_meta_sgd() -> None:
    """After one step they are exact; the parameters are not."""
    learner = tiny("meta_sgd", inner_rate=0.3, order=1)
    exact = meta_gradient(tiny("meta_sgd", inner_rate=0.3), LARGE)
    found = meta_gradient(learner, LARGE)
    for name in exact:
        assert torch.allclose(found[name], exact[name], rtol=1e-9, atol=1e-12) == name.startswith("alpha."), name


@pytest.mark.parametrize("optimiser", ["sgd", "adam"])
@pytest.mark.parametrize("steps", [2, 5])
def test_reptile_against_a_hand_unrolled_descent(steps, optimiser) -> None:
    learner = tiny("reptile", inner_steps=steps, inner_rate=0.2, clip=None, inner_optimiser=optimiser)
    net, losses = tiny_net(), []
    stepper = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[optimiser](net.parameters(), lr=0.2)
    for step in range(steps):
        examples = SMALL.query if step % 2 else SMALL.support
        stepper.zero_grad()
        losses.append(dice_cross_entropy(net(examples.image), examples.mask))
        losses[-1].backward()
        stepper.step()
    expected = {name: start - net.get_parameter(name).detach() for name, start in own(learner.net).items()}
    # The eps of Adam stands elsewhere in `higher` than in torch.
    tolerance = 1e-12 if optimiser == "sgd" else 1e-3
    assert learner.meta_loss(SMALL).item() == pytest.approx(sum(losses).item() / steps, rel=tolerance)
    assert furthest(of_net(meta_gradient(learner, SMALL)), expected) < tolerance


def through_growing(net: SegNet, gradients: dict[str, Tensor], channels: int, classes: int) -> dict[str, Tensor]:
    """What gradients of grown parameters are for those of the net."""
    names = [name for name, _ in net.named_parameters()]

    def grown(*parameters: Tensor) -> list[Tensor]:
        by_name = dict(zip(names, parameters, strict=True))
        weight = by_name[net.input_weight]
        by_name[net.input_weight] = torch.cat([weight / channels] * channels, dim=1)
        for name in net.head_names:
            by_name[name] = torch.stack([by_name[name][0], *[by_name[name][1]] * classes])
        return [by_name[name] for name in names]

    _, backward = vjp(grown, *own(net).values())
    return dict(zip(names, backward([gradients[name] for name in names]), strict=True))


def test_reptiles_gradient_reaches_what_the_parameters_were_grown_from() -> None:
    learner = tiny("reptile", inner_steps=2, inner_rate=0.2, clip=None)
    start = {name: tensor.detach() for name, tensor in learner.start(2, 2).items()}
    end = start
    for examples in (LARGE.support, LARGE.query):
        slope = grad(lambda now, given=examples: dice_cross_entropy(learner.net(given.image, now), given.mask))(end)
        end = {name: end[name] - 0.2 * slope[name] for name in end}
    expected = through_growing(learner.net, {name: start[name] - end[name] for name in start}, 2, 2)
    assert furthest(of_net(meta_gradient(learner, LARGE)), expected) < 1e-10


def test_imaml_against_a_dense_solve() -> None:
    """Wherever the descent has ended, with the Hessian written out."""
    learner = tiny("imaml", inner_steps=2, inner_rate=0.3, strength=2.0, conjugate_steps=200, damping=0.5)
    with torch.no_grad():
        end = learner.adapt(LARGE.support)
    names, sizes = list(end), [tensor.numel() for tensor in end.values()]

    def loss(point: Tensor, examples: Examples) -> Tensor:
        parts = zip(end.items(), point.split(sizes), strict=True)
        parameters = {name: part.view_as(tensor) for (name, tensor), part in parts}
        return dice_cross_entropy(learner.net(examples.image, parameters), examples.mask)

    point = torch.cat([tensor.flatten() for tensor in end.values()])
    curvature = hessian(loss)(point, LARGE.support)
    system = 1.5 * torch.eye(len(point), dtype=torch.float64) + curvature / 2.0
    assert torch.linalg.eigvalsh(system).min() > 0
    solved = torch.linalg.solve(system, grad(loss)(point, LARGE.query)).split(sizes)
    gradients = {name: part.view_as(end[name]) for name, part in zip(names, solved, strict=True)}
    found = of_net(meta_gradient(learner, LARGE))
    assert furthest(found, through_growing(learner.net, gradients, 2, 2)) < 1e-5
    assert learner.meta_loss(LARGE).item() == pytest.approx(loss(point, LARGE.query).item())


def argmin_imaml(activation: str = "silu", conjugate_steps: int = 60) -> MetaLearner:
    """With steps enough to reach the argmin to the last digits."""
    options = {"inner_steps": 40, "inner_rate": 0.4, "clip": None, "strength": 2.0}
    return tiny("imaml", activation, conjugate_steps=conjugate_steps, **options)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_imaml_at_the_argmin_against_finite_differences(activation) -> None:
    """Of the query loss at the argmin of the proximal problem, along the meta-gradient itself."""
    learner, width = argmin_imaml(activation), WIDTHS[activation]
    found = meta_gradient(learner, LARGE)
    losses = []
    with torch.no_grad():
        for sign in (1, -2):
            for name, parameter in learner.named_parameters():
                parameter += sign * width * found[name]
            losses.append(dice_cross_entropy(learner.query_logits(LARGE), LARGE.query.mask).item())
    expected = (losses[0] - losses[1]) / (2 * width)
    assert sum(gradient.square().sum().item() for gradient in found.values()) == pytest.approx(expected, rel=1e-5)
    unsolved = meta_gradient(argmin_imaml(activation, conjugate_steps=1), LARGE)
    slope = sum((unsolved[name] * found[name]).sum().item() for name in found)
    assert slope != pytest.approx(expected, rel=1e-3)


def test_imaml_adapts_to_the_proximal_argmin() -> None:
    learner = argmin_imaml()
    with torch.no_grad():
        adapted = learner.adapt(SMALL.support)
    slope = grad(lambda parameters: loss_of(learner.net, parameters, SMALL.support))(adapted)
    for name, start in own(learner.net).items():
        torch.testing.assert_close(slope[name], 2.0 * (start - adapted[name]), rtol=0.0, atol=1e-9)


def test_meta_transfer_starts_as_the_plain_network() -> None:
    learner = tiny("meta_transfer")
    image = LARGE.query.image
    assert torch.equal(learner.segment(image, learner.start(2, 2)), learner.net(image, learner.net.grow(2, 2)))


def test_the_effective_parameters_of_meta_transfer_by_hand() -> None:
    learner = tiny("meta_transfer")
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for tensor in [*learner.scales.values(), *learner.shifts.values()]:
            tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype))
    assert {key: tuple(scale.shape) for key, scale in learner.scales.items()} == {
        "body/0/weight": (2, 1, 1, 1),
        "body/3/weight": (2, 2, 1, 1),
    }
    assert set(learner.shifts) == {"body/0/bias", "body/1/bias", "body/3/bias"}
    start, net = learner.start(2, 1), learner.net
    for output in range(2):
        for channel in range(2):
            kernel = net.body[0].weight[output, 0] / 2 * learner.scales["body/0/weight"][output].item()
            torch.testing.assert_close(start["body.0.weight"][output, channel], kernel)
            number = net.body[3].weight[output, channel] * learner.scales["body/3/weight"][output, channel]
            torch.testing.assert_close(start["body.3.weight"][output, channel], number)
    for layer in (0, 1, 3):
        torch.testing.assert_close(
            start[f"body.{layer}.bias"], net.body[layer].bias + learner.shifts[f"body/{layer}/bias"]
        )
    assert torch.equal(start["body.1.weight"], net.body[1].weight)
    assert torch.equal(start["head.weight"], net.head.weight)


@pytest.mark.parametrize("options", [{}, {"multi_step": 0.5}])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_meta_transfer_against_finite_differences_and_a_frozen_body(activation, options) -> None:
    learner = tiny("meta_transfer", activation, inner_steps=2, inner_rate=0.4, **options)
    frozen = {f"net.{name}" for name in learner.net.body_names}
    found = meta_gradient(learner, LARGE)
    assert {name for name, gradient in found.items() if gradient is None} == frozen
    expected = difference_gradient(learner, LARGE, WIDTHS[activation])
    learned = found.keys() - frozen
    assert furthest({name: found[name] for name in learned}, {name: expected[name] for name in learned}) < 1e-5


def test_training_leaves_the_frozen_body_to_the_last_bit() -> None:
    learner = tiny("meta_transfer")
    before = {name: tensor.clone() for name, tensor in learner.state_dict().items()}
    optimiser = torch.optim.AdamW(learner.parameters(), lr=0.1, weight_decay=0.1)
    meta_gradient(learner, LARGE)
    optimiser.step()
    for name, tensor in learner.state_dict().items():
        assert torch.equal(tensor, before[name]) == name.startswith("net.body."), name


def test_linear_is_fine_tuning_of_the_head_alone() -> None:
    learner = tiny("linear", adapt_steps=5, adapt_rate=0.1)
    net = tiny_net()
    net.body.requires_grad_(False)
    optimiser = torch.optim.Adam(net.head.parameters(), lr=0.1)
    for _ in range(5):
        optimiser.zero_grad()
        dice_cross_entropy(net(SMALL.support.image), SMALL.support.mask).backward()
        optimiser.step()
    adapted = learner.adapt(SMALL.support)
    assert adapted.keys() == own(net).keys()
    for name, tensor in own(net).items():
        torch.testing.assert_close(adapted[name], tensor, rtol=1e-10, atol=1e-10)
        assert not adapted[name].requires_grad


def test_linear_is_trained_like_transfer() -> None:
    linear, transfer = (tiny(name, tasks={"one": 2}) for name in ("linear", "transfer"))
    found, expected = meta_gradient(linear, LARGE), meta_gradient(transfer, LARGE)
    assert found.keys() == expected.keys()
    for name in ("net.body.0.weight", "heads.task_0.head_0"):
        assert torch.equal(found[name], expected[name])


@pytest.mark.parametrize("name", LEARNERS)
def test_a_support_that_is_all_ignored_spoils_nothing(name) -> None:
    support = make_examples(1, channels=2, classes=2, ignored=True)
    found = meta_gradient(tiny(name), Episode("one", support, LARGE.query))
    assert all(gradient is None or gradient.isfinite().all() for gradient in found.values())


@pytest.mark.parametrize("name", LEARNERS)
def test_meta_gradient_in_bfloat16_is_nearly_that_in_float32(name) -> None:
    learner = build_learner(name, build_network("se_unet_3d", seed=0, channels=[8, 16]))
    generator = torch.Generator().manual_seed(0)
    examples = []
    for _ in range(2):
        mask = (torch.randn(2, 8, 8, 8, generator=generator) > 1.0).long()
        examples.append(Examples(torch.randn(2, 1, 8, 8, 8, generator=generator) + 2.0 * mask.unsqueeze(1), mask, 1))
    episode, found = Episode("one", *examples), []
    for enabled in (False, True):
        learner.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = learner.meta_loss(episode)
        assert loss.dtype == torch.float32
        loss.backward()
        kept = [parameter.grad.flatten() for parameter in learner.parameters() if parameter.grad is not None]
        assert all(gradient.any() for gradient in kept)
        found.append(torch.cat(kept))
    assert torch.cosine_similarity(*found, dim=0) > 0.9


def graph_size(loss: Tensor) -> int:
    """Number of operations that `loss` keeps for its backward pass."""
    seen, waiting = set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting.extend(following for following, _ in node.next_functions)
    return len(seen)


@pytest.mark.parametrize(
    ("name", "options", "grows"),
    [
        ("maml", {}, True),
        ("anil", {}, True),
        ("fomaml", {}, False),
        ("anil", {"order": 1}, False),
        ("meta_sgd", {"order": 1}, False),
        ("meta_transfer", {"order": 1}, False),
        ("reptile", {}, False),
        ("imaml", {}, False),
    ],
)
def test_only_second_order_keeps_the_path(name, options, grows) -> None:
    few, many = (graph_size(tiny(name, inner_steps=steps, **options).meta_loss(LARGE)) for steps in (2, 6))
    assert (many > few) == grows


@pytest.mark.parametrize("name", LEARNERS)
def test_memory_does_not_grow(name) -> None:
    learner = tiny(name, inner_steps=2)
    optimiser = torch.optim.SGD(learner.parameters(), lr=1e-3)

    def once() -> None:
        optimiser.zero_grad()
        learner.meta_loss(SMALL).backward()
        optimiser.step()

    def alive() -> int:
        gc.collect()
        return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())

    once()
    before = alive()
    for _ in range(50):
        once()
    assert alive() == before


@pytest.mark.parametrize("name", LEARNERS)
def test_a_few_meta_steps_lower_the_loss_after_adapting(name) -> None:
    learner = tiny(name)
    optimiser = torch.optim.Adam(learner.parameters(), lr=0.02)

    def adapted_loss() -> float:
        with torch.no_grad():
            return float(dice_cross_entropy(learner.query_logits(SMALL), SMALL.query.mask))

    before = adapted_loss()
    for _ in range(20):
        optimiser.zero_grad()
        learner.meta_loss(SMALL).backward()
        optimiser.step()
    assert adapted_loss() < before - 0.01


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("maml", {"multi_step": 1.5}, "multi_step=1.5; required: a share of 0 to 1"),
        ("fomaml", {"multi_step": -0.1}, "multi_step=-0.1; required"),
        ("reptile", {"inner_steps": 1}, "inner_steps=1; required: at least 2"),
        ("reptile", {"order": 2}, "required: among .*'inner_steps'"),
        ("imaml", {"strength": 0.0}, "strength=0.0, .* required: a positive strength"),
        ("imaml", {"conjugate_steps": 0}, "conjugate_steps=0"),
        ("imaml", {"damping": -1.0}, "damping=-1.0"),
        ("meta_sgd", {"inner_optimiser": "adam"}, "required: among .*'inner_rate'"),
        ("meta_transfer", {"inner_step": 1}, "inner_step.* required: among"),
        ("anil", {"inner_rate": 0.0}, "a positive rate"),
    ],
)
def test_refuses_what_it_cannot_do(name, options, says) -> None:
    with pytest.raises(ValueError, match=says):
        tiny(name, **options)
