"""Learners by name."""

from __future__ import annotations

from medmeta.learners.base import MetaLearner
from medmeta.learners.optimisation import FOMAML, MAML
from medmeta.learners.transfer import Scratch, Transfer
from medmeta.networks import SegNet

LEARNERS: dict[str, type[MetaLearner]] = {
    "maml": MAML,
    "fomaml": FOMAML,
    "transfer": Transfer,
    "scratch": Scratch,
}


def build_learner(name: str, net: SegNet, **options: object) -> MetaLearner:
    """The learner `name` around `net`.

    Raises:
        ValueError: no such learner, or an option it does not take; the message lists what there is.
    """
    if name not in LEARNERS:
        raise ValueError(f"learner {name!r}; required: one of {sorted(LEARNERS)}")
    try:
        return LEARNERS[name](net, **options)
    except TypeError as error:
        takes = sorted(LEARNERS[name](net).options)
        raise ValueError(f"learner {name!r} with options {options} ({error}); required: among {takes}") from error


__all__ = ["FOMAML", "LEARNERS", "MAML", "MetaLearner", "Scratch", "Transfer", "build_learner"]
