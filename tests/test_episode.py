from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest
import torch

from medmeta.episode import Episode, Examples

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def examples(*shape: int, classes: int = 2) -> Examples:
    """Every voxel of image and mask has its own value, as far as the classes allow."""
    voxels = torch.tensor([shape[0], *shape[2:]]).prod()
    mask = (torch.arange(voxels) % (classes + 2) - 1).reshape(shape[0], *shape[2:])
    return Examples(torch.arange(torch.tensor(shape).prod()).float().reshape(shape), mask, classes)


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (1, 1, 4, 5, 6)])
def test_what_it_says_of_itself(shape) -> None:
    made = examples(*shape)
    assert (len(made), made.channels) == shape[:2]
    with pytest.raises(FrozenInstanceError):
        made.classes = 5


@pytest.mark.parametrize(
    ("image", "mask", "classes", "says"),
    [
        (torch.zeros(1, 1, 4), torch.zeros(1, 4).long(), 1, "two or three axes"),
        (torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 4).long(), 1, r"mask \(1, 1, 4, 4\)"),
        (torch.zeros(2, 1, 4, 4), torch.zeros(1, 4, 4).long(), 1, "required"),
        (torch.zeros(1, 1, 4, 4), torch.zeros(1, 4, 4), 1, "long mask"),
        (torch.zeros(1, 1, 4, 4).long(), torch.zeros(1, 4, 4).long(), 1, "float image"),
        (torch.zeros(1, 1, 4, 4), torch.zeros(1, 4, 4).long(), 0, "at least one"),
        (torch.zeros(1, 1, 4, 4), torch.full((1, 4, 4), 2), 1, r"2\.\.2"),
        (torch.zeros(1, 1, 4, 4), torch.full((1, 4, 4), -2), 1, r"-1\.\.1"),
    ],
)
def test_refuses_what_does_not_fit(image, mask, classes, says) -> None:
    with pytest.raises(ValueError, match=says):
        Examples(image, mask, classes)


def test_a_class_may_be_absent() -> None:
    assert Examples(torch.zeros(1, 1, 4, 4), torch.zeros(1, 4, 4).long(), 7).classes == 7


def test_slices_are_axial_and_keep_image_and_mask_together() -> None:
    volume = examples(2, 3, 4, 5, 6)
    flat = volume.slices()
    assert flat.image.shape == (12, 3, 4, 5)
    assert flat.classes == volume.classes
    for number in range(2):
        for z in range(6):
            assert torch.equal(flat.image[number * 6 + z], volume.image[number, ..., z])
            assert torch.equal(flat.mask[number * 6 + z], volume.mask[number, ..., z])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_GPU)])
def test_moving_an_episode_moves_support_and_query(device) -> None:
    support, query = examples(1, 1, 2, 2), examples(2, 1, 2, 2)
    moved = Episode("liver", support, query).to(device)
    assert moved.task == "liver"
    for before, after in ((support, moved.support), (query, moved.query)):
        assert (after.image.device.type, after.mask.device.type, after.classes) == (device, device, before.classes)
        assert torch.equal(after.image.cpu(), before.image)
        assert torch.equal(after.mask.cpu(), before.mask)


@pytest.mark.parametrize("across", [0, 1, 2])
def test_slices_are_across_the_axis(across) -> None:
    shape = (4, 5, 6)
    made = examples(2, 3, *shape)
    flat = made.slices(across)
    sides = [side for axis, side in enumerate(shape) if axis != across]
    assert flat.image.shape == (2 * shape[across], 3, *sides)
    assert torch.equal(flat.image[shape[across]], made.image[1].select(1 + across, 0))
    assert torch.equal(flat.mask[shape[across]], made.mask[1].select(across, 0))
