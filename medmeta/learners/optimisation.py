"""Optimisation-based meta-learners: a start from which a few gradient steps go far."""

from __future__ import annotations

from torch import Tensor

from medmeta.episode import Examples, State
from medmeta.learners.base import MetaLearner
from medmeta.learners.inner import descend
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
    """

    name = "maml"

    def __init__(
        self,
        net: SegNet,
        *,
        inner_steps: int = 3,
        inner_rate: float = 0.05,
        order: int = 2,
        clip: float | None = 10.0,
        inner_optimiser: str = "sgd",
    ) -> None:
        super().__init__(net)
        if inner_steps < 1 or inner_rate <= 0 or order not in (1, 2) or inner_optimiser not in ("sgd", "adam"):
            raise ValueError(
                f"inner_steps={inner_steps}, inner_rate={inner_rate}, order={order}, inner_optimiser="
                f"{inner_optimiser!r}; required: at least 1 step, a positive rate, order 1 or 2, sgd or adam"
            )
        self.inner_steps, self.inner_rate, self.order, self.clip = inner_steps, inner_rate, order, clip
        self.inner_optimiser = inner_optimiser

    @property
    def options(self) -> dict[str, object]:
        return {
            "inner_steps": self.inner_steps,
            "inner_rate": self.inner_rate,
            "order": self.order,
            "clip": self.clip,
            "inner_optimiser": self.inner_optimiser,
        }

    def adapt(self, support: Examples) -> State:
        start = self.start(support.channels, support.classes)

        def objective(parameters: dict[str, Tensor]) -> Tensor:
            return dice_cross_entropy(self.net(support.image, parameters), support.mask)

        rates = dict.fromkeys(start, self.inner_rate)
        return descend(
            objective,
            start,
            rates,
            self.inner_steps,
            order=self.order,
            clip=self.clip,
            optimiser=self.inner_optimiser,
        )


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
    ) -> None:
        super().__init__(
            net, inner_steps=inner_steps, inner_rate=inner_rate, order=1, clip=clip, inner_optimiser=inner_optimiser
        )

    @property
    def options(self) -> dict[str, object]:
        return {key: value for key, value in super().options.items() if key != "order"}
