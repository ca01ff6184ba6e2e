"""What a notebook shows of the objects of this package: a small table, and a slice as a picture.

Text of files enters as text, and of a path no more than the file name is shown.
"""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from medmeta.data.tasks import Task
    from medmeta.data.volume import Volume
    from medmeta.episode import Episode, Examples
    from medmeta.prediction import Prediction
    from medmeta.segmenter import Segmentation, Segmenter

# Okabe and Ito (2008): told apart by people with any of the common colour vision deficiencies.
COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#CC79A7", "#D55E00", "#0072B2")

PIXELS = 200
"""Longest side of a picture."""

SHOWN = 4
"""Examples drawn of a support or query set, and structures named in one line."""


def by(sizes: Iterable[float]) -> str:
    """ "1x1x2.5"."""
    return "x".join(f"{size:.4g}" for size in sizes)


def count(number: int, noun: str) -> str:
    """ "1 scan", "2 scans", "3 classes"."""
    return f"{number:,} {noun}{'' if number == 1 else 'es' if noun.endswith('s') else 's'}"


def some(names: Iterable[str]) -> str:
    """The first names, and how many others there are."""
    names = list(names)
    return ", ".join([*names[:SHOWN], *([f"{len(names) - SHOWN} more"] if len(names) > SHOWN else [])])


def geometry(volume: Volume) -> str:
    """ "35x51x35 voxels of 1x1x2.5 mm, RAS"."""
    orientation = volume.orientation if bool(volume.affine.isfinite().all()) else "no finite affine"
    return f"{by(volume.shape)} voxels of {by(volume.spacing)} mm, {orientation}"


def without_folders(text: str) -> str:
    """A message with every path in it cut down to its file name."""
    return re.sub(r"(?:[A-Za-z]:)?[^\s'\"(;:]*[/\\](?:[^/\\'\";:]*[/\\])*", "", text)


def volume_line(volume: Volume) -> str:
    """ "1 channel of 35x51x35 voxels of 1x1x2.5 mm, RAS, float32"."""
    return f"{count(volume.channels, 'channel')} of {geometry(volume)}, {_kind(volume)}"


def volume_html(volume: Volume, rows: Mapping[str, object] | None = None) -> str:
    """Grid, type and range of values, and the middle slice; of a label map the slice that holds most of it."""
    data, facts = volume.data, {}
    if data.numel() and data.is_floating_point():
        finite = data[data.isfinite()]
        facts["intensities"] = f"{finite.min():.4g} to {finite.max():.4g}" if finite.numel() else "none finite"
    elif data.numel():
        facts["label values"] = some([str(value) for value in data.unique().tolist() if value])
    return block(
        type(volume).__name__,
        {
            "grid": geometry(volume),
            "channels": volume.channels,
            "type": _kind(volume),
            **facts,
            **(rows or {}),
        },
        _volume_pictures(volume),
    )


def segmentation_line(segmentation: Segmentation) -> str:
    """ "35x51x35 voxels of 1x1x2.5 mm, RAS, certainty: kidney 0.91"."""
    return f"{geometry(segmentation)}, certainty: {some(_certainties(segmentation)) or 'unknown'}"


def segmentation_html(segmentation: Segmentation) -> str:
    """A label map and how sure it is."""
    return volume_html(segmentation, {"certainty, the Dice to expect": ", ".join(_certainties(segmentation))})


def task_line(task: Task) -> str:
    """ "'Hippocampus', MR, 260 scans of 260 patients, 260 labelled, targets: Anterior, Posterior"."""
    scans = f"{count(len(task.cases), 'scan')} of {count(len(task.patients), 'patient')}"
    return (
        f"{task.name!r}, {task.modality}, {scans}, {len(task.labelled.cases)} labelled, targets: {some(task.targets)}"
    )


def task_html(task: Task) -> str:
    """What a task is, without the names of its cases."""
    labelled = len(task.labelled.cases)
    others = {"background values": task.background, "ignored values": task.ignored}
    return block(
        f"Task {task.name}",
        {
            "organ": task.organ,
            "modality": f"{task.modality} ({', '.join(task.channels)})",
            "scans": f"{len(task.cases)} of {count(len(task.patients), 'patient')}, {labelled} labelled",
            "targets and their label values": _targets(task.targets),
            **{name: ", ".join(map(str, values)) for name, values in others.items() if values},
            "terms": task.terms or "not stated",
            **({"reference": task.reference} if task.reference else {}),
        },
    )


def examples_line(examples: Examples) -> str:
    """ "2 images of 1 channel and 24x24x24 voxels, 2 classes"."""
    size = f"{count(examples.channels, 'channel')} and {by(examples.mask.shape[1:])} voxels"
    return f"{count(len(examples), 'image')} of {size}, {count(examples.classes, 'class')}"


def examples_html(examples: Examples) -> str:
    """Shape, share of foreground, and the fullest slice of the first examples with their masks."""
    return block("Examples", _examples_rows(examples), _example_pictures(examples))


