"""What people look at: learning curves, scans with reference and prediction side by side, tables and curves of Dice."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from medmeta.data.volume import Volume, grid_difference
from medmeta.files import replacing
from medmeta.representation import COLOURS, axis_across, stretch

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.table import Table

CT_WINDOW = (-160.0, 240.0)
"""HU; the usual soft-tissue window of abdominal CT."""

_DASHES = ("solid", (0, (3, 1.5)))
_PHASE_COLOURS = {"pretrain": "#0072B2", "meta": "#D55E00"}
_ARM_STYLES = {"scratch": ("#777777", "s"), "transfer": ("#0072B2", "o"), "meta": ("#D55E00", "D")}
_ARM_NAMES = {"scratch": "from scratch", "transfer": "plain transfer", "meta": "meta-learned"}
_DPI = 150


@dataclass(frozen=True)
class Panel:
    """One row of a montage.

    Args:
        title: what the row shows, such as the name of the case.
        scan: (C, X, Y, Z); the first channel is drawn.
        reference: (1, X, Y, Z) label values on the grid of the scan, or None where there are none.
        prediction: (1, X, Y, Z) label values on the grid of the scan.
        window: the values drawn black and white, such as CT_WINDOW in HU; by default the 1st and 99.5th percentile of
            the slice, its darkest value left out.
    """

    title: str
    scan: Volume
    reference: Volume | None
    prediction: Volume
    window: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        for name, labels in (("reference", self.reference), ("prediction", self.prediction)):
            if labels is not None and (difference := grid_difference(self.scan, labels)):
                raise ValueError(f"{self.title}: the {name} is on another grid than the scan: {difference}")


def describe_adaptation(method: str, steps: int, space: str = " ") -> str:
    """A way to adapt in words: "own rule", "30 steps", "head 30 steps"."""
    words = ["own", "rule"] if method == "inner" else [*([] if method == "finetune" else [method]), str(steps), "steps"]
    return space.join(words)


def learning_curves(history: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Draws the training loss of a run, and below it the validation Dice where there is any.

    Args:
        history: rows {"phase": str, "step": int, "loss": float | None, "validation_dice": float | None} in the order
            they were written; other keys are let be. Phases are drawn one after the other, also where each counts anew.
        path: the PNG; it appears whole.

    Raises:
        ValueError: no rows.
    """
    if not history:
        raise ValueError("no rows in the history; required: at least one training step")
    validated = any(_is_number(row.get("validation_dice")) for row in history)
    figure = _figure(9, 5.6 if validated else 3.6)
    ratios = (3, 2) if validated else (1,)
    losses, *rest = figure.subplots(len(ratios), 1, sharex=True, squeeze=False, height_ratios=ratios)[:, 0]
    spare = itertools.cycle(COLOURS[:3])
    end = 0
    for number, phase in enumerate(dict.fromkeys(str(row["phase"]) for row in history)):
        rows = [row for row in history if str(row["phase"]) == phase]
        colour = _PHASE_COLOURS.get(phase) or next(spare)
        if number:
            for axes in (losses, *rest):
                axes.axvline(end, color="#444444", linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
        offset = end if rows[0]["step"] <= end and number else 0
        _loss_line(losses, *_points(rows, "loss", offset), colour, phase)
        for validation in rest:
            validation.plot(*_points(rows, "validation_dice", offset), color=colour, marker="o", markersize=4)
        end = offset + max(row["step"] for row in rows)
    losses.set_ylabel("training loss")
    losses.legend(frameon=False, loc="upper right")
    for validation in rest:
        validation.set_ylabel("validation Dice")
        _mark_best(validation)
    (rest or [losses])[0].set_xlabel("step")
    _save(figure, path)


def _points(rows: Sequence[Mapping[str, Any]], key: str, offset: int) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the rows that have a finite value."""
    kept = [(row["step"] + offset, row[key]) for row in rows if _is_number(row.get(key))]
    return np.asarray([step for step, _ in kept], dtype=float), np.asarray([value for _, value in kept], dtype=float)


def _is_number(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _loss_line(axes: Axes, steps: np.ndarray, values: np.ndarray, colour: str, label: str) -> None:
    """Faint raw values under their running mean over a twentieth of the phase."""
    half = len(values) // 40
    sums = np.concatenate([[0.0], np.cumsum(values)])
    first = np.maximum(np.arange(len(values)) - half, 0)
    last = np.minimum(np.arange(len(values)) + half + 1, len(values))
    axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.3)
    marker = "o" if len(values) == 1 else None
    axes.plot(steps, (sums[last] - sums[first]) / (last - first), color=colour, linewidth=2, label=label, marker=marker)


def _mark_best(axes: Axes) -> None:
    """Rings the best validation of each phase: the one whose parameters a phase keeps."""
    axes.margins(y=0.25)
    for line in axes.lines[:]:
        points = np.asarray(line.get_xydata())
        if line.get_marker() != "o" or not len(points):
            continue
        step, dice = points[points[:, 1].argmax()]
        axes.plot(step, dice, marker="o", markersize=9, markerfacecolor="none", markeredgecolor="#222222")
        late = step > np.mean(axes.get_xlim())
        axes.annotate(
            f"best {dice:.3f}", (step, dice), (-4 if late else 4, 7), textcoords="offset points",
            ha="right" if late else "left", va="bottom", fontsize=9, color=line.get_color(),
        )  # fmt: skip


def montage(panels: Sequence[Panel], path: str | Path, targets: Mapping[str, Sequence[int]] | None = None) -> None:
    """Draws each scan alone, with the reference and with the prediction, on the slice that holds most of the reference.

    Each structure has the same say in the choice, so that a large one does not hide the small ones. The slice lies
    across the axis with clearly the coarsest spacing, else it is axial. It is shown as radiologists look at it:
    anterior (or superior) up, the right side of the patient on the left, in true proportions, without empty margins.
    Where there is no reference, or nothing in it, the prediction chooses the slice, and failing that the middle.

    Args:
        panels: the rows.
        path: the PNG; it appears whole.
        targets: name -> label values whose union is outlined; by default each label value is a structure of its own.

    Raises:
        ValueError: no panels.
    """
    if not panels:
        raise ValueError("no panels; required: at least one scan")
    structures = _label_values(panels) if targets is None else {name: tuple(v) for name, v in targets.items()}
    views = [_view(panel, list(structures.values())) for panel in panels]
    width = 2.9
    heights = [float(np.clip(width * view.size_mm[1] / view.size_mm[0], 0.45 * width, 1.4 * width)) for view in views]
    figure = _figure(3 * width, sum(heights) + 0.32 * len(views) + 0.5)
    grid = figure.subplots(len(views), 3, squeeze=False, gridspec_kw={"height_ratios": heights})
    for row, panel, view in zip(grid, panels, views, strict=True):
        titles = (panel.title, "reference" if panel.reference is not None else "no reference", "prediction")
        for axes, title, labels in zip(row, titles, (None, view.reference, view.prediction), strict=True):
            _draw_slice(axes, view)
            axes.set_title(title, fontsize=9, parse_math=False)
            if labels is not None:
                _draw_structures(axes, labels, view.size_mm, structures)
    _structure_legend(figure, structures)
    figure.set_layout_engine("constrained", h_pad=0.07)
    _save(figure, path)


def _label_values(panels: Sequence[Panel]) -> dict[str, tuple[int, ...]]:
    values: set[int] = set()
    for panel in panels:
        for labels in (panel.reference, panel.prediction):
            values |= set() if labels is None else {int(value) for value in labels.data.unique()}
    return {f"label {value}": (value,) for value in sorted(values - {0})}


@dataclass(frozen=True)
class _View:
    """One slice, ready to draw: (height, width) arrays whose first row is the lowest."""

    image: np.ndarray
    reference: np.ndarray | None
    prediction: np.ndarray
    size_mm: tuple[float, float]
    sides: str
    window: tuple[float, float]


def _view(panel: Panel, structures: Sequence[Sequence[int]]) -> _View:
    from nibabel.orientations import apply_orientation, io_orientation

    to_ras = io_orientation(panel.scan.affine.numpy(force=True))
    spacing = np.empty(3)
    spacing[to_ras[:, 0].astype(int)] = panel.scan.spacing
    given = [volume for volume in (panel.scan, panel.reference, panel.prediction) if volume is not None]
    scan, *labels = (apply_orientation(volume.data[0].numpy(force=True), to_ras) for volume in given)
    across = axis_across(spacing)
    index = _fullest_slice(labels, structures, across)
    # The first axis left, R or A, runs to the left of the picture.
    image, *outlines = (volume.take(index, across)[::-1].T for volume in (scan, *labels))
    window = panel.window or stretch(image)
    filled = np.any([image > window[0], *(plane > 0 for plane in outlines)], axis=0)
    rows, columns = _margins(filled.any(axis=1)), _margins(filled.any(axis=0))
    image, *reference, prediction = (plane[rows, columns] for plane in (image, *outlines))
    wide, high = np.delete(spacing, across) * image.shape[::-1]
    size_mm, sides = (float(wide), float(high)), "AP" if across == 0 else "RL"
    return _View(image, reference[0] if reference else None, prediction, size_mm, sides, window)


def _fullest_slice(maps: Sequence[np.ndarray], structures: Sequence[Sequence[int]], axis: int) -> int:
    """The slice with the largest sum, over the structures, of the part of the structure that lies in it."""
    others = tuple(k for k in range(3) if k != axis)
    for labels in maps:
        counts = [np.isin(labels, list(values)).sum(axis=others) for values in structures]
        if parts := [count / count.sum() for count in counts if count.any()]:
            return int(np.sum(parts, axis=0).argmax())
    return maps[0].shape[axis] // 2


def _margins(filled: np.ndarray) -> slice:
    """Where a profile is filled, with a margin of a twentieth."""
    hits = np.flatnonzero(filled) if filled.any() else np.arange(len(filled))
    margin = len(hits) // 20 + 1
    return slice(max(int(hits[0]) - margin, 0), int(hits[-1]) + margin + 1)


def _draw_slice(axes: Axes, view: _View) -> None:
    extent = (0, view.size_mm[0], 0, view.size_mm[1])
    low, high = view.window
    axes.imshow(view.image, cmap="gray", vmin=low, vmax=high, origin="lower", extent=extent, interpolation="bilinear")
    axes.set(xticks=[], yticks=[], facecolor="black")
    for side, x in zip(view.sides, (0.02, 0.98), strict=True):
        axes.text(
            x, 0.5, side, transform=axes.transAxes, color="white", alpha=0.8, fontsize=7, va="center",
            ha="left" if x < 0.5 else "right",
        )  # fmt: skip


def _draw_structures(
    axes: Axes, labels: np.ndarray, size_mm: tuple[float, float], structures: Mapping[str, Sequence[int]]
) -> None:
    """Tints and outlines each structure, a quarter of a voxel inside so that neighbours show side by side."""
    step = size_mm[0] / labels.shape[1], size_mm[1] / labels.shape[0]
    x, y = ((np.arange(-1, count + 1) + 0.5) * mm for count, mm in zip(labels.shape[::-1], step, strict=True))
    for number, values in enumerate(structures.values()):
        mask = np.pad(np.isin(labels, list(values)), 1).astype(float)
        if mask.any():
            colour, dashes = _structure_style(number)
            axes.contourf(x, y, mask, levels=(0.5, 1.5), colors=[colour], alpha=0.2)
            axes.contour(x, y, mask, levels=(0.75,), colors=[colour], linewidths=1.3, linestyles=[dashes])
    axes.set(xlim=(0, size_mm[0]), ylim=(0, size_mm[1]))


def _structure_style(number: int) -> tuple[str, Any]:
    return COLOURS[number % len(COLOURS)], _DASHES[number // len(COLOURS) % len(_DASHES)]


def _structure_legend(figure: Figure, structures: Mapping[str, Sequence[int]]) -> None:
    from matplotlib.lines import Line2D

    if not structures:
        return
    styles = [_structure_style(number) for number in range(len(structures))]
    lines = [Line2D([], [], color=colour, linestyle=dashes, linewidth=2.5) for colour, dashes in styles]
    columns = max(1, min(len(structures), 96 // (max(len(name) for name in structures) + 8)))
    legend = figure.legend(
        lines, list(structures), loc="outside lower center", ncols=columns, frameon=False, fontsize=9
    )
    for text in legend.get_texts():
        text.set_parse_math(False)


def dice_table(result: Mapping[str, Any]) -> Table:
    """One row per length of adaptation, one column per arm, the best of each row in bold.

    Args:
        result: {"dice": {"<steps>": {"scratch": x, "transfer": y, "meta": z}}}; None or NaN is shown as a dash. Where
            there is {"interval": {"<steps>": {"scratch": [low, high], ...}}}, each stands below its mean.
    """
    from rich.table import Table
    from rich.text import Text

    dice, arms = result["dice"], _arms(result["dice"])
    table = Table(title="Dice at equal adaptation", title_justify="left")
    table.add_column("adaptation steps", justify="right")
    for arm in arms:
        table.add_column(Text(_ARM_NAMES.get(arm, arm)), justify="right")
    for steps in _by_steps(dice):
        shown = {arm: f"{value:.3f}" for arm, value in dice[steps].items() if _is_number(value)}
        cells = []
        for arm in arms:
            style = "bold" if arm in shown and shown[arm] == max(shown.values(), key=float) else ""
            interval = _interval(result, steps, arm)
            band = f"\n{interval[0]:.2f} to {interval[1]:.2f}" if interval and arm in shown else ""
            cells.append(Text.assemble((shown.get(arm, "-"), style), (band, "dim")))
        table.add_row(Text(str(steps)), *cells)
    return table


def curves_over_adaptation(results: Mapping[str, Any], path: str | Path) -> None:
    """Draws Dice over the number of adaptation steps, one line per arm, with a band where there is an interval.

    Args:
        results: as for `dice_table`.
        path: the PNG; it appears whole.

    Raises:
        ValueError: no lengths of adaptation.
    """
    dice = results["dice"]
    if not dice:
        raise ValueError("no Dice values; required: at least one length of adaptation")
    figure = _figure(6.4, 4.2)
    axes = figure.subplots()
    spare = itertools.cycle(COLOURS)
    for arm in _arms(dice):
        colour, marker = _ARM_STYLES.get(arm) or (next(spare), "^")
        steps = [step for step in _by_steps(dice) if _is_number(dice[step].get(arm))]
        x = [int(step) for step in steps]
        axes.plot(
            x,
            [dice[step][arm] for step in steps],
            color=colour,
            marker=marker,
            linewidth=2,
            label=_ARM_NAMES.get(arm, arm),
        )
        bands = [(int(step), *band) for step in steps if (band := _interval(results, step, arm))]
        if bands:
            at, low, high = zip(*bands, strict=True)
            axes.fill_between(at, low, high, color=colour, alpha=0.15, linewidth=0)
    _step_axis(axes, sorted({int(step) for step in dice}))
    axes.set(xlabel="adaptation steps", ylabel="Dice")
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.legend(frameon=False, loc="best")
    _save(figure, path)


def arm_panels(
    series: Mapping[str, Sequence[tuple[float, float, float, float]]],
    path: str | Path,
    *,
    baselines: Sequence[str] = (),
    label: str,
) -> None:
    """Draws one small panel for each arm, with the baselines behind it in grey, all on the same axes.

    Args:
        series: arm -> points (x, Dice, low, high) by rising x; x above 0.
        path: the PNG; it appears whole.
        baselines: arms that every panel repeats.
        label: what x is.

    Raises:
        ValueError: no points.
    """
    if not any(series.values()):
        raise ValueError("no Dice values; required: at least one point")
    arms = [arm for arm in series if arm not in baselines] or list(series)
    columns = min(4, len(arms))
    rows = math.ceil(len(arms) / columns)
    figure = _figure(1.0 + 2.3 * columns, 0.8 + 1.8 * rows)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    greys = dict(zip(baselines, itertools.cycle((":", "--")), strict=False))
    for axes, arm in itertools.zip_longest(panels, arms):
        if arm is None:
            axes.set_visible(False)
            continue
        for baseline, line in greys.items():
            x, dice, _, _ = zip(*series[baseline], strict=True)
            axes.plot(x, dice, line, color="#777777", linewidth=1.2, label=_ARM_NAMES.get(baseline, baseline))
        x, dice, low, high = zip(*series[arm], strict=True)
        axes.fill_between(x, low, high, color=COLOURS[0], alpha=0.2, linewidth=0)
        axes.plot(x, dice, marker="o", markersize=3.5, color=COLOURS[0], linewidth=1.8)
        axes.set_title(arm.replace("_", " "), fontsize=9)
        axes.set_xscale("log")
        axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    ticks = sorted({point[0] for points in series.values() for point in points})
    if all(float(tick).is_integer() for tick in ticks):
        panels[0].set_xticks(ticks, [f"{tick:.0f}" for tick in ticks])
        panels[0].minorticks_off()
    figure.supxlabel(label, fontsize=9)
    figure.supylabel("Dice", fontsize=9)
    if greys:
        handles, names = panels[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside upper right", ncols=len(names), frameon=False, fontsize=8)
    _save(figure, path)


def _step_axis(axes: Axes, steps: Sequence[int]) -> None:
    """Doubling lengths lie equally far apart; zero steps keep a place on the left; each length is named."""
    if steps[0] > 0:
        axes.set_xscale("log")
    else:
        axes.set_xscale("symlog", linthresh=next((step for step in steps if step > 0), 1))
    axes.set_xticks(steps, [str(step) for step in steps])
    axes.minorticks_off()


def _arms(dice: Mapping[str, Mapping[str, Any]]) -> list[str]:
    found = dict.fromkeys(arm for values in dice.values() for arm in values)
    return [arm for arm in _ARM_NAMES if arm in found] + [arm for arm in found if arm not in _ARM_NAMES]


def _by_steps(dice: Mapping[str, Any]) -> list[str]:
    return sorted(dice, key=int)


def _interval(result: Mapping[str, Any], steps: str, arm: str) -> tuple[float, float] | None:
    band = result.get("interval", {}).get(steps, {}).get(arm)
    return (band[0], band[1]) if band is not None and all(_is_number(end) for end in band) else None


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def _save(figure: Figure, path: str | Path) -> None:
    with replacing(path) as beside:
        figure.savefig(beside, format="png", dpi=_DPI)
