"""Downloading, from a server on this machine that answers as the hub does.

huggingface_hub reads its environment when it is imported, so each run is a process of its own.
"""

from __future__ import annotations

import ast
import errno
import hashlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import scan_cache_dir, try_to_load_from_cache

from ldm import hub
from ldm.cli import main

ROOT = Path(__file__).parent.parent
CONTENT = random.Random(1).randbytes(100_000)
MODEL = hub.Model(
    repo="someone/some-model",
    revision="0123456789abcdef0123456789abcdef01234567",
    file="model.safetensors",
    sha256=hashlib.sha256(CONTENT).hexdigest(),
    size=len(CONTENT),
    licence="MIT",
    about="a test",
)
LARGE = CONTENT * 300  # the library writes 10 MiB at a time
LARGE_MODEL = replace(MODEL, sha256=hashlib.sha256(LARGE).hexdigest(), size=len(LARGE))
PAGE = f"/{MODEL.repo}/resolve/{MODEL.revision}/{MODEL.file}"

# The library waits between its attempts, up to half a minute in all. No connection but to this machine is possible.
DRIVER = """
import socket, sys, time

from ldm import hub
from ldm.cli import main

connect = socket.socket.connect

def connect_here(self, address):
    assert address[0] == "127.0.0.1", f"the network was used: {address}"
    return connect(self, address)

socket.socket.connect = connect_here
time.sleep = lambda seconds: None
hub.MODELS = {"test": hub.Model(**MODEL)}
sys.exit(main())
"""


@dataclass
class Request:
    method: str
    path: str
    range: str | None
    token: str | None
    sent: int = 0  # bytes of the file


