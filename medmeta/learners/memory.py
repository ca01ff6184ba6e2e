"""Model-based meta-learners: a network that reads a support and keeps what it needs. Nothing is fitted to a task."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from medmeta.episode import IGNORED, Examples, State
from medmeta.learners.base import MetaLearner
from medmeta.learners.pooling import cell_means, lower_absent, wide
from medmeta.losses import dice_cross_entropy
from medmeta.networks import SegNet, seeded


class _Reader(MetaLearner):
    """Turns the features of a support into a state, and features of a query with that state into logits."""

    @abstractmethod
    def memorise(self, features: Tensor, support: Examples) -> State:
        """The state from features (N, F, *S) of the support's images, in float32 or wider."""

    @abstractmethod
    def answer(self, features: Tensor, state: State) -> Tensor:
        """Logits (N, V, 1+K) of the features (N, V, F) of the V voxels of each query image."""

    def adapt(self, support: Examples) -> State:
        features = self.features(support.image)
        # Autocast would multiply in bfloat16, whose 8 bits are too few for similarities and gradients.
        with torch.autocast(features.device.type, enabled=False):
            return self.memorise(wide(features), support)

    def recall(self, image: Tensor, state: State) -> Tensor:
        features = self.features(image)
        with torch.autocast(features.device.type, enabled=False):
            logits = self.answer(wide(features).flatten(2).mT, state)
        return logits.mT.unflatten(2, image.shape[2:])


class MemoryAugmented(_Reader):
    """Memory-augmented network (Santoro, Bartunov, Botvinick, Wierstra and Lillicrap, ICML 2016).

    adapt:   the support is read as a sequence; every element is looked up (eqs. 2-3) and written (eqs. 5-8)
    recall:  every voxel of the query looks up its own features (eqs. 2-4); logits are the log of the labels it finds

    The paper's sequence holds one image after the other. Here an element is what one class fills of one cell of a grid:
    examples in order, their cells in raster order, the classes within a cell from the largest to the smallest. A row of
    the memory is the key of an element, a learned linear map of its mean features, followed by its one-hot label: the
    label stands in the memory itself, so classes may have any names. The paper writes a label one step late, where the
    step before has read; here it comes with its key, and is written where that key has just been read. The body takes
    the place of the recurrent controller. The softmax of eq. 3 has a learned sharpness, as in the Neural Turing
    Machine (Graves 2014, eq. 5).

    Args:
        net: the network.
        cells: of the grid along each axis.
        slots: rows of the memory.
        key_width: width of a key.
        decay: gamma of eq. 5, by which the usage of a row fades at every step.
    """

    name = "memory_augmented"
    sequential = True

    def __init__(
        self, net: SegNet, *, cells: int = 3, slots: int = 128, key_width: int = 32, decay: float = 0.95
    ) -> None:
        super().__init__(net)
        if min(cells, slots, key_width) < 1 or not 0 <= decay < 1:
            raise ValueError(
                f"cells={cells}, slots={slots}, key_width={key_width}, decay={decay}; "
                "required: at least 1 cell, 1 slot and a key of width 1, 0 <= decay < 1"
            )
        self.cells, self.slots, self.key_width, self.decay = cells, slots, key_width, decay
        with seeded(0):
            self.key = nn.Linear(net.features, key_width, bias=False)
        self.sharpness = nn.Parameter(torch.tensor(15.0))
        self.gate = nn.Parameter(torch.tensor(-1.0))

    @property
    def options(self) -> dict[str, object]:
        return {"cells": self.cells, "slots": self.slots, "key_width": self.key_width, "decay": self.decay}

    def memorise(self, features: Tensor, support: Examples) -> State:
        rows = self._sequence(features, support)
        memory = rows.new_zeros(self.slots, rows.shape[1])
        usage = rows.new_zeros(self.slots)
        for row in rows:
            reading = read(memory, row[: self.key_width], self.sharpness)
            memory, usage = write(memory, usage, reading, row, self.gate, self.decay)
        return {"memory": memory}

    def answer(self, features: Tensor, state: State) -> Tensor:
        memory = state["memory"]
        found = read(memory, self._keys(features), self.sharpness) @ memory[:, self.key_width :]
        share = found / found.sum(-1, keepdim=True).clamp(min=1e-6)
        return (share + 1e-6).log()

    def _keys(self, features: Tensor) -> Tensor:
        return functional.normalize(self.key(features), dim=-1, eps=1e-3)

    def _sequence(self, features: Tensor, support: Examples) -> Tensor:
        """Rows (T, key_width + 1 + K), one for every class in every cell that has it."""
        means, shares = cell_means(features, support, self.cells)
        # By size, and by content where sizes are equal: an order of the classes that does not know their numbers.
        order = means.sum(-1).argsort(dim=0, stable=True)
        order = order.gather(0, shares.gather(0, order).argsort(dim=0, descending=True, stable=True))
        labels = functional.one_hot(order, len(means)).to(means.dtype)
        keys = self._keys(means).gather(0, order.unsqueeze(-1).expand(-1, -1, self.key_width))
        rows = torch.cat([keys, labels], dim=-1).transpose(0, 1)
        return rows[shares.gather(0, order).T > 0]


