"""The command line: a thin skin over the Python API.

Exit codes: 0 all well; 1 done, with problems listed; 2 the call is unusable, nothing was done.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from medmeta.arguments import (
    Backend,
    Background,
    Changes,
    Device,
    Engine,
    GpusPerWorker,
    ModelFolder,
    Out,
    Precision,
    Report,
    Seed,
    Targets,
    Workers,
    read_precision,
    read_targets,
    read_values,
    require_resumable,
    require_writable,
)
from medmeta.errors import InputError, MedmetaError

if TYPE_CHECKING:
    from rich.table import Table

    from medmeta.evaluate import Evaluation
    from medmeta.segmenter import Segmenter

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Segment a new organ from 1 to 10 labelled CT or MR scans. For research; not a medical device.",
)
console = Console()


@app.command()
def demo(out: Out = Path("medmeta-demo"), seed: Seed = 0) -> None:
    """The whole story on synthetic organs, in minutes: train, adapt to a new organ, segment, score.

    Example: medmeta demo --out story
    """
    import torch

    from medmeta.console import Reporter
    from medmeta.demo import Plan, run_demo
    from medmeta.report import dice_table

    # On the demo's small patches a second thread costs more than it brings.
    torch.set_num_threads(1)
    steps = {phase.name: phase.schedule.steps for phases in Plan().arms().values() for phase in phases}
    with Reporter(console) as reporter:
        result = run_demo(out, seed=seed, progress=reporter, trials=reporter.trial, log=reporter.row(steps))
    console.print(dice_table(result))
    _line(f"{result['seconds']['all']:.0f} s. Pictures, models and result.json are in {out}")
    _line(f"To look at every scan: {out / 'report' / 'index.html'}")


@app.command()
def phantoms(
    folder: Annotated[Path, typer.Argument(help="New folder for the tasks.")],
    tasks: Annotated[int, typer.Option(help="Number of organ tasks.")] = 6,
    cases: Annotated[int, typer.Option(help="Scans of each.")] = 8,
    seed: Seed = 0,
) -> None:
    """Write synthetic CT and MR organ tasks as Decathlon folders.

    Example: medmeta phantoms organs --tasks 4
    """
    from medmeta.console import Reporter
    from medmeta.data.phantoms import write_phantoms

    with Reporter(console) as show:
        made = write_phantoms(folder, tasks=tasks, cases=cases, seed=seed, progress=lambda d, n: show("writing", d, n))
    _line(f"{len(made)} tasks in {folder}")


@app.command()
def check(
    path: Annotated[Path, typer.Argument(help="A scan, a folder of scans, a task folder or a manifest.")],
    json: Annotated[Path | None, typer.Option("--json", help="Write the findings here too.")] = None,
    root: Annotated[Path | None, typer.Option("--root", help="Folder that holds the data of a manifest.")] = None,
    target: Targets = None,
    patients: Annotated[
        str | None, typer.Option("--patients", metavar="PATTERN", help="Its group is the patient of a case id.")
    ] = None,
    fix: Annotated[Path | None, typer.Option("--fix", help="New folder for copies of what can be repaired.")] = None,
) -> None:
    """Read every scan before hours are spent on it, and say what is wrong with each.

    Example: medmeta check Task04_Hippocampus --json findings.json
    """
    from medmeta.console import Reporter
    from medmeta.data.check import check_path, summarise
    from medmeta.data.check import fix as repair_all
    from medmeta.files import refuse_existing, write_json

    require_writable(json)
    if fix:
        refuse_existing(fix)
    scans = 0
    with Reporter(console) as reporter:

        def progress(done: int, total: int) -> None:
            nonlocal scans
            scans = total
            reporter("reading", done, total)

        findings = check_path(
            path, root=root, targets=read_targets(target), patient_pattern=patients, progress=progress
        )
    summary = summarise(findings, scans)
    for finding in findings:
        _line(f"{finding.severity}: {finding.file}: {finding.problem}: {finding.message}")
    if json:
        write_json(json, summary)
    for repair in repair_all(findings, fix) if fix else ():
        _line(f"{'repaired' if repair.copy else 'not repaired'}: {repair.file}: {repair.message}")
    for line in findings.advice():
        _line(line)
    _line(f"{scans} scans read, {summary['errors']} errors, {summary['warnings']} warnings")
    raise typer.Exit(1 if findings else 0)


@app.command()
def download(
    names: Annotated[list[str], typer.Argument(help="Data sets, such as Task04_Hippocampus, or manifests.")],
    to: Annotated[Path, typer.Option("--to", help="Data root; made when missing.")],
) -> None:
    """Fetch, check and unpack public data sets; goes on where it was stopped.

    Example: medmeta download Task04_Hippocampus --to data
    """
    from medmeta.console import Reporter
    from medmeta.data.download import download as fetch_set

    with Reporter(console) as reporter:
        for name in names:

            def progress(what: str, done: int, total: int, name: str = name) -> None:
                reporter(f"{what} {name} (MiB)", done >> 20, total >> 20)

            folder = fetch_set(name, to, progress=progress)
            _line(f"{name} is in {folder}")


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="YAML config; configs/ holds examples.")],
    out: Out,
    set_: Changes = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an unfinished run.")] = False,
    device: Device = "cpu",
) -> None:
    """Meta-train a model across organ tasks.

    Example: medmeta train configs/train_all.yaml --out runs/all
    """
    from medmeta.config import TrainConfig, load_config
    from medmeta.console import Reporter
    from medmeta.files import write_json
    from medmeta.recipe import train_recipe
    from medmeta.report import learning_curves

    settings = load_config(TrainConfig, config, set_ or ())
    recipe = settings.recipe()
    require_resumable(out, resume)
    with Reporter(console) as reporter:
        steps = {phase.name: phase.schedule.steps for phase in recipe.phases}
        model, history = train_recipe(
            recipe, out, device=device, tensorboard=True, progress=reporter, log=reporter.row(steps)
        )
    model.save(out / "model", overwrite=True)
    write_json(out / "history.json", history)
    learning_curves(history, out / "learning.png")
    _line(f"The model is in {out / 'model'}, its learning curve in {out / 'learning.png'}")


@app.command()
def adapt(
    model: ModelFolder,
    images: Annotated[Path, typer.Option("--images", help="Folder of 1 to 10 scans.")],
    labels: Annotated[Path, typer.Option("--labels", help="Label maps of the same names.")],
    out: Out,
    target: Targets = None,
    background: Background = None,
    modality: Annotated[str | None, typer.Option(help="CT or MR; else found from the scans.")] = None,
    unlabelled: Annotated[
        list[Path] | None, typer.Option(metavar="PATH", help="Scans without labels, to learn from too.")
    ] = None,
    method: Annotated[
        str,
        typer.Option(help="auto, finetune, self_training, lora, norms, head, inner (the learner's own) or scratch."),
    ] = "auto",
    steps: Annotated[int | None, typer.Option(help="Steps, else 1,000 x root of the scan count.")] = None,
    atlases: Annotated[int, typer.Option(min=0, metavar="N", help="Scans to carry labels from.")] = 5,
    minutes: Annotated[float | None, typer.Option(help="Minutes at most, for all of it.")] = None,
    seed: Seed = 0,
    device: Device = "cpu",
    precision: Precision = "auto",
    report: Report = None,
) -> None:
    """Adapt a model to a new organ from a few labelled scans, and say how good it will be.

    The output layer grows to one row per class, the input layer to one slice per channel. From 3 scans on, leaving
    scans out chooses the way to adapt, and forecasts Dice.

    Example: medmeta adapt model --images scans --labels labels --target kidney=2,3 --out kidney
    """
    from medmeta.adaptation import adapt_to
    from medmeta.console import Reporter
    from medmeta.files import refuse_existing
    from medmeta.fine_tuning import Budget, usual_steps
    from medmeta.inference import fastest_precision
    from medmeta.review import write_adaptation
    from medmeta.segmenter import load
    from medmeta.support import support_task

    match modality:
        case None | "CT" | "MR":
            pass
        case _:
            raise InputError("--modality", modality, "CT or MR")
    refuse_existing(out)
    source = load(model)
    task = support_task(
        images,
        labels,
        targets=read_targets(target),
        modality=modality,
        background=read_values(background),
        unlabelled=unlabelled or (),
    )
    labelled = len(task.labelled.cases)
    _line(f"{labelled} labelled scan{'s' * (labelled != 1)}, {task.modality}, {', '.join(task.targets)}")
    losses: list[tuple[int, int, float]] = []
    with Reporter(console) as reporter:

        def tell(done: int, total: int, loss: float) -> None:
            losses.append((done, total, loss))
            reporter("adapting", done, total, f"loss {loss:.3f}")

        segmenter = adapt_to(
            source,
            task,
            method=method,
            budget=Budget(usual_steps(len(task.labelled.patients)) if steps is None else steps, minutes),
            seed=seed,
            atlases=atlases,
            device=device,
            precision=fastest_precision(device) if precision == "auto" else read_precision(precision),
            progress=tell,
        )
    segmenter.save(out)
    _describe_adaptation(segmenter.card)
    if method == "auto" and not unlabelled and len(task.labelled.patients) < 3:
        _line("With so few, --unlabelled FOLDER pays: it learns from scans without labels too.")
    _line(f"The adapted model is in {out}")
    if segmenter.atlases:
        _line(f"It holds {len(segmenter.atlases)} of the labelled scans, coarse: share it as you would share them.")
    if report:
        _line(f"To look at it: {write_adaptation(report, segmenter, task, losses=losses)}")
    if segmenter.card.get("unlabelled", {}).get("unusable"):
        raise typer.Exit(1)


@app.command()
def predict(
    model: ModelFolder,
    inputs: Annotated[list[Path], typer.Argument(help="Scans, folders of scans, DICOM folders, .txt and .csv lists.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for the label maps.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Segment again what is there already.")] = False,
    recursive: Annotated[bool, typer.Option("--recursive", help="Search folders within folders.")] = False,
    probabilities: Annotated[bool, typer.Option("--probabilities", help="Write probabilities too.")] = False,
    dicom_seg: Annotated[bool, typer.Option("--dicom-seg", help="Write DICOM SEG too, for DICOM series.")] = False,
    report: Report = None,
    focus: Annotated[bool, typer.Option("--focus", help="Finely only where the overview sees something.")] = False,
    upright: Annotated[bool, typer.Option("--upright", help="Segment each scan only as it lies.")] = False,
    backend: Backend = "auto",
    engine: Engine = "local",
    workers: Workers = 1,
    gpus_per_worker: GpusPerWorker = 0.0,
    device: Device = "cpu",
    precision: Precision = "float32",
) -> None:
    """Segment scans and folders of scans, each on its own grid. Run it again to go on where it was stopped.

    Example: medmeta predict kidney scans --out segmented
    """
    from medmeta.console import Reporter
    from medmeta.prediction import predict_each
    from medmeta.review import predicted_cases, write_review

    total, results = 0, []
    counts: Counter[str] = Counter()
    segmenter = _segmenter(model)

    def progress(_done: int, of: int) -> None:
        nonlocal total
        total = of

    with Reporter(console) as reporter:
        for result in predict_each(
            segmenter,
            inputs,
            out,
            overwrite=overwrite,
            recursive=recursive,
            probabilities=probabilities,
            dicom_seg=dicom_seg,
            focus=focus,
            rotations=not upright,
            backend=backend,
            engine=engine,
            workers=workers,
            gpus_per_worker=gpus_per_worker,
            device=device,
            precision=precision if precision == "auto" else read_precision(precision),
            progress=progress,
        ):
            counts[result.status] += 1
            results.append(result)
            note = f"{counts['failed']} failed" if counts["failed"] else ""
            reporter("segmenting", len(results), total, note)
        if report:
            page = write_review(
                report,
                predicted_cases(results),
                targets=segmenter.targets,
                title=f"{', '.join(segmenter.targets)}: {len(results)} scans",
                settings={"adapted from": segmenter.card},
                progress=lambda done, of: reporter("writing the page", done, of),
            )
    for result in results:
        if result.status == "failed":
            _line(f"failed: {result.scan}: {result.reason}")
    if report:
        _line(f"To look at them: {page}")
    _line(f"{counts['done']} segmented, {counts['kept']} there already, {counts['failed']} failed; all in {out}")
    raise typer.Exit(1 if counts["failed"] else 0)


@app.command()
def evaluate(
    reference: Annotated[Path, typer.Option("--reference", help="Folder of reference label maps.")],
    prediction: Annotated[Path, typer.Option("--prediction", help="Folder of predicted label maps.")],
    json: Annotated[Path | None, typer.Option("--json", help="Write every case here too.")] = None,
    target: Targets = None,
    tolerance: Annotated[float, typer.Option(help="Of surface Dice, in mm.")] = 2.0,
    images: Annotated[Path | None, typer.Option("--images", help="Folder of the scans, for --report.")] = None,
    report: Report = None,
) -> None:
    """Compare two folders of label maps: Dice, surface Dice, HD95, missed organs.

    Example: medmeta evaluate --reference labels --prediction segmented
    """
    from medmeta.console import Reporter
    from medmeta.evaluate import evaluate_folders
    from medmeta.review import evaluated_cases, write_review

    require_writable(json)
    if (images is None) != (report is None):
        raise InputError("--report", "without --images" if report else "--images alone", "both or neither")
    with Reporter(console) as reporter:
        evaluation = evaluate_folders(
            reference,
            prediction,
            targets=read_targets(target),
            tolerance_mm=tolerance,
            progress=lambda done, total: reporter("comparing", done, total),
        )
        if images and report:
            page = write_review(
                report,
                evaluated_cases(evaluation, images),
                targets=evaluation.targets,
                title=f"{len(evaluation.files)} cases",
                settings={"surface Dice tolerance mm": tolerance},
                progress=lambda done, total: reporter("writing the page", done, total),
            )
    if json:
        evaluation.to_json(json)
    console.print(evaluation_table(evaluation))
    if report:
        _line(f"To look at them: {page}")
    for file, reason in evaluation.failures:
        _line(f"problem: {file}: {reason}")
    _line(f"{len({row['case'] for row in evaluation.rows})} cases scored, {len(evaluation.failures)} problems")
    raise typer.Exit(1 if evaluation.failures else 0)


@app.command()
def benchmark(
    config: Annotated[
        Path, typer.Argument(help="YAML config; configs/learners_*.yaml and configs/hold_out_*.yaml are examples.")
    ],
    out: Out,
    set_: Changes = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an unfinished run.")] = False,
    device: Device = "cpu",
) -> None:
    """Compare ways to learn on an organ that none of them saw: same scans, same adaptation budget.

    Example: medmeta benchmark configs/learners_hippocampus.yaml --out runs/hippocampus
    """
    from medmeta.benchmark import draw_supports, markdown_table, run_arms
    from medmeta.config import BenchmarkConfig, load_config
    from medmeta.console import Reporter

    settings = load_config(BenchmarkConfig, config, set_ or ())
    task = settings.held_out_task()
    plans = settings.plans()
    # More scans than patients: known now, not after the training.
    draw_supports(task, settings.trial)
    require_resumable(out, resume)
    with Reporter(console) as reporter:
        steps = {phase.name: phase.schedule.steps for plan in plans.values() for phase in plan.phases}
        rows = run_arms(
            plans, task, settings.trial, out, device=device, progress=reporter, trials=reporter.trial,
            log=reporter.row(steps),
        )  # fmt: skip
    _line(markdown_table(rows, list(plans)))
    _line(f"Surface Dice and costs are in {out / 'table.md'}. Every case, the models and the curves are in {out}")
    _line(f"To look at it: {out / 'report' / 'index.html'}")


@app.command("import")
def import_(
    checkpoint: Annotated[Path, typer.Argument(help="PyTorch file of plain tensors.")],
    out: Out,
    network: Annotated[str, typer.Option(help="Network that the weights belong to.")] = "se_unet_3d",
    option: Annotated[
        list[str] | None, typer.Option("--option", metavar="KEY=VALUE", help="Option of the network, as YAML.")
    ] = None,
    prefix: Annotated[str, typer.Option(help="What stands before each name, such as module.")] = "",
    terms: Annotated[str, typer.Option(help="Licence of the weights.")] = "",
) -> None:
    """Bring in a foreign PyTorch checkpoint; nothing in it is ever run.

    Example: medmeta import body.pt --option "channels=[16,32,64,128]" --out model
    """
    import yaml

    from medmeta.files import refuse_existing
    from medmeta.imports import import_checkpoint

    refuse_existing(out)
    options = {key: yaml.safe_load(value) for key, _, value in (item.partition("=") for item in option or ())}
    import_checkpoint(checkpoint, network=network, options=options, prefix=prefix, terms=terms).save(out)
    _line(f"The model is in {out}")


@app.command()
def info(model: ModelFolder) -> None:
    """What a model is, what it was trained on, and under which terms.

    Example: medmeta info kidney
    """
    from medmeta.segmenter import Segmenter, as_model, load

    loaded = load(model)
    base = as_model(loaded)
    net = base.learner.net
    parameters = sum(parameter.numel() for parameter in net.parameters())
    kind = "adapted" if isinstance(loaded, Segmenter) else "meta-learned"
    _line(f"{model}: {kind}; learner {base.learner.name}, network {net.spec['name']}, {parameters:,} parameters")
    for task in base.card.get("training_tasks", []):
        _line(
            f"  trained on {task['name']} ({task['modality']}, {task['patients']} patients): "
            f"{', '.join(task['targets'])}. Terms: {task['terms'] or 'not stated'}"
        )
    if isinstance(loaded, Segmenter):
        _line(
            f"  adapted to {', '.join(loaded.targets)} from {loaded.card.get('support_scans')} scans, "
            f"channels {', '.join(loaded.channels)}. Terms: {loaded.card.get('support_terms') or 'not stated'}"
        )
        _describe_adaptation(loaded.card)
        _line(f"  working grid {loaded.preprocess.spacing} mm, {loaded.preprocess.modality}, patch {loaded.patch}")
        if loaded.overview is not None:
            _line(f"  overview {loaded.overview.preprocess.spacing} mm, patch {loaded.overview.patch}")
        if loaded.atlases:
            _line(f"  holds {len(loaded.atlases)} of the labelled scans, coarse, to carry labels from")
    _line("Not a medical device.")


def _describe_adaptation(card: Mapping[str, Any]) -> None:
    """What was chosen on which grounds, and the forecast where there is one."""
    from medmeta.forecast import describe
    from medmeta.review.page import count_scans

    chosen = card["method"]
    if "unlabelled" in card:
        _line(f"Learned from {card['unlabelled']['scans']} unlabelled scans too.")
        if card.get("repainted"):
            _line(
                "The labelled organs may be unusually bright or dark: a network shown any brightness was surer there."
            )
        for reason in card["unlabelled"]["unusable"]:
            _line(f"Not usable: {reason}")
    if "left_out" not in card:
        _line(f"Adapted by {chosen}. From 3 labelled scans on, the way is chosen and the Dice forecast.")
        return
    left_out = card["left_out"]
    tried = ", ".join(f"{name} {dice:.3f}" for name, dice in left_out["mean_dice"].items())
    for name, behind in left_out.get("behind", {}).items():
        tried += f"; {name} no more after {count_scans(behind['scans'])}, {behind['dice']:.3f} behind"
    _line(f"Mean Dice on scans left out: {tried}. Adapted by {chosen}.")
    for line in describe(card["forecast"]).splitlines():
        _line(line)


def _version(wanted: bool) -> None:
    if wanted:
        from medmeta import __version__

        console.print(f"medmeta {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass


def evaluation_table(evaluation: Evaluation) -> Table:
    """The summary of an evaluation, a row for each target."""
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("target", overflow="fold")
    for name in ("cases", "Dice", "95 % interval", "surface Dice", "HD95 (mm)", "missed", "invented"):
        table.add_column(name, justify="right", no_wrap=" " not in name or "%" in name)
    summary = evaluation.summary()
    for name, entry in [*summary["targets"].items(), ("all", summary["overall"])]:
        low, high = entry["dice"]["interval"]
        figures = (entry[key]["mean"] for key in ("dice", "surface_dice", "hd95_mm"))
        dice, surface, hd95 = (f"{value:.{digits}f}" for value, digits in zip(figures, (3, 3, 1), strict=True))
        cases, missed, invented = (str(entry[key]) for key in ("n", "missed", "invented"))
        interval = "" if math.isnan(low) else f"{low:.2f} to {high:.2f}"
        table.add_row(escape(name), cases, dice, interval, surface, hd95, missed, invented)
    return table


def _line(text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _segmenter(folder: Path) -> Segmenter:
    from medmeta.segmenter import Segmenter, load

    loaded = load(folder)
    if not isinstance(loaded, Segmenter):
        raise InputError(folder, "a model that was not adapted", "an adapted model", "Run `medmeta adapt` first.")
    return loaded


def main() -> None:
    """Entry point of the `medmeta` command: what the user or the machine can be blamed for is one line."""
    for stream in (sys.stdout, sys.stderr):
        # A file name that the terminal cannot spell is no reason to stop.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        app(prog_name="medmeta")
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:
        _fail(f"{error.filename}: {error.strerror or error}" if error.filename else str(error))
    except (MedmetaError, ValueError, FloatingPointError, RuntimeError, MemoryError) as error:
        _fail(str(error) or type(error).__name__)


def _fail(message: str) -> None:
    line = " ".join(message.split())
    Console(stderr=True).print(f"medmeta: {line}", markup=False, highlight=False, soft_wrap=True)
    sys.exit(2)


if __name__ == "__main__":
    main()
