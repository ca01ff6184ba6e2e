"""Public data sets by name: fetched, resumed where a connection broke, checked, and unpacked.

The only room of the package that opens a connection.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from functools import partial
from http.client import HTTPException, HTTPMessage, HTTPResponse
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

from filelock import FileLock, Timeout

from medmeta.data.archives import SUFFIXES, Limits, extract
from medmeta.data.manifests import Manifest, find_manifest, load_manifest
from medmeta.errors import InputError

Progress = Callable[[str, int, int], None]

_CHUNK = 2**18
_ATTEMPTS = 5
_PAUSE_SECONDS = 1.0
_SLACK = 1.5  # a manifest states the size of an archive approximately
_GB = 10**9


def download(name: str | Path, to: str | Path, *, timeout: float = 30.0, progress: Progress | None = None) -> Path:
    """Fetch the data set of a manifest and unpack it. One that is there already is left as it is.

    A download that was killed or lost its connection goes on where it stopped when it is asked for again.

    Args:
        name: a manifest of the package, such as "Task04_Hippocampus", or a YAML file.
        to: the data root; the data set is unpacked to `to`/`manifest.folder`.
        timeout: seconds without a byte after which a connection counts as lost.
        progress: called with ("fetching" or "unpacking", bytes done, bytes in all).

    Returns:
        the folder of the data set.

    Raises:
        InputError: no such manifest; a data set that must be asked for, with how; no connection; other bytes than the
            manifest promises; too little room; another process fetches it; `to` cannot be written.
    """
    path = Path(name)
    manifest = load_manifest(path if path.suffix.lower() in (".yaml", ".yml") else find_manifest(str(name)))
    to = Path(to)
    folder = to / manifest.folder
    archive = to / Path(urlsplit(manifest.source).path).name
    if (folder / "dataset.json").is_file():
        # A kill may have come between unpacking and removing; another file of that name is none of ours.
        if archive.is_file() and _digest(archive, manifest.checksum) == manifest.checksum:
            archive.unlink(missing_ok=True)
        return folder
    if not (manifest.source and manifest.checksum and manifest.size_gb):
        found = f"a data set without an open download (licence: {manifest.licence or 'not stated'})"
        raise InputError(manifest.name, found, f"the data in {folder}", manifest.obtain)
    size = int(manifest.size_gb * _GB)
    if not archive.name.endswith(SUFFIXES):
        raise InputError(manifest.name, f"the source {manifest.source!r}", f"an archive, one of {', '.join(SUFFIXES)}")
    try:
        to.mkdir(parents=True, exist_ok=True)
        with FileLock(to / f".{archive.name}.lock", timeout=0):
            _require_room(to, 2 * size)
            fetch(
                manifest.source, archive, checksum=manifest.checksum, limit_bytes=int(size * _SLACK), timeout=timeout,
                progress=progress and partial(progress, "fetching"),
            )  # fmt: skip
            _unpack(archive, folder, manifest, progress)
            archive.unlink(missing_ok=True)
    except Timeout as error:
        raise InputError(archive, "another process that fetches it", "one at a time", "Wait for it.") from error
    except OSError as error:
        raise InputError(to, error.strerror or str(error), "a folder that can be written, with room") from error
    return folder


def _unpack(archive: Path, folder: Path, manifest: Manifest, progress: Progress | None) -> None:
    total = archive.stat().st_size

    def told(done: int) -> None:
        if progress is not None:
            progress("unpacking", min(done, total), total)

    extract(archive, folder, within=manifest.folder, limits=Limits(nbytes=20 * total), progress=told)


def _require_room(folder: Path, nbytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        required = f"{nbytes / _GB:.3g} GB for the archive and its files"
        raise InputError(folder, f"{free / _GB:.3g} GB free", required, "Make room or name another folder.")


def fetch(
    url: str,
    path: str | Path,
    *,
    checksum: str,
    limit_bytes: int,
    timeout: float = 30.0,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Fetch a file; it appears under its name only once its checksum is right.

    What arrived lies in `path`.part, and the next call goes on from there. A file of that name with the right checksum
    is left as it is.

    Args:
        url: http or https; https never leads to http.
        path: the file, in an existing folder.
        checksum: MD5 (32 hex digits) or SHA-256 (64) of the content.
        limit_bytes: the most that is written.
        timeout: seconds without a byte after which a connection counts as lost.
        progress: called with (bytes done, bytes in all); 0 in all while that is not known.

    Raises:
        InputError: refused by the server, lost too often, more than `limit_bytes`, or other content.
    """
    path = Path(path)
    wanted = checksum.lower()
    if path.is_file() and _digest(path, wanted) == wanted:
        return
    part = path.with_name(f"{path.name}.part")
    resumed = part.exists()
    _fill(url, part, limit_bytes, timeout, progress)
    if resumed and _digest(part, wanted) != wanted:
        # What was there may be of another file, or damaged: once more, from the first byte.
        part.unlink()
        _fill(url, part, limit_bytes, timeout, progress)
    if (found := _digest(part, wanted)) != wanted:
        size = part.stat().st_size
        part.unlink()
        remedy = "Try again later; if it stays, the file at its source is another one."
        raise InputError(url, f"{size} bytes with the checksum {found}", f"the checksum {wanted}", remedy)
    os.replace(part, path)


