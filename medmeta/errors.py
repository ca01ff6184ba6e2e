"""The errors a user can mend. Each says what was given, what is required and the remedy, and names the file."""

from __future__ import annotations

from pathlib import Path


class MedmetaError(Exception):
    """Something the caller can mend; the command line prints it as one line, without a traceback."""


class InputError(MedmetaError, ValueError):
    """A file, a folder or a value that cannot be used.

    Args:
        where: the file, folder or setting that was given.
        found: what was found there.
        required: what would have been usable.
        remedy: what to do next.
    """

    def __init__(self, where: str | Path, found: str, required: str, remedy: str = "") -> None:
        self.where, self.found, self.required, self.remedy = str(where), found, required, remedy
        line = f"{self.where}: found {found}; required: {required}." + (f" {remedy}" if remedy else "")
        # One error is one line, whatever a file name or a library's message holds.
        super().__init__(" ".join(line.split()))
