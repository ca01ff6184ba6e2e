"""Segmentation networks fit for episodes: built for one image channel and one class, grown to any number.

A learner holds one `SegNet` with its meta-parameters. `SegNet.grow` gives the parameters with which a task of C
channels and K classes starts; `SegNet.forward(image, parameters)` runs the network on those, adapted or not.
"""

from __future__ import annotations

import inspect
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from operator import attrgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

__all__ = [
    "NETWORKS",
    "SegNet",
    "assert_adaptable",
    "build_network",
    "can_be_sliced",
    "scse_unet_2d",
    "se_unet",
    "seeded",
    "sliced",
]


class SegNet(nn.Module):
    """A body that makes features and a 1x1 head that makes logits; both can run on parameters given from outside.

    Args:
        body: maps (N, 1, *S) to features (N, F, *S), for S a multiple of `stride` along every axis.
        head: 1x1 convolution from F features to 2 logits: background, foreground.
        input_weight: name, within the body, of the weight (F0, 1, *k) that first meets the image.
        stride: total downsampling of the body along each axis.

    Attributes:
        spatial_dims: 2 or 3, the number of axes in S.
        across: axis, 0 to 2, across which a 2-D network takes the slices of a volume: the last, unless it was `sliced`.
        features: F.
        input_weight: name of the input convolution's weight among the parameters of the net.
        head_names, body_names: names of the parameters of either part.
        spec: {"name", "options"}, JSON-able; `build_network(spec["name"], **spec["options"])` builds the same again.

    Raises:
        ValueError: head, input convolution or a module of the net does not fit (see `assert_adaptable`).
    """

    def __init__(self, body: nn.Module, head: nn.Conv2d | nn.Conv3d, *, input_weight: str, stride: int) -> None:
        super().__init__()
        if head.out_channels != 2 or head.bias is None or set(head.kernel_size) != {1}:
            raise ValueError(f"head {head}; required: a 1x1 convolution with bias to 2 logits (background, foreground)")
        self.body, self.head = body, head
        self.stride, self.spatial_dims, self.features = stride, len(head.kernel_size), head.in_channels
        self.across = 2
        self.input_weight = f"body.{input_weight}"
        shapes = {name: tuple(parameter.shape) for name, parameter in self.named_parameters()}
        self.head_names = tuple(name for name in shapes if name.startswith("head."))
        self.body_names = tuple(name for name in shapes if name.startswith("body."))
        self.spec: dict[str, Any] = {}
        shape = shapes.get(self.input_weight, ())
        if len(shape) != self.spatial_dims + 2 or shape[1] != 1:
            raise ValueError(f"input weight {input_weight!r}; required: a parameter of the body of shape (F, 1, *k)")
        assert_adaptable(self)

    def grow(self, channels: int, classes: int) -> dict[str, Tensor]:
        """The parameters a task starts from, differentiable with respect to those of the net.

        The input weight is spread evenly over the channels: C identical channels give the response of one. Every class
        starts from the one foreground vector, so the start does not depend on the order of the classes (UNICORN-MAML,
        Ye & Chao 2022, "How to train your MAML to excel in few-shot classification").

        Args:
            channels: C, image channels of the task.
            classes: K, foreground classes of the task.

        Returns:
            Every named parameter of the net. Those that need no growing are the net's own: never write into them.

        Raises:
            ValueError: channels or classes below 1.
        """
        if channels < 1 or classes < 1:
            raise ValueError(f"channels={channels}, classes={classes}; required: at least one of each")
        parameters: dict[str, Tensor] = dict(self.named_parameters())
        weight = parameters[self.input_weight]
        parameters[self.input_weight] = weight.repeat(1, channels, *[1] * self.spatial_dims) / channels
        for name in self.head_names:
            background, foreground = parameters[name].split(1)
            parameters[name] = torch.cat([background, *[foreground] * classes])
        return parameters

    def forward(self, image: Tensor, parameters: Mapping[str, Tensor] | None = None) -> Tensor:
        """Logits (N, 1+K, *S) of an image (N, C, *S) of any size.

        Args:
            image: (N, C, *S) float.
            parameters: as `grow` gives them, adapted or not; entries that are not parameters of the net are ignored.
                None: the net as built, one channel and one class.

        Raises:
            ValueError: the image has other axes or channels than required, or a parameter is missing.
        """
        return self.classify(self.embed(image, parameters), parameters)

    def classify(self, features: Tensor, parameters: Mapping[str, Tensor] | None = None) -> Tensor:
        """Logits (N, 1+K, *S) of features (N, F, *S): the head alone, which needs only its own parameters."""
        if parameters is None:
            return self.head(features)
        return functional_call(self.head, _part(parameters, self.head_names), (features,))

    def embed(self, image: Tensor, parameters: Mapping[str, Tensor] | None = None) -> Tensor:
        """Features (N, F, *S) of an image (N, C, *S): what the head sees. Arguments and errors as in `forward`."""
        self._check(image, parameters)
        size = image.shape[2:]
        steps = [math.ceil(length / self.stride) for length in size]
        if math.prod(steps) == 1:
            # Instance normalisation has nothing to normalise over where the bottleneck is a single voxel.
            steps = [2] * len(steps)
        margins = [step * self.stride - length for step, length in zip(steps, size, strict=True)]
        if any(margins):
            image = F.pad(image, [side for margin in reversed(margins) for side in (0, margin)], mode="replicate")
        if parameters is None:
            features = self.body(image)
        else:
            features = functional_call(self.body, _part(parameters, self.body_names), (image,))
        return features[(..., *(slice(length) for length in size))] if any(margins) else features

    def _check(self, image: Tensor, parameters: Mapping[str, Tensor] | None) -> None:
        if image.ndim != self.spatial_dims + 2 or not all(image.shape[2:]):
            raise ValueError(
                f"image {tuple(image.shape)}; required: (N, C, *S) with {self.spatial_dims} axes of at least one voxel "
                f"in S. Add the missing axes, or build a {5 - self.spatial_dims}-D network."
            )
        missing = set() if parameters is None else {*self.body_names, *self.head_names} - parameters.keys()
        if missing:
            raise ValueError(
                f"parameters without {sorted(missing)[0]!r} ({len(missing)} missing); required: every parameter of the "
                "net. Start from SegNet.grow(channels, classes) and keep its names."
            )
        weight = attrgetter(self.input_weight)(self) if parameters is None else parameters[self.input_weight]
        if image.shape[1] != weight.shape[1]:
            raise ValueError(
                f"image with {image.shape[1]} channels; required: {weight.shape[1]}, as the parameters have. "
                f"Grow them: SegNet.grow(channels={image.shape[1]}, classes=K)."
            )


