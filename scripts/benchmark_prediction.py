"""Scans per hour of `medmeta predict` beside the plain MONAI pipeline, with the same weights, windows and overlap.

    python scripts/benchmark_prediction.py MODEL FOLDER --scans 4
    python scripts/benchmark_prediction.py MODEL FOLDER --scans 4 --resample 1 1 2

The plain pipeline is LoadImage, Orientation, Spacing, intensities, sliding_window_inference of probabilities, Invert,
argmax and SaveImage, as MONAI's tutorials write it; of a model that has a network of slices too it runs the one of
volumes. Ways take turns, so that other work on the machine slows all of them; the median round counts. Dice is between
the label maps of the plain pipeline and of each way on the working grid alone; with an overview, between those with and
without focus, poses or carried labels. `medmeta predict` chooses among the first ways what the machine has. Public sets
are often coarser than what scanners give: `--resample` brings scans to a voxel size in mm first.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from medmeta.data.volume import Volume, is_volume, read_labels
from medmeta.prediction import predict
from medmeta.segmenter import Segmenter, load


def plain(segmenter: Segmenter, scans: list[Path], out: Path, windows: int) -> None:
    """The MONAI pipeline, one scan after the other."""
    from monai import transforms as mt
    from monai.data import MetaTensor, decollate_batch, list_data_collate
    from monai.inferers import sliding_window_inference

    def intensities(image: MetaTensor) -> MetaTensor:
        grid = Volume(image.as_tensor().float(), image.affine.double())
        scaled = segmenter.preprocess.forward(grid).data
        return MetaTensor(scaled, meta=image.meta, applied_operations=image.applied_operations)

    def probabilities(image: torch.Tensor) -> torch.Tensor:
        return segmenter.model.learner.segment(image, segmenter.state).softmax(dim=1)

    before = mt.Compose(
        [
            mt.LoadImaged("image", ensure_channel_first=True),
            mt.Orientationd("image", axcodes="RAS", labels=None),
            # In float32, as medmeta: in MONAI's float64 the resampled scan differs by up to 3e-3 deviations.
            mt.Spacingd("image", pixdim=segmenter.preprocess.spacing, mode="bilinear", dtype=torch.float32),
            mt.Lambdad("image", intensities),
        ]
    )
    after = mt.Compose(
        [
            mt.Invertd("pred", before, "image", nearest_interp=False, to_tensor=True),
            mt.AsDiscreted("pred", argmax=True),
            mt.MapLabelValued("pred", range(1 + len(segmenter.labels)), [0, *segmenter.labels]),
            mt.SaveImaged("pred", output_dir=out, output_postfix="", separate_folder=False, print_log=False),
        ]
    )
    for scan in scans:
        batch = list_data_collate([before({"image": scan})])
        with torch.no_grad():
            batch["pred"] = sliding_window_inference(
                batch["image"], segmenter.patch, windows, probabilities, 0.25, mode="gaussian", padding_mode="replicate"
            )
        for item in decollate_batch(batch):
            after(item)


def resampled(scans: list[Path], spacing: list[float], out: Path) -> list[Path]:
    """The same scans with voxels of another size, in a folder of their own."""
    from monai import transforms as mt

    steps = [
        mt.LoadImage(ensure_channel_first=True),
        mt.Spacing(spacing, mode="bilinear", dtype=torch.float32),
        mt.SaveImage(out, output_postfix="", output_dtype="int16", separate_folder=False, print_log=False),
    ]
    made = mt.Compose(steps)
    for scan in scans:
        print(f"{scan.name}: {' x '.join(map(str, made(scan).shape[1:]))} voxels")
    return [out / scan.name for scan in scans]


def dice(a: torch.Tensor, b: torch.Tensor, label: int) -> float:
    both, either = int(((a == label) & (b == label)).sum()), int((a == label).sum() + (b == label).sum())
    return 2 * both / either if either else 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--scans", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--windows", type=int, default=4, help="sw_batch_size of the plain pipeline")
    parser.add_argument("--resample", type=float, nargs=3, metavar="MM")
    parser.add_argument("--one-grid", action="store_true", help="leave out the ways that use the overview")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        measure(options, Path(folder))


def measure(options: argparse.Namespace, folder: Path) -> None:
    scans = [path for path in sorted(options.folder.iterdir()) if is_volume(path)][: options.scans]
    if options.resample:
        scans = resampled(scans, options.resample, folder / "scans")
    # Both ways do the same: one network on one grid, the most probable class, all its pieces.
    carrying = load(options.model)
    whole = replace(carrying, atlases=())
    volume = next(view for view in whole.views if view.learner.net.spatial_dims == 3)
    segmenter = replace(volume, single=(), overview=None, best_dice=False)
    upright = partial(predict, rotations=False)
    ways: dict[str, Callable[[Path], object]] = {
        "plain MONAI": lambda out: plain(segmenter, scans, out, options.windows),
        "float32": lambda out: upright(segmenter, scans, out),
        "bfloat16": lambda out: upright(segmenter, scans, out, precision=torch.bfloat16),
    }
    if importlib.util.find_spec("openvino"):
        ways["openvino"] = lambda out: upright(segmenter, scans, out, backend="openvino")
        ways["openvino bfloat16"] = lambda out: upright(
            segmenter, scans, out, backend="openvino", precision=torch.bfloat16
        )
    if whole.overview and not options.one_grid:
        ways["overview"] = lambda out: upright(whole, scans, out)
        ways["overview, focus"] = lambda out: upright(whole, scans, out, focus=True)
        if whole.preprocess.thick:
            ways["overview, poses"] = lambda out: predict(whole, scans, out)
        if carrying.atlases:
            ways["overview, carried"] = lambda out: upright(carrying, scans, out)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.rounds):
        for name, run in ways.items():
            shutil.rmtree(folder / name, ignore_errors=True)
            (folder / name).mkdir()
            started = time.perf_counter()
            run(folder / name)
            seconds[name].append(time.perf_counter() - started)
    print(f"{len(scans)} scans, {options.threads} threads, median of {options.rounds} rounds")
    print(f"{'way':<20}{'s/scan':>8}{'times':>7}{'Dice, least':>13}{'mean':>9}{'labels alike':>14}")
    for name in ways:
        scores, alike = [], []
        beside = "overview" if name.startswith("overview") else "plain MONAI"
        for scan in scans:
            a, b = (read_labels(folder / way / scan.name).data for way in (beside, name))
            scores += [dice(a, b, label) for label in segmenter.labels]
            alike.append(float((a == b).float().mean()))
        median = statistics.median(seconds[name])
        print(
            f"{name:<20}{median / len(scans):>8.2f}{statistics.median(seconds['plain MONAI']) / median:>7.2f}"
            f"{min(scores):>13.5f}{statistics.mean(scores):>9.5f}{statistics.mean(alike):>14.6f}"
        )


if __name__ == "__main__":
    main()
