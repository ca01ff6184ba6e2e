"""The worklist of `medmeta predict` over a Ray cluster. Needs the extra `ray`; inputs and output on a shared disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from medmeta.errors import InputError

if TYPE_CHECKING:
    from medmeta.prediction import Prediction, Work
    from medmeta.worklist import Scan

RETRIES = 3
"""Times that a scan is begun again after its worker died."""


class Worker:
    """A process of the cluster, one thread: the same work gives the same files however many of them there are."""

    def __init__(self, work: Work) -> None:
        torch.set_num_threads(1)
        self.work = work

    def whole(self, scan: Scan, keep: bool) -> Prediction:
        return self.work.whole(scan, keep)


def on_ray(
    work: Work,
    jobs: Sequence[tuple[Scan, bool]],
    start: Callable[[Scan], None],
    workers: int,
    gpus_per_worker: float,
) -> Iterator[Prediction]:
    """What became of each scan, in the order in which they are done.

    The cluster is the one that RAY_ADDRESS names or that runs on this machine; without one, `workers` processes are
    started here. A worker that dies is started again, and its scan is begun again.

    Raises:
        InputError: Ray is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise InputError("engine ray", "no package ray", "the package ray", "pip install 'medmeta[ray]'") from error
    from medmeta.prediction import Prediction

    connect = not ray.is_initialized()
    if connect:
        try:
            ray.init(address="auto", log_to_driver=False)
        except ConnectionError:
            ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False)
    try:
        settings = {"num_cpus": 1, "num_gpus": gpus_per_worker, "max_restarts": -1, "max_task_retries": RETRIES}
        # Workers begin in folders of their own, so paths must not be relative.
        there = ray.put(replace(work, out=work.out.absolute()))
        idle = [ray.remote(Worker).options(**settings).remote(there) for _ in range(min(workers, len(jobs)))]
        waiting = list(reversed(jobs))
        running: dict[ray.ObjectRef[Prediction], tuple[ray.actor.ActorProxy[Worker], Scan]] = {}
        while waiting or running:
            while waiting and idle:
                scan, keep = waiting.pop()
                if not keep:
                    start(scan)
                files, slices = (tuple(file.absolute() for file in some) for some in (scan.files, scan.slices))
                worker = idle.pop()
                absolute = replace(scan, files=files, slices=slices)
                # Ray knows the types of methods that it decorates, and it is not imported where Worker is defined.
                running[worker.whole.remote(absolute, keep)] = (worker, scan)  # type: ignore[attr-defined]
            (ready,), _ = ray.wait(list(running))
            worker, scan = running.pop(ready)
            idle.append(worker)
            try:
                yield ray.get(ready)
            except ray.exceptions.RayError as error:
                reason = f"its worker died {RETRIES + 1} times ({type(error).__name__})"
                yield Prediction(scan.files[0], None, "failed", reason, name=scan.name)
    finally:
        if connect:
            ray.shutdown()
