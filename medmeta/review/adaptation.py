"""The page of a model that was adapted to a few scans."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medmeta.report import learning_curves
from medmeta.review.cases import ReviewCase
from medmeta.review.page import Cell, PageTable, count_scans, with_interval, write_review

if TYPE_CHECKING:
    from medmeta.data.tasks import Task
    from medmeta.segmenter import Segmenter


def write_adaptation(
    folder: str | Path,
    segmenter: Segmenter,
    task: Task,
    *,
    losses: Sequence[tuple[int, int, float]] = (),
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Writes the page of an adaptation: the labelled scans, what was tried on them, the forecast, the loss.

    Where the way to adapt was chosen by leaving scans out, each scan has the scores of a model that never saw it.

    Args:
        folder: as of `write_review`. The page holds the scans: not the folder of a model that is to be passed on.
        segmenter: what `adapt_to` made.
        task: what it was given.
        losses: (step, steps, loss) as `adapt_to` told its progress; those of the final adaptation are drawn.
        progress: as of `write_review`.

    Returns:
        the page.

    Raises:
        InputError: as of `write_review`.
    """
    card, cases = segmenter.card, task.labelled.cases
    left_out = card.get("left_out", {"cases": [], "mean_dice": {}})
    scores = {row["case"]: {name: row[name] for name in segmenter.targets} for row in left_out["cases"]}
    summary = {"Labelled scans": str(len(cases)), "Adapted by": card["method"]}
    note = "From 3 labelled scans on, each is scored by a model that never saw it, and the Dice on others is forecast."
    tables = []
    if scores:
        forecast = card["forecast"]
        low, high = forecast["scan_interval"]
        summary |= {
            "Dice expected on unseen scans": with_interval(forecast["dice"], *forecast["mean_interval"], digits=2),
            "90 % of single scans": f"{low:.2f} to {high:.2f}",
        }
        note = "The scores of a scan are those of a model that was adapted without it."
        tables = [_tried_table(left_out), _forecast_table(forecast, len(cases))]
    # Tables of their own, and what may name folders or files of patients.
    apart = ("left_out", "forecast", "unlabelled", "task")
    settings = {
        "adapted": {name: value for name, value in card.items() if name not in apart},
        "working grid": segmenter.preprocess.to_dict(),
        "patch": segmenter.patch,
        "network": segmenter.model.learner.net.spec,
        "learner": segmenter.model.learner.name,
        "trained on": [each["name"] for each in segmenter.model.card.get("training_tasks", [])],
    }
    shown = [
        ReviewCase(
            case.id, case.images[0], case.labels, None, scores.get(case.id, {}), window=segmenter.preprocess.window
        )
        for case in cases
    ]
    with tempfile.TemporaryDirectory() as temporary:
        return write_review(
            folder,
            shown,
            targets=segmenter.targets,
            title=f"Adapted to {', '.join(segmenter.targets)} from {count_scans(len(cases))}",
            summary=summary,
            note=note,
            tables=tables,
            pictures=_loss_curve(losses, card, Path(temporary) / "loss.png"),
            settings=settings,
            progress=progress,
        )


def _loss_curve(losses: Sequence[tuple[int, int, float]], card: Mapping[str, Any], path: Path) -> dict[str, Path]:
    """Caption -> picture; none where nothing was told."""
    # The steps of all models that were trained count on; the last one is kept.
    before = losses[-1][1] - card["steps"] if losses else 0
    final = [(step - before, loss) for step, _, loss in losses if step > before]
    if not final:
        return {}
    learning_curves([{"phase": card["method"], "step": step, "loss": loss} for step, loss in final], path)
    return {"Loss of the final adaptation": path}


def _tried_table(left_out: Mapping[str, Any]) -> PageTable:
    means = left_out["mean_dice"]
    best = max(means.values())
    rows: list[tuple[str, Cell | str]] = [
        (name, Cell(f"{dice:.3f}", dice, dice == best)) for name, dice in means.items()
    ]
    rows += [
        (name, f"{behind['dice']:.3f} behind on {count_scans(behind['scans'])}, no more tried")
        for name, behind in left_out.get("behind", {}).items()
    ]
    note = "Mean over structures and scans, each scan left out of the adaptation in turn. The best decides."
    return PageTable("Ways to adapt, on scans left out", ("Way", "Dice"), rows, note)


def _forecast_table(forecast: Mapping[str, Any], scans: int) -> PageTable:
    expected = {0: (forecast["dice"], *forecast["mean_interval"])}
    expected |= {int(more): values for more, values in forecast["more"].items()}
    rows = [
        (f"{scans + more}" + (f" ({more} more)" if more else ""), Cell(f"{dice:.2f}", dice), f"{low:.2f} to {high:.2f}")
        for more, (dice, low, high) in expected.items()
    ]
    note = "Mean Dice to expect on unseen scans like these, with its 90 % interval."
    return PageTable("Forecast", ("Labelled scans", "Dice", "90 % interval"), rows, note)
