"""Ways to fine-tune a network: which of its parameters move, and what holds them near their start."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from medmeta.episode import State
from medmeta.networks import SegNet

RANK = 4
"""Of the low-rank adapters; 4 to 8 is what few-scan adaptation of volumes was found to need."""


@dataclass(frozen=True)
class Tuning:
    """One way to fine-tune from one start.

    Args:
        leaves: what moves, by name.
        assemble: leaves -> every parameter of the network.
        anchors: leaf -> where it is pulled back to (L2-SP); leaves without an anchor move freely.
    """

    leaves: dict[str, Tensor]
    assemble: Callable[[dict[str, Tensor]], State]
    anchors: dict[str, Tensor]

    @staticmethod
    def of(start: State, names: set[str], free: set[str]) -> Tuning:
        """The parameters `names` move, all but the `free` ones with an anchor."""
        leaves = {name: start[name].detach().clone() for name in start if name in names}
        still = {name: tensor.detach().clone() for name, tensor in start.items() if name not in names}
        anchors = {name: start[name].detach().clone() for name in leaves if name not in free}
        return Tuning(leaves, lambda moved: {**still, **moved}, anchors)


def tune_all(net: SegNet, start: State, generator: torch.Generator) -> Tuning:
    """Every parameter moves; those of the body are drawn back to their start (L2-SP; Li 2018)."""
    return Tuning.of(start, set(start), set(net.head_names))


def tune_head(net: SegNet, start: State, generator: torch.Generator) -> Tuning:
    """The output convolution moves (linear probing)."""
    return Tuning.of(start, set(net.head_names), set(net.head_names))


def tune_norms(net: SegNet, start: State, generator: torch.Generator) -> Tuning:
    """Scales and shifts of the norms, biases and the output convolution move (BitFit; Ben-Zaken 2022)."""
    moving = {name for name in net.body_names if start[name].ndim == 1}
    return Tuning.of(start, moving | set(net.head_names), set(start))


def tune_low_rank(net: SegNet, start: State, generator: torch.Generator) -> Tuning:
    """Low-rank changes of the body's weights (LoRA; Hu 2022), with what `tune_norms` moves.

    W + B A, with the weight of a convolution (out, in, *kernel) as a matrix (out, in * kernel), A (rank, in * kernel)
    drawn at random and B (out, rank) zero, so that the start is unchanged.
    """
    plain = tune_norms(net, start, generator)
    adapted = [name for name in net.body_names if start[name].ndim > 1]
    leaves = dict(plain.leaves)
    for name in adapted:
        weight = start[name]
        width = weight[0].numel()
        rank = min(RANK, len(weight), width)
        drawn = torch.randn(rank, width, generator=generator).to(weight)
        leaves[f"{name}/down"] = drawn / math.sqrt(width)
        leaves[f"{name}/up"] = weight.new_zeros(len(weight), rank)

    def assemble(moved: dict[str, Tensor]) -> State:
        own = {name: tensor for name, tensor in moved.items() if "/" not in name}
        state = plain.assemble(own)
        for name in adapted:
            change = moved[f"{name}/up"] @ moved[f"{name}/down"]
            state[name] = state[name] + change.reshape(state[name].shape)
        return state

    return Tuning(leaves, assemble, {})


TUNINGS: dict[str, Callable[[SegNet, State, torch.Generator], Tuning]] = {
    "finetune": tune_all,
    "lora": tune_low_rank,
    "norms": tune_norms,
    "head": tune_head,
}
