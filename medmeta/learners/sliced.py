"""A 3-D learner's network for slices: where they are thick, what lies above and below a slice says little of it."""

from __future__ import annotations

from medmeta.episode import Examples, State
from medmeta.learners.base import MetaLearner
from medmeta.networks import sliced


class Sliced(MetaLearner):
    """The 2-D counterpart of a learner: fine-tuning on slices sets out from its kernels, summed across them.

    Args:
        learner: of a network that `can_be_sliced`.
        across: the axis across the slices, 0 to 2.
    """

    name = "sliced"

    def __init__(self, learner: MetaLearner, across: int) -> None:
        super().__init__(sliced(learner.net, learner.start(1, 1), across))

    def adapt(self, support: Examples) -> State:
        raise ValueError("the learner's own rule on slices; required: fine-tuning, since that rule knows volumes alone")
