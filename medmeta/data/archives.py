"""Tar and zip archives, unpacked as if their author meant harm: every name is judged, every byte is counted."""

from __future__ import annotations

import glob
import gzip
import io
import os
import shutil
import stat
import struct
import tarfile
import unicodedata
import uuid
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO

from medmeta.data.manifests import relative_path
from medmeta.errors import InputError

SUFFIXES = (".tar", ".tar.gz", ".tgz", ".zip")

_CHUNK = 2**20
_DAMAGED = (
    OSError, EOFError, zlib.error, struct.error, tarfile.TarError, zipfile.BadZipFile, ValueError, LookupError,
    RuntimeError, OverflowError,
)  # fmt: skip
"""All that tarfile, zipfile and gzip raise over a damaged archive, and the file system over what is in it."""


@dataclass(frozen=True)
class Limits:
    """What an archive may unpack to.

    Args:
        nbytes: bytes of all files together.
        files: files and folders together.
        ratio: bytes of all files to bytes of the archive. Scans are compressed already, so honest archives stay low.
    """

    nbytes: int = 2**40
    files: int = 200_000
    ratio: float = 100.0


@dataclass(frozen=True)
class _Member:
    """A file or, without content, a folder of an archive."""

    name: str
    open: Callable[[], IO[bytes]] | None


