"""The segmentation loss that every learner minimises."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from medmeta.episode import IGNORED


def dice_cross_entropy(logits: Tensor, mask: Tensor, *, smooth: float = 1.0, balance: float = 0.0) -> Tensor:
    """Mean of soft Dice loss and cross entropy over the voxels that count.

    Cross entropy keeps a gradient where Dice saturates; Dice keeps a small organ from drowning in background. The Dice
    term pools over the batch (Milletari 2016, eq. in section 3) and is the mean over the foreground classes that the
    batch shows: a class it does not show would have its last voxel punished as hard as a whole organ, so that among
    many classes the rare ones were never predicted. Its false voxels cost cross entropy.

    Args:
        logits: (N, 1+K, *S).
        mask: (N, *S) long, 0..K, -1 ignored.
        smooth: voxels added to numerator and denominator of the Dice term.
        balance: how far cross entropy makes up for rare classes: a class of n voxels in the batch has the weight
            n^-balance, from 0 (every voxel counts the same) to 1 (every class does).

    Returns:
        A scalar, in float32 or wider.
    """
    # Counts of voxels and near-equal losses are lost in the 8 bits of a bfloat16, which autocast leaves on the CPU.
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    counted = mask != IGNORED
    target = functional.one_hot(mask.clamp(min=0), logits.shape[1]).movedim(-1, 1).to(logits.dtype)
    weight = counted.unsqueeze(1).to(logits.dtype)
    log_probability = torch.log_softmax(logits, dim=1)
    axes = [0, *range(2, logits.ndim)]
    probability = log_probability.exp() * weight
    target = target * weight
    counts = target.sum(axes)
    worth = counts.clamp(min=1.0) ** -balance
    cross_entropy = -((target * log_probability).sum(axes) * worth).sum() / (counts * worth).sum().clamp(min=1e-6)
    overlap = (probability * target).sum(axes)[1:]
    size = (probability + target).sum(axes)[1:]
    shown = (counts[1:] > 0).to(logits.dtype)
    dice_loss = (shown * (1.0 - (2.0 * overlap + smooth) / (size + smooth))).sum() / shown.sum().clamp(min=1.0)
    return 0.5 * (cross_entropy + dice_loss)
