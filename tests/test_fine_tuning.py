"""The loop over a few prepared scans: the plain steps, the same every time, for as long as it may."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
import torch
from small import same, tiny_2d, tiny_model, write_pairs

import medmeta.fine_tuning as module
from medmeta.data.sampler import Augment, draw_patch
from medmeta.data.store import StoredTask
from medmeta.fine_tuning import Batches, Budget, fine_tune, for_network, usual_steps
from medmeta.losses import dice_cross_entropy
from medmeta.support import prepare_support, support_task

SIZE = 16**3


def prepared(folder, cases) -> StoredTask:
    write_pairs(folder, cases=cases)
    targets = {"anterior": (1,), "posterior": (2,)}
    return prepare_support(support_task(folder / "images", folder / "labels", targets=targets), SIZE, stride=2)


@pytest.fixture(scope="module")
def support(tmp_path_factory) -> StoredTask:
    return prepared(tmp_path_factory.mktemp("two"), (0, 1))


@pytest.fixture(scope="module")
def three(tmp_path_factory) -> StoredTask:
    return prepared(tmp_path_factory.mktemp("three"), (0, 1, 2))


@pytest.mark.parametrize("budget", [{"steps": -1}, {"rate": 0.0}, {"patches": 0}, {"minutes": 0.0}, {"minutes": -1.0}])
def test_an_impossible_budget_is_refused(budget):
    with pytest.raises(ValueError, match="required"):
        Budget(**budget)


def test_a_budget_of_steps_is_spent_evenly():
    assert list(Budget(steps=4).spend()) == [(0, 0.0), (1, 0.25), (2, 0.5), (3, 0.75)]
    assert list(Budget(steps=0).spend()) == []


def test_minutes_end_before_the_steps_do(monkeypatch):
    clock = iter(range(0, 600, 6))
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    spent = list(Budget(steps=1000, minutes=0.5).spend())
    assert [step for step, _ in spent] == [0, 1, 2, 3]
    assert [done for _, done in spent] == pytest.approx([0.2, 0.4, 0.6, 0.8])


@pytest.mark.parametrize(("scans", "steps"), [(1, 1000), (4, 2000), (9, 3000)])
def test_more_scans_are_learned_from_for_longer(scans, steps):
    assert usual_steps(scans) == steps


def test_a_batch_is_a_function_of_seed_and_step(support):
    first, again, other = (Batches(support, 2, seed, mixed=0.5, repaint=0.5) for seed in (3, 3, 4))
    backwards = {step: first[step] for step in (5, 4, 3, 2, 1, 0)}
    for step, examples in backwards.items():
        assert torch.equal(examples.image, again[step].image)
        assert torch.equal(examples.mask, again[step].mask)
    assert not torch.equal(first[0].image, other[0].image)


@pytest.mark.parametrize("patches", [1, 2, 8])
def test_every_scan_comes_up_as_often_as_any_other(three, monkeypatch, patches):
    drawn = []
    monkeypatch.setattr(module, "draw_patch", lambda case, *rest: drawn.append(case.id) or draw_patch(case, *rest))
    batches = Batches(three, patches)
    for step in range(3):
        batches[step]
    assert [drawn.count(case.id) for case in three.cases] == [patches] * 3


@pytest.mark.parametrize("patches", [1, 2, 3])
def test_patches_are_mixed_with_other_ones(three, monkeypatch, patches):
    mixed = []

    def noted(own, others, rng):
        mixed.append([not torch.equal(a[0], b[0]) for a, b in zip(own, others, strict=True)])
        return own

    monkeypatch.setattr(module, "copy_paste", noted)
    never, always = (Batches(three, patches, mixed=share) for share in (0.0, 1.0))
    first, again = never[0], always[0]
    assert mixed == [[True] * patches]
    assert torch.equal(first.image, again.image), "what is mixed in changes nothing before it"


def test_the_steps_are_the_plain_ones_when_written_out(support):
    """An independent loop over the same patches gives the same weights."""
    model = tiny_model()
    made = fine_tune(model.learner, support, budget=Budget(steps=3, patches=2, rate=1e-3), seed=9)
    net = model.learner.net
    state = {name: tensor.detach().clone().requires_grad_() for name, tensor in net.grow(1, 2).items()}
    start = {name: tensor.detach().clone() for name, tensor in state.items()}
    average = {name: tensor.detach().clone() for name, tensor in state.items()}
    head = [tensor for name, tensor in state.items() if name.startswith("head.")]
    body = [tensor for name, tensor in state.items() if name.startswith("body.")]
    optimiser = torch.optim.Adam([{"params": body}, {"params": head}])
    augment = Augment(support.patch, support.preprocess.spacing, "CT", strength=2.0, bend=0.8 / 2)
    for step in range(3):
        rng = np.random.default_rng([9, 0, step])
        pairs = [augment(*draw_patch(support.cases[n], support.patch, rng), rng) for n in (0, 1)]
        images, masks = (torch.stack(parts) for parts in zip(*pairs, strict=True))
        rate = 1e-3 * (step + 1) / 10 * (1 + math.cos(math.pi * step / 3)) / 2
        for group, factor in zip(optimiser.param_groups, (1, 10), strict=True):
            group["lr"] = factor * rate
        optimiser.zero_grad()
        balance = 0.5 * (1 - 2 * step / 3) if step < 1.5 else 0.0
        dice_cross_entropy(net(images, state), masks, balance=balance).backward()
        torch.nn.utils.clip_grad_norm_(list(state.values()), 5.0)
        optimiser.step()
        decay = min(0.98, (1 + step) / (10 + step))
        with torch.no_grad():
            for name, tensor in state.items():
                if name.startswith("body."):
                    tensor -= 0.5 * rate * (tensor - start[name])
                average[name] = decay * average[name] + (1 - decay) * tensor
    assert all(torch.allclose(made[name], average[name].detach(), atol=1e-7) for name in made)


def test_going_on_is_slower_and_from_the_weights_given(support):
    model = tiny_model()
    before = fine_tune(model.learner, support, budget=Budget(steps=3))
    kept = {name: tensor.clone() for name, tensor in before.items()}
    assert same(fine_tune(model.learner, support, budget=Budget(steps=0), begin=before), before)
    on, fresh = (fine_tune(model.learner, support, budget=Budget(steps=1), begin=begin) for begin in (before, None))
    assert same(before, kept), "what is given is left as it was"
    # Adam's first step is the rate, whatever the gradient: the head's is twenty times less, the rest half of it.
    start = {name: tensor.detach() for name, tensor in model.learner.start(1, 2).items()}
    for name, factor in (("head.weight", 0.05), (next(iter(model.learner.net.body_names)), 0.5)):
        moved, first = ((a[name] - b[name]).abs().max() for a, b in ((on, before), (fresh, start)))
        assert moved == pytest.approx(float(factor * first), rel=1e-2)


def test_full_fine_tuning_stays_nearer_its_start_with_the_pull(support, monkeypatch):
    learner, distances = tiny_model().learner, []
    start = {name: tensor.detach() for name, tensor in learner.start(1, 2).items()}
    for pull in (0.0, 5.0):
        monkeypatch.setattr(module, "PULL", pull)
        state = fine_tune(learner, support, budget=Budget(steps=20, rate=1e-2))
        distances.append(sum(float((state[name] - start[name]).norm()) for name in learner.net.body_names))
    assert distances[1] < 0.9 * distances[0]


def test_a_loss_that_is_not_finite_stops_it(support):
    model = tiny_model()
    with torch.no_grad():
        next(model.learner.parameters()).fill_(math.nan)
    with pytest.raises(FloatingPointError, match=r"the loss is nan at step 1; required: a finite loss"):
        fine_tune(model.learner, support, budget=Budget(steps=2))


def test_a_2d_network_takes_the_slices_of_volumes(support):
    examples = Batches(support, 2)[0]
    assert for_network(tiny_model().learner.net, examples) is examples
    slices = for_network(tiny_2d().learner.net, examples)
    assert slices.image.shape == (2 * support.patch[2], 1, *support.patch[:2])
    assert torch.equal(slices.image[1, 0], examples.image[0, 0, ..., 1])
