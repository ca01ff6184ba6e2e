"""From folders to prepared scans: which task they make, on which grids, with which unlabelled scans."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small import like, nifti, phantom, write_pairs

import medmeta.support
from medmeta.data.tasks import Case, Task, pair_folders
from medmeta.data.volume import write_volume
from medmeta.errors import InputError
from medmeta.support import guess_modality, prepare_support, support_task, with_unlabelled

TWO = {"anterior": (1,), "posterior": (2,)}


@pytest.fixture(scope="module")
def support(tmp_path_factory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("support"))


@pytest.fixture(scope="module")
def task(support) -> Task:
    return support_task(support / "images", support / "labels", targets=TWO)


def test_a_patch_that_shows_little_of_a_scan_has_an_overview(task):
    support = prepare_support(task, 16**3, stride=2)
    fine, coarse = support.preprocess.spacing, support.overview.preprocess.spacing
    assert all(c == pytest.approx(max(f, 2 * min(fine)), abs=1e-3) for f, c in zip(fine, coarse, strict=True))

    def seen(view):
        return math.prod(view.patch) / view.cases[0].mask.size

    assert seen(support) < 0.25
    assert seen(support.overview) > 2 * seen(support)
    assert [case.id for case in support.overview.cases] == [case.id for case in support.cases]
    assert prepare_support(task, 64**3, stride=2).overview is None
    assert support.only([]).overview.cases == ()


def test_there_is_no_overview_of_what_is_lost_on_a_coarser_grid(tmp_path):
    write_pairs(tmp_path, cases=(0, 1))
    scan, labels = phantom(2, 0)
    data = torch.where(labels.data == 1, 1, 0)
    middle = [size // 2 + 1 for size in labels.shape]
    data[(0, *middle)] = 2
    write_volume(like(labels, data), tmp_path / "labels" / "case0.nii.gz")
    task = support_task(tmp_path / "images", tmp_path / "labels", targets=TWO)
    native = prepare_support(task, 16**3, stride=2).preprocess
    spacing = tuple(float(side) for side in scan.affine[:3, :3].norm(dim=0))
    support = prepare_support(task, 16**3, stride=2, preprocess=replace(native, spacing=spacing))
    assert 2 in support.cases[0].places
    assert support.overview is None


def test_modality_is_told_from_the_scans(tmp_path):
    for index, modality in ((2, "CT"), (1, "MR")):
        folder = write_pairs(tmp_path / modality, index)
        assert support_task(folder / "images", folder / "labels").modality == modality
        other = "MR" if modality == "CT" else "CT"
        assert support_task(folder / "images", folder / "labels", modality=other).modality == other


@pytest.mark.parametrize(
    ("values", "modality"),
    [
        ([0.0, 900.0], "MR"),
        ([-3.0, 3.0], "MR"),
        ([-1000.0, 2000.0], "CT"),
        ([math.nan, 500.0], "MR"),
        ([-math.inf, 500.0], "MR"),
        ([math.nan, -1024.0], "CT"),
    ],
)
def test_modality_from_intensities(values, modality, tmp_path):
    path = nifti(tmp_path / "a.nii.gz", np.resize(np.array(values, dtype=np.float32), (3, 3, 3)))
    task = Task("t", "o", "MR", {"o": (1,)}, (Case("a", "a", (path,), None),))
    assert guess_modality(task) == modality


def test_unlabelled_scans_are_listed_without_those_of_the_support(support, tmp_path):
    (tmp_path / "all").mkdir()
    for case in (1, 2, 3):
        write_volume(phantom(2, case)[0], tmp_path / "all" / f"case{case}.nii.gz")
    shutil.copytree(support / "labels", tmp_path / "labels")
    (tmp_path / "labels" / "case0.nii.gz").unlink()
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "case1.nii.gz").symlink_to(tmp_path / "all" / "case1.nii.gz")
    task = support_task(tmp_path / "images", tmp_path / "labels", targets=TWO, unlabelled=[tmp_path / "all"])
    assert [case.id for case in task.cases] == ["case1", "unlabelled/case2", "unlabelled/case3"]
    assert [case.labels is None for case in task.cases] == [False, True, True]
    with pytest.raises(InputError, match="nothing at this path"):
        support_task(tmp_path / "images", tmp_path / "labels", targets=TWO, unlabelled=[tmp_path / "none"])


def test_at_most_so_many_unlabelled_scans_are_read(task, monkeypatch):
    monkeypatch.setattr(medmeta.support, "UNLABELLED", 2)
    many = [Case(f"new{number}", f"new{number}", task.cases[0].images, None) for number in range(5)]
    task = replace(task, cases=(*task.cases, *many))
    support = prepare_support(task, 16**3, stride=2)
    drawn = [tuple(case.id for case in with_unlabelled(support, task, seed)[0].unlabelled) for seed in (0, 0, 1, 2, 3)]
    assert all(len(set(ids)) == 2 for ids in drawn)
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) > 1


def test_pairing_is_that_of_the_tasks(support, task):
    paired = pair_folders(support / "images", support / "labels", targets=TWO, modality="CT")
    assert (paired.cases, paired.targets, paired.modality) == (task.cases, task.targets, task.modality)


def test_thick_slices_are_learned_one_by_one_beside_the_volume(task, tmp_path):
    volume = prepare_support(task, 16**3, stride=2)
    support = prepare_support(task, 16**3, stride=2, sliced=True)
    assert volume.preprocess.thick
    assert not volume.sliced
    assert support.sliced
    assert support.patch[support.preprocess.across] == 1
    assert support.overview.preprocess == volume.preprocess
    assert support.overview.patch == volume.patch
    assert support.overview.overview is None
    even = support_task(*(write_pairs(tmp_path, index=1) / part for part in ("images", "labels")))
    assert not prepare_support(even, 16**3, stride=2).preprocess.thick
    assert not prepare_support(even, 16**3, stride=2, sliced=True).sliced
