"""Folders in, label maps and an account of the run out; one bad scan never stops the others."""

from __future__ import annotations

import csv
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import torch

from medmeta.data.volume import Volume, read_header, read_labels, write_volume
from medmeta.errors import InputError
from medmeta.files import replacing, write_json
from medmeta.inference import Layer, Predictor, fastest_backend, fastest_precision, openvino_predictor
from medmeta.representation import prediction_html, prediction_line
from medmeta.segmenter import Segmentation, Segmenter, load
from medmeta.worklist import Manifest, Scan, described, fingerprint, list_scans, locked, refuse_own_inputs

AHEAD_BYTES = 256 * 2**20
"""Scans up to this size, as float32, are read and registered while the one before is still being segmented."""

ACCOUNT_EVERY = 20.0
"""Between two writings of the account passes at least this many times what the last one took."""

ENGINES = ("local", "ray")
BACKENDS = ("auto", "torch", "openvino")
STAGES = ("read", "preprocess", "registration", "network", "restore", "write")


@dataclass(frozen=True)
class Prediction:
    """What became of one scan.

    Args:
        scan: the input file (the first channel).
        output: the label map, None where there is none.
        status: "done", "kept" (it was there already) or "failed".
        reason: why it failed.
        volumes_ml: volume of each structure in ml.
        seconds: of all stages; 0 for what was kept.
        name: of the scan in the run.
        stages: seconds of reading, preprocessing, registration, network, restoring and writing.
        quality: the segmenter's own estimate, None where it gives none.
        notes: what a reader of the label map should know.
        files: path, size, time of change and SHA-256 of each file it was read from.
    """

    scan: Path
    output: Path | None
    status: str
    reason: str = ""
    volumes_ml: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    name: str = ""
    stages: dict[str, float] = field(default_factory=dict)
    quality: float | None = None
    notes: tuple[str, ...] = ()
    files: tuple[dict[str, Any], ...] = ()

    def __repr__(self) -> str:
        return f"Prediction({prediction_line(self)})"

    def _repr_html_(self) -> str:
        return prediction_html(self)


def predict(
    segmenter: Segmenter | str | Path, inputs: str | Path | Sequence[str | Path], out: str | Path, **options: Any
) -> list[Prediction]:
    """Segment scans and folders of scans; arguments as of `predict_each`, which tells of each scan as it is done."""
    return list(predict_each(segmenter, inputs, out, **options))


