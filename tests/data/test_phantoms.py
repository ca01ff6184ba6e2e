from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from medmeta.data import phantoms
from medmeta.data.phantoms import PhantomTask, draw_scan, phantom_task, write_phantoms
from medmeta.data.tasks import load_task
from medmeta.data.volume import Volume, grid_difference, read_header, read_labels, read_volume
from medmeta.errors import InputError

SEEDS = (0, 1, 7)


def world(labels: Volume, value: int | None = None) -> np.ndarray:
    """World coordinates (n, 3) in mm of the labelled voxels."""
    grid = labels.data[0].numpy()
    index = np.argwhere(grid > 0 if value is None else grid == value)
    return index @ labels.affine.numpy()[:3, :3].T + labels.affine.numpy()[:3, 3]


def best_threshold_dice(image: np.ndarray, organ: np.ndarray) -> float:
    """Dice of the best intensity interval, both ends chosen with the reference in hand."""
    edges = np.unique(
        np.concatenate([np.quantile(image, np.linspace(0, 1, 80)), np.quantile(image[organ], np.linspace(0, 1, 40))])
    )
    below = np.concatenate([[0], np.cumsum(np.histogram(image, edges)[0])])
    below_organ = np.concatenate([[0], np.cumsum(np.histogram(image[organ], edges)[0])])
    chosen, hit = below[None] - below[:, None], below_organ[None] - below_organ[:, None]
    return float((2 * hit / (np.maximum(chosen, 0) + organ.sum())).max())


def test_best_threshold_dice_is_one_where_intensity_decides() -> None:
    organ = np.zeros(1000, dtype=bool)
    organ[300:400] = True
    image = np.where(organ, 50.0, np.where(np.arange(1000) < 300, 10.0, 90.0)) + np.linspace(0, 1, 1000)
    assert best_threshold_dice(image, organ) > 0.98


def test_a_scan_is_a_pure_function_of_seed_task_and_case() -> None:
    task = phantom_task(2, 5, size_mm=70)
    assert task == phantom_task(2, 5, size_mm=70)
    with pytest.raises(FrozenInstanceError):
        task.noise = 0.0  # type: ignore[misc]
    first, again = draw_scan(task, 3, 5), draw_scan(task, 3, 5)
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one.data, other.data)
        assert torch.equal(one.affine, other.affine)
    assert first[0].data.dtype == torch.float32
    assert first[1].data.dtype == torch.int16
    for other in (draw_scan(task, 4, 5), draw_scan(task, 3, 6)):
        assert other[0].data.shape != first[0].data.shape or not torch.equal(other[0].data, first[0].data)


def test_global_generators_play_no_part() -> None:
    task = phantom_task(1, 0, size_mm=60)
    np.random.seed(1)
    torch.manual_seed(1)
    state = np.random.get_state()[1].copy()
    image = draw_scan(task, 0, 0)[0]
    assert np.array_equal(state, np.random.get_state()[1])
    torch.manual_seed(2)
    assert torch.equal(image.data, draw_scan(task, 0, 0)[0].data)


@pytest.mark.parametrize("seed", SEEDS)
def test_tasks_differ_in_everything_a_learner_meets(seed: int) -> None:
    tasks = [phantom_task(index, seed) for index in range(6)]
    assert [task.modality for task in tasks] == ["CT", "MR"] * 3
    assert len({task.family for task in tasks}) == 6
    assert len({task.name for task in tasks}) == 6
    sizes = [task.size_mm for task in tasks]
    assert 14 <= min(sizes) <= 40 and 45 <= max(sizes) <= 91 and max(sizes) > 1.8 * min(sizes)
    assert {task.contrast > 0 for task in tasks} == {True, False}
    assert min(abs(task.contrast / task.noise) for task in tasks) < 4
    assert any(max(task.spacing) > 1.8 * min(task.spacing) for task in tasks)
    assert any(max(task.spacing) == min(task.spacing) for task in tasks)
    assert any(task.oblique_deg > 0 for task in tasks) and any(task.oblique_deg == 0 for task in tasks)
    assert {task.orientations[0] for task in tasks} == {"RAS", "LPS", "LAS"}
    assert {task.body for task in tasks} == {"trunk", "head"}


def test_both_numbers_of_structures_occur() -> None:
    counts = {len(phantom_task(index, seed).structures) for seed in SEEDS for index in range(6)}
    assert counts == {1, 2}


