from __future__ import annotations

import ast
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="needs the Python package nbformat")
nbclient = pytest.importorskip("nbclient", reason="needs the Python package nbclient")

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
SHORT = {
    "1_explore": {"TASKS": 2, "CASES": 2, "SIZE_MM": 60.0},
    "2_adapt": {
        "TASKS": 3, "CASES": 5, "SIZE_MM": 60.0, "TEST": 2, "STEPS": 2, "META_STEPS": 1, "LENGTHS": (1, 2),
    },
    "3_review": {"CASES": 5, "SIZE_MM": 60.0, "STEPS": 1},
}  # fmt: skip
WITHOUT_VIEWER = "3_review"


def read(name: str):
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def parameters(notebook) -> int:
    """The place of the cell that holds what a reader may change."""
    (place,) = (n for n, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", ()))
    return place


def test_these_are_all_notebooks():
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == sorted(SHORT)


@pytest.mark.parametrize("name", SHORT)
def test_a_notebook_opens_with_what_one_learns_and_holds_no_outputs(name):
    notebook = read(name)
    nbformat.validate(notebook)
    assert notebook.cells[0].cell_type == "markdown" and "What you learn here:" in notebook.cells[0].source
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)
    given = ast.parse(notebook.cells[parameters(notebook)].source).body
    assert SHORT[name].keys() <= {line.targets[0].id for line in given}


@pytest.mark.parametrize("name", SHORT)
def test_a_notebook_runs(name, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = read(name)
    lines = [f"{key} = {value!r}" for key, value in SHORT[name].items()]
    if name == WITHOUT_VIEWER:
        lines += ["import sys", "sys.modules['ipyniivue'] = None"]
    notebook.cells.insert(parameters(notebook) + 1, nbformat.v4.new_code_cell("\n".join(lines)))
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources={}).execute(cwd=str(tmp_path))
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    kinds = {kind for output in outputs for kind in output.get("data", {})}
    assert {"text/html", "image/png"} <= kinds
    assert ("application/vnd.jupyter.widget-view+json" in kinds) == (name == "1_explore")
    pages = list(tmp_path.rglob("report/index.html"))
    assert len(pages) == (name != "1_explore")
