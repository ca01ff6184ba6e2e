"""The inner loop against an independent torch.func implementation and against finite differences, in float64."""

from __future__ import annotations

import gc
import math
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad

from medmeta.learners.inner import descend

STEPS = [1, 3]
CLIPS = [None, 0.2]
ACTIVATIONS = {"leaky": partial(nn.LeakyReLU, 0.1), "silu": nn.SiLU}
# Through a kink a difference is right only if no activation crosses it.
WIDTHS = {"leaky": 1e-6, "silu": 1e-4}
FIXED = "0.bias"


class Problem:
    """Few-shot regression with a small network: a start, rates, and the losses of support and query."""

    def __init__(self, activation: str = "silu") -> None:
        generator = torch.Generator().manual_seed(3)
        draw = partial(torch.randn, generator=generator, dtype=torch.float64)
        self.module = nn.Sequential(nn.Linear(3, 5), ACTIVATIONS[activation](), nn.Linear(5, 2)).double()
        self.start = {name: draw(tensor.shape).requires_grad_() for name, tensor in self.module.named_parameters()}
        self.rates = {name: (0.02 + 0.1 * draw(tensor.shape).abs()).requires_grad_() for name, tensor in self.moving()}
        self.support, self.query = (draw(7, 3), draw(7, 2)), (draw(6, 3), draw(6, 2))

    def moving(self):
        return [(name, tensor) for name, tensor in self.start.items() if name != FIXED]

    def loss(self, parameters: dict[str, Tensor], data: tuple[Tensor, Tensor]) -> Tensor:
        return (functional_call(self.module, parameters, (data[0],)) - data[1]).square().mean()

    def objective(self, parameters: dict[str, Tensor]) -> Tensor:
        return self.loss(parameters, self.support)

    def descended(self, **options) -> dict[str, Tensor]:
        return descend(self.objective, self.start, self.rates, **options)

    def meta_gradient(self, **options) -> dict[str, Tensor]:
        """Of the query loss, with respect to the start and the rates (under their name and 'rate')."""
        loss = self.loss(self.descended(**options), self.query)
        names = [*self.start, *(f"rate {name}" for name in self.rates)]
        found = torch.autograd.grad(loss, [*self.start.values(), *self.rates.values()], allow_unused=True)
        return {name: tensor for name, tensor in zip(names, found, strict=True) if tensor is not None}


def reference_descent(problem: Problem, start, rates, steps: int, clip: float | None) -> dict[str, Tensor]:
    """The same descent by torch.func: no graph kept by hand, no library of differentiable optimisers."""
    now = dict(start)
    for _ in range(steps):
        slope = grad(problem.objective)(now)
        norm = math.inf if clip is None else torch.cat([slope[name].flatten() for name in rates]).norm()
        scale = 1.0 if clip is None else torch.where(norm > clip, clip / norm, 1.0)
        now = now | {name: now[name] - rates[name] * scale * slope[name] for name in rates}
    return now


def reference_gradient(problem: Problem, steps: int, clip: float | None) -> dict[str, Tensor]:
    def query_loss(start, rates) -> Tensor:
        return problem.loss(reference_descent(problem, start, rates, steps, clip), problem.query)

    of_start, of_rates = grad(query_loss, argnums=(0, 1))(detached(problem.start), detached(problem.rates))
    return of_start | {f"rate {name}": tensor for name, tensor in of_rates.items()}


def difference_gradient(problem: Problem, width: float, **options) -> dict[str, Tensor]:
    """Central differences of the query loss after the descent, one coordinate at a time."""

    @torch.no_grad()
    def query_loss() -> float:
        return float(problem.loss(problem.descended(**options), problem.query))

    found = {}
    named = problem.start | {f"rate {name}": tensor for name, tensor in problem.rates.items()}
    for name, tensor in named.items():
        slope = torch.zeros(tensor.numel(), dtype=torch.float64)
        flat = tensor.detach().view(-1)
        for index in range(flat.numel()):
            middle = float(flat[index])
            flat[index] = middle + width
            above = query_loss()
            flat[index] = middle - width
            below = query_loss()
            flat[index] = middle
            slope[index] = (above - below) / (2 * width)
        found[name] = slope.view_as(tensor)
    return found


