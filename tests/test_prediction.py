"""A folder of good and broken scans: every good one is segmented on its own grid, every broken one is listed."""

from __future__ import annotations

import csv
import json
import locale
import math
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from small import broken_scans, like, nifti, phantom, tiny_model, tree, write_pairs

from medmeta.adaptation import adapt
from medmeta.data.volume import Volume, grid_difference, read_header, read_labels, read_volume, write_volume
from medmeta.errors import InputError
from medmeta.fine_tuning import Budget
from medmeta.prediction import STAGES, Prediction, predict
from medmeta.registration import make_atlas
from medmeta.segmenter import Segmentation, Segmenter


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory) -> Segmenter:
    folder = write_pairs(tmp_path_factory.mktemp("support"))
    targets = {"whole": (1, 2), "posterior": (2,)}
    # Most of these tests have nothing to do with registration, which takes longer than so small a network.
    options = {"targets": targets, "budget": Budget(steps=20, rate=1e-2), "atlases": 0}
    return adapt(tiny_model(), folder / "images", folder / "labels", **options)


@pytest.fixture(scope="module")
def two_channels(segmenter) -> Segmenter:
    def doubled(one: Segmenter | None) -> Segmenter | None:
        if one is None:
            return None
        name = one.model.learner.net.input_weight
        state = one.state | {name: one.state[name].repeat(1, 2, 1, 1, 1) / 2}
        return replace(one, state=state, channels=("first", "second"), overview=doubled(one.overview))

    return doubled(segmenter)


ACCOUNT = (".lock", "predictions.csv", "predictions.json", "run.json")
"""What stands beside the label maps."""


def by_name(results: list[Prediction]) -> dict[str, Prediction]:
    return {result.scan.name: result for result in results}


def test_label_maps_lie_on_the_grids_of_their_scans(segmenter, tmp_path):
    scans = tmp_path / "scans"
    scans.mkdir()
    for case, suffix in enumerate((".nii.gz", ".nii", ".nrrd", ".mha")):
        write_volume(phantom(2, case)[0], scans / f"case{case}{suffix}")
    oblique, _ = phantom(2, 3)
    turned = Volume(oblique.data.permute(0, 3, 1, 2).flip(2).contiguous(), _permuted(oblique))
    write_volume(turned, scans / "turned.nii.gz")
    told = []
    results = predict(segmenter, scans, tmp_path / "out", progress=lambda done, total: told.append((done, total)))
    assert told == [(number, 5) for number in range(1, 6)]
    assert [result.status for result in results] == ["done"] * 5
    for result in results:
        assert result.output == tmp_path / "out" / result.scan.name
        assert grid_difference(read_header(result.output), read_header(result.scan), tolerance_mm=1e-3) is None
        made = read_labels(result.output)
        assert torch.equal(made.data.int(), segmenter.predict(read_volume(result.scan)).data)
        assert result.seconds > 0
        voxel_ml = np.prod(made.spacing) / 1000
        wanted = {"whole": int((made.data > 0).sum()), "posterior": int((made.data == 2).sum())}
        assert result.volumes_ml == pytest.approx({name: n * voxel_ml for name, n in wanted.items()}, abs=1e-3)
    assert any(result.volumes_ml["whole"] for result in results)
    assert nib.load(tmp_path / "out" / "case0.nii.gz").get_data_dtype() == np.uint8
    assert nib.aff2axcodes(turned.affine.numpy()) == nib.aff2axcodes(
        nib.load(tmp_path / "out" / "turned.nii.gz").affine
    )
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *ACCOUNT[:1], "case0.nii.gz", "case1.nii", "case2.nrrd", "case3.mha", *ACCOUNT[1:], "turned.nii.gz"
    ]  # fmt: skip


def _permuted(volume: Volume) -> torch.Tensor:
    """The affine of `volume.data` with axes (Z, X, Y) and the new second axis reversed."""
    step = torch.zeros(4, 4, dtype=torch.float64)
    step[2, 0] = step[1, 2] = step[3, 3] = 1
    step[0, 1], step[0, 3] = -1, volume.shape[0] - 1
    return volume.affine @ step


