from __future__ import annotations

import pytest
import torch

from medmeta.networks import build_network
from medmeta.tuning import RANK, TUNINGS

NETS = {
    "se_unet_3d": {"channels": [8, 16]},
    "scse_unet_2d": {"encoder_name": "resnet18", "encoder_depth": 2, "decoder_channels": [32, 16]},
}


@pytest.fixture(params=NETS)
def net(request):
    return build_network(request.param, seed=0, **NETS[request.param])


@pytest.fixture(params=TUNINGS)
def name(request):
    return request.param


def tune(net, name, seed=0):
    with torch.no_grad():
        start = net.grow(2, 3)
    return start, TUNINGS[name](net, start, torch.Generator().manual_seed(seed))


def test_nothing_has_moved_at_the_start(net, name):
    start, tuning = tune(net, name)
    state = tuning.assemble(tuning.leaves)
    assert state.keys() == start.keys()
    assert all(torch.equal(state[each], start[each]) for each in start)


def test_leaves_share_no_memory_with_the_network(net, name):
    _, tuning = tune(net, name)
    own = {parameter.data_ptr() for parameter in net.parameters()}
    assert not own & {tensor.data_ptr() for tensor in (*tuning.leaves.values(), *tuning.anchors.values())}


@pytest.mark.parametrize(
    ("name", "moves"),
    [
        ("finetune", lambda tensor, of_head: True),
        ("lora", lambda tensor, of_head: True),
        ("norms", lambda tensor, of_head: of_head or tensor.ndim == 1),
        ("head", lambda tensor, of_head: of_head),
    ],
)
def test_what_moves_with_the_leaves(net, name, moves):
    start, tuning = tune(net, name)
    # Both factors of a low-rank change have to move: one of them begins at zero.
    moved = tuning.assemble({each: tensor + 1.0 for each, tensor in tuning.leaves.items()})
    changed = {each for each in start if not torch.equal(moved[each], start[each])}
    assert changed == {each for each in start if moves(start[each], each in net.head_names)}


def test_only_the_body_has_an_anchor_and_only_where_all_of_it_moves(net, name):
    start, tuning = tune(net, name)
    assert tuning.anchors.keys() == (set(net.body_names) if name == "finetune" else set())
    assert all(torch.equal(tuning.anchors[each], start[each]) for each in tuning.anchors)


def test_low_rank_changes_are_of_low_rank(net):
    start, tuning = tune(net, "lora")
    generator = torch.Generator().manual_seed(1)
    moved = {each: torch.randn(tensor.shape, generator=generator) for each, tensor in tuning.leaves.items()}
    state = tuning.assemble(moved)
    weights = [each for each in net.body_names if start[each].ndim > 1]
    ranks = {each: int(torch.linalg.matrix_rank((state[each] - start[each]).flatten(1), rtol=1e-4)) for each in weights}
    assert all(rank == min(RANK, *start[each].flatten(1).shape) for each, rank in ranks.items())
    assert any(min(start[each].flatten(1).shape) > RANK for each in weights)
    again, other = tune(net, "lora")[1], tune(net, "lora", seed=1)[1]
    down = f"{weights[0]}/down"
    assert torch.equal(again.leaves[down], tuning.leaves[down])
    assert not torch.equal(other.leaves[down], tuning.leaves[down])
