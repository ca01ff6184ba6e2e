"""The review page: cases, worst first, beside an interactive viewer; a folder that opens from disk without network.

`write_review` writes any such page; `write_adaptation` the one of a model that was adapted to a few scans, and
`write_comparison` the one of a benchmark, which has tables and curves in place of scans.

    report/index.html   the page; review.css and review.js beside it
    report/data.js      names, scores, tables, settings
    report/niivue.js    the viewer: NiiVue, out of the package ipyniivue
    report/volumes/     one file for each case and role, read when the case is opened
    report/pictures/

A page on disk may not fetch its neighbours but may load them as scripts, so everything is a script: volumes are NIfTI
in base64. They are written anew with a bare header, on the axes nearest to RAS: nothing else of a header leaves with
the page.
"""

from __future__ import annotations

import base64
import gzip
import json
import platform
import re
import shutil
import statistics
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import distribution, version
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import unquote

import nibabel as nib
import numpy as np

from medmeta.data.folders import listed, stem
from medmeta.data.manifests import as_targets
from medmeta.data.stored import by
from medmeta.data.volume import Volume, grid_difference, read_labels, read_volume
from medmeta.errors import InputError
from medmeta.files import replacing
from medmeta.report import describe_adaptation, learning_curves
from medmeta.representation import COLOURS, stretch

if TYPE_CHECKING:
    from medmeta.data.tasks import Task
    from medmeta.evaluate import Evaluation
    from medmeta.prediction import Prediction
    from medmeta.segmenter import Segmenter

VOXEL_LIMIT = 2**24
"""Larger volumes are shown on every second, third, ... voxel: 512 x 512 x 64 voxels, about 30 MiB in base64."""

_PAGE = ("review.css", "review.js", "index.html")
_VERSIONS = ("medmeta", "torch", "monai", "ipyniivue")
_ROLES = {"scan": read_volume, "reference": read_labels, "prediction": read_labels}
_SCORES = ("dice", "surface_dice", "hd95_mm", "prediction_ml", "reference_ml", "missed", "invented", "absent")


@dataclass(frozen=True)
class ReviewCase:
    """One scan and what is known of it.

    Args:
        name: as shown; any text.
        scan: the file; its first channel is shown.
        reference: a label map on the grid of the scan, None where there is none.
        prediction: a label map on the grid of the scan, None where there is none.
        scores: structure -> figures, any of dice, surface_dice, hd95_mm, prediction_ml, reference_ml, missed, invented
            and absent, as in the rows of `evaluate.Evaluation`; other keys are let be, NaN is shown as a dash.
        quality: expected quality of the prediction, the larger the better.
        flags: what a reader should know about the case, a few words each.
        window: the intensities drawn black and white, such as report.CT_WINDOW in HU; by default the 1st and 99.5th
            percentile of the scan, its darkest value left out.
    """

    name: str
    scan: Path
    reference: Path | None = None
    prediction: Path | None = None
    scores: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    quality: float | None = None
    flags: Sequence[str] = ()
    window: tuple[float, float] | None = None


class Cell(NamedTuple):
    """A figure in a table of the page.

    Args:
        text: as shown.
        part: 0 to 1, drawn as a bar below it; None for no bar.
        best: shown in bold.
    """

    text: str
    part: float | None = None
    best: bool = False


