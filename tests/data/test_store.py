"""Oracles: `prepare`, which keeps everything in memory; the file system; two processes at once."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from medmeta.data import store as module
from medmeta.data.phantoms import write_phantoms
from medmeta.data.store import PLACES, Store, fit_preprocess, prepare, read_case
from medmeta.data.tasks import Case, Task, load_task
from medmeta.data.volume import Volume, read_labels, read_volume, write_volume
from medmeta.episode import IGNORED
from medmeta.errors import InputError


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> Task:
    folder = tmp_path_factory.mktemp("phantoms") / "tasks"
    return load_task(write_phantoms(folder, tasks=1, cases=3, size_mm=60.0)[0])


def same(a, b) -> bool:
    arrays = all(np.array_equal(getattr(a, name), getattr(b, name)) for name in ("image", "mask"))
    places = a.places.keys() == b.places.keys() and all(np.array_equal(a.places[k], b.places[k]) for k in a.places)
    return arrays and places and (a.id, a.patient) == (b.id, b.patient)


def entries(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def making(folder: Path) -> list[Path]:
    return sorted(folder.glob(".making-*"))


def test_a_scan_is_made_once_and_equals_the_one_made_in_memory(task, tmp_path, monkeypatch):
    preprocess = fit_preprocess(task)
    store = Store(tmp_path / "new" / "store")
    told = []
    first = store.task(task, preprocess, voxels=16**3, progress=lambda done, total: told.append((done, total)))
    assert told == [(1, 3), (2, 3), (3, 3)]
    assert all(
        same(case, prepare(task, given, preprocess)) for case, given in zip(first.cases, task.cases, strict=True)
    )
    times = {path: path.stat().st_mtime_ns for path in store.folder.rglob("*") if path.is_file()}
    monkeypatch.setattr(module, "prepare", lambda *_: pytest.fail("made again"))
    second = Store(tmp_path / "new" / "store").task(task, preprocess, voxels=16**3)
    assert all(same(a, b) for a, b in zip(first.cases, second.cases, strict=True))
    assert {path: path.stat().st_mtime_ns for path in store.folder.rglob("*") if path.is_file()} == times
    assert (second.name, second.classes, second.preprocess) == (task.name, task.classes, preprocess)
    assert second.patch == preprocess.patch(16**3, [case.mask.shape for case in first.cases])
    assert list(second.patients) == list(task.patients)


def test_scans_are_memory_mapped_and_read_only(task, tmp_path):
    case = Store(tmp_path).task(task, fit_preprocess(task), voxels=16**3).cases[0]
    for array in (case.image, case.mask):
        assert isinstance(array, np.memmap)
        assert not array.flags.writeable
    assert (case.image.dtype, case.mask.dtype) == (np.float16, np.int8)
    assert case.image.shape == (1, *case.mask.shape)


def test_places_lie_on_their_class(task, tmp_path):
    for case in Store(tmp_path).task(task, fit_preprocess(task), voxels=16**3).cases:
        assert case.places.keys() == set(np.unique(case.mask)) - {0, IGNORED}
        for label, places in case.places.items():
            assert (case.mask[tuple(places.T)] == label).all()
            assert len(places) == min(len(places), PLACES)


def test_many_voxels_are_thinned_over_the_whole_organ():
    mask = np.zeros((40, 40, 40), dtype=np.int8)
    mask[5:35, 5:35, 5:35] = 2
    places = module.find_places(mask, 3)
    assert list(places) == [2]
    assert PLACES / 2 < len(places[2]) <= PLACES
    assert places[2].min() == 5
    assert places[2].max() >= 33


def key(task: Task, case: Case, preprocess, tmp_path) -> str:
    return Store(tmp_path / "keys")._key(task, case, preprocess)


def test_a_scan_is_made_again_when_content_or_settings_change(task, tmp_path):
    preprocess = fit_preprocess(task)
    case = task.cases[0]
    image, labels = (tmp_path / name for name in ("image.nii.gz", "labels.nii.gz"))
    shutil.copy(case.images[0], image)
    shutil.copy(case.labels, labels)
    copied = Case("other name", "other patient", (image,), labels)
    original = key(task, case, preprocess, tmp_path)
    assert key(task, copied, preprocess, tmp_path) == original, "the content counts, not the name"
    assert key(replace(task, name="x", terms="y"), case, preprocess, tmp_path) == original
    changed = {
        key(task, case, replace(preprocess, spacing=(9.0, 9.0, 9.0)), tmp_path),
        key(task, case, replace(preprocess, modality="MR", window=None), tmp_path),
        key(replace(task, targets={"one": (1,)}, ignored=(2,)), case, preprocess, tmp_path),
        key(replace(task, targets={"both": (1, 2)}), case, preprocess, tmp_path),
        key(task, task.cases[1], preprocess, tmp_path),
    }
    scan = read_volume(image)
    scan.data[0, 0, 0, 0] += 1
    write_volume(scan, image)
    changed.add(key(task, copied, preprocess, tmp_path))
    shutil.copy(case.images[0], image)
    drawn = read_labels(labels)
    drawn.data[0, 0, 0, 0] = 1
    write_volume(drawn, labels)
    changed.add(key(task, copied, preprocess, tmp_path))
    assert len(changed | {original}) == 8


def test_a_dicom_series_is_keyed_by_its_slices(task, tmp_path):
    series = tmp_path / "series"
    series.mkdir()
    for number in range(3):
        (series / f"{number}.dcm").write_bytes(b"slice %d" % number)
    case = Case("a", "a", (series,), task.cases[0].labels)
    before = key(task, case, fit_preprocess(task), tmp_path)
    (series / "1.dcm").write_bytes(b"another slice")
    assert key(task, case, fit_preprocess(task), tmp_path) != before


def test_a_store_shared_by_two_names_gives_each_its_own(task, tmp_path):
    preprocess = fit_preprocess(task)
    store = Store(tmp_path)
    store.case(task, task.cases[0], preprocess)
    again = store.case(task, replace(task.cases[0], id="b", patient="p"), preprocess)
    assert (again.id, again.patient) == ("b", "p")
    assert len(entries(tmp_path)) == 1


WRITER = """
import json, sys, time
import numpy as np
from medmeta.data import store
from medmeta.data.preprocess import Preprocess
from medmeta.data.tasks import load_task
task, folder, preprocess, how = load_task(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]), sys.argv[4]
saved_scan = np.load(sys.argv[5])
scan = store.StoredCase("", "", saved_scan["image"], saved_scan["mask"], {1: saved_scan["1"], 2: saved_scan["2"]})
store.prepare = lambda *_: scan  # the slow part is not what is tested
if how == "kill":
    saved = store.np.save
    def save(path, array):
        saved(path, array)
        print("ready", flush=True)
        time.sleep(60)
    store.np.save = save
