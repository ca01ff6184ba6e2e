from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small import nifti, tiny_model

from medmeta.data.phantoms import write_phantoms
from medmeta.data.tasks import Case, Task
from medmeta.data.volume import read_labels, read_volume
from medmeta.errors import InputError

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "compare_nnunet.py"
INSTALLED = importlib.util.find_spec("nnunetv2") is not None


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("compare_nnunet", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def call(tmp_path) -> list[str]:
    """Arguments that compare both on synthetic scans."""
    write_phantoms(tmp_path / "organs", tasks=1, cases=2, size_mm=60.0)
    (organ,) = (tmp_path / "organs").iterdir()
    config = f"data: organs\nheld_out: {{path: {organ.name}}}\ntasks: []\ntrial: {{test_patients: 1}}\n"
    (tmp_path / "config.yaml").write_text(config)
    tiny_model().save(tmp_path / "model")
    words = [str(tmp_path / "model"), str(tmp_path / "config.yaml"), "--out", str(tmp_path / "out")]
    return [*words, "--shots", "1", "--minutes", "0.02"]


def test_the_support_becomes_a_data_set_of_nnunet(script, tmp_path) -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, (8, 9, 10)).astype(np.uint8)
    scan = rng.normal(size=(8, 9, 10, 2)).astype(np.float32)
    scan[0, 0, 0] = np.nan
    affine = np.array([[0, -2, 0, 5], [1, 0, 0, -7], [0, 0, 3, 9], [0, 0, 0, 1.0]])
    images, map_ = nifti(tmp_path / "scan.nii.gz", scan, affine), nifti(tmp_path / "map.nii.gz", labels, affine)
    case = Case("a", "a", (images,), map_)
    # A tumour inside a liver, and a value that does not count.
    targets = {"liver": (1, 3), "tumour": (3,)}
    task = Task("liver", "liver", "CT", targets, (case,), ignored=(2,), channels=("plain", "contrast"))
    script.write_support(task, tmp_path / "raw")

    facts = json.loads((tmp_path / "raw" / "dataset.json").read_text())
    assert facts["labels"] == {"background": 0, "class 1": 1, "class 2": 2, "ignore": 3}
    assert facts["channel_names"] == {"0": "CT", "1": "CT"} and facts["numTraining"] == 1
    written = read_labels(tmp_path / "raw" / "labelsTr" / "case_000.nii.gz")
    assert torch.equal(written.affine, torch.from_numpy(affine))
    assert np.array_equal(written.data[0].numpy() == 3, labels == 2)
    decoded = task.decode(written.data.masked_fill(written.data == 3, 0))[0].numpy()
    assert np.array_equal(decoded, np.where(labels == 2, 0, labels))
    for channel in range(2):
        image = read_volume(tmp_path / "raw" / "imagesTr" / f"case_000_{channel:04}.nii.gz")
        assert np.array_equal(image.data[0].numpy(), np.nan_to_num(scan[..., channel]))


def test_training_ends_when_the_time_is_over_and_its_rate_falls_with_the_time(script) -> None:
    clock, told = [0.0], []

    def take_a_step(batch: int) -> None:
        clock[0] += 100.0 if batch == 0 else 7.0
        told.append(batch)

    trainer = SimpleNamespace(
        num_epochs=1000,
        dataloader_train=iter(range(99)),
        network=torch.nn.Identity().eval(),
        train_step=take_a_step,
        lr_scheduler=SimpleNamespace(step=lambda epoch: told.append(epoch)),
        on_train_start=lambda: told.append("start"),
        on_train_end=lambda: told.append("end"),
    )
    assert script.train_for(trainer, 20.0, lambda: clock[0]) == (21.0, 4)
    assert told == ["start", 0, 0.0, 1, pytest.approx(350), 2, pytest.approx(700), 3, "end"]
    assert trainer.network.training and trainer.disable_checkpointing


def test_a_row_counts_as_missed_only_what_a_scan_holds(script) -> None:
    found = {"dice": 0.8, "missed": False, "invented": False}
    missed = {"dice": 0.0, "missed": True, "invented": False}
    invented = {"dice": 0.0, "missed": False, "invented": True}
    absent = {"dice": None, "missed": False, "invented": False}
    cases = [{"a": found, "b": missed}, {"a": found, "b": invented}, {"a": found, "b": absent}]
    result = {"shots": 5, "draw": 0, "way": "w", "preparation_seconds": 30, "training_seconds": 90, "cases": cases}
    row = [cell.strip() for cell in script.table_row(result, ["a", "b"]).strip("|").split("|")]
    head = [cell.strip() for cell in script.table_head(["a", "b"])[0].strip("|").split("|")]
    assert len(row) == len(head)
    # Means of the scans: 0.4, 0.4 and 0.8. Held are three times a and once b.
    assert row[:5] == ["5", "1", "w", "0.5", "1.5"] and row[5].startswith("0.533 (")
    assert row[6:] == ["0.800", "0.000", "25%"]


def test_a_folder_too_deep_for_sockets_is_refused(script, tmp_path) -> None:
    task = Task("liver", "liver", "CT", {"liver": (1,)}, ())
    with pytest.raises(InputError, match="shorter --out"):
        script.run_nnunet(tmp_path / ("x" * 70), "run", task, task, 1.0, 2.0, "cpu")


@pytest.mark.skipif(INSTALLED, reason="nnU-Net v2 is installed")
def test_without_nnunet_nothing_is_done_and_the_error_names_the_extra(script, call, tmp_path) -> None:
    with pytest.raises(InputError, match=r"medmeta\[nnunet\]"):
        script.main(call)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not INSTALLED, reason="needs nnU-Net v2, the extra nnunet")
def test_both_are_trained_and_scored_once_on_the_same_scans(script, call, tmp_path, capsys) -> None:
    script.main(call)
    table = capsys.readouterr().out
    out = tmp_path / "out"
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    ours, theirs = (json.loads(next(out.glob(f"{way}-*.json")).read_text()) for way in ("medmeta", "nnunet"))
    assert ours["support"] == theirs["support"]
    tested = [[case["case"] for case in result["cases"]] for result in (ours, theirs)]
    assert tested[0] == tested[1] and not set(tested[0]) & set(ours["support"])
    assert ours["training_seconds"] >= 1.2 and theirs["training_seconds"] >= 1.2 and theirs["steps"] >= 2
    rows = table.splitlines()
    assert len(rows) == 4 and "medmeta, finetune" in rows[2] and "nnU-Net" in rows[3]
    script.main(call)
    assert capsys.readouterr().out == table
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
