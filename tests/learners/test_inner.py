"""The inner loop against an independent torch.func implementation and against finite differences, in float64."""

from __future__ import annotations

import gc
import math
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad

from medmeta.learners.inner import conjugate_gradient, descend, implicit_gradient, path, with_gradients

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

    def path_loss(self, **options) -> Tensor:
        """The sum of the query losses along the path, each weighted by its number."""
        states = path(self.objective, self.start, self.rates, **options)
        return sum(number * self.loss(state, self.query) for number, state in enumerate(states))

    def meta_gradient(self, **options) -> dict[str, Tensor]:
        """Of the query loss, with respect to the start and the rates (under their name and 'rate')."""
        return self.gradient(self.loss(self.descended(**options), self.query))

    def gradient(self, loss: Tensor) -> dict[str, Tensor]:
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


def descended_loss(problem: Problem, **options) -> Tensor:
    return problem.loss(problem.descended(**options), problem.query)


def difference_gradient(problem: Problem, width: float, loss=descended_loss, **options) -> dict[str, Tensor]:
    """Central differences of the query loss after the descent, one coordinate at a time."""

    @torch.no_grad()
    def query_loss() -> float:
        return float(loss(problem, **options))

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
        found = problem.meta_gradient(steps=steps, clip=clip, order=1)
        first = {name: found[name] for name in problem.start}
        second = reference_gradient(problem, steps, clip)
        assert furthest(first, {name: second[name] for name in first}) > 100 * 1e-5
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


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_losses_along_the_path(activation, clip) -> None:
    """Against torch.func and against finite differences."""
    problem = Problem(activation)

    def path_loss(start, rates) -> Tensor:
        states = (reference_descent(problem, start, rates, steps, clip) for steps in range(4))
        return sum(number * problem.loss(state, problem.query) for number, state in enumerate(states))

    of_start, of_rates = grad(path_loss, argnums=(0, 1))(detached(problem.start), detached(problem.rates))
    expected = of_start | {f"rate {name}": tensor for name, tensor in of_rates.items()}
    found = problem.gradient(problem.path_loss(steps=3, clip=clip))
    assert furthest(found, expected) < 1e-10
    differences = difference_gradient(problem, WIDTHS[activation], Problem.path_loss, steps=3, clip=clip)
    assert furthest(found, differences) < 1e-5


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("optimiser", ["sgd", "adam"])
@pytest.mark.parametrize("enabled", [True, False])
def test_the_path_goes_through_every_shorter_descent(order, optimiser, enabled) -> None:
    problem = Problem()
    options = {"order": order, "optimiser": optimiser}
    with torch.set_grad_enabled(enabled):
        passed = 0
        for steps, state in enumerate(path(problem.objective, problem.start, problem.rates, 3, **options)):
            assert torch.is_grad_enabled() == enabled
            assert furthest(state, problem.descended(steps=steps, **options)) == 0
            passed += 1
    assert passed == 4


@pytest.mark.parametrize("steps", [0, 2])
def test_without_gradients_nothing_is_shared_with_the_start(steps) -> None:
    problem = Problem()
    before = detached(problem.start)
    with torch.no_grad():
        for tensor in problem.descended(steps=steps).values():
            tensor.zero_()
    assert furthest(problem.start, before) == 0


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
    for name, rate in detached(problem.rates).items():
        sum_of_gradients = (problem.start[name].detach() - end[name]) / rate
        expected[f"rate {name}"] = -sum_of_gradients * expected[name]
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


def test_given_gradients_take_the_place_of_a_losss_own() -> None:
    problem = Problem()
    gradients = {name: torch.full_like(tensor, 0.5) for name, tensor in problem.start.items()}
    loss = problem.objective(problem.start)
    doubled = {name: 2.0 * tensor for name, tensor in problem.start.items()}
    made = with_gradients(loss, doubled, gradients)
    assert made == loss
    for found in torch.autograd.grad(made, list(problem.start.values())):
        assert (found == 1.0).all()


SHAPES = {"a": (3, 2), "b": (4,)}
SIZE = 10


def vector(seed: int) -> Tensor:
    return torch.randn(SIZE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def named(flat: Tensor) -> dict[str, Tensor]:
    return {"a": flat[:6].view(SHAPES["a"]), "b": flat[6:]}


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name].flatten() for name in SHAPES])


def matrix(seed: int, rank: int = SIZE) -> Tensor:
    """Symmetric, with eigenvalues of 1 to `rank` and else 0."""
    square = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    axes = torch.linalg.qr(square).Q[:, :rank]
    return axes @ torch.diag(torch.arange(1.0, rank + 1, dtype=torch.float64)) @ axes.T


