"""The baselines to beat: multi-task pre-training with fine-tuning of all or of the head, and training from scratch."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from medmeta.episode import Episode, Examples, State
from medmeta.learners.base import MetaLearner
from medmeta.learners.inner import Objective
from medmeta.losses import dice_cross_entropy
from medmeta.networks import SegNet


class Transfer(MetaLearner):
    """Multi-task pre-training (Caruana 1997): one body, one output convolution for each task, then fine-tuning.

    Args:
        net: the network.
        tasks: classes of each training task; none for a network that is never trained.
        adapt_steps: fine-tuning steps (Adam) on a support set.
        adapt_rate: their step size.
    """

    name = "transfer"

    def __init__(
        self,
        net: SegNet,
        *,
        tasks: Mapping[str, int] | None = None,
        adapt_steps: int = 30,
        adapt_rate: float = 1e-3,
    ) -> None:
        super().__init__(net)
        self.tasks, self.adapt_steps, self.adapt_rate = dict(tasks or {}), adapt_steps, adapt_rate
        # A dot would split the name of a parameter.
        self._slots = {task: f"task_{index}" for index, task in enumerate(self.tasks)}
        self.heads = nn.ModuleDict()
        for task, classes in self.tasks.items():
            grown = net.grow(1, classes)
            self.heads[self._slots[task]] = nn.ParameterDict(
                {f"head_{index}": grown[name].detach().clone() for index, name in enumerate(net.head_names)}
            )

    @property
    def options(self) -> dict[str, object]:
        return {"tasks": self.tasks, "adapt_steps": self.adapt_steps, "adapt_rate": self.adapt_rate}

    def task_parameters(self, task: str, channels: int) -> State:
        """The shared body with the output convolution of one training task.

        Raises:
            ValueError: the task was not among those the learner was built for.
        """
        if task not in self.tasks:
            raise ValueError(f"task {task!r}; required: one of {sorted(self.tasks)}")
        grown = self.net.grow(channels, self.tasks[task])
        return grown | {name: self._head(task, index) for index, name in enumerate(self.net.head_names)}

    @torch.no_grad()
    def settle_head(self) -> None:
        """Give the network's own head the mean background row and the mean foreground row of all tasks."""
        for index, name in enumerate(self.net.head_names):
            heads = [self._head(task, index) for task in self.tasks]
            rows = [torch.cat([head[:1], head[1:].mean(0, keepdim=True)]) for head in heads]
            self.net.get_parameter(name).copy_(torch.stack(rows).mean(0))

    def _head(self, task: str, index: int) -> nn.Parameter:
        return self.heads.get_parameter(f"{self._slots[task]}.head_{index}")

    def adapt(self, support: Examples) -> State:
        state = self._copied_start(support)
        return self._fine_tuned(state, lambda moved: dice_cross_entropy(self.net(support.image, moved), support.mask))

    @torch.no_grad()
    def _copied_start(self, support: Examples) -> State:
        start = self.start(support.channels, support.classes)
        return {name: tensor.detach().clone() for name, tensor in start.items()}

    def _fine_tuned(self, start: State, objective: Objective) -> State:
        moved = {name: tensor.requires_grad_() for name, tensor in start.items()}
        optimiser = torch.optim.Adam(moved.values(), lr=self.adapt_rate)
        with torch.enable_grad():
            for _ in range(self.adapt_steps):
                optimiser.zero_grad()
                objective(moved).backward()
                optimiser.step()
                # An autocast around this loop would go on with the weights as it cast them in the first step.
                torch.clear_autocast_cache()
        return {name: tensor.detach() for name, tensor in moved.items()}

    def query_logits(self, episode: Episode) -> Tensor:
        """Logits of the query under the training task's own output convolution: pre-training does not adapt."""
        return self.segment(episode.query.image, self.task_parameters(episode.task, episode.query.channels))

    def meta_loss(self, episode: Episode) -> Tensor:
        """Supervised loss over support and query alike."""
        parameters = self.task_parameters(episode.task, episode.query.channels)
        image = torch.cat([episode.support.image, episode.query.image])
        mask = torch.cat([episode.support.mask, episode.query.mask])
        return dice_cross_entropy(self.segment(image, parameters), mask)


class Linear(Transfer):
    """Linear probing: pre-training as in `Transfer`, then fine-tuning of the output convolution alone.

    The body stays as it is, so its features of the support are computed once, and many steps cost little. Arguments as
    of `Transfer`.
    """

    name = "linear"

    def __init__(
        self,
        net: SegNet,
        *,
        tasks: Mapping[str, int] | None = None,
        adapt_steps: int = 100,
        adapt_rate: float = 1e-2,
    ) -> None:
        super().__init__(net, tasks=tasks, adapt_steps=adapt_steps, adapt_rate=adapt_rate)

    def adapt(self, support: Examples) -> State:
        state = self._copied_start(support)
        features = self.net.embed(support.image, state)
        head = {name: state[name] for name in self.net.head_names}
        return state | self._fine_tuned(
            head, lambda moved: dice_cross_entropy(self.net.classify(features, moved), support.mask)
        )


class Scratch(Transfer):
    """From scratch: the same network and fine-tuning, never trained before."""

    name = "scratch"

    def __init__(self, net: SegNet, *, adapt_steps: int = 30, adapt_rate: float = 1e-3) -> None:
        super().__init__(net, adapt_steps=adapt_steps, adapt_rate=adapt_rate)

    @property
    def options(self) -> dict[str, object]:
        return {"adapt_steps": self.adapt_steps, "adapt_rate": self.adapt_rate}
