"""Learners by name."""

from __future__ import annotations

from medmeta.learners.base import MetaLearner
from medmeta.learners.in_context import InContext
from medmeta.learners.memory import MemoryAugmented, MetaNetworks, Recurrent
from medmeta.learners.metric import Attentive, ImageDeformation, Matching, Prototypical, Relation, Siamese
from medmeta.learners.optimisation import ANIL, FOMAML, IMAML, MAML, MetaSGD, MetaTransfer, Reptile
from medmeta.learners.transfer import Linear, Scratch, Transfer
from medmeta.networks import SegNet

LEARNERS: dict[str, type[MetaLearner]] = {
    "maml": MAML,
    "fomaml": FOMAML,
    "anil": ANIL,
    "meta_sgd": MetaSGD,
    "reptile": Reptile,
    "imaml": IMAML,
    "meta_transfer": MetaTransfer,
    "prototypical": Prototypical,
    "matching": Matching,
    "siamese": Siamese,
    "relation": Relation,
    "attentive": Attentive,
    "image_deformation": ImageDeformation,
    "memory_augmented": MemoryAugmented,
    "meta_networks": MetaNetworks,
    "recurrent": Recurrent,
    "in_context": InContext,
    "transfer": Transfer,
    "linear": Linear,
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


__all__ = [
    "ANIL",
    "FOMAML",
    "IMAML",
    "LEARNERS",
    "MAML",
    "Attentive",
    "ImageDeformation",
    "InContext",
    "Linear",
    "Matching",
    "MemoryAugmented",
    "MetaLearner",
    "MetaNetworks",
    "MetaSGD",
    "MetaTransfer",
    "Prototypical",
    "Recurrent",
    "Relation",
    "Reptile",
    "Scratch",
    "Siamese",
    "Transfer",
    "build_learner",
]