def episode_line(episode: Episode) -> str:
    """The task, and both sets of examples."""
    support, query = examples_line(episode.support), examples_line(episode.query)
    return f"{episode.task!r}, support: {support}; query: {query}"


def episode_html(episode: Episode) -> str:
    """Support and query of an episode, each with its first examples and their masks."""
    parts = {"Support": episode.support, "Query": episode.query}
    blocks = "".join(block(name, _examples_rows(part), _example_pictures(part)) for name, part in parts.items())
    return f"<div><b>{_text(f'Episode of {episode.task}')}</b>{blocks}</div>"


def segmenter_line(segmenter: Segmenter) -> str:
    """ "kidney; CT, from 3 scans by finetune, se_unet_3d"."""
    network = segmenter.model.learner.net.spec["name"]
    return f"{some(segmenter.targets)}; {segmenter.preprocess.modality}, {_adapted(segmenter)}, {network}"


def segmenter_html(segmenter: Segmenter) -> str:
    """What a segmenter finds, from what it learned it, how good it should be, and under which terms."""
    card, net = segmenter.card, segmenter.model.learner.net
    expected = "no forecast"
    if forecast := card.get("forecast"):
        low, high = forecast["mean_interval"]
        expected = f"{forecast['dice']:.2f}, 90 % interval {low:.2f} to {high:.2f}"
    return block(
        "Segmenter",
        {
            "structures and their label values": _targets(segmenter.targets),
            "adapted": _adapted(segmenter),
            "expected Dice on unseen scans": expected,
            "input": f"{segmenter.preprocess.modality} ({', '.join(segmenter.channels)})",
            "working grid": _grid(segmenter),
            "overview": _grid(segmenter.overview) if segmenter.overview else "none",
            "labels carried from": count(len(segmenter.atlases), "labelled scan") if segmenter.atlases else "none",
            "network": f"{net.spec['name']}, {count(sum(each.numel() for each in net.parameters()), 'parameter')}",
            "learner": segmenter.model.learner.name,
            "terms of the labelled scans": card.get("support_terms") or "not stated",
        },
    )


def _grid(segmenter: Segmenter) -> str:
    return f"{by(segmenter.preprocess.spacing)} mm, windows of {by(segmenter.patch)} voxels"


def prediction_line(prediction: Prediction) -> str:
    """ "case.nii.gz: done, kidney 152.3 ml, quality 0.91"."""
    quality = "" if prediction.quality is None else f"quality {prediction.quality:.2f}"
    parts = (prediction.status, without_folders(prediction.reason), some(_volumes(prediction)), quality)
    return f"{prediction.scan.name}: {', '.join(filter(None, parts))}"


def prediction_html(prediction: Prediction) -> str:
    """What became of a scan: file names, volumes, expected quality, seconds."""
    stages = ", ".join(f"{name} {seconds:.1f}" for name, seconds in prediction.stages.items())
    rows = {
        "label map": prediction.output.name if prediction.output else "",
        "reason": without_folders(prediction.reason),
        "volumes": ", ".join(_volumes(prediction)),
        "quality, the Dice that the network expects": "" if prediction.quality is None else f"{prediction.quality:.2f}",
        "seconds": f"{prediction.seconds:.1f} ({stages})" if stages else "",
        "notes": "; ".join(prediction.notes),
    }
    shown = {"scan": prediction.scan.name, "status": prediction.status}
    return block("Prediction", shown | {name: value for name, value in rows.items() if value})


def block(title: str, rows: Mapping[str, object], pictures: Iterable[str] = ()) -> str:
    """A heading, a table of names and values as text, and pictures beside it, as HTML."""
    cell = "text-align:left;vertical-align:top;padding:1px 10px 1px 0;overflow-wrap:anywhere"
    lines = "".join(
        f'<tr><th scope="row" style="{cell};font-weight:normal;opacity:0.7">{_text(name)}</th>'
        f'<td style="{cell}">{_text(value)}</td></tr>'
        for name, value in rows.items()
    )
    return (
        '<div style="display:flex;flex-wrap:wrap;gap:6px 16px;align-items:flex-start;margin:4px 0">'
        f'<div style="max-width:32em"><b>{_text(title)}</b><table style="margin:4px 0">{lines}</table></div>'
        f'<div style="display:flex;flex-wrap:wrap;gap:4px">{"".join(pictures)}</div></div>'
    )


def _text(value: object) -> str:
    return html.escape(str(value))


def _kind(volume: Volume) -> str:
    return str(volume.data.dtype).removeprefix("torch.")


def _certainties(segmentation: Segmentation) -> list[str]:
    return [f"{name} {dice:.2f}" for name, dice in segmentation.certainty.items()]


def _targets(targets: Mapping[str, Sequence[int]]) -> str:
    return "; ".join(f"{name}: {', '.join(map(str, values))}" for name, values in targets.items())


def _adapted(segmenter: Segmenter) -> str:
    card = segmenter.card
    scans = count(card["support_scans"], "scan") if "support_scans" in card else "an unknown number of scans"
    return f"from {scans} by {card.get('method', 'an unnamed way')}"


