"""Files written whole or not at all; tensors without pickle."""

from __future__ import annotations

import glob
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from medmeta.errors import InputError


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary name beside `path`, with its suffix; it takes its place when the block ends without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=_prefix(path), suffix="".join(path.suffixes[-2:]), dir=path.parent)
    os.close(handle)
    try:
        yield Path(name)
        # mkstemp is private to the user; what it becomes follows the user's own rule.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def _prefix(path: Path) -> str:
    return f".writing-{path.name[:80]}-"


def sweep(path: str | Path) -> None:
    """Remove what killed writers of `path` left beside it. Only for a file that nobody else is writing."""
    path = Path(path)
    for left in path.parent.glob(f"{glob.escape(_prefix(path))}*"):
        left.unlink(missing_ok=True)


@contextmanager
def replacing_folder(folder: str | Path) -> Iterator[Path]:
    """An empty folder beside `folder`, which takes its place when the block ends without an error.

    Raises:
        InputError: it cannot be written.
    """
    place = Path(folder).resolve()
    beside, before = (place.with_name(f".{what}-{uuid.uuid4().hex}") for what in ("writing", "replaced"))
    try:
        beside.mkdir(parents=True)
        yield beside
        if place.is_dir():
            os.rename(place, before)
        try:
            os.rename(beside, place)
        except OSError:
            if before.is_dir():
                os.rename(before, place)
            raise
    except OSError as error:
        remedy = "Check permissions and free space."
        raise InputError(folder, error.strerror or str(error), "a folder that can be written", remedy) from error
    finally:
        for left in (beside, before):
            shutil.rmtree(left, ignore_errors=True)


def write_json(path: str | Path, value: Any) -> None:
    """Write JSON, indented; NaN becomes null, since JSON has none."""
    with replacing(path) as beside:
        beside.write_text(json.dumps(_finite(value), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return str(value) if isinstance(value, Path) else value


def read_json(path: str | Path) -> Any:
    """Read JSON.

    Raises:
        InputError: missing, unreadable, or not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(path, "no such file", "a JSON file") from error
    except (OSError, ValueError) as error:
        raise InputError(path, f"unreadable JSON ({error})", "a JSON file") from error


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], facts: dict[str, str] | None = None) -> None:
    """Write named tensors as safetensors, with text facts in its header."""
    from safetensors.torch import save

    # Not save_file: it writes to a temporary name of its own, which a killed writer would leave behind.
    content = save({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, facts)
    with replacing(path) as beside, open(beside, "wb") as file:
        file.write(content)
        # On disk before it takes the old one's place, so that a machine that goes down leaves one of the two whole.
        file.flush()
        os.fsync(file.fileno())


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read what `write_tensors` wrote.

    Raises:
        InputError: missing, truncated or not safetensors.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except FileNotFoundError as error:
        raise InputError(path, "no such file", "a safetensors file") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(path, f"an unreadable file ({error})", "a whole safetensors file") from error


def refuse_existing(folder: Path) -> None:
    """Raise InputError where `folder` holds anything, since nothing is overwritten unasked, or cannot be made."""
    required, remedy = "a new or empty folder", "Name another one."
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise InputError(folder, "something that stands there already", required, remedy)
    except OSError as error:
        raise InputError(folder, error.strerror or str(error), required, remedy) from error
    refuse_unwritable(folder)


def refuse_unwritable(path: Path) -> None:
    """Raise InputError where a file or folder could not be made: known before the work and not after it."""
    above = next(parent for parent in path.absolute().parents if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        found = "no permission to write in" if above.is_dir() else "a file in place of the folder"
        raise InputError(path, f"{found} {above}", "a place that can be written to", "Name another one.")
