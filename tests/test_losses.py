from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from medmeta.losses import dice_cross_entropy


@pytest.fixture
def logits(generator) -> torch.Tensor:
    return torch.randn(2, 4, 5, 6, 3, generator=generator, dtype=torch.float64)


@pytest.fixture
def mask(generator) -> torch.Tensor:
    return torch.randint(0, 4, (2, 5, 6, 3), generator=generator)


def test_against_monai_and_torch(logits, mask) -> None:
    from monai.losses import DiceLoss

    dice = DiceLoss(include_background=False, softmax=True, to_onehot_y=True, batch=True, smooth_nr=1.0, smooth_dr=1.0)
    expected = 0.5 * (functional.cross_entropy(logits, mask) + dice(logits, mask.unsqueeze(1)))
    torch.testing.assert_close(dice_cross_entropy(logits, mask), expected)


def test_dice_counts_the_classes_that_are_shown(logits, mask) -> None:
    """Oracle: MONAI's Dice of the shown classes alone."""
    from monai.losses import DiceLoss

    mask = mask.masked_fill(mask == 2, 0)
    exact = functional.one_hot(mask, 4).movedim(-1, 1).to(logits.dtype)
    both = DiceLoss(batch=True, smooth_nr=1.0, smooth_dr=1.0)(logits.softmax(dim=1)[:, [1, 3]], exact[:, [1, 3]])
    torch.testing.assert_close(dice_cross_entropy(logits, mask), 0.5 * (functional.cross_entropy(logits, mask) + both))


@pytest.mark.parametrize("balance", [0.5, 1.0])
def test_balance_weighs_classes_as_torch_does(logits, mask, balance) -> None:
    weight = torch.bincount(mask.flatten(), minlength=4).double() ** -balance
    dice = 2 * dice_cross_entropy(logits, mask) - functional.cross_entropy(logits, mask)
    expected = 0.5 * (functional.cross_entropy(logits, mask, weight) + dice)
    torch.testing.assert_close(dice_cross_entropy(logits, mask, balance=balance), expected)


def test_ignored_voxels_do_not_count(logits, mask, generator) -> None:
    """Oracle: the loss of the counted voxels alone, laid out in one row."""
    counted = torch.rand(mask.shape, generator=generator) < 0.6
    alone = logits.movedim(1, -1)[counted].T.reshape(1, 4, 1, -1)
    expected = dice_cross_entropy(alone, mask[counted].reshape(1, 1, -1))
    logits.requires_grad_()
    loss = dice_cross_entropy(logits, mask.masked_fill(~counted, -1))
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert torch.equal((logits.grad != 0).any(dim=1), counted)


def test_all_ignored_gives_no_gradient(logits) -> None:
    logits.requires_grad_()
    loss = dice_cross_entropy(logits, torch.full((2, 5, 6, 3), -1))
    loss.backward()
    assert loss == 0
    assert not logits.grad.any()


def test_better_is_less(mask) -> None:
    exact = functional.one_hot(mask, 4).movedim(-1, 1).double()
    losses = [float(dice_cross_entropy(scale * exact, mask)) for scale in (-20, 0, 1, 5, 40)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] == pytest.approx(0, abs=1e-6)


def test_permuted_classes_and_voxels_change_nothing(logits, mask, generator) -> None:
    loss = dice_cross_entropy(logits, mask)
    order = torch.tensor([0, 3, 1, 2])
    torch.testing.assert_close(dice_cross_entropy(logits[:, order], order.argsort()[mask]), loss)
    torch.testing.assert_close(dice_cross_entropy(logits.flip(0, 2), mask.flip(0, 1)), loss)


def test_absent_classes_and_huge_logits_stay_finite() -> None:
    for scale in (0.0, 1e4, -1e4):
        logits = torch.full((1, 3, 4, 4), 0.0)
        logits[:, 1] = scale
        logits.requires_grad_()
        loss = dice_cross_entropy(logits, torch.zeros(1, 4, 4, dtype=torch.long))
        loss.backward()
        assert loss.isfinite()
        assert logits.grad.isfinite().all()


def test_gradient_against_finite_differences(logits, mask) -> None:
    logits, mask = logits[..., :2, :2, :2].clone().requires_grad_(), mask[..., :2, :2, :2].clone()
    mask[0, 0, 0, 0] = -1
    assert torch.autograd.gradcheck(lambda given: dice_cross_entropy(given, mask), logits)
    assert torch.autograd.gradgradcheck(lambda given: dice_cross_entropy(given, mask), logits)


def test_half_precision_logits_lose_nothing_on_the_way(generator) -> None:
    """A loss in bfloat16 would have 8 bits, and count voxels to a part in 256."""
    logits = torch.randn(1, 3, 17, 17, 17, generator=generator).bfloat16()
    mask = torch.randint(-1, 3, (1, 17, 17, 17), generator=generator)
    with torch.autocast("cpu", torch.bfloat16):
        loss = dice_cross_entropy(logits, mask)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, dice_cross_entropy(logits.float(), mask))
