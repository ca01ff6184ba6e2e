"""Metric-based meta-learners: a space of features in which voxels of a class lie together. Nothing is fitted to a task.

The head of the network is not used. Background is one more class.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from medmeta.episode import Examples, State
from medmeta.learners.base import MetaLearner
from medmeta.learners.pooling import (
    average_cells,
    cell_means,
    class_keys,
    class_means,
    score_by_class,
    score_by_voxel,
)
from medmeta.networks import SegNet, seeded


class Prototypical(MetaLearner):
    """Prototypical networks (Snell, Swersky and Zemel, NeurIPS 2017), with local prototypes as in ALPNet.

    adapt:   c_k = mean of f(x) over the class's voxels (eq. 1; masked average pooling, Wang et al., PANet, ICCV 2019),
             and the same within each cell of a grid that the class covers (Ouyang et al., ALPNet, ECCV 2020)
    recall:  s_i = scale * cos(f(x), c_i);  logit_k = sum_i softmax(s)_i s_i over the prototypes i of class k (ALPNet);
             the softmax over k that follows is eq. 2

    Cosine in place of Snell's Euclidean distance is the choice of both segmentation papers. With `cells` 1 each class
    has one prototype, as in Snell's paper.

    Args:
        net: the network.
        cells: of the grid along each axis.
        coverage: share of a cell that a class must cover for a prototype of its own there.
        scale: factor of the cosine.
    """

    name = "prototypical"

    def __init__(self, net: SegNet, *, cells: int = 4, coverage: float = 0.5, scale: float = 20.0) -> None:
        super().__init__(net)
        _require_cells(cells, coverage)
        _require_scale(scale)
        self.cells, self.coverage, self.scale = cells, coverage, scale

    @property
    def options(self) -> dict[str, object]:
        return {"cells": self.cells, "coverage": self.coverage, "scale": self.scale}

    def adapt(self, support: Examples) -> State:
        return class_keys(self.features(support.image), support, self.cells, self.coverage)

    def recall(self, image: Tensor, state: State) -> Tensor:
        return score_by_class(self._score, self.features(image), state)

    def _score(self, points: Tensor, prototypes: Tensor) -> Tensor:
        similarity = self.scale * _cosine(points, prototypes)
        return (similarity.softmax(dim=1) * similarity).sum(dim=1)


class Matching(MetaLearner):
    """Matching networks (Vinyals et al., NeurIPS 2016).

    adapt:   pairs (x_i, y_i): the mean feature of a class's voxels in one cell of a grid over the support images, and
             the class. A pair stands for its voxels, n_i in number
    recall:  P(k | x) = sum_i a_i y_ik (eq. 1), a_i = n_i exp(scale * cos(f(x), x_i)) / sum_j n_j exp(..), the softmax
             over all voxels of the support (section 2.1.1); logit_k = log P(k | x), up to what all classes share

    Background keeps the mass of its voxels, as a prior: giving every class an equal say was no better on phantoms, and
    one soft label for a whole cell, which mixes an organ with what surrounds it, much worse. The full-context
    embeddings (an LSTM over the support) are left out: with them the order of the support would matter.

    Args:
        net: the network.
        cells: of the grid along each axis.
        scale: factor of the cosine to start from; it is learned.
    """

    name = "matching"

    def __init__(self, net: SegNet, *, cells: int = 4, scale: float = 20.0) -> None:
        super().__init__(net)
        _require_cells(cells)
        _require_scale(scale)
        self.cells, self.scale = cells, scale
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)))

    @property
    def options(self) -> dict[str, object]:
        return {"cells": self.cells, "scale": self.scale}

    def adapt(self, support: Examples) -> State:
        means, coverage = cell_means(self.features(support.image), support, self.cells)
        shown = coverage > 0
        one_hot = functional.one_hot(shown.nonzero()[:, 0], len(coverage))
        return {"keys": means[shown], "labels": one_hot * coverage[shown].unsqueeze(1)}

    def recall(self, image: Tensor, state: State) -> Tensor:
        keys, labels = state["keys"], state["labels"]

        def score(points: Tensor) -> Tensor:
            attention = (self.log_scale.exp() * _cosine(points, keys)).softmax(dim=1)
            return (attention @ labels).clamp(min=torch.finfo(labels.dtype).tiny).log()

        return score_by_voxel(score, self.features(image), labels.any(dim=0), entries=len(keys))


class Siamese(MetaLearner):
    """Siamese networks (Koch, Zemel and Salakhutdinov, ICML deep learning workshop 2015).

    adapt:   the features of the class and of its cells, embedded by the twin (keys, as in `Prototypical`)
    recall:  p_i = sigmoid(b - sum_j alpha_j |f(x)_j - c_ij|), the probability that voxel and key show the same class
             (section 3.1); logit_k = log of the mean of p_i over the keys i of class k

    The mean lets no class win by the number of its keys. alpha_j is kept positive, so that a difference always speaks
    against sameness; the sum then is an L1 distance, of which no (voxel, key, feature) need be stored. The paper's
    cross entropy of single pairs gives way to the loss of all learners: a voxel has one class.

    Args:
        net: the network.
        cells: of the grid along each axis.
        coverage: share of a cell that a class must cover for a key of its own there.
    """

    name = "siamese"

    def __init__(self, net: SegNet, *, cells: int = 4, coverage: float = 0.5) -> None:
        super().__init__(net)
        _require_cells(cells, coverage)
        self.cells, self.coverage = cells, coverage
        # Features have about unit variance: a distance of about 10 for voxels that have nothing in common.
        self.log_weights = nn.Parameter(torch.full((net.features,), math.log(10.0 / net.features)))
        self.bias = nn.Parameter(torch.tensor(5.0))

    @property
    def options(self) -> dict[str, object]:
        return {"cells": self.cells, "coverage": self.coverage}

    def adapt(self, support: Examples) -> State:
        return class_keys(self.features(support.image), support, self.cells, self.coverage)

    def recall(self, image: Tensor, state: State) -> Tensor:
        return score_by_class(self._score, self.features(image), state)

    def _score(self, points: Tensor, keys: Tensor) -> Tensor:
        weights = self.log_weights.exp()
        pairs = functional.logsigmoid(self.bias - torch.cdist(points * weights, keys * weights, p=1.0))
        return pairs.logsumexp(dim=1) - math.log(max(1, len(keys)))


class Relation(MetaLearner):
    """Relation networks (Sung et al., CVPR 2018).

    adapt:   one prototype for each class, the mean feature of its voxels
    recall:  r_k = g([f(x), c_k]) (eq. 1), g a learned module of 1x1 convolutions with shared weights for all classes;
             logit_k = r_k

    g has a hidden layer with rectifiers. Its first map is the sum of one of f(x) and one of c_k, which is a map of both
    together. It starts as a distance, r_k = -sum_j relu(w_j^T (f(x) - c_k)) with random w_j: from random weights for
    voxel and class apart, training begins with background everywhere and is slow to leave it. The paper regresses r_k
    to 1 or 0 (MSE); here the classes of a voxel exclude each other and an organ is rare, so that cross entropy and Dice
    over the r_k take its place.

    Args:
        net: the network.
        hidden: channels of the relation module.
    """

    name = "relation"

    def __init__(self, net: SegNet, *, hidden: int = 32) -> None:
        super().__init__(net)
        _require_hidden(hidden)
        self.hidden = hidden
        with seeded(0):
            self.of_voxel = nn.Linear(net.features, hidden)
            self.of_class = nn.Linear(net.features, hidden, bias=False)
            # A bias here would be the same for all classes.
            self.relate = nn.Linear(hidden, 1, bias=False)
        with torch.no_grad():
            self.of_voxel.bias.zero_()
            self.of_class.weight.copy_(-self.of_voxel.weight)
            self.relate.weight.fill_(-1.0)

    @property
    def options(self) -> dict[str, object]:
        return {"hidden": self.hidden}

    def adapt(self, support: Examples) -> State:
        prototypes, present = class_means(self.features(support.image), support)
        return {"prototypes": prototypes, "present": present}

    def recall(self, image: Tensor, state: State) -> Tensor:
        prototypes, present = state["prototypes"], state["present"]

        def score(points: Tensor) -> Tensor:
            pairs = self.of_voxel(points).unsqueeze(1) + self.of_class(prototypes)
            return self.relate(pairs.relu()).squeeze(2)

        return score_by_voxel(score, self.features(image), present, entries=self.hidden * len(present))


class Attentive(MetaLearner):
    """Attentive prototypes in the manner of TapNet (Zhang, Gao, Lin and Lu, AAAI 2020).

    adapt:   c_k = sum_i a_i h_i over the cells i of a grid over every support image that show the class, h_i the mean
             feature of its voxels there, a = softmax over i of w^T tanh(V h_i) + log(coverage_i)
    recall:  logit_k = -|f(x) - c_k|^2

    TapNet learns w and V for every class; here they are shared, because the number of a class means nothing in the
    next episode. The coverage makes w = 0 the mean over the class's voxels.

    Args:
        net: the network.
        cells: of the grid along each axis.
        hidden: rows of V.
    """

    name = "attentive"

    def __init__(self, net: SegNet, *, cells: int = 4, hidden: int = 16) -> None:
        super().__init__(net)
        _require_cells(cells)
        _require_hidden(hidden)
        self.cells, self.hidden = cells, hidden
        with seeded(0):
            self.attention = nn.Sequential(
                nn.Linear(net.features, hidden, bias=False), nn.Tanh(), nn.Linear(hidden, 1, bias=False)
            )

    @property
    def options(self) -> dict[str, object]:
        return {"cells": self.cells, "hidden": self.hidden}

    def adapt(self, support: Examples) -> State:
        means, coverage = cell_means(self.features(support.image), support, self.cells)
        with torch.autocast(means.device.type, enabled=False):
            shown = coverage.clamp(min=torch.finfo(coverage.dtype).tiny).log()
            weights = (self.attention(means).squeeze(2) + shown).softmax(dim=1)
        return {
            "prototypes": (weights.unsqueeze(2) * means).sum(dim=1),
            "present": coverage.any(dim=1).to(coverage.dtype),
        }

    def recall(self, image: Tensor, state: State) -> Tensor:
        prototypes = state["prototypes"]

        def score(points: Tensor) -> Tensor:
            return -(points.unsqueeze(1) - prototypes).square().sum(dim=2)

        return score_by_voxel(score, self.features(image), state["present"], entries=prototypes.numel())


class ImageDeformation(Prototypical):
    """Image-deformation meta-network for one-shot episodes (Chen, Fu, Wang, Ma, Liu and Hebert, CVPR 2019).

    adapt:   every support image (probe) meets every gallery image, patch by patch of a 3 x 3 (x 3) grid:
             synthesised = w * probe + (1 - w) * gallery, w in each patch from a learned network that sees both
             (section 4); it keeps the mask of the probe. Prototypes from support and synthesised images together
    recall:  as `Prototypical`

    No patient's image may travel in a model, so the gallery holds smooth random textures of unit variance, the same
    for every channel, drawn anew for the size of the images from a fixed seed. The features that the deformation
    network sees are those of the body, averaged over each patch; it has shared weights for all patches, so that any
    size will do, and starts at w of about 0.8.

    Args:
        net: the network.
        cells, coverage, scale: as in `Prototypical`.
        gallery: number of textures.
        hidden: channels of the deformation network.
    """

    name = "image_deformation"

    def __init__(
        self,
        net: SegNet,
        *,
        cells: int = 4,
        coverage: float = 0.5,
        scale: float = 20.0,
        gallery: int = 3,
        hidden: int = 32,
    ) -> None:
        super().__init__(net, cells=cells, coverage=coverage, scale=scale)
        _require_hidden(hidden)
        if gallery < 1:
            raise ValueError(f"gallery={gallery}; required: at least one texture")
        self.gallery, self.hidden = gallery, hidden
        with seeded(0):
            inner, outer = nn.Linear(2 * net.features, hidden), nn.Linear(hidden, 1)
            nn.init.constant_(outer.bias, math.log(0.8 / 0.2))
            self.deform = nn.Sequential(inner, nn.ReLU(), outer)

    @property
    def options(self) -> dict[str, object]:
        return super().options | {"gallery": self.gallery, "hidden": self.hidden}

    def adapt(self, support: Examples) -> State:
        probe = self.features(support.image)
        fused = [self.features(image) for image in self.synthesise(support.image, probe)]
        # All versions of an image have its mask: the mean of their features pools to what all of them together do.
        return class_keys(torch.stack([probe, *fused]).mean(dim=0), support, self.cells, self.coverage)

    def synthesise(self, image: Tensor, features: Tensor) -> Iterator[Tensor]:
        """Images (N, C, *S) fused with one gallery image after the other; `features` are those of the images."""
        probe = average_cells(features, _PATCHES)
        for texture in textures(self.gallery, image.shape[2:]).to(image).split(1):
            other = average_cells(self.features(texture), _PATCHES).expand_as(probe)
            both = torch.cat([probe, other], dim=1).movedim(1, -1)
            weight = self.deform(both).movedim(-1, 1).sigmoid()
            weight = functional.interpolate(weight, size=image.shape[2:])
            yield weight * image + (1 - weight) * texture


_PATCHES = 3


def textures(count: int, size: Sequence[int]) -> Tensor:
    """Smooth random fields (count, 1, *size) of zero mean and unit variance, double; always the same ones."""
    generator = torch.Generator().manual_seed(0)
    mode = "bilinear" if len(size) == 2 else "trilinear"
    fields = torch.zeros(count, 1, *size, dtype=torch.float64)
    for nodes in (2, 4, 8):
        noise = torch.randn(count, 1, *[nodes] * len(size), generator=generator, dtype=torch.float64)
        fields += functional.interpolate(noise, size=tuple(size), mode=mode, align_corners=True)
    axes = list(range(1, fields.ndim))
    centred = fields - fields.mean(axes, keepdim=True)
    return centred / centred.square().mean(axes, keepdim=True).sqrt().clamp(min=1e-6)


def _cosine(points: Tensor, keys: Tensor) -> Tensor:
    """Cosine (Q, P) of points (Q, F) and keys (P, F)."""
    # A feature that rectifiers left at zero would have a gradient of 1e12 with the smaller default.
    return functional.normalize(points, eps=1e-3) @ functional.normalize(keys, eps=1e-3).T


def _require_scale(scale: float) -> None:
    if scale <= 0:
        raise ValueError(f"scale={scale}; required: a positive factor")


def _require_hidden(hidden: int) -> None:
    if hidden < 1:
        raise ValueError(f"hidden={hidden}; required: at least one channel")


def _require_cells(cells: int, coverage: float = 1.0) -> None:
    if cells < 1 or not 0 < coverage <= 1:
        raise ValueError(f"cells={cells}, coverage={coverage}; required: at least 1 cell, 0 < coverage <= 1")