def _volumes(prediction: Prediction) -> list[str]:
    return [f"{name} {volume:.1f} ml" for name, volume in prediction.volumes_ml.items()]


def _examples_rows(examples: Examples) -> dict[str, object]:
    share = float((examples.mask > 0).float().mean()) if examples.mask.numel() else 0.0
    return {
        "images": f"{len(examples)} of {count(examples.channels, 'channel')} and {by(examples.mask.shape[1:])} voxels",
        "classes": examples.classes,
        "foreground": f"{share:.1%} of the voxels",
    }


def stretch(image: np.ndarray) -> tuple[float, float]:
    """The values drawn black and white: the 1st and 99.5th percentile of an image, its darkest value left out."""
    finite = image[np.isfinite(image)]
    if not finite.size or finite.min() == finite.max():
        return 0.0, 1.0
    low, high = np.percentile(finite[finite > finite.min()], (1, 99.5))
    return (float(low), float(high)) if high > low else (float(finite.min()), float(finite.max()))


def axis_across(spacing: np.ndarray) -> int:
    """The axis to slice across, given the spacing along R, A and S: that of clearly the coarsest, else S."""
    coarsest = int(spacing.argmax())
    return coarsest if spacing[coarsest] >= 1.05 * np.delete(spacing, coarsest).max() else 2


def _volume_pictures(volume: Volume) -> list[str]:
    """The slice as radiologists look at it: anterior (or superior) up, the right of the patient on the left."""
    from nibabel.orientations import io_orientation

    affine = volume.affine.numpy(force=True)
    if not volume.data.numel() or not np.isfinite(affine).all():
        return []
    to_ras = io_orientation(affine)
    if np.isnan(to_ras).any():
        return []
    # Each of R, A and S in turn: the voxel axis that runs along it, and its spacing.
    own = to_ras[:, 0].argsort()
    spacing = np.asarray(volume.spacing)[own]
    across = axis_across(spacing)
    labels = not volume.data.is_floating_point()
    voxels = volume.data[0].permute(*own.tolist())
    place = _fullest(voxels, across) if labels else voxels.shape[across] // 2
    plane = voxels.select(across, place)
    along = [axis for axis in range(3) if axis != across]
    backward = [number for number, axis in enumerate(along) if to_ras[own[axis], 1] < 0]
    upright = _upright(plane.flip(backward))
    size = np.delete(spacing, across) * upright.shape[::-1]
    image = _coloured(np.zeros(upright.shape), upright, 1.0) if labels else _coloured(upright, None)
    return [_picture(image, size.tolist(), "label map" if labels else "scan")]


def _example_pictures(examples: Examples) -> list[str]:
    pictures = []
    for image, mask in list(zip(examples.image[:, 0], examples.mask, strict=True))[:SHOWN]:
        if not mask.numel():
            continue
        if mask.ndim == 3:
            place = _fullest(mask, 2)
            image, mask = image[..., place], mask[..., place]
        picture = _coloured(_upright(image), _upright(mask), 0.45)
        pictures.append(_picture(picture, mask.shape, "example with its mask"))
    return pictures


def _fullest(labels: Tensor, axis: int) -> int:
    """The slice with most foreground; the middle where there is none."""
    counts = (labels > 0).movedim(axis, 0).flatten(1).sum(dim=1)
    return int(counts.argmax()) if bool(counts.any()) else len(counts) // 2


def _upright(plane: Tensor) -> np.ndarray:
    """(height, width) of a plane whose first axis runs to the left of the picture, and whose second runs up."""
    step = -(-max(plane.shape) // PIXELS)
    plane = plane[::step, ::step].flip(0, 1).T
    return (plane.float() if plane.is_floating_point() else plane).numpy(force=True)


def _coloured(image: np.ndarray, labels: np.ndarray | None, opacity: float = 0.0) -> np.ndarray:
    """(height, width, 3) in 0..1: an image in grey, its labels tinted."""
    low, high = stretch(image)
    grey = np.clip((np.nan_to_num(image, nan=low) - low) / (high - low), 0, 1)
    pixels = np.repeat(grey[..., None], 3, axis=-1)
    for value in [] if labels is None else np.unique(labels[labels > 0]):
        colour = COLOURS[(int(value) - 1) % len(COLOURS)]
        tint = np.array([int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)])
        pixels[labels == value] += opacity * (tint - pixels[labels == value])
    return pixels


def _picture(pixels: np.ndarray, size: Sequence[float], alternative: str) -> str:
    """An inline PNG with the proportions of `size`, width and height."""
    from matplotlib.image import imsave

    content = io.BytesIO()
    imsave(content, np.rint(255 * pixels).astype(np.uint8), format="png")
    width, height = (max(1, round(PIXELS * side / max(size))) for side in size)
    return (
        f'<img alt="{alternative}" width="{width}" height="{height}" style="width:{width}px;height:{height}px" '
        f'src="data:image/png;base64,{base64.b64encode(content.getvalue()).decode("ascii")}">'
    )
