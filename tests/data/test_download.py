"""Against a local server that drops connections, sends wrong bytes, redirects and stalls."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml
from filelock import FileLock

from medmeta.data import download as module
from medmeta.data.download import download, fetch
from medmeta.data.tasks import load_task
from medmeta.errors import InputError

CONTENT = bytes(range(256)) * 4000  # 1 MB
SHA256 = hashlib.sha256(CONTENT).hexdigest()
MD5 = hashlib.md5(CONTENT).hexdigest()


class Server:
    """Serves one content; `answers` are what the next requests get instead of it."""

    def __init__(self, content: bytes = CONTENT) -> None:
        self.content = content
        self.answers: list[Callable[[BaseHTTPRequestHandler, int], None]] = []
        self.ranges: list[str | None] = []
        self.stop = threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.ranges.append(self.headers.get("Range"))
                start = int((self.headers.get("Range") or "bytes=0-")[6:-1])
                (server.answers.pop(0) if server.answers else server.whole)(self, start)

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/task.tar"

    def whole(self, to: BaseHTTPRequestHandler, start: int, most: int | None = None, content: bytes = b"") -> None:
        content = content or self.content
        if start >= len(content):
            self.status(416)(to, start)
            return
        to.send_response(206 if start else 200)
        to.send_header("Content-Length", str(len(content) - start))
        if start:
            to.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        to.end_headers()
        to.wfile.write(content[start:][:most])

    def dropping(self, most: int) -> Callable:
        return lambda to, start: self.whole(to, start, most)

    def stalling(self, most: int) -> Callable:
        def answer(to: BaseHTTPRequestHandler, start: int) -> None:
            self.whole(to, start, most)
            to.wfile.flush()
            self.stop.wait(20)

        return answer

    @staticmethod
    def status(code: int, **headers: str) -> Callable:
        def answer(to: BaseHTTPRequestHandler, start: int) -> None:
            to.send_response(code)
            for name, value in headers.items():
                to.send_header(name, value)
            to.send_header("Content-Length", "0")
            to.end_headers()

        return answer


@pytest.fixture
def server(monkeypatch) -> Iterator[Server]:
    monkeypatch.setattr(module, "_PAUSE_SECONDS", 0.0)
    server = Server()
    thread = threading.Thread(target=server.http.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.stop.set()
    server.http.shutdown()
    thread.join()
    server.http.server_close()


def fetched(server: Server, path: Path, **options) -> bytes:
    fetch(server.url, path, **{"checksum": SHA256, "limit_bytes": 2 * 10**6, "timeout": 0.5, **options})
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    return path.read_bytes()


def refused(server: Server, path: Path, *fragments: str, **options) -> None:
    with pytest.raises(InputError) as caught:
        fetched(server, path, **options)
    assert not path.exists()
    for fragment in (server.url, *fragments):
        assert fragment in str(caught.value)


@pytest.mark.parametrize("checksum", [SHA256, MD5, MD5.upper()])
def test_a_file_arrives_and_is_fetched_once(server, tmp_path, checksum):
    told: list[tuple[int, int]] = []
    assert fetched(server, tmp_path / "x", checksum=checksum, progress=lambda *done: told.append(done)) == CONTENT
    assert told[-1] == (len(CONTENT), len(CONTENT))
    assert [done for done, _ in told] == sorted({done for done, _ in told})
    fetched(server, tmp_path / "x", checksum=checksum)
    assert server.ranges == [None]


def test_a_dropped_connection_goes_on_where_it_broke(server, tmp_path):
    server.answers = [server.dropping(300_000), server.dropping(300_000)]
    assert fetched(server, tmp_path / "x") == CONTENT
    assert server.ranges == [None, "bytes=300000-", "bytes=600000-"]


def test_a_stalled_connection_is_given_up_and_taken_up_again(server, tmp_path):
    server.answers = [server.stalling(300_000)]
    started = time.monotonic()
    assert fetched(server, tmp_path / "x", timeout=0.3) == CONTENT
    assert server.ranges == [None, "bytes=300000-"]
    assert time.monotonic() - started < 15, "the server would stall for 20 s"


def test_many_drops_are_borne_while_there_is_progress(server, tmp_path):
    server.answers = [server.dropping(module._CHUNK + 1)] * 3 + [server.dropping(1000)] * 3
    assert fetched(server, tmp_path / "x") == CONTENT
    assert len(server.ranges) == 7


def test_no_progress_ends_and_keeps_what_came(server, tmp_path):
    server.answers = [server.dropping(300_000)] + [server.dropping(0)] * 4
    refused(server, tmp_path / "x", "300000 bytes are kept", "goes on from there")
    assert len(server.ranges) == 5
    assert fetched(server, tmp_path / "x") == CONTENT
    assert server.ranges[-1] == "bytes=300000-"


def test_a_server_without_ranges_sends_the_whole_again(server, tmp_path):
    (tmp_path / "x.part").write_bytes(CONTENT[:1000])
    server.answers = [lambda to, start: server.whole(to, 0)]
    assert fetched(server, tmp_path / "x") == CONTENT


def test_wrong_bytes_are_refused_and_not_kept(server, tmp_path):
    server.content = CONTENT[:-1] + b"!"
    refused(server, tmp_path / "x", hashlib.sha256(server.content).hexdigest(), SHA256)
    assert list(tmp_path.iterdir()) == []
    server.content = CONTENT[:-1]
    refused(server, tmp_path / "x", "999999 bytes" if len(CONTENT) == 10**6 else f"{len(CONTENT) - 1} bytes")


@pytest.mark.parametrize("left", [b"another file", CONTENT[:500] + b"?", CONTENT + b"more", b""])
def test_a_beginning_that_does_not_fit_is_fetched_anew(server, tmp_path, left):
    (tmp_path / "x.part").write_bytes(left)
    assert fetched(server, tmp_path / "x") == CONTENT


def test_a_whole_part_is_only_checked(server, tmp_path):
    (tmp_path / "x.part").write_bytes(CONTENT)
    assert fetched(server, tmp_path / "x") == CONTENT
    assert server.ranges == [f"bytes={len(CONTENT)}-"]


def test_a_damaged_file_is_fetched_anew(server, tmp_path):
    (tmp_path / "x").write_bytes(CONTENT[:-1])
    assert fetched(server, tmp_path / "x") == CONTENT


def test_the_size_is_capped_before_and_while_bytes_come(server, tmp_path):
    refused(server, tmp_path / "x", f"at most {len(CONTENT) - 1}", limit_bytes=len(CONTENT) - 1)
    assert list(tmp_path.iterdir()) == []

    def endless(to: BaseHTTPRequestHandler, start: int) -> None:
        to.send_response(200)
        to.end_headers()
        try:
            while not server.stop.is_set():
                to.wfile.write(bytes(2**16))
        except OSError:
            server.stop.set()

    server.answers = [endless]
    refused(server, tmp_path / "x", "at most 500000", limit_bytes=500_000)
    assert list(tmp_path.iterdir()) == []
    assert server.stop.wait(10), "the connection was closed"


def test_redirects_are_followed_to_the_same_scheme_and_no_further(server, tmp_path):
    server.answers = [server.status(302, Location="/elsewhere")]
    assert fetched(server, tmp_path / "x") == CONTENT
    (tmp_path / "x").unlink()
    for target in ("file:///etc/passwd", "ftp://127.0.0.1/x"):
        server.answers = [server.status(302, Location=target)]
        refused(server, tmp_path / "x")
    server.answers = [server.status(302, Location="/task.tar")] * 100
    refused(server, tmp_path / "x", "redirect")


def test_https_never_leads_to_http():
    handler = module._Redirects()
    request = module.urllib.request.Request("https://example.org/x")
    with pytest.raises(InputError, match="from https to http"):
        handler.redirect_request(request, None, 302, "", {}, "http://example.org/x")
    assert handler.redirect_request(request, None, 302, "", {}, "https://example.org/y") is not None


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://127.0.0.1/x", "data:,x"])
def test_other_schemes_are_refused(tmp_path, url):
    with pytest.raises(InputError, match="http or https"):
        fetch(url, tmp_path / "x", checksum=SHA256, limit_bytes=10)


@pytest.mark.parametrize(("code", "requests"), [(404, 1), (403, 1), (500, 5), (503, 5), (429, 5)])
def test_refusals_of_the_server(server, tmp_path, code, requests):
    server.answers = [server.status(code)] * requests
    refused(server, tmp_path / "x", str(code))
    assert len(server.ranges) == requests


def test_nobody_answers(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_PAUSE_SECONDS", 0.0)
    unused = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    unused.server_close()
    with pytest.raises(InputError, match=r"no lasting connection .*refused"):
        fetch(f"http://127.0.0.1:{unused.server_port}/x", tmp_path / "x", checksum=SHA256, limit_bytes=10)


def toy(server: Server, folder: Path, members: dict[str, bytes] | None = None, **changes) -> Path:
    """A manifest of a tiny Decathlon task which the server holds."""
    case = {"image": "./imagesTr/a.nii.gz", "label": "./labelsTr/a.nii.gz"}
    labels = {"0": "background", "1": "liver"}
    described = {"name": "Toy", "modality": {"0": "CT"}, "labels": labels, "training": [case]}
    files = {"dataset.json": json.dumps(described).encode(), "imagesTr/a.nii.gz": b"1", "labelsTr/a.nii.gz": b"2"}
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, content in (members or {f"Toy/{name}": content for name, content in files.items()}).items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    server.content = stream.getvalue()
    manifest = {
        "name": "Toy", "organ": "liver", "modality": "CT", "folder": "Toy", "channels": ["CT"],
        "labels": {0: "background", 1: "liver"}, "source": server.url, "size_gb": 1e-5,
        "checksum": hashlib.md5(server.content).hexdigest(),
    }  # fmt: skip
    (folder / "toy.yaml").write_text(yaml.safe_dump({**manifest, **changes}))
    return folder / "toy.yaml"


def test_a_data_set_is_fetched_unpacked_and_fetched_once(server, tmp_path):
    manifest, told = toy(server, tmp_path), []
    folder = download(manifest, tmp_path / "data", progress=lambda *given: told.append(given))
    assert folder == tmp_path / "data" / "Toy"
    assert [case.id for case in load_task(manifest, root=tmp_path / "data").cases] == ["a"]
    assert {what for what, _, _ in told} == {"fetching", "unpacking"}
    assert [path.name for path in folder.parent.iterdir() if not path.name.startswith(".")] == ["Toy"]
    left = tmp_path / "data" / "task.tar"
    left.write_bytes(b"somebody else's")
    assert download(manifest, tmp_path / "data") == folder
    assert left.exists()
    left.write_bytes(server.content)  # as a run that was killed leaves it
    assert download(manifest, tmp_path / "data") == folder
    assert server.ranges == [None]
    assert [path.name for path in folder.parent.iterdir() if not path.name.startswith(".")] == ["Toy"]


def test_a_hostile_data_set_leaves_nothing_but_its_archive(server, tmp_path):
    manifest = toy(server, tmp_path, {"Toy/dataset.json": b"{}", "Toy/../../evil": b"x"})
    with pytest.raises(InputError, match=r"evil"):
        download(manifest, tmp_path / "data")
    assert {path.name for path in (tmp_path / "data").iterdir()} <= {"task.tar", ".task.tar.lock"}
    assert not (tmp_path / "evil").exists()


def test_an_archive_larger_than_its_manifest_says(server, tmp_path):
    manifest = toy(server, tmp_path, size_gb=5e-6)
    with pytest.raises(InputError, match="at most 7500"):
        download(manifest, tmp_path / "data")


def test_what_cannot_be_fetched_says_what_to_do(server, tmp_path):
    manifest = toy(server, tmp_path, source="", obtain="Register at example.org.", licence="CC BY 4.0")
    with pytest.raises(InputError, match=r"CC BY 4\.0.*Register at example\.org\."):
        download(manifest, tmp_path / "data")
    with pytest.raises(InputError, match="no manifest of that name"):
        download("Task99_Nothing", tmp_path)
    assert server.ranges == []


def test_two_at_once_and_too_little_room(server, tmp_path, monkeypatch):
    manifest = toy(server, tmp_path)
    (tmp_path / "data").mkdir()
    with FileLock(tmp_path / "data" / ".task.tar.lock"), pytest.raises(InputError, match="another process"):
        download(manifest, tmp_path / "data")
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 19_999}))
    with pytest.raises(InputError, match="GB free"):
        download(manifest, tmp_path / "data")
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 20_000}))
    download(manifest, tmp_path / "data")


@pytest.mark.parametrize("name", ["", "/", "/x/..", "/task"])
def test_a_source_that_names_no_archive(server, tmp_path, name):
    manifest = toy(server, tmp_path, source=f"{server.url.removesuffix('/task.tar')}{name}")
    with pytest.raises(InputError, match="an archive, one of"):
        download(manifest, tmp_path / "data")
    assert server.ranges == []


def test_a_root_that_is_a_file(server, tmp_path):
    (tmp_path / "data").write_text("x")
    with pytest.raises(InputError, match="data"):
        download(toy(server, tmp_path), tmp_path / "data")
