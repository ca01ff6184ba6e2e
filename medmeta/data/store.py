"""Preprocessed scans on disk, memory-mapped: made once, drawn from in about a millisecond, RAM flat.

Plain NumPy files, because a random patch comes sooner from them than from compressed chunks (Zarr, Blosc2) and no
other library is needed; `scripts/benchmark_store.py` measures both, and what the speed costs in disk.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from filelock import FileLock, Timeout

from medmeta.data.preprocess import Preprocess
from medmeta.data.tasks import Case, Task
from medmeta.data.volume import Volume, grid_difference, read_channels, read_labels
from medmeta.episode import IGNORED
from medmeta.errors import InputError
from medmeta.files import read_json

FORMAT = 2
LIMIT_BYTES = 200 * 2**30
"""Largest size of a store by default."""

_MAKING = ".making-"
_CHECKSUMS = "checksums.json"
_ARRAYS = ("image", "mask")
PLACES = 4096
"""Foreground voxels remembered for each class of a scan, so that a patch around a tiny organ is found at once."""


@dataclass(frozen=True)
class StoredCase:
    """A scan and its mask on the working grid.

    Args:
        id: case id.
        patient: patient id.
        image: (C, X, Y, Z) float16 array, memory-mapped or in memory.
        mask: (X, Y, Z) int8 array, 0..K, -1 ignored.
        places: class -> (n, 3) voxel indices of up to `PLACES` of its voxels; absent classes have no entry.
    """

    id: str
    patient: str
    image: np.ndarray
    mask: np.ndarray
    places: dict[int, np.ndarray]


@dataclass(frozen=True)
class StoredTask:
    """A task on its working grid, ready to draw patches from.

    Args:
        name: task name.
        classes: K.
        patch: patch shape in voxels.
        cases: the labelled scans.
        preprocess: how they came onto the working grid.
        unlabelled: scans whose mask is -1 everywhere.
        overview: the same scans on a coarser grid, of which a patch shows more; None where it adds nothing.
        sliced: a patch is a single slice.
    """

    name: str
    classes: int
    patch: tuple[int, int, int]
    cases: tuple[StoredCase, ...]
    preprocess: Preprocess
    unlabelled: tuple[StoredCase, ...] = ()
    overview: StoredTask | None = None
    sliced: bool = False

    @property
    def views(self) -> tuple[StoredTask, ...]:
        """The task itself, and its overview where it has one."""
        return (replace(self, overview=None), *(self.overview.views if self.overview else ()))

    @classmethod
    def of_views(cls, views: Iterable[StoredTask]) -> StoredTask:
        """The inverse of `views`."""
        fine, *coarse = views
        return replace(fine, overview=cls.of_views(coarse) if coarse else None)

    def only(self, ids: Collection[str]) -> StoredTask:
        """The task with those of its labelled scans alone, on each grid."""
        cases = tuple(case for case in self.cases if case.id in ids)
        return replace(self, cases=cases, overview=self.overview and self.overview.only(ids))

    @property
    def patients(self) -> dict[str, list[StoredCase]]:
        """Scans of each patient."""
        patients: dict[str, list[StoredCase]] = {}
        for case in self.cases:
            patients.setdefault(case.patient, []).append(case)
        return patients


def read_case(task: Task, case: Case) -> tuple[Volume, torch.Tensor]:
    """A labelled scan (C, X, Y, Z) and its mask (1, X, Y, Z) long, checked to fit the task and each other.

    Raises:
        InputError: channels, grids or label values do not fit, or no voxel is finite; the message names the file.
    """
    if case.labels is None:
        raise InputError(case.images[0], "no label map", "a labelled scan", "Leave the case out or label it.")
    scan, labels = read_scan(task, case), read_labels(case.labels)
    difference = grid_difference(scan, labels)
    if difference:
        raise InputError(
            case.labels,
            f"another grid than {case.images[0].name}: {difference}",
            "image and label on one grid",
            "Resample the label map onto the image's grid.",
        )
    return scan, task.encode(labels.data, case.labels)


def read_scan(task: Task, case: Case) -> Volume:
    """A scan (C, X, Y, Z), checked to fit the task.

    Raises:
        InputError: it cannot be read, its channels are others, or no voxel is finite; the message names the file.
    """
    scan = read_channels(case.images)
    if scan.channels != len(task.channels):
        raise InputError(
            case.images[0],
            f"{scan.channels} channels",
            f"{len(task.channels)} ({', '.join(task.channels)})",
            "Declare the channels of the task, or give one file with all of them.",
        )
    if not bool(torch.isfinite(scan.data).any()):
        raise InputError(case.images[0], "NaN or infinity in every voxel", "a scan with intensities", "Leave it out.")
    return scan


def fit_preprocess(
    task: Task, cases: Sequence[Case] | None = None, *, most: int = 12, sliced: bool = False
) -> Preprocess:
    """Fit `Preprocess` on the labelled scans of a task.

    Args:
        task: gives modality and targets.
        cases: the support scans; all of the task's when None.
        most: scans read at most, evenly spread over the cases.
        sliced: for single slices.

    Raises:
        InputError: no scan, one that cannot be used, or none that holds the organ.
    """
    cases = list(task.labelled.cases if cases is None else cases)
    if not cases:
        raise InputError(f"task {task.name}", "no labelled scan", "at least one")
    cases = cases[:: max(1, -(-len(cases) // most))]
    try:
        return Preprocess.fit([read_case(task, case) for case in cases], task.modality, sliced=sliced)
    except InputError:
        raise
    except ValueError as error:
        named = "; ".join(f"{name} = {list(values)}" for name, values in task.targets.items())
        where = cases[0].labels.parent if cases[0].labels else f"task {task.name}"
        found, _, required = str(error).partition("; required: ")
        raise InputError(where, f"{found} ({named})", required or "support scans that hold it") from error


def prepare(task: Task, case: Case, preprocess: Preprocess) -> StoredCase:
    """Bring one labelled scan onto the working grid, in memory."""
    scan, mask = read_case(task, case)
    image = preprocess.forward(scan).data.numpy().astype(np.float16)
    working = preprocess.forward_mask(mask, scan.affine, task.classes).numpy()
    return StoredCase(case.id, case.patient, image, working, find_places(working, task.classes))


def prepare_unlabelled(task: Task, case: Case, preprocess: Preprocess) -> StoredCase:
    """Bring one scan onto the working grid, in memory, with a mask that is -1 everywhere.

    Raises:
        InputError: the scan cannot be read or has other channels than the task; the message names the file.
    """
    image = preprocess.forward(read_scan(task, case)).data.numpy().astype(np.float16)
    return StoredCase(case.id, case.patient, image, np.full(image.shape[1:], IGNORED, dtype=np.int8), {})


def find_places(mask: np.ndarray, classes: int) -> dict[int, np.ndarray]:
    """Up to `PLACES` voxels (n, 3) of each class that a mask (X, Y, Z) holds."""
    places = {}
    for label in range(1, classes + 1):
        voxels = np.argwhere(mask == label).astype(np.int32)
        if len(voxels):
            places[label] = voxels[:: -(-len(voxels) // PLACES)]
    return places


class Store:
    """A folder of prepared scans, keyed by the content of the files and the settings that made them.

    A scan is written beside its place and renamed into it, so that a killed or a parallel run leaves no half of one.
    Where the folder outgrows its limit, the scans that were asked for longest ago go first.

    Args:
        folder: where the prepared scans live; made when missing.
        limit_bytes: largest size of the folder. Scans that this store has handed out stay, whatever the limit.
    """

    def __init__(self, folder: str | Path, *, limit_bytes: int = LIMIT_BYTES) -> None:
        self.folder, self.limit_bytes = Path(folder), limit_bytes
        self._handed_out: set[Path] = set()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(folder, error.strerror or str(error), "a folder that can be written to") from error

    def task(
        self, task: Task, preprocess: Preprocess, *, voxels: int, progress: Callable[[int, int], None] | None = None
    ) -> StoredTask:
        """Every labelled scan of a task, prepared now or earlier.

        Args:
            task: the task.
            preprocess: fitted on (some of) its scans.
            voxels: the patch's budget in voxels.
            progress: called with (done, total) after each scan.
        """
        cases = []
        labelled = task.labelled.cases
        for case in labelled:
            cases.append(self.case(task, case, preprocess))
            if progress:
                progress(len(cases), len(labelled))
        patch = preprocess.patch(voxels, [case.mask.shape for case in cases])
        return StoredTask(task.name, task.classes, patch, tuple(cases), preprocess)

    def case(self, task: Task, case: Case, preprocess: Preprocess) -> StoredCase:
        """One scan, prepared now or earlier.

        Raises:
            InputError: the scan cannot be used, or what was prepared of it has other bytes than were written.
        """
        place = self.folder / self._key(task, case, preprocess)
        self._handed_out.add(place)
        while True:
            if not place.is_dir():
                self._write(prepare(task, case, preprocess), place)
            try:
                image, mask, places = _read(place)
                break
            except (OSError, ValueError, EOFError, BadZipFile) as error:
                if place.is_dir():
                    # A full disk or a power cut, not a kill: those leave nothing under this name.
                    required, remedy = "one as it was written", "Delete this folder: it is made again."
                    raise InputError(place, "a damaged prepared scan", required, remedy) from error
                # Another run made room in this moment.
        # An already prepared scan may be asked for under another name: names come from the case, not from the store.
        return StoredCase(case.id, case.patient, image, mask, places)

    def _write(self, prepared: StoredCase, place: Path) -> None:
        with self._making() as beside:
            for name in _ARRAYS:
                np.save(beside / f"{name}.npy", getattr(prepared, name))
            places = {str(label): voxels for label, voxels in prepared.places.items()}
            np.savez(beside / "places.npz", **places)  # type: ignore[arg-type]  # no key is allow_pickle
            (beside / _CHECKSUMS).write_text(json.dumps(_checksums(beside)), encoding="utf-8")
            try:
                os.rename(beside, place)
            except OSError:
                # Another run was first; what it wrote is the same.
                if not place.is_dir():
                    raise
        with self._tidying():
            self._evict()

    @contextmanager
    def _making(self) -> Iterator[Path]:
        """A folder to write in, removed in the end; its lock tells other runs that somebody lives there."""
        with self._tidying():
            self._sweep()
            beside = Path(tempfile.mkdtemp(prefix=_MAKING, dir=self.folder))
            lock = FileLock(f"{beside}.lock")
            lock.acquire()
        try:
            yield beside
        finally:
            shutil.rmtree(beside, ignore_errors=True)
            Path(lock.lock_file).unlink(missing_ok=True)
            lock.release()

    def _tidying(self) -> FileLock:
        return FileLock(self.folder / ".lock")

    def _sweep(self) -> None:
        """Remove what killed writers left: a folder that is being written in has its lock held."""
        for lock in self.folder.glob(f"{_MAKING}*.lock"):
            try:
                with FileLock(lock, timeout=0):
                    shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
                    lock.unlink(missing_ok=True)
            except Timeout:
                continue
        for folder in self.folder.glob(f"{_MAKING}*/"):
            if not folder.with_name(f"{folder.name}.lock").exists():
                shutil.rmtree(folder, ignore_errors=True)

    def _evict(self) -> None:
        places = [path for path in self.folder.iterdir() if not path.name.startswith(".") and path.is_dir()]
        sizes = {place: sum(file.stat().st_size for file in place.iterdir()) for place in places}
        excess = sum(sizes.values()) - self.limit_bytes
        for place in sorted(sizes, key=lambda place: place.stat().st_mtime_ns):
            if excess <= 0:
                break
            if place not in self._handed_out:
                # Under another name first, so that a kill leaves no half of a scan. Who maps its files keeps them.
                beside = self.folder / f"{_MAKING}{place.name}"
                os.rename(place, beside)
                shutil.rmtree(beside, ignore_errors=True)
                excess -= sizes[place]

    def _key(self, task: Task, case: Case, preprocess: Preprocess) -> str:
        digest = hashlib.sha256()
        settings = {
            "format": FORMAT,
            "preprocess": preprocess.to_dict(),
            "atoms": task.atoms,
            "ignored": task.ignored,
            "channels": len(task.channels),
        }
        if task.background:
            settings["background"] = task.background
        digest.update(json.dumps(settings, sort_keys=True).encode())
        for path in (*case.images, case.labels):
            if path is None:
                raise InputError(case.images[0], "no label map", "a labelled scan")
            # The slices of a DICOM series, in the order of their names.
            for part in sorted(filter(Path.is_file, path.iterdir())) if path.is_dir() else [path]:
                with open(part, "rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()[:32]


def _checksums(place: Path) -> dict[str, str]:
    sums = {}
    for path in sorted(place.glob("*.np?")):
        with open(path, "rb") as file:
            sums[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return sums


def _read(place: Path) -> tuple[np.ndarray, np.ndarray, dict[int, np.ndarray]]:
    """Image, mask and places of a prepared scan, once all its bytes are found to be those that were written."""
    if read_json(place / _CHECKSUMS) != _checksums(place):
        raise ValueError("other bytes than were written")
    os.utime(place)  # when it was last asked for
    with np.load(place / "places.npz", allow_pickle=False) as saved:
        places = {int(label): saved[label] for label in saved.files}
    image, mask = (np.load(place / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in _ARRAYS)
    return image, mask, places
