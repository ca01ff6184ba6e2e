from __future__ import annotations

import gzip
import io
import os
import stat
import tarfile
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medmeta.data.archives import Limits, extract
from medmeta.errors import InputError

FILES = {"task/dataset.json": b"{}", "task/imagesTr/a.nii.gz": bytes(range(256)) * 40, "task/empty": b""}


def tar(path: Path, members: list[tuple[str | tarfile.TarInfo, bytes]], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name) if isinstance(name, str) else name
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def zipped(path: Path, members: list[tuple[str | zipfile.ZipInfo, bytes]], **options) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, **options) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return path


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(archive: Path, *fragments: str, **options) -> None:
    """The archive is refused, and nothing is written anywhere below the folder that holds it."""
    before = tree(archive.parent)
    with pytest.raises(InputError) as caught:
        extract(archive, archive.parent / "out", **options)
    for fragment in fragments:
        assert fragment in str(caught.value)
    assert tree(archive.parent) == before
    assert not [path for path in archive.parent.iterdir() if path.is_dir()]


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tgz", ".zip"])
def test_a_sound_archive(tmp_path, suffix):
    path = tmp_path / f"task{suffix}"
    if suffix == ".zip":
        zipped(path, [("task/", b""), *FILES.items()])
    else:
        folder = special("task", tarfile.DIRTYPE)
        tar(path, [(folder, b""), (folder, b""), *FILES.items()], "w" if suffix == ".tar" else "w:gz")
    told: list[int] = []
    extract(path, tmp_path / "new" / "out", progress=told.append)
    assert tree(tmp_path / "new" / "out") == FILES
    assert told == [2, 2 + 10240]
    assert [entry.name for entry in (tmp_path / "new").iterdir()] == ["out"]


def test_a_folder_of_the_archive_becomes_the_folder(tmp_path):
    path = tar(tmp_path / "task.tar", [*FILES.items(), ("._task", b"macOS")])
    (tmp_path / "out").mkdir()  # an empty folder may stand there
    extract(path, tmp_path / "out", within="task")
    assert tree(tmp_path / "out") == {name.removeprefix("task/"): content for name, content in FILES.items()}
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["out", "task.tar"]
    (tmp_path / "out" / "more").write_bytes(b"")
    with pytest.raises(InputError, match="stands there already"):
        extract(path, tmp_path / "out", within="task")
    with pytest.raises(InputError, match="no folder 'other'"):
        extract(path, tmp_path / "third", within="other")
    assert not (tmp_path / "third").exists()


