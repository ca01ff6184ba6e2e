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
    """

    name: str

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
        """Logits (N, 1+K, *S) of images (N, C, *S) under what was learned."""
        return self.net(image, state)

    def start(self, channels: int, classes: int) -> State:
        """The parameters from which gradient fine-tuning on a new task sets out."""
        return self.net.grow(channels, classes)

    def query_logits(self, episode: Episode) -> Tensor:
        """Logits (N, 1+K, *S) of the query, after learning from the support alone."""
        return self.segment(episode.query.image, self.adapt(episode.support))

    def meta_loss(self, episode: Episode) -> Tensor:
        """A scalar whose gradient is the meta-gradient."""
        return dice_cross_entropy(self.query_logits(episode), episode.query.mask)
