from __future__ import annotations

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medmeta.networks import NETWORKS, SegNet, assert_adaptable, build_network, can_be_sliced, sliced

SMALL = {
    "se_unet_3d": {"channels": [4, 6, 8], "se_ratio": 16},
    "se_unet_2d": {"channels": [4, 6, 8], "se_ratio": 16},
    "scse_unet_2d": {"encoder_depth": 2, "decoder_channels": [16, 16]},
}
ODD_SIZE = {"se_unet_3d": (7, 4, 9), "se_unet_2d": (13, 6), "scse_unet_2d": (13, 6)}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=list(NETWORKS))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def net(name: str) -> SegNet:
    return build_network(name, seed=0, **SMALL[name]).double()


def random_image(net: SegNet, generator: torch.Generator, *, batch: int = 1, channels: int = 1, size=None) -> Tensor:
    size = size or (8,) * net.spatial_dims
    return torch.randn(batch, channels, *size, generator=generator, dtype=torch.float64)


def random_mask(image: Tensor, generator: torch.Generator, classes: int) -> Tensor:
    return torch.randint(0, classes + 1, (image.shape[0], *image.shape[2:]), generator=generator)


@pytest.mark.parametrize(("channels", "classes"), [(1, 1), (2, 9), (3, 2), (4, 1)])
def test_any_channels_classes_and_size(name, net, generator, channels, classes) -> None:
    image = random_image(net, generator, batch=2, channels=channels, size=ODD_SIZE[name])
    with torch.no_grad():
        parameters = net.grow(channels, classes)
        logits = net(image, parameters)
        assert logits.shape == (2, 1 + classes, *ODD_SIZE[name])
        assert logits.isfinite().all()
        assert net.embed(image, parameters).shape == (2, net.features, *ODD_SIZE[name])
    assert parameters.keys() == dict(net.named_parameters()).keys() == {*net.body_names, *net.head_names}


@torch.no_grad()
def test_sizes_from_one_voxel_up(net, generator) -> None:
    for length in (1, 2, 3, 5):
        size = (length,) * net.spatial_dims
        assert net(random_image(net, generator, size=size)).shape == (1, 2, *size)
    slab = (*[9] * (net.spatial_dims - 1), 1)
    assert net(random_image(net, generator, size=slab)).shape[2:] == slab


@torch.no_grad()
def test_padding_repeats_the_last_voxels(net, generator) -> None:
    """Oracle: the image extended by clamped indices to the next multiple of the stride, the logits cut back."""
    image = random_image(net, generator, size=(net.stride + 1,) * net.spatial_dims)
    index = torch.arange(2 * net.stride).clamp(max=net.stride)
    extended = image
    for axis in range(2, image.ndim):
        extended = extended.index_select(axis, index)
    cut = (..., *[slice(net.stride + 1)] * net.spatial_dims)
    torch.testing.assert_close(net(image), net(extended)[cut])


@torch.no_grad()
def test_grown_parameters_equal_a_network_of_that_width(net, generator) -> None:
    """Oracle: a copy whose first and last convolutions are rebuilt for 3 channels and 2 classes."""
    parameters = {key: value + 0.1 * torch.randn(value.shape, generator=generator, dtype=value.dtype)
                  for key, value in net.grow(3, 2).items()}  # fmt: skip
    image = random_image(net, generator, batch=2, channels=3)
    wide = copy.deepcopy(net)
    owner, _ = wide.input_weight.rsplit(".", 1)
    for module, inputs, outputs in ((wide.get_submodule(owner), 3, None), (wide.head, None, 3)):
        module.in_channels, module.out_channels = inputs or module.in_channels, outputs or module.out_channels
        shape = (module.out_channels, module.in_channels, *module.kernel_size)
        module.weight = nn.Parameter(module.weight.new_empty(shape))
        if module.bias is not None:
            module.bias = nn.Parameter(module.bias.new_empty(module.out_channels))
    wide.load_state_dict(parameters)
    assert torch.equal(net(image, parameters), wide(image))


@torch.no_grad()
def test_start_is_the_network_as_built(net, generator) -> None:
    image = random_image(net, generator)
    assert torch.equal(net(image, net.grow(1, 1)), net(image))


@torch.no_grad()
def test_identical_channels_give_the_response_of_one(net, generator) -> None:
    image = random_image(net, generator, batch=2)
    repeated = image.expand(-1, 3, *image.shape[2:])
    torch.testing.assert_close(net(repeated, net.grow(3, 1)), net(image), rtol=1e-9, atol=1e-9)


