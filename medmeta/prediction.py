"""Folders in, label maps and an account of the run out; one bad scan never stops the others."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from medmeta.data.volume import Volume, is_volume, read_channels, volume_suffix, write_volume
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
        seconds: of reading, segmenting and writing.
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

    Each label map lies on exactly the grid of its scan, in its format (NIfTI for a DICOM series). A label map that is
    there already is kept unless `overwrite`, so a run that was stopped goes on where it was.

    Args:
        segmenter: what to segment with.
        inputs: files, folders, Decathlon or nnU-Net task folders (their imagesTr and imagesTs).
        out: folder for the label maps and `predictions.json`; made when missing.
        overwrite: segment again what is there already.
        progress: called with (done, total) after each scan.
        options: as of `Segmenter.probabilities`.

    Raises:
        InputError: nothing to segment, two scans of one name, or `out` is a folder of inputs. A scan that cannot be
            used raises nothing: its `Prediction` says why.
    """
    out = Path(out)
    scans = list_scans([inputs] if isinstance(inputs, str | Path) else inputs, len(segmenter.channels))
    _refuse_clashes(scans, out)
    out.mkdir(parents=True, exist_ok=True)
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
        return {_stem(path): (path,)}
    parts = [path / name for name in ("imagesTr", "imagesTs") if (path / name).is_dir()] or [path]
    files = [file for part in parts for file in sorted(part.iterdir()) if not file.name.startswith(".")]
    files = [file for file in files if is_volume(file)]
    if not files:
        raise InputError(path, "no scans", "files ending in .nii.gz, .nii, .nrrd, .mha or .mhd, or DICOM folders")
    grouped: dict[str, list[Path]] = {}
    several = {match[1] for file in files if (match := CHANNEL.fullmatch(_stem(file))) and int(match[2]) > 0}
    for file in files:
        match = CHANNEL.fullmatch(_stem(file))
        # _0000 marks a channel where there are several, or where several are wanted.
        channel = match is not None and (match[1] in several or channels > 1)
        grouped.setdefault(match[1] if channel else _stem(file), []).append(file)
    return {name: tuple(members) for name, members in grouped.items()}


def _stem(path: Path) -> str:
    return path.name.removesuffix(volume_suffix(path)) if volume_suffix(path) else path.name


def _refuse_clashes(scans: dict[str, tuple[Path, ...]], out: Path) -> None:
    for files in scans.values():
        if any(file.resolve().parent == out.resolve() for file in files):
            raise InputError(out, f"the scan {files[0].name} in it", "another folder than that of the scans")


def _predict_each(
    segmenter: Segmenter, scans: dict[str, tuple[Path, ...]], out: Path, overwrite: bool, options: dict[str, Any]
) -> Iterator[Prediction]:
    for name, files in scans.items():
        suffix = volume_suffix(files[0])
        output = out / f"{name}{'.nii.gz' if suffix in ('', '.mhd') else suffix}"
        if output.exists() and not overwrite:
            yield Prediction(files[0], output, "kept")
            continue
        started = time.perf_counter()
        try:
            scan = read_channels(files)
            if scan.channels != len(segmenter.channels):
                raise InputError(
                    files[0],
                    f"{scan.channels} channels",
                    f"{len(segmenter.channels)} ({', '.join(segmenter.channels)})",
                    "Segment with a model that was adapted to such scans.",
                )
            if not bool(torch.isfinite(scan.data).any()):
                raise InputError(files[0], "no finite voxel", "a scan with intensities")
            labels = segmenter.predict(scan, **options)
            write_volume(labels, output)
        except (InputError, OSError, RuntimeError, ValueError, MemoryError) as error:
            yield Prediction(files[0], None, "failed", " ".join(str(error).split()) or type(error).__name__)
            continue
        seconds = round(time.perf_counter() - started, 2)
        yield Prediction(files[0], output, "done", "", _volumes(labels, segmenter), seconds)


def _volumes(labels: Volume, segmenter: Segmenter) -> dict[str, float]:
    voxel_ml = abs(float(torch.linalg.det(labels.affine[:3, :3]))) / 1000.0
    return {
        name: round(float(torch.isin(labels.data, torch.tensor(values)).sum()) * voxel_ml, 3)
        for name, values in segmenter.targets.items()
    }
