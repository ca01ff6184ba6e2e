"""Optimisation-based meta-learners: a start from which a few gradient steps go far."""

from __future__ import annotations

from copy import deepcopy
from itertools import cycle
from typing import Any

import torch
from torch import Tensor, nn

from medmeta.episode import Episode, Examples, State
from medmeta.learners.base import MetaLearner
from medmeta.learners.inner import Objective, descend, implicit_gradient, path, with_gradients
from medmeta.losses import dice_cross_entropy
from medmeta.networks import SegNet


class MAML(MetaLearner):
    """Model-agnostic meta-learning (Finn, Abbeel and Levine, ICML 2017).

    adapt:      theta' = theta - rate * grad L_support(theta), `inner_steps` times (eq. 1)
    meta_loss:  L_query(theta'), differentiated through the steps (algorithm 1, line 8)

    The foreground rows of the output convolution start equal, from one learned row, so that an episode may have any
    number of classes in any order (UNICORN-MAML, Ye and Chao, ICLR 2022).

    Args:
        net: the network.
        inner_steps: gradient steps on the support.
        inner_rate: their step size.
        order: 2 differentiates through the steps; 1 is FOMAML, which takes their Jacobian as the identity.
        clip: largest global norm of an inner gradient, None for no limit.
        inner_optimiser: "sgd" as in the paper, or "adam", the optimiser of the fine-tuning at deployment.
        multi_step: the share, 0 to 1, of the meta-loss that is spread evenly over the query losses after each step; the
            rest lies on the last step. 0 is plain MAML; 1 is where the multi-step loss of MAML++ (Antoniou, Edwards and
            Storkey, ICLR 2019, section 4, eq. 3) begins. Its annealing is a sequence of training phases with
            falling shares.
    """

    name = "maml"
    head_only = False
    """Whether the inner loop moves the output convolution alone."""

    def __init__(
        self,
        net: SegNet,
        *,
        inner_steps: int = 3,
        inner_rate: float = 0.05,
        order: int = 2,
        clip: float | None = 10.0,
        inner_optimiser: str = "sgd",
        multi_step: float = 0.0,
    ) -> None:
        super().__init__(net)
        if inner_steps < 1 or inner_rate <= 0 or order not in (1, 2) or inner_optimiser not in ("sgd", "adam"):
            raise ValueError(
                f"inner_steps={inner_steps}, inner_rate={inner_rate}, order={order}, inner_optimiser="
                f"{inner_optimiser!r}; required: at least 1 step, a positive rate, order 1 or 2, sgd or adam"
            )
        if not 0 <= multi_step <= 1:
            raise ValueError(f"multi_step={multi_step}; required: a share of 0 to 1")
        self.inner_steps, self.inner_rate, self.order, self.clip = inner_steps, inner_rate, order, clip
        self.inner_optimiser, self.multi_step = inner_optimiser, multi_step

    @property
    def options(self) -> dict[str, object]:
        return {
            "inner_steps": self.inner_steps,
            "inner_rate": self.inner_rate,
            "order": self.order,
            "clip": self.clip,
            "inner_optimiser": self.inner_optimiser,
            "multi_step": self.multi_step,
        }

    def objective(self, support: Examples, start: State) -> Objective:
        """What the inner loop descends from `start`."""
        if not self.head_only:
            return lambda parameters: dice_cross_entropy(self.net(support.image, parameters), support.mask)
        if self.order == 1 or not torch.is_grad_enabled():
            start = {name: tensor.detach() for name, tensor in start.items()}
        features = self.net.embed(support.image, start)
        return lambda parameters: dice_cross_entropy(self.net.classify(features, parameters), support.mask)

    def rates(self, start: State) -> dict[str, float | Tensor]:
        """The step size of each parameter that the inner loop moves."""
        return dict.fromkeys(self.net.head_names if self.head_only else start, self.inner_rate)

    def adapt(self, support: Examples) -> State:
        return descend(**self._descent(support))

    def meta_loss(self, episode: Episode) -> Tensor:
        weights = [self.multi_step / self.inner_steps] * self.inner_steps
        weights[-1] += 1.0 - self.multi_step
        states = path(**self._descent(episode.support))
        losses = [
            weight * dice_cross_entropy(self.segment(episode.query.image, state), episode.query.mask)
            for weight, state in zip([0.0, *weights], states, strict=True)
            if weight
        ]
        return torch.stack(losses).sum()

    def _descent(self, support: Examples) -> dict[str, Any]:
        start = self.start(support.channels, support.classes)
        return {
            "objective": self.objective(support, start),
            "parameters": start,
            "rates": self.rates(start),
            "steps": self.inner_steps,
            "order": self.order,
            "clip": self.clip,
            "optimiser": self.inner_optimiser,
        }


