"""What a run of `medmeta predict` has to do, what became of it, and who may write: inputs, manifest, lock."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import platform
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, is_dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medmeta.data.folders import stem
from medmeta.data.manifests import read_text
from medmeta.data.volume import Volume, is_volume, read_channels, volume_suffix
from medmeta.errors import InputError
from medmeta.files import read_json, write_json

CHANNEL = re.compile(r"(.+)_(\d{4})")
MANIFEST = "run.json"
JOURNAL = "run.jsonl"
LOCK = ".lock"
LIBRARIES = ("medmeta", "torch", "monai", "numpy", "nibabel", "SimpleITK", "openvino", "highdicom", "ray")
LISTS = (".txt", ".csv")


@dataclass(frozen=True)
class Scan:
    """One scan to segment.

    Args:
        name: where its label map goes below the output folder, without suffix.
        files: its channel files, or the one folder of its DICOM series.
        slices: the files of its series, where its folder holds several series.
        problem: why it is known not to be usable.
    """

    name: str
    files: tuple[Path, ...]
    slices: tuple[Path, ...] = ()
    problem: str = ""

    @property
    def suffix(self) -> str:
        """The suffix of its label map: that of the scan, NIfTI where a scan of its kind cannot be written whole."""
        suffix = volume_suffix(self.files[0])
        return ".nii.gz" if suffix in ("", ".mhd") else suffix

    def sources(self) -> tuple[Path, ...]:
        """Every file it is read from."""
        if self.slices:
            return tuple(file.absolute() for file in self.slices)
        lists = (sorted(filter(Path.is_file, file.iterdir())) if file.is_dir() else [file] for file in self.files)
        return tuple(file.absolute() for files in lists for file in files)

    def read(self) -> Volume:
        """Its voxels and channels. Raises InputError as `read_channels` does."""
        if not self.slices:
            return read_channels(self.files)
        # The reader takes one series to a folder: links to its slices are such a folder.
        with tempfile.TemporaryDirectory() as folder:
            for number, file in enumerate(self.slices):
                Path(folder, f"{number:06d}.dcm").symlink_to(file.resolve())
            try:
                return read_channels([folder])
            except InputError as error:
                raise InputError(self.files[0], error.found, error.required, error.remedy) from error


def list_scans(
    inputs: Iterable[str | Path], channels: int, *, recursive: bool = False, besides: Path | None = None
) -> dict[str, Scan]:
    """Name -> scan, for all scans in some files, folders and lists.

    Scans of one name in different folders are told apart by the names of these folders. A list is a .txt file of one
    path a line, or a .csv file with the columns `image` (or `image_0000`, `image_0001`, ... for channels) and, if
    wanted, `name`; paths are relative to the list.

    Args:
        channels: of the segmenter; decides what four digits at the end of a name mean.
        recursive: search folders within folders.
        besides: a folder that is not searched.

    Raises:
        InputError: a path does not exist or holds no scan, or a list cannot be read.
    """
    found: dict[tuple[Path, ...], Scan] = {}
    for path in map(Path, inputs):
        before = len(found)
        for scan in _scans_of(path, channels, recursive, besides):
            # The same file twice is one scan.
            found.setdefault(tuple(file.resolve() for file in (*scan.files, *scan.slices)), scan)
        if path.is_dir() and len(found) == before:
            remedy = "" if recursive else "Add --recursive to search folders within folders."
            required = "files ending in .nii.gz, .nii, .nrrd, .mha or .mhd, or DICOM folders"
            raise InputError(path, "no scans", required, remedy)
    return _told_apart(list(found.values()))


def _scans_of(path: Path, channels: int, recursive: bool, besides: Path | None) -> Iterator[Scan]:
    if not path.exists():
        raise InputError(path, "nothing at this path", "a scan, a folder of scans or a list of scans")
    if path.is_file():
        # A file that is named outright is tried whatever its name; in a folder only scans are looked at.
        yield from _listed(path, channels) if path.suffix.lower() in LISTS else [Scan(stem(path), (path,))]
        return
    if is_volume(path) and not recursive:
        yield from _series(path, path.resolve().name)
        return
    try:
        next(path.iterdir(), None)
    except OSError as error:
        raise InputError(path, error.strerror or str(error), "a folder that can be read") from error
    yield from _in_folder(path, "", channels, recursive, besides)


def _in_folder(folder: Path, prefix: str, channels: int, recursive: bool, besides: Path | None) -> Iterator[Scan]:
    """Scans in a folder; `prefix` is the way to it from the folder that was named."""
    if prefix and besides is not None and folder.resolve() == besides.resolve():
        return
    try:
        entries = [entry for entry in sorted(folder.iterdir()) if not entry.name.startswith(".")]
    except OSError as error:
        yield Scan(prefix.rstrip("/"), (folder,), problem=error.strerror or str(error))
        return
    images = [entry for entry in entries if entry.name in ("imagesTr", "imagesTs") and entry.is_dir()]
    if images:
        for part in images:
            yield from _in_folder(part, prefix, channels, False, besides)
        return
    if is_volume(folder):
        yield from _series(folder, prefix.rstrip("/") or folder.resolve().name)
    below = [entry for entry in entries if entry.is_dir() and not entry.is_symlink()] if recursive else []
    files = [entry for entry in entries if is_volume(entry) and entry not in below]
    for scan in _cases(files, channels):
        if scan.files[0].is_dir():
            yield from _series(scan.files[0], prefix + scan.name)
        else:
            yield replace(scan, name=prefix + scan.name)
    for entry in below:
        yield from _in_folder(entry, f"{prefix}{entry.name}/", channels, True, besides)


def _cases(files: Sequence[Path], channels: int) -> Iterator[Scan]:
    """The scans that the files of one folder make."""
    numbered = _channels_in_names([stem(file) for file in files], channels)
    scans: dict[str, dict[int, Path]] = {}
    for file in files:
        match = CHANNEL.fullmatch(stem(file)) if numbered else None
        name, number = (match[1], int(match[2])) if match else (stem(file), 0)
        if number in scans.setdefault(name, {}):
            yield Scan(name, (file,))
        else:
            scans[name][number] = file
    for name, members in scans.items():
        # A channel that is missing is named where it should be, and found missing there when the scan is read.
        one = next(iter(members.values()))
        paths = (one.with_name(f"{name}_{i:04d}{volume_suffix(one)}") for i in range(max(members) + 1))
        yield Scan(name, tuple(members.get(number, path) for number, path in enumerate(paths)))


def _channels_in_names(stems: Sequence[str], channels: int) -> bool:
    """Whether the four digits at the end of names are channel numbers or just a part of the name."""
    numbers: dict[str, set[int]] = {}
    for match in filter(None, map(CHANNEL.fullmatch, stems)):
        numbers.setdefault(match[1], set()).add(int(match[2]))
    highest = max((max(found) for found in numbers.values()), default=0)
    if channels > 1 and highest < channels:
        return True
    # All of them nnU-Net's: patient_0001 to patient_0020 are twenty scans, not one.
    alike = all(found == set(range(highest + 1)) for found in numbers.values())
    whole = len(stems) == sum(map(len, numbers.values()))
    return alike and whole and (highest + 1 == channels or len(numbers) > 1)


def _series(folder: Path, name: str) -> Iterator[Scan]:
    """The DICOM series of a folder, each a scan."""
    import SimpleITK as sitk

    reader = sitk.ImageSeriesReader
    series = [reader.GetGDCMSeriesFileNames(str(folder), uid) for uid in sorted(reader.GetGDCMSeriesIDs(str(folder)))]
    if len(series) < 2:
        yield Scan(name, (folder,))
        return
    for number, files in enumerate(series, 1):
        yield Scan(f"{name}_series{number}", (folder,), tuple(map(Path, files)))


def _listed(path: Path, channels: int) -> Iterator[Scan]:
    """The scans of a list. One that does not exist is found missing when it is read."""
    text = read_text(path)
    if path.suffix.lower() == ".txt":
        rows = [({"image": line.strip()}, ["image"]) for line in text.splitlines() if line.strip()]
    else:
        table = csv.DictReader(io.StringIO(text))
        columns = [column for column in table.fieldnames or () if re.fullmatch(r"image(_\d+)?", column)]
        if not columns:
            raise InputError(path, f"columns {list(table.fieldnames or ())}", "a column image, or image_0000 and so on")
        rows = [(row, columns) for row in table if any(row.values())]
    if not rows:
        raise InputError(path, "an empty list", "a scan on every line")
    for row, columns in rows:
        files = tuple(path.parent / row[column] for column in columns if row[column])
        if not files:
            raise InputError(path, f"a row without an image ({row})", "a path in every row")
        name = (row.get("name") or "").replace("/", "_").replace("\\", "_").lstrip(".")
        if len(files) == 1 and files[0].is_dir():
            scans = [*_scans_of(files[0], channels, False, None)]
        else:
            scans = [Scan(stem(files[0]), files)]
        yield from (replace(scan, name=name) if name and len(scans) == 1 else scan for scan in scans)


def _told_apart(scans: Sequence[Scan]) -> dict[str, Scan]:
    """Scans by name; where a name comes again, the folders above it are a part of it."""
    alike: dict[str, list[Scan]] = {}
    for scan in scans:
        alike.setdefault(scan.name, []).append(scan)
    named: dict[str, Scan] = {}
    for scan in scans:
        if len(alike[scan.name]) > 1:
            folders = [other.files[0].absolute().parent for other in alike[scan.name]]
            above = scan.files[0].absolute().parent.relative_to(os.path.commonpath(folders)).as_posix()
            scan = replace(scan, name=scan.name if above == "." else f"{above}/{scan.name}")
        if scan.name in named:
            problem = f"found the name of {named[scan.name].files[0].name} again; required: one scan of each name."
            number = sum(name.split("#")[0] == scan.name for name in named) + 1
            scan = replace(scan, name=f"{scan.name}#{number}", problem=problem)
        named[scan.name] = scan
    return named


def refuse_own_inputs(scans: Iterable[Scan], out: Path) -> None:
    """Raise InputError where label maps would stand among the scans, and could replace them."""
    place = out.resolve()
    for scan in scans:
        # A DICOM series is a folder itself.
        if any(place in (file.resolve(), file.resolve().parent) for file in (*scan.files, *scan.slices)):
            raise InputError(out, f"the scan {scan.files[0].name} in it", "another folder than that of the scans")


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Nobody else writes into `out` meanwhile; the lock of a run that was killed is free.

    Raises:
        InputError: `out` cannot be made, or another run holds it.
    """
    from filelock import FileLock, Timeout

    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = FileLock(out / LOCK, timeout=0, thread_local=False)
        lock.acquire()
    except Timeout as error:
        remedy = "Wait until it is done, or name another folder."
        raise InputError(out, "another run that is writing into it", "one run to a folder", remedy) from error
    except OSError as error:
        raise InputError(out, error.strerror or str(error), "a folder that can be made", "Name another one.") from error
    try:
        yield
    finally:
        lock.release()


