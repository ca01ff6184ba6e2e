"""What a person sees while work goes on: a bar with a time estimate on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from medmeta.train import Row

PLAIN_SECONDS = 10.0
"""Without a terminal, one line about unfinished work every so many seconds."""


class Reporter:
    """Shows how far some work is. Use as a context manager.

    Args:
        console: where to show it.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bars: dict[str, TaskID] = {}
        self._last, self._started = 0.0, time.monotonic()
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
        )

    def __enter__(self) -> Reporter:
        # Elsewhere Rich before 14.3 ends a bar that was never shown with an empty line.
        if self.console.is_terminal:
            self._progress.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.console.is_terminal:
            self._progress.__exit__(kind, error, trace)

    def __call__(self, what: str, done: int, total: int, note: str = "") -> None:
        """Show that `done` of `total` parts of `what` are finished."""
        if self.console.is_terminal:
            if what not in self._bars:
                self._bars[what] = self._progress.add_task(what, total=total, note=note)
            self._progress.update(self._bars[what], completed=done, total=total, note=note)
            return
        now = time.monotonic()
        if done == total or now - self._last >= PLAIN_SECONDS:
            self._last = now
            line = f"[{now - self._started:6.0f} s] {what}: {done}/{total} {note}".rstrip()
            self.console.print(line, markup=False, highlight=False)

    def trial(self, what: str, done: int, total: int) -> None:
        """As a call, for work whose description changes with every part."""
        self("comparing", done, total, what)

    def row(self, steps: dict[str, int]) -> Callable[[Row], None]:
        """A logger of training rows, given the number of steps of each phase."""
        dice = ""

        def log(row: Row) -> None:
            nonlocal dice
            if row["validation_dice"] is not None:
                dice = f", validation Dice {row['validation_dice']:.3f}"
            total = steps.get(row["phase"], row["step"])
            self(f"training ({row['phase']})", row["step"], total, f"loss {row['loss']:.3f}{dice}")

        return log
