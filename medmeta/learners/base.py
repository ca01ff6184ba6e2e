"""What every method of learning from a few scans looks like from outside."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from medmeta.episode import Episode, Examples, State
from medmeta.losses import dice_cross_entropy
from medmeta.networks import SegNet


class MetaLearner(nn.Module, ABC):
    """Learns across tasks how to learn one task from a few examples.

    The ambient grad mode says whether a meta-gradient is wanted: `adapt` under `torch.no_grad()` is deployment.

    Args:
        net: the network whose parameters are meta-learned.

    Attributes:
        name: its key in `medmeta.learners.LEARNERS`.
        sequential: whether the order of the support matters, by the method's definition.
        pretrained: whether it needs a body that was trained before.
    """

    name: str
    sequential = False
    pretrained = False

    def __init__(self, net: SegNet) -> None:
        super().__init__()
        self.net = net

    @property
    def options(self) -> dict[str, object]:
        """The JSON-able arguments, beside the network, that build this learner again."""
        return {}

    @abstractmethod
    def adapt(self, support: Examples) -> State:
        """What the learner's own rule learns from `support`. Changes nothing in the learner."""

    def segment(self, image: Tensor, state: State) -> Tensor:
        """Logits (N, 1+K, *S) of images (N, C, *S) under what was learned.

        A state that holds the parameters of the network, as gradient descent leaves it, is run by the network, whatever
        the method; any other is what `adapt` kept, and `recall` knows how to use it.
        """
        return self.net(image, state) if self.net.input_weight in state else self.recall(image, state)

    def recall(self, image: Tensor, state: State) -> Tensor:
        """Logits (N, 1+K, *S) from a state that holds something other than the parameters of the network."""
        raise ValueError(f"a state of {sorted(state)}; required: every parameter of the network")

    def features(self, image: Tensor) -> Tensor:
        """Features (N, F, *S) of images (N, C, *S) under the meta-learned body, for any number of channels."""
        return self.net.embed(image, self.net.grow(image.shape[1], 1))

    def start(self, channels: int, classes: int) -> State:
        """The parameters from which gradient fine-tuning on a new task sets out."""
        return self.net.grow(channels, classes)

    def query_logits(self, episode: Episode) -> Tensor:
        """Logits (N, 1+K, *S) of the query, after learning from the support alone."""
        return self.segment(episode.query.image, self.adapt(episode.support))

    def meta_loss(self, episode: Episode) -> Tensor:
        """A scalar whose gradient is the meta-gradient."""
        return dice_cross_entropy(self.query_logits(episode), episode.query.mask)
