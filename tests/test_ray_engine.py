"""A real local Ray cluster: one worker and four give the same files, and a worker that is killed loses nothing."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest
from small import broken_scans, phantom, tiny_model, tree, write_pairs

from medmeta.adaptation import adapt
from medmeta.data.volume import write_volume
from medmeta.fine_tuning import Budget
from medmeta.prediction import predict
from medmeta.segmenter import Segmenter

ray = pytest.importorskip("ray", reason="needs the extra ray")


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory) -> Segmenter:
    folder = write_pairs(tmp_path_factory.mktemp("support"))
    options = {"targets": {"whole": (1, 2)}, "budget": Budget(steps=5), "atlases": 1}
    return adapt(tiny_model(), folder / "images", folder / "labels", **options)


@pytest.fixture
def scans(tmp_path) -> Path:
    folder = tmp_path / "scans"
    broken_scans(folder)
    for case in range(5):
        write_volume(phantom(2, case)[0], folder / f"case{case}.nii.gz")
    return folder


def label_maps(out: Path) -> dict[str, bytes]:
    return {name: content for name, content in tree(out).items() if name.endswith(".nii.gz")}


def workers_at_work() -> list[int]:
    """Processes of this cluster that are in the middle of a scan."""
    parents, titles = {}, {}
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit():
                titles[int(entry.name)] = (entry / "cmdline").read_text()
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue

    def ours(process: int) -> bool:
        while process in parents and process != os.getpid():
            process = parents[process]
        return process == os.getpid()

    return [process for process, title in titles.items() if title.startswith("ray::Worker.whole") and ours(process)]


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the workers in /proc")
def test_workers_give_the_same_files_and_a_killed_one_loses_nothing(segmenter, scans, tmp_path):
    alone = predict(segmenter, scans, tmp_path / "one", engine="ray", workers=1, overlap=0.5)
    killed: list[int] = []

    def kill() -> None:
        for _ in range(3000):
            for process in workers_at_work()[:1]:
                os.kill(process, signal.SIGKILL)
                killed.append(process)
                return
            time.sleep(0.01)

    killer = threading.Thread(target=kill)
    killer.start()
    four = predict(segmenter, scans, tmp_path / "four", engine="ray", workers=4, overlap=0.5)
    killer.join()
    assert killed, "no worker was killed, so nothing is shown"
    assert len(label_maps(tmp_path / "one")) == 5
    assert label_maps(tmp_path / "one") == label_maps(tmp_path / "four")
    outcomes = [{result.scan.name: (result.status, result.reason) for result in run} for run in (alone, four)]
    assert outcomes[0] == outcomes[1]
    assert {name for name, (status, _) in outcomes[0].items() if status == "done"} == {
        f"case{number}.nii.gz" for number in range(5)
    }
    assert not ray.is_initialized()
