"""How long a random 3D patch takes from the store, and whether memory grows with the data set.

    python scripts/benchmark_store.py --scans 20 --edge 128

Writes synthetic scans of edge^3 voxels to a temporary folder, prepares them once, and draws patches from 1 scan and
from all of them. Beside it: reading and preparing the whole scan for each patch, as a loader without a store does.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from medmeta.data.sampler import draw_patch
from medmeta.data.store import Store, fit_preprocess, prepare
from medmeta.data.tasks import Case, Task
from medmeta.data.volume import Volume, write_volume


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scans", type=int, default=20)
    parser.add_argument("--edge", type=int, default=128, help="voxels along each axis of a scan")
    parser.add_argument("--patch", type=int, default=64)
    parser.add_argument("--draws", type=int, default=200)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        task = write_task(Path(folder), arguments.scans, arguments.edge)
        preprocess = fit_preprocess(task, task.cases[:1])
        stored = Store(Path(folder) / "store").task(task, preprocess, voxels=arguments.patch**3)
        rng = np.random.default_rng(0)
        patch = (arguments.patch,) * 3
        rows = []
        for count in (1, arguments.scans):
            seconds = []
            for _ in range(arguments.draws):
                case = stored.cases[rng.integers(count)]
                started = time.perf_counter()
                draw_patch(case, patch, rng)
                seconds.append(time.perf_counter() - started)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            rows.append((f"store, {count} scans", statistics.median(seconds) * 1e3, peak))
        started = time.perf_counter()
        draw_patch(prepare(task, task.cases[0], preprocess), patch, rng)
        rows.append(("no store: read, prepare, crop", (time.perf_counter() - started) * 1e3, float("nan")))
        size = sum(file.stat().st_size for file in (Path(folder) / "store").rglob("*.npy")) / 2**20
    print(f"| {arguments.patch}^3 patch of {arguments.edge}^3 voxels | median ms | peak RSS MiB |\n|---|---|---|")
    for name, milliseconds, peak in rows:
        print(f"| {name} | {milliseconds:.2f} | {peak:.0f} |")
    print(f"\nThe store takes {size:.0f} MiB for {arguments.scans} scans.")


def write_task(folder: Path, scans: int, edge: int) -> Task:
    """A task of random scans with a cube as the organ."""
    rng = np.random.default_rng(0)
    mask = np.zeros((1, edge, edge, edge), dtype=np.uint8)
    mask[0, edge // 4 : edge // 2, edge // 4 : edge // 2, edge // 4 : edge // 2] = 1
    affine = torch.eye(4, dtype=torch.float64)
    cases = []
    for number in range(scans):
        image, labels = folder / f"image{number}.nii", folder / f"labels{number}.nii"
        scan = rng.normal(size=mask.shape).astype(np.float32) + 3 * mask
        write_volume(Volume(torch.from_numpy(scan), affine), image)
        write_volume(Volume(torch.from_numpy(mask), affine), labels)
        cases.append(Case(f"case{number}", f"case{number}", (image,), labels))
    return Task("cubes", "cube", "MR", {"cube": (1,)}, tuple(cases))


if __name__ == "__main__":
    main()
