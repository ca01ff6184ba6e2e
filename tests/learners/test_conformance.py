"""What every learner owes its callers, on both networks."""

from __future__ import annotations

import json
from functools import cache

import numpy as np
import pytest
import torch
from small import same
from torch import Tensor
from torch.nn import functional

from medmeta.data.phantoms import draw_scan, phantom_task
from medmeta.episode import Episode, Examples
from medmeta.files import read_tensors, write_tensors
from medmeta.learners import LEARNERS, MetaLearner, build_learner
from medmeta.losses import dice_cross_entropy
from medmeta.networks import build_network
from medmeta.train import Schedule, meta_train, validation_dice

# Wide enough for the squeeze of scSE: by 16 of 16 channels leaves one ReLU, which can be dead from the start.
NETS = {
    "se_unet_3d": {"channels": [8, 16]},
    "scse_unet_2d": {"encoder_name": "resnet18", "encoder_depth": 2, "decoder_channels": [64, 64]},
}
TASKS = {"one": 1, "two.dots": 2}
OPTIONS = {
    "maml": {"inner_steps": 2, "inner_rate": 0.05},
    "fomaml": {"inner_steps": 2, "inner_rate": 0.05},
    "imaml": {"inner_steps": 3},
    "transfer": {"adapt_steps": 3, "adapt_rate": 0.01, "tasks": TASKS},
    "linear": {"adapt_steps": 3, "adapt_rate": 0.01, "tasks": TASKS},
    "scratch": {"adapt_steps": 3, "adapt_rate": 0.01},
}
BY_DESCENT = {name for name in LEARNERS if LEARNERS[name].__module__.rsplit(".", 1)[1] in ("optimisation", "transfer")}
"""Those that learn the support by gradient steps, and so leave network parameters behind."""
JOINT = {"transfer", "linear"}
"""Those that are trained on whole tasks, with a head for each, and not to adapt."""
IDLE = {
    "meta_transfer": "net.body.",
    **dict.fromkeys(LEARNERS.keys() - BY_DESCENT - {"meta_networks"}, "net.head."),
}
"""Parameters that a method does not learn: a body that it freezes, a head that it does without."""


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=NETS)
def net_name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=LEARNERS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def learner(name, net_name) -> MetaLearner:
    return make_learner(name, net_name)


def make_learner(name: str, net_name: str, *, seed: int = 0, dtype=torch.float32, **options) -> MetaLearner:
    learner = build_learner(
        name, build_network(net_name, seed=seed, **NETS[net_name]), **OPTIONS.get(name, {}) | options
    )
    return learner.to(dtype).eval()