def _digest(path: Path, checksum: str) -> str:
    """The content's digest, of the kind that a checksum of that length is."""
    # MD5 is what the sources publish; it tells damage, not malice.
    new = hashlib.sha256 if len(checksum) == 64 else lambda: hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file:
        return hashlib.file_digest(file, new).hexdigest()


def _fill(url: str, part: Path, limit_bytes: int, timeout: float, progress: Callable[[int, int], None] | None) -> None:
    """Receive until the server says that nothing is missing; a lost connection is taken up again where it broke."""
    failures = 0
    while True:
        before = _size(part)
        try:
            if _receive(url, part, before, limit_bytes, timeout, progress):
                return
            reason = "closed early"
        except urllib.error.HTTPError as error:
            if error.code == 416 and before:  # nothing lies beyond what is there
                return
            reason = f"the answer {error.code} {error.reason}"
            if error.code < 500 and error.code not in (408, 429):
                raise InputError(url, reason, "a file", "Check the address.") from error
        except (urllib.error.URLError, HTTPException, TimeoutError, ConnectionError) as error:
            reason = str(getattr(error, "reason", error)) or type(error).__name__
        failures = 1 if _size(part) - before >= _CHUNK else failures + 1
        if failures == _ATTEMPTS:
            found = f"no lasting connection ({reason}; tried {failures} times, {_size(part)} bytes are kept)"
            raise InputError(url, found, "a server that answers", "Ask again later: it goes on from there.")
        time.sleep(_PAUSE_SECONDS * 2 ** (failures - 1))


def _size(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


def _receive(
    url: str, part: Path, start: int, limit_bytes: int, timeout: float, progress: Callable[[int, int], None] | None
) -> bool:
    """Append what one connection gives; whether nothing is missing then."""
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    with _open(request, timeout) as response:
        ranges = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
        if response.status != 206 or not ranges or int(ranges[1]) != start:
            start = 0  # a server that knows no ranges sends the whole
        length = response.headers.get("Content-Length", "")
        total = int(ranges[2]) if ranges and start else int(length) if length.isdecimal() else 0
        _require_size(url, total, limit_bytes)
        with open(part, "ab" if start else "wb") as file:
            done = start
            while chunk := response.read1(_CHUNK):
                done += len(chunk)
                if done > limit_bytes:
                    part.unlink()
                _require_size(url, done, limit_bytes)
                file.write(chunk)
                if progress is not None:
                    progress(done, total)
    return done >= total


def _require_size(url: str, nbytes: int, limit_bytes: int) -> None:
    if nbytes > limit_bytes:
        raise InputError(url, f"{nbytes} bytes or more", f"at most {limit_bytes}, by its manifest")


def _open(request: urllib.request.Request, timeout: float) -> HTTPResponse:
    """As `urllib.request.urlopen`, for http and https and nothing else."""
    if urlsplit(request.full_url).scheme not in ("http", "https"):
        raise InputError(request.full_url, "another scheme", "http or https")
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPErrorProcessor,
        _Redirects,
    ):
        opener.add_handler(handler())
    return opener.open(request, timeout=timeout)


class _Redirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> urllib.request.Request | None:
        before, after = urlsplit(req.full_url).scheme, urlsplit(newurl).scheme
        if after != "https" and after != before:
            raise InputError(req.full_url, f"a redirection from {before} to {after or newurl}", f"{before} or https")
        return super().redirect_request(req, fp, code, msg, headers, newurl)
