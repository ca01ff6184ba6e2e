"""Kill what writes at random moments, let it go on, and compare what it leaves with an undisturbed run.

    python scripts/kill.py --kills 50 [--kinds store,download]

    store     preparing the scans of a task
    download  fetching and unpacking a data set from a local server
    train     meta-training with checkpoints
    adapt     adapting a model and saving it

Each run is a forked child that gets SIGKILL after a random part of the time that an undisturbed run takes. The next one
goes on with what it finds; a run that ends in peace is compared, and the next begins anew. POSIX only.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import shutil
import signal
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import torch
import yaml

from medmeta.adaptation import adapt_to
from medmeta.data.download import download
from medmeta.data.phantoms import write_phantoms
from medmeta.data.preprocess import Preprocess
from medmeta.data.sampler import EpisodeSampler
from medmeta.data.store import Store, StoredTask, fit_preprocess
from medmeta.data.tasks import Task, load_task
from medmeta.files import write_tensors
from medmeta.fine_tuning import Budget
from medmeta.learners import build_learner
from medmeta.networks import build_network
from medmeta.segmenter import Model
from medmeta.train import Schedule, meta_train

VOXELS = 16**3


def model() -> Model:
    net = build_network("se_unet_3d", seed=0, channels=(8, 16), se_ratio=4)
    return Model(build_learner("fomaml", net), VOXELS)


def prepare_store(task: Task, preprocess: Preprocess, out: Path) -> None:
    Store(out).task(task, preprocess, voxels=VOXELS)


def train(stored: StoredTask, out: Path) -> None:
    learner = model().learner
    schedule = Schedule(steps=30, episodes_per_step=1, checkpoint_every=1)
    meta_train(learner, EpisodeSampler([stored], shots=1, queries=1), schedule, checkpoint=out / "run.safetensors")
    write_tensors(out / "weights.safetensors", learner.state_dict())


def adapt(task: Task, out: Path) -> None:
    if not (out / "model").exists():
        adapt_to(model(), task, method="finetune", budget=Budget(steps=10)).save(out / "model")


class RangeHandler(SimpleHTTPRequestHandler):
    """Serves files in pieces with pauses, from the byte that is asked for."""

    def do_GET(self) -> None:
        content = Path(self.translate_path(self.path)).read_bytes()
        start = int((self.headers.get("Range") or "bytes=0-")[6:-1])
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        try:
            for at in range(start, len(content), 2**16):
                self.wfile.write(content[at : at + 2**16])
                time.sleep(0.01)
        except OSError:
            pass  # the child was killed

    def log_message(self, *_: object) -> None:
        pass


def served(folder: Path, task_folder: Path) -> Path:
    """The manifest of an archive of the task, served on this machine."""
    archive = folder / "task.tar"
    noise = np.random.default_rng(0).bytes(2**21)
    (task_folder / "noise.bin").write_bytes(noise)
    with tarfile.open(archive, "w") as content:
        content.add(task_folder, task_folder.name)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(RangeHandler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    manifest = {
        "name": "Toy",
        "organ": "phantom",
        "modality": "CT",
        "folder": task_folder.name,
        "channels": ["CT"],
        "labels": {0: "background", 1: "organ"},
        "source": f"http://127.0.0.1:{server.server_port}/task.tar",
        "checksum": hashlib.sha256(archive.read_bytes()).hexdigest(),
        "size_gb": archive.stat().st_size / 1e9,
    }
    (folder / "toy.yaml").write_text(yaml.safe_dump(manifest))
    return folder / "toy.yaml"


def tree(folder: Path) -> dict[str, str]:
    """Every file with its digest; what differs between two runs by its nature is left out."""
    skipped = ("run.safetensors", "model.json")  # hold the seconds that a run took
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.endswith(".lock") and path.name not in skipped
    }


def child(work: Callable[[Path], None], out: Path) -> int:
    """The process id of a child that works and ends; its errors are shown."""
    if pid := os.fork():
        return pid
    status = 1
    try:
        work(out)
        status = 0
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    finally:
        os._exit(status)


def disturb(work: Callable[[Path], None], folder: Path, kills: int, rng: random.Random) -> tuple[int, int, int]:
    """Kills, runs that ended in peace, and those of them that left something else than an undisturbed run."""
    started = time.perf_counter()
    _, status = os.waitpid(child(work, folder / "undisturbed"), 0)
    seconds = 1.2 * (time.perf_counter() - started)
    if status != 0:
        raise RuntimeError("the undisturbed run failed")
    expected = tree(folder / "undisturbed")
    done = ended = wrong = 0
    out = folder / "disturbed"
    while done < kills or out.exists():
        pid = child(work, out)
        patience = rng.uniform(0, seconds) if done < kills else float("inf")
        killed = False
        started = time.perf_counter()
        while os.waitpid(pid, os.WNOHANG) == (0, 0):
            if time.perf_counter() - started > patience and not killed:
                os.kill(pid, signal.SIGKILL)
                killed = True
                done += 1
            time.sleep(0.001)
        if killed:
            continue
        ended += 1
        # A busy machine is slower at one time than at another.
        seconds = max(seconds, time.perf_counter() - started)
        if tree(out) != expected:
            wrong += 1
            print(f"differs: {sorted(set(tree(out).items()) ^ set(expected.items()))[:4]}", flush=True)
        shutil.rmtree(out, ignore_errors=True)
    return done, ended, wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="of each kind")
    parser.add_argument("--kinds", default="store,download,train,adapt")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rng = random.Random(arguments.seed)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (place,) = write_phantoms(folder / "organs", tasks=1, cases=3, size_mm=60.0)
        task = load_task(place)
        preprocess = fit_preprocess(task)
        stored = Store(folder / "prepared").task(task, preprocess, voxels=VOXELS)
        manifest = served(folder, place)
        works: dict[str, Callable[[Path], None]] = {
            "store": partial(prepare_store, task, preprocess),
            "download": lambda out: download(manifest, out),
            "train": partial(train, stored),
            "adapt": partial(adapt, task),
        }
        for kind in arguments.kinds.split(","):
            (folder / kind).mkdir()
            figures = disturb(works[kind], folder / kind, arguments.kills, rng)
            rows.append(f"| {kind} | {' | '.join(map(str, figures))} |")
            print(rows[-1], flush=True)
    print("\n| kind | kills | runs to the end | that differ |\n|---|---|---|---|\n" + "\n".join(rows))


if __name__ == "__main__":
    main()