def detached(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def furthest(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest relative error over the named tensors."""
    assert found.keys() == expected.keys()
    found, expected = detached(found), detached(expected)
    return max(float((found[name] - expected[name]).norm() / expected[name].norm()) for name in expected)


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
class TestSecondOrder:
    def test_against_torch_func(self, activation, steps, clip) -> None:
        problem = Problem(activation)
        expected = reference_descent(problem, problem.start, problem.rates, steps, clip)
        assert furthest(problem.descended(steps=steps, clip=clip), expected) < 1e-12
        assert furthest(problem.meta_gradient(steps=steps, clip=clip), reference_gradient(problem, steps, clip)) < 1e-10

    def test_against_finite_differences(self, activation, steps, clip) -> None:
        problem = Problem(activation)
        expected = difference_gradient(problem, WIDTHS[activation], steps=steps, clip=clip)
        assert furthest(problem.meta_gradient(steps=steps, clip=clip), expected) < 1e-5

    def test_first_order_fails_both(self, activation, steps, clip) -> None:
        """What the two tests above are worth."""
        problem = Problem(activation)
        first = problem.meta_gradient(steps=steps, clip=clip, order=1)
        assert not any(name.startswith("rate") for name in first)
        second = {name: tensor for name, tensor in reference_gradient(problem, steps, clip).items() if name in first}
        assert furthest(first, second) > 100 * 1e-5
        expected = difference_gradient(problem, WIDTHS[activation], steps=steps, clip=clip)
        assert furthest(first, {name: expected[name] for name in first}) > 100 * 1e-5


@pytest.mark.parametrize("clip", CLIPS)
def test_the_clip_of_these_tests_clips(clip) -> None:
    problem = Problem()
    plain, clipped = problem.descended(steps=1), problem.descended(steps=1, clip=clip)
    assert torch.equal(plain["0.weight"], clipped["0.weight"]) == (clip is None)
    if clip is not None:
        slopes = [(problem.start[name] - clipped[name]) / problem.rates[name] for name in problem.rates]
        assert torch.cat([slope.flatten() for slope in slopes]).norm().item() == pytest.approx(clip)


@pytest.mark.parametrize("rate", [0.07, torch.tensor(0.07, dtype=torch.float64)])
def test_one_rate_for_a_whole_parameter(rate) -> None:
    problem = Problem()
    rates = dict.fromkeys(problem.rates, rate)
    expected = reference_descent(problem, problem.start, rates, 3, None)
    assert furthest(descend(problem.objective, problem.start, rates, 3), expected) < 1e-12


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("clip", CLIPS)
def test_first_order_is_the_gradient_at_the_end_given_to_the_start(steps, clip) -> None:
    problem = Problem()
    end = reference_descent(problem, detached(problem.start), detached(problem.rates), steps, clip)
    expected = grad(lambda parameters: problem.loss(parameters, problem.query))(end)
    assert furthest(problem.descended(steps=steps, clip=clip, order=1), end) < 1e-12
    assert furthest(problem.meta_gradient(steps=steps, clip=clip, order=1), expected) < 1e-12


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("optimiser", ["sgd", "adam"])
def test_a_parameter_without_a_rate_stays_and_passes_the_gradient(order, optimiser) -> None:
    problem = Problem()
    adapted = problem.descended(steps=3, order=order, optimiser=optimiser)
    assert list(adapted) != [] and adapted.keys() == problem.start.keys()
    assert torch.equal(adapted[FIXED], problem.start[FIXED])
    assert not any(torch.equal(adapted[name], tensor) for name, tensor in problem.moving())
    (through,) = torch.autograd.grad(adapted[FIXED].sum(), problem.start[FIXED])
    assert torch.equal(through, torch.ones_like(through))


@pytest.mark.parametrize("order", [1, 2])
def test_without_rates_or_steps_nothing_moves(order) -> None:
    problem = Problem()
    for made in (
        descend(problem.objective, problem.start, {}, 3, order=order),
        descend(problem.objective, problem.start, problem.rates, 0, order=order),
    ):
        for name, tensor in problem.start.items():
            assert torch.equal(made[name], tensor)
            (through,) = torch.autograd.grad(made[name].sum(), tensor)
            assert torch.equal(through, torch.ones_like(through))


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("optimiser", ["sgd", "adam"])
def test_without_gradients_the_same_numbers_and_no_graph(order, clip, optimiser) -> None:
    """Deployment does what meta-training did."""
    problem = Problem()
    options = {"steps": 3, "order": order, "clip": clip, "optimiser": optimiser}
    tracked = problem.descended(**options)
    with torch.no_grad():
        plain = problem.descended(**options)
        assert not torch.is_grad_enabled()
    assert furthest(plain, tracked) < 1e-12
    assert not any(tensor.requires_grad or tensor.grad_fn for tensor in plain.values())
    assert all(tensor.requires_grad for tensor in tracked.values())


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("enabled", [True, False])
def test_the_start_is_left_as_it_was(order, enabled) -> None:
    problem = Problem()
    before = detached(problem.start)
    with torch.set_grad_enabled(enabled):
        problem.descended(steps=2, order=order)
    for name, tensor in problem.start.items():
        assert torch.equal(tensor, before[name])
        assert tensor.grad is None
        assert tensor.is_leaf and tensor.requires_grad


def test_a_start_that_is_itself_computed() -> None:
    """A grown head: the gradient reaches what it was grown from."""
    problem = Problem()
    doubled = {name: 2.0 * tensor for name, tensor in problem.start.items()}
    loss = problem.loss(descend(problem.objective, doubled, problem.rates, 2), problem.query)
    found = torch.autograd.grad(loss, list(problem.start.values()))

    def query_loss(start) -> Tensor:
        doubled = {name: 2.0 * tensor for name, tensor in start.items()}
        return problem.loss(reference_descent(problem, doubled, problem.rates, 2, None), problem.query)

    expected = grad(query_loss)(problem.start)
    assert furthest(dict(zip(problem.start, found, strict=True)), expected) < 1e-10


def test_a_start_that_needs_no_gradient() -> None:
    problem = Problem()
    expected = problem.descended(steps=2)
    made = descend(problem.objective, detached(problem.start), problem.rates, 2)
    assert furthest(made, expected) < 1e-12


@pytest.mark.parametrize("order", [1, 2])
def test_momentum_free(order) -> None:
    """Under a constant slope every step has the same length; and n steps are m, then n - m more."""
    start = {"x": torch.zeros(3, dtype=torch.float64, requires_grad=True)}
    slope = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    for steps in (1, 2, 5):
        made = descend(lambda parameters: (slope * parameters["x"]).sum(), start, {"x": 0.25}, steps, order=order)
        assert torch.equal(made["x"].detach(), -0.25 * steps * slope)
    problem = Problem()
    halfway = problem.descended(steps=2, order=order)
    onward = descend(problem.objective, halfway, problem.rates, 3, order=order)
    assert furthest(onward, problem.descended(steps=5, order=order)) < 1e-12


@pytest.mark.parametrize("order", [1, 2])
def test_one_look_at_the_support_for_each_step(order) -> None:
    problem, seen = Problem(), []

    def objective(parameters: dict[str, Tensor]) -> Tensor:
        seen.append(parameters.keys())
        return problem.objective(parameters)

    descend(objective, problem.start, problem.rates, 4, order=order)
    assert seen == [problem.start.keys()] * 4


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("optimiser", ["sgd", "adam"])
@pytest.mark.parametrize("clip", CLIPS)
def test_no_slope_no_step_and_no_nan(order, optimiser, clip) -> None:
    """A support whose voxels are all ignored: the derivative of the norm at zero must not spoil the meta-gradient."""
    problem = Problem()

    def flat(parameters: dict[str, Tensor]) -> Tensor:
        return sum(0.0 * tensor.square().sum() for tensor in parameters.values())

    adapted = descend(flat, problem.start, problem.rates, 2, order=order, clip=clip, optimiser=optimiser)
    found = torch.autograd.grad(problem.loss(adapted, problem.query), list(problem.start.values()))
    expected = torch.autograd.grad(problem.loss(problem.start, problem.query), list(problem.start.values()))
    assert furthest(dict(enumerate(found)), dict(enumerate(expected))) < 1e-12


@pytest.mark.parametrize("clip", CLIPS)
def test_a_parameter_without_a_bearing_on_the_loss_stays(clip) -> None:
    problem = Problem()
    start = problem.start | {"idle": torch.ones(2, dtype=torch.float64, requires_grad=True)}
    adapted = descend(problem.objective, start, problem.rates | {"idle": 0.1}, 2, clip=clip)
    assert torch.equal(adapted["idle"], start["idle"])


@pytest.mark.parametrize("steps", STEPS)
def test_adam_against_torch(steps) -> None:
    problem = Problem()
    plain = {name: tensor.detach().clone().requires_grad_() for name, tensor in problem.start.items()}
    theirs = torch.optim.Adam([plain[name] for name in problem.rates], lr=0.03)
    for _ in range(steps):
        theirs.zero_grad()
        problem.objective(plain).backward()
        theirs.step()
    rates = dict.fromkeys(problem.rates, 0.03)
    ours = descend(problem.objective, problem.start, rates, steps, order=1, optimiser="adam")
    # higher adds eps before the correction of the bias, torch after it.
    assert furthest(ours, plain) < 1e-6


@pytest.mark.parametrize("steps", STEPS)
def test_adams_meta_gradient_against_finite_differences(steps) -> None:
    problem = Problem("silu")
    options = {"steps": steps, "optimiser": "adam"}
    assert furthest(problem.meta_gradient(**options), difference_gradient(problem, 1e-5, **options)) < 1e-4


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("optimiser", ["sgd", "adam"])
@pytest.mark.parametrize("enabled", [True, False])
def test_memory_does_not_grow(order, optimiser, enabled) -> None:
    problem = Problem()

    def once() -> None:
        with torch.set_grad_enabled(enabled):
            adapted = problem.descended(steps=3, order=order, clip=0.2, optimiser=optimiser)
            if enabled:
                problem.loss(adapted, problem.query).backward()

    def alive() -> int:
        gc.collect()
        return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())

    once()
    before = alive()
    for _ in range(50):
        once()
    assert alive() == before


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"order": 3}, "order=3; required: 1"),
        ({"optimiser": "lbfgs"}, "'lbfgs'; required: sgd or adam"),
        ({"rates": {"0.weigth": 0.1}}, r"rates for \['0.weigth'\]; required: names among the 4"),
    ],
)
def test_refuses_what_it_cannot_do(options, says) -> None:
    problem = Problem()
    with pytest.raises(ValueError, match=says):
        descend(problem.objective, problem.start, **{"rates": problem.rates, "steps": 1} | options)
