from __future__ import annotations

import pytest
import torch
from small import same, tiny_model

from medmeta.episode import Examples
from medmeta.learners.sliced import Sliced
from medmeta.networks import sliced


def test_its_network_is_the_sliced_one():
    learner = tiny_model().learner
    flat = Sliced(learner, 1)
    assert (flat.net.spatial_dims, flat.net.stride, flat.net.across) == (2, learner.net.stride, 1)
    assert same(flat.net.state_dict(), sliced(learner.net, learner.start(1, 1), 1).state_dict())


def test_it_sets_out_from_where_the_learner_does():
    """Meta-Transfer starts from a scaled and shifted body, not from that of its network."""
    learner = tiny_model("meta_transfer").learner
    with torch.no_grad():
        for scale in learner.scales.values():
            scale.mul_(2.0)
    name = learner.net.input_weight
    assert torch.allclose(Sliced(learner, 2).start(1, 1)[name], 2.0 * learner.net.grow(1, 1)[name].sum(-1))


def test_it_has_no_rule_of_its_own():
    examples = Examples(torch.zeros(1, 1, 8, 8), torch.zeros(1, 8, 8).long(), 1)
    with pytest.raises(ValueError, match="required: fine-tuning"):
        Sliced(tiny_model().learner, 2).adapt(examples)
