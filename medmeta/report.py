"""What people look at: learning curves, scans with reference and prediction side by side, tables and curves of Dice."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from medmeta.data.volume import Volume, grid_difference
from medmeta.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.table import Table

CT_WINDOW = (-160.0, 240.0)
"""HU; the usual soft-tissue window of abdominal CT."""

# Okabe and Ito (2008): told apart by people with any of the common colour vision deficiencies.
_COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#CC79A7", "#D55E00", "#0072B2")
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


def learning_curves(history: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Draws the training loss and the validation Dice of a run; the file appears whole.

    Args:
        history: rows {"phase": str, "step": int, "loss": float or None, "validation_dice": float or None, "seconds": float}
            in the order they were written. Phases are drawn one after the other, also where each counts its steps anew.
        path: the PNG.

    Raises:
        ValueError: no rows.
        InputError: the file cannot be written.
    """
    if not history:
        raise ValueError("no rows in the history; required: at least one training step")
    figure = _figure(9, 5.6)
    losses, validation = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": (3, 2)})
    start = 0.0
    phases = list(dict.fromkeys(str(row["phase"]) for row in history))
    spare = itertools.cycle(_COLOURS[:3])
    for number, phase in enumerate(phases):
        rows = [row for row in history if str(row["phase"]) == phase]
        colour = _PHASE_COLOURS.get(phase) or next(spare)
        offset = start if number and rows[0]["step"] < start else 0.0
        _loss_line(losses, *_points(rows, "loss", offset), colour, phase)
        steps, dice = _points(rows, "validation_dice", offset)
        validation.plot(steps, dice, color=colour, marker="o", markersize=3.5, linewidth=1.6)
        end = offset + max(row["step"] for row in rows)
        if number:
            for axes in (losses, validation):
                axes.axvline(start, color="#444444", linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
        start = end
    losses.set_ylabel("training loss")
    losses.legend(frameon=False, title=f"{_duration(history[-1].get('seconds'))}")
    validation.set(ylabel="validation Dice", xlabel="step")
    _mark_best(validation)
    if not validation.has_data() or not any(len(line.get_xdata()) for line in validation.lines):
        validation.text(0.5, 0.5, "no validation yet", transform=validation.transAxes, ha="center", color="#777777")
    _save(figure, path)


def _points(rows: Sequence[Mapping[str, Any]], key: str, offset: float) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the rows that have a finite value."""
    kept = [(row["step"] + offset, row[key]) for row in rows if row.get(key) is not None and math.isfinite(row[key])]
    steps, values = zip(*kept, strict=True) if kept else ((), ())
    return np.asarray(steps, dtype=float), np.asarray(values, dtype=float)
