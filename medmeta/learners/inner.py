"""The inner loop: it knows no network, only an objective over named parameters. The one room that imports `higher`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

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
    """Gradient descent as a function: theta_{j+1} = theta_j - rate * grad L(theta_j), `steps` times.

    The ambient grad mode decides whether the result can be differentiated. With gradients enabled and `order` 2 the
    result depends on `parameters` (and on tensor `rates`) through every step (MAML, Finn 2017, eq. 1). With `order` 1
    the Jacobian of the descent is taken as the identity (FOMAML, Finn 2017, section 5.2). Without gradients the result
    holds plain tensors.

    Args:
        objective: named parameters -> scalar loss.
        parameters: the start.
        rates: step size of each parameter that moves; a parameter without a rate stays as it is.
        steps: number of steps, 0 or more; with 0 the result is the start.
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
    # The path of a first-order descent must not keep the graph of parameters that do not move.
    still = fixed if tracked else {name: tensor.detach() for name, tensor in fixed.items()}
    if not moving:
        return fixed if meta else still
    if tracked:
        fast = [tensor if tensor.requires_grad else tensor.detach().requires_grad_() for tensor in moving.values()]
    else:
        fast = [tensor.detach().clone().requires_grad_() for tensor in moving.values()]
    # Deployment takes the same steps as meta-training, so their eps follows the order, not the grad mode.
    eps = 1e-3 if order == 2 else 1e-8
    stepper = _differentiable(optimiser, [rates[name] for name in moving], eps, clip, tracked)
    with torch.enable_grad():
        for _ in range(steps):
            loss = objective({**still, **dict(zip(moving, fast, strict=True))})
            fast = stepper.step(loss, params=fast)
    if tracked:
        return {**still, **dict(zip(moving, fast, strict=True))}
    adapted = {name: tensor.detach() for name, tensor in zip(moving, fast, strict=True)}
    if not meta:
        return {**still, **adapted}
    # Value of the adapted parameter, derivative of the start: the first-order meta-gradient.
    return {**fixed, **{name: moving[name] + (adapted[name] - moving[name].detach()) for name in adapted}}


def _check(parameters: Mapping[str, Tensor], rates: Mapping[str, float | Tensor], order: int, optimiser: str) -> None:
    if order not in (1, 2):
        raise ValueError(f"order={order}; required: 1 (first order) or 2 (second order)")
    if optimiser not in ("sgd", "adam"):
        raise ValueError(f"optimiser {optimiser!r}; required: sgd or adam")
    unknown = sorted(set(rates) - set(parameters))
    if unknown:
        raise ValueError(f"rates for {unknown}; required: names among the {len(parameters)} parameters")


def _differentiable(
    optimiser: str, rates: list[float | Tensor], eps: float, clip: float | None, tracked: bool
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
        grad_callback=None if clip is None else lambda gradients: _clipped(gradients, clip),
        track_higher_grads=tracked,
    )


def _clipped(gradients: tuple[Tensor | None, ...], largest: float) -> list[Tensor | None]:
    squares = [gradient.square().sum() for gradient in gradients if gradient is not None]
    if not squares:
        return list(gradients)
    # Within the root, whose derivative at zero is infinite: a support that is all ignored has no gradient.
    scale = (largest / (torch.stack(squares).sum() + 1e-24).sqrt()).clamp(max=1.0)
    return [None if gradient is None else gradient * scale for gradient in gradients]