class Manifest:
    """`run.json`: model, settings and versions of a run, and the inputs with hash and status.

    It is written when a run begins and when it ends. What happens between is one line each in `run.jsonl`, so that a
    scan costs the same among ten and among ten thousand.

    Args:
        out: the folder of the label maps, locked.
        model: as of `fingerprint`.
        settings: what decides the label maps beside the model.
        overwrite: begin anew whatever is there.

    Raises:
        InputError: `out` holds label maps of another model or other settings.
    """

    def __init__(self, out: Path, model: str, settings: Mapping[str, Any], *, overwrite: bool) -> None:
        self.path, self.journal = out / MANIFEST, out / JOURNAL
        if overwrite:
            self.journal.unlink(missing_ok=True)
        before = read_json(self.path) if self.path.exists() and not overwrite else None
        for key, now in (("model", model), ("settings", dict(settings))):
            if before is not None and before.get(key) != now:
                found = f"label maps of another model or other settings ({key}: {before.get(key)}, not {now})"
                raise InputError(
                    out, found, "one model and one set of settings", "Name another folder, or --overwrite."
                )
        versions = {"python": platform.python_version()}
        for name in LIBRARIES:
            with suppress(PackageNotFoundError):
                versions[name] = version(name)
        self.facts = {"model": model, "settings": dict(settings), "versions": versions}
        self.scans: dict[str, dict[str, Any]] = dict(before["scans"]) if before else {}
        if before and self.journal.exists():
            for line in self.journal.read_text(encoding="utf-8").splitlines():
                with suppress(ValueError):  # a run was killed within its last line
                    self.scans |= json.loads(line)

    def plan(self, scans: Iterable[Scan], out: Path, *, overwrite: bool) -> list[tuple[Scan, bool]]:
        """The scans in the order of work, each with whether the label map that is there is to be kept.

        Those that a killed run was working on come last: what kills a run must not keep it from the others.
        """
        planned = []
        for scan in scans:
            entry = self.scans.get(scan.name, {})
            there = not scan.problem and (out / f"{scan.name}{scan.suffix}").is_file()
            owed = entry.get("status") in ("waiting", "started")
            keep = there and not overwrite and not owed and self._unchanged(scan, entry)
            planned.append((entry.get("status") == "started", scan, keep))
            if not keep:
                files = [{"path": str(file)} for file in scan.files]
                status = "started" if entry.get("status") == "started" else "waiting"
                self.scans[scan.name] = {"status": status, "files": files}
        self.write()
        return [(scan, keep) for started in (False, True) for last, scan, keep in planned if last == started]

    def start(self, scan: Scan) -> None:
        """A scan is being worked on."""
        self.scans[scan.name]["status"] = "started"
        self._note(scan.name)

    def record(self, name: str, status: str, reason: str, files: Sequence[Mapping[str, Any]]) -> None:
        """What became of a scan."""
        entry = self.scans.setdefault(name, {})
        if status != "kept":
            entry |= {"status": status, "reason": reason, "files": list(files) or entry.get("files", [])}
        elif not entry:
            entry |= {"status": status, "reason": reason, "files": list(files)}
        self._note(name)

    def write(self) -> None:
        """Everything that is known now, as one file."""
        write_json(self.path, {**self.facts, "scans": self.scans})
        self.journal.unlink(missing_ok=True)

    def _note(self, name: str) -> None:
        with self.journal.open("a", encoding="utf-8") as file:
            file.write(json.dumps({name: self.scans[name]}) + "\n")

    @staticmethod
    def _unchanged(scan: Scan, entry: Mapping[str, Any]) -> bool:
        """Whether the inputs are those that the label map was made from, as far as is known."""
        known = {file["path"]: file for file in entry.get("files", ()) if "sha256" in file}
        try:
            return not known or (
                {str(file) for file in scan.sources()} == known.keys()
                and all(_same(Path(path), file) for path, file in known.items())
            )
        except OSError:
            return False


