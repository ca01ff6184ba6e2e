from __future__ import annotations

import base64
import io
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, ornt_transform
from small import phantom, tiny_model

from medmeta.adaptation import make_segmenter
from medmeta.data.tasks import Case, Task
from medmeta.data.volume import Volume, write_volume
from medmeta.episode import Episode, Examples
from medmeta.prediction import Prediction
from medmeta.segmenter import Segmentation, Segmenter
from medmeta.support import prepare_support

HOSTILE = "<script>alert(1)</script><img src=x onerror=\"alert('2')\"> & '"


class Tags(HTMLParser):
    """The tags and attributes of a fragment, and its text."""

    def __init__(self, fragment: str) -> None:
        super().__init__()
        self.attributes: dict[str, set[str]] = {}
        self.text, self.depth = "", 0
        self.feed(fragment)

    def handle_starttag(self, tag, attributes):
        self.attributes.setdefault(tag, set()).update(name for name, _ in attributes)
        self.depth += tag != "img"

    def handle_endtag(self, tag):
        self.depth -= 1

    def handle_data(self, data):
        self.text += data


def pictures(thing: object) -> list[np.ndarray]:
    """(height, width, 3) of each inline picture, 0..1."""
    found = re.findall(r'src="data:image/png;base64,([^"]+)"', thing._repr_html_())
    return [imread(io.BytesIO(base64.b64decode(each)))[..., :3] for each in found]


def stored(data: np.ndarray, spacing: tuple[float, float, float], codes: str) -> Volume:
    """RAS data, stored along other axes."""
    change = ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(codes))
    affine = np.diag([*spacing, 1.0]) @ inv_ornt_aff(change, data.shape)
    return Volume(
        torch.from_numpy(np.ascontiguousarray(apply_orientation(data, change)))[None], torch.from_numpy(affine)
    )


def examples(classes: int = 2) -> Examples:
    """Five 3-D images; class 1 fills a corner of slice 2, at the right and in front."""
    mask = torch.zeros(5, 12, 10, 8, dtype=torch.long)
    mask[:, 9:, 8:, 2] = 1
    return Examples(torch.rand(5, 1, 12, 10, 8, generator=torch.Generator().manual_seed(0)), mask, classes)


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory: pytest.TempPathFactory) -> Segmenter:
    folder = tmp_path_factory.mktemp("Jane Doe")
    paths = [folder / name for name in ("scan.nii.gz", "labels.nii.gz")]
    for volume, path in zip(phantom(2, 0), paths, strict=True):
        write_volume(volume, path)
    task = Task(folder.name, "organ", "CT", {HOSTILE: (1,), "core": (2,)}, (Case("Doe", "Doe", (paths[0],), paths[1]),))
    model = tiny_model()
    support = prepare_support(task, model.voxels)
    card = {"method": "finetune", "forecast": {"dice": 0.81, "mean_interval": [0.7, 0.9]}}
    return make_segmenter(model, task, support, model.learner.start(1, 2), card)


def everything(segmenter: Segmenter) -> list[object]:
    scan, labels = phantom(2, 0)
    folder = Path("/home/Jane Doe/scans")
    cases = tuple(Case(f"Doe{n}", "Doe", (folder / f"Doe{n}.nii.gz",), folder / "x" if n else None) for n in range(3))
    task = Task(HOSTILE, HOSTILE, "MR", {HOSTILE: (1, 2)}, cases, channels=(HOSTILE,), terms=HOSTILE, reference=HOSTILE)
    reason = f"nothing at {folder}/a.nii.gz, {folder}/b.nii.gz: [Errno 2] '{folder / 'case.nii.gz'}' {HOSTILE}"
    return [
        scan,
        labels,
        Segmentation(labels.data, labels.affine, {HOSTILE: 0.5}),
        task,
        examples(),
        Episode(HOSTILE, examples(), examples()),
        segmenter,
        Prediction(folder / "case <b>.nii.gz", folder / "out.nii.gz", "done", "", {HOSTILE: 3.25}, 2.0, quality=0.5),
        Prediction(folder / "case.nii.gz", None, "failed", reason, notes=(HOSTILE,)),
    ]


def test_every_line_is_one_short_line_that_names_its_class_and_no_folder(segmenter):
    for thing in everything(segmenter):
        line = repr(thing)
        assert line.startswith(f"{type(thing).__name__}(") and line.endswith(")")
        assert len(line) < 420 and "\n" not in line and "tensor" not in line, line
        assert "Jane" not in line and "home" not in line, line


def test_html_holds_text_as_text_and_names_no_folder(segmenter):
    allowed = {
        "div": {"style"}, "b": set(), "table": {"style"}, "tr": set(), "td": {"style"}, "th": {"style", "scope"},
        "img": {"alt", "width", "height", "style", "src"},
    }  # fmt: skip
    for thing in everything(segmenter):
        html = thing._repr_html_()
        tags = Tags(html)
        assert not any(names - allowed.get(tag, set()) for tag, names in tags.attributes.items())
        assert tags.attributes.keys() <= allowed.keys() and tags.depth == 0
        assert all(source.startswith("data:image/png;base64,") for source in re.findall('src="([^"]*)"', html))
        assert "Jane" not in html and "home" not in html
        assert len(html) < 400_000
    assert HOSTILE in Tags(everything(segmenter)[3]._repr_html_()).text


