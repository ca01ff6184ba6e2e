"""The command line as a user meets it: exit codes, one-line errors, nothing half-written, from adapt to scores."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from small import TERMS, broken_scans, like, nifti, phantom, tiny_model, tree, write_pairs

import medmeta
from medmeta.adaptation import CANDIDATES, adapt
from medmeta.cli import main
from medmeta.data.phantoms import write_phantoms
from medmeta.data.volume import Volume, grid_difference, read_header, read_labels, write_volume
from medmeta.fine_tuning import Budget, usual_steps
from medmeta.registration import ATLASES
from medmeta.segmenter import Segmenter, load

VERBS = (
    "demo", "phantoms", "check", "download", "train", "adapt", "predict", "evaluate", "benchmark", "import", "info",
)  # fmt: skip


class Run(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def medmeta_command(capsys, monkeypatch) -> Callable[..., Run]:
    """Runs a command in this process, by the entry point that the shell calls."""

    def run(*words: object) -> Run:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["medmeta", *map(str, words)])
        with pytest.raises(SystemExit) as caught:
            main()
        code = caught.value.code
        return Run(0 if code is None else code, *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "meta"
    tiny_model().save(folder)
    return folder


@pytest.fixture(scope="module")
def support(tmp_path_factory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("support"))


@pytest.fixture(scope="module")
def adapted(tmp_path_factory, support) -> Path:
    targets = {"anterior": (1,), "posterior": (2,)}
    folder = tmp_path_factory.mktemp("models") / "adapted"
    budget = Budget(steps=30, rate=1e-2)
    adapt(tiny_model(), support / "images", support / "labels", targets=targets, budget=budget).save(folder)
    return folder


def require_one_line(run: Run, *words: str, code: int = 2) -> None:
    """An error as the house wants it: one line that says file, found, required (and a remedy), and no traceback."""
    assert run.code == code, run
    assert run.err.startswith("medmeta: ")
    assert run.err.count("\n") == 1
    assert run.err.endswith("\n")
    assert "Traceback" not in run.err + run.out
    for word in ("found ", "required: ", *words):
        assert word in run.err, f"{word!r} in {run.err!r}"


# What a user sees first


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_help_fits(medmeta_command, monkeypatch, verb):
    monkeypatch.setenv("COLUMNS", "80")
    run = medmeta_command(*([verb] if verb else []), "--help")
    assert (run.code, run.err) == (0, "")
    assert max(map(len, run.out.splitlines())) <= 80
    assert "Usage: " in run.out
    assert "…" not in run.out, "nothing cut short"
    if verb:
        assert f"Example: medmeta {verb}" in run.out
        assert f" {verb} " in medmeta_command("--help").out


def test_adapt_says_how_channels_and_heads_are_grown(medmeta_command):
    text = " ".join(medmeta_command("adapt", "--help").out.split())
    assert "one row per class" in text
    assert "one slice per channel" in text


def test_version_and_no_words(medmeta_command):
    assert medmeta_command("--version").out.strip() == f"medmeta {medmeta.__version__}"
    assert "Usage" in "".join(medmeta_command()[1:])
    assert medmeta_command("fly").code == 2
    assert medmeta_command("predict").code == 2


# From adapt to scores


def test_adapt_with_unlabelled_scans(medmeta_command, model, support, tmp_path):
    write_pairs(tmp_path / "more", cases=(2, 3))
    (tmp_path / "more" / "images" / "text.nii.gz").write_text("no scan")
    run = medmeta_command(
        "adapt", model, "--images", support / "images", "--labels", support / "labels", "--out", tmp_path / "organ",
        "--unlabelled", tmp_path / "more" / "images", "--steps", 3,
    )  # fmt: skip
    assert run.code == 1, "done, with a problem"
    assert "Learned from 2 unlabelled scans too." in run.out
    assert "pays" not in run.out
    assert "text.nii.gz" in run.out
    assert load(tmp_path / "organ").card["method"] == "self_training"
    assert "any brightness" not in run.out


@pytest.mark.parametrize(("more", "said"), [(-1.0, True), (1.0, False)])
def test_adapt_says_that_labelled_organs_may_be_of_unusual_brightness(
    medmeta_command, model, support, tmp_path, monkeypatch, more, said
):
    monkeypatch.setattr("medmeta.adaptation.SURER", more)
    write_pairs(tmp_path / "more", cases=(2, 3))
    run = medmeta_command(
        "adapt", model, "--images", support / "images", "--labels", support / "labels", "--out", tmp_path / "organ",
        "--unlabelled", tmp_path / "more" / "images", "--steps", 3, "--modality", "MR",
    )  # fmt: skip
    assert run.code == 0
    assert ("any brightness" in run.out) == said


def test_adapt_takes_as_many_steps_and_atlases_as_the_api(medmeta_command):
    text = medmeta_command("adapt", "--help").out
    assert f"Steps, else {usual_steps(1):,} x root of the scan count." in text
    assert f"[default: {ATLASES}]" in text


def test_adapt_predict_evaluate(medmeta_command, model, support, tmp_path):
    out, made, scores = tmp_path / "organ", tmp_path / "made", tmp_path / "scores" / "scores.json"
    run = medmeta_command(
        "adapt", model, "--images", support / "images", "--labels", support / "labels", "--out", out, "--steps", 60,
        "--target", "anterior=1", "--target", " posterior = 2", "--seed", 3,
    )  # fmt: skip
    assert (run.code, run.err) == (0, "")
    assert "2 labelled scans, CT, anterior, posterior" in run.out
    assert "--unlabelled FOLDER pays" in run.out
    assert isinstance(load(out), Segmenter)
    assert load(out).card["seed"] == 3

    write_pairs(tmp_path / "test", cases=(2, 3))
    run = medmeta_command("predict", out, tmp_path / "test" / "images", "--out", made)
    assert (run.code, run.err) == (0, "")
    assert f"2 segmented, 0 there already, 0 failed; all in {made}" in run.out
    for case in (2, 3):
        ours, theirs = (read_header(folder / f"case{case}.nii.gz") for folder in (made, tmp_path / "test" / "images"))
        assert grid_difference(ours, theirs) is None
    again = medmeta_command("predict", out, tmp_path / "test" / "images", "--out", made)
    assert "0 segmented, 2 there already" in again.out
    upright = tmp_path / "upright"
    assert medmeta_command("predict", out, tmp_path / "test" / "images", "--out", upright, "--upright").code == 0
    for folder, rotations in ((made, "True"), (upright, "False")):
        assert json.loads((folder / "run.json").read_text(encoding="utf-8"))["settings"]["rotations"] == rotations

    run = medmeta_command(
        "evaluate", "--reference", tmp_path / "test" / "labels", "--prediction", made, "--json", scores
    )
    assert (run.code, run.err) == (0, "")
    assert "2 cases scored, 0 problems" in run.out
    content = json.loads(scores.read_text(encoding="utf-8"))
    assert {row["case"] for row in content["rows"]} == {"case2", "case3"}
    assert content["summary"]["overall"]["n"] == 2
    run = medmeta_command("info", out)
    assert run.code == 0
    for words in (
        "adapted; learner fomaml",
        "anterior, posterior from 2 scans",
        TERMS,
        "Task01_Liver",
        "Not a medical",
    ):
        assert words in run.out


def test_adapt_chooses_and_forecasts_from_three_scans(medmeta_command, model, tmp_path):
    write_pairs(tmp_path / "three", cases=(0, 1, 2))
    words = adapt_words(model, tmp_path / "three", tmp_path / "organ", "--steps", 3)
    run = medmeta_command(*words)
    assert (run.code, run.err) == (0, "")
    card = load(tmp_path / "organ").card
    left_out = card["left_out"]
    for name, dice in left_out["mean_dice"].items():
        assert f"{name} {dice:.3f}" in run.out
    for name, behind in left_out["behind"].items():
        assert f"{name} no more after {behind['scans']} scan, {behind['dice']:.3f} behind" in run.out
    assert {*left_out["mean_dice"], *left_out["behind"]} == {*CANDIDATES}
    assert f"Adapted by {card['method']}" in run.out
    assert "Expected Dice on unseen scans like these" in run.out
    assert "With further labelled scans: 1 more" in run.out
    assert "pays" not in run.out
    assert "Expected Dice" in medmeta_command("info", tmp_path / "organ").out
    with_two = medmeta_command(
        *adapt_words(model, tmp_path / "three", tmp_path / "two", "--method", "head", "--steps", 1)
    )
    assert "Adapted by head. From 3 labelled scans on" in with_two.out


def test_check_writes_repaired_copies(medmeta_command, support, tmp_path):
    folder = tmp_path / "set"
    shutil.copytree(support, folder)
    labels = read_labels(folder / "labels" / "case0.nii.gz")
    affine = labels.affine.clone()
    affine[0, 0] *= 1 + 1e-3
    nifti(folder / "images" / "case0.nii.gz", phantom(2, 0)[0].data[0].numpy(), affine.numpy())
    before = tree(folder)
    run = medmeta_command("check", folder / "images", "--fix", tmp_path / "fixed", "--json", tmp_path / "found.json")
    assert run.code in (0, 1)
    assert tree(folder) == before
    assert medmeta_command("check", folder / "images", "--fix", folder / "images").code == 2


def test_import_brings_in_tensors_and_runs_nothing(medmeta_command, tmp_path):
    net = tiny_model().learner.net
    torch.save(net.state_dict(), tmp_path / "body.pt")
    words = ("--option", "channels=[8, 16]", "--option", "se_ratio=4", "--terms", TERMS)
    run = medmeta_command("import", tmp_path / "body.pt", "--out", tmp_path / "model", *words)
    assert (run.code, run.err) == (0, "")
    made = load(tmp_path / "model").learner.net.state_dict()
    assert all(torch.equal(made[name], tensor) for name, tensor in net.state_dict().items())
    (tmp_path / "bad.pt").write_bytes(b"not a checkpoint")
    require_one_line(medmeta_command("import", tmp_path / "bad.pt", "--out", tmp_path / "other"), "bad.pt")
    assert not (tmp_path / "other").exists()


def test_download_explains_sets_that_must_be_asked_for(medmeta_command, tmp_path):
    run = medmeta_command("download", "CHAOS_MR", "--to", tmp_path / "data")
    assert run.code == 2
    assert "CHAOS" in run.err


def test_pages_to_look_at(medmeta_command, adapted, support, tmp_path):
    made = tmp_path / "made"
    run = medmeta_command("predict", adapted, support / "images", "--out", made, "--report", made)
    assert (run.code, run.err) == (0, "")
    assert (made / "report" / "index.html").is_file()
    assert "To look at them" in run.out
    folders = ("--reference", support / "labels", "--prediction", made)
    run = medmeta_command("evaluate", *folders, "--images", support / "images", "--report", tmp_path / "scored")
    assert (tmp_path / "scored" / "report" / "index.html").is_file(), run.err
    refused = medmeta_command("evaluate", *folders, "--report", tmp_path / "other")
    assert refused.code == 2
    assert "without --images" in refused.err
    assert not (tmp_path / "other").exists()


def test_a_page_that_cannot_be_written_is_known_before_the_work(medmeta_command, model, support, adapted, tmp_path):
    theirs = tmp_path / "theirs" / "report" / "pictures"
    theirs.mkdir(parents=True)
    (theirs / "holiday.png").write_text("x")
    out = tmp_path / "out"
    for words in (adapt_words(model, support, out), ("predict", adapted, support / "images", "--out", out)):
        run = medmeta_command(*words, "--report", tmp_path / "theirs")
        require_one_line(run, str(tmp_path / "theirs" / "report"), "pictures, which is of no page")
    assert not out.exists()
    assert (theirs / "holiday.png").exists()


def test_adapt_with_overlapping_targets(medmeta_command, model, support, tmp_path):
    run = medmeta_command(
        "adapt", model, "--images", support / "images", "--labels", support / "labels", "--out", tmp_path / "organ",
        "--target", "whole=1,2", "--target", "posterior=2", "--steps", 60, "--modality", "CT",
    )  # fmt: skip
    assert (run.code, run.err) == (0, "")
    assert load(tmp_path / "organ").targets == {"whole": (1, 2), "posterior": (2,)}
    assert medmeta_command("predict", tmp_path / "organ", support / "images", "--out", tmp_path / "made").code == 0
    assert set(read_labels(tmp_path / "made" / "case0.nii.gz").data.unique().tolist()) <= {0, 1, 2}
    run = medmeta_command(
        "evaluate", "--reference", support / "labels", "--prediction", tmp_path / "made", "--target", "whole=1,2",
        "--target", "posterior=2", "--json", tmp_path / "scores.json",
    )  # fmt: skip
    assert run.code == 0
    rows = json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))["rows"]
    account = json.loads((tmp_path / "made" / "predictions.json").read_text(encoding="utf-8"))
    volumes = {(Path(entry["scan"]).name, name): ml for entry in account for name, ml in entry["volumes_ml"].items()}
    for row in rows:
        assert volumes[f"{row['case']}.nii.gz", row["target"]] == pytest.approx(row["prediction_ml"], abs=1e-3)


def test_the_same_seed_gives_the_same_model(medmeta_command, model, support, tmp_path):
    for name in "ab":
        medmeta_command(
            "adapt", model, "--images", support / "images", "--labels", support / "labels", "--out", tmp_path / name,
            "--steps", 3,
        )  # fmt: skip
    assert (tmp_path / "a" / "state.safetensors").read_bytes() == (tmp_path / "b" / "state.safetensors").read_bytes()


def test_info_on_a_meta_learned_model(medmeta_command, model):
    run = medmeta_command("info", model)
    assert run.code == 0
    assert "meta-learned; learner fomaml, network se_unet_3d" in run.out
    assert f"trained on Task01_Liver (CT, 9 patients): liver. Terms: {TERMS}" in run.out


def test_phantoms_and_check(medmeta_command, tmp_path):
    run = medmeta_command("phantoms", tmp_path / "organs", "--tasks", 1, "--cases", 2)
    assert (run.code, run.err) == (0, "")
    (task,) = (tmp_path / "organs").iterdir()
    run = medmeta_command("check", task, "--json", tmp_path / "findings.json")
    assert (run.code, run.err) == (0, "")
    assert "2 scans read, 0 errors, 0 warnings" in run.out
    assert json.loads((tmp_path / "findings.json").read_text(encoding="utf-8"))["scans"] == 2
    require_one_line(medmeta_command("phantoms", tmp_path / "organs"), "organs", "an absent or empty folder")
    require_one_line(medmeta_command("phantoms", tmp_path / "x", "--tasks", 0), "tasks")


def test_names_with_brackets_and_spaces(medmeta_command, adapted, support, tmp_path):
    folder = tmp_path / "odd [/bold] names [red]"
    shutil.copytree(support, folder)
    run = medmeta_command("predict", adapted, folder / "images", "--out", folder / "made [b]")
    assert run.code == 0
    assert str(folder / "made [b]") in run.out
    run = medmeta_command("info", folder)
    require_one_line(run, str(folder))


# One broken scan in a batch: exit code 1


def test_predict_lists_what_it_could_not_segment(medmeta_command, adapted, tmp_path):
    scans, out = tmp_path / "scans", tmp_path / "out"
    broken = broken_scans(scans)
    write_volume(phantom(2, 2)[0], scans / "good.nii.gz")
    run = medmeta_command("predict", adapted, scans, "--out", out)
    assert (run.code, run.err) == (1, "")
    for path in broken.values():
        (line,) = [line for line in run.out.splitlines() if str(path) in line]
        assert line.startswith(f"failed: {path}: found ")
        assert "required: " in line
    assert f"1 segmented, 0 there already, {len(broken)} failed" in run.out
    assert {path.name for path in out.iterdir()} == {
        "good.nii.gz", "predictions.json", "predictions.csv", "run.json", ".lock",
    }  # fmt: skip


def test_check_lists_what_is_wrong_with_each(medmeta_command, tmp_path):
    broken = broken_scans(tmp_path / "scans")
    nifti(tmp_path / "scans" / "nan.nii.gz", np.full((4, 4, 4), np.nan, dtype=np.float32))
    write_volume(phantom(2, 2)[0], tmp_path / "scans" / "good.nii.gz")
    run = medmeta_command("check", tmp_path / "scans", "--json", tmp_path / "findings.json")
    assert (run.code, run.err) == (1, "")
    for path in [*broken.values(), tmp_path / "scans" / "nan.nii.gz"]:
        (line,) = [line for line in run.out.splitlines() if str(path) in line]
        assert line.startswith("error: ")
    assert "good.nii.gz" not in run.out
    assert "8 scans read, 7 errors, 0 warnings" in run.out
    assert len(json.loads((tmp_path / "findings.json").read_text(encoding="utf-8"))["findings"]) == 7


def test_evaluate_lists_problems_and_scores_the_rest(medmeta_command, support, tmp_path):
    made = tmp_path / "made"
    shutil.copytree(support / "labels", made)
    labels = phantom(2, 1)[1]
    odd = labels.data.clone()
    odd[0, 0, 0, 0] = 9
    write_volume(like(labels, odd), made / "case1.nii.gz")
    write_volume(labels, made / "stranger.nii.gz")
    run = medmeta_command("evaluate", "--reference", support / "labels", "--prediction", made)
    assert (run.code, run.err) == (1, "")
    assert "2 cases scored, 2 problems" in run.out
    assert "problem: " in run.out
    assert "holds label 9, which no reference holds" in run.out
    assert "stranger.nii.gz: has no reference of its name" in run.out
    write_volume(Volume(labels.data[:, :-1], labels.affine), made / "case1.nii.gz")
    run = medmeta_command("evaluate", "--reference", support / "labels", "--prediction", made)
    assert run.code == 1
    assert "1 cases scored" in run.out
    assert "another grid than its reference: shape differs" in run.out


# The call is unusable: exit code 2, nothing done


def adapt_words(model: Path, folder: Path, out: Path, *more: object) -> tuple[object, ...]:
    return ("adapt", model, "--images", folder / "images", "--labels", folder / "labels", "--out", out, *more)


def first(folder: Path, part: str) -> Path:
    return folder / part / "case0.nii.gz"


def empty(folder: Path, part: str) -> None:
    shutil.rmtree(folder / part)
    (folder / part).mkdir()


def rewrite(folder: Path, part: str, change: Callable[[np.ndarray], np.ndarray], shift: float = 0.0) -> None:
    image = nib.load(first(folder, part))
    affine = image.affine.copy()
    affine[0, 3] += shift
    nifti(first(folder, part), change(np.asarray(image.dataobj)), affine)


def put(folder: Path, part: str, name: str) -> None:
    shutil.copy(broken_scans(folder.parent / "broken")[name], first(folder, part))


BAD_SUPPORT = {
    "missing images": (lambda f: shutil.rmtree(f / "images"), ("images", "no such folder")),
    "missing labels": (lambda f: shutil.rmtree(f / "labels"), ("labels", "no such folder")),
    "empty images": (lambda f: empty(f, "images"), ("images", "no scans")),
    "empty labels": (lambda f: empty(f, "labels"), ("labels", "no scans")),
    "image without label": (lambda f: first(f, "labels").unlink(), ("images without labels", "case0.nii.gz")),
    "label without image": (lambda f: first(f, "images").unlink(), ("labels without images", "case0.nii.gz")),
    "unnamed value": (
        lambda f: rewrite(f, "labels", lambda a: np.where(a == 2, 5, a).astype(np.uint8)),
        ("case0.nii.gz", "label values that no target names: 5", "posterior = [2]", "ignored"),
    ),
    "another origin": (
        lambda f: rewrite(f, "labels", lambda a: a, shift=3.2),
        ("case0.nii.gz", "origin differs by 3.2 mm", "Resample"),
    ),
    "another shape": (
        lambda f: rewrite(f, "labels", lambda a: a[:-1]),
        ("case0.nii.gz", "shape differs: ", "against"),
    ),
    "truncated gzip image": (lambda f: put(f, "images", "truncated"), ("images/case0.nii.gz", "truncated")),
    "truncated gzip label": (lambda f: put(f, "labels", "truncated"), ("labels/case0.nii.gz", "truncated")),
    "text image": (lambda f: put(f, "images", "text"), ("images/case0.nii.gz", "gzip")),
    "giant header": (lambda f: put(f, "images", "giant"), ("case0.nii.gz", "32767x32767x32767", "at most 8 GiB")),
    "giant label": (lambda f: put(f, "labels", "giant"), ("labels/case0.nii.gz", "32767x32767x32767")),
    "NaN affine": (lambda f: put(f, "images", "affine"), ("case0.nii.gz", "NaN or infinity in the affine")),
    "zero spacing": (lambda f: put(f, "images", "spacing"), ("case0.nii.gz", "spacing 0x1x1 mm")),
    "2-D image": (lambda f: put(f, "images", "flat"), ("case0.nii.gz", "a 2-D file")),
    "2-D label": (lambda f: put(f, "labels", "flat"), ("labels/case0.nii.gz", "a 2-D file")),
    "4-D label": (
        lambda f: rewrite(f, "labels", lambda a: np.stack([a, a], axis=-1)),
        ("labels/case0.nii.gz", "2 channels or layers", "one 3-D label map"),
    ),
    "4-D image among 3-D ones": (
        lambda f: rewrite(f, "images", lambda a: np.stack([a, a, a], axis=-1)),
        ("images/case", "channels; required: "),
    ),
    "float labels": (
        lambda f: rewrite(f, "labels", lambda a: a + np.float32(0.5)),
        ("labels/case0.nii.gz", "not integers, such as 0.5"),
    ),
    "NaN labels": (
        lambda f: rewrite(f, "labels", lambda a: np.where(a == 2, np.float32(np.nan), a).astype(np.float32)),
        ("labels/case0.nii.gz", "not integers, such as nan"),
    ),
    "negative labels": (
        lambda f: rewrite(f, "labels", lambda a: -a.astype(np.int16)),
        ("labels/case0.nii.gz", "label values from -2 to 0"),
    ),
    "NaN scan": (
        lambda f: rewrite(f, "images", lambda a: np.full(a.shape, np.nan, dtype=np.float32)),
        ("images/case0.nii.gz", "NaN"),
    ),
    "organ nowhere": (
        lambda f: [nifti(p, np.asarray(nib.load(p).dataobj) * 0, nib.load(p).affine) for p in (f / "labels").iterdir()],
        ("labels", "no foreground in any support scan (anterior = [1]; posterior = [2])"),
    ),
    "organ in no scan": (
        lambda f: [
            nifti(p, np.minimum(np.asarray(nib.load(p).dataobj), 1), nib.load(p).affine)
            for p in (f / "labels").iterdir()
        ],
        ("labels", "no voxel of posterior = [2] in any of the 2 label maps"),
    ),
}


@pytest.mark.parametrize("problem", BAD_SUPPORT)
def test_unusable_support(medmeta_command, model, support, tmp_path, problem):
    spoil, words = BAD_SUPPORT[problem]
    folder = tmp_path / "data"
    shutil.copytree(support, folder)
    spoil(folder)
    targets = ("--target", "anterior=1", "--target", "posterior=2", "--steps", 2)
    run = medmeta_command(*adapt_words(model, folder, tmp_path / "new" / "organ", *targets))
    require_one_line(run, *words)
    assert not (tmp_path / "new").exists(), "nothing half-written"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--target", "liver"), ("--target liver", "NAME=1,2")),
        (("--target", "liver=one"), ("--target liver=one", "whole label values")),
        (("--target", "=1"), ("--target =1", "no name")),
        (("--target", "a=1", "--target", "a=2"), ("--target a=2", "'a' again")),
        (("--target", "a=0"), ("target 'a' with the value 0", "background")),
        (("--target", "a=1,1"), ("each label value once",)),
        (("--target", "a=-1"), ("target 'a' with the value -1",)),
        (("--modality", "PET"), ("--modality", "CT or MR")),
        (("--precision", "float8"), ("--precision", "float32 or bfloat16")),
        (("--device", "toaster"), ("--device toaster", "a device that torch can use")),
        (("--device", "cuda:99"), ("--device cuda:99", "a device that torch can use")),
    ],
)
def test_unusable_words(medmeta_command, model, support, tmp_path, words, said):
    run = medmeta_command(*adapt_words(model, support, tmp_path / "organ", *words))
    require_one_line(run, *said)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", [("--method", "magic"), ("--steps", "-1"), ("--minutes", "0")])
def test_unusable_numbers(medmeta_command, model, support, tmp_path, words):
    run = medmeta_command(*adapt_words(model, support, tmp_path / "organ", *words))
    assert run.code == 2
    assert run.err.startswith("medmeta: ")
    assert run.err.count("\n") == 1
    assert "required: " in run.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["model.json", "weights.safetensors", "state.safetensors"])
@pytest.mark.parametrize("verb", ["info", "predict", "adapt"])
def test_a_model_folder_with_a_file_missing(medmeta_command, adapted, support, tmp_path, name, verb):
    folder = tmp_path / "model"
    shutil.copytree(adapted, folder)
    (folder / name).unlink()
    words = {
        "info": ("info", folder),
        "predict": ("predict", folder, support / "images", "--out", tmp_path / "out"),
        "adapt": adapt_words(folder, support, tmp_path / "out"),
    }[verb]
    require_one_line(medmeta_command(*words), str(folder / name), "no such file")
    assert not (tmp_path / "out").exists()


def test_no_model_and_the_wrong_kind(medmeta_command, model, support, tmp_path):
    out = tmp_path / "out"
    require_one_line(medmeta_command("info", tmp_path / "absent"), "absent", "no such folder")
    require_one_line(
        medmeta_command("predict", model, support / "images", "--out", out), str(model), "Run `medmeta adapt` first"
    )
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "model.json").write_text('{"format": 1, "files": {')
    require_one_line(medmeta_command("info", tmp_path / "half"), "model.json", "unreadable JSON")
    assert not out.exists()


def test_places_that_are_taken_or_cannot_be_written(medmeta_command, model, adapted, support, tmp_path):
    taken = tmp_path / "taken"
    shutil.copytree(adapted, taken)
    (tmp_path / "file").write_text("precious")
    before = tree(tmp_path)
    evaluated = ("evaluate", "--reference", support / "labels", "--prediction", support / "labels")
    for words in (
        adapt_words(model, support, taken),
        adapt_words(model, support, tmp_path / "file"),
        adapt_words(model, support, tmp_path / "file" / "organ"),
        ("predict", adapted, support / "images", "--out", tmp_path / "file"),
        ("predict", adapted, support / "images", "--out", tmp_path / "file" / "x"),
        (*evaluated, "--json", tmp_path / "file" / "scores.json"),
        (*evaluated, "--json", tmp_path),
        ("check", support / "images", "--json", tmp_path / "file" / "findings.json"),
        ("phantoms", tmp_path / "file"),
        ("phantoms", tmp_path / "file" / "x"),
        ("demo", "--out", tmp_path / "file" / "x"),
        ("demo", "--out", tmp_path / "file"),
    ):
        run = medmeta_command(*words)
        require_one_line(run, str(tmp_path))
        assert run.out == "", "known before any work"
    assert tree(tmp_path) == before
    scans = tmp_path / "scans"
    shutil.copytree(support / "images", scans)
    before = tree(tmp_path)
    require_one_line(medmeta_command("predict", adapted, scans, "--out", scans), "case0.nii.gz in it")
    assert tree(tmp_path) == before


def test_nothing_to_read(medmeta_command, adapted, support, tmp_path):
    (tmp_path / "empty").mkdir()
    for folder, found in ((tmp_path / "empty", "no scans"), (tmp_path / "absent", "")):
        for words in (
            ("predict", adapted, folder, "--out", tmp_path / "out"),
            ("evaluate", "--reference", folder, "--prediction", support / "labels"),
            ("evaluate", "--reference", support / "labels", "--prediction", folder),
            ("check", folder),
        ):
            require_one_line(medmeta_command(*words), str(folder), found)
    assert not (tmp_path / "out").exists()


# Configs


@pytest.fixture(scope="module")
def organs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("phantoms") / "organs"
    write_phantoms(folder, tasks=2, cases=4, size_mm=60.0)
    return folder


def config(organs: Path, folder: Path, **changes) -> Path:
    names = sorted(path.name for path in organs.iterdir())
    phase = {"name": "pretrain", "learner": "transfer", "schedule": {"steps": 2, "validate_every": 2},
             "episodes": {"shots": 1, "queries": 1}}  # fmt: skip
    content = {
        "data": str(organs),
        "tasks": [{"path": names[0]}],
        "phases": [phase],
        "network": {"name": "se_unet_3d", "options": {"channels": [8, 16]}},
        "voxels": 16**3,
        "validation_episodes": 1,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(content | changes), encoding="utf-8")
    return folder / "config.yaml"


def comparison(organs: Path, folder: Path, **trial) -> Path:
    names = sorted(path.name for path in organs.iterdir())
    trial = {"shots": [1], "steps": [1], "draws": 1, "test_patients": 1} | trial
    path = config(organs, folder, held_out={"path": names[1]}, trial=trial)
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    content["arms"] = {"transfer": content.pop("phases"), "scratch": []}
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def test_train_writes_a_model_and_goes_on(medmeta_command, organs, tmp_path):
    path, out = config(organs, tmp_path), tmp_path / "run"
    run = medmeta_command("train", path, "--out", out)
    assert run.code == 0, run
    assert load(out / "model").card["steps"] == 2
    require_one_line(medmeta_command("train", path, "--out", out), str(out), "an earlier run", "--resume")
    assert medmeta_command("train", path, "--out", out, "--resume", "--set", "phases.0.schedule.steps=3").code == 0
    assert load(out / "model").card["steps"] == 3, "the model is that of the run just made"
    assert medmeta_command("info", out / "model").code == 0


@pytest.mark.parametrize(
    ("changes", "words", "said"),
    [
        ({"colour": "red"}, (), ("config.yaml: colour", "Known keys at the top: data, tasks, phases")),
        ({}, ("--set", "colour=red"), ("config.yaml: colour",)),
        ({}, ("--set", "network.colour=red"), ("config.yaml: network.colour",)),
        ({}, ("--set", "seed"), ("--set seed", "key=value")),
        ({}, ("--set", "phases.7.name=x"), ("--set phases.7.name=x",)),
        ({}, ("--set", "voxels=many"), ("config.yaml: voxels", "many")),
        ({}, ("--set", "phases.0.learner=oracle"), ("oracle",)),
        ({"tasks": [{"path": "Task99_Nothing"}]}, (), ("Task99_Nothing", "no such folder")),
    ],
)
def test_unusable_configs(medmeta_command, organs, tmp_path, changes, words, said):
    run = medmeta_command("train", config(organs, tmp_path, **changes), *words, "--out", tmp_path / "run")
    require_one_line(run, *said)
    assert not (tmp_path / "run").exists()


def test_unreadable_configs_and_places(medmeta_command, organs, tmp_path):
    out = tmp_path / "run"
    (tmp_path / "broken.yaml").write_text("a: [1,\nb")
    (tmp_path / "list.yaml").write_text("- a")
    (tmp_path / "file").write_text("x")
    for name, said in (("absent.yaml", "no such file"), ("broken.yaml", "YAML"), ("list.yaml", "keys and values")):
        for verb in ("train", "benchmark"):
            require_one_line(medmeta_command(verb, tmp_path / name, "--out", out), name, said)
    require_one_line(medmeta_command("train", config(organs, tmp_path), "--out", tmp_path / "file"), "file")
    assert not out.exists()


def test_more_support_scans_than_patients_are_known_before_the_training(medmeta_command, organs, tmp_path):
    path = comparison(organs, tmp_path, shots=[1, 4])
    run = medmeta_command("benchmark", path, "--out", tmp_path / "run")
    require_one_line(run, "4 labelled patients", "1 to test on and 4 for the largest support", "Lower")
    assert not (tmp_path / "run").exists()


def test_benchmark(medmeta_command, organs, tmp_path):
    run = medmeta_command("benchmark", comparison(organs, tmp_path), "--out", tmp_path / "run")
    assert run.code == 0, run
    assert "| learner | 1 scan, 1 steps |" in run.out
    assert json.loads((tmp_path / "run" / "result.json").read_text(encoding="utf-8"))["rows"]


# What goes wrong in the machine


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (PermissionError(13, "Permission denied", "/a/b"), "medmeta: /a/b: Permission denied\n"),
        (OSError(28, "No space left on device"), "medmeta: [Errno 28] No space left on device\n"),
        (RuntimeError("CUDA out of memory.\n  Tried to"), "medmeta: CUDA out of memory. Tried to\n"),
        (ValueError("a\nb [red]c"), "medmeta: a b [red]c\n"),
        (FloatingPointError("the loss is nan"), "medmeta: the loss is nan\n"),
        (MemoryError(), "medmeta: MemoryError\n"),
    ],
)
def test_errors_of_the_machine_are_one_line(medmeta_command, monkeypatch, model, error, said):
    def fail(_folder):
        raise error

    monkeypatch.setattr("medmeta.segmenter.load", fail)
    assert medmeta_command("info", model) == (2, "", said)


def test_a_fault_of_the_program_keeps_its_traceback(medmeta_command, monkeypatch, model):
    def fail(_folder):
        raise KeyError("a bug")

    monkeypatch.setattr("medmeta.segmenter.load", fail)
    with pytest.raises(KeyError, match="a bug"):
        monkeypatch.setattr(sys, "argv", ["medmeta", "info", str(model)])
        main()


def test_interrupted_by_the_user(medmeta_command, monkeypatch, model):
    def stop(_folder):
        raise KeyboardInterrupt

    monkeypatch.setattr("medmeta.segmenter.load", stop)
    run = medmeta_command("info", model)
    assert (run.code, run.out) == (130, "")
    assert "Traceback" not in run.err


def test_control_c_in_a_shell_leaves_nothing_half_written(tmp_path):
    words = ("phantoms", str(tmp_path / "organs"), "--tasks", "50", "--cases", "50")
    process = subprocess.Popen(
        [sys.executable, "-m", "medmeta", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A test run in the background of a script ignores the signal, and so would what it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while process.poll() is None and not list(tmp_path.rglob("*.nii.gz")):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "")
    assert list(tmp_path.iterdir()) == []


def test_a_target_that_no_case_holds_has_no_figures(medmeta_command, tmp_path):
    labels = np.zeros((6, 6, 6), dtype=np.uint8)
    labels[2:4, 2:4, 2:4] = 1
    for folder in ("a", "b"):
        nifti(tmp_path / folder / "x.nii.gz", labels)
    run = medmeta_command(
        "evaluate", "--reference", tmp_path / "a", "--prediction", tmp_path / "b", "--target", "one=1",
        "--target", "[/b]=2",
    )  # fmt: skip
    assert run.code == 0
    assert "[/b]" in run.out
    assert "nan" in run.out