@pytest.mark.parametrize("codes", ["LPS", "PIR", "SLA"])
def test_the_stored_orientation_moves_nothing_in_the_world(codes: str) -> None:
    task = replace(phantom_task(0, 0, size_mm=70), orientations=("RAS",))
    image, labels = draw_scan(task, 1, 0)
    turned_image, turned_labels = draw_scan(replace(task, orientations=(codes,)), 1, 0)
    assert image.orientation == "RAS" and turned_image.orientation == turned_labels.orientation == codes
    assert np.allclose(world(labels).mean(0), world(turned_labels).mean(0), atol=1e-6)
    # Every voxel keeps its place: compare intensities in the order of world coordinates.
    order, turned_order = (np.lexsort(np.round(world_grid(v), 3).T) for v in (image, turned_image))
    assert torch.equal(image.data.flatten()[order], turned_image.data.flatten()[turned_order])


def world_grid(volume: Volume) -> np.ndarray:
    index = np.indices(volume.shape).reshape(3, -1).T
    return index @ volume.affine.numpy()[:3, :3].T + volume.affine.numpy()[:3, 3]


@pytest.mark.parametrize("change", [{"oblique_deg": 8.0}, {"spacing": (1.7, 1.7, 4.0)}, {"spacing": (3.0, 1.5, 1.5)}])
def test_another_grid_samples_the_same_anatomy(change: dict[str, object]) -> None:
    task = replace(phantom_task(3, 1), oblique_deg=0.0, spacing=(2.0, 2.0, 2.0))
    labels, other = draw_scan(task, 0, 1)[1], draw_scan(replace(task, **change), 0, 1)[1]
    assert grid_difference(labels, other) is not None
    for value in range(1, len(task.structures) + 1):
        one, two = world(labels, value), world(other, value)
        assert np.linalg.norm(one.mean(0) - two.mean(0)) < 0.6
        volumes = [len(points) * np.prod(v.spacing) for points, v in ((one, labels), (two, other))]
        assert volumes[0] == pytest.approx(volumes[1], rel=0.06)


def test_intensities_are_those_of_the_modality() -> None:
    ct, mr = draw_scan(phantom_task(0, 0), 0, 0)[0].data, draw_scan(phantom_task(1, 0), 0, 0)[0].data
    assert ct.min() >= -1024 and 300 < ct.max() < 1500
    assert -1010 < np.median(ct[ct < -700]) < -990
    assert mr.min() >= 0 and 100 < mr.max() < 4000
    for image in (ct, mr):
        assert torch.equal(image, image.round())


def volumes_mm3(task: PhantomTask, labels: Volume) -> list[float]:
    return [len(world(labels, value)) * np.prod(labels.spacing) for value in range(1, len(task.structures) + 1)]


@pytest.mark.parametrize("seed", SEEDS)
def test_every_structure_is_in_every_scan_with_a_plausible_volume(seed: int) -> None:
    for task in (phantom_task(index, seed) for index in range(6)):
        drawn = [draw_scan(task, case, seed) for case in range(2)]
        organs = 2 if task.family == "paired" else 1
        for image, labels in drawn:
            assert grid_difference(image, labels) is None
            assert set(labels.data.unique().tolist()) == set(range(len(task.structures) + 1))
            # A ball fills 0.52 of the cube around it, a rounded box more, a thin tube a fiftieth.
            share = sum(volumes_mm3(task, labels)) / (organs * task.size_mm**3)
            assert 0.01 < share < 0.75
            assert min(volumes_mm3(task, labels)) > 20 * np.prod(labels.spacing)
        first, second = (np.array(volumes_mm3(task, labels)) for _, labels in drawn)
        assert (first != second).all() and (np.abs(np.log(first / second)) < np.log(3.3)).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_intensity_alone_does_not_find_the_organ(seed: int) -> None:
    dice = []
    for task in (phantom_task(index, seed) for index in range(6)):
        image, labels = draw_scan(task, 2, seed)
        dice.append(best_threshold_dice(image.data.numpy().ravel(), labels.data.numpy().ravel() > 0))
    assert np.median(dice) < 0.6 and max(dice) < 0.85