class FOMAML(MAML):
    """First-order MAML (Finn 2017, section 5.2): MAML with `order=1`, under its own name."""

    name = "fomaml"

    def __init__(
        self,
        net: SegNet,
        *,
        inner_steps: int = 3,
        inner_rate: float = 0.05,
        clip: float | None = 10.0,
        inner_optimiser: str = "sgd",
        multi_step: float = 0.0,
    ) -> None:
        super().__init__(
            net,
            inner_steps=inner_steps,
            inner_rate=inner_rate,
            order=1,
            clip=clip,
            inner_optimiser=inner_optimiser,
            multi_step=multi_step,
        )

    @property
    def options(self) -> dict[str, object]:
        return _without(super().options, "order")


class ANIL(MAML):
    """Almost no inner loop (Raghu, Raghu, Bengio and Vinyals, ICLR 2020, section 4): MAML whose steps move the head.

    The body is meta-learned through the features, of the support (second order only) and of the query; those of the
    support are computed once. Arguments as of `MAML`.
    """

    name = "anil"
    head_only = True


class MetaSGD(MAML):
    """Meta-SGD (Li, Zhou, Chen and Li, 2017).

    adapt:      theta' = theta - alpha o grad L_support(theta) (eq. 2), with a learned rate for each element of theta
    meta_loss:  L_query(theta'), differentiated with respect to theta and alpha (eq. 3 and algorithm 1)

    A rate may become negative. Rates grow as the parameters do: those of the input weight repeat over the channels,
    those of the foreground row over the classes.

    Args:
        net: the network.
        inner_steps: gradient steps on the support; 1 in the paper.
        inner_rate: what every rate starts from.
        order, clip, multi_step: as of `MAML`. With `order` 1 the gradients of the steps count as constants.
    """

    name = "meta_sgd"

    def __init__(
        self,
        net: SegNet,
        *,
        inner_steps: int = 1,
        inner_rate: float = 0.05,
        order: int = 2,
        clip: float | None = 10.0,
        multi_step: float = 0.0,
    ) -> None:
        super().__init__(
            net, inner_steps=inner_steps, inner_rate=inner_rate, order=order, clip=clip, multi_step=multi_step
        )
        # Named, shaped and grown like the network, and never run.
        self.alpha = deepcopy(net)
        for rate in self.alpha.parameters():
            nn.init.constant_(rate, inner_rate)

    @property
    def options(self) -> dict[str, object]:
        return _without(super().options, "inner_optimiser")

    def rates(self, start: State) -> dict[str, float | Tensor]:
        weight, head = start[self.net.input_weight], start[self.net.head_names[0]]
        grown = self.alpha.grow(weight.shape[1], len(head) - 1)
        # A weight is divided among the channels, a rate is not.
        return {**grown, self.net.input_weight: self.alpha.get_parameter(self.net.input_weight).expand_as(weight)}


class Reptile(MAML):
    """Reptile (Nichol, Achiam and Schulman, 2018).

    adapt:          theta~ = k gradient steps on the support from theta
    meta-gradient:  theta - theta~ after k steps on serial minibatches (algorithm 1, and section 3 on k > 1)

    The minibatches are support and query in turn: the expected meta-gradient then holds the inner product of their
    gradients, what a step on the one does for the other (section 5.1). `meta_loss` has the mean loss of the steps for
    its value.

    Args:
        net: the network.
        inner_steps: k, at least 2; an even number gives support and query the same weight.
        inner_rate: their step size.
        clip: largest global norm of an inner gradient, None for no limit.
        inner_optimiser: "sgd" or "adam".
    """

    name = "reptile"

    def __init__(
        self,
        net: SegNet,
        *,
        inner_steps: int = 4,
        inner_rate: float = 0.05,
        clip: float | None = 10.0,
        inner_optimiser: str = "sgd",
    ) -> None:
        super().__init__(
            net, inner_steps=inner_steps, inner_rate=inner_rate, order=1, clip=clip, inner_optimiser=inner_optimiser
        )
        if inner_steps < 2:
            raise ValueError(
                f"inner_steps={inner_steps}; required: at least 2 (with one step Reptile is training on all tasks)"
            )

    @property
    def options(self) -> dict[str, object]:
        return _without(super().options, "order", "multi_step")

    def meta_loss(self, episode: Episode) -> Tensor:
        descent = self._descent(episode.support)
        start = descent["parameters"]
        turns = cycle([descent["objective"], self.objective(episode.query, start)])
        losses = []

        def minibatch(parameters: State) -> Tensor:
            loss = next(turns)(parameters)
            losses.append(loss.detach())
            return loss

        with torch.no_grad():
            end = descend(**descent | {"objective": minibatch})
        gradients = {name: tensor.detach() - end[name] for name, tensor in start.items()}
        return with_gradients(torch.stack(losses).mean(), start, gradients)


