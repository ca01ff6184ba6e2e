"""Time and peak memory of one meta-step, as a multiple of one plain forward and backward pass of the same network.

    python scripts/benchmark_meta_step.py --size 64 --repeats 7 --threads 2

Everything runs alternately in one process, a plain pass before each meta-step, and medians are given, so that a busy
machine slows all rows alike; --cpu-time does not count the time others take at all. Support and query are of the same
size as the batch of the plain pass. Every learner stands with its default options; MAML also with K inner steps of
either order beside their floor: what the passes would cost if nothing came on top, 3K + 1 of second order (forward,
backward, and the backward of both, then the query), K + 1 of first order.

Memory is the peak of what the tensors of a step take, above what stood before it (the network, the batch).
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable, Sequence

import torch

from medmeta.episode import Episode, Examples
from medmeta.learners import LEARNERS, MAML, Scratch, Transfer, build_learner
from medmeta.losses import dice_cross_entropy
from medmeta.measure import median_seconds, peak_memory
from medmeta.networks import SegNet, build_network

OPTIONS = {"se_unet_3d": {"channels": [16, 32, 64, 96]}, "scse_unet_2d": {"encoder_name": "resnet18"}}
SHORT = {"se_unet_3d": {"channels": [4, 8]}, "scse_unet_2d": {"encoder_depth": 2}}
PLAIN = "forward + backward"


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=48, help="voxels along each axis in 3-D; 2-D takes four times that")
    parser.add_argument("--batch", type=int, default=2, help="images in the support, and in the query")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--steps", type=int, nargs="*", default=[1, 3, 5], help="inner steps of MAML")
    parser.add_argument("--networks", nargs="+", default=list(OPTIONS), choices=list(OPTIONS))
    learners = [name for name, kind in LEARNERS.items() if kind is not Scratch]
    parser.add_argument("--learners", nargs="*", default=learners, choices=learners, metavar="LEARNER")
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
        options = (SHORT if arguments.short else OPTIONS)[name]
        size = [arguments.size] * 3 if name.endswith("3d") else [4 * arguments.size] * 2
        episode = draw_episode(arguments.batch, size).to(arguments.device)

        def network(name: str = name, options: dict = options) -> SegNet:
            return build_network(name, seed=0, **options).to(arguments.device)

        clock = time.process_time if arguments.cpu_time else time.perf_counter
        steps, floors = meta_steps(network, episode, arguments.learners, arguments.steps)
        report(name, steps, floors, arguments.repeats, torch.device(arguments.device), clock)


def draw_episode(batch: int, size: Sequence[int]) -> Episode:
    generator = torch.Generator().manual_seed(0)

    def draw() -> Examples:
        image = torch.randn(batch, 1, *size, generator=generator)
        return Examples(image, (image[:, 0] > 1).long(), 1)

    return Episode("noise", draw(), draw())


def meta_steps(
    network: Callable[[], SegNet], episode: Episode, learners: Sequence[str], inner_steps: Sequence[int]
) -> tuple[dict[str, Callable[[], None]], dict[str, int]]:
    """What is measured, the plain pass first, and the floors of those that have one."""
    net = network()

    def plain_pass() -> None:
        net.zero_grad(set_to_none=True)
        dice_cross_entropy(net(episode.query.image), episode.query.mask).backward()

    steps: dict[str, Callable[[], None]] = {PLAIN: plain_pass}
    floors = {PLAIN: 1}
    kinds = {}
    for order in (2, 1):
        for count in inner_steps:
            row = f"order {order}, K = {count}"
            kinds[row] = MAML(net, inner_steps=count, order=order)
            floors[row] = (3 if order == 2 else 1) * count + 1
    for name in learners:
        options = {"tasks": {episode.task: 1}} if issubclass(LEARNERS[name], Transfer) else {}
        kinds[name] = build_learner(name, network(), **options).to(episode.query.image.device)
    for row, learner in kinds.items():

        def step(learner=learner) -> None:
            learner.zero_grad(set_to_none=True)
            learner.meta_loss(episode).backward()

        steps[row] = step
    return steps, floors


def report(
    network: str,
    steps: dict[str, Callable[[], None]],
    floors: dict[str, int],
    repeats: int,
    device: torch.device,
    clock: Callable[[], float],
) -> None:
    """Print the rows of one network: the plain pass first."""
    seconds = median_seconds(steps, repeats, device, clock)
    peaks = {row: peak_memory(step, device) for row, step in steps.items()}
    for row in steps:
        ratio = seconds[row] / seconds[PLAIN]
        floor = f"{floors[row]} | {ratio / floors[row]:.2f}" if row in floors else "| "
        memory = f"{peaks[row] / 2**20:.1f} | {peaks[row] / peaks[PLAIN]:.2f}"
        print(f"| {network} | {row} | {1e3 * seconds[row]:.0f} | {ratio:.2f} | {floor} | {memory} |", flush=True)


if __name__ == "__main__":
    main()