def test_start_does_not_depend_on_the_order_of_the_classes(net, generator) -> None:
    """Permuting the classes of the support permutes the rows of the adapted head and changes nothing else."""
    image = random_image(net, generator, batch=2)
    mask = random_mask(image, generator, classes=3)
    order = torch.tensor([0, 3, 1, 2])

    def step(target: Tensor) -> dict[str, Tensor]:
        parameters = net.grow(1, 3)
        loss = F.cross_entropy(net(image, parameters), target)
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        return {key: value - 0.1 * g for (key, value), g in zip(parameters.items(), gradients, strict=True)}

    adapted, permuted = step(mask), step(order[mask])
    for key, value in adapted.items():
        expected = permuted[key][order] if key in net.head_names else permuted[key]
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(adapted["head.bias"][1], adapted["head.bias"][2])


def test_gradients_reach_the_meta_parameters(net, generator) -> None:
    image = random_image(net, generator, batch=2, channels=2)
    mask = random_mask(image, generator, classes=3)
    grown = net.grow(2, 3)
    loss = F.cross_entropy(net(image, grown), mask)
    meta = dict(zip(grown, torch.autograd.grad(loss, list(net.parameters()), retain_graph=True), strict=True))
    task = dict(zip(grown, torch.autograd.grad(loss, list(grown.values())), strict=True))
    assert all(gradient.isfinite().all() for gradient in meta.values())
    # scSE squeezes 16 channels to one hidden unit, which a ReLU may leave without a gradient.
    assert all(gradient.any() for key, gradient in meta.items() if "cSE" not in key)
    torch.testing.assert_close(meta[net.input_weight], task[net.input_weight].mean(dim=1, keepdim=True))
    for key in net.head_names:
        torch.testing.assert_close(meta[key][0], task[key][0])
        torch.testing.assert_close(meta[key][1], task[key][1:].sum(dim=0))


def test_second_order_gradient_against_finite_differences(net, generator) -> None:
    """d/dt |g(w + t v)|^2 at t = 0, where g is the gradient of the loss in the grown parameters."""
    image = random_image(net, generator, batch=2, channels=2)
    mask = random_mask(image, generator, classes=2)
    meta = list(net.parameters())
    direction = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in meta]
    length = torch.cat([v.flatten() for v in direction]).norm().item()

    def squared_gradient() -> Tensor:
        grown = net.grow(2, 2)
        loss = F.cross_entropy(net(image, grown), mask)
        return sum(g.square().sum() for g in torch.autograd.grad(loss, list(grown.values()), create_graph=True))

    second = torch.autograd.grad(squared_gradient(), meta, allow_unused=True)
    exact = sum((g * v).sum() for g, v in zip(second, direction, strict=True) if g is not None).item()

    def shifted(h: float) -> float:
        with torch.no_grad():
            for parameter, v in zip(meta, direction, strict=True):
                parameter.add_(v, alpha=h)
        value = squared_gradient().item()
        with torch.no_grad():
            for parameter, v in zip(meta, direction, strict=True):
                parameter.sub_(v, alpha=h)
        return value

    # Both activations have kinks: a larger step would cross some of them.
    h = 1e-6 / length
    assert (shifted(h) - shifted(-h)) / (2 * h) == pytest.approx(exact, rel=1e-4)


def test_adapting_leaves_the_network_as_it_was(net, generator) -> None:
    before = copy.deepcopy(net.state_dict())
    image = random_image(net, generator, batch=2, channels=2)
    mask = random_mask(image, generator, classes=2)
    first = net(image, net.grow(2, 2)).detach()
    parameters = net.grow(2, 2)
    for _ in range(3):
        loss = F.cross_entropy(net(image, parameters), mask)
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        parameters = {key: value - 0.1 * g for (key, value), g in zip(parameters.items(), gradients, strict=True)}
    assert not torch.equal(net(image, parameters), first)
    assert torch.equal(net(image, net.grow(2, 2)), first)
    assert net.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


