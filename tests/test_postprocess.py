from __future__ import annotations

import numpy as np
import pytest
import torch

from medmeta.inference import LEVELS
from medmeta.postprocess import CRUMB, Certainty, keep_largest, one_piece


def blobs(*corners, size=3, shape=(12, 12, 12)):
    mask = np.zeros(shape, dtype=np.int8)
    for corner in corners:
        mask[tuple(slice(start, start + size) for start in corner)] = 1
    return mask


def test_an_organ_is_one_piece_only_if_it_is_in_every_scan():
    one, two = blobs((1, 1, 1)), blobs((1, 1, 1), (8, 8, 8))
    assert one_piece([one, one], 1) == (1,)
    assert one_piece([one, two], 1) == ()
    assert one_piece([one], 2) == (1,), "nothing is known of a class that no scan holds"
    assert one_piece([np.where(one > 0, -1, 0)], 1) == ()
    # Voxels that touch at a corner are connected.
    assert one_piece([blobs((1, 1, 1), (4, 4, 4))], 1) == (1,)
    crumb = blobs((1, 1, 1), size=5)
    crumb[10, 10, 10] = 1
    assert one_piece([crumb], 1) == (1,), "a stray voxel of a hundred is the annotator's"


def test_only_the_largest_piece_of_the_chosen_values_stays():
    labels = torch.from_numpy(blobs((0, 0, 0), (6, 6, 6)) * 4).int().unsqueeze(0)
    labels[0, 6, 6, 9:11] = 4
    labels[0, 0, 11, 0], labels[0, 11, 0, 0] = 7, 7
    before = labels.clone()
    kept = keep_largest(labels, [4, 5])
    assert torch.equal(labels, before)
    assert not kept[0, :3, :3, :3].any()
    assert (kept[0, 6:9, 6:9, 6:9] == 4).all()
    assert torch.equal(kept == 7, labels == 7)


def watched(probabilities: torch.Tensor, **options) -> Certainty:
    certainty = Certainty(**options)
    list(certainty.watch([(0, probabilities)]))
    return certainty


def found(probabilities: torch.Tensor, levels: list[int]) -> torch.Tensor:
    """The class of each voxel, 0 where the background wins."""
    best = probabilities[1:].argmax(dim=0)
    wins = probabilities[1:].amax(dim=0) > probabilities[0] / 2 ** (torch.tensor(levels)[best] / 2)
    return torch.where(wins, best + 1, 0)


def test_certainty_counts_each_row_once_and_equals_the_whole():
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.rand(3, 10, 4, 4, dtype=torch.float64, generator=generator).mul(3).softmax(dim=0)
    bands = [(0, probabilities[:, :4]), (2, probabilities[:, 2:7]), (6, probabilities[:, 6:])]
    for best_dice in (False, True):
        certainty = Certainty(best_dice)
        assert [(first, rows.shape) for first, rows in certainty.watch(bands)] == [(f, r.shape) for f, r in bands]
        assert certainty.levels() == watched(probabilities, best_dice=best_dice).levels()
        best = found(probabilities, certainty.levels())
        for classes in ([1], [2], [1, 2]):
            inside = sum(float(probabilities[label][best == label].sum()) for label in classes)
            size = sum(int((best == label).sum()) for label in classes)
            mass = sum(float(probabilities[label][probabilities[label] > CRUMB].sum()) for label in classes)
            assert certainty.dice(classes) == pytest.approx(2 * inside / (size + mass))


@pytest.mark.parametrize("unsure", [1, 3, 8])
def test_labels_have_the_best_expected_dice_and_certainty_is_that_dice(unsure):
    """Truths are drawn from the probabilities; no level has a better Dice with them, the most probable class less."""
    generator = torch.Generator().manual_seed(0)
    foreground = torch.rand(30, 30, 30, generator=generator) ** unsure * 0.9
    probabilities = torch.stack([1 - foreground, foreground])
    truths = [torch.rand(foreground.shape, generator=generator) < foreground for _ in range(20)]

    def score(level: int) -> float:
        labels = found(probabilities, [level]) == 1
        return float(
            np.mean([2 * float((truth & labels).sum()) / float(truth.sum() + labels.sum()) for truth in truths])
        )

    chosen, plain = watched(probabilities), watched(probabilities, best_dice=False)
    assert score(chosen.levels()[0]) >= max(map(score, range(LEVELS))) - 0.005
    assert score(chosen.levels()[0]) > score(0) + 0.02
    assert plain.levels() == [0]
    # What counts as none makes both expect a little more than there is.
    assert chosen.dice([1]) == pytest.approx(score(chosen.levels()[0]), abs=0.03)
    assert plain.dice([1]) == pytest.approx(score(0), abs=0.03)


def test_crumbs_all_over_a_scan_are_no_organ():
    probabilities = torch.full((2, 40, 40, 40), 0.01)
    probabilities[1, :5, :5, :5] = 0.8
    probabilities[1, 5:8, :5, :5] = 0.3
    probabilities[0] = 1 - probabilities[1]
    assert watched(probabilities).levels() == [0]


def test_certainty_of_what_is_sure():
    sure = torch.zeros(2, 3, 3, 3)
    sure[0] = 1.0
    assert watched(sure).dice([1]) == 1.0
    assert watched(sure).levels() == [0]
    with pytest.raises(ValueError, match="no band"):
        Certainty().dice([1])
