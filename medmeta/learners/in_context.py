"""A network that segments in context: support and query go through it together. Nothing is fitted to a task."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from medmeta.episode import IGNORED, Examples, State
from medmeta.learners.base import MetaLearner
from medmeta.learners.pooling import lower_absent, wide
from medmeta.networks import SegNet, seeded


class InContext(MetaLearner):
    """In-context segmentation in the manner of UniverSeg (Butoi, Ortiz, Ma, Sabuncu, Guttag and Dalca, ICCV 2023).

    adapt:   keeps the features of the support and its masks, at half the resolution
    recall:  logit_k = network(query, support with the mask of class k), the logit of background is 0

    The network is UniverSeg's encoder-decoder of cross-blocks (see `CrossNetwork`) and binary, as in the paper: every
    class is a problem of its own with weights shared by all. The softmax over 0 and the logits of the classes joins
    them; with one class it is the paper's sigmoid. The paper reads images of 128 x 128 and a mask; here the features of
    the body take the place of the images, a third input says which voxels of the support count, and a last 1x1
    convolution joins what was found at half the resolution with the full features of the query. Where a query has
    another size, the support is resized to it.

    A class uses at most `examples` of the support: those with most of its voxels, of equals those with the smaller
    features. Their order is nothing to the network.

    Args:
        net: the network.
        width: channels of a cross-block.
        levels: resolutions, each half of the one before.
        examples: of the support at most, for each class.
    """

    name = "in_context"

    def __init__(self, net: SegNet, *, width: int = 16, levels: int = 3, examples: int = 6) -> None:
        super().__init__(net)
        if min(width, levels, examples) < 1:
            raise ValueError(f"width={width}, levels={levels}, examples={examples}; required: at least 1 of each")
        self.width, self.levels, self.examples = width, levels, examples
        with seeded(0):
            self.network = CrossNetwork(net.spatial_dims, net.features, width, levels)

    @property
    def options(self) -> dict[str, object]:
        return {"width": self.width, "levels": self.levels, "examples": self.examples}

    def adapt(self, support: Examples) -> State:
        features = wide(self.features(support.image))
        counted = (support.mask != IGNORED).unsqueeze(1).to(features.dtype)
        one_hot = functional.one_hot(support.mask.clamp(min=0), support.classes + 1).movedim(-1, 1) * counted
        voxels = one_hot.flatten(2).sum(2).T
        kept = counted.flatten(1).any(1).nonzero().flatten()
        content = (features * counted).flatten(1).mean(1)[kept].argsort(stable=True)
        # The richest examples of each class; sorting twice leaves the order of content among equals.
        richest = voxels[1:, kept[content]].argsort(dim=1, descending=True, stable=True)[:, : self.examples]
        used, chosen = kept[content][richest].unique(return_inverse=True)
        return {
            "features": _half(features * counted)[used],
            "masks": _half(one_hot)[used],
            "chosen": chosen,
            "present": (voxels > 0).any(1).to(features.dtype),
        }

    def recall(self, image: Tensor, state: State) -> Tensor:
        features = wide(self.features(image))
        query = _half(features)
        size = query.shape[2:]
        shown, masks = _resized(state["features"], size), _resized(state["masks"], size)
        counted = masks.sum(1, keepdim=True)
        logits = [features.new_zeros(features.shape[0], *features.shape[2:])]
        for label, chosen in enumerate(state["chosen"], start=1):
            support = torch.cat([shown, masks[:, label : label + 1], counted], dim=1)[chosen]
            logits.append(wide(self.network(features, query, support)).squeeze(1))
        return lower_absent(torch.stack(logits, dim=-1), state["present"]).movedim(-1, 1)


class CrossNetwork(nn.Module):
    """Encoder and decoder of cross-blocks, for one binary problem (Butoi 2023, section 3.2).

    Args:
        axes: 2 or 3.
        features: F, of the body.
        width: channels of every block.
        levels: resolutions.
    """

    def __init__(self, axes: int, features: int, width: int, levels: int) -> None:
        super().__init__()
        inputs = [(features, features + 2), *[(width, width)] * (levels - 1)]
        # The support that the last block would hand on meets nobody.
        self.encoders = nn.ModuleList(
            CrossBlock(axes, *pair, width, last=levels == number == 1) for number, pair in enumerate(inputs, start=1)
        )
        self.decoders = nn.ModuleList(
            CrossBlock(axes, 2 * width, 2 * width, width, last=number == levels - 1) for number in range(1, levels)
        )
        self.output = nn.Sequential(
            _convolution(axes, width + features, width, 1), nn.LeakyReLU(), _convolution(axes, width, 1, 1)
        )

    def forward(self, features: Tensor, query: Tensor, support: Tensor) -> Tensor:
        """Logits (N, 1, *S).

        Args:
            features: (N, F, *S) of the query.
            query: (N, F, *H), the same at half the resolution.
            support: (M, F+2, *H): features, mask of the class, mask of the voxels that count.
        """
        support = support.unsqueeze(0)
        levels: list[tuple[Tensor, Tensor]] = []
        for encoder in self.encoders:
            if levels:
                query, support = _half_max(query), _each(_half_max, support)
            query, support = encoder(query, support)
            levels.append((query, support))
        levels.pop()
        for decoder in self.decoders:
            query_skip, support_skip = levels.pop()
            resized = partial(_resized, size=query_skip.shape[2:])
            query = torch.cat([resized(query), query_skip], dim=1)
            support = torch.cat([_each(resized, support), support_skip], dim=2)
            query, support = decoder(query, support)
        return self.output(torch.cat([_resized(query, features.shape[2:]), features], dim=1))


class CrossBlock(nn.Module):
    """Interaction of a query with a support (Butoi 2023, section 3.2), A a leaky rectifier:

        z_i = A(CrossConv(u, v_i));  u' = A(Conv(mean_i z_i));  v'_i = A(Conv(z_i))

    Args:
        axes: 2 or 3.
        query: channels of u.
        support: channels of v_i.
        width: channels of all that comes out.
        last: v' is not needed and is z.
    """

    def __init__(self, axes: int, query: int, support: int, width: int, *, last: bool = False) -> None:
        super().__init__()
        self.cross = _convolution(axes, query + support, width, 3)
        self.query = _convolution(axes, width, width, 3)
        self.support = nn.Identity() if last else _convolution(axes, width, width, 3)

    def forward(self, query: Tensor, support: Tensor) -> tuple[Tensor, Tensor]:
        """u' (N, width, *S) and v' (N, M, width, *S) of u (N, Cu, *S) and V (N or 1, M, Cv, *S)."""
        joined = functional.leaky_relu(cross_convolution(query, support, self.cross))
        # Not `mean`: nothing comes from a support of no examples.
        query = self.query(joined.sum(1) / max(1, joined.shape[1]))
        return functional.leaky_relu(query), functional.leaky_relu(_each(self.support, joined))


def cross_convolution(query: Tensor, support: Tensor, convolution: nn.Conv2d | nn.Conv3d) -> Tensor:
    """The convolution of the query joined with each example of the support (Butoi 2023, section 3.2).

    A convolution is linear in its channels: the query's part is computed once for all examples, and the support's once
    for all queries.

    Args:
        query: u, (N, Cu, *S).
        support: V, (N, M, Cv, *S), or (1, M, Cv, *S) for a support that is the same for all queries.
        convolution: of Cu + Cv channels.

    Returns:
        (N, M, width, *S).
    """
    convolve = functional.conv2d if query.ndim == 4 else functional.conv3d
    channels = query.shape[1]
    own = convolve(query, convolution.weight[:, :channels], convolution.bias, padding=convolution.padding)
    weight = convolution.weight[:, channels:]
    other = _each(lambda examples: convolve(examples, weight, padding=convolution.padding), support)
    return own.unsqueeze(1) + other


def _convolution(axes: int, inputs: int, outputs: int, kernel: int) -> nn.Conv2d | nn.Conv3d:
    convolution = (nn.Conv2d if axes == 2 else nn.Conv3d)(inputs, outputs, kernel, padding=kernel // 2)
    # There is no norm between the blocks: the scale of the activations has to last through all of them.
    nn.init.kaiming_normal_(convolution.weight, a=0.01)
    nn.init.zeros_(convolution.get_parameter("bias"))
    return convolution


def _each(function: Callable[[Tensor], Tensor], support: Tensor) -> Tensor:
    """`function` of the images in a support (N, M, C, *S)."""
    return function(support.flatten(0, 1)).unflatten(0, support.shape[:2])


def _half(image: Tensor) -> Tensor:
    """Means over two voxels along each axis, over up to three where their number is odd."""
    pool = functional.adaptive_avg_pool2d if image.ndim == 4 else functional.adaptive_avg_pool3d
    return pool(image, _half_size(image))  # type: ignore[arg-type]  # torch takes any sequence


def _half_max(image: Tensor) -> Tensor:
    pool = functional.adaptive_max_pool2d if image.ndim == 4 else functional.adaptive_max_pool3d
    return pool(image, _half_size(image))


def _half_size(image: Tensor) -> list[int]:
    return [math.ceil(length / 2) for length in image.shape[2:]]


def _resized(image: Tensor, size: Sequence[int]) -> Tensor:
    if image.shape[2:] == size:
        return image
    return functional.interpolate(image, size=tuple(size), mode="bilinear" if image.ndim == 4 else "trilinear")