def test_broken_scans_are_listed_and_the_rest_goes_on(segmenter, tmp_path):
    scans = tmp_path / "scans"
    broken = broken_scans(scans)
    scan, _ = phantom(2, 2)
    write_volume(like(scan, torch.full_like(scan.data, math.nan)), scans / "nan.nii.gz")
    write_volume(like(scan, torch.cat([scan.data, scan.data])), scans / "channels.nii.gz")
    holes = scan.data.clone()
    holes[:, 3:6] = math.nan
    write_volume(like(scan, holes), scans / "holes.nii.gz")
    write_volume(scan, scans / "whole.nii.gz")
    (scans / "empty.nii.gz").write_bytes(b"")
    (scans / "readme.txt").write_text("no scan")
    (scans / "._whole.nii.gz").write_bytes(b"resource fork")
    results = by_name(predict(segmenter, scans, tmp_path / "out"))
    done = {"holes.nii.gz", "whole.nii.gz"}
    failed = {path.name for path in broken.values()} | {"nan.nii.gz", "channels.nii.gz", "empty.nii.gz"}
    assert {name for name, result in results.items() if result.status == "done"} == done
    assert {name for name, result in results.items() if result.status == "failed"} == failed
    assert {path.name for path in (tmp_path / "out").iterdir()} == done | {*ACCOUNT}
    said = {
        "truncated": "truncated or damaged",
        "text": "no gzip stream",
        "giant": "32767x32767x32767",
        "affine": "NaN or infinity in the affine",
        "spacing": "spacing 0x1x1 mm",
        "flat": "a 2-D file",
        "nan": "NaN or infinity in every voxel",
        "channels": r"2 channels; required: 1 (image)",
        "empty": "an empty file",
    }
    for name, words in said.items():
        reason = results[f"{name}.nii.gz"].reason
        assert words in reason
        assert "\n" not in reason
        assert "required: " in reason
        assert f"{name}.nii.gz" not in reason, "the file is named once, beside the reason"
    account = json.loads((tmp_path / "out" / "predictions.json").read_text(encoding="utf-8"))
    assert [(Path(entry["scan"]).name, entry["status"]) for entry in account] == [
        (name, result.status) for name, result in results.items()
    ]


def test_whatever_a_library_raises_is_one_line_about_one_scan(segmenter, tmp_path, monkeypatch):
    write_pairs(tmp_path / "s", cases=(0, 1, 2, 3))
    errors = iter([ValueError("bad\n  value"), RuntimeError("CUDA error\nTried"), IndexError("x"), None])

    def predict_one(self, scan, **_):
        if (error := next(errors)) is not None:
            raise error
        return Segmentation(torch.zeros_like(scan.data, dtype=torch.int32), scan.affine)

    monkeypatch.setattr(Segmenter, "predict", predict_one)
    results = predict(segmenter, tmp_path / "s" / "images", tmp_path / "out")
    assert [result.status for result in results] == ["failed"] * 3 + ["done"]
    assert [result.reason for result in results[:3]] == [
        "ValueError: bad value", "RuntimeError: CUDA error Tried", "IndexError: x"
    ]  # fmt: skip


def test_an_error_while_writing_leaves_no_half_of_a_label_map(segmenter, tmp_path, monkeypatch):
    write_pairs(tmp_path / "s", cases=(0,))

    def write(_values, _affine, path):
        path.write_bytes(b"half of a fi")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("medmeta.data.nifti.write", write)
    (result,) = predict(segmenter, tmp_path / "s" / "images", tmp_path / "out")
    assert "No space left" in result.reason
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [*ACCOUNT]


def test_what_is_there_is_kept_unless_asked(segmenter, tmp_path):
    scans, out = write_pairs(tmp_path / "s", cases=(0, 1)) / "images", tmp_path / "out"
    first = predict(segmenter, scans, out)
    write_volume(phantom(2, 2)[0], scans / "case2.nii.gz")
    edited = read_labels(out / "case0.nii.gz")
    edited.data.zero_()
    edited.data[0, 0, 0, 0] = 2
    write_volume(edited, out / "case0.nii.gz")
    before = tree(out)
    again = predict(segmenter, scans, out)
    assert [result.status for result in again] == ["kept", "kept", "done"]
    assert {name: tree(out)[name] for name in ("case0.nii.gz", "case1.nii.gz")} == {
        name: before[name] for name in ("case0.nii.gz", "case1.nii.gz")
    }
    # The account still tells every volume, of the label maps as they are now.
    assert again[1].volumes_ml == first[1].volumes_ml
    voxel_ml = round(float(np.prod(edited.spacing)) / 1000, 3)
    assert again[0].volumes_ml == {"whole": voxel_ml, "posterior": voxel_ml}
    afresh = predict(segmenter, scans, out, overwrite=True)
    assert [result.status for result in afresh] == ["done"] * 3
    assert afresh[0].volumes_ml == first[0].volumes_ml