def read(memory: Tensor, keys: Tensor, sharpness: Tensor) -> Tensor:
    """Read weights by content (Santoro 2016, eqs. 2-3): w_r(i) = softmax_i(sharpness * cos(key, M(i))).

    What is read is w_r @ M (eq. 4).

    Args:
        memory: (slots, width or more); a row begins with its key.
        keys: (..., width).
        sharpness: scalar.

    Returns:
        (..., slots). An empty row has cosine 0.
    """
    places = memory[:, : keys.shape[-1]]
    # A norm that is smooth at zero: rows that were never written have a gradient as well.
    lengths = (places.square().sum(-1) + 1e-6).sqrt() * (keys.square().sum(-1, keepdim=True) + 1e-6).sqrt()
    return (sharpness * (keys @ places.T) / lengths).softmax(dim=-1)


def write(
    memory: Tensor, usage: Tensor, reading: Tensor, row: Tensor, gate: Tensor, decay: float
) -> tuple[Tensor, Tensor]:
    """One step of least-recently-used access (Santoro 2016, eqs. 5-8, with one read head).

        w_lu = 1 for the row of least usage, else 0                      (eq. 6; the first of equals)
        w_w = sigmoid(gate) * w_r + (1 - sigmoid(gate)) * w_lu           (eq. 7)
        M = M without the row of least usage; M(i) += w_w(i) * row       (eq. 8)
        w_u = decay * w_u + w_r + w_w                                    (eq. 5)

    Args:
        memory: M, (slots, width).
        usage: w_u, (slots,).
        reading: w_r, (slots,), of the read that goes before this write.
        row: (width,), what is written.
        gate: alpha, scalar.
        decay: gamma.

    Returns:
        The memory and the usage after the step.
    """
    least = torch.zeros_like(usage).scatter(0, usage.argmin(dim=0, keepdim=True), 1.0)
    share = gate.sigmoid()
    weights = share * reading + (1 - share) * least
    memory = memory * (1 - least).unsqueeze(1) + torch.outer(weights, row)
    return memory, decay * usage + reading + weights