def test_lines_tell_shape_spacing_orientation_names_and_counts(segmenter):
    scan, labels, segmentation, task, some, episode, adapted, done, failed = map(repr, everything(segmenter))
    assert scan == "Volume(1 channel of 34x36x14 voxels of 1.73x1.73x4.39 mm, LPS, float32)"
    assert labels.endswith("int16)")
    assert segmentation.startswith("Segmentation(34x36x14 voxels of 1.73x1.73x4.39 mm, LPS, certainty: ")
    assert "3 scans of 1 patient, 2 labelled" in task
    assert some == "Examples(5 images of 1 channel and 12x10x8 voxels, 2 classes)"
    assert episode.count("5 images of 1 channel and 12x10x8 voxels, 2 classes") == 2
    assert adapted.endswith("core; CT, from 1 scan by finetune, se_unet_3d)")
    assert "case <b>.nii.gz: done" in done and "3.2 ml, quality 0.50" in done
    assert "failed, nothing at b.nii.gz: [Errno 2] 'case.nii.gz'" in failed


def test_many_names_are_counted():
    task = Task("t", "o", "CT", {f"organ{number}": (number,) for number in range(1, 9)}, ())
    assert repr(task).endswith("targets: organ1, organ2, organ3, organ4, 4 more)")
    assert "organ8: 8" in task._repr_html_()


def test_a_segmenter_tells_what_to_expect(segmenter):
    text = Tags(segmenter._repr_html_()).text
    assert "0.81, 90 % interval 0.70 to 0.90" in text
    segmenter.card.pop("forecast")
    assert "no forecast" in Tags(segmenter._repr_html_()).text


@pytest.mark.parametrize("codes", ["RAS", "LPS", "PIR", "SLA"])
@pytest.mark.parametrize("spacing", [(2.0, 2.0, 2.0), (6.0, 2.0, 2.0), (2.0, 2.0, 6.0)])
def test_the_middle_slice_is_shown_as_radiologists_look_at_it(codes, spacing):
    scan = np.ones((9, 14, 21), dtype=np.float32)
    scan[0, 0, 0] = 0
    # At the front and above, on the right: of each plane the upper left, sagittal slices having no right side.
    scan[4:8, 10:13, 10:19] = 9
    (image,) = pictures(stored(scan, spacing, codes))
    assert image.shape == ((21, 14, 3) if spacing[0] > 2 else (14, 9, 3))
    rows, columns = np.nonzero(image[..., 0] > 0.9)
    assert rows.mean() < image.shape[0] / 2 and columns.mean() < image.shape[1] / 2
    width, height = map(
        int, re.search('width="(\\d+)" height="(\\d+)"', stored(scan, spacing, codes)._repr_html_()).groups()
    )
    mm = np.multiply(scan.shape, spacing)
    across, along = (mm[1], mm[2]) if spacing[0] > 2 else (mm[0], mm[1])
    assert width / height == pytest.approx(across / along, rel=0.02)


def test_a_label_map_shows_its_fullest_slice_in_colours():
    labels = np.zeros((10, 10, 12), dtype=np.int16)
    labels[2:5, 2:5, 9], labels[6:8, 6:8, 9] = 1, 2
    (image,) = pictures(stored(labels, (1, 1, 1), "LPS"))
    assert len(np.unique(image.reshape(-1, 3), axis=0)) == 3
    assert (np.ptp(image, axis=-1) > 0.2).sum() == 13


def test_examples_are_shown_with_their_masks_the_first_ones_only():
    shown = pictures(examples())
    assert len(shown) == 4
    tinted = np.argwhere(np.ptp(shown[0], axis=-1) > 0.1)
    assert shown[0].shape == (10, 12, 3)
    assert sorted(map(tuple, tinted)) == [(row, column) for row in range(2) for column in range(3)]
    flat = examples().slices()
    assert pictures(flat)[0].shape == (10, 12, 3)
    assert len(pictures(Episode("task", examples(), flat))) == 8


def test_large_volumes_make_small_pictures():
    (image,) = pictures(Volume(torch.rand(1, 700, 300, 3), torch.eye(4, dtype=torch.float64)))
    assert max(image.shape[:2]) <= 200


@pytest.mark.parametrize(
    "data",
    [
        torch.full((1, 4, 4, 4), math.nan),
        torch.zeros(2, 4, 4, 4),
        torch.zeros(1, 4, 0, 4),
        torch.zeros(0, 4, 4, 4),
        torch.rand(1, 4, 4, 4).bfloat16(),
        torch.ones(1, 4, 4, 4, dtype=torch.bool),
        torch.zeros(1, 1, 1, 1, dtype=torch.int32),
    ],
    ids=["nan", "flat", "empty", "no channel", "bfloat16", "bool", "one voxel"],
)
@pytest.mark.parametrize("affine", [torch.eye(4), torch.full((4, 4), math.nan), torch.zeros(4, 4)])
def test_odd_volumes_are_shown_all_the_same(data, affine):
    volume = Volume(data, affine.double())
    assert repr(volume).startswith(f"Volume({data.shape[0]} channel")
    assert len(pictures(volume)) == int(bool(data.numel()) and bool(torch.equal(affine, torch.eye(4))))
