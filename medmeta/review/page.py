"""The folder of a page: its data as a script, the viewer, the pictures."""

from __future__ import annotations

import json
import platform
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import distribution, version
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

from medmeta.data.manifests import as_targets
from medmeta.errors import InputError
from medmeta.files import refuse_unwritable, replacing_folder
from medmeta.review.cases import VOXEL_LIMIT, ReviewCase, structures, write_case

_PAGE = ("review.css", "review.js", "index.html")
_MADE = {*_PAGE, "data.js", "niivue.js", "volumes", "pictures"}
_VERSIONS = ("medmeta", "torch", "monai", "ipyniivue")


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
    """Writes `report/index.html` under a folder, whole, in place of an earlier one.

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
        InputError: the targets are unusable, a picture is missing, `report` cannot be written or is no page
            (`require_report`), or the installed ipyniivue holds no NiiVue.
        ValueError: scores of a structure that is no target.
    """
    targets = as_targets(targets, (), "targets")
    for case in cases:
        if strange := sorted(set(case.scores) - set(targets)):
            raise ValueError(f"{case.name}: scores of {strange}; required: structures among {list(targets)}")
    report, viewer = require_report(folder), _niivue()
    with replacing_folder(report) as beside:
        for name in ("volumes", "pictures"):
            (beside / name).mkdir()
        copied = _copy_pictures(pictures or {}, beside / "pictures")
        shown = []
        for number, case in enumerate(cases):
            shown.append(write_case(case, number, targets, beside / "volumes", voxel_limit))
            if progress is not None:
                progress(number + 1, len(cases))
        data = {
            "title": title,
            "summary": {name: str(figure) for name, figure in (summary or {}).items()},
            "note": note,
            "structures": structures(targets),
            "cases": shown,
            "tables": [_written_table(table) for table in tables],
            "pictures": copied,
            "settings": dict(_flat(settings or {})),
            "versions": {"Python": platform.python_version()} | {name: version(name) for name in _VERSIONS},
        }
        # ASCII, and NaN as JavaScript has it: this is a script, not JSON.
        script = f"globalThis.reviewData = {json.dumps(data, default=float)};\n"
        (beside / "data.js").write_text(script, encoding="utf-8")
        (beside / "niivue.js").write_text(viewer, encoding="utf-8")
        for name in _PAGE:
            with as_file(files("medmeta.review") / name) as source:
                shutil.copyfile(source, beside / name)
    return report / "index.html"


def require_report(folder: str | Path) -> Path:
    """`report` under a folder, where nothing stands or an earlier page, which a new one replaces.

    Raises:
        InputError: something else stands there, or it cannot be written.
    """
    report = Path(folder) / "report"
    refuse_unwritable(report)
    required, remedy = "an earlier page, an empty folder or none", "Name another folder."
    try:
        # File managers leave hidden files.
        held = {path.name for path in report.iterdir() if not path.name.startswith(".")} if report.exists() else set()
    except OSError as error:
        raise InputError(report, error.strerror or str(error), required, remedy) from error
    if held and not {"data.js"} <= held <= _MADE:
        raise InputError(report, f"{min(held - _MADE or held)}, which is of no page", required, remedy)
    return report


def count_scans(count: int) -> str:
    return f"{count} scan{'s' * (count != 1)}"


def with_interval(value: float, low: float, high: float, *, digits: int = 3) -> str:
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