@torch.no_grad()
def test_examples_of_a_batch_do_not_see_each_other(net, generator) -> None:
    image = random_image(net, generator, batch=2)
    assert net.training
    torch.testing.assert_close(net(image)[:1], net(image[:1]), rtol=1e-9, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("norm", ["instance", "group"])
def test_dropout_does_nothing_in_eval_mode(name, norm, generator) -> None:
    plain = build_network(name, seed=0, norm=norm, **SMALL[name]).double()
    dropping = build_network(name, seed=0, norm=norm, dropout=0.5, **SMALL[name]).double()
    image = random_image(plain, generator)
    assert torch.equal(dropping.eval()(image), plain.eval()(image))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        assert not torch.equal(dropping.train()(image), dropping(image))


@torch.no_grad()
def test_runs_as_higher_patches_it(net, generator) -> None:
    import higher

    image = random_image(net, generator)
    assert torch.equal(higher.monkeypatch(net)(image), net(image))


def test_no_module_works_in_place(net) -> None:
    assert not any(getattr(module, "inplace", False) for module in net.modules())


def test_spec_rebuilds_the_network(name, net) -> None:
    spec = json.loads(json.dumps(net.spec))
    again = build_network(spec["name"], **spec["options"])
    assert again.spec == net.spec == spec
    assert str(again) == str(net)
    again.double().load_state_dict(net.state_dict())
    assert again.state_dict().keys() == net.state_dict().keys()


@pytest.mark.parametrize("option", ["tuple", "default"])
def test_spec_of_tuples_and_defaults_survives_json(option) -> None:
    options = {"channels": (4, 8)} if option == "tuple" else {}
    net = build_network("se_unet_3d", **options)
    assert json.loads(json.dumps(net.spec)) == net.spec


def test_seed_fixes_the_weights_and_spares_the_global_generator(name, net) -> None:
    state = torch.get_rng_state()
    same, other = (build_network(name, seed=seed, **SMALL[name]).double() for seed in (0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    pairs = list(zip(net.parameters(), same.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(ours, theirs) for ours, theirs, _ in pairs)
    assert not all(torch.equal(ours, theirs) for ours, _, theirs in pairs)


@pytest.mark.parametrize(
    ("options", "stride"),
    [
        ({"encoder_depth": 3}, 8),
        ({"encoder_name": "se_resnet50", "encoder_depth": 2, "norm": "group"}, 4),
    ],
)
def test_encoders_keep_no_idle_parameters(options, stride, generator) -> None:
    net = build_network("scse_unet_2d", seed=0, **options)
    assert net.stride == stride
    logits = net(torch.randn(1, 2, 32, 32, generator=generator), net.grow(2, 1))
    assert all(g.isfinite().all() for g in torch.autograd.grad(logits.square().mean(), list(net.parameters())))


@pytest.mark.parametrize("activation", ["leakyrelu", "silu"])
def test_activations_and_levels_of_the_3d_network(activation, generator) -> None:
    for channels in ([3], [2, 12]):
        net = build_network("se_unet_3d", channels=channels, activation=activation, norm="group")
        assert net.stride == 2 ** (len(channels) - 1)
        assert net(torch.randn(1, 1, 4, 5, 6, generator=generator)).shape == (1, 2, 4, 5, 6)


@pytest.mark.parametrize("across", [0, 1, 2])
@torch.no_grad()
def test_a_sliced_network_makes_of_a_slice_what_the_whole_one_makes_of_it_all_over(across, generator) -> None:
    """Where a volume goes on for ever, that is: the padding of every convolution is made to go round."""
    net = build_network("se_unet_3d", seed=0, **SMALL["se_unet_3d"]).double()
    flat = sliced(net, net.grow(1, 1), across).double()
    for module in (*net.modules(), *flat.modules()):
        if isinstance(module, nn.Conv2d | nn.Conv3d) and any(module.padding):
            module.padding_mode = "circular"
            module._reversed_padding_repeated_twice = [side for side in reversed(module.padding) for _ in range(2)]
    parts = (net.grow(2, 3), flat.grow(2, 3))
    image = torch.randn(2, 2, 8, 12, generator=generator, dtype=torch.float64)
    whole = net(
        image.unsqueeze(2 + across).expand([*image.shape[: 2 + across], 8, *image.shape[2 + across :]]), parts[0]
    )
    for number in (0, 3):
        torch.testing.assert_close(whole.select(2 + across, number), flat(image, parts[1]), rtol=1e-5, atol=1e-5)


def test_only_volumes_of_more_than_one_level_can_be_sliced() -> None:
    nets = {name: build_network(name, seed=0, **SMALL[name]) for name in NETWORKS}
    assert [name for name, net in nets.items() if can_be_sliced(net)] == ["se_unet_3d"]
    assert not can_be_sliced(build_network("se_unet_3d", seed=0, channels=[4]))


def test_images_that_do_not_fit(net, generator) -> None:
    with pytest.raises(ValueError, match=r"image with 2 channels; required: 1.*grow\(channels=2"):
        net(random_image(net, generator, channels=2))
    with pytest.raises(ValueError, match="image with 1 channels; required: 3"):
        net(random_image(net, generator), net.grow(3, 1))
    with pytest.raises(ValueError, match=f"required: .N, C, .S. with {net.spatial_dims} axes"):
        net(random_image(net, generator)[0])
    with pytest.raises(ValueError, match="at least one voxel"):
        net(random_image(net, generator)[..., :0])
    with pytest.raises(ValueError, match=r"parameters without 'head\.bias'"):
        net(random_image(net, generator), {k: v for k, v in net.grow(1, 1).items() if k != "head.bias"})
    for channels, classes in ((0, 1), (1, 0)):
        with pytest.raises(ValueError, match="at least one"):
            net.grow(channels, classes)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("unet", {}, "se_unet_3d, se_unet_2d, scse_unet_2d"),
        ("se_unet_3d", {"width": 3}, "'width' of se_unet_3d; required: one of channels, se_ratio"),
        ("scse_unet_2d", {"encoder_weights": "imagenet"}, "required: one of encoder_name"),
        ("se_unet_3d", {"channels": []}, "channels"),
        ("se_unet_3d", {"channels": [8, 0]}, "channels"),
        ("se_unet_3d", {"channels": 8}, "channels"),
        ("se_unet_3d", {"se_ratio": 0}, "se_ratio"),
        ("se_unet_3d", {"dropout": 1.0}, "dropout"),
        ("se_unet_3d", {"dropout": "much"}, "dropout"),
        ("se_unet_3d", {"norm": "batch"}, "instance, group"),
        ("se_unet_3d", {"activation": "relu"}, "leakyrelu, silu"),
        ("scse_unet_2d", {"encoder_name": "resnet"}, "resnet18"),
        ("scse_unet_2d", {"encoder_name": "efficientnet-b0", "encoder_depth": 3}, "uses all it computes at depth 3"),
        ("scse_unet_2d", {"encoder_depth": 6}, "1 to 5"),
        ("scse_unet_2d", {"encoder_depth": 2, "decoder_channels": [16, 8]}, "at least 16"),
        ("scse_unet_2d", {"norm": "batch"}, "instance, group"),
    ],
)
def test_unknown_names_and_options(name, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        build_network(name, **options)


class _Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 1, 3, padding=1)
        self.second = self.first


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)), "module '1' is BatchNorm2d"),
        (
            nn.Sequential(nn.BatchNorm3d(4, track_running_stats=False)),
            "module '0' is BatchNorm3d",
        ),
        (nn.Sequential(nn.InstanceNorm2d(1, affine=True, track_running_stats=True)), "InstanceNorm2d.*required"),
        (_Shared(), "'first.weight' and 'second.weight' are one tensor.*own copy"),
    ],
)
def test_refuses_what_cannot_be_adapted(module, message) -> None:
    with pytest.raises(ValueError, match=message):
        assert_adaptable(module)


def test_refuses_dynunet() -> None:
    from monai.networks.nets import DynUNet

    dynunet = DynUNet(3, 1, 2, [3, 3, 3], [1, 2, 2], [2, 2], filters=[4, 8, 8], norm_name="instance")
    with pytest.raises(ValueError, match="are one tensor"):
        assert_adaptable(dynunet)


def test_segnet_refuses_bodies_and_heads_that_do_not_fit() -> None:
    body = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.InstanceNorm2d(4, affine=True))
    head = nn.Conv2d(4, 2, 1)
    assert SegNet(body, head, input_weight="0.weight", stride=1)(torch.zeros(1, 1, 4, 4)).shape == (1, 2, 4, 4)
    with pytest.raises(ValueError, match="1x1 convolution"):
        SegNet(body, nn.Conv2d(4, 3, 1), input_weight="0.weight", stride=1)
    with pytest.raises(ValueError, match=r"input weight '1\.weight'"):
        SegNet(body, head, input_weight="1.weight", stride=1)
    with pytest.raises(ValueError, match="BatchNorm2d"):
        SegNet(nn.Sequential(body, nn.BatchNorm2d(4)), head, input_weight="0.0.weight", stride=1)