@dataclass(frozen=True)
class PageTable:
    """A table below the scans.

    Args:
        title: the heading.
        columns: headings of the columns.
        rows: as many cells each; the first is the name of the row.
        note: how to read it, a sentence or two.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str | Cell]]
    note: str = ""


def predicted_cases(results: Iterable[Prediction]) -> list[ReviewCase]:
    """What a batch prediction made of each scan, failures as flags."""
    return [
        ReviewCase(
            result.name or result.scan.name,
            result.scan,
            prediction=result.output,
            scores={name: {"prediction_ml": volume} for name, volume in result.volumes_ml.items()},
            quality=result.quality,
            flags=(*result.notes, *([f"failed: {result.reason}"] if result.status == "failed" else [])),
        )
        for result in results
    ]


def evaluated_cases(evaluation: Evaluation, images: str | Path) -> list[ReviewCase]:
    """The cases of an evaluation with their scans; a case pairs with the scan of its name, or its channel 0.

    Raises:
        InputError: `images` is no folder, or holds the scan of no case.
    """
    scans = {stem(path): path for path in listed(Path(images))}
    found = {case: scans.get(case, scans.get(f"{case}_0000")) for case in evaluation.files}
    if not any(found.values()):
        required = "scans named like their label maps, the suffix aside"
        raise InputError(images, f"no scan of {len(found)} cases", required)
    scores: dict[str, dict[str, dict[str, Any]]] = {}
    for row in evaluation.rows:
        scores.setdefault(row["case"], {})[row["target"]] = row
    return [
        ReviewCase(case, scan, *evaluation.files[case], scores=scores.get(case, {}))
        for case, scan in found.items()
        if scan is not None
    ]


def write_review(
    folder: str | Path,
    cases: Sequence[ReviewCase],
    *,
    targets: Mapping[str, Sequence[int]],
    title: str,
    summary: Mapping[str, str] | None = None,
    note: str = "",
    tables: Sequence[PageTable] = (),
    pictures: Mapping[str, str | Path] | None = None,
    settings: Mapping[str, Any] | None = None,
    voxel_limit: int = VOXEL_LIMIT,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Writes `report/index.html` under a folder, over an earlier one.

    A volume that cannot be read, or lies on another grid than its scan, is left out, and its case says why.

    Args:
        folder: made when missing.
        cases: in any order; the page sorts them.
        targets: structure -> label values whose union it is, as in `evaluate.evaluate_folders`. Other values are not
            shown; a value of several structures has the colour of the first that is shown.
        title: the heading.
        summary: what to see first, name -> figure.
        note: what the figures of the cases mean, a sentence or two.
        tables: shown below the cases.
        pictures: caption -> picture file, such as curves; copied.
        settings: names -> values, nested as they come; shown beside the versions of the libraries. A list of mappings
            is a table and no setting: it is left out.
        voxel_limit: larger volumes are written on a coarser grid, and the page says so.
        progress: called as progress(done, total) after each case.

    Returns:
        the page.

    Raises:
        InputError: the targets are unusable, a picture is missing, the folder cannot be written to, or the installed
            ipyniivue holds no NiiVue.
        ValueError: scores of a structure that is no target.
    """
    targets = as_targets(targets, (), "targets")
    for case in cases:
        if strange := sorted(set(case.scores) - set(targets)):
            raise ValueError(f"{case.name}: scores of {strange}; required: structures among {list(targets)}")
    report = Path(folder) / "report"
    viewer = _niivue()
    try:
        _clear(report)
        copied = _copy_pictures(pictures or {}, report / "pictures")
        shown = []
        for number, case in enumerate(cases):
            shown.append(_write_case(case, number, targets, report / "volumes", voxel_limit))
            if progress is not None:
                progress(number + 1, len(cases))
        data = {
            "title": title,
            "summary": {name: str(figure) for name, figure in (summary or {}).items()},
            "note": note,
            "structures": _structures(targets),
            "cases": shown,
            "tables": [_written_table(table) for table in tables],
            "pictures": copied,
            "settings": dict(_flat(settings or {})),
            "versions": {"Python": platform.python_version()} | {name: version(name) for name in _VERSIONS},
        }
        # ASCII, and NaN as JavaScript has it: this is a script, not JSON.
        _write(report / "data.js", f"globalThis.reviewData = {json.dumps(data, default=float)};\n")
        _write(report / "niivue.js", viewer)
        for name in _PAGE:
            with as_file(files(__name__) / name) as source, replacing(report / name) as beside:
                shutil.copyfile(source, beside)
    except OSError as error:
        found = error.strerror or str(error)
        raise InputError(error.filename or report, found, "a folder with free space that can be written to") from error
    return report / "index.html"


