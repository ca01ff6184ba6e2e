"""The documentation says what is so: its calls, messages, files and code are tried, and its site builds."""

from __future__ import annotations

import json
import logging
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch
import typer
import yaml
from small import phantom, write_pairs
from torch.nn import functional

import medmeta
from medmeta.cli import app, main
from medmeta.data.manifests import load_manifest
from medmeta.data.tasks import load_task
from medmeta.episode import Episode, Examples
from medmeta.learners import LEARNERS, build_learner
from medmeta.networks import build_network
from medmeta.recipe import TaskSource
from medmeta.train import validation_dice

ROOT = Path(__file__).resolve().parents[1]
PAGES = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md")}
COMMAND = typer.main.get_command(app)
VERBS = sorted(COMMAND.commands)


def blocks(page: str, language: str) -> list[str]:
    """The fenced code of a page, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGES[page], re.DOTALL | re.MULTILINE)


CALLS = [
    (page, line)
    for page in sorted(PAGES)
    for block in blocks(page, "bash")
    for line in block.splitlines()
    if line.startswith("medmeta ")
]
MESSAGES = [
    (call.strip(), message.strip())
    for block in blocks("commands", "console")
    for call, _, message in (part.partition("\n") for part in block.split("$ medmeta ")[1:])
]


# The command line


@pytest.fixture
def say(capsys, monkeypatch):
    """Runs a command in this process; exit code and what it printed."""

    def run(*words: str) -> tuple[int, str]:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["medmeta", *words])
        with pytest.raises(SystemExit) as caught:
            main()
        return caught.value.code or 0, "".join(capsys.readouterr())

    return run


def test_every_verb_has_a_guide_with_an_example() -> None:
    guides = dict(part.partition("\n")[::2] for part in re.split(r"^## ", PAGES["commands"], flags=re.MULTILINE)[1:])
    assert sorted(guides) == VERBS
    for verb, text in guides.items():
        assert f"```bash\nmedmeta {verb} " in text, verb
        assert f"```console\n$ medmeta {verb} " in text, verb


@pytest.mark.parametrize(("page", "line"), CALLS, ids=[f"{page}: {line}" for page, line in CALLS])
def test_an_example_is_a_call_that_the_verb_takes(page: str, line: str) -> None:
    _, verb, *words = shlex.split(line, comments=True)
    # Raises for an unknown option, a value of the wrong kind and for whatever is required and missing.
    COMMAND.commands[verb].make_context(verb, words)


@pytest.mark.parametrize(("call", "message"), MESSAGES, ids=[call for call, _ in MESSAGES])
def test_a_mistake_gets_the_message_that_the_guide_shows(say, tmp_path, monkeypatch, call: str, message: str) -> None:
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    write_pairs(tmp_path / "few")
    monkeypatch.chdir(tmp_path)
    code, said = say(*shlex.split(call))
    assert code == 2
    # Three dots stand for whatever is too long to show.
    pattern = ".*".join(map(re.escape, message.split("...")))
    assert re.search(rf"^{pattern}$", said, re.MULTILINE), said


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_a_verb_fits_one_screen(say, monkeypatch, verb: str) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, said = say(verb, "--help")
    assert code == 0
    assert f"Example: medmeta {verb} " in said
    assert len(said.splitlines()) <= 40


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_completes_verbs_and_options(say, capsys, monkeypatch, shell: str) -> None:
    assert "--install-completion" in say("--help")[1]
    monkeypatch.setenv("_MEDMETA_COMPLETE", f"complete_{shell}")
    # Each shell hands over what was typed in variables of its own.
    monkeypatch.setenv("_TYPER_COMPLETE_FISH_ACTION", "get-args")
    for typed, meant in (("medmeta ad", "adapt"), ("medmeta adapt organs3d --targ", "--target")):
        monkeypatch.setenv("COMP_WORDS", typed)
        monkeypatch.setenv("COMP_CWORD", str(len(typed.split()) - 1))
        monkeypatch.setenv("_TYPER_COMPLETE_ARGS", typed)
        with pytest.raises(SystemExit):
            app(prog_name="medmeta")
        assert meant in capsys.readouterr().out


# The learner of one's own


class Phantoms:
    """Episodes of one phantom organ in each, two patients to learn from and two others to segment."""

    def __init__(self, first: int) -> None:
        self.first = first

    def __getitem__(self, index: int) -> Episode:
        turn = self.first + index
        patients = [(turn + step) % 6 for step in range(4)]
        return Episode("organ", examples(turn % 2, patients[:2]), examples(turn % 2, patients[2:]))


def examples(organ: int, patients: list[int]) -> Examples:
    images, masks = zip(*(phantom(organ + 1, patient) for patient in patients), strict=True)
    resized = torch.cat([functional.interpolate(image.data[None].float(), (16, 16, 16)) for image in images])
    mask = torch.cat([functional.interpolate((mask.data[None] > 0).float(), (16, 16, 16)) for mask in masks])
    return Examples((resized - resized.mean()) / resized.std(), mask[:, 0].long(), 1)


def test_the_learner_of_the_guide_learns_to_adapt(monkeypatch) -> None:
    code = blocks("learner", "python")[0]
    assert len([line for line in code.splitlines() if line.strip()]) <= 30
    monkeypatch.setitem(LEARNERS, "ridge", None)
    exec(compile(code, "docs/learner.md", "exec"), {"__name__": "guide.learner"})

    network = build_network("se_unet_3d", seed=0, channels=(8, 16), se_ratio=4)
    learner = build_learner("ridge", network, strength=0.05)
    assert learner.options == {"strength": 0.05}
    queries = [Phantoms(100)[index] for index in range(6)]
    untrained = validation_dice(learner, queries)
    before = {name: tensor.clone() for name, tensor in learner.state_dict().items()}
    learner.adapt(queries[0].support)
    assert all(torch.equal(tensor, before[name]) for name, tensor in learner.state_dict().items())

    # The call of the guide, and what it says about what it makes.
    episodes, support, image = Phantoms(0), queries[0].support, queries[0].query.image
    made = {"episodes": episodes, "support": support, "image": image}
    exec(compile(blocks("learner", "python")[1], "docs/learner.md", "exec"), made)
    assert made["logits"].shape == (2, 2, 16, 16, 16)
    assert made["history"][-1]["loss"] < made["history"][0]["loss"]
    assert validation_dice(made["learner"], queries) > untrained + 0.2


# Data sets


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_the_folders_of_the_guide_are_read(tmp_path) -> None:
    decathlon, nnunet = (tmp_path / name for name in ("decathlon", "nnunet"))
    for folder, description in zip((decathlon, nnunet), blocks("data", "json"), strict=True):
        touch(folder, "dataset.json")
        (folder / "dataset.json").write_text(description, encoding="utf-8")
    touch(decathlon, *(f"{part}Tr/case{i}.nii.gz" for part in ("images", "labels") for i in (1, 2)))
    touch(decathlon, "imagesTs/case9.nii.gz")
    touch(nnunet, *(f"imagesTr/case{i}_0000.nii.gz" for i in (1, 2)), *(f"labelsTr/case{i}.nii.gz" for i in (1, 2)))
    task = load_task(decathlon)
    assert (task.modality, task.terms, len(task.cases), len(task.labelled.cases)) == ("CT", "CC BY 4.0", 3, 2)
    assert task.targets == {"kidney": (1,), "tumour": (2,)}
    task = load_task(nnunet)
    assert (task.modality, len(task.cases)) == ("CT", json.loads(blocks("data", "json")[1])["numTraining"])
    assert (task.targets, task.ignored) == ({"kidney": (1, 2), "tumour": (2,)}, (3,))


def test_the_pair_of_folders_of_the_guide_is_read(tmp_path, monkeypatch) -> None:
    write_pairs(tmp_path / "few")
    monkeypatch.chdir(tmp_path)
    made: dict[str, medmeta.Task] = {}
    exec(compile(blocks("data", "python")[0], "docs/data.md", "exec"), made)
    assert (made["task"].targets, made["task"].background, len(made["task"].cases)) == ({"kidney": (2, 3)}, (1, 4), 2)


def test_the_manifest_and_the_tasks_of_the_guide_are_read(tmp_path) -> None:
    manifest, config = blocks("data", "yaml")
    (tmp_path / "OurKidneys.yaml").write_text(manifest, encoding="utf-8")
    read = load_manifest(tmp_path / "OurKidneys.yaml")
    assert read.targets == {"kidney": [1, 2, 3], "tumour": [2]}
    assert re.search(read.patient_pattern, "k17_visit2")[1] == "k17"
    sources = [TaskSource(**entry) for entry in yaml.safe_load(config)["tasks"]]
    assert sources[-1].ignored == [5]


# The pages


def test_the_ideas_quote_the_results() -> None:
    def rows(text: str) -> dict[str, list[str]]:
        lines = [line.strip("| ").split("|") for line in text.splitlines() if line.startswith("| ")]
        return {name.strip(): [re.search(r"\d\.\d+", cell)[0] for cell in cells] for name, *cells in lines[1:]}

    sections = PAGES["results"].split("**Dice**")[1:3]
    tables = [rows(section.split("**Surface Dice")[0]) for section in sections]
    quoted = rows(PAGES["ideas"])
    for learner in ("transfer", "scratch"):
        assert quoted[learner] == [f"{float(value):.2f}" for table in tables for value in table[learner]]


def test_the_reference_holds_every_public_name() -> None:
    named = set(re.findall(r"^::: medmeta\.(\w+)$", PAGES["api"], re.MULTILINE))
    assert set(medmeta.__all__) - named == set()


def test_the_site_builds_without_a_warning_and_needs_nothing_from_elsewhere(tmp_path, caplog) -> None:
    pytest.importorskip("mkdocstrings", reason="needs the extra docs")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    with caplog.at_level(logging.WARNING):
        try:
            build(load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(tmp_path)))
        except SystemExit:
            pytest.fail(caplog.text)
    assert [record.getMessage() for record in caplog.records] == []
    pages = {path.stem: path.read_text(encoding="utf-8") for path in tmp_path.glob("*.html")}
    assert pages.keys() >= PAGES.keys()
    assert [name for name in medmeta.__all__ if f'id="medmeta.{name}"' not in pages["api"]] == []
    for name, page in pages.items():
        assert not re.search(r"<(script|link|img)[^>]+(src|href)=\"(https?:)?//", page), name