NAMES = [
    "/etc/passwd", "../out", "a/../../b", "C:/windows", "C:x", "\\\\server\\share\\x", "a\\..\\..\\b", "a\\b", "a:b",
    "a\nb", "a\x1b[2Jb",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_names_that_lead_elsewhere(tmp_path, name, kind):
    members = [("good", b"x"), (name, b"evil")]
    if kind == "tar":
        refused(tar(tmp_path / "x.tar", members))
    else:
        refused(zipped(tmp_path / "x.zip", members))


@pytest.mark.parametrize(
    "member",
    [
        special("a", tarfile.SYMTYPE, "/etc"),
        special("a", tarfile.LNKTYPE, "good"),
        special("a", tarfile.CHRTYPE),
        special("a", tarfile.BLKTYPE),
        special("a", tarfile.FIFOTYPE),
        special("a", tarfile.GNUTYPE_SPARSE),
    ],
)
def test_links_and_devices(tmp_path, member):
    refused(tar(tmp_path / "x.tar", [("good", b"x"), (member, b"")]))


def test_a_link_in_a_zip(tmp_path):
    link = zipfile.ZipInfo("a")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    refused(zipped(tmp_path / "x.zip", [(link, b"/etc/passwd")]), "a link or a device")


@pytest.mark.parametrize("second", ["a/b", "./a//b", "A/B", "a/B", "a/b/c", "a"])
def test_names_that_come_twice(tmp_path, second):
    refused(tar(tmp_path / "x.tar", [("a/b", b"1"), (second, b"2")]))


def test_one_accent_in_two_spellings_is_one_name(tmp_path):
    refused(tar(tmp_path / "x.tar", [("\u00e9", b"1"), ("e\u0301", b"2")]), "twice")


@pytest.mark.parametrize("kind", ["tar.gz", "zip"])
def test_a_bomb_stops_at_the_ratio(tmp_path, kind):
    content = [("task/zeros", bytes(50 * 2**20))]
    path = tmp_path / f"bomb.{kind}"
    path = zipped(path, content) if kind == "zip" else tar(path, content, "w:gz")
    assert path.stat().st_size < 60_000
    refused(path, "100 times")
    extract(path, tmp_path / "trusted", limits=Limits(ratio=2000))
    assert (tmp_path / "trusted/task/zeros").stat().st_size == 50 * 2**20


def test_a_zip_that_lies_about_its_size_is_refused(tmp_path):
    path = zipped(tmp_path / "x.zip", [("zeros", bytes(10**6))])
    content = path.read_bytes().replace((10**6).to_bytes(4, "little"), (10).to_bytes(4, "little"))
    path.write_bytes(content)
    refused(path)


def test_bytes_and_files_are_counted(tmp_path):
    path = tar(tmp_path / "x.tar", [(f"a/{i}", os.urandom(1000)) for i in range(10)])
    refused(path, "over 9999 bytes", limits=Limits(nbytes=9999))
    refused(path, "over 10 files", limits=Limits(files=10))
    extract(path, tmp_path / "out", limits=Limits(nbytes=10_000, files=11))


def test_a_header_of_any_size_is_not_read_into_memory(tmp_path):
    raw = io.BytesIO()
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, 300 * 2**20
    raw.write(info.tobuf())
    with gzip.open(tmp_path / "x.tar.gz", "wb", compresslevel=1) as file:
        file.write(raw.getvalue())
        for _ in range(300):
            file.write(bytes(2**20))
    refused(tmp_path / "x.tar.gz", "a header of")


@pytest.mark.parametrize("name", ["x.tar", "x.tar.gz", "x.zip"])
def test_damaged_archives(tmp_path, name):
    path = tmp_path / name
    members = [("a", os.urandom(5000)), ("b", os.urandom(5000))]
    whole = (
        zipped(path, members) if name == "x.zip" else tar(path, members, "w:gz" if "gz" in name else "w")
    ).read_bytes()
    for content in (b"", b"no archive", whole[:6000]):
        path.write_bytes(content)
        refused(path, name)
    if name != "x.tar":
        changed = bytearray(whole)
        changed[3000] ^= 1
        path.write_bytes(changed)
        refused(path, name)
    path.unlink()
    with pytest.raises(InputError, match=name):
        extract(path, tmp_path / "out")


def test_a_zip_member_without_a_name(tmp_path):
    path = zipped(tmp_path / "x.zip", [("a", b"1")])
    content = path.read_bytes()
    central = content.index(b"PK\x01\x02")
    # The length of the name in the central directory, and its one byte moved into the extra field.
    changed = content[: central + 28] + b"\0\0\1\0" + content[central + 32 :]
    path.write_bytes(changed)
    refused(path)


def test_other_kinds_and_empty_archives(tmp_path):
    (tmp_path / "x.rar").write_bytes(b"Rar!")
    refused(tmp_path / "x.rar", "suffix")
    refused(zipped(tmp_path / "y.zip", []), "no folder", within="task")


def test_what_a_kill_left_is_removed(tmp_path):
    path = tar(tmp_path / "x.tar", [("a", b"1")])
    (tmp_path / ".unpacking-out-0123" / "half").mkdir(parents=True)
    (tmp_path / ".unpacking-other-0123").mkdir()
    extract(path, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".unpacking-other-0123", "out", "x.tar"]


parts = st.sampled_from(["a", "A", "b", "..", ".", "", "é", "e\u0301", "C:", "x" * 20])


@settings(max_examples=150, deadline=None, derandomize=True)
@given(names=st.lists(st.lists(parts, min_size=1, max_size=4).map("/".join), max_size=4))
def test_whatever_the_names_nothing_is_written_outside(tmp_path_factory, names):
    folder = tmp_path_factory.mktemp("names")
    path = tar(folder / "x.tar", [(name, b"content") for name in names])
    try:
        extract(path, folder / "out")
    except InputError:
        assert [entry.name for entry in folder.iterdir()] == ["x.tar"]
    else:
        assert sorted(entry.name for entry in folder.iterdir()) == ["out", "x.tar"]
        assert len(tree(folder / "out")) == len(names)