else:
    def prepare(*given):
        print("ready", flush=True)
        sys.stdin.readline()
        return scan
    store.prepare = prepare
case = store.Store(folder).case(task, task.cases[0], Preprocess.from_dict(preprocess))
print(float(case.image.astype("float64").sum()))
"""


def writer(task: Task, folder: Path, how: str) -> subprocess.Popen:
    preprocess = fit_preprocess(task)
    made = prepare(task, task.cases[0], preprocess)
    arrays = {"image": made.image, "mask": made.mask} | {str(label): places for label, places in made.places.items()}
    np.savez(folder.with_suffix(".npz"), **arrays)
    place, settings = task.cases[0].labels.parents[1], json.dumps(preprocess.to_dict())
    command = [sys.executable, "-c", WRITER, str(place), str(folder), settings, how, str(folder.with_suffix(".npz"))]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_two_writers_leave_one_good_scan(task, tmp_path):
    folder = tmp_path / "store"
    process = writer(task, folder, "wait")
    # It has found no entry and holds the finished scan; then this process is faster.
    assert process.stdout.readline() == "ready\n"
    preprocess = fit_preprocess(task)
    ours = Store(folder).case(task, task.cases[0], preprocess)
    (entry,) = entries(folder)
    times = {path: path.stat().st_mtime_ns for path in entry.iterdir()}
    total, _ = process.communicate("go\n", timeout=60)
    assert process.returncode == 0
    assert float(total) == ours.image.astype("float64").sum()
    assert entries(folder) == [entry]
    assert making(folder) == []
    assert {path: path.stat().st_mtime_ns for path in entry.iterdir()} == times
    assert same(Store(folder).case(task, task.cases[0], preprocess), prepare(task, task.cases[0], preprocess))


def test_a_kill_in_the_middle_of_writing_leaves_nothing_wrong(task, tmp_path):
    folder = tmp_path / "store"
    process = writer(task, folder, "kill")
    assert process.stdout.readline() == "ready\n"
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    assert entries(folder) == []
    assert len(making(folder)) == 2, "what it was writing, and its lock"
    preprocess = fit_preprocess(task)
    assert same(Store(folder).case(task, task.cases[0], preprocess), prepare(task, task.cases[0], preprocess))
    assert len(entries(folder)) == 1
    assert making(folder) == []


def test_a_living_writer_is_not_swept_away(task, tmp_path):
    folder = tmp_path / "store"
    process = writer(task, folder, "kill")
    assert process.stdout.readline() == "ready\n"
    preprocess = fit_preprocess(task)
    Store(folder).case(task, task.cases[1], preprocess)
    assert len(making(folder)) == 2
    process.kill()
    process.communicate(timeout=60)
    (folder / ".making-without-a-lock").mkdir()
    Store(folder).case(task, task.cases[2], preprocess)
    assert making(folder) == []
    assert len(entries(folder)) == 2


def test_what_was_asked_for_longest_ago_makes_room(task, tmp_path):
    preprocess = fit_preprocess(task)
    Store(tmp_path).task(task, preprocess, voxels=16**3)
    places = {case.id: tmp_path / key(task, case, preprocess, tmp_path) for case in task.cases}
    first, second, third = (case.id for case in task.cases)
    for hours, name in ((3, first), (2, second), (1, third)):
        os.utime(places[name], (10**9 - 3600 * hours,) * 2)
    sizes = {name: sum(file.stat().st_size for file in place.iterdir()) for name, place in places.items()}
    Store(tmp_path).case(task, task.cases[0], preprocess)  # asked for just now
    changed = replace(preprocess, spacing=tuple(2 * step for step in preprocess.spacing))
    store = Store(tmp_path, limit_bytes=sizes[first] + sizes[third] + sizes[second] // 2)
    kept = store.case(task, task.cases[0], changed)
    assert [name for name, place in places.items() if place.is_dir()] == [first, third]
    store.limit_bytes = 0
    again = store.case(task, task.cases[1], changed)
    assert len(entries(tmp_path)) == 2, "what this store has handed out stays"
    assert same(kept, prepare(task, task.cases[0], changed))
    assert same(again, prepare(task, task.cases[1], changed))
    assert making(tmp_path) == []


def test_a_scan_that_another_run_removes_is_made_again(task, tmp_path, monkeypatch):
    preprocess, store, read = fit_preprocess(task), Store(tmp_path), module._read
    store.case(task, task.cases[0], preprocess)

    def removed_once(place):
        monkeypatch.setattr(module, "_read", read)
        shutil.rmtree(place)
        return read(place)

    monkeypatch.setattr(module, "_read", removed_once)
    assert same(store.case(task, task.cases[0], preprocess), prepare(task, task.cases[0], preprocess))


def test_an_error_while_writing_leaves_nothing(task, tmp_path, monkeypatch):
    def full(*_args, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.np, "savez", full)
    with pytest.raises(OSError, match="No space"):
        Store(tmp_path).case(task, task.cases[0], fit_preprocess(task))
    assert entries(tmp_path) == making(tmp_path) == []


@pytest.mark.parametrize("name", ["image.npy", "mask.npy", "places.npz"])
def test_a_damaged_entry_is_named(task, tmp_path, name):
    preprocess = fit_preprocess(task)
    store = Store(tmp_path)
    store.case(task, task.cases[0], preprocess)
    (entry,) = entries(tmp_path)
    whole = (entry / name).read_bytes()
    (entry / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="damaged prepared scan"):
        store.case(task, task.cases[0], preprocess)
    (entry / name).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(InputError, match="damaged prepared scan") as caught:
        store.case(task, task.cases[0], preprocess)
    assert str(entry) in str(caught.value)
    shutil.rmtree(entry)
    store.case(task, task.cases[0], preprocess)


def test_a_store_in_place_of_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="file"):
        Store(tmp_path / "file")


def write_case(folder: Path, *, scan=None, labels=None, affine=None, labels_affine=None) -> Case:
    folder.mkdir(exist_ok=True)
    affine = torch.eye(4, dtype=torch.float64) if affine is None else affine
    scan = torch.rand(1, 8, 9, 10) if scan is None else scan
    if labels is None:
        labels = torch.zeros(1, 8, 9, 10, dtype=torch.int16)
        labels[0, 2:5, 2:5, 2:5] = 1
    write_volume(Volume(scan, affine), folder / "image.nii.gz")
    write_volume(Volume(labels, affine if labels_affine is None else labels_affine), folder / "labels.nii.gz")
    return Case("a", "a", (folder / "image.nii.gz",), folder / "labels.nii.gz")


def a_task(case: Case, **changes) -> Task:
    return Task(**({"name": "t", "organ": "o", "modality": "MR", "targets": {"o": (1,)}, "cases": (case,)} | changes))


def test_what_does_not_fit_names_the_file_and_the_difference(tmp_path):
    moved = torch.eye(4, dtype=torch.float64)
    moved[:3, 3] = torch.tensor([0.0, 3.2, 0.0])
    case = write_case(tmp_path / "a", labels_affine=moved)
    with pytest.raises(InputError, match=r"labels\.nii\.gz.*origin differs by 3\.2 mm"):
        read_case(a_task(case), case)
    case = write_case(tmp_path / "b", labels=torch.ones(1, 8, 9, 11, dtype=torch.int16))
    with pytest.raises(InputError, match=r"8x9x10 against 8x9x11|8x9x11 against 8x9x10"):
        read_case(a_task(case), case)
    case = write_case(tmp_path / "c", scan=torch.rand(2, 8, 9, 10))
    with pytest.raises(InputError, match=r"image\.nii\.gz: found 2 channels; required: 1 \(image\)"):
        read_case(a_task(case), case)
    case = write_case(tmp_path / "d", scan=torch.full((1, 8, 9, 10), torch.nan))
    with pytest.raises(InputError, match=r"image\.nii\.gz: found NaN"):
        read_case(a_task(case), case)
    case = write_case(tmp_path / "e")
    with pytest.raises(InputError, match=r"labels\.nii\.gz: found label values that no target names: 1"):
        read_case(a_task(case, targets={"o": (2,)}), case)
    with pytest.raises(InputError, match="no label map"):
        read_case(a_task(case), replace(case, labels=None))


def test_an_organ_that_no_support_scan_holds_is_named(tmp_path):
    case = write_case(tmp_path / "a", labels=torch.zeros(1, 8, 9, 10, dtype=torch.int16))
    with pytest.raises(InputError, match=r"a: found no foreground in any support scan \(liver = \[1, 2\]\)"):
        fit_preprocess(a_task(case, targets={"liver": (1, 2)}))
    with pytest.raises(InputError, match="no labelled scan"):
        fit_preprocess(a_task(replace(case, labels=None)))


def test_the_fit_reads_the_cases_it_is_given_and_a_spread_of_many(tmp_path, monkeypatch):
    task = a_task(write_case(tmp_path / "a"))
    cases = [replace(task.cases[0], id=str(number)) for number in range(30)]
    read = []
    monkeypatch.setattr(module, "read_case", lambda task, case: read.append(case.id) or read_case(task, case))
    fit_preprocess(task, cases[:2])
    assert read == ["0", "1"]
    read.clear()
    fit_preprocess(replace(task, cases=tuple(cases)))
    assert read == [str(number) for number in range(0, 30, 3)]


def test_drawing_from_the_store_reads_a_little_of_it(tmp_path):
    """The image stays on disk: a patch costs the bytes it touches, whatever the size of the scan."""
    big = np.lib.format.open_memmap(tmp_path / "image.npy", mode="w+", dtype=np.float16, shape=(1, 256, 256, 256))
    big[0, 100:110] = 1
    del big
    code = (
        "import sys, resource, numpy as np; image = np.load(sys.argv[1], mmap_mode='r');"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;"
        "patch = np.array(image[:, 90:122, 90:122, 90:122], dtype=np.float32);"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "image.npy")], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 16 * 1024, "KiB, of the 32 MiB of the image"


def test_a_real_set(shared_data, tmp_path):
    whole = load_task(shared_data / "Task04_Hippocampus")
    task = whole.of_patients(whole.patients[:2])
    preprocess = fit_preprocess(task)
    stored = Store(tmp_path).task(task, preprocess, voxels=32**3)
    assert stored.classes == 2
    assert all(set(case.places) == {1, 2} for case in stored.cases)
    assert all(
        same(case, prepare(task, given, preprocess)) for case, given in zip(stored.cases, task.cases, strict=True)
    )
