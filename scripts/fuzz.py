"""Damaged and hostile files against every reader: clean errors, crashes, hangs, and bytes written outside the target.

    python scripts/fuzz.py --inputs 2000 [--kinds nifti,archive] [--seed 0]

Each input is a sound file with random damage: flipped bits, cuts, repeated or removed parts, extreme numbers and words
in place of others. Readers run in a process of their own with a bound on its memory, so that a crash or a hang costs
one input. Whatever is neither read nor refused with a `MedmetaError` is a crash, and its input is kept in --keep.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import multiprocessing
import resource
import shutil
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

LIMIT_BYTES = 10**7
MEMORY_BYTES = 6 * 2**30
HANG_SECONDS = 30.0

NUMBERS = [
    b"0",
    b"-1",
    b"1e30",
    b"nan",
    b"inf",
    b"32767",
    b"99999999999",
    b"2147483648",
    b"../../x",
    b"/etc/passwd",
    b"",
]
BYTES = [b"\x00" * 4, b"\xff" * 4, b"\x7f" * 8, b"\x80\x00", b"\xff\x7f"]


def damage(content: bytes, rng: np.random.Generator, whole: bool = True) -> bytes:
    """A sound file with one to four faults; `whole`: anywhere, else mostly in its first 400 bytes."""
    changed = bytearray(content)
    for _ in range(rng.integers(1, 5)):
        if not changed:
            break
        at = int(rng.integers(len(changed) if whole or rng.random() < 0.2 else min(len(changed), 400)))
        length = int(rng.integers(1, 9))
        match rng.integers(8):
            case 0:
                changed[at] ^= 1 << int(rng.integers(8))
            case 1:
                changed[at : at + length] = rng.bytes(length)
            case 2:
                del changed[at:]
            case 3:
                del changed[at : at + 10 * length]
            case 4:
                changed[at:at] = changed[at : at + 10 * length] * int(rng.integers(1, 4))
            case 5:
                changed[at : at + length] = NUMBERS[rng.integers(len(NUMBERS))]
            case 6:
                value = BYTES[rng.integers(len(BYTES))]
                changed[at : at + len(value)] = value
            case 7:  # a number in a text
                digits = [i for i, byte in enumerate(changed[:4000]) if 48 <= byte <= 57]
                if digits:
                    at = digits[rng.integers(len(digits))]
                    changed[at : at + 1] = NUMBERS[rng.integers(len(NUMBERS))]
    return bytes(changed)


def volumes(folder: Path) -> dict[str, list[bytes]]:
    """Sound volumes of each format, as `write_volume` makes them, and an uncompressed NRRD."""
    import torch

    from medmeta.data.volume import Volume, write_volume

    data = torch.arange(4 * 5 * 6, dtype=torch.int16).reshape(1, 4, 5, 6)
    volume, found = Volume(data, torch.diag(torch.tensor([1.0, 2.0, 3.0, 1.0], dtype=torch.float64))), {}
    for suffix in (".nii", ".nii.gz", ".nrrd", ".seg.nrrd", ".mha"):
        write_volume(volume, folder / f"scan{suffix}")
        found[suffix] = [(folder / f"scan{suffix}").read_bytes()]
    header, _, packed = found[".nrrd"][0].partition(b"\n\n")
    found[".nrrd"].append(header.replace(b"encoding: gzip", b"encoding: raw") + b"\n\n" + gzip.decompress(packed))
    return found


def archives() -> dict[str, list[bytes]]:
    members = {
        "task/dataset.json": b"{}",
        "task/imagesTr/a.nii.gz": bytes(range(256)) * 8,
        "task/labelsTr/a.nii.gz": b"x",
    }
    made: dict[str, list[bytes]] = {}
    for suffix in (".tar", ".tar.gz"):
        stream = io.BytesIO()
        with tarfile.open(
            fileobj=stream, mode="w" if suffix == ".tar" else "w:gz", format=tarfile.PAX_FORMAT
        ) as archive:
            for name, content in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                info.pax_headers = {"comment": "ä" * 20}
                archive.addfile(info, io.BytesIO(content))
        made[suffix] = [stream.getvalue()]
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    made[".zip"] = [stream.getvalue()]
    return made


def header_checksums(content: bytes) -> bytes:
    """A tar whose header checksums fit again, so that damage reaches what lies behind them."""
    blocks = bytearray(content)
    for at in range(0, len(blocks) - 511, 512):
        if blocks[at + 257 : at + 262] == b"ustar":
            blocks[at + 148 : at + 156] = b" " * 8
            blocks[at + 148 : at + 156] = b"%06o\0 " % sum(blocks[at : at + 512])
    return bytes(blocks)


def model(folder: Path) -> dict[str, bytes]:
    from medmeta.learners import build_learner
    from medmeta.networks import build_network
    from medmeta.segmenter import Model

    net = build_network("se_unet_3d", seed=0, channels=(8, 16), se_ratio=4)
    Model(build_learner("fomaml", net).eval(), 16**3).save(folder / "model")
    return {path.name: path.read_bytes() for path in (folder / "model").iterdir()}


def checkpoint() -> bytes:
    import torch

    stream = io.BytesIO()
    torch.save({"state_dict": {"a": torch.ones(3, 4), "b": torch.zeros(2)}}, stream)
    return stream.getvalue()


MANIFEST = Path(__file__).resolve().parents[1] / "data_manifests" / "Task01_BrainTumour.yaml"
DATASET = {
    "name": "Toy", "modality": {"0": "CT"}, "labels": {"0": "background", "1": "liver", "2": "tumour"},
    "training": [{"image": "./imagesTr/a.nii.gz", "label": "./labelsTr/a.nii.gz"}], "test": ["./imagesTs/b.nii.gz"],
}  # fmt: skip


class Fuzzer:
    """Makes input i of a kind and gives it to the reader.

    Args:
        folder: where everything happens; readers may write into `folder`/out only.
        seed: with kind and number, what decides an input.
    """

    def __init__(self, kind: str, folder: Path, seed: int) -> None:
        self.kind, self.folder, self.seed = kind, folder, seed
        self.given = folder / "in"
        self.given.mkdir()
        sound = folder / "sound"
        sound.mkdir()
        if kind in ("nifti", "nrrd", "mha"):
            wanted = {"nifti": (".nii", ".nii.gz"), "nrrd": (".nrrd", ".seg.nrrd"), "mha": (".mha",)}[kind]
            self.sound = {suffix: contents for suffix, contents in volumes(sound).items() if suffix in wanted}
        elif kind == "archive":
            self.sound = archives()
        elif kind == "model":
            self.files = model(sound)
        elif kind == "checkpoint":
            self.sound = {".pt": [checkpoint()]}

    def make(self, number: int) -> Path:
        rng = np.random.default_rng([self.seed, number, zlib.crc32(self.kind.encode())])
        if self.kind == "model":
            return self._model(rng)
        if self.kind in ("manifest", "dataset"):
            text = MANIFEST.read_bytes() if self.kind == "manifest" else json.dumps(DATASET).encode()
            path = self.given / ("x.yaml" if self.kind == "manifest" else "dataset.json")
            path.write_bytes(damage(text, rng))
            return path
        suffix = list(self.sound)[rng.integers(len(self.sound))]
        content = self.sound[suffix][rng.integers(len(self.sound[suffix]))]
        if suffix.endswith(".gz") and rng.random() < 0.7:
            # Behind the compression, where its checksum does not hide the damage.
            inner = damage(gzip.decompress(content), rng, whole=self.kind == "archive")
            content = gzip.compress(header_checksums(inner) if self.kind == "archive" else inner, 1)
        else:
            content = damage(content, rng, whole=self.kind in ("archive", "checkpoint"))
            if suffix == ".tar" and rng.random() < 0.7:
                content = header_checksums(content)
        path = self.given / f"x{suffix}"
        path.write_bytes(content)
        return path

    def _model(self, rng: np.random.Generator) -> Path:
        folder = self.given / "model"
        folder.mkdir()
        names = list(self.files)
        name = names[rng.integers(len(names))]
        files = {**self.files, name: damage(self.files[name], rng, whole=name.endswith("json") or rng.random() < 0.3)}
        if name != "model.json" and rng.random() < 0.8:
            # With the checksum of the damaged file, as somebody who tampers would write it.
            before, after = (hashlib.sha256(content[name]).hexdigest() for content in (self.files, files))
            files["model.json"] = files["model.json"].replace(before.encode(), after.encode())
        for name, content in files.items():
            (folder / name).write_bytes(content)
        return folder

    def reader(self) -> Callable[[Path], object]:
        out = self.folder / "out"
        if self.kind == "archive":
            from medmeta.data.archives import Limits, extract

            return lambda path: extract(path, out / "task", limits=Limits(nbytes=LIMIT_BYTES))
        if self.kind == "model":
            from medmeta.segmenter import load

            return load
        if self.kind == "manifest":
            from medmeta.data.manifests import load_manifest

            return load_manifest
        if self.kind == "dataset":
            from medmeta.data.tasks import load_task

            return lambda path: load_task(path, must_exist=False)
        if self.kind == "checkpoint":
            from medmeta.imports import read_checkpoint

            return lambda path: read_checkpoint(path, limit_bytes=LIMIT_BYTES)
        from medmeta.data.volume import read_volume

        return lambda path: read_volume(path, limit_bytes=LIMIT_BYTES)


KINDS = ("nifti", "nrrd", "mha", "model", "manifest", "dataset", "archive", "checkpoint")


def work(kind: str, folder: Path, seed: int, first: int, last: int, keep: Path | None, pipe) -> None:
    """Run inputs first..last; tells (number, outcome, detail) of each, and (number, "start", "") before it."""
    import torch

    from medmeta.errors import MedmetaError

    torch.set_num_threads(1)
    fuzzer = Fuzzer(kind, folder, seed)
    read = fuzzer.reader()
    outside: list[str] = []
    watching = False

    def watch(event: str, arguments: tuple) -> None:
        if not watching or event not in ("open", "os.mkdir", "os.rename", "os.link", "os.symlink"):
            return
        if event == "open" and not (isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")):
            return
        target = arguments[1] if event in ("os.rename", "os.link", "os.symlink") else arguments[0]
        if isinstance(target, str | Path) and not Path(target).resolve().is_relative_to(folder / "out"):
            outside.append(f"{event} {target}")

    sys.addaudithook(watch)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    for number in range(first, last):
        shutil.rmtree(fuzzer.given)
        fuzzer.given.mkdir()
        shutil.rmtree(folder / "out", ignore_errors=True)
        (folder / "out").mkdir()
        path = fuzzer.make(number)
        pipe.send((number, "start", ""))
        watching = True
        try:
            read(path)
            outcome, detail = "read", ""
        except MedmetaError as error:
            outcome, detail = "refused", str(error)
            if "\n" in detail or str(path) not in detail:
                outcome = "crash"
        except BaseException as error:
            outcome, detail = "crash", f"{type(error).__name__}: {error}"
        watching = False
        if outside:
            pipe.send((number, "outside", "; ".join(outside)))
            outside.clear()
        if outcome == "crash" and keep is not None:
            shutil.copytree(fuzzer.given, keep / f"{kind}-{number}", dirs_exist_ok=True)
        pipe.send((number, outcome, detail))
    pipe.send((last, "end", ""))


def fuzz(kind: str, inputs: int, seed: int, keep: Path | None) -> Counter:
    counts: Counter = Counter()
    number = 0
    context = multiprocessing.get_context("spawn")
    while number < inputs:
        with tempfile.TemporaryDirectory() as folder:
            ours, theirs = context.Pipe()
            root = Path(folder).resolve()
            process = context.Process(target=work, args=(kind, root, seed, number, inputs, keep, theirs))
            process.start()
            theirs.close()
            running = False
            while True:
                outcome, detail = "hang", ""
                try:
                    # The first answer comes after the imports.
                    if ours.poll(HANG_SECONDS if running else 300):
                        number, outcome, detail = ours.recv()
                except EOFError:
                    process.join()
                    outcome, detail = "crash", f"the process ended with {process.exitcode}"
                if outcome == "end":
                    number = inputs
                    break
                running = True
                if outcome == "start":
                    continue
                counts[outcome] += 1
                if outcome in ("crash", "hang", "outside"):
                    print(f"{kind} input {number}: {outcome}: {detail[:300]}", flush=True)
                if outcome == "hang" or detail.startswith("the process ended"):
                    process.kill()
                    process.join()
                    if keep is not None:
                        shutil.copytree(root / "in", keep / f"{kind}-{number}", dirs_exist_ok=True)
                    number += 1
                    break
            process.join()
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=2000, help="of each kind")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder for the inputs that crash or hang")
    arguments = parser.parse_args()
    rows = []
    for kind in arguments.kinds.split(","):
        counts = fuzz(kind, arguments.inputs, arguments.seed, arguments.keep)
        figures = [kind, arguments.inputs, *(counts[name] for name in ("read", "refused", "crash", "hang", "outside"))]
        rows.append(f"| {' | '.join(map(str, figures))} |")
        print(rows[-1], flush=True)
    print("\n| kind | inputs | read | refused cleanly | crashes | hangs | written outside |\n|---" + "|---" * 6 + "|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