def _same(path: Path, known: Mapping[str, Any]) -> bool:
    stat = path.stat()
    if (stat.st_size, stat.st_mtime_ns) == (known["bytes"], known["modified_ns"]):
        return True
    return stat.st_size == known["bytes"] and described(path)["sha256"] == known["sha256"]


def described(path: Path) -> dict[str, Any]:
    """Path, size, time of change and SHA-256 of a file."""
    stat = path.stat()
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"path": str(path), "bytes": stat.st_size, "modified_ns": stat.st_mtime_ns, "sha256": digest}


def fingerprint(thing: Any) -> str:
    """SHA-256 over all that decides what a model does: weights, states, numbers and names, but not its card."""
    digest = hashlib.sha256()
    for part in _parts(thing):
        digest.update(part)
    return digest.hexdigest()


def _parts(thing: Any) -> Iterator[bytes]:
    if isinstance(thing, Tensor):
        yield f"{thing.dtype}{tuple(thing.shape)}".encode()
        yield thing.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    elif isinstance(thing, torch.nn.Module):
        yield type(thing).__name__.encode()
        yield from _parts(thing.state_dict())
    elif isinstance(thing, Mapping):
        for key in sorted(thing, key=str):
            yield f"[{key}]".encode()
            yield from _parts(thing[key])
    elif isinstance(thing, list | tuple):
        yield f"({len(thing)})".encode()
        for item in thing:
            yield from _parts(item)
    elif is_dataclass(thing):
        yield from _parts({field.name: getattr(thing, field.name) for field in fields(thing) if field.name != "card"})
    else:
        yield repr(thing).encode()