class Recurrent(_Reader):
    """A recurrent meta-learner: a gated recurrent unit reads the support and ends with the weights of the output.

    Hochreiter, Younger and Conwell (ICANN 2001) let a recurrent network be the learning algorithm; Ravi and Larochelle
    (ICLR 2017) and the LSTM baseline of Santoro (2016) do so with gates.

    adapt:   h_t = GRU(x_t, h_{t-1}); weights and bias of the output = linear(h_T)
    recall:  logits = weights * f(x) + bias, a 1x1 convolution over the features

    Each class has a recurrence of its own, with weights shared by all, so that a task may have any number of classes.
    x_t is one cell of a grid over one example (examples in order, cells in raster order): mean features of the class,
    mean features of all the rest, and the share of the cell that is the class. Background differs by its learned h_0.

    Args:
        net: the network.
        cells: of the grid along each axis.
        width: of the hidden state.
    """

    name = "recurrent"
    sequential = True

    def __init__(self, net: SegNet, *, cells: int = 2, width: int = 64) -> None:
        super().__init__(net)
        if min(cells, width) < 1:
            raise ValueError(f"cells={cells}, width={width}; required: at least 1 cell and a state of width 1")
        self.cells, self.width = cells, width
        with seeded(0):
            self.recurrence = nn.GRU(2 * net.features + 1, width)
            self.output = nn.Linear(width, net.features + 1)
        self.initial = nn.Parameter(torch.zeros(2, width))

    @property
    def options(self) -> dict[str, object]:
        return {"cells": self.cells, "width": self.width}

    def memorise(self, features: Tensor, support: Examples) -> State:
        means, shares = cell_means(features, support, self.cells)
        sums = means * shares.unsqueeze(-1)
        others = shares.sum(0) - shares
        rest = (sums.sum(0) - sums) / torch.where(others > 0, others, 1.0).unsqueeze(-1)
        sequence = torch.cat([means, rest, shares.unsqueeze(-1)], dim=-1).transpose(0, 1)
        # A first element of zeros: a support without a voxel that counts is a sequence as well.
        sequence = functional.pad(sequence[shares.any(0)], (0, 0, 0, 0, 1, 0))
        initial = self.initial[[0, *[1] * support.classes]]
        _, last = self.recurrence(sequence, initial.unsqueeze(0))
        return {"output": self.output(last[0]), "present": _present(support).to(features.dtype)}

    def answer(self, features: Tensor, state: State) -> Tensor:
        return lower_absent(_with_one(features) @ state["output"].mT, state["present"])


class MetaNetworks(_Reader):
    """Meta Networks (Munkhdalai and Yu, ICML 2017): fast weights, generated from the gradients of slow ones.

    adapt (algorithm 1), with h(Q) = relu(Q f(x)), slow weights Q and W:
        Q* = mean_i g(grad_Q L(W h(Q), y_i)) over the examples i of the support         task-level fast weights
        W*_i = g'(grad_W L(W h, y_i)), with h = relu(Q f(x)) + relu(Q* f(x))            example-level fast weights
        r_i = mean of h over the example                                                their keys
    recall:
        a = softmax(scale * cos(r, r_i)) with r = mean of h over the query;  W* = sum_i a_i W*_i;  logits = (W + W*) h

    Adding what slow and fast weights answer is the paper's layer augmentation. f is the body, Q a 1x1 convolution on
    its features and W the head, grown to the classes: its foreground rows start equal and their gradients tell them
    apart. Each query image, not each voxel, has a key, as in the paper. L is the segmentation loss for both kinds of
    weights. The generators g and g' are small networks that map every entry of a gradient by itself, prepared as by
    Andrychowicz et al. (NeurIPS 2016, appendix A); the mean takes the place of the paper's LSTM over the support, which
    has no order. A linear path in them starts as one step of gradient descent.

    Args:
        net: the network.
        width: hidden units of either generator.
        rate: step size of the gradient step as which the generators start.
    """

    name = "meta_networks"

    def __init__(self, net: SegNet, *, width: int = 20, rate: float = 0.1) -> None:
        super().__init__(net)
        if width < 1 or rate <= 0:
            raise ValueError(f"width={width}, rate={rate}; required: at least 1 hidden unit, a positive rate")
        self.width, self.rate = width, rate
        with seeded(0):
            self.task_generator = _Generator(width, rate)
            self.example_generator = _Generator(width, rate)
        # The identity: slow weights start as the plain network with rectified features.
        self.embedding = nn.Parameter(torch.eye(net.features, net.features + 1))
        self.scale = nn.Parameter(torch.tensor(10.0))

    @property
    def options(self) -> dict[str, object]:
        return {"width": self.width, "rate": self.rate}

    def memorise(self, features: Tensor, support: Examples) -> State:
        counted = (support.mask != IGNORED).flatten(1)
        weight = counted.unsqueeze(-1).to(features.dtype)
        features = features.flatten(2).mT
        head = self._head(support.classes)

        masks = support.mask.flatten(1).split(1)

        def losses(hidden: Tensor, head: Tensor) -> Tensor:
            logits = (_with_one(hidden) @ head.mT).mT.split(1)
            return torch.stack([dice_cross_entropy(*example) for example in zip(logits, masks, strict=True)])

        def by_embedding(embedding: Tensor) -> Tensor:
            return losses(_layer(features, embedding), head)

        # An example that is all ignored has no gradient, but would have fast weights.
        kept = counted.any(1)
        slopes = slopes_by_example(by_embedding, self.embedding, len(support))[kept]
        fast = self.task_generator(slopes).sum(0) / kept.sum().clamp(min=1)
        hidden = self._hidden(features, fast)
        slopes = slopes_by_example(partial(losses, hidden), head, len(support))[kept]
        keys = (hidden * weight).sum(1) / weight.sum(1).clamp(min=1.0)
        return {
            "embedding": fast,
            "keys": keys[kept],
            "heads": self.example_generator(slopes),
            "present": _present(support).to(features.dtype),
        }

    def answer(self, features: Tensor, state: State) -> Tensor:
        hidden = self._hidden(features, state["embedding"])
        attention = read(state["keys"], hidden.mean(1), self.scale)
        fast = torch.einsum("qn,nkf->qkf", attention, state["heads"])
        logits = _with_one(hidden) @ (self._head(fast.shape[1] - 1) + fast).mT
        return lower_absent(logits, state["present"])

    def _hidden(self, features: Tensor, fast: Tensor) -> Tensor:
        return _layer(features, self.embedding) + _layer(features, fast)

    def _head(self, classes: int) -> Tensor:
        """The slow weights and bias of the grown head, (1+K, F+1)."""
        grown = self.net.grow(1, classes)
        weight, bias = (grown[name] for name in self.net.head_names)
        return torch.cat([weight.flatten(1), bias.unsqueeze(1)], dim=1)


