"""From windows to a label map in bounded memory: probabilities exist only for the band that windows still touch.

A window predictor is a function from windows (N, C, *patch) to probabilities (N, 1+K, *patch), and nothing here knows
more of a network. An ensemble, or an average over flips, is another such function around one.
"""

from __future__ import annotations

import copy
import importlib.util
import itertools
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from medmeta.errors import InputError

if TYPE_CHECKING:
    from medmeta.episode import State
    from medmeta.learners import MetaLearner
    from medmeta.networks import SegNet

Predictor = Callable[[Tensor], Tensor]
"""Windows (N, C, *patch) -> probabilities (N, 1+K, *patch), float32."""

Band = tuple[int, Tensor]
"""Number of the first row along the first axis, and probabilities (1+K, rows, Y, Z)."""

BATCH = 2
"""Windows given to the network at a time. Torch convolves one alone by a slow path; more than two gain nothing."""

SLAB_VOXELS = 2**21
"""Voxels of the label map that are made at a time."""

LEAST = 1e-3
"""Added to probabilities that are multiplied, so that none can veto the others."""

SEEN_FROM = 0.05
"""Probability of foreground from which an overview makes the windows there be segmented."""

SCORE_BYTES = 64 * 2**20
"""Interpolated probabilities that are held at a time."""

LEVELS = 9
"""Of how easily a class wins over the background, see `levels_of`."""

LEVEL_STEP = math.sqrt(2.0)
"""By how much less the background counts from one level to the next."""


def torch_predictor(
    learner: MetaLearner, state: State, *, device: torch.device | str = "cpu", precision: torch.dtype = torch.float32
) -> Predictor:
    """The network as it is, on `device`; bfloat16 runs it under autocast. A 2-D network takes slices."""
    device = torch.device(device)
    learner = learner.to(device).eval()
    state = {name: tensor.to(device) for name, tensor in state.items()}

    @torch.inference_mode()
    def predict(image: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == torch.bfloat16):
            logits = _by_slices(partial(learner.segment, state=state), image.to(device), learner.net)
        return logits.float().softmax(dim=1)

    return predict


def _by_slices(segment: Callable[[Tensor], Tensor], image: Tensor, net: SegNet) -> Tensor:
    """Logits (N, 1+K, *patch); a 2-D network takes the slices one by one."""
    if net.spatial_dims == 3:
        return segment(image)
    across = 2 + net.across
    logits = segment(image.movedim(across, 1).flatten(0, 1))
    return logits.unflatten(0, (image.shape[0], image.shape[across])).movedim(1, across)


