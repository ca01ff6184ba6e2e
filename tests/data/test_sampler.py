"""Oracles: images that carry their own patient, place or class, so that a patch tells where it was drawn."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from medmeta.data.preprocess import Preprocess
from medmeta.data.sampler import (
    FOREGROUND,
    FURTHEST,
    Augment,
    EpisodeSampler,
    copy_paste,
    draw_brightness,
    draw_contrast,
    draw_patch,
)
from medmeta.data.store import StoredCase, StoredTask, find_places, fit_preprocess, prepare
from medmeta.data.tasks import load_task
from medmeta.episode import IGNORED, Episode

PATCH = (16, 16, 8)


def a_case(mask: np.ndarray, image: np.ndarray | None = None, *, patient="p", name="c", classes=3) -> StoredCase:
    image = mask[None] if image is None else image
    mask = mask.astype(np.int8)
    return StoredCase(name, patient, image.astype(np.float16), mask, find_places(mask, classes))


def a_task(cases, *, name="task", classes=3, patch=PATCH, modality="CT", spacing=(1.0, 1.0, 1.0)) -> StoredTask:
    window = (-200.0, 200.0) if modality == "CT" else None
    return StoredTask(name, classes, patch, tuple(cases), Preprocess(modality, spacing, window))


def blocks(shape=(24, 24, 16), classes=3) -> np.ndarray:
    """A block of each class, side by side."""
    mask = np.zeros(shape, dtype=np.int64)
    for label in range(1, classes + 1):
        mask[6 * label - 3 : 6 * label + 1, 8:16, 5:11] = label
    return mask


def patients(count=5, scans=2, **options) -> StoredTask:
    """Each image is everywhere the number of its patient."""
    mask = blocks()
    return a_task(
        [
            a_case(mask, np.full((1, *mask.shape), patient), patient=f"p{patient}", name=f"p{patient}_{scan}")
            for patient in range(count)
            for scan in range(scans)
        ],
        **options,
    )


def tensors(episode: Episode) -> list[torch.Tensor]:
    return [part for half in (episode.support, episode.query) for part in (half.image, half.mask)]


def equal(a: Episode, b: Episode) -> bool:
    return a.task == b.task and all(torch.equal(x, y) for x, y in zip(tensors(a), tensors(b), strict=True))


def test_an_episode_depends_on_seed_and_index_alone():
    tasks = [patients(name="ct"), patients(name="mr", modality="MR")]
    options = {"ways": 2, "mirror": True, "shots": 2, "queries": 1}
    straight = EpisodeSampler(tasks, seed=3, **options)
    first = [straight[index] for index in range(8)]
    shuffled = EpisodeSampler(tasks, seed=3, **options)
    torch.manual_seed(77)
    np.random.seed(77)
    for index in (5, 100, 0, 7, 5, 2):
        drawn = shuffled[index]
        if index < 8:
            assert equal(drawn, first[index])
    assert {episode.task for episode in first} == {"ct", "mr"}
    assert not equal(first[0], first[1])
    assert not any(equal(first[index], EpisodeSampler(tasks, seed=4, **options)[index]) for index in range(8))


def test_drawing_leaves_the_global_generators_alone():
    sampler = EpisodeSampler([patients(modality="MR")], mirror=True)
    torch_before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    for index in range(10):
        sampler[index]
    assert torch.equal(torch.get_rng_state(), torch_before)
    assert np.array_equal(np.random.get_state()[1], numpy_before)


@pytest.mark.parametrize(("count", "shots", "queries"), [(5, 2, 2), (2, 3, 3), (4, 5, 1), (6, 1, 5)])
def test_support_and_query_never_share_a_patient(count, shots, queries):
    sampler = EpisodeSampler([patients(count)], shots=shots, queries=queries, augment=False)
    seen = set()
    for index in range(40):
        episode = sampler[index]
        support, query = ([int(x) for x in half.image[:, 0, 0, 0, 0]] for half in (episode.support, episode.query))
        assert (len(support), len(query)) == (shots, queries)
        assert not set(support) & set(query)
        available = min(shots, count - 1)
        assert len(set(support)) == available, "another patient each while there are enough"
        seen |= set(query)
    assert seen == set(range(count))


def test_too_few_patients_or_nothing_to_draw_is_refused():
    with pytest.raises(ValueError, match=r"task task has 1 patient.*at least 2"):
        EpisodeSampler([patients(1)])
    with pytest.raises(ValueError, match="at least one of each"):
        EpisodeSampler([])
    with pytest.raises(ValueError, match="shots=0"):
        EpisodeSampler([patients()], shots=0)


def labelled(count=4) -> StoredTask:
    """Each image is the number of the class that lies there."""
    return a_task([a_case(blocks(), patient=str(number), name=str(number)) for number in range(count)])


def test_without_ways_every_class_keeps_its_number():
    sampler = EpisodeSampler([labelled()], shots=3, queries=3, augment=False)
    for index in range(10):
        for half in (sampler[index].support, sampler[index].query):
            assert half.classes == 3
            assert torch.equal(half.mask, half.image[:, 0].long())


def test_ways_choose_classes_alike_in_support_and_query():
    sampler = EpisodeSampler([labelled()], shots=3, queries=3, ways=2, augment=False)
    chosen = set()
    for index in range(60):
        episode = sampler[index]
        assert episode.support.classes == episode.query.classes <= 2
        image, mask = (
            torch.cat([getattr(half, name).flatten() for half in (episode.support, episode.query)])
            for name in ("image", "mask")
        )
        numbers = {label: set(mask[image == label].tolist()) for label in range(4)}
        # One number for each class everywhere, none twice, all others background.
        assert all(len(found) <= 1 for found in numbers.values())
        kept = [label for label in range(1, 4) if numbers[label] not in (set(), {0})]
        renumbered = [numbers[label].pop() for label in kept]
        assert len(set(renumbered)) == len(renumbered)
        assert set(renumbered) <= set(range(1, episode.support.classes + 1))
        chosen.add(tuple(label for _, label in sorted(zip(renumbered, kept, strict=True))))
    assert {(1,), (2,), (3,), (1, 2), (2, 1), (3, 1)} <= chosen


def test_every_class_of_an_episode_is_looked_for():
    sampler = EpisodeSampler([labelled()], shots=3, queries=3, augment=False)
    found = torch.stack([torch.bincount(sampler[index].support.mask.clamp(min=0).flatten(), minlength=4) > 0
                         for index in range(30)])  # fmt: skip
    assert (found.float().mean(dim=0) > 0.9).all()


def test_an_organ_of_a_thousandth_is_found():
    mask = np.zeros((64, 64, 64), dtype=np.int64)
    mask[50:56, 9:15, 30:36] = 1
    assert mask.mean() < 0.001
    case = a_case(mask, classes=1)
    rng = np.random.default_rng(0)
    with_organ = np.mean([bool((draw_patch(case, (16, 16, 16), rng)[1] == 1).any()) for _ in range(300)])
    assert FOREGROUND - 0.08 < with_organ < FOREGROUND + 0.1
    # And off the middle, so that its place gives nothing away.
    centres = [where.double().mean(dim=0) for where in
               ((draw_patch(case, (16, 16, 16), rng)[1] == 1).nonzero() for _ in range(100)) if len(where)]  # fmt: skip
    assert float(torch.stack(centres).std(dim=0).min()) > 1.5


def test_a_rare_class_is_found_as_often_as_a_common_one():
    mask = np.zeros((48, 48, 16), dtype=np.int64)
    mask[4:24, 4:44, 2:14] = 1
    mask[44, 44, 8] = 2
    case, rng = a_case(mask), np.random.default_rng(1)
    rare = np.mean([bool((draw_patch(case, PATCH, rng)[1] == 2).any()) for _ in range(300)])
    assert rare > FOREGROUND / 2 - 0.08
    only = np.mean([bool((draw_patch(case, PATCH, rng, labels=[2])[1] == 2).any()) for _ in range(200)])
    assert only > FOREGROUND - 0.1


def test_a_scan_without_the_class_is_drawn_anywhere():
    case, rng = a_case(np.zeros((20, 20, 20))), np.random.default_rng(0)
    image, mask = draw_patch(case, PATCH, rng, labels=[1])
    assert image.shape == (1, *PATCH)
    assert mask.shape == PATCH
    assert not mask.any()


def test_patches_reach_every_corner_and_stay_inside():
    where = np.arange(12**3).reshape(12, 12, 12)
    places = np.stack(np.indices(where.shape))
    case = StoredCase("c", "p", places.astype(np.float16), np.zeros(where.shape, dtype=np.int8), {})
    seen = np.zeros(where.size, dtype=bool)
    rng = np.random.default_rng(0)
    for _ in range(800):
        image, mask = draw_patch(case, (6, 6, 6), rng)
        x, y, z = image.long()
        assert (x.diff(dim=0) == 1).all()
        assert (z.diff(dim=2) == 1).all()
        assert (mask == 0).all()
        seen[where[x, y, z].ravel()] = True
    assert seen.all()


def test_padding_repeats_the_edge_and_is_ignored():
    mask = np.ones((5, 30, 3), dtype=np.int64)
    image = np.stack(np.indices(mask.shape)) + 1.0
    image, drawn = draw_patch(a_case(mask, image), (8, 16, 8), np.random.default_rng(2))
    assert image.shape == (3, 8, 16, 8)
    inside = drawn != IGNORED
    assert int(inside.sum()) == 5 * 16 * 3
    assert set(drawn.unique().tolist()) == {IGNORED, 1}
    assert image[0].unique().tolist() == [1, 2, 3, 4, 5]
    first = int((image[0, :, 0, 0] == 1).sum())
    assert torch.equal(inside.any(dim=2).any(dim=1).nonzero().flatten(), torch.arange(first - 1, first + 4))


def a_ball(shape=(32, 32, 32), radius=9.0, centre=(15.5, 13.0, 17.0)) -> torch.Tensor:
    index = torch.stack(torch.meshgrid(*map(torch.arange, shape), indexing="ij")).double()
    return ((index - torch.tensor(centre).reshape(3, 1, 1, 1)) ** 2).sum(dim=0) < radius**2


def overlap(a: torch.Tensor, b: torch.Tensor) -> float:
    return 2 * float((a & b).sum()) / float(a.sum() + b.sum())


@pytest.mark.parametrize(("modality", "spacing"), [("CT", (1.0, 1.0, 1.0)), ("MR", (1.0, 1.0, 3.0))])
def test_augmentation_moves_image_and_mask_together(modality, spacing):
    augment, rng = Augment((32, 32, 32), spacing, modality), np.random.default_rng(0)
    ball = a_ball() | a_ball(radius=4.0, centre=(26.0, 26.0, 10.0))
    moved = []
    for _ in range(25):
        image, mask = augment(ball.float()[None] * 4 - 2, ball.long(), rng)
        assert image.shape == (1, 32, 32, 32)
        assert image.dtype == torch.float32
        assert mask.dtype == torch.long
        assert type(image) is torch.Tensor
        assert type(mask) is torch.Tensor
        counted = mask != IGNORED
        bright = (image[0] > (image[0][mask == 1].median() + image[0][mask == 0].median()) / 2) & counted
        assert overlap(bright, mask == 1) > 0.85
        moved.append(overlap(mask == 1, ball))
    assert min(moved) < 0.9, "or it would prove nothing"
    assert max(moved) == 1.0, "some patches keep their pose"


@pytest.mark.parametrize("between", [4.0, 0.5])
def test_slices_of_another_thickness_turn_only_within_their_plane(between):
    augment, rng = Augment((24, 24, 24), (1.0, 1.0, between), "CT"), np.random.default_rng(0)
    slab = torch.zeros(24, 24, 24, dtype=torch.long)
    slab[:, :, :12] = 1
    for _ in range(20):
        _, mask = augment(torch.zeros(1, 24, 24, 24), slab, rng)
        columns = [mask[:, :, z][mask[:, :, z] != IGNORED] for z in range(24)]
        assert all(len(column.unique()) <= 1 for column in columns), "a flat border stays flat"


def test_bending_moves_every_part_another_way_and_none_far():
    augment, rng = Augment((32, 32, 32), (1.0, 1.0, 1.0), "CT", bend=0.8), np.random.default_rng(0)
    augment._compose.transforms = augment._compose.transforms[:1]
    grid = torch.stack(torch.meshgrid(*[torch.arange(32.0)] * 3, indexing="ij"))
    blocks = (grid // 4).long()
    number = blocks[0] * 64 + blocks[1] * 8 + blocks[2]
    still, deformed = 0, 0
    for _ in range(20):
        came_from, mask = augment(grid, number, rng)
        moved = (came_from - grid)[:, 1:-1, 1:-1, 1:-1]
        assert moved.abs().max() <= FURTHEST * 31 + 1e-3
        if moved.abs().max() < 1e-3:
            still += 1
            continue
        deformed += 1
        assert (moved.flatten(1).std(dim=1) > 0.2).all(), "no mere shift"
        assert (torch.diff(came_from, dim=1)[0] > -1e-3).all(), "nothing folds"
        # A label comes from the voxel nearest to where the image comes from.
        inside = came_from.round().long() // 4
        assert (mask == inside[0] * 64 + inside[1] * 8 + inside[2]).float().mean() > 0.999
    assert still >= 1
    assert deformed >= 10


def test_ignored_voxels_stay_ignored():
    augment, rng = Augment((32, 32, 32), (1.0, 1.0, 1.0), "CT"), np.random.default_rng(0)
    ball, core = a_ball(), a_ball(radius=4.0)
    mask = torch.where(ball, IGNORED, 0)
    mask[core] = 1
    for _ in range(25):
        image, made = augment(ball.float()[None] * 4 - 2, mask, rng)
        assert set(made.unique().tolist()) <= {IGNORED, 0, 1}
        background = made == 0
        level = (image[0][made == 1].median() + image[0][background].median()) / 2
        bright = image[0] > level
        # Nothing of the ignored shell turned into background, up to a rim where two voxels are mixed.
        assert float((bright & background).sum()) < 0.12 * float(bright.sum())
        assert 0.5 < float((made == 1).sum()) / float(core.sum()) < 2


def test_what_comes_in_from_outside_is_ignored():
    augment, rng = Augment((16, 16, 16), (1.0, 1.0, 1.0), "CT"), np.random.default_rng(0)
    made = [augment(torch.zeros(1, 16, 16, 16), torch.ones(16, 16, 16, dtype=torch.long), rng)[1] for _ in range(20)]
    assert set(torch.stack(made).unique().tolist()) == {IGNORED, 1}, "never background"


def test_mirroring_is_one_for_the_whole_episode():
    places = np.stack(np.indices((24, 24, 16))) + 1.0
    mask = (places[0] > 9).astype(np.int64) + (places[2] > 8)
    task = a_task([a_case(mask, places, patient=str(n), classes=2) for n in range(4)], classes=2)
    sampler = EpisodeSampler([task], shots=2, queries=2, mirror=True, augment=False)
    seen = set()
    for index in range(40):
        episode = sampler[index]
        directions = set()
        for half in (episode.support, episode.query):
            for image, drawn in zip(half.image, half.mask, strict=True):
                directions.add(tuple(int(image[axis].diff(dim=axis).unique().item()) for axis in range(3)))
                assert torch.equal(drawn, (image[0] > 9).long() + (image[2] > 8)), "the mask goes with its image"
        assert len(directions) == 1
        seen |= directions
    assert seen == set(itertools.product((-1, 1), repeat=3))
    plain = EpisodeSampler([task], augment=False)[0].support.image[0]
    assert all(int(plain[axis].diff(dim=axis).unique().item()) == 1 for axis in range(3))


def test_every_task_is_drawn():
    sampler = EpisodeSampler([patients(name=name) for name in "abc"], augment=False)
    counts = [sum(sampler[index].task == name for index in range(150)) for name in "abc"]
    assert min(counts) > 30


@pytest.mark.parametrize(
    ("folder", "pattern", "channels"),
    [
        ("Task04_Hippocampus", None, 1),
        ("ACDC_CardiacCine", "^(.*)_frame", 1),
        ("BRATS2015_BrainTumour", None, 2),
        ("STS_CT_Sarcoma", None, 1),
    ],
)
def test_real_sets(shared_data, folder, pattern, channels):
    whole = load_task(shared_data / folder, patient_pattern=pattern)
    task = whole.labelled.of_patients(whole.labelled.patients[:2])
    preprocess = fit_preprocess(task)
    cases = tuple(prepare(task, case, preprocess) for case in task.cases)
    patch = preprocess.patch(24**3, [case.mask.shape for case in cases])
    sampler = EpisodeSampler([StoredTask(task.name, task.classes, patch, cases, preprocess)], shots=1, queries=1)
    organ = 0
    for index in range(6):
        episode = sampler[index]
        assert episode.support.channels == channels
        assert episode.support.image.shape[2:] == patch
        assert all(half.image.isfinite().all() for half in (episode.support, episode.query))
        organ += int((episode.support.mask > 0).any())
    assert organ >= 3
    assert equal(sampler[2], EpisodeSampler(sampler.tasks, shots=1, queries=1)[2])


def test_another_contrast_is_a_map_of_intensities_of_each_channel():
    image = torch.from_numpy(np.random.default_rng(0).integers(-5, 6, (2, 6, 7, 8)).astype(np.float32))
    falling = 0
    for seed in range(20):
        made = draw_contrast(image, np.random.default_rng(seed))
        assert (made.shape, made.dtype) == (image.shape, torch.float32)
        maps = []
        for before, after in zip(image, made, strict=True):
            assert after.min() >= before.min()
            assert after.max() <= before.max()
            values = [after[before == value].unique() for value in range(-5, 6)]
            assert all(len(each) == 1 for each in values), "what was equal stays equal"
            maps.append(torch.cat(values))
        assert not torch.equal(*maps), "each channel has a map of its own"
        falling += bool((maps[0].diff() < 0).any())
    assert falling > 10, "what was brighter can become darker"
    flat = torch.ones(1, 2, 2, 2)
    assert torch.equal(draw_contrast(flat, np.random.default_rng(0)), flat)


def test_each_structure_gets_a_brightness_of_its_own_and_keeps_its_texture():
    image = torch.from_numpy(np.random.default_rng(0).normal(size=(2, 24, 24, 24)).astype(np.float32))
    mask = torch.zeros(24, 24, 24, dtype=torch.long)
    mask[2:12, 2:12, 2:12], mask[14:23, 14:23, 14:23], mask[:, :, -1] = 1, 2, -1
    given, levels = image.clone(), []
    for seed in range(20):
        moved = draw_brightness(image, mask, np.random.default_rng(seed)) - image
        # Far from every border; 3 voxels are more than four deviations of the fade.
        shifts = torch.stack([moved[:, 5:8, 5:8, 5:8].flatten(1), moved[:, 17:20, 17:20, 17:20].flatten(1)])
        assert float((shifts - shifts[..., :1]).abs().max()) < 1e-4, "the texture stays"
        assert float(moved[:, 15:, :8].abs().max()) < 1e-6, "what is around stays"
        assert shifts[..., 0].unique().numel() == 4, "each structure, each channel"
        levels.append(float(shifts[0, 0, 0] + image[0, 2:12, 2:12, 2:12].mean()))
    low, high = np.quantile(image[0], [0.01, 0.99])
    assert low - 1e-4 <= min(levels) < -1 and 1 < max(levels) <= high + 1e-4, "of what the image shows"
    assert torch.equal(image, given)
    assert torch.equal(draw_brightness(image, mask * 0, np.random.default_rng(0)), image)


@pytest.mark.parametrize("change", ["recontrast", "repaint"])
def test_contrast_is_changed_as_often_as_asked_and_never_in_ct(change):
    image, mask = torch.randn(1, 16, 16, 16), torch.ones(16, 16, 16, dtype=torch.long)
    changed = {}
    for modality, share in (("MR", 0.0), ("MR", 0.4), ("CT", 1.0)):
        plain = Augment((16, 16, 16), (1.0, 1.0, 1.0), modality)
        other = Augment((16, 16, 16), (1.0, 1.0, 1.0), modality, **{change: share})
        pairs = [
            (plain(image, mask, np.random.default_rng(n)), other(image, mask, np.random.default_rng(n)))
            for n in range(60)
        ]
        assert all(torch.equal(a[1], b[1]) for a, b in pairs)
        changed[modality, share] = sum(not torch.equal(a[0], b[0]) for a, b in pairs)
    assert changed["MR", 0.0] == changed["CT", 1.0] == 0
    assert 12 <= changed["MR", 0.4] <= 36


def test_a_box_of_another_patch_comes_with_its_labels_and_leaves_the_originals():
    patches = [(torch.full((2, 12, 9, 6), float(n)), torch.full((12, 9, 6), n)) for n in (0, 1)]
    made = copy_paste(patches, patches[::-1], np.random.default_rng(0))
    for number, (image, mask) in enumerate(made):
        assert torch.equal(image, mask.float().expand(2, -1, -1, -1))
        pasted = (mask != number).nonzero()
        # One box of two thirds of every side, and nothing else.
        assert (pasted.amax(dim=0) - pasted.amin(dim=0) + 1).tolist() == [8, 6, 4]
        assert len(pasted) == 8 * 6 * 4
    assert torch.equal(made[0][1] == 1, made[1][1] == 0)
    assert all(bool((mask == number).all()) for number, (_, mask) in enumerate(patches))


def test_boxes_lie_anywhere_and_fit_the_smallest_patch():
    rng = np.random.default_rng(0)
    patches = [(torch.full((1, 3, 3, 1), float(n)), torch.full((3, 3, 1), n)) for n in (0, 1)]
    masks = torch.stack([copy_paste(patches, patches[::-1], rng)[0][1] for _ in range(50)])
    assert bool(masks.any(dim=0).all())
    assert masks.flatten(1).sum(dim=1).tolist() == [4] * 50


def test_a_single_slice_is_not_darkened_by_what_is_not_above_it():
    augment, rng = Augment((24, 24, 1), (1.0, 1.0, 6.0), "CT"), np.random.default_rng(0)
    slice_ = torch.full((1, 24, 24, 1), 10.0), torch.zeros(24, 24, 1, dtype=torch.long)
    darkest = min(float(augment(*slice_, rng)[0][0, 8:16, 8:16].mean()) for _ in range(60))
    # The gain is 0.75 at least, the offset -0.25.
    assert darkest > 0.7 * 10.0