def slopes_by_example(losses: Callable[[Tensor], Tensor], weights: Tensor, count: int) -> Tensor:
    """The gradient of each example's loss with respect to weights that all examples share.

    The ambient grad mode decides whether the result can be differentiated.

    Args:
        losses: weights (count, *shape), one copy for each example -> losses (count,), each of its own copy.
        weights: shape.
        count: number of examples.

    Returns:
        (count, *shape).
    """
    meta = torch.is_grad_enabled()
    with torch.enable_grad():
        copies = (weights if meta else weights.detach()).expand(count, *weights.shape)
        if not copies.requires_grad:
            copies.requires_grad_()
        return torch.autograd.grad(losses(copies).sum(), copies, create_graph=meta)[0]


class _Generator(nn.Module):
    """Fast weights from a gradient of any shape, every entry by itself."""

    def __init__(self, width: int, rate: float) -> None:
        super().__init__()
        self.linear = nn.Parameter(torch.tensor(-rate))
        self.hidden, self.output = nn.Linear(2, width), nn.Linear(width, 1, bias=False)
        # Small, so that the gradient step leads at first.
        nn.init.normal_(self.output.weight, std=0.01)

    def forward(self, slope: Tensor) -> Tensor:
        # Magnitude and sign, p = 10 (Andrychowicz 2016, appendix A): below exp(-p) the second entry is exp(p) * slope.
        magnitude = slope.abs().clamp(min=math.exp(-10.0)).log() / 10.0
        sign = (slope * math.exp(10.0)).clamp(-1.0, 1.0)
        hidden = self.hidden(torch.stack([magnitude, sign], dim=-1)).tanh()
        return self.linear * slope + self.output(hidden).squeeze(-1)


def _with_one(features: Tensor) -> Tensor:
    """Features (..., F) with a one behind them, so that a matrix with F+1 columns holds weights and bias."""
    return functional.pad(features, (0, 1), value=1.0)


def _layer(features: Tensor, weights: Tensor) -> Tensor:
    """relu(W f + b) of features (N, V, F) with [W, b] in weights (..., F', F+1)."""
    return (_with_one(features) @ weights.mT).relu()


def _present(support: Examples) -> Tensor:
    """1 for each of the 1+K classes that has a voxel, else 0."""
    return torch.stack([(support.mask == label).any() for label in range(support.classes + 1)])