@dataclass
class Hub:
    """What the server has, how it misbehaves, and what it was asked."""

    content: bytes = CONTENT
    status: int | None = None  # to answer with instead
    code: str = ""  # the hub's own word for that status
    cuts: dict[int, int] = field(default_factory=dict)  # the n-th GET is cut off after so many bytes; -1: each one
    hangs: bool = False  # at the cut, until the client ends
    cdn: str = ""  # another server, which has the content
    requests: list[Request] = field(default_factory=list)
    url: str = ""

    def count(self) -> Counter[str]:
        return Counter(request.method for request in self.requests)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        with suppress(ConnectionError):  # a client that was killed
            self.answer()

    def answer(self) -> None:
        request = Request(self.command, self.path, self.headers["Range"], self.headers["Authorization"])
        self.hub.requests.append(request)
        if self.hub.status or self.path != PAGE:
            self.send_response(self.hub.status or 404)
            self.send_header("X-Error-Code", self.hub.code)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        content = self.hub.content
        start = int(re.fullmatch(r"bytes=(\d+)-", request.range)[1]) if request.range else 0
        self.send_response(302 if self.hub.cdn else 206 if start else 200)
        if self.hub.cdn:
            self.send_header("Location", self.hub.cdn + PAGE)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", "0" if self.hub.cdn else str(len(content) - start))
        self.send_header("X-Repo-Commit", MODEL.revision)
        self.send_header("ETag", '"a-git-object"')
        self.send_header("X-Linked-ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Linked-Size", str(len(content)))
        self.end_headers()
        if self.command == "GET" and not self.hub.cdn:
            get = self.hub.count()["GET"] - 1
            cut = self.hub.cuts.get(get, self.hub.cuts.get(-1, len(content)))
            body = content[start : start + cut]
            self.wfile.write(body)
            request.sent = len(body)
            if self.hub.hangs:
                self.rfile.read(1)
            self.close_connection = True

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub with one model, MODEL."""
    state = Hub()
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": state}))
    state.url = f"http://127.0.0.1:{httpd.server_port}"
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield state
    httpd.shutdown()
    thread.join()
    httpd.server_close()


@pytest.fixture
def server():
    with serving() as state:
        yield state


@pytest.fixture
def start(server, tmp_path):
    """Start `ldm download` with a table of one model, against the server, with a cache of its own."""

    def start(*args: object, model: hub.Model = MODEL, **environment: str) -> subprocess.Popen:
        kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and not k.lower().endswith("_proxy")}
        env = kept | {"HOME": str(tmp_path), "HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": server.url} | environment
        code = DRIVER.replace("MODEL)", f"{vars(model)!r})")
        command = [sys.executable, "-c", code, "download", *map(str, args)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, cwd=ROOT)

    return start


@pytest.fixture
def run(start):
    """The same to its end."""

    def run(*args: object, **options: object) -> subprocess.CompletedProcess:
        with start(*args, **options) as process:
            try:
                out, err = process.communicate(timeout=60)
            finally:
                process.kill()
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    return run


@pytest.fixture(params=["cache", "folder"])
def place(request, tmp_path) -> tuple[list[object], Path]:
    """The arguments that say where the large model has to go, and the part file that it has meanwhile."""
    if request.param == "folder":
        return ["--to", tmp_path / "models"], tmp_path / "models" / f".{LARGE_MODEL.sha256}.part"
    return [], tmp_path / "hf/hub/models--someone--some-model/blobs" / f"{LARGE_MODEL.sha256}.part"


def assert_fails(done: subprocess.CompletedProcess, *expected: str, code: int = 1) -> None:
    """The last line on stderr says what was expected, and nothing else than progress is there."""
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ldm: ")
    for text in expected:
        assert text in last


def files(folder: Path) -> list[str]:
    """Whatever is in a folder, links too, that has the model's name or a size like the model's."""
    found = [p for p in folder.rglob("*") if p.is_symlink() or p.is_file()]
    return sorted(p.name for p in found if p.name == MODEL.file or p.lstat().st_size > 10_000)


def test_download_lands_in_hf_home(run, server, tmp_path):
    done = run("test")
    assert done.returncode == 0, done.stderr
    path = Path(done.stdout.removesuffix("\n"))
    assert path.is_relative_to(tmp_path / "hf")
    assert path.name == MODEL.file
    assert path.read_bytes() == CONTENT
    assert "sha256" in done.stderr
    assert server.count() == {"HEAD": 1, "GET": 1}
    assert {request.path for request in server.requests} == {PAGE}
    assert {request.token for request in server.requests} == {None}

    again = run("test")  # the snapshot is there: nothing is asked
    assert again.stdout == done.stdout
    assert server.count() == {"HEAD": 1, "GET": 1}


def test_offline(run, server):
    assert_fails(run("test", HF_HUB_OFFLINE="1"), MODEL.file, "HF_HUB_OFFLINE")
    assert not server.requests
    online = run("test")
    server.requests.clear()
    offline = run("test", HF_HUB_OFFLINE="1")
    assert offline.stdout == online.stdout != ""
    assert not server.requests


def test_wrong_content_is_removed(run, server, tmp_path):
    server.content = CONTENT[:-1] + b"?"
    assert_fails(run("test"), hashlib.sha256(server.content).hexdigest(), MODEL.sha256)
    assert files(tmp_path) == []
    server.content = CONTENT
    assert run("test").returncode == 0


@pytest.mark.parametrize("to_folder", [False, True])
def test_damage_in_the_cache_is_found_and_mended(run, tmp_path, to_folder):
    where = ["--to", tmp_path / "models"] if to_folder else []
    path = Path(run("test").stdout.strip())
    path.write_bytes(CONTENT[:50])  # through the link
    assert_fails(run("test", *where), "run again")
    done = run("test", *where)
    assert Path(done.stdout.strip()).read_bytes() == CONTENT


def test_other_tools_find_it(run, tmp_path):
    path = Path(run("test").stdout.strip())
    cache = tmp_path / "hf" / "hub"
    assert try_to_load_from_cache(MODEL.repo, MODEL.file, cache, MODEL.revision) == str(path)
    assert path.readlink() == Path("..", "..", "blobs", MODEL.sha256)
    found = scan_cache_dir(cache)
    assert (found.warnings, found.size_on_disk) == ([], MODEL.size)
    [[revision]] = [repo.revisions for repo in found.repos]
    assert revision.commit_hash == MODEL.revision
    blobs = path.resolve().parent
    assert os.listdir(blobs) == [MODEL.sha256]  # no part file, no lock

    path.unlink()  # as if killed before the link was made
    assert run("test", HF_HUB_OFFLINE="1").stdout.strip() == str(path)
    assert path.read_bytes() == CONTENT


def test_a_cache_without_links(tmp_path, monkeypatch):
    def fail(*args):
        raise OSError("links are for administrators")

    monkeypatch.setattr(Path, "symlink_to", fail)
    (tmp_path / "blob").write_bytes(CONTENT)
    snapshot = hub._link(tmp_path / "blob", tmp_path / "snapshots" / "file")
    assert snapshot.read_bytes() == CONTENT
    assert files(tmp_path) == ["file"]


def gets(server: Hub) -> list[Request]:
    return [request for request in server.requests if request.method == "GET"]


def assert_the_rest_is_sent(server: Hub, done: subprocess.CompletedProcess, start: int) -> None:
    """The run asked once, from there on, and has the model."""
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).read_bytes() == LARGE
    [request] = gets(server)
    assert request.range == f"bytes={start}-"
    assert request.sent == len(LARGE) - start


@contextmanager
def hanging(server: Hub, start, place) -> Iterator[subprocess.Popen]:
    """A run that has got 25 MiB and waits for more, with 20 of them in the part file."""
    where, part = place
    server.content, server.hangs, server.cuts = LARGE, True, {0: 25 << 20}
    with start("test", *where, model=LARGE_MODEL) as process:
        try:
            until = time.monotonic() + 30
            while not (part.exists() and part.stat().st_size == 20 << 20):
                assert time.monotonic() < until
                assert process.poll() is None
                time.sleep(0.01)
            yield process
        finally:
            process.kill()
            process.communicate()


def test_a_run_after_one_that_was_killed_goes_on(run, start, server, place):
    where, part = place
    with hanging(server, start, place) as process:
        process.send_signal(signal.SIGKILL)
    server.hangs, server.cuts = False, {}
    server.requests.clear()
    done = run("test", *where, model=LARGE_MODEL)
    assert_the_rest_is_sent(server, done, 20 << 20)
    assert os.listdir(part.parent) == [MODEL.file if where else LARGE_MODEL.sha256]  # no part file, no lock


def test_a_run_after_one_that_failed_goes_on(run, server, place):
    where, part = place
    server.content, server.cuts = LARGE, {0: 25 << 20, -1: 0}
    assert_fails(run("test", *where, model=LARGE_MODEL), MODEL.file, "run again")
    assert part.read_bytes() == LARGE[: 20 << 20]
    assert os.listdir(part.parent) == [part.name]
    server.cuts = {}
    server.requests.clear()
    assert_fails(run("test", *where, model=LARGE_MODEL, HF_HUB_OFFLINE="1"), "HF_HUB_OFFLINE")
    server.status = 404
    assert_fails(run("test", *where, model=LARGE_MODEL), "not found")
    server.status = None
    assert gets(server) == []
    assert_the_rest_is_sent(server, run("test", *where, model=LARGE_MODEL), 20 << 20)


def test_one_run_goes_on_by_itself(run, server):
    server.content, server.cuts = LARGE, {0: 25 << 20}
    done = run("test", model=LARGE_MODEL)
    del server.requests[:2]
    assert_the_rest_is_sent(server, done, 20 << 20)


def test_a_part_file_that_is_whole(run, server, place):
    where, part = place
    part.parent.mkdir(parents=True)
    part.write_bytes(LARGE)  # killed before the check ended
    done = run("test", *where, model=LARGE_MODEL)
    assert Path(done.stdout.strip()).read_bytes() == LARGE
    assert server.requests == []


@pytest.mark.parametrize("length", [1 << 20, len(LARGE)])
def test_a_wrong_part_file_is_removed(run, server, place, length):
    where, part = place
    part.parent.mkdir(parents=True)
    part.write_bytes(bytes(length))
    server.content = LARGE
    assert_fails(run("test", *where, model=LARGE_MODEL), LARGE_MODEL.sha256, "run again")
    assert os.listdir(part.parent) == []
    done = run("test", *where, model=LARGE_MODEL)
    assert Path(done.stdout.strip()).read_bytes() == LARGE


def test_a_part_file_that_is_too_long_is_begun_anew(run, server, place):
    where, part = place
    part.parent.mkdir(parents=True)
    part.write_bytes(LARGE + b"?")
    server.content = LARGE
    done = run("test", *where, model=LARGE_MODEL)
    assert Path(done.stdout.strip()).read_bytes() == LARGE, done.stderr
    assert [request.range for request in gets(server)] == [None]


def test_two_runs_at_once(run, start, server, place):
    where, part = place
    with hanging(server, start, place):
        assert_fails(run("test", *where, model=LARGE_MODEL), str(part.parent), "another download")
        assert len(gets(server)) == 1
        assert part.stat().st_size == 20 << 20


def test_the_content_is_elsewhere(run, server, place):
    """As at the hub. The other server is given the range, and not the token."""
    where, part = place
    part.parent.mkdir(parents=True)
    part.write_bytes(LARGE[:1000])
    with serving() as cdn:
        server.content = cdn.content = LARGE
        server.cdn = cdn.url
        done = run("test", *where, model=LARGE_MODEL, HF_TOKEN="hf_secret")
    assert_the_rest_is_sent(cdn, done, 1000)
    assert {request.token for request in server.requests} == {"Bearer hf_secret"}
    assert {request.token for request in cdn.requests} == {None}


def test_the_token_is_sent(run, server):
    assert run("test", HF_TOKEN="hf_secret").returncode == 0
    assert {request.token for request in server.requests} == {"Bearer hf_secret"}


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (401, "", "HF_TOKEN"),
        (401, "GatedRepo", f"https://huggingface.co/{MODEL.repo}"),
        (403, "GatedRepo", "accept the licence"),
        (403, "", "access refused (403)"),
        (404, "EntryNotFound", "not found"),
        (404, "RevisionNotFound", "not found"),
        (404, "RepoNotFound", "not found"),
        (404, "", "not found"),
        (500, "", "answered 500"),
        (429, "", "answered 429"),
    ],
)
def test_refusals(run, server, tmp_path, status, code, expected):
    server.status, server.code = status, code
    assert_fails(run("test"), MODEL.repo, expected)
    assert_fails(run("test", "--to", tmp_path / "models"), MODEL.repo, expected)
    assert files(tmp_path) == []


def test_no_server(run):
    assert_fails(run("test", HF_ENDPOINT="http://127.0.0.1:9"), "http://127.0.0.1:9", "refused", "HF_ENDPOINT")


def test_an_endpoint_that_is_no_hub(run, server, monkeypatch):
    monkeypatch.setattr(Handler, "send_header", without("X-Repo-Commit"))
    assert_fails(run("test"), server.url, "HF_ENDPOINT")


def test_an_endpoint_with_another_file(run, server, place):
    where, part = place
    server.content = LARGE[:-1]
    assert_fails(run("test", *where, model=LARGE_MODEL), server.url, "another file")
    assert gets(server) == []
    assert os.listdir(part.parent) == []


def without(name: str):
    send = BaseHTTPRequestHandler.send_header
    return lambda self, keyword, value: None if keyword == name else send(self, keyword, value)


def test_a_folder_that_cannot_be_made(run, tmp_path):
    (tmp_path / "file").touch()
    assert_fails(run("test", "--to", tmp_path / "file"), str(tmp_path / "file"))
    assert_fails(run("test", HF_HOME=str(tmp_path / "file")), str(tmp_path / "file"))


def test_to_a_folder(run, server, tmp_path):
    folder = tmp_path / "new" / "models"
    done = run("test", "--to", folder)
    assert done.stdout == f"{folder / MODEL.file}\n", done.stderr
    assert (folder / MODEL.file).read_bytes() == CONTENT
    assert os.listdir(folder) == [MODEL.file]  # no cache, nothing temporary
    assert files(tmp_path) == [MODEL.file]  # nor a second copy
    server.requests.clear()
    assert run("test", "--to", folder).stdout == done.stdout
    assert not server.requests


def test_to_a_folder_from_the_cache(run, server, tmp_path):
    run("test")
    server.requests.clear()
    done = run("test", "--to", tmp_path, HF_HUB_OFFLINE="1")
    assert done.stdout == f"{tmp_path / MODEL.file}\n", done.stderr
    assert not (tmp_path / MODEL.file).is_symlink()
    shutil.rmtree(tmp_path / "hf")
    assert (tmp_path / MODEL.file).read_bytes() == CONTENT
    assert not server.requests


def test_wrong_content_never_gets_into_the_folder(run, server, tmp_path):
    server.content = CONTENT[::-1]
    assert_fails(run("test", "--to", tmp_path / "models"), MODEL.sha256)
    assert os.listdir(tmp_path / "models") == []


def test_another_file_of_that_name_stays(run, server, tmp_path):
    (tmp_path / MODEL.file).write_text("my own")
    assert_fails(run("test", "--to", tmp_path), str(tmp_path / MODEL.file), "another file")
    assert (tmp_path / MODEL.file).read_text() == "my own"
    assert not server.requests


def test_a_full_disk(monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(hub, "_fetch", fail)
    assert main(["download", "sd-v1-5"]) == 1
    assert "the disk is full: free 4.3 GB" in capsys.readouterr().err


def test_without_the_library(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert main(["download", "sd-v1-5"]) == 1
    assert "pip install -e '.[download]'" in capsys.readouterr().err


def test_names(capsys):
    assert main(["download", "sd-v9"]) == 2
    assert main(["download"]) == 2
    assert capsys.readouterr().err.count("sd-v1-5, ") == 2


def test_list(capsys):
    assert main(["download", "--list"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    for line, (name, model) in zip(out.splitlines(), hub.MODELS.items(), strict=True):
        assert re.split(r"  +", line) == [name, hub.format_size(model.size), model.licence, model.about]


def test_table():
    for name, model in hub.MODELS.items():
        assert re.fullmatch(r"[a-z0-9-]+", name)
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", model.repo)
        assert re.fullmatch(r"[0-9a-f]{40}", model.revision)
        assert re.fullmatch(r"[0-9a-f]{64}", model.sha256)
        assert re.fullmatch(r"[\w.-]+\.(safetensors|ckpt)", model.file)
        assert model.size > 100_000_000
        assert model.licence and model.about
    assert len({model.sha256 for model in hub.MODELS.values()}) == len(hub.MODELS)
    tree = ast.parse(Path(hub.__file__).read_text())  # a name that is there twice is not seen in the dict
    [table] = [n.value for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "MODELS"]
    assert [key.value for key in table.keys] == list(hub.MODELS)


def test_only_the_command_line_downloads():
    naming = [path for path in (ROOT / "ldm").rglob("*.py") if "huggingface_hub" in path.read_text()]
    assert naming == [ROOT / "ldm" / "hub.py"]
    code = "import sys, ldm.pipeline, ldm.cli; ldm.cli.main(['download', '--list']); print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "ldm.hub" in modules
    assert "huggingface_hub" not in modules
