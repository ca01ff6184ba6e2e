"""The segmentation loss that every learner minimises."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from medmeta.episode import IGNORED


def dice_cross_entropy(logits: Tensor, mask: Tensor, *, smooth: float = 1.0) -> Tensor:
    """Mean of soft Dice loss and cross entropy over the voxels that count.

    Cross entropy keeps a gradient where Dice saturates; Dice keeps a small organ from drowning in background. The Dice
    term pools over the batch (Milletari 2016, eq. in section 3, one term per foreground class), so a crop without the
    organ does not divide by nothing.

    Args:
        logits: (N, 1+K, *S).
        mask: (N, *S) long, 0..K, -1 ignored.
        smooth: voxels added to numerator and denominator of the Dice term.

    Returns:
        A scalar, in float32 or wider.
    """
    # Counts of voxels and near-equal losses are lost in the 8 bits of a bfloat16, which autocast leaves on the CPU.
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    counted = mask != IGNORED
    target = functional.one_hot(mask.clamp(min=0), logits.shape[1]).movedim(-1, 1).to(logits.dtype)
    weight = counted.unsqueeze(1).to(logits.dtype)
    log_probability = torch.log_softmax(logits, dim=1)
    cross_entropy = -(target * log_probability * weight).sum() / weight.sum().clamp(min=1.0)
    axes = [0, *range(2, logits.ndim)]
    probability = log_probability.exp() * weight
    target = target * weight
    overlap = (probability * target).sum(axes)[1:]
    size = (probability + target).sum(axes)[1:]
    dice_loss = 1.0 - ((2.0 * overlap + smooth) / (size + smooth)).mean()
    return 0.5 * (cross_entropy + dice_loss)