def make_examples(
    learner: MetaLearner, seed: int = 0, *, count: int = 2, channels: int = 1, classes: int = 1, size: int = 0
) -> Examples:
    """Noise with one bright blob for each class, brighter for higher classes; a few voxels are ignored."""
    axes = learner.net.spatial_dims
    size = size or {2: 16, 3: 8}[axes]
    generator = torch.Generator().manual_seed(seed)
    dtype = next(learner.parameters()).dtype
    image = torch.randn(count, channels, *[size] * axes, generator=generator, dtype=dtype)
    mask = torch.zeros(count, *[size] * axes, dtype=torch.long)
    for number in range(count):
        for label in range(1, classes + 1):
            corner = torch.randint(0, size // 2, (axes,), generator=generator)
            blob = [slice(first, first + size // 3) for first in corner]
            mask[(number, *blob)] = label
            image[(number, slice(None), *blob)] += 2.0 * label
        mask[(number, *[0] * axes)] = -1
    return Examples(image, mask, classes)


def make_episode(learner: MetaLearner, **options) -> Episode:
    task = {classes: name for name, classes in TASKS.items()}[options.get("classes", 1)]
    return Episode(task, make_examples(learner, 1, **options), make_examples(learner, 2, **options))


def gradients(learner: MetaLearner, episode: Episode) -> dict[str, Tensor | None]:
    learner.zero_grad()
    learner.meta_loss(episode).backward()
    return {name: parameter.grad for name, parameter in learner.named_parameters()}


def state_of(learner: MetaLearner) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in learner.state_dict().items()}


@pytest.mark.parametrize("classes", TASKS.values())
def test_meta_loss_and_meta_gradient(name, learner, classes) -> None:
    episode = make_episode(learner, classes=classes)
    if name == "scratch":
        with pytest.raises(ValueError, match=f"task '{episode.task}'; required"):
            learner.meta_loss(episode)
        return
    loss = learner.meta_loss(episode)
    assert loss.shape == ()
    assert loss.isfinite()
    found = gradients(learner, episode)
    if name in JOINT:
        own = f"heads.task_{list(TASKS).index(episode.task)}."
        meant = {parameter for parameter in found if parameter.startswith(("net.body.", own))}
    else:
        meant = {parameter for parameter in found if not parameter.startswith(IDLE.get(name, "-"))}
    assert {parameter for parameter, gradient in found.items() if gradient is not None} == meant
    for parameter in meant:
        assert found[parameter].isfinite().all(), parameter
        assert found[parameter].any(), parameter


@pytest.mark.parametrize("enabled", [True, False])
def test_adapting_leaves_the_learner_as_it_was(learner, enabled) -> None:
    before = state_of(learner)
    support = make_examples(learner)
    with torch.set_grad_enabled(enabled):
        first, second = learner.adapt(support), learner.adapt(support)
        assert torch.is_grad_enabled() == enabled
    assert same(state_of(learner), before)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in learner.parameters())
    assert not learner.training
    assert same(first, second)
    if not enabled:
        assert not any(tensor.requires_grad for tensor in first.values())
        with torch.no_grad():
            learner.segment(support.image, {name: tensor.mul_(0) for name, tensor in first.items()})
        assert same(state_of(learner), before), "the state shares memory with the learner"


@pytest.mark.parametrize("name", sorted(BY_DESCENT))
def test_descent_learns_the_support(name, net_name) -> None:
    learner = make_learner(name, net_name)
    support = make_examples(learner, classes=2)
    with torch.no_grad():
        before = dice_cross_entropy(learner.segment(support.image, learner.start(1, 2)), support.mask)
        after = dice_cross_entropy(learner.segment(support.image, learner.adapt(support)), support.mask)
    assert after < before


def test_the_order_of_the_support_matters_only_where_it_is_read_in_sequence(name, net_name) -> None:
    learner = make_learner(name, net_name, dtype=torch.float64)
    support, query = make_examples(learner, 1, count=4, classes=2), make_examples(learner, 2)
    order = [2, 0, 3, 1]
    turned = Examples(support.image[order], support.mask[order], 2)
    with torch.no_grad():
        logits = [learner.segment(query.image, learner.adapt(given)) for given in (support, turned)]
    if learner.sequential:
        assert not torch.allclose(*logits, rtol=1e-4, atol=1e-4)
    else:
        torch.testing.assert_close(*logits, rtol=1e-6, atol=1e-6)


def test_the_order_of_the_classes_does_not_matter(name, net_name) -> None:
    learner = make_learner(name, net_name, dtype=torch.float64)
    support, query = make_examples(learner, 1, classes=3), make_examples(learner, 2)
    order = torch.tensor([0, 3, 1, 2])
    renamed = Examples(support.image, torch.where(support.mask < 0, support.mask, order[support.mask]), 3)
    with torch.no_grad():
        logits, turned = (learner.segment(query.image, learner.adapt(given)) for given in (support, renamed))
    torch.testing.assert_close(turned[:, order], logits, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(turned, logits, atol=1e-3)


@pytest.mark.parametrize(
    ("shots", "classes", "channels", "size"), [(1, 1, 1, 11), (2, 3, 2, 5), (3, 2, 1, 16), (4, 1, 2, 8), (5, 2, 2, 1)]
)
def test_any_shots_classes_channels_and_size(learner, shots, classes, channels, size) -> None:
    support = make_examples(learner, count=shots, classes=classes, channels=channels)
    image = torch.randn(2, channels, size, *[size + 1] * (learner.net.spatial_dims - 1))
    with torch.no_grad():
        logits = learner.segment(image, learner.adapt(support))
    assert logits.shape == (2, 1 + classes, *image.shape[2:])
    assert logits.isfinite().all()


def test_a_class_without_a_voxel_in_the_support_is_possible_and_unlikely(name, net_name) -> None:
    learner = make_learner(name, net_name)
    support = make_examples(learner, classes=2)
    without = Examples(support.image, torch.where(support.mask == 2, 0, support.mask), 2)
    with torch.no_grad():
        logits = learner.segment(support.image, learner.adapt(without))
    assert logits.isfinite().all()
    if name not in BY_DESCENT:
        assert (logits.argmax(dim=1) == 2).float().mean() < 0.01


def test_a_support_that_is_all_ignored_spoils_nothing(name, net_name) -> None:
    learner = make_learner(name, net_name)
    query = make_examples(learner)
    nothing = Examples(query.image, torch.full_like(query.mask, -1), 1)
    with torch.no_grad():
        assert learner.segment(query.image, learner.adapt(nothing)).isfinite().all()
    if name == "scratch":
        return
    found = gradients(learner, Episode("one", nothing, query)).values()
    assert all(gradient.isfinite().all() for gradient in found if gradient is not None)


def test_a_learner_on_disk(name, net_name, learner, tmp_path) -> None:
    """Built from its own JSON with other weights, then filled from a file: the same to the last bit."""
    facts = json.loads(json.dumps({"net": learner.net.spec, "name": learner.name, "options": learner.options}))
    write_tensors(tmp_path / "learner.safetensors", learner.state_dict())
    net = build_network(facts["net"]["name"], seed=1, **facts["net"]["options"])
    again = build_learner(facts["name"], net, **facts["options"]).eval()
    support, query = make_examples(learner, 1, classes=2), make_examples(learner, 2)
    assert facts["name"] == name
    assert again.options == learner.options
    with torch.no_grad():
        expected = learner.segment(query.image, learner.adapt(support))
        assert not torch.equal(again.segment(query.image, again.adapt(support)), expected)
        write_tensors(tmp_path / "state.safetensors", learner.adapt(support))
        state, _ = read_tensors(tmp_path / "state.safetensors")
        assert torch.equal(
            learner.segment(query.image, {name: tensor.clone() for name, tensor in state.items()}), expected
        )
        again.load_state_dict(read_tensors(tmp_path / "learner.safetensors")[0])
        assert torch.equal(again.segment(query.image, again.adapt(support)), expected)


def test_autocast_around_adapting(name, net_name) -> None:
    """Under autocast the steps see the weights as they are now, not as they were cast in the first step."""
    learner = make_learner(name, net_name, **{steps: 15 for steps in OPTIONS.get(name, {}) if steps.endswith("_steps")})
    support = make_examples(learner, classes=2)
    losses = []
    for precision in (torch.float32, torch.bfloat16):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
            state = learner.adapt(support)
        with torch.no_grad():
            losses.append(float(dice_cross_entropy(learner.segment(support.image, state), support.mask)))
    assert losses[1] == pytest.approx(losses[0], abs=0.1)


def test_network_parameters_run_the_network_whatever_the_method(learner) -> None:
    """Fine-tuning goes on from `start`, also behind a learner that otherwise compares or remembers."""
    query = make_examples(learner, classes=3)
    with torch.no_grad():
        start = learner.start(1, 3)
        assert torch.equal(learner.segment(query.image, start), learner.net(query.image, start))


class Scans:
    """Episodes of phantom organs, each patient with a pose and contrast of its own."""

    def __init__(self, axes: int, seed: int) -> None:
        self.axes, self.seed = axes, seed

    def __getitem__(self, index: int) -> Episode:
        rng = np.random.default_rng([self.seed, index])
        chosen = int(rng.integers(len(ORGANS)))
        scans = [scan(chosen, int(patient), self.axes) for patient in rng.permutation(PATIENTS)[:4]]
        parts = [
            Examples(torch.stack([image for image, _ in part]), torch.stack([mask for _, mask in part]), 1)
            for part in (scans[:2], scans[2:])
        ]
        return Episode(f"organ {chosen}", *parts)


ORGANS = (0, 1, 3, 4)
PATIENTS = 6


@cache
def scan(organ: int, patient: int, axes: int) -> tuple[Tensor, Tensor]:
    """A phantom scan and its first organ on 16 voxels along each axis; in 2-D the slice that shows most of it."""
    volume, labels = draw_scan(phantom_task(ORGANS[organ], 0, size_mm=60.0), patient, 0)
    image = functional.interpolate(volume.data[None].float(), size=(16, 16, 16), mode="trilinear")[0, :1]
    mask = functional.interpolate((labels.data[None] == 1).float(), size=(16, 16, 16))[0, 0].long()
    if axes == 2:
        fullest = int(mask.sum((0, 1)).argmax())
        image, mask = image[..., fullest], mask[..., fullest]
    return (image - image.mean()) / image.std(), mask


@pytest.mark.parametrize("name", [name for name in LEARNERS if name != "scratch"])
def test_a_short_training_on_phantoms_pays(name, net_name) -> None:
    options = {"tasks": {f"organ {number}": 1 for number in range(len(ORGANS))}} if name in JOINT else {}
    learner = make_learner(name, net_name, **options)
    axes = learner.net.spatial_dims
    training = Schedule(100 if axes == 3 and name in SLOW else 30, rate=5e-3, episodes_per_step=2)
    if learner.pretrained:
        before = make_learner("fomaml", net_name)
        meta_train(before, Scans(axes, 2), training)
        learner.net.load_state_dict(before.net.state_dict())
    queries = [Scans(axes, 1)[index] for index in range(12)]
    untrained = validation_dice(learner, queries)
    meta_train(learner, Scans(axes, 0), training)
    assert validation_dice(learner, queries) > untrained + 0.1


SLOW = JOINT | {"meta_transfer", "meta_networks", "in_context"}
"""Those that begin with nothing to compare by, so that a small organ is found late."""


def directional(learner: MetaLearner, episode: Episode, width: float) -> tuple[float, float]:
    """The slope of the meta-loss along one random direction: by the meta-gradient, and by a central difference."""
    found = gradients(learner, episode)
    generator = torch.Generator().manual_seed(5)
    direction = {}
    for name, parameter in learner.named_parameters():
        direction[name] = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    length = torch.cat([tensor.flatten() for tensor in direction.values()]).norm()
    losses = []
    with torch.no_grad():
        for sign in (1, -2):
            for name, parameter in learner.named_parameters():
                parameter += sign * width / length * direction[name]
            losses.append(float(learner.meta_loss(episode)))
    slope = sum(float((found[name] * direction[name]).sum()) for name in direction) / float(length)
    return slope, (losses[0] - losses[1]) / (2 * width)


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("name", ["maml", "fomaml"])
def test_meta_gradient_against_finite_differences(name, net_name, steps) -> None:
    """Second order agrees; first order must not, or this test could not tell them apart."""
    learner = make_learner(name, net_name, dtype=torch.float64, inner_steps=steps, inner_rate=0.3)
    found, expected = directional(learner, make_episode(learner, classes=2), 1e-6)
    if name == "maml":
        assert found == pytest.approx(expected, rel=1e-4)
    else:
        assert found != pytest.approx(expected, rel=1e-2)


def test_fomaml_is_maml_of_first_order(net_name) -> None:
    episode = make_episode(make_learner("maml", net_name), classes=2)
    maml, fomaml = make_learner("maml", net_name, order=1), make_learner("fomaml", net_name)
    assert same(gradients(maml, episode), gradients(fomaml, episode))
    assert not same(gradients(make_learner("maml", net_name), episode), gradients(fomaml, episode))


def test_transfer_keeps_one_head_for_each_task(net_name) -> None:
    learner = make_learner("transfer", net_name)
    episode = make_episode(learner, classes=2)
    with torch.no_grad():
        before = learner.query_logits(episode)
        for parameter in learner.heads["task_0"].values():
            parameter.fill_(7.0)
        assert torch.equal(learner.query_logits(episode), before)
        for parameter in learner.heads["task_1"].values():
            parameter.fill_(7.0)
        assert (learner.query_logits(episode).std(dim=1) < 1e-3).all()
    with pytest.raises(ValueError, match=r"task 'spleen'; required: one of \['one', 'two.dots'\]"):
        learner.meta_loss(Episode("spleen", episode.support, episode.query))


def test_the_settled_head_is_the_mean_of_all_heads(net_name) -> None:
    learner = make_learner("transfer", net_name, tasks={"one": 1, "two": 2})
    with torch.no_grad():
        for number, rows in enumerate(([1.0, 3.0], [5.0, 4.0, 8.0])):
            for parameter in learner.heads[f"task_{number}"].values():
                for row, value in enumerate(rows):
                    parameter[row] = value
    learner.settle_head()
    for name in learner.net.head_names:
        background, foreground = learner.net.get_parameter(name)
        assert (background == 3.0).all(), name
        assert (foreground == 4.5).all(), name


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("mmal", {}, r"learner 'mmal'; required: one of \['anil', .*'fomaml', .*'transfer'\]"),
        (
            "maml",
            {"inner_step": 3},
            r"inner_step.* required: among \['clip', .*'inner_rate', 'inner_steps', .*'order'\]",
        ),
        ("fomaml", {"order": 2}, "unexpected keyword argument 'order'"),
        ("scratch", {"tasks": {}}, "required: among"),
        ("maml", {"inner_steps": 0}, "inner_steps=0, .* required: at least 1 step"),
        ("fomaml", {"inner_rate": -1.0}, "a positive rate"),
        ("maml", {"order": 3}, "order=3"),
    ],
)
def test_refuses_what_it_does_not_know(name, options, says) -> None:
    with pytest.raises(ValueError, match=says):
        build_learner(name, build_network("se_unet_3d", seed=0, channels=[4]), **options)