def predict_each(
    segmenter: Segmenter | str | Path,
    inputs: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    overwrite: bool = False,
    recursive: bool = False,
    probabilities: bool = False,
    dicom_seg: bool = False,
    backend: str = "torch",
    engine: str = "local",
    workers: int = 1,
    gpus_per_worker: float = 0.0,
    device: torch.device | str = "cpu",
    precision: torch.dtype | str = torch.float32,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> Iterator[Prediction]:
    """Segment scans and folders of scans; label maps go to `out` under the names of the scans.

    Each label map lies on exactly the grid of its scan, in its format (NIfTI for a DICOM series). A readable label map
    that is there already is kept unless `overwrite` or its scan has changed, so a run that was stopped goes on where it
    was; `run.json` in `out` is its memory, `predictions.csv` and `predictions.json` tell what became of each scan.

    In a folder, `case_0000.nii.gz` and so on are the channels of one scan where the segmenter takes that many channels,
    or where every scan has the same ones (nnU-Net's names); elsewhere the digits belong to the name.

    Args:
        segmenter: what to segment with, or its folder.
        inputs: files, folders, Decathlon or nnU-Net task folders (their imagesTr and imagesTs), folders of one or more
            DICOM series, and lists (.txt, .csv; see `medmeta.worklist.list_scans`).
        out: folder for the label maps; made when missing. One run at a time writes into it.
        overwrite: segment again what is there already.
        recursive: search folders within folders.
        probabilities: write `<name>_probabilities.nii.gz` too, on the working grid.
        dicom_seg: write `<name>_seg.dcm` too for DICOM series (needs the extra `dicom`).
        backend: "torch", "openvino" (a processor, and the extra `openvino`), or "auto": OpenVINO where it is installed
            and can run the network, else torch; torch with the Ray engine.
        engine: "local", or "ray": the same work over a Ray cluster (needs the extra `ray`), whose machines all see the
            inputs and `out` under the same paths.
        workers: processes of the Ray engine, one thread each.
        gpus_per_worker: their share of GPUs.
        device: where the network runs.
        precision: a torch dtype, or "auto": bfloat16 where the processor has it, else float32.
        progress: called with (done, total) after each scan.
        options: as of `Segmenter.predict`.

    Raises:
        InputError: nothing to segment, `out` is a folder of inputs, cannot be made, is in use, or holds the label maps
            of another model. A scan that cannot be used raises nothing: its `Prediction` says why.
    """
    for name, given, known in (("backend", backend, BACKENDS), ("engine", engine, ENGINES)):
        if given not in known:
            raise ValueError(f"{name}={given!r}; required: one of {', '.join(known)}")
    out = Path(out)
    if isinstance(segmenter, str | Path):
        loaded = load(segmenter)
        if not isinstance(loaded, Segmenter):
            required, remedy = "an adapted model", "Run `medmeta adapt` first."
            raise InputError(segmenter, "a model that was not adapted", required, remedy)
        segmenter = loaded
    paths = [inputs] if isinstance(inputs, str | Path) else inputs
    scans = list_scans(paths, len(segmenter.channels), recursive=recursive, besides=out)
    refuse_own_inputs(scans.values(), out)
    precision = fastest_precision(device) if precision == "auto" else precision
    if backend == "auto":
        # What is installed here says nothing of the other machines of a cluster.
        local = engine == "local"
        backend = fastest_backend(segmenter.model.learner, segmenter.state, device) if local else "torch"
    work = Work(
        segmenter, out, {"device": str(device), "precision": precision} | options, backend, probabilities, dicom_seg
    )
    with locked(out):
        settings = {"precision": str(precision), "backend": backend} | {name: str(options[name]) for name in options}
        manifest = Manifest(out, fingerprint(segmenter), settings, overwrite=overwrite)
        jobs = manifest.plan(scans.values(), out, overwrite=overwrite)
        if engine == "ray":
            from medmeta.ray_engine import on_ray

            results = on_ray(work, jobs, manifest.start, workers, gpus_per_worker)
        else:
            results = _locally(work, jobs, manifest.start)
        done: list[Prediction] = []
        due = 0.0
        try:
            for result in results:
                done.append(result)
                manifest.record(result.name, result.status, result.reason, result.files)
                if (started := time.monotonic()) >= due:
                    _write_account(out, done, list(segmenter.targets))
                    due = time.monotonic() + ACCOUNT_EVERY * (time.monotonic() - started)
                if progress:
                    progress(len(done), len(jobs))
                yield result
        finally:
            _write_account(out, done, list(segmenter.targets))
            manifest.write()


@dataclass
class Read:
    """A scan that is read, on the grids of the segmenter, and labels carried to it, on its way to the network."""

    job: Scan
    scan: Volume
    grids: Sequence[Volume] = ()
    carried: Layer | None = None
    stages: dict[str, float] = field(default_factory=dict)
    files: tuple[dict[str, Any], ...] = ()


@dataclass
class Made:
    """A label map, on its way to its file."""

    read: Read
    labels: Segmentation
    probabilities: Volume | None
    notes: tuple[str, ...]


@dataclass
class Work:
    """How each scan of a run is read, segmented and written. Each step ends the scan with a `Prediction` or goes on."""

    segmenter: Segmenter
    out: Path
    options: Mapping[str, Any]
    backend: str
    probabilities: bool
    dicom_seg: bool

    @cached_property
    def predictor(self) -> Callable[[Segmenter], Predictor] | None:
        """What segments windows in place of torch, made once for each segmenter, where it runs."""
        if self.backend == "torch":
            return None
        made: dict[int, Predictor] = {}

        def predictor(segmenter: Segmenter) -> Predictor:
            if id(segmenter) not in made:
                learner, shape = segmenter.learner, (1, len(segmenter.channels), *segmenter.patch)
                made[id(segmenter)] = openvino_predictor(
                    learner, segmenter.state, shape, precision=self.options["precision"]
                )
            return made[id(segmenter)]

        return predictor

    def output(self, job: Scan) -> Path:
        return self.out / f"{job.name}{job.suffix}"

    def whole(self, job: Scan, keep: bool) -> Prediction:
        """One scan from file to file."""
        read = self.read(job, keep)
        made = self.segment(read) if isinstance(read, Read) else read
        return self.write(made) if isinstance(made, Made) else made

    @overload
    def read(self, job: Scan, keep: bool) -> Read | Prediction: ...
    @overload
    def read(self, job: Scan, keep: bool, *, at_most: float) -> Read | Prediction | None: ...
    def read(self, job: Scan, keep: bool, *, at_most: float = math.inf) -> Read | Prediction | None:
        """Read a scan, unless its label map is there to be kept; None where it would take more than `at_most` bytes."""
        if keep and (kept := _kept(self.output(job))):
            volumes = structure_volumes(kept, self.segmenter.targets)
            return Prediction(job.files[0], self.output(job), "kept", volumes_ml=volumes, name=job.name)
        if job.problem:
            return Prediction(job.files[0], None, "failed", job.problem, name=job.name)
        started = time.perf_counter()
        try:
            if (
                math.isfinite(at_most)
                and sum(read_header(file).nbytes for file in job.files if not job.slices) > at_most
            ):
                return None
            scan = job.read()
            files = tuple(described(file) for file in job.sources())
            self._require_fit(job, scan)
            read = Read(job, scan, stages={"read": time.perf_counter() - started}, files=files)
            self._prepare(read)
        except Exception as error:  # one bad scan never stops the others, whatever a library makes of it
            return self._failed(job, error)
        return read

    def _prepare(self, read: Read) -> None:
        """What needs no network, here, where that works on another scan meanwhile."""
        try:
            started = time.perf_counter()
            read.grids = self.segmenter.prepare(read.scan)
            read.stages["preprocess"] = time.perf_counter() - started
            read.carried = self.segmenter.carry(read.scan, read.grids)
            read.stages["registration"] = time.perf_counter() - started - read.stages["preprocess"]
        except Exception as error:
            # Beside another scan there may be too little memory for what is possible alone, later.
            if not _out_of_memory(error):
                raise

    def segment(self, read: Read) -> Made | Prediction:
        """Segment a scan, with ever less memory where there is not enough."""
        notes = [] if _tilt(read.scan) is None else [f"sheared grid, {_tilt(read.scan):.1f} degrees (gantry tilt)"]
        lacking = ""
        for note, segmenter, options in self._attempts():
            try:
                stages: dict[str, float] = {}
                scores = None
                known: dict[str, Any] = {"grids": read.grids, "carried": read.carried, "seconds": stages}
                if self.probabilities:
                    scores = segmenter.probabilities(read.scan, **options, **known)
                labels = segmenter.predict(read.scan, **options, **known, probabilities=scores)
            except Exception as error:  # as above
                if not _out_of_memory(error):
                    return self._failed(read.job, error, read.files)
                lacking = _one_line(error)
                continue  # outside of this block the error would hold on to the memory
            read.stages |= stages
            read.grids, read.carried = (), None  # while the label map is written, another scan needs the room
            return Made(read, labels, scores, (*notes, *([note] if note else [])))
        required = "more memory; smaller windows and the CPU were tried"
        lack = InputError(read.job.files[0], f"too little memory ({lacking})", required, "Crop the scan.")
        return self._failed(read.job, lack, read.files)

    def write(self, made: Made) -> Prediction:
        """Write a label map and what belongs to it."""
        job, output, started = made.read.job, self.output(made.read.job), time.perf_counter()
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            if made.probabilities is not None:
                write_volume(made.probabilities, output.with_name(f"{_last(job)}_probabilities.nii.gz"))
            targets = self.segmenter.targets
            volumes = structure_volumes(made.labels, targets)
            if self.dicom_seg and job.files[0].is_dir() and any(volumes.values()):
                from medmeta.dicom_seg import write_dicom_seg

                write_dicom_seg(made.labels, job.sources(), targets, output.with_name(f"{_last(job)}_seg.dcm"))
            write_volume(made.labels, output)
        except Exception as error:  # as above
            return self._failed(job, error, made.read.files)
        stages = made.read.stages | {"write": time.perf_counter() - started}
        return Prediction(
            job.files[0],
            output,
            "done",
            volumes_ml=volumes,
            seconds=round(sum(stages.values()), 2),
            name=job.name,
            stages={name: round(stages.get(name, 0.0), 3) for name in STAGES},
            quality=made.labels.quality,
            notes=made.notes,
            files=made.read.files,
        )

    def _attempts(self) -> Iterator[tuple[str, Segmenter, dict[str, Any]]]:
        options = dict(self.options)
        given = options if self.predictor is None else options | {"predictor": self.predictor}
        yield "", self.segmenter, given
        # Smaller windows see less around a voxel, so the result may differ a little: it is noted.
        smaller = _in_smaller_windows(self.segmenter)
        if smaller.patch != self.segmenter.patch:
            yield f"segmented in windows of {'x'.join(map(str, smaller.patch))} for lack of memory", smaller, options
        if torch.device(options["device"]).type != "cpu":
            yield "segmented on the CPU for lack of memory", self.segmenter, options | {"device": "cpu"}

    def _require_fit(self, job: Scan, scan: Volume) -> None:
        channels = self.segmenter.channels
        if scan.channels != len(channels):
            required = f"{len(channels)} ({', '.join(channels)})"
            remedy = "Segment with a model that was adapted to such scans."
            raise InputError(job.files[0], f"{scan.channels} channels", required, remedy)
        if not bool(torch.isfinite(scan.data).any()):
            found = "NaN or infinity in every voxel"
            raise InputError(job.files[0], found, "a scan with intensities", "Export it again.")

    def _failed(self, job: Scan, error: Exception, files: tuple[dict[str, Any], ...] = ()) -> Prediction:
        reason = str(error).removeprefix(f"{job.files[0]}: ") if isinstance(error, InputError) else _one_line(error)
        return Prediction(job.files[0], None, "failed", reason, name=job.name, files=files)


def _in_smaller_windows(segmenter: Segmenter) -> Segmenter:
    stride = segmenter.model.learner.net.stride
    x, y, z = (min(side, max(stride, side // 2 // stride * stride)) for side in segmenter.patch)
    overview = None if segmenter.overview is None else _in_smaller_windows(segmenter.overview)
    return replace(segmenter, patch=(x, y, z), overview=overview)


def _locally(work: Work, jobs: Sequence[tuple[Scan, bool]], start: Callable[[Scan], None]) -> Iterator[Prediction]:
    """Segment one scan after the other, the next one read and registered and the last one written meanwhile."""
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:

        def ahead(job: Scan, keep: bool) -> Future[Read | Prediction | None]:
            if not keep:
                start(job)
            return reader.submit(work.read, job, keep, at_most=AHEAD_BYTES)

        coming = deque(ahead(*first) for first in jobs[:1])
        going: deque[Future[Prediction]] = deque()
        for number, (job, keep) in enumerate(jobs, start=1):
            read = coming.popleft().result()
            if read is None:
                read = work.read(job, keep)
            coming.extend(ahead(*following) for following in jobs[number : number + 1])
            made = work.segment(read) if isinstance(read, Read) else read
            del read
            if isinstance(made, Made):
                going.append(writer.submit(work.write, made))
            else:
                going.append(Future())
                going[-1].set_result(made)
            del made
            while going and (len(going) > 1 or not coming or going[0].done()):
                yield going.popleft().result()


def _kept(output: Path) -> Volume | None:
    """The label map of an earlier run; None where there is none that can be read."""
    try:
        return read_labels(output)
    except InputError:
        return None


def _last(job: Scan) -> str:
    return job.name.rpartition("/")[2]


def _tilt(scan: Volume) -> float | None:
    """Degrees by which voxel axes miss the right angle; None where they do not."""
    axes = scan.affine[:3, :3] / scan.affine[:3, :3].norm(dim=0)
    cosine = float((axes.T @ axes - torch.eye(3, dtype=torch.float64)).abs().max())
    return math.degrees(math.asin(min(cosine, 1.0))) if cosine > 1e-3 else None


def _out_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    words = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def structure_volumes(labels: Volume, targets: Mapping[str, Sequence[int]]) -> dict[str, float]:
    """Volume of each structure of a label map, ml."""
    voxel_ml = abs(float(torch.linalg.det(labels.affine[:3, :3]))) / 1000.0
    voxels = {value: int((labels.data == value).count_nonzero()) for values in targets.values() for value in values}
    return {name: round(sum(voxels[value] for value in set(values)) * voxel_ml, 3) for name, values in targets.items()}


def _write_account(out: Path, results: Sequence[Prediction], structures: Sequence[str]) -> None:
    write_json(out / "predictions.json", [asdict(result) for result in results])
    with replacing(out / "predictions.csv") as beside, open(beside, "w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        stages = [f"{name}_seconds" for name in STAGES]
        volumes = [f"{name}_ml" for name in structures]
        table.writerow(["name", "scan", "output", "status", "reason", "notes", "quality", "seconds", *stages, *volumes])
        for result in results:
            table.writerow(
                [
                    result.name, result.scan, result.output or "", result.status, result.reason,
                    "; ".join(result.notes), "" if result.quality is None else result.quality, result.seconds,
                    *(result.stages.get(name, "") for name in STAGES),
                    *(result.volumes_ml.get(name, "") for name in structures),
                ]
            )  # fmt: skip
