from __future__ import annotations

import numpy as np
import pytest
import torch

from medmeta.postprocess import Certainty, keep_largest, one_piece


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


def test_certainty_counts_each_row_once_and_equals_the_whole():
    probabilities = torch.rand(3, 10, 4, 4, dtype=torch.float64).softmax(dim=0)
    bands = [(0, probabilities[:, :4]), (2, probabilities[:, 2:7]), (6, probabilities[:, 6:])]
    watched = Certainty()
    assert [(first, rows.shape) for first, rows in watched.watch(bands)] == [(f, rows.shape) for f, rows in bands]
    best = probabilities.argmax(dim=0)
    for classes in ([1], [2], [1, 2]):
        inside = sum(float(probabilities[label][best == label].sum()) for label in classes)
        size = sum(int((best == label).sum()) for label in classes)
        mass = sum(float(probabilities[label].sum()) for label in classes)
        assert watched.dice(classes) == pytest.approx(2 * inside / (size + mass))


def test_certainty_is_the_expected_dice_where_probabilities_are_right():
    generator = torch.Generator().manual_seed(0)
    foreground = torch.rand(30, 30, 30, generator=generator) ** 3
    watched = Certainty()
    list(watched.watch([(0, torch.stack([1 - foreground, foreground]))]))
    found = foreground > 0.5
    dices = []
    for _ in range(20):
        truth = torch.rand(foreground.shape, generator=generator) < foreground
        dices.append(2 * float((truth & found).sum()) / float(truth.sum() + found.sum()))
    assert watched.dice([1]) == pytest.approx(np.mean(dices), abs=0.01)


def test_certainty_of_what_is_sure():
    sure = torch.zeros(2, 3, 3, 3)
    sure[0] = 1.0
    watched = Certainty()
    list(watched.watch([(0, sure)]))
    assert watched.dice([1]) == 1.0
    with pytest.raises(ValueError, match="no band"):
        Certainty().dice([1])
