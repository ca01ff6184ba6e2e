"""How long a random 3D patch takes from the store, beside other ways to keep prepared scans, and what each takes up.

    python scripts/benchmark_store.py --scans 20 --edge 128

Writes synthetic scans of edge^3 voxels to a temporary folder and prepares them once. Each way then draws the same
number of patches of image and mask in a process of its own: the store (NumPy files, memory-mapped), the same arrays as
Zarr and as Blosc2 (where installed), MONAI's PersistentDataset and CacheDataset, and no cache at all. Memory is what
the process holds for itself (Linux: RssAnon) beyond its start; pages of memory-mapped files belong to the system.
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from medmeta.data.preprocess import Preprocess
from medmeta.data.sampler import draw_patch
from medmeta.data.store import Store, StoredTask, fit_preprocess, prepare
from medmeta.data.tasks import Case, Task
from medmeta.data.volume import Volume, write_volume

Draw = Callable[[int, np.random.Generator], object]
"""Draws a patch from the scan of that number."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scans", type=int, default=20)
    parser.add_argument("--edge", type=int, default=128, help="voxels along each axis of a scan")
    parser.add_argument("--patch", type=int, default=64)
    parser.add_argument("--draws", type=int, default=200)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        task = write_task(folder, arguments.scans, arguments.edge)
        preprocess = fit_preprocess(task, task.cases[:1])
        stored = Store(folder / "store").task(task, preprocess, voxels=arguments.patch**3)
        ways: dict[str, Callable[[Path], Draw]] = {
            "store (NumPy, memory-mapped)": lambda _: lambda i, rng: draw_patch(stored.cases[i], stored.patch, rng),
            "Zarr": lambda where: zarr_draw(stored, where),
            "Blosc2": lambda where: blosc2_draw(stored, where),
            "MONAI PersistentDataset": lambda where: monai_draw(task, preprocess, stored.patch, where),
            "MONAI CacheDataset": lambda _: monai_draw(task, preprocess, stored.patch, None),
            "no cache: read, prepare, crop": lambda _: (
                lambda i, rng: draw_patch(prepare(task, task.cases[i], preprocess), stored.patch, rng)
            ),
        }
        for title, way in ways.items():
            library = title.lower()
            if library in ("zarr", "blosc2") and importlib.util.find_spec(library) is None:
                continue
            where = folder / ("store" if title.startswith("store") else title.split()[-1])
            where.mkdir(exist_ok=True)
            draws = 10 if title.startswith("no cache") else arguments.draws
            milliseconds, mib = apart(way, where, arguments.scans, draws)
            disk = sum(file.stat().st_size for file in where.rglob("*") if file.is_file()) / 2**20
            rows.append(f"| {title} | {milliseconds:.2f} | {mib:.0f} | {disk:.0f} |")
            print(rows[-1], flush=True)
    print(f"\n{arguments.scans} scans of {arguments.edge}^3 voxels, patches of {stored.patch}\n")
    print("| way | median ms a patch | MiB of memory | MiB on disk |\n|---|---|---|---|\n" + "\n".join(rows))


def apart(way: Callable[[Path], Draw], where: Path, scans: int, draws: int) -> tuple[float, float]:
    """Median milliseconds of a patch and growth of memory in MiB, in a process of its own."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()

    def work() -> None:
        rng, seconds, before = np.random.default_rng(0), [], held()
        draw = way(where)
        for number in range(scans):
            draw(number, rng)  # made, or read for the first time
        for _ in range(draws):
            number = int(rng.integers(scans))
            started = time.perf_counter()
            draw(number, rng)
            seconds.append(time.perf_counter() - started)
        theirs.send((statistics.median(seconds) * 1e3, held() - before))

    process = context.Process(target=work)
    process.start()
    theirs.close()
    figures = ours.recv()
    process.join()
    return figures


def held() -> float:
    """MiB that this process holds for itself."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
    return int(line.split()[1]) / 1024


def window(shape: tuple[int, ...], patch: tuple[int, ...], rng: np.random.Generator) -> tuple[slice, ...]:
    firsts = (int(rng.integers(max(1, size - side + 1))) for size, side in zip(shape, patch, strict=True))
    return tuple(slice(first, first + side) for first, side in zip(firsts, patch, strict=True))


def cropping(images: list, masks: list, patch: tuple[int, ...]) -> Draw:
    def draw(number: int, rng: np.random.Generator) -> object:
        where = window(masks[number].shape, patch, rng)
        return np.asarray(images[number][(slice(None), *where)], dtype=np.float32), np.asarray(masks[number][where])

    return draw


def zarr_draw(stored: StoredTask, where: Path) -> Draw:
    import zarr

    for number, case in enumerate(stored.cases):
        for name, array in (("image", case.image), ("mask", case.mask)):
            chunks = (1,) * (array.ndim - 3) + (32, 32, 32)
            zarr.create_array(where / f"{name}{number}", data=np.asarray(array), chunks=chunks)
    images, masks = (
        [zarr.open_array(where / f"{name}{number}", mode="r") for number in range(len(stored.cases))]
        for name in ("image", "mask")
    )
    return cropping(images, masks, stored.patch)


def blosc2_draw(stored: StoredTask, where: Path) -> Draw:
    import blosc2

    for number, case in enumerate(stored.cases):
        for name, array in (("image", case.image), ("mask", case.mask)):
            blosc2.asarray(np.array(array), urlpath=str(where / f"{name}{number}.b2nd"), mode="w")
    images, masks = (
        [blosc2.open(str(where / f"{name}{number}.b2nd"), mode="r") for number in range(len(stored.cases))]
        for name in ("image", "mask")
    )
    return cropping(images, masks, stored.patch)


def monai_draw(task: Task, preprocess: Preprocess, patch: tuple[int, ...], where: Path | None) -> Draw:
    from monai.data import CacheDataset, PersistentDataset
    from monai.transforms import Compose, Lambda, RandSpatialCropd

    def load(item: dict) -> dict:
        case = prepare(task, task.cases[item["number"]], preprocess)
        return {"image": torch.from_numpy(case.image), "mask": torch.from_numpy(case.mask)[None]}

    chain = Compose([Lambda(load), RandSpatialCropd(("image", "mask"), patch, random_size=False)])
    items = [{"number": number} for number in range(len(task.cases))]
    if where is None:
        dataset = CacheDataset(items, chain, progress=False, num_workers=1)
    else:
        dataset = PersistentDataset(items, chain, cache_dir=where)
    return lambda number, rng: dataset[number]


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