@pytest.mark.parametrize("seed", SEEDS)
def test_the_organ_has_a_place_and_an_appearance(seed: int) -> None:
    for task in (phantom_task(index, seed) for index in (0, 1)):
        places, signs = [], []
        for case in range(4):
            image, labels = draw_scan(replace(task, bias=0.0), case, seed)
            middle = (np.array(image.shape) - 1) / 2 @ image.affine.numpy()[:3, :3].T + image.affine.numpy()[:3, 3]
            places.append(world(labels, 1).mean(0) - middle)
            organ = image.data[labels.data == 1].median()
            scale = float(organ) / (task.tissue + task.contrast) if task.modality == "MR" else 1.0
            signs.append(float(organ) / scale - task.tissue)
        assert np.linalg.norm(np.std(places, axis=0)) < 0.1 * task.field_mm
        assert (np.sign(signs) == np.sign(task.contrast)).all()


def test_written_tasks_load_as_decathlon_folders(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    folders = write_phantoms(
        tmp_path / "new" / "phantoms", tasks=3, cases=4, size_mm=60, progress=lambda *at: seen.append(at)
    )
    assert seen == [(i, 12) for i in range(1, 13)]
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["phantoms"]
    organs, orientations = set(), set()
    for index, folder in enumerate(folders):
        drawn = phantom_task(index, 0, size_mm=60)
        assert folder == tmp_path / "new" / "phantoms" / drawn.name
        text = json.loads((folder / "dataset.json").read_text())
        assert "CC0" in text["licence"] and text["numTraining"] == 4 and text["tensorImageSize"] == "3D"
        task = load_task(folder)
        organs.add(task.organ)
        assert task.modality == drawn.modality
        assert task.targets == {name: (i,) for i, name in enumerate(drawn.structures, start=1)}
        assert [case.images[0].name for case in task.cases] == [f"phantom_{i:03d}.nii.gz" for i in range(4)]
        assert len(task.patients) == 4
        for number, case in enumerate(task.cases):
            image, labels = draw_scan(drawn, number, 0)
            assert torch.equal(read_volume(case.images[0]).data, image.data)
            assert torch.equal(read_labels(case.labels).data, labels.data)
            assert grid_difference(read_header(case.images[0]), image, tolerance_mm=0.01) is None
            assert grid_difference(read_header(case.images[0]), read_header(case.labels)) is None
            orientations.add(image.orientation)
    assert len(organs) == 3
    assert "RAS" in orientations and len(orientations) >= 3


def test_a_scan_does_not_depend_on_how_many_are_written(tmp_path: Path) -> None:
    few = write_phantoms(tmp_path / "few", tasks=1, cases=1, seed=3, size_mm=60)[0]
    many = write_phantoms(tmp_path / "many", tasks=2, cases=2, seed=3, size_mm=60)[0]
    assert few.name == many.name
    for part in ("imagesTr", "labelsTr"):
        one, other = (read_volume(folder / part / "phantom_000.nii.gz") for folder in (few, many))
        assert torch.equal(one.data, other.data) and torch.equal(one.affine, other.affine)


def test_an_empty_folder_is_used_and_a_full_one_left_alone(tmp_path: Path) -> None:
    target = tmp_path / "phantoms"
    target.mkdir()
    write_phantoms(target, tasks=1, cases=1, size_mm=60)
    before = sorted(str(p) for p in tmp_path.rglob("*"))
    with pytest.raises(InputError, match="phantoms: found a folder with files in it"):
        write_phantoms(target, tasks=1, cases=1, size_mm=60)
    assert sorted(str(p) for p in tmp_path.rglob("*")) == before
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file: found a file"):
        write_phantoms(tmp_path / "file", tasks=1, cases=1)
    with pytest.raises(InputError, match="a folder that can be written"):
        write_phantoms(tmp_path / "file" / "below", tasks=1, cases=1)


@pytest.mark.parametrize(
    "wrong", [{"tasks": 0}, {"cases": 0}, {"seed": -1}, {"size_mm": 10.0}, {"size_mm": float("nan")}]
)
def test_numbers_out_of_range_are_refused(tmp_path: Path, wrong: dict[str, float]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        write_phantoms(tmp_path / "phantoms", **wrong)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [OSError("No space left on device"), KeyboardInterrupt()])
def test_nothing_is_left_of_a_broken_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    whole = phantoms.write_volume
    calls = []

    def full_disk(volume: Volume, path: Path) -> None:
        calls.append(path)
        if len(calls) > 3:
            raise error
        whole(volume, path)

    monkeypatch.setattr(phantoms, "write_volume", full_disk)
    with pytest.raises(InputError if isinstance(error, OSError) else KeyboardInterrupt):
        write_phantoms(tmp_path / "phantoms", tasks=1, cases=3, size_mm=60)
    assert len(calls) == 4 and not list(tmp_path.iterdir())
