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
        steps: number of steps, 0 or more.
        order: 1 or 2.
        clip: largest global norm of one step's gradient; None for no limit.

    Raises:
        ValueError: `order` is not 1 or 2, or a rate names no parameter.
    """
    if order not in (1, 2):
        raise ValueError(f"order={order}; required: 1 (first order) or 2 (second order)")
    unknown = sorted(set(rates) - set(parameters))
    if unknown:
        raise ValueError(f"rates for {unknown}; required: names among the {len(parameters)} parameters")
    meta = torch.is_grad_enabled()
    tracked = meta and order == 2
    moving = {name: parameters[name] for name in parameters if name in rates}
    fixed = {name: tensor for name, tensor in parameters.items() if name not in rates}
    if tracked:
        fast = [tensor if tensor.requires_grad else tensor.detach().requires_grad_() for tensor in moving.values()]
    else:
        fast = [tensor.detach().clone().requires_grad_() for tensor in moving.values()]
        # The path of a first-order descent must not keep the graph of parameters that do not move.
        frozen = {name: tensor.detach() for name, tensor in fixed.items()}
    optimiser = _differentiable_sgd([rates[name] for name in moving], clip, tracked)
    with torch.enable_grad():
        for _ in range(steps):
            loss = objective({**(fixed if tracked else frozen), **dict(zip(moving, fast, strict=True))})
            fast = optimiser.step(loss, params=fast)
    if tracked:
        return {**fixed, **dict(zip(moving, fast, strict=True))}
    adapted = {name: tensor.detach() for name, tensor in zip(moving, fast, strict=True)}
    if not meta:
        return {**frozen, **adapted}
    # Value of the adapted parameter, derivative of the start: the first-order meta-gradient.
    return {**fixed, **{name: moving[name] + (adapted[name] - moving[name].detach()) for name in adapted}}


def _differentiable_sgd(
    rates: list[float | Tensor], clip: float | None, tracked: bool
) -> higher.optim.DifferentiableSGD:
    # higher reads only the group structure of this optimiser: one group for each parameter, so that each has its rate.
    references = [torch.zeros(1, requires_grad=True) for _ in rates]
    plain = torch.optim.SGD([{"params": [reference]} for reference in references], lr=0.0)
    return higher.optim.DifferentiableSGD(
        plain,
        references,
        override={"lr": list(rates)},
        grad_callback=None if clip is None else lambda gradients: _clipped(gradients, clip),
        track_higher_grads=tracked,
    )


def _clipped(gradients: tuple[Tensor | None, ...], largest: float) -> list[Tensor | None]:
    norm = torch.stack([gradient.square().sum() for gradient in gradients if gradient is not None]).sum().sqrt()
    scale = (largest / (norm + 1e-12)).clamp(max=1.0)
    return [None if gradient is None else gradient * scale for gradient in gradients]
