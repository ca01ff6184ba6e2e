"""What is installed when the package is installed, and what is said about it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

from medmeta.data.manifests import manifest_names
from medmeta.segmenter import shipped_models

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel, built from a copy: setuptools leaves its own files beside what it builds."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("medmeta", "data_manifests"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", out, source],
        check=True,
        capture_output=True,
    )
    return next(out.glob("*.whl"))


def contents(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if not name.split("/")[0].endswith(".dist-info")}


def test_the_wheel_holds_the_package_and_nothing_else(wheel) -> None:
    package = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "medmeta").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    manifests = {f"medmeta/data_manifests/{name}.yaml" for name in manifest_names()}
    assert contents(wheel) == package | manifests
    assert {f"medmeta/models/{name}/model.json" for name in shipped_models()} <= package
    assert manifests


def test_the_wheel_works_away_from_the_checkout(wheel, tmp_path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import medmeta\n"
        "from medmeta.data.manifests import manifest_names\n"
        "print(medmeta.__file__)\n"
        "print(medmeta.__version__, len(manifest_names()), *medmeta.shipped_models())\n"
        "medmeta.load('organs3d')\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    home, facts = done.stdout.splitlines()
    assert Path(home).is_relative_to(tmp_path)
    assert facts == f"{PROJECT['project']['version']} {len(manifest_names())} {' '.join(shipped_models())}"


def test_the_citation_agrees_with_the_package() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    project = PROJECT["project"]
    assert (str(citation["version"]), citation["license"]) == (project["version"], project["license"])


def test_the_changelog_begins_with_what_is_unreleased() -> None:
    headings = [line for line in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").splitlines() if line[:3] == "## "]
    assert headings[0] == "## [Unreleased]"


def test_continuous_integration_runs_every_python_that_is_promised() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text(encoding="utf-8"))
    job = workflow["jobs"]["tests"]
    # YAML reads the key `on` as true.
    assert set(workflow[True]) == {"push", "pull_request"}
    low, high = (int(bound.split(".")[1]) for bound in PROJECT["project"]["requires-python"].split(","))
    assert job["strategy"]["matrix"]["python"] == [f"3.{minor}" for minor in range(low, high)]
    assert "bash .ci/run" in [step.get("run") for step in job["steps"]]
    pins = [step["uses"].split("@")[1] for step in job["steps"] if "uses" in step]
    assert all(len(pin) == 40 and int(pin, 16) for pin in pins), "a tag can be moved, a commit cannot"
