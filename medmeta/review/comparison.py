"""The page of a benchmark: tables and curves in place of scans."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medmeta.report import describe_adaptation
from medmeta.review.page import Cell, PageTable, count_scans, with_interval, write_review

if TYPE_CHECKING:
    from medmeta.data.tasks import Task


def write_comparison(
    folder: str | Path,
    rows: Sequence[Mapping[str, Any]],
    task: Task,
    *,
    baseline: str,
    costs: Mapping[str, Mapping[str, float]] | None = None,
    pictures: Mapping[str, str | Path] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Path:
    """Writes the page of a benchmark: Dice and surface Dice of every arm, structure by structure, and what it cost.

    Args:
        folder: as of `write_review`.
        rows: of `benchmark.summarise`; arms are shown in their order.
        task: the held-out task.
        baseline: the arm that the others were tested against.
        costs: arm -> meta_seconds, time_ratio and peak_bytes, as in the `result.json` of a benchmark.
        pictures: as of `write_review`.
        settings: as of `write_review`.

    Returns:
        the page.

    Raises:
        InputError: as of `write_review`.
        ValueError: no rows.
    """
    if not rows:
        raise ValueError("no rows; required: at least one arm that was scored")
    summary = {"Organ that no arm saw": task.name}
    for shots in sorted({row["shots"] for row in rows}):
        best = max((row for row in rows if row["shots"] == shots), key=lambda row: row["dice"])
        summary[f"Best Dice from {count_scans(shots)}"] = f"{best['dice']:.2f} ({best['arm']})"
    tests = f"+ and - mark a Dice that differs from that of {baseline} (p < 0.05, Wilcoxon's test, corrected by Holm)."
    tables = [
        _arms_table("Dice", rows, "dice", "interval", f"Mean, with its 95 % interval. {tests}", baseline),
        _arms_table("Surface Dice", rows, "surface_dice", "surface_interval", "Mean, with its 95 % interval."),
        *_structure_tables(rows),
        _cost_table(rows, costs or {}),
    ]
    return write_review(
        folder,
        (),
        targets=task.targets,
        title=f"Benchmark on {task.name}",
        summary=summary,
        tables=tables,
        pictures=pictures,
        settings=settings,
    )


_Column = tuple[int, str, int]
"""Number of scans, method, steps."""


def _columns(rows: Sequence[Mapping[str, Any]]) -> dict[_Column, dict[str, Mapping[str, Any]]]:
    """The rows of each number of scans and way to adapt, by arm; the learners' own rule comes first."""
    columns: dict[_Column, dict[str, Mapping[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: (row["shots"], row["method"] != "inner", row["method"], row["steps"])):
        columns.setdefault((row["shots"], row["method"], row["steps"]), {})[row["arm"]] = row
    return columns


def _arms_table(
    title: str, rows: Sequence[Mapping[str, Any]], key: str, interval: str, note: str, baseline: str = ""
) -> PageTable:
    """Arms down, numbers of scans and ways to adapt across; marked where the test against the baseline says so."""
    columns = _columns(rows)

    def cell(arm: str, column: Mapping[str, Mapping[str, Any]]) -> str | Cell:
        if arm not in column:
            return ""
        row, mark = column[arm], ""
        if baseline in column and row["p"] is not None and row["p"] < 0.05:
            mark = " +" if row[key] > column[baseline][key] else " -"
        best = row[key] == max(each[key] for each in column.values())
        return Cell(with_interval(row[key], *row[interval]) + mark, row[key], best)

    lines = [[arm, *(cell(arm, column) for column in columns.values())] for arm in _arms(rows)]
    names = [f"{count_scans(shots)}, {describe_adaptation(method, steps)}" for shots, method, steps in columns]
    return PageTable(title, ["Arm", *names], lines, note)


def _structure_tables(rows: Sequence[Mapping[str, Any]]) -> list[PageTable]:
    """One for each way to adapt, from the most scans; none where there is one structure."""
    most, structures = max(row["shots"] for row in rows), list(rows[0]["by_target"])
    return [
        PageTable(
            f"Dice of each structure from {count_scans(most)}, {describe_adaptation(method, steps)}",
            ["Arm", *structures],
            [
                [arm, *(Cell(f"{row['by_target'][name]:.3f}", row["by_target"][name]) for name in structures)]
                for arm, row in column.items()
            ],
        )
        for (shots, method, steps), column in _columns(rows).items()
        if shots == most and len(structures) > 1
    ]


def _cost_table(rows: Sequence[Mapping[str, Any]], costs: Mapping[str, Mapping[str, float]]) -> PageTable:
    ways = list(dict.fromkeys((row["method"], row["steps"]) for row in rows))

    def line(arm: str) -> list[str]:
        cost = costs.get(arm)
        seconds = [
            [row["adapt_seconds"] for row in rows if (row["arm"], row["method"], row["steps"]) == (arm, *way)]
            for way in ways
        ]
        return [
            arm,
            *(
                (f"{cost['meta_seconds']:.0f}", f"{cost['time_ratio']:.1f}", f"{cost['peak_bytes'] / 2**20:.0f}")
                if cost
                else ("", "", "")
            ),
            *(f"{statistics.fmean(each):.1f}" if each else "" for each in seconds),
        ]

    columns = ["Arm", "Meta-training s", "One meta-step, x plain pass", "Its peak memory MiB"]
    columns += [f"Adaptation s, {describe_adaptation(*way)}" for way in ways]
    return PageTable("Cost", columns, [line(arm) for arm in _arms(rows)])


def _arms(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(row["arm"] for row in rows))
