"""The inner loop: it knows no network, only an objective over named parameters. The one room that imports `higher`."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping

import higher
import torch
from torch import Tensor

Objective = Callable[[dict[str, Tensor]], Tensor]


def descend(
    objective: Objective,
    parameters: Mapping[str, Tensor],
    rates: Mapping[str, float | Tensor],
    steps: int,
    *,
    order: int = 2,
    clip: float | None = None,
    optimiser: str = "sgd",
) -> dict[str, Tensor]:
    """Gradient descent as a function: the end of the `path`, whose arguments and errors it has."""
    ends = path(objective, parameters, rates, steps, order=order, clip=clip, optimiser=optimiser)
    return deque(ends, maxlen=1).pop()


def path(
    objective: Objective,
    parameters: Mapping[str, Tensor],
    rates: Mapping[str, float | Tensor],
    steps: int,
    *,
    order: int = 2,
    clip: float | None = None,
    optimiser: str = "sgd",
) -> Iterator[dict[str, Tensor]]:
    """The parameters after 0, 1, .. `steps` steps of theta_{j+1} = theta_j - rate * grad L(theta_j).

    The ambient grad mode decides whether the results can be differentiated. With gradients enabled and `order` 2 they
    depend on `parameters` (and on tensor `rates`) through every step (MAML, Finn 2017, eq. 1). With `order` 1 the
    gradients of the steps count as constants: the Jacobian of the descent is the identity (FOMAML, Finn 2017, section
    5.2), that of a tensor rate under "sgd" minus the sum of the gradients, and under "adam" a rate has none. Without
    gradients the results are plain tensors that share no memory with `parameters`.

    Args:
        objective: named parameters -> scalar loss.
        parameters: the start.
        rates: step size of each parameter that moves; a parameter without a rate stays as it is.
        steps: number of steps, 0 or more; with 0 there is only the start.
        order: 1 or 2.
        clip: largest global norm of one step's gradient; None for no limit.
        optimiser: "sgd", the descent above, or "adam" (Kingma and Ba 2015), each step then scaled by the running
            moments of the gradient, as in the fine-tuning that follows at deployment. Its eps is 1e-8, and 1e-3 with
            `order` 2: a smaller one makes the derivative of a step badly conditioned.

    Raises:
        ValueError: `order` is not 1 or 2, the optimiser is unknown, or a rate names no parameter.
    """
    _check(parameters, rates, order, optimiser)
    meta = torch.is_grad_enabled()
    tracked = meta and order == 2
    moving = {name: parameters[name] for name in parameters if name in rates}
    fixed = {name: tensor for name, tensor in parameters.items() if name not in rates}
    if not meta:
        fixed = {name: tensor.detach().clone() for name, tensor in fixed.items()}
    # The path of a first-order descent must not keep the graph of parameters that do not move.
    still = fixed if tracked else {name: tensor.detach() for name, tensor in fixed.items()}
    if tracked:
        fast = [tensor if tensor.requires_grad else tensor.detach().requires_grad_() for tensor in moving.values()]
    else:
        fast = [tensor.detach().clone().requires_grad_() for tensor in moving.values()]
    # Deployment takes the same steps as meta-training, so their eps follows the order, not the grad mode.
    eps = 1e-3 if order == 2 else 1e-8
    # The rates that a first-order descent is to learn, and for each the sum of the gradients.
    learned: dict[str, Tensor] = {}
    if meta and order == 1 and optimiser == "sgd":
        learned = {name: rate for name, rate in rates.items() if isinstance(rate, Tensor) and rate.requires_grad}
    sums = {name: torch.zeros_like(moving[name]) for name in learned}

    def of_step(gradients: tuple[Tensor | None, ...]) -> list[Tensor | None]:
        clipped = list(gradients) if clip is None else _clipped(gradients, clip)
        for name, gradient in zip(moving, clipped, strict=True):
            if name in sums and gradient is not None:
                sums[name] = sums[name] + gradient
        return clipped

    def reached() -> dict[str, Tensor]:
        now = dict(zip(moving, fast, strict=True))
        if not tracked:
            now = {name: tensor.detach() for name, tensor in now.items()}
        if meta and order == 1:
            # Value of the adapted parameter, derivative of the start: the first-order meta-gradient.
            now = {name: moving[name] + (tensor - moving[name].detach()) for name, tensor in now.items()}
            now |= {name: now[name] - (rate - rate.detach()) * sums[name] for name, rate in learned.items()}
        return {**fixed, **now}

    yield reached()
    if not moving:
        yield from (reached() for _ in range(steps))
        return
    stepper = _differentiable(optimiser, [rates[name] for name in moving], eps, of_step, tracked)
    for _ in range(steps):
        # Never around a yield: the caller would go on with gradients enabled.
        with torch.enable_grad():
            loss = objective({**still, **dict(zip(moving, fast, strict=True))})
            fast = stepper.step(loss, params=fast)
        # Only what the results need outlives the step.
        del loss
        yield reached()


def _check(parameters: Mapping[str, Tensor], rates: Mapping[str, float | Tensor], order: int, optimiser: str) -> None:
    if order not in (1, 2):
        raise ValueError(f"order={order}; required: 1 (first order) or 2 (second order)")
    if optimiser not in ("sgd", "adam"):
        raise ValueError(f"optimiser {optimiser!r}; required: sgd or adam")
    unknown = sorted(set(rates) - set(parameters))
    if unknown:
        raise ValueError(f"rates for {unknown}; required: names among the {len(parameters)} parameters")


def _differentiable(
    optimiser: str, rates: list[float | Tensor], eps: float, of_step: Callable[..., list[Tensor | None]], tracked: bool
) -> higher.optim.DifferentiableOptimizer:
    # higher reads only the groups of this optimiser: one for each parameter, so that each has its own rate.
    references = [torch.zeros(1, requires_grad=True) for _ in rates]
    groups = [{"params": [reference]} for reference in references]
    if optimiser == "adam":
        plain: torch.optim.Optimizer = torch.optim.Adam(groups, lr=0.0, eps=eps)
    else:
        plain = torch.optim.SGD(groups, lr=0.0)
    return higher.optim.get_diff_optim(
        plain,
        references,
        override={"lr": list(rates)},
        grad_callback=of_step,
        track_higher_grads=tracked,
    )


def _clipped(gradients: tuple[Tensor | None, ...], largest: float) -> list[Tensor | None]:
    squares = [gradient.square().sum() for gradient in gradients if gradient is not None]
    if not squares:
        return list(gradients)
    # Within the root, whose derivative at zero is infinite: a support that is all ignored has no gradient.
    scale = (largest / (torch.stack(squares).sum() + 1e-24).sqrt()).clamp(max=1.0)
    return [None if gradient is None else gradient * scale for gradient in gradients]


def with_gradients(value: Tensor, parameters: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> Tensor:
    """The scalar `value`, with the given derivative with respect to each of `parameters` in the place of its own."""
    slope = torch.stack([(parameters[name] * gradients[name].detach()).sum() for name in gradients]).sum()
    return value.detach() + (slope - slope.detach())


def conjugate_gradient(
    product: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    right_side: Mapping[str, Tensor],
    iterations: int,
    tolerance: float = 1e-6,
) -> dict[str, Tensor]:
    """Solve A x = b by conjugate gradients (Hestenes and Stiefel 1952), for a symmetric A known by its products alone.

    Where A curves downward, or not at all, along a search direction, the last iterate before it is the answer: b itself
    if that is the first direction (Nocedal and Wright 2006, algorithm 7.1). So a network's Hessian need not be positive
    definite.

    Args:
        product: x -> A x, both with the names and shapes of `right_side`.
        right_side: b.
        iterations: products at most.
        tolerance: the residual that is small enough, relative to b.
    """
    solution = {name: torch.zeros_like(tensor) for name, tensor in right_side.items()}
    residual = direction = dict(right_side)
    square = first = _dot(residual, residual)
    for iteration in range(iterations):
        if square <= tolerance**2 * first:
            break
        turned = product(direction)
        curvature = _dot(direction, turned)
        if curvature <= 0:
            return solution if iteration else dict(right_side)
        length = square / curvature
        solution = {name: solution[name] + length * direction[name] for name in solution}
        residual = {name: residual[name] - length * turned[name] for name in solution}
        square, before = _dot(residual, residual), square
        direction = {name: residual[name] + square / before * direction[name] for name in solution}
    return solution


def _dot(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> Tensor:
    return torch.stack([(left[name] * right[name]).sum() for name in left]).sum()


def implicit_gradient(
    objective: Objective,
    parameters: Mapping[str, Tensor],
    gradient: Mapping[str, Tensor],
    strength: float,
    *,
    damping: float = 0.0,
    iterations: int = 5,
    tolerance: float = 1e-6,
) -> dict[str, Tensor]:
    """The meta-gradient through an argmin: ((1 + damping) I + H / strength)^-1 gradient (Rajeswaran 2019, eq. 6).

    Args:
        objective: L, of which H is the Hessian at `parameters`. It is never built, only multiplied with.
        parameters: the argmin of L(phi) + strength / 2 |phi - theta|^2 over phi.
        gradient: of the outer loss at `parameters`.
        strength: of the proximal term.
        damping: added to the identity, against a Hessian that is not positive definite.
        iterations: conjugate gradient steps at most, one Hessian-vector product each.
        tolerance: as of `conjugate_gradient`.

    Returns:
        The derivative of the outer loss with respect to theta; plain tensors.
    """
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in parameters.items()}
    with torch.enable_grad():
        slope = torch.autograd.grad(objective(leaves), list(leaves.values()), create_graph=True)

    def product(vector: dict[str, Tensor]) -> dict[str, Tensor]:
        curved = torch.autograd.grad(
            slope, list(leaves.values()), [vector[name] for name in leaves], retain_graph=True, materialize_grads=True
        )
        return {
            name: (1.0 + damping) * vector[name] + hessian / strength
            for name, hessian in zip(leaves, curved, strict=True)
        }

    return conjugate_gradient(product, gradient, iterations, tolerance)