def openvino_predictor(
    learner: MetaLearner, state: State, shape: Sequence[int], *, precision: torch.dtype = torch.float32
) -> Predictor:
    """The same network compiled by OpenVINO for the CPU, for windows of one shape (1, C, *patch).

    Raises:
        InputError: OpenVINO is not installed, or the state is not one of network weights.
    """
    if learner.net.input_weight not in state:
        required, remedy = "a state of network weights", "Use the backend torch, or adapt with --method finetune."
        raise InputError("backend openvino", f"a state of {', '.join(sorted(state)[:3])}", required, remedy)
    try:
        import openvino
        from openvino.frontend import FrontEndManager
        from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder
    except ImportError as error:
        required, remedy = "the package openvino", "pip install 'medmeta[openvino]'"
        raise InputError("backend openvino", "no package openvino", required, remedy) from error

    # OpenVINO traces, and nothing that replaces parameters for a call can be traced: a copy of the net holds them.
    net = copy.deepcopy(learner.net).to("cpu").eval()
    for name in (*net.body_names, *net.head_names):
        owner, _, last = name.rpartition(".")
        setattr(net.get_submodule(owner), last, torch.nn.Parameter(state[name].cpu(), requires_grad=False))

    class Network(torch.nn.Module):
        def forward(self, image: Tensor) -> Tensor:
            return _by_slices(net, image, net).softmax(dim=1)

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # windows have one shape: its branches may be fixed
        warnings.simplefilter("ignore", FutureWarning)  # torch means to drop tracing; OpenVINO reads it best
        # Not openvino.convert_model, which reports to its makers that it was used.
        front = FrontEndManager().load_by_framework("pytorch")
        traced = TorchScriptPythonDecoder(Network(), example_input=torch.zeros(tuple(shape)))
        model = front.convert(front.load(traced))
        model.reshape(list(shape))
    hint = "bf16" if precision == torch.bfloat16 else "f32"
    compiled = openvino.compile_model(
        model, "CPU", {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    )

    def predict(image: Tensor) -> Tensor:
        return torch.cat([torch.from_numpy(compiled(window.numpy(force=True))[0].copy()) for window in image.split(1)])

    return predict


def fastest_precision(device: torch.device | str) -> torch.dtype:
    """bfloat16 where the processor multiplies it natively, else float32."""
    if torch.device(device).type == "cpu":
        # torch.cpu.get_capabilities came after torch 2.8; without it nothing is known and nothing is risked.
        found: Mapping[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
        native = any(found.get(name) for name in ("avx512_bf16", "amx_bf16"))
    else:
        native = getattr(torch.get_device_module(device), "is_bf16_supported", lambda: False)()
    return torch.bfloat16 if native else torch.float32


def fastest_backend(learner: MetaLearner, state: State, device: torch.device | str) -> str:
    """The name "openvino" where that is installed and can run this network on this device, else "torch"."""
    able = torch.device(device).type == "cpu" and learner.net.input_weight in state
    return "openvino" if able and importlib.util.find_spec("openvino") else "torch"


def timed(predictor: Predictor, seconds: dict[str, float]) -> Predictor:
    """The same predictor, its time added to `seconds["network"]`."""

    def predict(image: Tensor) -> Tensor:
        started = time.perf_counter()
        probabilities = predictor(image)
        seconds["network"] = seconds.get("network", 0.0) + time.perf_counter() - started
        return probabilities

    return predict


def sliding_bands(
    image: Tensor,
    patch: Sequence[int],
    predictor: Predictor,
    *,
    overlap: float = 0.25,
    context: int = 0,
    wanted: Callable[[Sequence[slice]], bool] | None = None,
    classes: int = 0,
) -> Iterator[Band]:
    """Class probabilities of an image, band by band along the first axis, as soon as no window touches a band again.

    The windows, their order, their Gaussian weights and the borders of small images are those of MONAI's
    `sliding_window_inference(mode="gaussian", padding_mode="replicate")`, to the last bit. A window that is constant,
    such as the air around a patient, gives the same each time and is run once for each value.

    Args:
        image: (C, X, Y, Z) on the device where the bands are to lie.
        patch: sides of the window.
        predictor: see `Predictor`.
        overlap: share of a window that the next one covers again, 0 <= overlap < 1.
        context: rows of the band before that are given again in front of each band.
        wanted: whether a window, as slices of the image, is to be segmented; one that is not is background. None: all.
        classes: K, to be given with `wanted`.

    Yields:
        The number of the band's first row, and a view (1+K, rows, Y, Z) that holds until the next band is asked for.
    """
    from monai.data.utils import compute_importance_map, dense_patch_slices

    if not 0 <= overlap < 1:
        raise ValueError(f"overlap={overlap}; required: 0 <= overlap < 1")
    margins = [max(side - size, 0) for side, size in zip(patch, image.shape[1:], strict=True)]
    inner = tuple(slice(margin // 2, margin // 2 + size) for margin, size in zip(margins, image.shape[1:], strict=True))
    if any(margins):
        sides = [side for margin in reversed(margins) for side in (margin // 2, margin - margin // 2)]
        image = F.pad(image, sides, mode="replicate")
    shape = image.shape[1:]
    steps = [
        side if side == size else max(1, int(side * (1 - overlap))) for side, size in zip(patch, shape, strict=True)
    ]
    windows = dense_patch_slices(shape, patch, steps)
    weight = compute_importance_map(tuple(patch), mode="gaussian", device=image.device, dtype=torch.float32)
    predict = _remembering_constants(predictor)
    starts = sorted({int(window[0].start) for window in windows})
    context = context if len(starts) > 1 else 0
    rows = context + patch[0]
    count = torch.zeros(rows, *shape[1:], device=image.device)
    # Without `wanted`, the first windows tell how many classes there are.
    total = torch.zeros(1 + classes if wanted else 0, *count.shape, device=image.device)

    def is_wanted(window: Sequence[slice]) -> bool:
        ends = zip(window, inner, strict=True)
        return wanted is None or wanted(
            [slice(max(0, w.start - i.start), min(w.stop, i.stop) - i.start) for w, i in ends]
        )

    for first, following in zip(starts, [*starts[1:], shape[0]], strict=True):
        run: list[tuple[slice, ...]] = []
        empty: list[tuple[slice, ...]] = []
        for window in windows:
            if window[0].start == first:
                (run if is_wanted(window) else empty).append(window)
        for _, *place in empty:
            total[0][(slice(context, None), *place)] += weight
            count[(slice(context, None), *place)] += weight
        for start in range(0, len(run), BATCH):
            some = run[start : start + BATCH]
            made = predict(torch.stack([image[(slice(None), *window)] for window in some])).to(image.device)
            if not len(total):
                total = torch.zeros(made.shape[1], *count.shape, device=image.device)
            for (_, *place), probabilities in zip(some, made, strict=True):
                total[(slice(None), slice(context, None), *place)] += probabilities * weight
                count[(slice(context, None), *place)] += weight
            # Of many classes they are large, and would stay until the next ones are made.
            del made, probabilities
        done = following - first
        total[:, context : context + done] /= count[context : context + done]
        before = min(context, first)
        band = total[:, context - before : context + done]
        # A margin along the first axis means a single band.
        yield first - before, band[(slice(None), inner[0] if margins[0] else slice(None), *inner[1:])]
        for row in range(rows):
            for buffer in (total, count.unsqueeze(0)):
                buffer[:, row] = buffer[:, row + done] if row + done < rows else 0.0


def _remembering_constants(predictor: Predictor) -> Predictor:
    known: dict[tuple[float, ...], Tensor] = {}

    def predict(windows: Tensor) -> Tensor:
        low, high = (limits.tolist() for limits in torch.aminmax(windows.flatten(2), dim=2))
        if all(a != b for a, b in zip(low, high, strict=True)):
            return predictor(windows)
        made = []
        for window, a, b in zip(windows.split(1), low, high, strict=True):
            if a == b and tuple(a) not in known:
                known.clear()  # air has one value; many values are no empty space
                known[tuple(a)] = predictor(window)
            made.append(known[tuple(a)] if a == b else predictor(window))
        return torch.cat(made)

    return predict


def collect(bands: Iterable[Band], shape: Sequence[int]) -> Tensor:
    """All bands as one tensor (1+K, X, Y, Z) on the CPU; `shape` is (X, Y, Z)."""
    whole = torch.empty(0, *shape)
    for first, rows in bands:
        if not len(whole):
            whole = torch.empty(len(rows), *shape)
        whole[:, first : first + rows.shape[1]] = rows
    return whole


@dataclass(frozen=True, eq=False)
class Layer:
    """Probabilities of another origin, to be mixed into those of a network.

    Args:
        probabilities: (1+K, *S) on a grid that may be coarser and has the same axes; interpolated linearly.
        indices: (4, 4) float64, from voxel indices of the network's grid to those of this one.
        share: their weight, 0 to 1.
    """

    probabilities: Tensor
    indices: Tensor
    share: float


def blend(bands: Iterable[Band], shape: Sequence[int], layers: Sequence[Layer], context: int = 0) -> Iterator[Band]:
    """Bands mixed with one layer after the other: weighted geometric mean, summing to one; cut into thinner bands.

    Args:
        bands: as of `sliding_bands`.
        shape: (X, Y, Z) of the grid of the bands.
        layers: what is mixed in.
        context: rows of the band before that are given again in front of each band, as `bands` do.
    """
    places = [_places(layer, shape) for layer in layers]
    done = 0
    for first, rows in bands:
        seen = [_at_rows(layer, each, first, rows) for layer, each in zip(layers, places, strict=True)]
        slab = max(1, SCORE_BYTES // (8 * len(rows) * rows.shape[2] * rows.shape[3]))
        last = first + rows.shape[1]
        for start in range(done, last, slab):
            place = slice(max(0, start - context) - first, min(start + slab, last) - first)
            mixed = rows[:, place]
            for layer, at in zip(layers, seen, strict=True):
                mixed = (mixed + LEAST).pow_(1.0 - layer.share).mul_(at(place).add_(LEAST).pow_(layer.share))
                mixed /= mixed.sum(dim=0)
            yield first + place.start, mixed
        done = last


def _places(layer: Layer, shape: Sequence[int]) -> list[Tensor]:
    """Where the voxels of a grid lie in a layer, along each axis."""
    scales, offsets = layer.indices.diag().tolist(), layer.indices[:, 3].tolist()
    return [
        (scale * torch.arange(count) + offset).clamp(0, size - 1)
        for scale, offset, count, size in zip(scales, offsets, shape, layer.probabilities.shape[1:], strict=False)
    ]


def _at_rows(layer: Layer, places: Sequence[Tensor], first: int, rows: Tensor) -> Callable[[slice], Tensor]:
    """Gives the layer at some rows of a band; `places` as of `_places`."""
    there = [places[0][first : first + rows.shape[1]], *places[1:]]
    lowest, highest = int(there[0].min()), math.ceil(float(there[0].max()))
    part = layer.probabilities[:, lowest : highest + 1].to(rows.device, rows.dtype).unsqueeze(0)
    there[0] = there[0] - lowest
    # grid_sample counts from -1 to 1, and the last axis first.
    scaled = [2.0 * at / max(1, size - 1) - 1.0 for at, size in zip(there, part.shape[2:], strict=True)]

    def at(place: slice) -> Tensor:
        grid = torch.stack(torch.meshgrid(scaled[0][place], *scaled[1:], indexing="ij")[::-1], dim=-1).to(part)
        return F.grid_sample(part, grid.unsqueeze(0), padding_mode="border", align_corners=True)[0]

    return at


def seen_by(overview: Tensor, indices: Tensor) -> Callable[[Sequence[slice]], bool]:
    """Whether an overview gives foreground the probability `SEEN_FROM` anywhere in a box. Arguments as of `Layer`."""
    foreground = overview[0] <= 1.0 - SEEN_FROM

    def seen(box: Sequence[slice]) -> bool:
        place = []
        for axis, (side, size) in enumerate(zip(box, foreground.shape, strict=True)):
            low, high = (
                float(indices[axis, axis]) * at + float(indices[axis, 3]) for at in (side.start, side.stop - 1)
            )
            first = min(max(0, math.floor(low)), size - 1)
            place.append(slice(first, max(first, math.ceil(high)) + 1))
        return bool(foreground[tuple(place)].any())

    return seen


def index_map(working: Tensor, scan: Tensor) -> Tensor:
    """(4, 4) float64 from voxel indices of the scan to those of the working grid, given their affines."""
    return torch.linalg.solve(working, scan)


def context_rows(indices: Tensor, shape: Sequence[int]) -> int:
    """Rows of a finished band that a scan of `shape` can still ask for. One, unless its grid is sheared.

    Args:
        indices: as of `index_map`.
    """
    axis = int(indices[0, :3].abs().argmax())
    tilt = sum(float(indices[0, k].abs()) * (shape[k] - 1) for k in range(3) if k != axis)
    return math.ceil(tilt - 1e-6) + 1


def levels_of(scores: Tensor) -> tuple[Tensor, Tensor]:
    """The most probable foreground class 1..K, and the level from which on it wins over the background.

    At level L the background's probability is divided by `LEVEL_STEP` ** L: at level 0 the most probable of all classes
    wins. `LEVELS` stands for a background that wins at every level.

    Args:
        scores: (1+K, *S).

    Returns:
        Two int16 tensors (*S).
    """
    highest, best = scores[1:].max(dim=0)
    level = torch.zeros_like(best, dtype=torch.int16)
    for number in range(LEVELS):
        level += scores[0] * LEVEL_STEP**-number >= highest
    return (best + 1).to(torch.int16), level


def _code(scores: Tensor) -> Tensor:
    """Class and level in one number, int16; 0 where the background always wins."""
    best, level = levels_of(scores)
    return torch.where(level < LEVELS, best * LEVELS + level, 0)


def restore_labels(
    bands: Iterable[Band],
    shape: Sequence[int],
    indices: Tensor,
    like: Sequence[int],
    values: Sequence[int],
    levels: Callable[[], Sequence[int]] | None = None,
) -> Tensor:
    """The most probable class at every voxel of the scan, or by `levels`; probabilities are interpolated linearly.

    Where all eight voxels around a point agree on the class, and on its level, so does every mixture of them: only the
    voxels of the scan that lie between classes are interpolated.

    Args:
        bands: as of `sliding_bands` with `context_rows` rows of context.
        shape: (X, Y, Z) of the working grid.
        indices: as of `index_map`.
        like: (X, Y, Z) of the scan.
        values: label value of each class, the background first.
        levels: gives, once all bands were seen, the level of each foreground class (`levels_of`); 0 for all when None.

    Returns:
        (1, X, Y, Z) int32.
    """
    labels = torch.empty(tuple(like), dtype=torch.int32)
    between = [bool((row - row.round()).abs().max() > 1e-6) for row in indices[:3]]
    decide = _code if levels else _most_probable
    axis = int(indices[0, :3].abs().argmax())
    across = [k for k in range(3) if k != axis]
    slab = max(1, SLAB_VOXELS // (like[across[0]] * like[across[1]]))
    # The last row that each slice of the scan asks for, slices in the order in which bands come.
    slices = torch.arange(like[axis])
    if indices[0, axis] < 0:
        slices = slices.flip(0)
    tilt = sum(max(0.0, float(indices[0, k])) * (like[k] - 1) for k in across)
    reach = (indices[0, axis] * slices + indices[0, 3] + tilt).clamp(0, shape[0] - 1).add(1e-6).floor() + 1
    asks = reach.clamp(max=shape[0] - 1).tolist()
    made = 0
    for first, rows in bands:
        cells = _agreed(decide(rows), between)
        stop = made
        while stop < len(asks) and asks[stop] < first + rows.shape[1]:
            stop += 1
        for start in range(made, stop, slab):
            part = slices[start : min(start + slab, stop)]
            low, high = int(part.min()), int(part.max()) + 1
            ranges = [range(low, high) if k == axis else range(like[k]) for k in range(3)]
            place = tuple(slice(r.start, r.stop) for r in ranges)
            labels[place] = _slab(rows, cells, first, shape, indices, ranges, between, decide)
        made = stop
    table = torch.tensor(values, dtype=torch.int32)
    if levels:
        chosen = torch.tensor([0, *levels()]).unsqueeze(1)
        table = torch.where(torch.arange(LEVELS) <= chosen, table.unsqueeze(1), values[0]).flatten()
    if not torch.equal(table, torch.arange(len(table))):
        for part in labels.split(slab):
            part.copy_(table[part])
    return labels.unsqueeze(0)


def _most_probable(scores: Tensor) -> Tensor:
    return scores.max(dim=0).indices.to(torch.int16)  # several times as fast as argmax, the same at ties


def _agreed(classes: Tensor, between: Sequence[bool]) -> Tensor:
    """(X, Y, Z): the class of the cell that begins at each voxel, -1 where its corners differ.

    Args:
        between: axes along which points lie between voxels; along the others a cell is one voxel thick.
    """
    agreed = classes
    for axis in (axis for axis in range(3) if between[axis]):
        size = agreed.shape[axis]
        following = torch.cat([agreed.narrow(axis, 1, size - 1), agreed.narrow(axis, size - 1, 1)], dim=axis)
        agreed = torch.where(agreed == following, agreed, -1)
    return agreed


def _slab(
    rows: Tensor,
    cells: Tensor,
    first: int,
    shape: Sequence[int],
    indices: Tensor,
    ranges: Sequence[range],
    between: Sequence[bool],
    decide: Callable[[Tensor], Tensor],
) -> Tensor:
    """What is decided for a box of the scan's voxels: (X, Y, Z) int16 on the CPU."""
    lower, share = [], []
    for row, size, fraction in zip(indices[:3], shape, between, strict=True):
        # A grid that is not tilted varies along one axis only, and its coordinates stay that small.
        point = row[3].reshape(1, 1, 1)
        for k, numbers in enumerate(ranges):
            if abs(float(row[k])) * max(1, len(numbers) - 1) > 1e-9:
                along = [1, 1, 1]
                along[k] = -1
                point = point + row[k] * torch.arange(numbers.start, numbers.stop).reshape(along)
            elif len(numbers):
                point = point + row[k] * numbers.start
        point = point.clamp(0, size - 1)
        below = point.floor().clamp(max=max(size - 2, 0)) if fraction else point.round()
        lower.append(below.long().to(rows.device))
        share.append((point - below).float().to(rows.device))
    lower[0] = lower[0] - first
    box = tuple(map(len, ranges))
    classes = cells[lower[0], lower[1], lower[2]].expand(box).contiguous()
    mixed = (classes < 0).nonzero()
    for some in mixed.split(max(1, SCORE_BYTES // (4 * len(rows)))):
        at = tuple(some.T)
        corner = [number.expand(box)[at] for number in lower]
        weight = [number.expand(box)[at] for number in share]
        scores = torch.zeros(len(rows), len(some), device=rows.device)
        for step in itertools.product(*((0, 1) if inner else (0,) for inner in between)):
            product = math.prod((w if up else 1 - w) for up, w in zip(step, weight, strict=True))
            i, j, k = (
                (number + up).clamp(max=size - 1) for number, up, size in zip(corner, step, rows.shape[1:], strict=True)
            )
            scores += product * rows[:, i, j, k]
        classes[at] = decide(scores)
    return classes.cpu()
