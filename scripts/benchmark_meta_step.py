"""Time and peak memory of one meta-step, as a multiple of one plain forward and backward pass of the same network.

    python scripts/benchmark_meta_step.py --size 64 --repeats 7 --threads 2

Everything runs alternately in one process, a plain pass before each meta-step, and medians are given, so that a busy
machine slows all rows alike; --cpu-time does not count the time others take at all. Support and query are of the same
size as the batch of the plain pass. The floor is what the passes of a meta-step cost if nothing came on top: 3K + 1 for
K inner steps of second order (forward, backward, and the backward of both, then the query), K + 1 of first order.

Memory is the peak of what the tensors of a step take, above what stood before it (the network, the batch).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from medmeta.episode import Episode, Examples
from medmeta.learners import MAML
from medmeta.losses import dice_cross_entropy
from medmeta.networks import NETWORKS, SegNet, build_network

OPTIONS = {"se_unet_3d": {"channels": [16, 32, 64, 96]}, "scse_unet_2d": {"encoder_name": "resnet18"}}
SHORT = {"se_unet_3d": {"channels": [4, 8]}, "scse_unet_2d": {"encoder_depth": 2}}

Step = Callable[[], None]


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=48, help="voxels along each axis in 3-D; 2-D takes four times that")
    parser.add_argument("--batch", type=int, default=2, help="images in the support, and in the query")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 3, 5], help="inner steps")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cpu-time", action="store_true", help="CPU time of this process instead of the clock's")
    parser.add_argument("--short", action="store_true", help="tiny networks, one inner step: only shows that it runs")
    arguments = parser.parse_args(given)
    if arguments.short:
        arguments.size, arguments.batch, arguments.repeats, arguments.steps = 8, 1, 1, [1]
    # The profiler tells of its own start and stop otherwise.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    torch.set_num_threads(arguments.threads)
    print(
        f"{arguments.batch} images of {arguments.size}^3 or {4 * arguments.size}^2 voxels, {arguments.repeats} "
        f"repeats, {arguments.threads} threads, {arguments.device}, torch {torch.__version__}, {platform.machine()}\n"
    )
    print("| network | step | ms | time x plain | floor | time x floor | peak MiB | memory x plain |")
    print("|---|---|---|---|---|---|---|---|")
    for name in arguments.networks:
        net = build_network(name, seed=0, **(SHORT if arguments.short else OPTIONS)[name]).to(arguments.device)
        size = [arguments.size] * 3 if net.spatial_dims == 3 else [4 * arguments.size] * 2
        episode = draw_episode(arguments.batch, size).to(arguments.device)
        clock = time.process_time if arguments.cpu_time else time.perf_counter
        measure(name, net, episode, arguments.steps, arguments.repeats, clock)


def draw_episode(batch: int, size: Sequence[int]) -> Episode:
    generator = torch.Generator().manual_seed(0)

    def draw() -> Examples:
        image = torch.randn(batch, 1, *size, generator=generator)
        return Examples(image, (image[:, 0] > 1).long(), 1)

    return Episode("noise", draw(), draw())


def measure(
    name: str, net: SegNet, episode: Episode, inner_steps: Sequence[int], repeats: int, clock: Callable[[], float]
) -> None:
    """Print the rows of one network: the plain pass first."""
    plain_row = "forward + backward"
    steps: dict[str, Step] = {plain_row: lambda: plain_pass(net, episode.query)}
    floors = {plain_row: 1}
    for order in (2, 1):
        for count in inner_steps:
            row = f"order {order}, K = {count}"
            learner = MAML(net, inner_steps=count, order=order)
            steps[row] = lambda learner=learner: learner.meta_loss(episode).backward()
            floors[row] = (3 if order == 2 else 1) * count + 1
    device = episode.query.image.device
    seconds: dict[str, list[float]] = {row: [] for row in steps}
    meta_rows = [row for row in steps if row != plain_row]
    for number in range(repeats + 1):
        for row in [turn for meta_row in meta_rows for turn in (plain_row, meta_row)]:
            net.zero_grad(set_to_none=True)
            wait(device)
            started = clock()
            steps[row]()
            wait(device)
            # The first round warms up.
            if number:
                seconds[row].append(clock() - started)
    peaks = {}
    for row, step in steps.items():
        net.zero_grad(set_to_none=True)
        peaks[row] = peak_memory(step, device)
    plain, least = statistics.median(seconds[plain_row]), peaks[plain_row]
    for row, floor in floors.items():
        middle = statistics.median(seconds[row])
        ratios = f"{middle / plain:.2f} | {floor} | {middle / plain / floor:.2f}"
        memory = f"{peaks[row] / 2**20:.1f} | {peaks[row] / least:.2f}"
        print(f"| {name} | {row} | {1e3 * middle:.0f} | {ratios} | {memory} |", flush=True)


def plain_pass(net: SegNet, examples: Examples) -> None:
    dice_cross_entropy(net(examples.image), examples.mask).backward()


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(step: Step, device: torch.device) -> int:
    """Largest number of bytes held by tensors during `step`, above what was held before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    # What the process takes from the system hides in the allocator's caches; the profiler sees each tensor come and go.
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    changes = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]")
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak


if __name__ == "__main__":
    main()