class Product:
    """A matrix known by its products, which it counts."""

    def __init__(self, dense: Tensor) -> None:
        self.dense, self.count = dense, 0

    def __call__(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        self.count += 1
        return named(self.dense @ flat(tensors))


@pytest.mark.parametrize("seed", range(5))
def test_conjugate_gradient_against_a_dense_solve(seed) -> None:
    dense, right = matrix(seed), vector(seed + 10)
    found = conjugate_gradient(Product(dense), named(right), 2 * SIZE, 1e-12)
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == SHAPES
    torch.testing.assert_close(flat(found), torch.linalg.solve(dense, right), rtol=1e-9, atol=1e-9)


def test_conjugate_gradient_needs_as_many_products_as_there_are_eigenvalues() -> None:
    product = Product(3.0 * torch.eye(SIZE, dtype=torch.float64))
    found = conjugate_gradient(product, named(vector(1)), SIZE)
    torch.testing.assert_close(flat(found), vector(1) / 3.0)
    assert product.count == 1


@pytest.mark.parametrize("iterations", [1, 4])
def test_conjugate_gradient_stops_at_its_limit_nearer_than_before(iterations) -> None:
    """In the norm of A every step comes nearer."""
    dense, right, product = matrix(2), vector(3), Product(matrix(2))
    exact = torch.linalg.solve(dense, right)

    def distance(steps: int) -> float:
        error = flat(conjugate_gradient(Product(dense), named(right), steps)) - exact
        return float(error @ dense @ error)

    conjugate_gradient(product, named(right), iterations)
    assert product.count == iterations
    assert 0 < distance(iterations + 1) < distance(iterations) < distance(iterations - 1)


def test_conjugate_gradient_stops_where_it_is_good_enough() -> None:
    dense, right = matrix(4), vector(5)
    exact, loose = Product(dense), Product(dense)
    conjugate_gradient(exact, named(right), 50, 1e-10)
    found = flat(conjugate_gradient(loose, named(right), 50, 1e-2))
    assert loose.count < exact.count <= SIZE + 2
    assert (dense @ found - right).norm() <= 1e-2 * right.norm()


def test_conjugate_gradient_of_nothing_is_nothing() -> None:
    product = Product(matrix(0))
    found = conjugate_gradient(product, named(torch.zeros(SIZE, dtype=torch.float64)), 5)
    assert not flat(found).any()
    assert product.count == 0


def test_conjugate_gradient_on_a_singular_system_finds_the_shortest_solution() -> None:
    dense = matrix(6, rank=4)
    right = dense @ vector(7)
    found = flat(conjugate_gradient(Product(dense), named(right), SIZE, 1e-10))
    torch.testing.assert_close(found, torch.linalg.pinv(dense) @ right, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("scale", [0.0, -1.0])
def test_conjugate_gradient_without_curvature_gives_the_right_side(scale) -> None:
    found = flat(conjugate_gradient(Product(scale * matrix(0)), named(vector(1)), 5))
    assert torch.equal(found, vector(1))


def test_conjugate_gradient_stops_before_a_direction_that_curves_downward() -> None:
    diagonal = torch.ones(SIZE, dtype=torch.float64)
    diagonal[0] = -1.0
    right = torch.ones(SIZE, dtype=torch.float64)
    right[0] = 0.1
    found = flat(conjugate_gradient(Product(torch.diag(diagonal)), named(right), 5))
    torch.testing.assert_close(found, right * (9.01 / 8.99), rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("strength", [0.3, 2.0])
def test_implicit_gradient_of_a_quadratic(strength) -> None:
    """argmin of x Q x / 2 - c x + strength / 2 |x - theta|^2 has a closed form, and so has what the outer loss sees."""
    dense, linear, target = matrix(1), vector(2), vector(3)
    regular = dense + strength * torch.eye(SIZE, dtype=torch.float64)

    def argmin(theta: Tensor) -> Tensor:
        return torch.linalg.solve(regular, linear + strength * theta)

    def outer(theta: Tensor) -> Tensor:
        return (argmin(theta) - target).pow(4).sum()

    def objective(parameters: dict[str, Tensor]) -> Tensor:
        point = flat(parameters)
        return 0.5 * point @ dense @ point - linear @ point

    end = argmin(vector(4))
    gradient = named(4.0 * (end - target) ** 3)
    with torch.no_grad():
        found = implicit_gradient(objective, named(end), gradient, strength, iterations=20, tolerance=1e-12)
    assert not any(tensor.requires_grad for tensor in found.values())
    torch.testing.assert_close(flat(found), grad(outer)(vector(4)), rtol=1e-8, atol=1e-8)


def test_damping_is_added_to_the_identity() -> None:
    dense = matrix(1)
    found = implicit_gradient(
        lambda parameters: 0.5 * flat(parameters) @ dense @ flat(parameters),
        named(vector(2)),
        named(vector(3)),
        0.5,
        damping=0.7,
        iterations=20,
        tolerance=1e-12,
    )
    system = 1.7 * torch.eye(SIZE, dtype=torch.float64) + dense / 0.5
    torch.testing.assert_close(flat(found), torch.linalg.solve(system, vector(3)), rtol=1e-8, atol=1e-8)


def test_implicit_gradient_where_nothing_curves_is_the_gradient() -> None:
    found = implicit_gradient(
        lambda parameters: 0.0 * flat(parameters).pow(2).sum(), named(vector(1)), named(vector(2)), 1.0
    )
    torch.testing.assert_close(flat(found), vector(2))
