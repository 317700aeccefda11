"""A Hugging Face Hub on this machine: enough of it that the real clients publish and read datasets, with faults.

Clients read HF_ENDPOINT when they are imported, so they run in a process of their own: `hub.run(code, home)`.
"""

import contextlib
import hashlib
import json
import multiprocessing
import os
import re
import socket
import sys
import threading
from dataclasses import dataclass, field
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

OWNER, STRANGER = "hf_owner", "hf_stranger"
"""A token that may do everything, and one of another user, who may read what is public."""


@dataclass(frozen=True)
class Blob:
    """A stored file; its bytes are in the hub's folder, named by their SHA-256."""

    sha256: str
    size: int
    is_lfs: bool
    oid: str  # what git calls it: of its content, or of the pointer to it

    @property
    def etag(self) -> str:
        return self.sha256 if self.is_lfs else self.oid


@dataclass(frozen=True)
class Commit:
    sha: str
    title: str
    files: dict[str, Blob]


@dataclass
class Repository:
    private: bool
    gated: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def find(self, revision: str) -> Commit | None:
        sha = self.branches.get(revision) or self.tags.get(revision) or revision
        return self.commits.get(sha)

    def commit(self, branch: str, title: str, files: dict[str, Blob]) -> Commit:
        told = json.dumps([len(self.commits), title, sorted((name, blob.oid) for name, blob in files.items())])
        made = Commit(hashlib.sha1(told.encode()).hexdigest(), title, files)
        self.commits[made.sha] = made
        self.branches[branch] = made.sha
        return made


@dataclass
class Request:
    method: str
    path: str
    headers: dict[str, str]  # names in lower case
    status: int = 0
    sent: int = 0  # bytes of the body


@dataclass
class Fault:
    """What happens to the next `times` requests whose "METHOD path" the pattern is found in."""

    kind: str  # fail, cut, cut upload, lose the answer, ignore range, serve wrong
    pattern: str
    times: int
    value: int = 0
    headers: dict[str, str] = field(default_factory=dict)


class LocalHub:
    """The server; use it as a context manager.

    Args:
        folder: for the files.
        cdn: redirect downloads of large files to signed addresses on another host, as the real Hub does.
    """

    def __init__(self, folder: Path, *, cdn: bool = False) -> None:
        self.folder, self.cdn = folder, cdn
        self.link_key = 1  # addresses signed with an older one have expired
        self.repositories: dict[str, Repository] = {}
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.lock = threading.RLock()
        self.connections: set[socket.socket] = set()

    def __enter__(self) -> "LocalHub":
        self.folder.mkdir(parents=True, exist_ok=True)
        from local_hub_requests import Handler

        handler = type("Handler", (Handler,), {"hub": self})
        self._server = _Server(("127.0.0.1", 0), handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        for connection in list(self.connections):
            cut(connection)
        self._server.server_close()

    @property
    def port(self) -> int:
        return self._server.server_port

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def bytes_served(self) -> int:
        return sum(request.sent for request in self.requests)

    def asked(self, pattern: str) -> list[Request]:
        """Requests whose "METHOD path" the pattern is found in."""
        return [request for request in self.requests if re.search(pattern, f"{request.method} {request.path}")]

    def inject(self, kind: str, pattern: str, *, times: int = 1, value: int = 0, **headers: str) -> None:
        """Add a fault: `fail` with a status, `cut` or `cut upload` after so many bytes, `lose the answer` …"""
        named = {name.replace("_", "-"): text for name, text in headers.items()}
        self.faults.append(Fault(kind, pattern, times, value, named))

    def fault(self, kinds: tuple[str, ...], request: Request) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                asked = f"{request.method} {request.path}"
                if fault.times and fault.kind in kinds and re.search(fault.pattern, asked):
                    fault.times -= 1
                    return fault
        return None

    def store(self, content: bytes, *, is_lfs: bool = False) -> Blob:
        sha256 = hashlib.sha256(content).hexdigest()
        (self.folder / sha256).write_bytes(content)
        return self.blob(sha256, is_lfs=is_lfs)

    def blob(self, sha256: str, *, is_lfs: bool) -> Blob:
        file = self.folder / sha256
        size = file.stat().st_size
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
        held = pointer if is_lfs else file.read_bytes()
        return Blob(sha256, size, is_lfs, hashlib.sha1(b"blob %d\0" % len(held) + held).hexdigest())

    def create(self, name: str, *, private: bool = False) -> Repository:
        """A new dataset, with the first commit the Hub makes."""
        self.repositories[name] = made = Repository(private)
        attributes = self.store(b"*.parquet filter=lfs diff=lfs merge=lfs -text\n")
        made.commit("main", "initial commit", {".gitattributes": attributes})
        return made

    def put(self, name: str, path: str, content: bytes) -> None:
        """Commit one file, as a person does in the browser."""
        repository = self.repositories[name]
        files = repository.commits[repository.branches["main"]].files
        repository.commit("main", f"Add {path}", files | {path: self.store(content)})

    def publish(self, name: str, folder: Path) -> str:
        """Commit all visible files of a folder, and nothing else, as a dataset; its commit."""
        repository = self.repositories.get(name) or self.create(name)
        held = {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()}
        shown = {path: file for path, file in held.items() if "/." not in f"/{path}"}
        files = {
            path: self.store(file.read_bytes(), is_lfs=file.suffix == ".parquet") for path, file in shown.items()
        }
        return repository.commit("main", "a zoo", files).sha

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        """Every file of a dataset."""
        commit = self.repositories[name].find(revision)
        assert commit is not None
        return {path: (self.folder / blob.sha256).read_bytes() for path, blob in commit.files.items()}

    def run(self, code: str, home: Path, *, token: str | None = OWNER, **environment: str) -> Any:
        """Run Python code as a client with a cache of its own; it prints one JSON value, which is returned.

        Raises:
            AssertionError: with its standard error, if it fails.
        """
        said = [self.folder / f"said-{len(self.requests)}-{kind}" for kind in ("out", "err")]
        client = CLIENTS.Process(target=_run, args=(code, self.environment(home, token) | environment, said))
        client.start()
        client.join()
        client.close()
        out, err = (file.read_text() for file in said)
        assert out, err[-3000:]
        return json.loads(out)

    def environment(self, home: Path, token: str | None = OWNER) -> dict[str, str]:
        held = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
        held |= {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        held |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "*"}
        return held | ({"HF_TOKEN": token} if token else {})


CLIENTS = multiprocessing.get_context("forkserver")
"""Forked from a process that has imported what is slow to import and does not read HF_ENDPOINT."""
CLIENTS.set_forkserver_preload(["vitzoo_hf.publish.push", "vitzoo_hf.zoo.zoo"])


def _run(code: str, environment: dict[str, str], said: list[Path]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    for descriptor, file in zip((1, 2), said, strict=True):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    assert "huggingface_hub" not in sys.modules
    exec(compile(code, "client", "exec"), {"__name__": "__main__"})
    sys.stdout.flush()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


def cut(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
