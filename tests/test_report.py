from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, ornt_transform
from rich.console import Console

from medmeta.data.volume import Volume, read_labels, read_volume
from medmeta.report import CT_WINDOW, Panel, curves_over_adaptation, dice_table, learning_curves, montage

RESULT = {
    "dice": {
        "20": {"scratch": 0.3, "transfer": 0.81, "meta": 0.79},
        "5": {"scratch": 0.1, "transfer": 0.55, "meta": 0.72},
        "0": {"scratch": 0.0, "transfer": math.nan, "meta": None},
    }
}


@pytest.fixture(autouse=True)
def no_pyplot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Importing pyplot fails: the figures must not touch the state that a notebook shares."""
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)


def volume(data: np.ndarray, affine: np.ndarray) -> Volume:
    return Volume(torch.from_numpy(np.ascontiguousarray(data))[None], torch.from_numpy(affine))


def oriented(data: np.ndarray, spacing: tuple[float, float, float], codes: str = "RAS") -> Volume:
    """RAS data, stored along other axes."""
    change = ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(codes))
    affine = np.diag([*spacing, 1.0]) @ inv_ornt_aff(change, data.shape)
    return volume(apply_orientation(data, change), affine)


def pixels(path: Path) -> np.ndarray:
    """(height, width, 3) in 0..1, the first row the uppermost."""
    assert path.read_bytes().startswith(b"\x89PNG")
    return imread(path)[..., :3]


def coloured(image: np.ndarray) -> np.ndarray:
    return np.ptp(image, axis=-1) > 0.2


def near(image: np.ndarray, colour: str) -> np.ndarray:
    wanted = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.abs(image - wanted).max(-1) < 0.05


def black_boxes(image: np.ndarray) -> list[tuple[int, int, int, int]]:
    """Left, right, top, bottom of each picture in a row of pictures with a black frame, from left to right."""
    dark = image.max(-1) < 0.1
    columns = np.flatnonzero(dark.sum(0) > 0.4 * dark.sum(0).max())
    groups = np.split(columns, np.flatnonzero(np.diff(columns) > 3) + 1)
    rows = np.flatnonzero(dark.sum(1) > 0.4 * dark.sum(1).max())
    return [(int(group[0]), int(group[-1]), int(rows[0]), int(rows[-1])) for group in groups]


def head(spacing: tuple[float, float, float] = (1.0, 1.0, 4.0)) -> tuple[np.ndarray, np.ndarray]:
    """RAS; one bright spot at the right front, on slice 3 alone, with its label. Frame and background are dark."""
    scan = np.full((32, 40, 8), 1.0, dtype=np.float32)
    scan[0] = 0.0
    labels = np.zeros(scan.shape, dtype=np.int16)
    spot = np.s_[24:28, 30:34, 3]
    scan[spot], labels[spot] = 100.0, 1
    return scan, labels


def panel(codes: str = "RAS", title: str = "case", reference: bool = True) -> Panel:
    scan, labels = head()
    maps = oriented(labels, (1, 1, 4), codes)
    return Panel(title, oriented(scan, (1, 1, 4), codes), maps if reference else None, maps, (0.0, 100.0))


@pytest.mark.parametrize("codes", ["LPS", "PIR", "SLA"])
def test_a_montage_looks_the_same_however_the_scan_is_stored(tmp_path: Path, codes: str) -> None:
    montage([panel("RAS")], tmp_path / "ras.png")
    montage([panel(codes)], tmp_path / "other.png")
    assert np.array_equal(pixels(tmp_path / "ras.png"), pixels(tmp_path / "other.png"))
    assert {path.name for path in tmp_path.iterdir()} == {"ras.png", "other.png"}


def test_a_montage_shows_the_labelled_slice_as_radiologists_look_at_it(tmp_path: Path) -> None:
    montage([panel()], tmp_path / "m.png", targets={"lesion": [1]})
    image = pixels(tmp_path / "m.png")
    third = image.shape[1] // 3
    # The spot is on slice 3 only; the right of the patient is on the left, the front at the top.
    frame = image[: int(0.8 * image.shape[0]), :third]
    inner = frame[40:, 10:-10]
    dark = inner.mean(-1) < 0.3
    rows, columns = np.nonzero(dark)
    window = inner[rows.min() : rows.max(), columns.min() : columns.max()].mean(-1)
    y, x = (np.mean(axis) for axis in np.nonzero(window > 0.9))
    assert x < 0.45 * window.shape[1] and y < 0.45 * window.shape[0]
    assert not coloured(image[:, :third]).any(), "the scan alone carries no outline"
    body = image[: int(0.85 * image.shape[0])]
    assert coloured(body[:, third : 2 * third]).any() and coloured(body[:, 2 * third :]).any()
    assert coloured(image[int(0.85 * image.shape[0]) :]).any(), "the legend"


@pytest.mark.parametrize(("shape", "spacing"), [((20, 40, 6), (2.0, 1.0, 5.0)), ((24, 6, 48), (2.0, 6.0, 1.0))])
def test_a_montage_keeps_true_proportions(
    tmp_path: Path, shape: tuple[int, int, int], spacing: tuple[float, float, float]
) -> None:
    scan, labels = np.full(shape, 1.0, dtype=np.float32), np.zeros(shape, dtype=np.int16)
    labels[5, 2, 2] = 1
    maps = oriented(labels, spacing)
    montage([Panel("square", oriented(scan, spacing), maps, maps, (0.5, 100.0))], tmp_path / "m.png")
    boxes = black_boxes(pixels(tmp_path / "m.png"))
    assert len(boxes) == 3
    for left, right, top, bottom in boxes:
        assert (right - left) / (bottom - top) == pytest.approx(1.0, abs=0.03), "40 x 40 or 48 x 48 mm"


def test_a_small_structure_is_not_hidden_by_a_large_one(tmp_path: Path) -> None:
    scan, labels = head()
    labels[2:30, 2:38, 6] = 2
    labels[2:20, 2:38, 3] = 2
    maps = oriented(labels, (1, 1, 4))
    montage([Panel("two", oriented(scan, (1, 1, 4)), maps, maps)], tmp_path / "m.png")
    image = pixels(tmp_path / "m.png")
    orange = near(image[: int(0.85 * image.shape[0])], "#E69F00")
    assert orange.sum() > 50, "slice 3, which holds both structures, and not slice 6"


def test_a_montage_draws_whatever_it_is_given(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    scan, labels = head()
    empty, flat, holes = np.zeros_like(labels), np.zeros_like(scan), scan.copy()
    holes[:4] = math.nan
    two_channels = oriented(scan, (1, 1, 4))
    two_channels = Volume(two_channels.data.repeat(2, 1, 1, 1), two_channels.affine)
    maps = oriented(labels, (1, 1, 4))
    rows = [
        panel(reference=False, title="costs $5_ and $6^"),
        Panel("nothing found", oriented(scan, (1, 1, 4)), oriented(empty, (1, 1, 4)), oriented(empty, (1, 1, 4))),
        Panel("flat", oriented(flat, (1, 1, 4)), maps, maps),
        Panel("holes", oriented(holes, (1, 1, 4)), maps, oriented(np.ones_like(labels), (1, 1, 4))),
        Panel("two channels", two_channels, None, maps),
        Panel("one slice", oriented(scan[..., 3:4], (1, 1, 4)), None, oriented(labels[..., 3:4], (1, 1, 4))),
    ]
    montage(rows, tmp_path / "m.png", targets={f"_structure $_{number}": [number] for number in range(1, 10)})
    assert pixels(tmp_path / "m.png").shape[0] > 5 * 200
    assert not [str(warning.message) for warning in recwarn if "DeprecationWarning" not in str(warning.category)]
    with pytest.raises(ValueError, match="no panels"):
        montage([], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_a_panel_refuses_labels_on_another_grid() -> None:
    scan, labels = head()
    with pytest.raises(ValueError, match=r"prediction is on another grid.*spacing"):
        Panel("case", oriented(scan, (1, 1, 4)), None, oriented(labels, (1, 2, 4)))


@pytest.mark.parametrize("name", ["Task04_Hippocampus", "CHAOS_AbdomenMR"])
def test_a_montage_of_real_scans(shared_data: Path, tmp_path: Path, name: str) -> None:
    file = min((shared_data / name / "labelsTr").glob("*.nii*"))
    labels = read_labels(file)
    scan = read_volume(shared_data / name / "imagesTr" / file.name)
    montage([Panel(file.name, scan, labels, labels, CT_WINDOW if scan.data.min() < -500 else None)], tmp_path / "m.png")
    image = pixels(tmp_path / "m.png")
    width = image.shape[1] // 3
    counts = [coloured(image[:, part * width : (part + 1) * width]).sum() for part in (1, 2)]
    assert counts[0] > 500 and counts[0] == pytest.approx(counts[1], rel=0.25)


def history() -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for phase, steps in (("pretrain", 60), ("meta", 40)):
        for step in range(1, steps + 1):
            dice = step / 100 if step % 10 == 0 else None
            rows.append({"phase": phase, "step": step, "loss": 1 / step, "validation_dice": dice, "seconds": step})
    return rows


def test_learning_curves_tell_the_phases_apart(tmp_path: Path) -> None:
    learning_curves(history(), tmp_path / "curves.png")
    image = pixels(tmp_path / "curves.png")
    body = image[:, : int(0.8 * image.shape[1])]
    first, second = (np.nonzero(near(body, colour))[1] for colour in ("#0072B2", "#D55E00"))
    # The second phase counts its steps anew and still follows the first one.
    assert first.size > 500 and second.size > 300 and np.median(first) < np.median(second)
    assert first.max() <= np.quantile(second, 0.02) + 8


def test_learning_curves_of_short_and_broken_histories(tmp_path: Path) -> None:
    learning_curves(history()[:1], tmp_path / "one.png")
    broken = [*history(), {"phase": "meta", "step": 41, "loss": math.nan, "validation_dice": math.nan, "seconds": 1.0}]
    learning_curves(
        [*broken, {"phase": "other", "step": 1, "loss": None, "validation_dice": 0.5}], tmp_path / "nan.png"
    )
    heights = [pixels(tmp_path / name).shape[0] for name in ("one.png", "nan.png")]
    assert heights[0] < 0.8 * heights[1], "one panel where nothing was validated"
    with pytest.raises(ValueError, match="no rows"):
        learning_curves([], tmp_path / "none.png")
    assert {path.name for path in tmp_path.iterdir()} == {"one.png", "nan.png"}


def printed(result: dict[str, object]) -> str:
    console = Console(width=100, record=True, file=open("/dev/null", "w"), force_terminal=True)  # noqa: SIM115
    console.print(dice_table(result))
    return console.export_text(styles=True)


def test_the_table_puts_lengths_in_order_and_the_best_in_bold() -> None:
    text = printed(RESULT)
    lines = [line for line in text.splitlines() if "0." in line]
    assert ["0.000" in lines[0], "0.720" in lines[1], "0.810" in lines[2]] == [True] * 3
    assert "\x1b[1m0.720" in text and "\x1b[1m0.810" in text and "\x1b[1m0.550" not in text
    assert lines[0].count(" - ") == 2, "what was not measured is a dash"
    assert text.index("from scratch") < text.index("plain transfer") < text.index("meta-learned")
    tie = printed({"dice": {"5": {"[red]arm": 0.7001, "meta": 0.7}}, "interval": {"5": {"meta": [0.61, 0.79]}}})
    assert tie.count("\x1b[1m0.700") == 2 and "[red]arm" in tie and "0.61 to 0.79" in tie


def test_curves_over_adaptation_draw_each_arm(tmp_path: Path) -> None:
    curves_over_adaptation(RESULT, tmp_path / "plain.png")
    image = pixels(tmp_path / "plain.png")
    assert all(near(image, colour).sum() > 200 for colour in ("#777777", "#0072B2", "#D55E00"))
    interval = {step: {arm: [0.0, 1.0] for arm in row} for step, row in RESULT["dice"].items()}
    curves_over_adaptation({**RESULT, "interval": interval}, tmp_path / "band.png")
    assert (pixels(tmp_path / "band.png").mean(-1) < 0.99).sum() > 2 * (image.mean(-1) < 0.99).sum()
    single = {"dice": {"8": {"meta": 0.5, "ours": 0.4}}}
    curves_over_adaptation(single, tmp_path / "single.png")
    with pytest.raises(ValueError, match="no Dice"):
        curves_over_adaptation({"dice": {}}, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