def _part(parameters: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    return {name.split(".", 1)[1]: parameters[name] for name in names}


def assert_adaptable(net: nn.Module) -> None:
    """Refuse what goes silently wrong when one network runs on many sets of parameters.

    BatchNorm, or any norm with running statistics, carries state from one task into the next. A parameter or buffer
    reachable under two names is only half replaced by `torch.func.functional_call`.

    Raises:
        ValueError: naming the module, what is required and the remedy.
    """
    for name, module in net.named_modules():
        of_a_batch = isinstance(module, nn.modules.batchnorm._BatchNorm)
        if of_a_batch or getattr(module, "running_mean", None) is not None:
            raise ValueError(
                f"module {name!r} is {type(module).__name__}, with statistics of a batch or of a run; required: a norm "
                "of each example by itself. Use InstanceNorm(affine=True) or GroupNorm."
            )
    names: dict[int, list[str]] = defaultdict(list)
    for tensors in (net.named_parameters, net.named_buffers):
        for name, tensor in tensors(remove_duplicate=False):
            names[id(tensor)].append(name)
    shared = next((same for same in names.values() if len(same) > 1), None)
    if shared:
        raise ValueError(
            f"{shared[0]!r} and {shared[1]!r} are one tensor; required: every parameter and buffer under one name. "
            "Register the module once, or give each place its own copy."
        )


def _require(fits: bool, option: str, given: object, required: str) -> None:
    if not fits:
        raise ValueError(f"{option}={given!r}; required: {required}")


def _is_counts(values: object, least: int) -> bool:
    return isinstance(values, Sequence) and all(type(value) is int and value >= least for value in values)


def _require_dropout_and_norm(dropout: object, norm: object) -> None:
    _require(isinstance(dropout, int | float) and 0 <= dropout < 1, "dropout", dropout, "0 <= dropout < 1")
    _require(norm in ("instance", "group"), "norm", norm, "one of instance, group")


_ACTIVATIONS = {"leakyrelu": ("leakyrelu", {"negative_slope": 0.01, "inplace": False}), "silu": ("swish", {})}


def _groups(channels: int) -> int:
    """Number of groups of 8 channels, or of the largest power of two that divides them where 8 does not."""
    return channels // math.gcd(channels, 8)


class _SEUNet(nn.Module):
    """Residual U-Net with squeeze and excitation after every residual unit: (N, 1, *S) to (N, channels[0], *S)."""

    def __init__(
        self, dimensions: int, channels: Sequence[int], se_ratio: int, dropout: float, norm: str, activation: str
    ) -> None:
        from monai.networks.blocks import Convolution, ResidualSELayer, ResidualUnit

        super().__init__()
        act = _ACTIVATIONS[activation]

        def conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Module:
            padding = (kernel - 1) // 2
            return Convolution(dimensions, inputs, outputs, stride, kernel, padding=padding, conv_only=True)

        def level(inputs: int, outputs: int, convolutions: int) -> nn.Module:
            groups = {"num_groups": _groups(outputs)} if norm == "group" else {}
            normal = (norm, {"affine": True, **groups})
            drop = dropout or None
            unit = ResidualUnit(
                dimensions,
                inputs,
                outputs,
                subunits=convolutions,
                act=act,
                norm=normal,
                dropout=drop,
                dropout_dim=dimensions,
                bias=False,
            )
            # MONAI's own ReLU excites without bound and can die for a channel; the sigmoid is the paper's.
            excite = ResidualSELayer(
                dimensions, outputs, min(se_ratio, outputs), acti_type_1=act, acti_type_2="sigmoid"
            )
            return nn.Sequential(unit, excite)

        steps = list(pairwise(channels))
        self.stem = conv(1, channels[0], 3)
        self.encoders = nn.ModuleList(level(width, width, 2) for width in channels)
        self.downs = nn.ModuleList(conv(fine, coarse, 2, stride=2) for fine, coarse in steps)
        # Projecting before upsampling, nearest neighbours and one convolution a level: cheap to differentiate twice.
        self.ups = nn.ModuleList(
            nn.Sequential(conv(coarse, fine, 1), nn.Upsample(scale_factor=2)) for fine, coarse in steps
        )
        self.decoders = nn.ModuleList(level(2 * fine, fine, 1) for fine, _ in steps)

    def forward(self, image: Tensor) -> Tensor:
        # No slices: a ModuleList that `higher` has patched cannot make another of its kind.
        first, *encoders = self.encoders
        features = [first(self.stem(image))]
        for down, encoder in zip(self.downs, encoders, strict=True):
            features.append(encoder(down(features[-1])))
        decoded = features.pop()
        for up, decoder in zip(reversed(self.ups), reversed(self.decoders), strict=True):
            decoded = decoder(torch.cat([up(decoded), features.pop()], dim=1))
        return decoded


def se_unet(
    dimensions: int,
    *,
    channels: Sequence[int] = (16, 32, 64, 96),
    se_ratio: int = 8,
    dropout: float = 0.0,
    norm: str = "instance",
    activation: str = "leakyrelu",
) -> SegNet:
    """Residual SE-U-Net on MONAI's blocks: `se_unet_3d`, and `se_unet_2d` for slices.

    Args:
        dimensions: 2 or 3.
        channels: width of each level, finest first; as many levels as numbers, each at half the resolution.
        se_ratio: the squeeze: hidden units of a level are its channels divided by this, at least one.
        dropout: probability to drop a channel after each norm, in training mode.
        norm: "instance" or "group" (groups of 8 channels), affine.
        activation: "leakyrelu" (slope 0.01) or "silu".

    Raises:
        ValueError: an option has another value than required.
    """
    _require(_is_counts(channels, 1) and len(channels) > 0, "channels", channels, "one or more positive integers")
    _require(type(se_ratio) is int and se_ratio >= 1, "se_ratio", se_ratio, "a positive integer")
    _require_dropout_and_norm(dropout, norm)
    _require(activation in _ACTIVATIONS, "activation", activation, f"one of {', '.join(_ACTIVATIONS)}")
    body = _SEUNet(dimensions, channels, se_ratio, dropout, norm, activation)
    head = (nn.Conv3d if dimensions == 3 else nn.Conv2d)(channels[0], 2, kernel_size=1)
    return SegNet(body, head, input_weight="stem.conv.weight", stride=2 ** (len(channels) - 1))


def can_be_sliced(net: SegNet) -> bool:
    """Whether `sliced` knows the network."""
    return net.spec.get("name") == "se_unet_3d" and net.stride > 1


def sliced(net: SegNet, parameters: Mapping[str, Tensor], across: int) -> SegNet:
    """The 2-D network that makes of a slice what a 3-D SE-U-Net makes of a volume that is this slice all over.

    Args:
        net: a 3-D SE-U-Net (`can_be_sliced`).
        parameters: as `net.grow(1, 1)` gives them, trained or not.
        across: the axis that goes, 0 to 2: every kernel is summed along it.
    """
    flat = build_network("se_unet_2d", seed=0, **net.spec["options"])
    flat.across = across
    given = {name: parameters[name].detach() for name in flat.state_dict()}
    flat.load_state_dict({name: each.sum(2 + across) if each.ndim == 5 else each for name, each in given.items()})
    return flat


class _EncoderDecoder(nn.Module):
    """Encoder and decoder of a segmentation-models-pytorch U-Net without its head."""

    def __init__(self, encoder: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder

    def forward(self, image: Tensor) -> Tensor:
        return self.decoder(self.encoder(image))


def scse_unet_2d(
    *,
    encoder_name: str = "resnet18",
    encoder_depth: int = 5,
    decoder_channels: Sequence[int] | None = None,
    dropout: float = 0.0,
    norm: str = "instance",
) -> SegNet:
    """2-D U-Net with scSE attention in its decoder, from segmentation-models-pytorch; never with downloaded weights.

    Args:
        encoder_name: an encoder of segmentation-models-pytorch ("resnet18", "se_resnet50", ...).
        encoder_depth: number of halvings, 1..5; some encoders begin at 3.
        decoder_channels: width of each decoder level, coarsest first, one for each halving, each at least 16.
            None: the last `encoder_depth` of 256, 128, 64, 32, 16.
        dropout: probability to drop a channel after each level of the decoder, in training mode.
        norm: "instance" or "group" (groups of 8 channels), affine; takes the place of every BatchNorm.

    Raises:
        ValueError: an option has another value than required, or the encoder does not take one channel.
    """
    import segmentation_models_pytorch as smp

    names = smp.encoders.get_encoder_names()
    _require(encoder_name in names, "encoder_name", encoder_name, f"one of {', '.join(names)}")
    _require(type(encoder_depth) is int and 1 <= encoder_depth <= 5, "encoder_depth", encoder_depth, "1 to 5")
    widths = (256, 128, 64, 32, 16)[-encoder_depth:] if decoder_channels is None else decoder_channels
    # scSE squeezes by 16: a narrower level would be squeezed to nothing, without an error.
    fits = _is_counts(widths, 16) and len(widths) == encoder_depth
    _require(fits, "decoder_channels", decoder_channels, f"{encoder_depth} integers, each at least 16")
    _require_dropout_and_norm(dropout, norm)
    unet = smp.Unet(
        encoder_name,
        encoder_depth=encoder_depth,
        encoder_weights=None,
        decoder_use_norm={"type": "instancenorm", "affine": True},
        decoder_channels=widths,
        decoder_attention_type="scse",
        in_channels=1,
    )
    body = _EncoderDecoder(unet.encoder, unet.decoder)
    _make_adaptable(body, norm)
    all_used = _drop_idle(body, size=2 ** (encoder_depth + 2))
    _require(all_used, "encoder_name", encoder_name, f"an encoder that uses all it computes at depth {encoder_depth}")
    for block in unet.decoder.blocks:
        block.conv2.append(nn.Dropout2d(dropout))
    inputs = [name for name, module in body.encoder.named_modules() if getattr(module, "in_channels", 0) == 1]
    _require(len(inputs) == 1, "encoder_name", encoder_name, "an encoder with a single convolution at its input")
    head = nn.Conv2d(widths[-1], 2, kernel_size=1)
    return SegNet(body, head, input_weight=f"encoder.{inputs[0]}.weight", stride=2**encoder_depth)


def _make_adaptable(net: nn.Module, norm: str) -> None:
    """Put `norm` in the place of every norm over a batch or an instance, and let no activation write in place.

    Subclasses are left for `assert_adaptable` to refuse: timm's BatchNormAct2d, for one, is an activation as well.
    """
    for module in list(net.modules()):
        if getattr(module, "inplace", False):
            module.inplace = False  # type: ignore[assignment]  # a flag; torch's types know no such attribute
        for name, child in module.named_children():
            if type(child) is nn.BatchNorm2d or type(child) is nn.InstanceNorm2d:
                width = child.num_features
                instance, groups = nn.InstanceNorm2d(width, affine=True), nn.GroupNorm(_groups(width), width)
                setattr(module, name, instance if norm == "instance" else groups)


def _drop_idle(body: nn.Module, size: int) -> bool:
    """Remove what never runs, such as the stages of an encoder below its depth: it would have no gradient.

    Returns:
        Whether all parameters that are left have a bearing on the features.
    """
    ran: set[nn.Module] = set()
    hooks = [module.register_forward_pre_hook(lambda module, _: ran.add(module)) for module in body.modules()]
    parameters = list(body.parameters())
    with torch.enable_grad():
        gradients = torch.autograd.grad(body(torch.zeros(1, 1, size, size)).sum(), parameters, allow_unused=True)
    for hook in hooks:
        hook.remove()
    used = {parameter for parameter, gradient in zip(parameters, gradients, strict=True) if gradient is not None}
    for module in list(body.modules()):
        for name, child in module.named_children():
            if ran.isdisjoint(child.modules()) and used.isdisjoint(child.parameters()):
                setattr(module, name, nn.Identity())
    return used.issuperset(body.parameters())


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Modules that are made within have the same weights each time; torch's global generator stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


NETWORKS: dict[str, Callable[..., SegNet]] = {
    "se_unet_3d": partial(se_unet, 3),
    "se_unet_2d": partial(se_unet, 2),
    "scse_unet_2d": scse_unet_2d,
}


def build_network(name: str, *, seed: int | None = None, **options: Any) -> SegNet:
    """Build a network by name, freshly initialised.

    Args:
        name: a key of `NETWORKS`.
        seed: makes the initial weights reproducible and leaves torch's global generator as it was; None: that generator
            is used, as in any torch module.
        options: keyword arguments of that network.

    Raises:
        ValueError: unknown name or option (with the list of what exists), or a value that an option cannot take.
    """
    _require(name in NETWORKS, "name", name, f"one of {', '.join(NETWORKS)}")
    known = {option: parameter.default for option, parameter in inspect.signature(NETWORKS[name]).parameters.items()}
    unknown = [option for option in options if option not in known]
    if unknown:
        raise ValueError(f"option {unknown[0]!r} of {name}; required: one of {', '.join(known)}")
    options = known | options
    if seed is None:
        net = NETWORKS[name](**options)
    else:
        with seeded(seed):
            net = NETWORKS[name](**options)
    plain = {option: list(value) if isinstance(value, tuple) else value for option, value in options.items()}
    net.spec = {"name": name, "options": plain}
    return net
