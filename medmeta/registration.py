"""Labels carried from labelled scans to another one: rigid and affine registration, then demons."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.ndimage import uniform_filter
from torch import Tensor
from torch.nn.functional import avg_pool3d

from medmeta.data.store import StoredTask
from medmeta.inference import Layer

if TYPE_CHECKING:
    import SimpleITK

VOXELS = 200_000
"""Voxels at most of the scans that are registered; finer ones take longer and give no better labels."""

POOLED = 32
"""How many times as many voxels ITK gets to see at all, of which it makes copies; beyond, means of several voxels."""

FINER = 4
"""How many times as many voxels masks may have, and the probabilities that come of them."""

ATLASES = 5
"""Labelled scans whose labels are carried at most."""

ALIKE, SAME = 0.6, 0.9
"""Local correlation around the organ up to which a registration counts for nothing, and from which it counts fully."""

WINDOW = 7
"""Side in voxels of the cubes in which scans are correlated."""

SHARPNESS = 2.3
"""How much several atlases differ in their votes at a voxel: per mean of what their correlations lack of 1."""

DOUBT = 0.02
"""Probability that a registration leaves to all classes alike."""

SAMPLES = 0.15
"""Share of the voxels that rigid and affine registration compare."""

LEVELS = ((4, 40), (2, 40), (1, 20))
"""Demons from coarse to fine: how many voxels become one, and iterations."""

SMOOTHING = 1.5
"""Standard deviation in voxels of the Gaussian that smooths the displacements after each iteration."""


@dataclass(frozen=True, eq=False)
class Atlas:
    """A labelled scan whose labels are carried to others, as coarse as that allows.

    Args:
        image: (X, Y, Z) float16, 0 to 1.
        spacing: of the image, in mm.
        mask: (X', Y', Z') int8 of 0..K, its middle on that of the image.
        mask_spacing: of the mask, in mm.
    """

    image: Tensor
    spacing: tuple[float, float, float]
    mask: Tensor
    mask_spacing: tuple[float, float, float]


def make_atlas(image: np.ndarray, mask: np.ndarray, spacing: tuple[float, float, float]) -> Atlas:
    """An atlas from a scan (X, Y, Z) and its mask (X, Y, Z) on one grid; `spacing` in mm."""
    mask = np.maximum(mask, 0)
    labels = np.union1d([0], mask).tolist()
    with _one_thread():
        small = _coarser(_scan(image, spacing), VOXELS)
        shares = [_coarser(_image((mask == label).astype(np.float32), spacing), FINER * VOXELS) for label in labels]
    # A voxel has the label of most of it.
    best = torch.stack([_tensor(share) for share in shares]).argmax(dim=0)
    kept = torch.tensor(labels, dtype=torch.int8)[best]
    return Atlas(_tensor(small).half(), small.GetSpacing(), kept, shares[0].GetSpacing())


def make_atlases(support: StoredTask, most: int) -> tuple[Atlas, ...]:
    """Atlases from `most` scans at most, spread over the labelled ones.

    Where there are other patients, a scan whose labels count for nothing in the next one of them is left out: it would
    be registered to every scan for nothing.
    """
    spacing, cases = support.preprocess.spacing, support.cases
    kept = []
    for number in range(0, len(cases), -(-len(cases) // most)) if most else ():
        case = cases[number]
        atlas = make_atlas(case.image[0], case.mask, spacing)
        others = (other for other in cases[number:] + cases[:number] if other.patient != case.patient)
        other = next(others, None)
        if other is None or carry_labels(other.image[0], spacing, [atlas], support.classes).share > 0.0:
            kept.append(atlas)
    return tuple(kept)


def carry_labels(image: np.ndarray, spacing: Sequence[float], atlases: Sequence[Atlas], classes: int) -> Layer:
    """The labels of atlases, carried to a scan, where they vote.

    For each atlas a rigid, then an affine map that is best in mutual information (Mattes 2003), then symmetric demons
    (Vercauteren 2009) on matched histograms, all on one thread, so that the same scans give the same labels. At each
    voxel an atlas counts by how alike the registered scans look around it (local weighted voting, Artaechevarria 2009).

    Args:
        image: (X, Y, Z) on the working grid.
        spacing: of the working grid, in mm.
        atlases: made of scans on the same kind of grid, one or more.
        classes: K.

    Returns:
        Probabilities in float16 on a grid as coarse as that of an atlas' mask. Of n atlases their share is 0 to
        r / (r + 1), r the square root of n, since raters who err alike count less than as many who do not; the more
        the registered scans look alike in and around the organ, the more.
    """
    import SimpleITK

    with _one_thread():
        there = _scan(image, spacing)
        fixed = _coarser(there, VOXELS)
        grid = _coarser(there, FINER * VOXELS)
        matches = [_match(fixed, atlas) for atlas in atlases]
        weights = [min(max((match.alike - ALIKE) / (SAME - ALIKE), 0.0), 1.0) for match in matches]
        voters = [(match, weight) for match, weight in zip(matches, weights, strict=True) if weight > 0.0]
        total = torch.zeros(1 + classes, *grid.GetSize())
        for (match, _), votes in zip(voters, _votes(voters, grid), strict=True):
            for label in range(1, classes + 1):
                share = _image((match.atlas.mask == label).float().numpy(), match.atlas.mask_spacing)
                total[label] += votes * _tensor(SimpleITK.Resample(share, grid, match.transform)).clamp(0.0, 1.0)
    total[0] = (1.0 - total.sum(dim=0)).clamp(min=0.0)
    indices = torch.eye(4, dtype=torch.float64)
    for axis, (fine, coarse) in enumerate(zip(spacing, grid.GetSpacing(), strict=True)):
        indices[axis, axis] = fine / coarse
        indices[axis, 3] = (_origin(image.shape, spacing)[axis] - grid.GetOrigin()[axis]) / coarse
    probabilities = (1.0 - DOUBT) * total + DOUBT / len(total)
    raters = math.sqrt(len(weights))
    return Layer(probabilities.half(), indices, fmean(weights) * raters / (1 + raters))


@dataclass(frozen=True, eq=False)
class _Match:
    """An atlas registered to a scan: from places in the scan to places in the atlas, and how alike they then look."""

    atlas: Atlas
    transform: SimpleITK.Transform
    likeness: SimpleITK.Image
    alike: float


def _match(fixed: SimpleITK.Image, atlas: Atlas) -> _Match:
    import SimpleITK

    moving = _image(atlas.image.float().numpy(), atlas.spacing)
    organ = _image((atlas.mask > 0).float().numpy(), atlas.mask_spacing)
    try:
        transform = _register(fixed, moving)
        likeness = _likeness(fixed, SimpleITK.Resample(moving, fixed, transform))
        inside = _tensor(SimpleITK.Resample(organ, fixed, transform)) > 0.5
    except RuntimeError:
        # ITK cannot register a slice, or an image of one value.
        return _Match(atlas, SimpleITK.Transform(), fixed, 0.0)
    return _Match(atlas, transform, likeness, float(_tensor(likeness)[inside].mean()) if inside.any() else 0.0)


def _votes(voters: Sequence[tuple[_Match, float]], grid: SimpleITK.Image) -> Tensor:
    """(n, *grid), of sum 1 over the n pairs of a match and its weight."""
    import SimpleITK

    if not voters:
        return torch.zeros(0)
    lack = max(1.0 - sum(match.alike for match, _ in voters) / len(voters), 1e-3)
    likeness = torch.stack([_tensor(SimpleITK.Resample(match.likeness, grid)) for match, _ in voters])
    weights = torch.tensor([weight for _, weight in voters])
    return torch.softmax(SHARPNESS * likeness / lack + weights.log()[:, None, None, None], dim=0)


def _likeness(fixed: SimpleITK.Image, moved: SimpleITK.Image) -> SimpleITK.Image:
    """Correlation of two scans on one grid in the window around each voxel."""
    import SimpleITK

    one, other = (SimpleITK.GetArrayFromImage(image).astype(np.float64) for image in (fixed, moved))

    def mean(data: np.ndarray) -> np.ndarray:
        return np.asarray(uniform_filter(data, WINDOW))

    middle, other_middle = mean(one), mean(other)
    variances = (mean(one**2) - middle**2) * (mean(other**2) - other_middle**2)
    correlation = (mean(one * other) - middle * other_middle) / np.sqrt(np.maximum(variances, 1e-6))
    made = SimpleITK.GetImageFromArray(correlation.astype(np.float32))
    made.CopyInformation(fixed)
    return made


@contextmanager
def _one_thread() -> Iterator[None]:
    """The sums of ITK's threads are added in the order in which they come."""
    import SimpleITK

    threads = SimpleITK.ProcessObject.GetGlobalDefaultNumberOfThreads()
    SimpleITK.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    try:
        yield
    finally:
        SimpleITK.ProcessObject.SetGlobalDefaultNumberOfThreads(threads)


def _scan(data: np.ndarray, spacing: Sequence[float]) -> SimpleITK.Image:
    """A scan (X, Y, Z), 0 to 1 between the darkest and the brightest but for half a per cent."""
    factors, sides = [1, 1, 1], np.array(spacing)
    while math.prod(size // factor for size, factor in zip(data.shape, factors, strict=True)) > POOLED * VOXELS:
        factors[int((sides * factors).argmin())] += 1
    pooled = avg_pool3d(torch.from_numpy(data).float()[None, None], factors)[0, 0].numpy()
    low, high = (float(value) for value in np.percentile(pooled, [0.5, 99.5]))
    image = _image(np.clip((pooled - low) / max(high - low, 1e-6), 0.0, 1.0), (sides * factors).tolist())
    # A remainder that fills no whole voxel is left out at the far end.
    first = zip(_origin(data.shape, spacing), spacing, factors, strict=True)
    image.SetOrigin([start + 0.5 * side * (factor - 1) for start, side, factor in first])
    return image


def _image(data: np.ndarray, spacing: Sequence[float]) -> SimpleITK.Image:
    """An image whose middle is the origin, so that scans start on each other."""
    import SimpleITK

    image = SimpleITK.GetImageFromArray(np.ascontiguousarray(data.T))
    image.SetSpacing([float(side) for side in spacing])
    image.SetOrigin(_origin(data.shape, spacing))
    return image


def _origin(size: Sequence[int], spacing: Sequence[float]) -> list[float]:
    return [-0.5 * float(side) * (count - 1) for side, count in zip(spacing, size, strict=True)]


def _tensor(image: SimpleITK.Image) -> Tensor:
    import SimpleITK

    return torch.from_numpy(SimpleITK.GetArrayFromImage(image).T.copy())


def _coarser(image: SimpleITK.Image, voxels: int) -> SimpleITK.Image:
    """The finest grid of at most so many voxels, smoothed where they grow; thick voxels stay as they are."""
    import SimpleITK

    size, before = image.GetSize(), image.GetSpacing()
    finest = min(before)
    while True:
        sides = [max(old, finest) for old in before]
        fewer = [max(1, round(count * old / new)) for count, old, new in zip(size, before, sides, strict=True)]
        if math.prod(fewer) <= voxels:
            break
        finest *= 1.05
    for axis, (old, new) in enumerate(zip(before, sides, strict=True)):
        if new > 1.2 * old and size[axis] >= 4:  # which the filter needs
            image = SimpleITK.RecursiveGaussian(image, 0.5 * new, direction=axis)
    where = (SimpleITK.Transform(), SimpleITK.sitkLinear, _origin(fewer, sides), sides, image.GetDirection())
    return SimpleITK.Resample(image, fewer, *where)


def _register(fixed: SimpleITK.Image, moving: SimpleITK.Image) -> SimpleITK.Transform:
    """From places in `fixed` to places in `moving`."""
    import SimpleITK

    affine = _affine(fixed, moving)
    near = SimpleITK.HistogramMatching(SimpleITK.Resample(moving, fixed, affine), fixed, 256, 15, True)
    displacement: list[SimpleITK.Image] = []
    for factor, iterations in LEVELS:
        # No level with less than a dozen voxels on a side.
        target = SimpleITK.Shrink(fixed, [min(factor, max(1, size // 12)) for size in fixed.GetSize()])
        demons = SimpleITK.FastSymmetricForcesDemonsRegistrationFilter()
        demons.SetNumberOfIterations(iterations)
        demons.SetStandardDeviations(SMOOTHING)
        before = [SimpleITK.Resample(each, target) for each in displacement]
        displacement = [demons.Execute(target, SimpleITK.Resample(near, target), *before)]
    field = SimpleITK.Cast(SimpleITK.Resample(displacement[0], fixed), SimpleITK.sitkVectorFloat64)
    return SimpleITK.CompositeTransform([affine, SimpleITK.DisplacementFieldTransform(field)])


def _affine(fixed: SimpleITK.Image, moving: SimpleITK.Image) -> SimpleITK.AffineTransform:
    """The better of two starts, turned and shifted, then scaled and sheared too."""
    import SimpleITK

    centred = SimpleITK.CenteredTransformInitializerFilter
    starts = []
    for how in (centred.GEOMETRY, centred.MOMENTS):
        rigid = SimpleITK.CenteredTransformInitializer(fixed, moving, SimpleITK.Euler3DTransform(), how)
        measure = _mutual_information()
        measure.SetInitialTransform(rigid)
        starts.append((measure.MetricEvaluate(fixed, moving), SimpleITK.Euler3DTransform(rigid)))
    rigid = min(starts, key=lambda pair: pair[0])[1]
    _improve(rigid, fixed, moving)
    affine = SimpleITK.AffineTransform(3)
    affine.SetCenter(rigid.GetCenter())
    affine.SetMatrix(rigid.GetMatrix())
    affine.SetTranslation(rigid.GetTranslation())
    _improve(affine, fixed, moving)
    return affine


def _improve(transform: SimpleITK.Transform, fixed: SimpleITK.Image, moving: SimpleITK.Image) -> None:
    """In place; as it was where the scans hardly overlap."""
    method = _mutual_information()
    method.SetOptimizerAsRegularStepGradientDescent(2.0, 1e-3, 50, 0.6)
    method.SetOptimizerScalesFromPhysicalShift()
    thick = min(fixed.GetSize()) >= 32
    method.SetShrinkFactorsPerLevel([4, 2] if thick else [2, 1])
    method.SetSmoothingSigmasPerLevel([2, 1] if thick else [1, 0])
    method.SetInitialTransform(transform, inPlace=True)
    parameters = transform.GetParameters()
    try:
        method.Execute(fixed, moving)
    except RuntimeError:
        transform.SetParameters(parameters)


def _mutual_information() -> SimpleITK.ImageRegistrationMethod:
    import SimpleITK

    method = SimpleITK.ImageRegistrationMethod()
    method.SetMetricAsMattesMutualInformation(32)
    method.SetMetricSamplingStrategy(method.RANDOM)
    method.SetMetricSamplingPercentage(SAMPLES, 1)
    method.SetInterpolator(SimpleITK.sitkLinear)
    return method
