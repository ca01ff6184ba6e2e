"""What unlabelled scans are taught as: the label maps that a segmenter gives, on every grid, beside labelled scans."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small import like, phantom, write_pairs

from medmeta.data.store import prepare
from medmeta.data.tasks import Case
from medmeta.data.volume import write_volume
from medmeta.pseudo_labels import with_pseudo_labels
from medmeta.segmenter import Segmentation
from medmeta.support import prepare_support, support_task, with_unlabelled


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """A task of five phantoms, the second of its structures named first."""
    folder = write_pairs(tmp_path_factory.mktemp("scans"), cases=range(5))
    return support_task(folder / "images", folder / "labels", targets={"b": (2,), "a": (1,)})


def hidden(task, count):
    """The task with the label maps of all but its first `count` scans taken away, and its support."""
    cases = tuple(case if number < count else replace(case, labels=None) for number, case in enumerate(task.cases))
    task = replace(task, cases=cases)
    return task, with_unlabelled(prepare_support(task, 16**3, stride=2), task, seed=0)[0]


def knowing(task, support, asked):
    """A segmenter that gives the true labels of a phantom; `asked` notes what it is given."""
    labels = tuple(min(atom) for atom in task.atoms)
    truths = [phantom(2, number) for number in range(5)]

    def predict(scan, **options):
        asked.append(options)
        truth = next(truth for image, truth in truths if torch.equal(image.data, scan.data))
        return Segmentation(truth.data, truth.affine, {"b": 0.9, "a": 0.5})

    return SimpleNamespace(labels=labels, predict=predict, carry=lambda scan: scan.shape)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_what_is_right_is_taught_as_if_it_had_been_labelled(labelled, count):
    task, support = hidden(labelled, count)
    asked = []
    carried = {support.unlabelled[0].id: "known"}
    taught, expected = with_pseudo_labels(knowing(task, support, asked), task, support, carried, overlap=0.5)
    shapes = [truth.shape for number in range(5) for _, truth in [phantom(2, number)]]
    assert [each.pop("carried") for each in asked] == list(carried.values())
    assert carried.keys() == {case.id for case in support.unlabelled}
    assert set(carried.values()) <= {"known", *shapes}
    assert carried[support.unlabelled[0].id] == "known"
    assert asked == [{"overlap": 0.5}] * (5 - count)
    assert expected == pytest.approx(0.7)
    assert len(taught.views) == len(support.views) == 2
    for view in taught.views:
        assert len(view.cases) == 2 * max(count, 5 - count)
        originals = {case.id: prepare(labelled, case, view.preprocess) for case in labelled.cases}
        for case in view.cases:
            assert np.array_equal(case.mask, originals[case.id].mask)
            assert np.array_equal(case.image, originals[case.id].image)
            assert case.places.keys() == originals[case.id].places.keys()
    ids = [case.id for case in taught.cases]
    assert ids == [case.id for case in taught.overview.cases]
    known = {case.id for case in task.labelled.cases}
    assert [name in known for name in ids] == [True, False] * (len(ids) // 2)
    assert set(ids) == set(originals)


def test_the_labels_are_brought_to_each_grid_from_that_of_the_scan(labelled, tmp_path):
    # Sagittal slices stored upside down: the mask must turn with the scan.
    scan, truth = phantom(2, 4)
    flipped = scan.affine.clone()
    flipped[:3, 2] *= -1
    flipped[:3, 3] += scan.affine[:3, 2] * (scan.shape[2] - 1)
    turned = replace(like(scan, scan.data.flip(3)), affine=flipped)
    write_volume(turned, tmp_path / "turned.nii.gz")
    task, _ = hidden(labelled, 2)
    task = replace(task, cases=(*task.cases[:2], Case("turned", "turned", (tmp_path / "turned.nii.gz",), None)))
    support, _ = with_unlabelled(prepare_support(task, 16**3, stride=2), task, seed=0)
    found = Segmentation(truth.data.flip(3), turned.affine, {"b": 0.9, "a": 0.5})
    segmenter = SimpleNamespace(labels=(2, 1), predict=lambda scan, carried: found)
    segmenter.carry = lambda scan: None
    taught, _ = with_pseudo_labels(segmenter, task, support, {})
    straight = prepare(labelled, labelled.cases[4], support.preprocess)
    made = next(case for case in taught.cases if case.id == "turned")
    assert (made.mask == straight.mask).mean() > 0.999
    assert set(np.unique(made.mask)) == {0, 1, 2}


def test_a_structure_that_is_not_found_is_nothing_to_be_sure_of(labelled):
    task, support = hidden(labelled, 4)
    scan, truth = phantom(2, 4)
    segmenter = SimpleNamespace(labels=(2, 1), carry=lambda scan: None)
    for kept, expected in (([1, 2], 0.95), ([1], 0.5), ([2], 0.45), ([], 0.0)):
        data = torch.where(torch.isin(truth.data, torch.tensor(kept)), truth.data, 0)
        found = Segmentation(data, scan.affine, {"b": 0.9, "a": 1.0})
        segmenter.predict = lambda scan, carried, found=found: found
        assert with_pseudo_labels(segmenter, task, support, {})[1] == pytest.approx(expected)