def write_adaptation(
    folder: str | Path,
    segmenter: Segmenter,
    task: Task,
    *,
    losses: Sequence[tuple[int, int, float]] = (),
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Writes the page of an adaptation: the labelled scans, what was tried on them, the forecast, the loss.

    Where the way to adapt was chosen by leaving scans out, each scan has the scores of a model that never saw it.

    Args:
        folder: as of `write_review`. The page holds the scans: not the folder of a model that is to be passed on.
        segmenter: what `adapt_to` made.
        task: what it was given.
        losses: (step, steps, loss) as `adapt_to` told its progress; those of the final adaptation are drawn.
        progress: as of `write_review`.

    Returns:
        the page.

    Raises:
        InputError: as of `write_review`.
    """
    card, cases = segmenter.card, task.labelled.cases
    left_out = card.get("left_out", {"cases": [], "mean_dice": {}})
    scores = {row["case"]: {name: row[name] for name in segmenter.targets} for row in left_out["cases"]}
    summary = {"Labelled scans": str(len(cases)), "Adapted by": card["method"]}
    note = "From 3 labelled scans on, each is scored by a model that never saw it, and the Dice on others is forecast."
    tables = []
    if scores:
        forecast = card["forecast"]
        low, high = forecast["scan_interval"]
        summary |= {
            "Dice expected on unseen scans": _with_interval(forecast["dice"], *forecast["mean_interval"], digits=2),
            "90 % of single scans": f"{low:.2f} to {high:.2f}",
        }
        note = "The scores of a scan are those of a model that was adapted without it."
        tables = [_tried_table(left_out["mean_dice"]), _forecast_table(forecast, len(cases))]
    # Tables of their own, and what may name folders or files of patients.
    apart = ("left_out", "forecast", "unlabelled", "task")
    settings = {
        "adapted": {name: value for name, value in card.items() if name not in apart},
        "working grid": segmenter.preprocess.to_dict(),
        "patch": segmenter.patch,
        "network": segmenter.model.learner.net.spec,
        "learner": segmenter.model.learner.name,
        "trained on": [each["name"] for each in segmenter.model.card.get("training_tasks", [])],
    }
    shown = [
        ReviewCase(
            case.id, case.images[0], case.labels, None, scores.get(case.id, {}), window=segmenter.preprocess.window
        )
        for case in cases
    ]
    with tempfile.TemporaryDirectory() as temporary:
        return write_review(
            folder,
            shown,
            targets=segmenter.targets,
            title=f"Adapted to {', '.join(segmenter.targets)} from {_scans(len(cases))}",
            summary=summary,
            note=note,
            tables=tables,
            pictures=_loss_curve(losses, card, Path(temporary) / "loss.png"),
            settings=settings,
            progress=progress,
        )


def _loss_curve(losses: Sequence[tuple[int, int, float]], card: Mapping[str, Any], path: Path) -> dict[str, Path]:
    """Caption -> picture; none where nothing was told."""
    # The steps of all models that were trained count on; the last one is kept.
    before = losses[-1][1] - card["steps"] if losses else 0
    final = [(step - before, loss) for step, _, loss in losses if step > before]
    if not final:
        return {}
    learning_curves([{"phase": card["method"], "step": step, "loss": loss} for step, loss in final], path)
    return {"Loss of the final adaptation": path}


def _tried_table(means: Mapping[str, float]) -> PageTable:
    best = max(means.values())
    rows = [(name, Cell(f"{dice:.3f}", dice, dice == best)) for name, dice in means.items()]
    note = "Mean over structures and scans, each scan left out of the adaptation in turn. The best decides."
    return PageTable("Ways to adapt, on scans left out", ("Way", "Dice"), rows, note)


def _forecast_table(forecast: Mapping[str, Any], scans: int) -> PageTable:
    expected = {0: (forecast["dice"], *forecast["mean_interval"])}
    expected |= {int(more): values for more, values in forecast["more"].items()}
    rows = [
        (f"{scans + more}" + (f" ({more} more)" if more else ""), Cell(f"{dice:.2f}", dice), f"{low:.2f} to {high:.2f}")
        for more, (dice, low, high) in expected.items()
    ]
    note = "Mean Dice to expect on unseen scans like these, with its 90 % interval."
    return PageTable("Forecast", ("Labelled scans", "Dice", "90 % interval"), rows, note)


def write_comparison(
    folder: str | Path,
    rows: Sequence[Mapping[str, Any]],
    task: Task,
    *,
    baseline: str,
    costs: Mapping[str, Mapping[str, float]] | None = None,
    pictures: Mapping[str, str | Path] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Path:
    """Writes the page of a benchmark: Dice and surface Dice of every arm, structure by structure, and what it cost.

    Args:
        folder: as of `write_review`.
        rows: of `benchmark.summarise`; arms are shown in their order.
        task: the held-out task.
        baseline: the arm that the others were tested against.
        costs: arm -> meta_seconds, time_ratio and peak_bytes, as in the `result.json` of a benchmark.
        pictures: as of `write_review`.
        settings: as of `write_review`.

    Returns:
        the page.

    Raises:
        InputError: as of `write_review`.
        ValueError: no rows.
    """
    if not rows:
        raise ValueError("no rows; required: at least one arm that was scored")
    summary = {"Organ that no arm saw": task.name}
    for shots in sorted({row["shots"] for row in rows}):
        best = max((row for row in rows if row["shots"] == shots), key=lambda row: row["dice"])
        summary[f"Best Dice from {_scans(shots)}"] = f"{best['dice']:.2f} ({best['arm']})"
    tests = f"+ and - mark a Dice that differs from that of {baseline} (p < 0.05, Wilcoxon's test, corrected by Holm)."
    tables = [
        _arms_table("Dice", rows, "dice", "interval", f"Mean, with its 95 % interval. {tests}", baseline),
        _arms_table("Surface Dice", rows, "surface_dice", "surface_interval", "Mean, with its 95 % interval."),
        *_structure_tables(rows),
        _cost_table(rows, costs or {}),
    ]
    return write_review(
        folder,
        (),
        targets=task.targets,
        title=f"Benchmark on {task.name}",
        summary=summary,
        tables=tables,
        pictures=pictures,
        settings=settings,
    )


_Column = tuple[int, str, int]
"""Number of scans, method, steps."""


def _columns(rows: Sequence[Mapping[str, Any]]) -> dict[_Column, dict[str, Mapping[str, Any]]]:
    """The rows of each number of scans and way to adapt, by arm; the learners' own rule comes first."""
    columns: dict[_Column, dict[str, Mapping[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: (row["shots"], row["method"] != "inner", row["method"], row["steps"])):
        columns.setdefault((row["shots"], row["method"], row["steps"]), {})[row["arm"]] = row
    return columns


def _arms_table(
    title: str, rows: Sequence[Mapping[str, Any]], key: str, interval: str, note: str, baseline: str = ""
) -> PageTable:
    """Arms down, numbers of scans and ways to adapt across; marked where the test against the baseline says so."""
    columns = _columns(rows)

    def cell(arm: str, column: Mapping[str, Mapping[str, Any]]) -> str | Cell:
        if arm not in column:
            return ""
        row, mark = column[arm], ""
        if baseline in column and row["p"] is not None and row["p"] < 0.05:
            mark = " +" if row[key] > column[baseline][key] else " -"
        best = row[key] == max(each[key] for each in column.values())
        return Cell(_with_interval(row[key], *row[interval]) + mark, row[key], best)

    lines = [[arm, *(cell(arm, column) for column in columns.values())] for arm in _arms(rows)]
    names = [f"{_scans(shots)}, {describe_adaptation(method, steps)}" for shots, method, steps in columns]
    return PageTable(title, ["Arm", *names], lines, note)


def _structure_tables(rows: Sequence[Mapping[str, Any]]) -> list[PageTable]:
    """One for each way to adapt, from the most scans; none where there is one structure."""
    most, structures = max(row["shots"] for row in rows), list(rows[0]["by_target"])
    return [
        PageTable(
            f"Dice of each structure from {_scans(most)}, {describe_adaptation(method, steps)}",
            ["Arm", *structures],
            [
                [arm, *(Cell(f"{row['by_target'][name]:.3f}", row["by_target"][name]) for name in structures)]
                for arm, row in column.items()
            ],
        )
        for (shots, method, steps), column in _columns(rows).items()
        if shots == most and len(structures) > 1
    ]


def _cost_table(rows: Sequence[Mapping[str, Any]], costs: Mapping[str, Mapping[str, float]]) -> PageTable:
    ways = list(dict.fromkeys((row["method"], row["steps"]) for row in rows))

    def line(arm: str) -> list[str]:
        cost = costs.get(arm)
        seconds = [
            [row["adapt_seconds"] for row in rows if (row["arm"], row["method"], row["steps"]) == (arm, *way)]
            for way in ways
        ]
        return [
            arm,
            *(
                (f"{cost['meta_seconds']:.0f}", f"{cost['time_ratio']:.1f}", f"{cost['peak_bytes'] / 2**20:.0f}")
                if cost
                else ("", "", "")
            ),
            *(f"{statistics.fmean(each):.1f}" if each else "" for each in seconds),
        ]

    columns = ["Arm", "Meta-training s", "One meta-step, x plain pass", "Its peak memory MiB"]
    columns += [f"Adaptation s, {describe_adaptation(*way)}" for way in ways]
    return PageTable("Cost", columns, [line(arm) for arm in _arms(rows)])


def _arms(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(row["arm"] for row in rows))


def _scans(count: int) -> str:
    return f"{count} scan{'s' * (count != 1)}"


def _with_interval(value: float, low: float, high: float, *, digits: int = 3) -> str:
    return f"{value:.{digits}f} ({low:.2f} to {high:.2f})"


def _written_table(table: PageTable) -> dict[str, Any]:
    """As the page reads it; every cell becomes text, a bar and a weight."""
    rows = [[Cell(cell) if isinstance(cell, str) else cell for cell in row] for row in table.rows]
    return {
        "title": table.title,
        "note": table.note,
        "columns": list(table.columns),
        "rows": [[cell._asdict() for cell in row] for row in rows],
    }


def _clear(report: Path) -> None:
    """Removes what an earlier page left, the page itself first: none may stand that shows half of another."""
    report.mkdir(parents=True, exist_ok=True)
    (report / "index.html").unlink(missing_ok=True)
    for name in ("volumes", "pictures"):
        if (report / name).exists():
            shutil.rmtree(report / name)
        (report / name).mkdir()


def _write(path: Path, text: str) -> None:
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")


def _niivue() -> str:
    """NiiVue as a script that sets `globalThis.niivue`.

    The bundle of ipyniivue carries the NiiVue module twice: compiled into the widget, where nothing can reach it, and
    as a percent-encoded text, which the widget puts into the pages that it saves.
    """
    package = distribution("ipyniivue")
    bundle = Path(str(package.locate_file("ipyniivue/static/widget.js")))
    try:
        encoded = max(re.findall(r'"([\w%.!~*\'()-]{100000,})"', bundle.read_text(encoding="utf-8")), key=len)
        module = re.fullmatch(r"(.*)export\s*\{([^{}]*\bNiivue\b[^{}]*)\};?\s*", unquote(encoded), re.S)
        if module is None:
            raise ValueError("no export of Niivue")
    except (OSError, ValueError) as error:
        required = "the NiiVue module within its bundle"
        raise InputError(bundle, "none", required, "Install ipyniivue 2.4.") from error
    body, exports = module.groups()
    names = re.sub(r"([\w$]+) as ([\w$]+)", r"\2: \1", exports)
    licence = package.read_text("licenses/LICENSE")
    return f'/*! NiiVue, from ipyniivue {package.version}\n\n{licence}\n*/\n(() => {{ "use strict";\n{body}\n' + (
        f"globalThis.niivue = {{{names}}};\n}})();\n"
    )


def _copy_pictures(pictures: Mapping[str, str | Path], folder: Path) -> list[dict[str, str]]:
    copied = []
    for number, (caption, path) in enumerate(pictures.items()):
        if not Path(path).is_file():
            raise InputError(path, "no such file", "a picture")
        name = f"{number}{Path(path).suffix.lower()}"
        shutil.copyfile(path, folder / name)
        copied.append({"caption": caption, "path": f"pictures/{name}"})
    return copied


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            several = isinstance(value, list | tuple)
            if not (several and any(isinstance(each, Mapping) for each in value)):
                yield f"{prefix}{name}", ", ".join(map(_shown, value)) if several else _shown(value)


def _shown(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _write_case(
    case: ReviewCase, number: int, targets: Mapping[str, Sequence[int]], folder: Path, voxel_limit: int
) -> dict[str, Any]:
    """Writes the volumes of a case, and returns what the page knows about it."""
    volumes, problems = _read(case)
    shown: dict[str, Any] = {
        "name": case.name,
        "scores": {name: {key: row[key] for key in _SCORES if key in row} for name, row in case.scores.items()},
        "quality": case.quality,
        "flags": list(case.flags),
        "problems": problems,
        "volumes": {role: f"{number}-{role}" for role in volumes},
        "centres": {},
    }
    for role, volume in volumes.items():
        if role == "scan":
            image = _image(volume.data[0].numpy(), volume.affine.numpy(), voxel_limit)
            voxels = np.asanyarray(image.dataobj)
            shown["window"] = case.window or stretch(voxels)
            shown["reduced"] = _reduction(volume, image)
            image = nib.Nifti1Image(_in_16_bits(voxels), image.affine)
        else:
            # Both label maps lie on the grid of the scan, up to rounding; here to the last bit.
            image = _image(_coded(volume.data[0].numpy(), targets), volumes["scan"].affine.numpy(), voxel_limit)
            # The reference comes first and has the last word.
            shown["centres"] = _centres(image, targets) | shown["centres"]
        # nibabel spreads floats over the whole range of the type that they are stored in.
        image.set_data_dtype(np.int16)
        image.header.set_xyzt_units("mm")
        content = base64.b64encode(gzip.compress(image.to_bytes(), 5, mtime=0)).decode("ascii")
        name = shown["volumes"][role]
        _write(folder / f"{name}.js", f'review.receive("{name}", "{content}");\n')
    return shown


def _read(case: ReviewCase) -> tuple[dict[str, Volume], list[str]]:
    """Role -> volume, the scan first and nothing without it; and what is wrong with the others."""
    volumes: dict[str, Volume] = {}
    problems = []
    for role, read in _ROLES.items():
        path = getattr(case, role)
        if path is None:
            continue
        try:
            volume = read(path)
        except InputError as error:
            problems.append(f"{role} not shown: {str(error).removeprefix(f'{error.where}: ')}")
            continue
        if "scan" in volumes and (difference := grid_difference(volumes["scan"], volume)):
            problems.append(f"{role} not shown: another grid than the scan: {difference}")
            continue
        volumes[role] = volume
    return (volumes if "scan" in volumes else {}), problems


def _image(values: np.ndarray, affine: np.ndarray, voxel_limit: int) -> nib.Nifti1Image:
    """(X, Y, Z) on the axes nearest to RAS; every n-th voxel, taken along the axes of finest spacing, within the limit.

    Voxels are taken, not averaged: a scan and its label maps then stay on each other.
    """
    image = nib.as_closest_canonical(nib.Nifti1Image(values, affine))
    steps, spacing = np.ones(3, dtype=int), np.asarray(image.header.get_zooms())
    while np.prod(-(-np.asarray(image.shape) // steps)) > voxel_limit:
        steps[(spacing * steps).argmin()] += 1
    return image.slicer[tuple(slice(None, None, int(step)) for step in steps)]


def _reduction(volume: Volume, image: nib.Nifti1Image) -> str:
    """How the page's grid is coarser than the scan's; "" where it is not."""
    if sorted(volume.shape) == sorted(image.shape):
        return ""
    shown, taken = ([round(float(mm), 2) for mm in spacing] for spacing in (image.header.get_zooms(), volume.spacing))
    return (
        f"Shown on a coarser grid: {by(image.shape)} voxels of {by(shown)} mm; "
        f"the scan has {by(volume.shape)} of {by(taken)} mm."
    )


def _in_16_bits(voxels: np.ndarray) -> np.ndarray:
    """Integers that fit as int16; all else float, drawn in so far that 16-bit steps serve it, NaN as the least.

    What lies more than 8 widths of the central 99.8 % outside them is drawn in: those keep 12 bits.
    """
    finite = voxels[np.isfinite(voxels)]
    if not finite.size:
        return np.zeros(voxels.shape, dtype=np.int16)
    low, high = np.percentile(finite, (0.1, 99.9))
    reach = 8 * (high - low) or np.inf
    least, most = max(finite.min(), low - reach), min(finite.max(), high + reach)
    values = np.clip(np.nan_to_num(voxels, nan=least, neginf=least, posinf=most), least, most)
    whole = values.astype(np.int16) if least >= -(2**15) and most < 2**15 else values
    return whole if (whole == values).all() else values


def _codes(targets: Mapping[str, Sequence[int]]) -> list[int]:
    """The label values that are shown. In the volumes of the page a value is its place here, counted from 1."""
    return sorted({value for values in targets.values() for value in values})


def _coded(labels: np.ndarray, targets: Mapping[str, Sequence[int]]) -> np.ndarray:
    known = _codes(targets)
    return np.where(np.isin(labels, known), np.searchsorted(known, labels) + 1, 0).astype(np.int16)


def _structures(targets: Mapping[str, Sequence[int]]) -> list[dict[str, Any]]:
    known = _codes(targets)
    return [
        {
            "name": name,
            "colour": COLOURS[number % len(COLOURS)],
            "codes": [known.index(value) + 1 for value in values],
        }
        for number, (name, values) in enumerate(targets.items())
    ]


def _centres(image: nib.Nifti1Image, targets: Mapping[str, Sequence[int]]) -> dict[str, list[float]]:
    """Structure -> RAS mm of its voxel nearest to its centre of mass, which may itself lie outside."""
    labels, spacing = np.asanyarray(image.dataobj), image.header.get_zooms()
    centres = {}
    for structure in _structures(targets):
        voxels = np.argwhere(np.isin(labels, structure["codes"]))
        if len(voxels):
            nearest = voxels[(((voxels - voxels.mean(axis=0)) * spacing) ** 2).sum(axis=1).argmin()]
            centres[structure["name"]] = [round(float(mm), 2) for mm in nib.affines.apply_affine(image.affine, nearest)]
    return centres