def extract(
    archive: str | Path,
    to: str | Path,
    *,
    within: str = ".",
    limits: Limits | None = None,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Unpack an archive into a new folder, which appears whole or not at all.

    Only plain files and folders are unpacked; owners, times and permissions that the archive states are left out.

    Args:
        archive: .tar, .tar.gz, .tgz or .zip.
        to: the folder to make.
        within: the folder of the archive that becomes `to`; what lies beside it is not kept.
        limits: what the archive may unpack to, by default `Limits()`.
        progress: called with the bytes unpacked so far.

    Raises:
        InputError: a damaged archive; an absolute path, "..", a link, a device or a name that comes twice in it; more
            than `limits`; `to` holds something or cannot be written. Nothing is left behind.
    """
    archive, to, limits = Path(archive), Path(to), limits or Limits()
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise InputError(to, "something that stands there already", "a new or empty folder", "Name another one.")
    sweep(to)
    beside = to.with_name(f"{_prefix(to)}{uuid.uuid4().hex}")
    try:
        size = archive.stat().st_size
        most = min(limits.nbytes, int(limits.ratio * size))
        beside.mkdir(parents=True)
        _unpack(archive, beside, limits, most, progress)
        if not (beside / within).is_dir():
            raise InputError(archive, f"no folder {within!r}", "it in the archive", "Is it the right archive?")
        if to.is_dir():
            to.rmdir()
        os.replace(beside / within, to)
    except InputError:
        raise
    except _DAMAGED as error:
        found = f"a failure to unpack ({' '.join(str(error).split())[:160] or type(error).__name__})"
        raise InputError(archive, found, "a whole archive, and a place to write to with room for its files") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def sweep(to: Path) -> None:
    """Remove what killed calls of `extract` left beside `to`. Only for a folder that nobody else unpacks."""
    for left in to.parent.glob(f"{glob.escape(_prefix(to))}*"):
        shutil.rmtree(left, ignore_errors=True)


def _prefix(to: Path) -> str:
    return f".unpacking-{to.name[:80]}-"


def _unpack(archive: Path, folder: Path, limits: Limits, most: int, progress: Callable[[int], None] | None) -> None:
    seen: dict[str, bool] = {}  # whether it is a folder
    unpacked = 0
    for member in _members(archive):
        path = _admitted(member, archive, seen)
        if len(seen) > limits.files:
            raise InputError(archive, f"over {limits.files} files and folders", f"at most {limits.files}", _BY_HAND)
        place = folder / path
        if member.open is None:
            place.mkdir(parents=True, exist_ok=True)
            continue
        place.parent.mkdir(parents=True, exist_ok=True)
        with member.open() as source, open(place, "xb") as target:
            # Counted as they come: the size that an archive states is part of what may be wrong.
            while chunk := source.read(_CHUNK):
                unpacked += len(chunk)
                if unpacked > most:
                    required = f"at most {limits.nbytes} bytes, and {limits.ratio:g} times the archive's own"
                    raise InputError(archive, f"over {most} bytes of files", required, _BY_HAND)
                target.write(chunk)
                if progress is not None:
                    progress(unpacked)


_BY_HAND = "Unpack it by hand if you trust its source."


def _admitted(member: _Member, archive: Path, seen: dict[str, bool]) -> PurePosixPath:
    """Where a member goes, once its name is found harmless; `seen` grows by it and the folders it lies in."""
    name = member.name
    if any(character in "\\:" or unicodedata.category(character) in ("Cc", "Cs") for character in name):
        raise InputError(archive, f"the name {name!r}", "names without backslash, colon and control characters")
    path = relative_path(name, archive)
    # Names that differ in case or in how an accent is spelled are one file on some systems.
    keys = [unicodedata.normalize("NFC", str(part)).casefold() for part in (path, *path.parents)][:-1]
    for key in keys[1:]:
        if not seen.setdefault(key, True):
            raise InputError(archive, f"the file {key!r} with files inside", "each name once")
    folder = member.open is None
    if not keys and not folder:
        raise InputError(archive, f"the name {name!r}", "a file name")
    if keys and keys[0] in seen and not (folder and seen[keys[0]]):
        raise InputError(archive, f"the name {str(path)!r} twice", "each name once")
    if keys:
        seen[keys[0]] = folder
    return path


def _members(archive: Path) -> Iterator[_Member]:
    name = archive.name.lower()
    if name.endswith(".zip"):
        return _zip_members(archive)
    if name.endswith(SUFFIXES):
        return _tar_members(archive, gzip.open if name.endswith("gz") else open)
    raise InputError(archive, f"the suffix {archive.suffix!r}", f"one of {', '.join(SUFFIXES)}")


def _tar_members(archive: Path, opener: Callable[..., io.BufferedIOBase]) -> Iterator[_Member]:
    with (
        opener(archive, "rb") as stream,
        # typeshed asks for a stream that can be written as well.
        tarfile.open(fileobj=_ShortReads(stream), mode="r:") as tar,  # type: ignore[call-overload]
    ):
        while (member := tar.next()) is not None:
            tar.members.clear()  # of no use here, and they would pile up
            if member.issparse() or not (member.isreg() or member.isdir()):
                raise InputError(archive, f"{member.name!r}, a link or a device", "plain files and folders")
            yield _Member(member.name, None if member.isdir() else partial(_content, tar, member))
        # tarfile takes a cut in a header for the end, and leaves the checksum of a gzip stream unread.
        stream.seek(tar.offset)
        if stream.read(_CHUNK)[: tarfile.BLOCKSIZE] != bytes(tarfile.BLOCKSIZE):
            raise InputError(archive, "no end of the archive", "a whole archive", "Copy or download it again.")


def _content(tar: tarfile.TarFile, file: tarfile.TarInfo) -> IO[bytes]:
    content = tar.extractfile(file)
    assert content is not None  # only folders, links and devices have none
    return content


def _zip_members(archive: Path) -> Iterator[_Member]:
    with zipfile.ZipFile(archive) as content:
        for member in content.infolist():
            kind = stat.S_IFMT(member.external_attr >> 16)
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise InputError(archive, f"{member.filename!r}, a link or a device", "plain files and folders")
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or member.flag_bits & 1:
                raise InputError(archive, f"{member.filename!r}, encrypted or of a rare method", "stored or deflated")
            yield _Member(member.filename, None if member.filename.endswith("/") else partial(content.open, member))


class _ShortReads:
    """A stream that gives no more than a chunk at once: tarfile would read a header of any stated size into memory."""

    def __init__(self, stream: io.BufferedIOBase) -> None:
        self.seek, self.tell, self._read = stream.seek, stream.tell, stream.read

    def read(self, size: int) -> bytes:
        if not 0 <= size <= _CHUNK:
            raise ValueError(f"a header of {size} bytes")
        return self._read(size)
