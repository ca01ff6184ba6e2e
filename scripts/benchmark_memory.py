"""Peak memory of segmenting one large scan, beside MONAI's plain pipeline of sliding windows and inversion.

    python scripts/benchmark_memory.py --shape 160 160 160 --classes 100
    python scripts/benchmark_memory.py --shape 512 512 600 --spacing 0.8 0.8 1 --working 1.5 --classes 20 --only medmeta

Each way runs in a process of its own, on the same synthetic scan, with one and the same function of a window in place
of a network, so that only the handling of probabilities differs. Memory is the peak of resident memory, and what of it
came on top of the scan and the libraries.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time
from dataclasses import replace
from multiprocessing.connection import Connection

import torch
from torch import Tensor

from medmeta.data.preprocess import Preprocess
from medmeta.data.volume import Volume
from medmeta.learners import build_learner
from medmeta.networks import build_network
from medmeta.registration import Atlas
from medmeta.segmenter import Model, Segmenter


def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def scan(shape: list[int], spacing: list[float]) -> Volume:
    coarse = torch.randn(1, 1, *(max(4, size // 16) for size in shape), generator=torch.Generator().manual_seed(0))
    data = torch.nn.functional.interpolate(coarse, shape, mode="trilinear")[0] * 400
    return Volume(data, torch.diag(torch.tensor([*spacing, 1.0], dtype=torch.float64)))


def run(way: str, options: argparse.Namespace, answer: Connection) -> None:
    from monai.inferers import sliding_window_inference

    torch.set_num_threads(1)
    centres = torch.linspace(-2, 2, 1 + options.classes).reshape(1, -1, 1, 1, 1)

    def windows(image: Tensor) -> Tensor:
        return (image - centres).mul_(20).square_().neg_().softmax(dim=1)

    volume = scan(options.shape, options.spacing)
    model = Model(build_learner("scratch", build_network("se_unet_3d", channels=[8], seed=0)), options.patch**3)
    labels = tuple(range(1, options.classes + 1))
    preprocess = Preprocess("CT", (options.working,) * 3, (-400.0, 400.0))
    patch = (options.patch,) * 3
    segmenter = Segmenter(model, {}, preprocess, {"all": labels}, labels, ("CT",), patch, best_dice=options.best_dice)
    if options.atlas:
        # The scan itself, coarse, so that it can be registered; its classes are its intensities.
        sides = [64, 64, 48]
        small = torch.nn.functional.interpolate(volume.data[None], sides, mode="trilinear")[0, 0].clamp(-400, 400)
        spacing = tuple(
            size * side / few for size, side, few in zip(options.shape, options.spacing, sides, strict=True)
        )
        mask = (small.add(400) / 800 * options.classes).round().to(torch.int8)
        segmenter = replace(segmenter, atlases=(Atlas((small + 400).div(800).half(), spacing, mask, spacing),))
    before, started = peak_gib(), time.perf_counter()
    if way == "medmeta":
        result = segmenter.predict(volume, predictor=lambda _: windows).data
    else:
        grid = preprocess.forward(volume)
        whole = sliding_window_inference(grid.data.unsqueeze(0), patch, 1, windows, overlap=0.25, mode="gaussian")[0]
        result = preprocess.inverse(Volume(whole, grid.affine), volume).data.argmax(dim=0, keepdim=True).int()
    answer.send((peak_gib(), peak_gib() - before, time.perf_counter() - started))
    answer.send(result.to(torch.int16).numpy())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=3, default=[160, 160, 160])
    parser.add_argument("--spacing", type=float, nargs=3, default=[1.0, 1.0, 1.0])
    parser.add_argument("--working", type=float, default=1.0)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--patch", type=int, default=64)
    parser.add_argument("--only", choices=("medmeta", "MONAI"))
    parser.add_argument("--atlas", action="store_true", help="carry the labels of an atlas too, which MONAI does not")
    parser.add_argument("--best-dice", action="store_true", help="label as predict does by default, not as MONAI does")
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    print(f"{'way':<10}{'peak GiB':>10}{'on top':>10}{'seconds':>10}  other labels")
    labels = []
    for way in (options.only,) if options.only else ("MONAI", "medmeta"):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=run, args=(way, options, sender))
        process.start()
        sender.close()
        try:
            peak, top, seconds = receiver.recv()
            labels.append(receiver.recv())
            others = f"{int((labels[0] != labels[-1]).sum())} of {labels[0].size}"
            print(f"{way:<10}{peak:>10.2f}{top:>10.2f}{seconds:>10.1f}  {others}")
        except EOFError:
            print(f"{way:<10}{'killed: too little memory on this machine':>40}")
        process.join()


if __name__ == "__main__":
    main()
