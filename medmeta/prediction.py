"""Folders in, label maps and an account of the run out; one bad scan never stops the others."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from medmeta.data.folders import stem
from medmeta.data.volume import Volume, is_volume, read_channels, read_labels, volume_suffix, write_volume
from medmeta.errors import InputError
from medmeta.files import write_json
from medmeta.segmenter import Segmenter

CHANNEL = re.compile(r"(.+)_(\d{4})")


@dataclass(frozen=True)
class Prediction:
    """What became of one scan.

    Args:
        scan: the input file (the first channel).
        output: the label map, None where there is none.
        status: "done", "kept" (it was there already) or "failed".
        reason: why it failed.
        volumes_ml: volume of each structure in ml.
        seconds: of reading, segmenting and writing; 0 for what was kept.
    """

    scan: Path
    output: Path | None
    status: str
    reason: str = ""
    volumes_ml: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0


def predict(
    segmenter: Segmenter,
    inputs: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> list[Prediction]:
    """Segment scans and folders of scans; label maps go to `out` under the names of the scans.

    Each label map lies on exactly the grid of its scan, in its format (NIfTI for a DICOM series). A readable label map
    that is there already is kept unless `overwrite`, so a run that was stopped goes on where it was.

    In a folder, `case_0000.nii.gz` and so on are the channels of one scan where the segmenter takes that many channels,
    or where every scan has the same ones (nnU-Net's names); elsewhere the digits belong to the name.

    Args:
        segmenter: what to segment with.
        inputs: files, folders, Decathlon or nnU-Net task folders (their imagesTr and imagesTs).
        out: folder for the label maps and `predictions.json`; made when missing.
        overwrite: segment again what is there already.
        progress: called with (done, total) after each scan.
        options: as of `Segmenter.probabilities`.

    Raises:
        InputError: nothing to segment, two scans of one name, or `out` is a folder of inputs or cannot be made. A scan
            that cannot be used raises nothing: its `Prediction` says why.
    """
    out = Path(out)
    scans = list_scans([inputs] if isinstance(inputs, str | Path) else inputs, len(segmenter.channels))
    _refuse_clashes(scans, out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(out, error.strerror or str(error), "a folder that can be made", "Name another one.") from error
    results = []
    for result in _predict_each(segmenter, scans, out, overwrite, options):
        results.append(result)
        write_json(out / "predictions.json", [asdict(each) for each in results])
        if progress:
            progress(len(results), len(scans))
    return results


def list_scans(inputs: Iterable[str | Path], channels: int) -> dict[str, tuple[Path, ...]]:
    """Name -> channel files of every scan in some files and folders.

    Raises:
        InputError: a path does not exist, holds no scan, or two scans have one name.
    """
    scans: dict[str, tuple[Path, ...]] = {}
    for path in map(Path, inputs):
        for name, files in _scans_of(path, channels).items():
            if name in scans:
                raise InputError(
                    files[0], f"the name of {scans[name][0]} again", "one scan of each name", "Segment them apart."
                )
            scans[name] = files
    return scans


def _scans_of(path: Path, channels: int) -> dict[str, tuple[Path, ...]]:
    if not path.exists():
        raise InputError(path, "nothing at this path", "a scan or a folder of scans")
    # A file that is named outright is tried whatever its name; in a folder only scans are looked at.
    if not path.is_dir() or is_volume(path):
        return {stem(path): (path,)}
    parts = [path / name for name in ("imagesTr", "imagesTs") if (path / name).is_dir()] or [path]
    files = [file for part in parts for file in sorted(part.iterdir()) if not file.name.startswith(".")]
    files = [file for file in files if is_volume(file)]
    if not files:
        raise InputError(path, "no scans", "files ending in .nii.gz, .nii, .nrrd, .mha or .mhd, or DICOM folders")
    numbered = _channels_in_names([stem(file) for file in files], channels)
    scans: dict[str, dict[int, Path]] = {}
    for file in files:
        match = CHANNEL.fullmatch(stem(file)) if numbered else None
        name, number = (match[1], int(match[2])) if match else (stem(file), 0)
        if number in scans.setdefault(name, {}):
            found = f"the name of {scans[name][number].name} again"
            raise InputError(file, found, "one scan of each name", "Segment them apart.")
        scans[name][number] = file
    return {name: _channel_files(name, members) for name, members in scans.items()}


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


def _channel_files(name: str, members: dict[int, Path]) -> tuple[Path, ...]:
    # A channel that is missing is named where it should be, and found missing there when the scan is read.
    one = next(iter(members.values()))
    return tuple(members.get(i, one.with_name(f"{name}_{i:04d}{volume_suffix(one)}")) for i in range(max(members) + 1))


def _refuse_clashes(scans: dict[str, tuple[Path, ...]], out: Path) -> None:
    for files in scans.values():
        # A DICOM series is a folder itself.
        if any(out.resolve() in (file.resolve(), file.resolve().parent) for file in files):
            raise InputError(out, f"the scan {files[0].name} in it", "another folder than that of the scans")


def _predict_each(
    segmenter: Segmenter, scans: dict[str, tuple[Path, ...]], out: Path, overwrite: bool, options: dict[str, Any]
) -> Iterator[Prediction]:
    for name, files in scans.items():
        suffix = volume_suffix(files[0])
        output = out / f"{name}{'.nii.gz' if suffix in ('', '.mhd') else suffix}"
        if not overwrite and (kept := _kept(output)):
            yield Prediction(files[0], output, "kept", "", _volumes(kept, segmenter))
            continue
        started = time.perf_counter()
        try:
            labels = _segment(segmenter, files, options)
            write_volume(labels, output)
        except InputError as error:
            yield Prediction(files[0], None, "failed", str(error).removeprefix(f"{files[0]}: "))
            continue
        except Exception as error:  # one bad scan never stops the others, whatever a library makes of it
            reason = " ".join(str(error).split())[:300]
            yield Prediction(files[0], None, "failed", f"{type(error).__name__}: {reason}")
            continue
        seconds = round(time.perf_counter() - started, 2)
        yield Prediction(files[0], output, "done", "", _volumes(labels, segmenter), seconds)


def _kept(output: Path) -> Volume | None:
    """The label map of an earlier run; None where there is none that can be read."""
    try:
        return read_labels(output) if output.exists() else None
    except InputError:
        return None


def _segment(segmenter: Segmenter, files: tuple[Path, ...], options: dict[str, Any]) -> Volume:
    scan = read_channels(files)
    if scan.channels != len(segmenter.channels):
        raise InputError(
            files[0],
            f"{scan.channels} channels",
            f"{len(segmenter.channels)} ({', '.join(segmenter.channels)})",
            "Segment with a model that was adapted to such scans.",
        )
    if not bool(torch.isfinite(scan.data).any()):
        raise InputError(files[0], "NaN or infinity in every voxel", "a scan with intensities", "Export it again.")
    return segmenter.predict(scan, **options)


def _volumes(labels: Volume, segmenter: Segmenter) -> dict[str, float]:
    voxel_ml = abs(float(torch.linalg.det(labels.affine[:3, :3]))) / 1000.0
    return {
        name: round(float(torch.isin(labels.data, torch.tensor(values)).sum()) * voxel_ml, 3)
        for name, values in segmenter.targets.items()
    }