def test_a_label_map_that_cannot_be_read_is_made_again(segmenter, tmp_path):
    scans, out = write_pairs(tmp_path / "s", cases=(0,)) / "images", tmp_path / "out"
    predict(segmenter, scans, out)
    whole = (out / "case0.nii.gz").read_bytes()
    (out / "case0.nii.gz").write_bytes(whole[: len(whole) // 2])
    assert [result.status for result in predict(segmenter, scans, out)] == ["done"]
    assert read_labels(out / "case0.nii.gz").shape == phantom(2, 0)[0].shape


def test_a_run_that_is_stopped_goes_on(segmenter, tmp_path):
    scans, out = write_pairs(tmp_path / "s", cases=(0, 1, 2)) / "images", tmp_path / "out"

    def stop(done: int, _total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predict(segmenter, scans, out, progress=stop)
    assert len(json.loads((out / "predictions.json").read_text(encoding="utf-8"))) == 2
    assert [result.status for result in predict(segmenter, scans, out)] == ["kept", "kept", "done"]


def test_the_folder_of_the_scans_is_no_place_for_label_maps(segmenter, tmp_path, monkeypatch):
    scans = write_pairs(tmp_path / "s", cases=(0,)) / "images"
    before = tree(scans)
    monkeypatch.chdir(scans)
    (tmp_path / "link").symlink_to(scans)
    for out in (scans, ".", tmp_path / "link", scans / ".." / "images"):
        with pytest.raises(InputError, match=r"the scan case0\.nii\.gz in it"):
            predict(segmenter, scans, out, overwrite=True)
    with pytest.raises(InputError, match="another folder"):
        predict(segmenter, scans / "case0.nii.gz", scans)
    assert tree(scans) == before


def test_nothing_to_segment_is_refused(segmenter, tmp_path):
    (tmp_path / "empty").mkdir()
    for given, found in ((tmp_path / "empty", "no scans"), (tmp_path / "absent", "nothing at this path")):
        with pytest.raises(InputError, match=found):
            predict(segmenter, given, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_out_that_cannot_be_made_is_refused(segmenter, tmp_path):
    scans = write_pairs(tmp_path / "s", cases=(0,)) / "images"
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(InputError, match="file"):
            predict(segmenter, scans, out)


def test_a_missing_channel_is_a_failure_of_its_scan(two_channels, tmp_path):
    scan, _ = phantom(2, 2)
    scans = tmp_path / "scans"
    scans.mkdir()
    for name in ("a_0000", "a_0001", "b_0000", "c_0001"):
        write_volume(scan, scans / f"{name}.nii.gz")
    results = predict(two_channels, scans, tmp_path / "out")
    assert [result.status for result in results] == ["done", "failed", "failed"]
    assert results[0].output.name == "a.nii.gz"
    assert "1 channels; required: 2 (first, second)" in results[1].reason
    assert results[2].scan.name == "c_0000.nii.gz"
    assert "nothing at this path" in results[2].reason


def test_two_channels_in_one_file_or_two_are_the_same(two_channels, tmp_path):
    scan, _ = phantom(2, 2)
    both = like(scan, torch.cat([scan.data, scan.data.flip(1)]))
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    write_volume(both, tmp_path / "one" / "a.nii.gz")
    for channel in (0, 1):
        write_volume(like(scan, both.data[channel : channel + 1]), tmp_path / "two" / f"a_{channel:04d}.nii.gz")
    for name in ("one", "two"):
        (result,) = predict(two_channels, tmp_path / name, tmp_path / f"{name}_out")
        assert (result.status, result.output.name) == ("done", "a.nii.gz")
    assert tree(tmp_path / "one_out")["a.nii.gz"] == tree(tmp_path / "two_out")["a.nii.gz"]


def test_a_file_that_is_named_outright_is_tried_whatever_its_name(segmenter, tmp_path):
    (tmp_path / "notes.md").write_text("no scan")
    (result,) = predict(segmenter, tmp_path / "notes.md", tmp_path / "out")
    assert (result.status, result.output) == ("failed", None)
    assert "suffix '.md'" in result.reason


def test_a_dicom_series_becomes_nifti_on_its_grid(segmenter, tmp_path):
    series = tmp_path / "scans" / "series"
    series.mkdir(parents=True)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    own = locale.setlocale(locale.LC_ALL)
    for number, voxels in enumerate(np.random.default_rng(0).integers(-900, 900, (5, 12, 10)).astype(np.int16)):
        image = sitk.GetImageFromArray(voxels)
        image.SetSpacing((2.0, 2.0))
        for key, value in {
            "0008|0018": f"1.2.3.{number + 1}",
            "0020|000d": "1.2.9",
            "0020|000e": "1.2.3",
            "0020|0032": f"0\\0\\{3.0 * number}",
            "0020|0037": "1\\0\\0\\0\\1\\0",
            "0020|0013": str(number),
            "0008|0060": "CT",
        }.items():
            image.SetMetaData(key, value)
        writer.SetFileName(str(series / f"{number}.dcm"))
        writer.Execute(image)
    locale.setlocale(locale.LC_ALL, own)  # writing DICOM leaves the process in the C locale
    (result,) = predict(segmenter, tmp_path / "scans", tmp_path / "out")
    assert result.status == "done", result.reason
    assert result.output.name == "series.nii.gz"
    assert grid_difference(read_header(result.output), read_header(series)) is None
    for out in (series, series.parent):
        with pytest.raises(InputError, match="the scan series in it"):
            predict(segmenter, series, out)


def test_options_reach_the_segmenter(segmenter, tmp_path):
    scans = write_pairs(tmp_path / "s", cases=(0,)) / "images"
    (result,) = predict(segmenter, scans, tmp_path / "out", precision=torch.bfloat16, overlap=0.5)
    assert result.status == "done"


def test_a_scan_of_integers_and_a_4d_time_series(segmenter, tmp_path):
    affine = phantom(2, 0)[0].affine.numpy()
    nifti(
        tmp_path / "s" / "ints.nii.gz", np.random.default_rng(0).integers(-999, 999, (9, 9, 9)).astype(np.int16), affine
    )
    nifti(tmp_path / "s" / "time.nii.gz", np.zeros((9, 9, 9, 30), dtype=np.int16), affine)
    nifti(tmp_path / "s" / "flat4d.nii.gz", np.zeros((9, 9, 9, 1), dtype=np.int16), affine)
    results = by_name(predict(segmenter, tmp_path / "s", tmp_path / "out"))
    assert results["ints.nii.gz"].status == results["flat4d.nii.gz"].status == "done"
    assert "30 channels; required: 1" in results["time.nii.gz"].reason
    assert read_header(tmp_path / "out" / "flat4d.nii.gz").shape == (9, 9, 9)


def test_too_little_memory_is_met_by_smaller_windows_and_then_told(segmenter, tmp_path, monkeypatch):
    scans = write_pairs(tmp_path / "s", cases=(0, 1)) / "images"
    own, tried = Segmenter.predict, []

    def scarce(self, scan, **options):
        tried.append(self.patch)
        if self.patch == segmenter.patch or len(tried) > 2:
            raise torch.OutOfMemoryError("out of memory: tried to allocate 99 GiB")
        return own(self, scan, **options)

    monkeypatch.setattr(Segmenter, "predict", scarce)
    first, second = predict(segmenter, scans, tmp_path / "out")
    assert first.status == "done"
    assert first.notes == (f"segmented in windows of {'x'.join(map(str, tried[1]))} for lack of memory",)
    assert math.prod(tried[1]) < math.prod(tried[0])
    assert second.status == "failed"
    assert "too little memory (OutOfMemoryError: out of memory" in second.reason


def test_a_scan_that_does_not_fit_beside_another_is_prepared_alone(segmenter, tmp_path, monkeypatch):
    scans = write_pairs(tmp_path / "s", cases=(0, 1)) / "images"
    expected = predict(segmenter, scans, tmp_path / "plenty")
    own, asked = Segmenter.prepare, []

    def scarce(self, scan):
        asked.append(self)
        if threading.current_thread() is not threading.main_thread():
            raise MemoryError
        return own(self, scan)

    monkeypatch.setattr(Segmenter, "prepare", scarce)
    for one, two in zip(expected, predict(segmenter, scans, tmp_path / "scarce"), strict=True):
        assert two.status == "done", two.reason
        assert one.output.read_bytes() == two.output.read_bytes()
        assert two.stages["preprocess"] > 0
    assert asked


def test_the_account_is_a_table_too(segmenter, tmp_path):
    scans = write_pairs(tmp_path / "s", cases=(0,)) / "images"
    mask = segmenter.preprocess.forward_mask(phantom(2, 0)[1].data.long(), phantom(2, 0)[1].affine, 2).numpy()
    image = segmenter.preprocess.forward(phantom(2, 0)[0])
    segmenter = replace(segmenter, atlases=(make_atlas(image.data[0].numpy(), mask, image.spacing),))
    write_volume(phantom(2, 1)[0], scans / 'an "odd",\nname.nii.gz')
    results = predict(segmenter, scans, tmp_path / "out", probabilities=True)
    with open(tmp_path / "out" / "predictions.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == ['an "odd",\nname', "case0"]
    for row, result in zip(rows, results, strict=True):
        assert float(row["whole_ml"]) == result.volumes_ml["whole"]
        stages = [float(row[f"{stage}_seconds"]) for stage in STAGES]
        assert sum(stages) == pytest.approx(result.seconds, abs=0.02)
        assert float(row["registration_seconds"]) > 0
        scores = read_volume(tmp_path / "out" / f"{row['name']}_probabilities.nii.gz")
        assert scores.channels == 3
        assert torch.equal(scores.data, segmenter.probabilities(read_volume(result.scan)).data)


def test_killed_again_and_again_a_run_loses_nothing(segmenter, tmp_path):
    """Killed without warning at a random moment, the run is begun again until it is through."""
    scans = write_pairs(tmp_path / "s", cases=(0, 1, 2, 3)) / "images"
    (scans / "broken.nii.gz").write_bytes(b"")
    before = tree(scans)
    expected = predict(segmenter, scans, tmp_path / "whole")
    kills = 0
    for wait in (0.02, 0.05, 0.1, 0.2, 0.4, 60.0):
        child = os.fork()
        if not child:
            torch.set_num_threads(1)
            predict(segmenter, scans, tmp_path / "out")
            os._exit(0)
        until = time.monotonic() + wait
        while os.waitpid(child, os.WNOHANG) == (0, 0):
            if time.monotonic() > until:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                kills += 1
                break
            time.sleep(0.005)
        for path in (tmp_path / "out").glob("[!.]*.nii.gz"):
            assert path.read_bytes() == (tmp_path / "whole" / path.name).read_bytes(), "whole or not there"
    assert kills > 0
    final = {result.name: result.status for result in predict(segmenter, scans, tmp_path / "out")}
    assert final == {"broken": "failed", "case0": "kept", "case1": "kept", "case2": "kept", "case3": "kept"}
    assert {result.name for result in expected if result.status == "done"} == final.keys() - {"broken"}
    assert tree(scans) == before


def test_several_series_of_one_folder_are_told_apart(segmenter, tmp_path):
    test_a_dicom_series_becomes_nifti_on_its_grid(segmenter, tmp_path / "first")
    series = tmp_path / "scans" / "mixed"
    series.mkdir(parents=True)
    for file in sorted((tmp_path / "first" / "scans" / "series").iterdir()):
        image = sitk.ReadImage(str(file))
        for uid in ("1.2.3", "1.2.5"):
            image.SetMetaData("0020|000e", uid)
            image.SetMetaData("0008|0018", f"{uid}.{file.stem}")
            writer = sitk.ImageFileWriter()
            writer.KeepOriginalImageUIDOn()
            writer.SetFileName(str(series / f"{uid}.{file.stem}.dcm"))
            writer.Execute(image)
    results = predict(segmenter, tmp_path / "scans", tmp_path / "out")
    assert [(result.name, result.status, result.reason) for result in results] == [
        ("mixed_series1", "done", ""), ("mixed_series2", "done", "")
    ]  # fmt: skip
    for result in results:
        expected = read_header(tmp_path / "first" / "scans" / "series")
        assert grid_difference(read_header(result.output), expected) is None