class IMAML(MAML):
    """MAML with implicit gradients (Rajeswaran, Finn, Kakade and Levine, NeurIPS 2019).

    adapt:          phi = argmin L_support(phi) + strength / 2 |phi - theta|^2, approached by gradient steps (eq. 3)
    meta-gradient:  (I + H / strength)^-1 grad L_query(phi), with H the Hessian of L_support at phi (eq. 6), solved by
                    conjugate gradients on Hessian-vector products (algorithm 2)

    Nothing of the steps is kept, so there may be many of them. The meta-gradient is right as far as they have reached
    the argmin.

    Args:
        net: the network.
        inner_steps: gradient steps towards the argmin.
        inner_rate: their step size.
        clip: largest global norm of an inner gradient, None for no limit.
        inner_optimiser: "sgd" or "adam".
        strength: lambda, what holds phi near theta.
        conjugate_steps: Hessian-vector products at most.
        damping: added to the identity in eq. 6, for a support loss that curves downward too much.
    """

    name = "imaml"

    def __init__(
        self,
        net: SegNet,
        *,
        inner_steps: int = 10,
        inner_rate: float = 0.05,
        clip: float | None = 10.0,
        inner_optimiser: str = "sgd",
        strength: float = 2.0,
        conjugate_steps: int = 5,
        damping: float = 0.0,
    ) -> None:
        super().__init__(
            net, inner_steps=inner_steps, inner_rate=inner_rate, order=1, clip=clip, inner_optimiser=inner_optimiser
        )
        if strength <= 0 or conjugate_steps < 1 or damping < 0:
            raise ValueError(
                f"strength={strength}, conjugate_steps={conjugate_steps}, damping={damping}; required: a positive "
                "strength, at least 1 conjugate step, no negative damping"
            )
        self.strength, self.conjugate_steps, self.damping = strength, conjugate_steps, damping

    @property
    def options(self) -> dict[str, object]:
        own = {"strength": self.strength, "conjugate_steps": self.conjugate_steps, "damping": self.damping}
        return _without(super().options, "order", "multi_step") | own

    def objective(self, support: Examples, start: State) -> Objective:
        loss = super().objective(support, start)
        centre = {name: tensor.detach() for name, tensor in start.items()}

        def proximal(parameters: State) -> Tensor:
            squares = [(parameters[name] - tensor).square().sum() for name, tensor in centre.items()]
            return loss(parameters) + 0.5 * self.strength * torch.stack(squares).sum()

        return proximal

    def meta_loss(self, episode: Episode) -> Tensor:
        descent = self._descent(episode.support)
        start, query = descent["parameters"], episode.query
        with torch.no_grad():
            end = descend(**descent)
        leaves = {name: tensor.requires_grad_() for name, tensor in end.items()}
        with torch.enable_grad():
            loss = dice_cross_entropy(self.segment(query.image, leaves), query.mask)
            found = torch.autograd.grad(loss, list(leaves.values()))
        gradients = implicit_gradient(
            super().objective(episode.support, start),
            leaves,
            dict(zip(leaves, found, strict=True)),
            self.strength,
            damping=self.damping,
            iterations=self.conjugate_steps,
        )
        return with_gradients(loss, start, gradients)


class MetaTransfer(MAML):
    """Meta-transfer learning (Sun, Liu, Chua and Schiele, CVPR 2019).

    The body was trained before and stays frozen; what is meta-learned is how to scale and shift it, and the head:
    SS(X; W, b) = (W o scale) X + (b + shift) (eq. 6), one scale for each kernel of a convolution (a number for each
    output and input), one shift for each bias, those of norms too. Of weights without a bias the norm that follows is
    shifted. The inner loop moves the head alone (eq. 3), and its features are computed once.

    Args:
        net: the network, with a body that was trained before.
        options: as of `MAML`.
    """

    name = "meta_transfer"
    head_only = True
    pretrained = True

    def __init__(self, net: SegNet, **options: Any) -> None:
        super().__init__(net, **options)
        self.scales, self.shifts = nn.ParameterDict(), nn.ParameterDict()
        for name in net.body_names:
            tensor = net.get_parameter(name).detach()
            if tensor.ndim > 1:
                self.scales[_key(name)] = tensor.new_ones(*tensor.shape[:2], *[1] * (tensor.ndim - 2))
            elif name.endswith("bias"):
                self.shifts[_key(name)] = torch.zeros_like(tensor)

    def start(self, channels: int, classes: int) -> State:
        """The scaled and shifted body with the grown head, as parameters of the network."""
        start = self.net.grow(channels, classes)
        for name in self.net.body_names:
            key, frozen = _key(name), start[name].detach()
            if key in self.scales:
                frozen = frozen * self.scales[key]
            elif key in self.shifts:
                frozen = frozen + self.shifts[key]
            start[name] = frozen
        return start


def _key(name: str) -> str:
    # A dot would split the name of a parameter.
    return name.replace(".", "/")


def _without(options: dict[str, object], *names: str) -> dict[str, object]:
    return {name: value for name, value in options.items() if name not in names}
