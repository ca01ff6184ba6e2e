"""What the verbs of the command line are given, checked before any work begins."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from medmeta.errors import InputError

if TYPE_CHECKING:
    import torch

Out = Annotated[Path, typer.Option("--out", help="New folder for what is made.")]
Seed = Annotated[int, typer.Option("--seed", help="Same seed, same result.")]
Targets = Annotated[
    list[str] | None,
    typer.Option("--target", metavar="NAME=1,2", help="A structure and its label values; again for each, may overlap."),
]
Background = Annotated[
    str | None,
    typer.Option("--background", metavar="1,4", help="Label values that count as background."),
]
Changes = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a value of the config.")]
ModelFolder = Annotated[Path, typer.Argument(help="Folder of a model, or organs3d.")]
Precision = Annotated[
    str, typer.Option("--precision", help="float32, bfloat16, or auto: bfloat16 where the processor has it.")
]


def one_of(*choices: str) -> Callable[[typer.Context, typer.CallbackParam, str], str]:
    """A check that a word is among some. It raises InputError for any other."""

    def check(context: typer.Context, parameter: typer.CallbackParam, given: str) -> str:
        if given not in choices:
            raise InputError(f"--{parameter.name}", given, f"one of {', '.join(choices)}")
        return given

    return check


def _with_room(given: Path | None) -> Path | None:
    """A folder that a page can be written in; InputError for any other."""
    if given is not None:
        from medmeta.review.page import require_report

        require_report(given)
    return given


Report = Annotated[Path | None, typer.Option("--report", help="Folder for a page to look at.", callback=_with_room)]
Backend = Annotated[
    str,
    typer.Option(
        "--backend",
        help="torch, openvino (an extra), or auto: openvino where it is there.",
        callback=one_of("auto", "torch", "openvino"),
    ),
]
Engine = Annotated[str, typer.Option("--engine", help="local, or ray (an extra).", callback=one_of("local", "ray"))]
Workers = Annotated[int, typer.Option("--workers", min=1, metavar="N", help="Processes of Ray.")]
GpusPerWorker = Annotated[float, typer.Option("--gpus-per-worker", min=0.0, metavar="N", help="GPUs of each of them.")]


def require_device(name: str) -> str:
    """The name of a device that torch can use; InputError for any other."""
    if name != "cpu":
        import torch

        try:
            torch.zeros(1, device=name).item()
        except (RuntimeError, AssertionError) as error:
            reason = " ".join(str(error).split())[:120]
            raise InputError(f"--device {name}", f"no such device ({reason})", "a device that torch can use") from error
    return name


Device = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1 ...", callback=require_device)]


def read_targets(given: Sequence[str] | None) -> dict[str, tuple[int, ...]] | None:
    """Structure -> label values, from words such as kidney=2,3. Raises InputError for any other."""
    if not given:
        return None
    targets = {}
    for text in given:
        name, _, values = (part.strip() for part in text.partition("="))
        try:
            wanted = tuple(int(value) for value in values.split(","))
        except ValueError as error:
            raise InputError(f"--target {text}", "no NAME=1,2", "a name and whole label values") from error
        if not name or name in targets:
            found = f"the name {name!r} again" if name else "no name"
            raise InputError(f"--target {text}", found, "a name of its own for each target")
        targets[name] = wanted
    return targets


def read_values(given: str | None) -> tuple[int, ...]:
    """Label values from words such as 1,4. Raises InputError for any other."""
    try:
        values = tuple(int(value) for value in given.split(",")) if given else ()
    except ValueError as error:
        raise InputError(f"--background {given}", "no 1,4", "whole label values") from error
    if min(values, default=1) < 1:
        raise InputError(f"--background {given}", str(min(values)), "label values above 0")
    return values


def read_precision(name: str) -> torch.dtype:
    """The torch dtype of that name. Raises InputError for any but float32 and bfloat16."""
    import torch

    if name not in ("float32", "bfloat16"):
        raise InputError("--precision", name, "float32 or bfloat16")
    return getattr(torch, name)


def require_resumable(out: Path, resume: bool) -> None:
    """Raise InputError where an earlier run stands and is not to be resumed, or where no run can be written."""
    from medmeta.files import refuse_existing

    if out.is_dir() and any(out.iterdir()):
        if not resume:
            raise InputError(out, "an earlier run", "a new folder, or --resume", "Add --resume to go on with it.")
    else:
        refuse_existing(out)


def require_writable(file: Path | None) -> None:
    """Raise InputError where a file that is to be written at the end of the work could not be."""
    from medmeta.files import refuse_unwritable

    if file is not None:
        refuse_unwritable(file)
        if file.is_dir():
            raise InputError(file, "a folder", "a file that can be written", "Name another one.")
