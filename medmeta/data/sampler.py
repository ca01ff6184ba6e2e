"""Episodes: N-way K-shot problems drawn from prepared scans. Episode i is a pure function of (seed, i)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from medmeta.data.preprocess import UNEQUAL
from medmeta.data.store import StoredCase, StoredTask
from medmeta.episode import IGNORED, Episode, Examples

FOREGROUND = 0.75
"""Share of patches that are drawn around a foreground voxel (then around one of a random class)."""

FURTHEST, NODES = 0.1, 4
"""Of an elastic deformation, see `Augment`."""

FADE = 0.7
"""Standard deviation, voxels, of the border of a structure of another brightness, see `draw_brightness`."""

PASTED = 2 / 3
"""Share of every side of a patch that `copy_paste` replaces."""


def draw_patch(
    case: StoredCase, patch: Sequence[int], rng: np.random.Generator, *, labels: Sequence[int] | None = None
) -> tuple[Tensor, Tensor]:
    """A random patch of a scan, around a foreground voxel `FOREGROUND` of the time.

    Args:
        case: where to draw from.
        patch: shape in voxels; where the scan is smaller, its edge is repeated and the mask there is ignored.
        rng: the only source of randomness.
        labels: classes to draw around, each equally often; all of the scan's when None.

    Returns:
        image (C, *patch) float32 and mask (*patch) long.
    """
    shape = np.array(case.mask.shape)
    size = np.array(patch)
    present = [label for label in (case.places if labels is None else labels) if label in case.places]
    if present and rng.random() < FOREGROUND:
        places = case.places[present[rng.integers(len(present))]]
        centre = places[rng.integers(len(places))] + rng.integers(-(size // 4), size // 4 + 1)
    else:
        centre = rng.integers(0, shape)
    room = shape - size
    first = np.where(room >= 0, np.clip(centre - size // 2, 0, np.maximum(room, 0)), room // 2)
    inside = tuple(slice(max(0, f), min(n, f + s)) for f, n, s in zip(first, shape, size, strict=True))
    margins = [(max(0, -f), max(0, f + s - n)) for f, n, s in zip(first, shape, size, strict=True)]
    image = np.array(case.image[(slice(None), *inside)], dtype=np.float32)
    mask = np.array(case.mask[inside], dtype=np.int64)
    if any(side for margin in margins for side in margin):
        image = np.pad(image, [(0, 0), *margins], mode="edge")
        mask = np.pad(mask, margins, constant_values=IGNORED)
    return torch.from_numpy(image), torch.from_numpy(mask)


def draw_contrast(image: Tensor, rng: np.random.Generator) -> Tensor:
    """Give each channel of an image (C, *S) another contrast, as another sequence or disease would.

    Intensities go through a random piecewise linear map of their range onto itself, with 3 to 6 nodes and not
    necessarily rising: what was brighter can become darker. A random global intensity map, as in Zhou 2019 ("Models
    Genesis", section 2.1) and Ouyang 2022 ("Causality-inspired single-source domain generalization", section III-B).
    """
    made = []
    for channel in image:
        low, high = float(channel.min()), float(channel.max())
        nodes = int(rng.integers(3, 7))
        values = np.interp(channel.numpy(), np.linspace(low, high, nodes), rng.uniform(low, high, nodes))
        made.append(torch.from_numpy(values.astype(np.float32)))
    return torch.stack(made)


def draw_brightness(image: Tensor, mask: Tensor, rng: np.random.Generator) -> Tensor:
    """Give each structure of an image a brightness of its own, as disease would: iron makes a bright spleen dark.

    In each channel its mean becomes anything between the 1st and 99th percentile of the image, its texture stays, and
    its border fades over about a voxel. The brightness of structures is drawn in Billot 2023 ("SynthSeg", section 3.2).

    Args:
        image: (C, *S).
        mask: (*S), of which 1..K are structures.
        rng: the only source of randomness.
    """
    from scipy.ndimage import gaussian_filter

    places = [mask == label for label in mask.unique().tolist() if label > 0]
    shares = [torch.from_numpy(gaussian_filter(place.float().numpy(), FADE)) for place in places]
    made = image.clone()
    for channel, given in zip(made, image, strict=True):
        low, high = np.quantile(given.numpy(), [0.01, 0.99])
        for place, share in zip(places, shares, strict=True):
            channel += share * (float(rng.uniform(low, high)) - float(given[place].mean()))
    return made


def copy_paste(
    patches: Sequence[tuple[Tensor, Tensor]], others: Sequence[tuple[Tensor, Tensor]], rng: np.random.Generator
) -> list[tuple[Tensor, Tensor]]:
    """Patches with a box of another patch in them, image and mask alike.

    The box has `PASTED` of every side and the same place in all patches (Bai 2023, "Bidirectional copy-paste for
    semi-supervised medical image segmentation", section 3.2; Yun 2019, "CutMix").

    Args:
        patches: images (C, *S) and masks (*S), left as they are.
        others: as many of the same shapes.
        rng: the only source of randomness.
    """
    sides = patches[0][1].shape
    lengths = [max(1, round(PASTED * side)) for side in sides]
    starts = [int(rng.integers(side - length + 1)) for side, length in zip(sides, lengths, strict=True)]
    box = tuple(slice(start, start + length) for start, length in zip(starts, lengths, strict=True))
    made = []
    for (image, mask), (their_image, their_mask) in zip(patches, others, strict=True):
        image, mask = image.clone(), mask.clone()
        image[(slice(None), *box)] = their_image[(slice(None), *box)]
        mask[box] = their_mask[box]
        made.append((image, mask))
    return made


class Augment:
    """Paired augmentation of few scans: the patient's pose for image and mask, the scanner's moods for the image alone.

    Rotation to 15 degrees, scale 0.85 to 1.15, shear and elastic deformation; noise, blur, low resolution, gamma, gain
    and offset to 0.25 and, for MR, a bias field. No mirroring: left and right organs stay what they are.

    Args:
        patch: patch shape in voxels.
        spacing: voxel size in mm, so that a rotation in mm stays one where slices are thick.
        modality: "CT" or "MR".
        strength: factor on rotation, scale and, for MR, gain and offset.
        bend: share of patches that are deformed elastically.
        repaint: share of patches whose structures each get another brightness, see `draw_brightness`; none for CT,
            where HU mean the same in every scan.
        recontrast: share of patches whose contrast becomes another, see `draw_contrast`; none for CT.
    """

    def __init__(
        self,
        patch: Sequence[int],
        spacing: Sequence[float],
        modality: str,
        *,
        strength: float = 1.0,
        bend: float = 0.0,
        repaint: float = 0.0,
        recontrast: float = 0.0,
    ) -> None:
        from monai.transforms import (
            Compose,
            RandAdjustContrastd,
            RandAffined,
            RandBiasFieldd,
            RandGaussianNoised,
            RandGaussianSmoothd,
            RandScaleIntensityd,
            RandShiftIntensityd,
            RandSimulateLowResolutiond,
            RandSmoothDeformd,
        )

        # Only within planes of about square pixels: elsewhere a rotation in voxels would shear the organ.
        square = [max(plane) <= UNEQUAL * min(plane) for plane in (spacing[1:], spacing[::2], spacing[:2])]
        angles = [float(np.deg2rad(15 * strength)) if turns else 0.0 for turns in square]
        gain = 0.25 * (strength if modality != "CT" else 1.0)
        keys = ["image", "mask"]
        # Beyond the patch counts as 0: blurred across, a single slice would be dark.
        sigma_x, sigma_y, sigma_z = [(0.4, 1.0) if side > 1 else (0.0, 0.0) for side in patch]
        steps = [
            RandAffined(
                keys,
                prob=0.8,
                rotate_range=angles,
                scale_range=[0.15 * strength] * 3,
                shear_range=[0.05] * 6 if all(square) else None,
                mode=("bilinear", "nearest"),
                padding_mode=("border", "zeros"),
                cache_grid=False,
            ),
            RandGaussianNoised("image", prob=0.3, std=0.15),
            RandGaussianSmoothd("image", prob=0.15, sigma_x=sigma_x, sigma_y=sigma_y, sigma_z=sigma_z),
            RandSimulateLowResolutiond("image", prob=0.15, zoom_range=(0.5, 1.0)),
            RandAdjustContrastd("image", prob=0.3, gamma=(0.7, 1.5)),
            RandScaleIntensityd("image", factors=gain, prob=0.5),
            RandShiftIntensityd("image", offsets=gain, prob=0.5),
        ]
        if bend > 0:
            steps.insert(
                0,
                RandSmoothDeformd(
                    keys,
                    spatial_size=tuple(patch),
                    rand_size=[min(NODES, side) for side in patch],
                    prob=bend,
                    # Of coordinates from -1 to 1.
                    def_range=2 * FURTHEST,
                    field_mode="trilinear",
                    grid_mode=("bilinear", "nearest"),
                    align_corners=True,
                    grid_align_corners=True,
                ),
            )
        if modality != "CT":
            steps.append(RandBiasFieldd("image", prob=0.3, degree=3, coeff_range=(0.0, 0.2)))
        self._compose = Compose(steps)
        self._repaint, self._recontrast = (repaint, recontrast) if modality != "CT" else (0.0, 0.0)

    def __call__(self, image: Tensor, mask: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Image (C, *S) and mask (*S), augmented alike."""
        self._compose.set_random_state(int(rng.integers(2**31)))
        # Shifted by one, so that what comes in from outside the patch (0) is ignored, not background.
        made = self._compose({"image": image, "mask": (mask + 1).float().unsqueeze(0)})
        image, mask = (torch.as_tensor(made[key]).as_subclass(Tensor) for key in ("image", "mask"))
        labels = mask[0].round().long() - 1
        if self._repaint and rng.random() < self._repaint:
            image = draw_brightness(image, labels, rng)
        if self._recontrast and rng.random() < self._recontrast:
            image = draw_contrast(image, rng)
        return image.float().contiguous(), labels


@dataclass(frozen=True)
class EpisodePlan:
    """What one episode is made of.

    Args:
        task: its name.
        number: its position among the sampler's tasks.
        classes: the task's classes that become 1, 2, ... of the episode; its others are background there.
        flips: axes that are mirrored.
        support, query: ids of the scans, one for each patch.
    """

    task: str
    number: int
    classes: tuple[int, ...]
    flips: tuple[int, ...]
    support: tuple[str, ...]
    query: tuple[str, ...]


class EpisodeSampler:
    """Episodes over several tasks; `sampler[i]` depends on (seed, i) alone.

    Args:
        tasks: prepared tasks; each needs at least two patients. A task may come twice, on two grids.
        shots: K, support patches, each from another patient while there are enough of them.
        queries: query patches; their patients are never those of the support.
        ways: classes of an episode at most: a random subset of the task's, the others then being background. None takes
            all of them under their own numbers.
        mirror: flip whole episodes at random, support and query alike, which makes more tasks out of those at hand.
        augment: augment each patch on its own.
        seed: with i, the only source of randomness.

    Raises:
        ValueError: no task, or one with fewer than two patients.
    """

    def __init__(
        self,
        tasks: Sequence[StoredTask],
        *,
        shots: int = 2,
        queries: int = 2,
        ways: int | None = None,
        mirror: bool = False,
        augment: bool = True,
        seed: int = 0,
    ) -> None:
        for task in tasks:
            if len(task.patients) < 2:
                raise ValueError(
                    f"task {task.name} has {len(task.patients)} patient(s); required: at least 2, one for the support "
                    "and one for the query"
                )
        if not tasks or shots < 1 or queries < 1:
            raise ValueError(f"{len(tasks)} tasks, shots={shots}, queries={queries}; required: at least one of each")
        self.tasks = tuple(tasks)
        self.shots, self.queries, self.ways, self.mirror, self.seed = shots, queries, ways, mirror, seed
        self._augment: list[Callable] = []
        if augment:
            self._augment = [
                Augment(task.patch, task.preprocess.spacing, task.preprocess.modality) for task in self.tasks
            ]

    def plan(self, index: int) -> EpisodePlan:
        """What episode `index` is made of, without reading a voxel."""
        rng = np.random.default_rng([self.seed, index, 0])
        number = int(rng.integers(len(self.tasks)))
        task = self.tasks[number]
        chosen = list(range(1, task.classes + 1))
        if self.ways is not None:
            count = int(rng.integers(1, min(self.ways, task.classes) + 1))
            chosen = [int(label) for label in rng.permutation(chosen)[:count]]
        flips = tuple(axis for axis in range(3) if self.mirror and rng.random() < 0.5)
        patients = task.patients
        names = [str(name) for name in rng.permutation(sorted(patients))]
        split = min(self.shots, len(names) - 1)

        def scans(of: list[str], count: int) -> tuple[str, ...]:
            turns = [patients[of[turn % len(of)]] for turn in range(count)]
            return tuple(turn[rng.integers(len(turn))].id for turn in turns)

        support, query = scans(names[:split], self.shots), scans(names[split:], self.queries)
        return EpisodePlan(task.name, number, tuple(chosen), flips, support, query)

    def __getitem__(self, index: int) -> Episode:
        plan = self.plan(index)
        task = self.tasks[plan.number]
        rng = np.random.default_rng([self.seed, index, 1])
        support, query = (self._examples(task, names, plan, rng) for names in (plan.support, plan.query))
        return Episode(task.name, support, query)

    def _examples(
        self, task: StoredTask, names: Sequence[str], plan: EpisodePlan, rng: np.random.Generator
    ) -> Examples:
        chosen = list(plan.classes)
        table = torch.zeros(task.classes + 2, dtype=torch.long)
        table[-1] = IGNORED
        table[chosen] = torch.arange(1, len(chosen) + 1)
        cases = {case.id: case for case in task.cases}
        patches = []
        for number, name in enumerate(names):
            # One class after the other, so that every class of the episode is looked for.
            label = chosen[number % len(chosen)]
            image, mask = draw_patch(cases[name], task.patch, rng, labels=[label] if number < len(chosen) else chosen)
            if self._augment:
                image, mask = self._augment[plan.number](image, mask, rng)
            if plan.flips:
                image, mask = image.flip([axis + 1 for axis in plan.flips]), mask.flip(plan.flips)
            patches.append((image, table[mask]))
        return Examples.of(patches, len(chosen))
