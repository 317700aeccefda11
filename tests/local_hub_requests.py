"""How `local_hub` answers requests, as the real Hub does; `ROUTES` is the list of what it can."""

import base64
import fnmatch
import hashlib
import json
import re
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from local_hub import OWNER, STRANGER, Blob, Commit, LocalHub, Repository, Request, cut

DATE = "2026-01-01T00:00:00.000Z"
CHUNK = 1 << 18


class RefusedError(Exception):
    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        self.status, self.code, self.message = status, code, message


NAME = r"(?P<name>[^/]+/[^/]+)"
DATASET = rf"/api/datasets/{NAME}"
MODELS = "models/"
"""Before the names of model repositories; those of datasets have nothing before them."""


class Handler(BaseHTTPRequestHandler):
    hub: LocalHub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each answer waits 40 ms for an acknowledgement

    def setup(self) -> None:
        super().setup()
        self.hub.connections.add(self.connection)

    def finish(self) -> None:
        self.hub.connections.discard(self.connection)
        super().finish()

    def log_message(self, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.request_log = Request(self.command, self.path, headers)
        self.hub.requests.append(self.request_log)
        body = self._read_body()
        if body is None:
            return
        fault = self.hub.fault(("fail", "lose the answer"), self.request_log)
        if fault and fault.kind == "fail":
            self._answer(fault.value, b"{}", fault.headers)
            return
        try:
            self._route(body, silent=fault is not None)
        except RefusedError as refusal:
            told = {"X-Error-Code": refusal.code} if refusal.code else {}
            told |= {"X-Error-Message": refusal.message} if refusal.message else {}
            self._answer(refusal.status, json.dumps({"error": refusal.message}).encode(), told)

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET  # noqa: N815

    def _route(self, body: bytes, *, silent: bool) -> None:
        address = urlsplit(self.path)
        self.query = {name: values[-1] for name, values in parse_qs(address.query).items()}
        self.user = self._user()
        for method, pattern, answer in ROUTES:
            match = re.fullmatch(pattern, address.path)
            if match and self.command in method:
                told = answer(self, *(unquote(part or "") for part in match.groups()), *([body] if body else []))
                break
        else:
            raise RefusedError(404, message=f"no such address: {address.path}")
        if silent:
            self._hang_up()
        elif told is not None:
            self._answer(200, json.dumps(told).encode())

    def _read_body(self) -> bytes | None:
        """The whole body; None if the connection is cut in the middle of it."""
        fault = self.hub.fault(("cut upload",), self.request_log)
        if "content-length" in self.request_log.headers:
            length = int(self.request_log.headers["content-length"])
            body = self.rfile.read(min(length, fault.value) if fault else length)
        else:
            body = b""
            while self.request_log.headers.get("transfer-encoding") == "chunked":
                size = int(self.rfile.readline(), 16)
                body += self.rfile.read(size)
                self.rfile.readline()
                if size == 0 or (fault and len(body) >= fault.value):
                    break
        if fault:
            self._hang_up()
            return None
        return body

    def _hang_up(self) -> None:
        self.close_connection = True
        self.wfile.flush()
        cut(self.connection)

    def _answer(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.request_log.status = status
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
            self.request_log.sent += len(body)

    # who may do what

    def _user(self) -> str | None:
        token = self.request_log.headers.get("authorization", "").removeprefix("Bearer ")
        if token not in ("", OWNER, STRANGER):
            raise RefusedError(401, message="Invalid credentials in Authorization header")
        return token or None

    def _repository(self, name: str, *, write: bool = False) -> Repository:
        held = self.hub.repositories.get(name)
        if held is None or (held.private and self.user != OWNER):
            status, message = (404, "Repository not found") if self.user else (401, "Invalid username or password.")
            raise RefusedError(status, "RepoNotFound", message)
        if write and self.user != OWNER:
            raise RefusedError(403 if self.user else 401, message="You don't have the rights to write to it")
        return held

    def _commit(self, name: str, revision: str) -> Commit:
        commit = self._repository(name).find(revision)
        if commit is None:
            raise RefusedError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    # the answers

    def create(self, body: bytes) -> Any:
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        if self.user != OWNER:
            message = "You don't have the rights to create a dataset under this namespace"
            raise RefusedError(403 if self.user else 401, message=message)
        url = f"{self.hub.endpoint}/datasets/{name}"
        if name in self.hub.repositories:
            self._answer(409, json.dumps({"error": "You already created this dataset repo", "url": url}).encode())
            return None
        self.hub.create(name, private=asked.get("private") or asked.get("visibility") == "private")
        return {"url": url, "name": name}

    def who(self) -> Any:
        if self.user is None:
            raise RefusedError(401, message="Invalid username or password.")
        return {"type": "user", "name": self.user.removeprefix("hf_"), "orgs": [{"name": "ModelZoos"}]}

    def validate(self, body: bytes) -> Any:
        return {"errors": [], "warnings": []}

    def info(self, name: str, revision: str) -> Any:
        commit, held = self._commit(name, revision or "main"), self._repository(name)
        bare = name.removeprefix(MODELS)
        told = {"_id": "0", "id": bare, "author": bare.split("/")[0], "sha": commit.sha, "private": held.private}
        told |= {"gated": held.gated, "disabled": False, "downloads": 0, "likes": 0, "tags": [], "lastModified": DATE}
        sizes = {path: {"size": blob.size} for path, blob in commit.files.items()} if "blobs" in self.query else {}
        siblings = [{"rfilename": path} | sizes.get(path, {}) for path in sorted(commit.files)]
        return told | {"createdAt": DATE, "siblings": siblings}

    def tree(self, name: str, revision: str, folder: str) -> Any:
        commit = self._commit(name, revision)
        start = f"{folder}/" if folder else ""
        paths = [path for path in sorted(commit.files) if path.startswith(start)]
        if not paths and folder:
            raise RefusedError(404, "EntryNotFound", f"{folder} does not exist on {revision}")
        folders = {str(parent) for path in paths for parent in PurePosixPath(path).parents}
        paths += sorted(path for path in folders if path.startswith(start) and path not in (".", folder))
        if self.query.get("recursive", "false").lower() != "true":
            paths = [path for path in paths if "/" not in path.removeprefix(start)]
        return [self._entry(commit, path) for path in paths]

    def paths_info(self, name: str, revision: str, body: bytes) -> Any:
        commit = self._commit(name, revision)
        asked = json.loads(body)["paths"] if body.startswith(b"{") else parse_qs(body.decode())["paths"]
        asked = [asked] if isinstance(asked, str) else asked
        found = [path for path in asked if any(held == path or held.startswith(f"{path}/") for held in commit.files)]
        return [self._entry(commit, path) for path in found]

    def _entry(self, commit: Commit, path: str) -> dict[str, Any]:
        blob = commit.files.get(path)
        last = {"lastCommit": {"id": commit.sha, "title": commit.title, "date": DATE}}
        if blob is None:
            return {"type": "directory", "path": path, "oid": hashlib.sha1(path.encode()).hexdigest(), "size": 0}
        entry: dict[str, Any] = {"type": "file", "path": path, "oid": blob.oid, "size": blob.size}
        if blob.is_lfs:
            entry["lfs"] = {"oid": blob.sha256, "size": blob.size, "pointerSize": 134}
        return entry | (last if self.query.get("expand", "false").lower() == "true" else {})

    def refs(self, name: str) -> Any:
        held = self._repository(name)
        told: dict[str, Any] = {"converts": []}
        for kind, refs in (("branches", held.branches), ("tags", held.tags)):
            place = "heads" if kind == "branches" else "tags"
            told[kind] = [{"name": ref, "ref": f"refs/{place}/{ref}", "targetCommit": refs[ref]} for ref in refs]
        return told

    def tag(self, name: str, revision: str, body: bytes) -> Any:
        held, commit, tag = self._repository(name, write=True), self._commit(name, revision), json.loads(body)["tag"]
        if tag in held.tags:
            raise RefusedError(409, message=f"Tag reference exists already: {tag}")
        held.tags[tag] = commit.sha
        return {}

    def untag(self, name: str, tag: str) -> Any:
        if self._repository(name, write=True).tags.pop(tag, None) is None:
            raise RefusedError(404, "RevisionNotFound", f"Invalid rev id: {tag}")
        return {}

    def branch(self, name: str, branch: str, body: bytes = b"{}") -> Any:
        held = self._repository(name, write=True)
        held.branches[branch] = self._commit(name, json.loads(body).get("startingPoint") or "main").sha
        return {}

    def preupload(self, name: str, revision: str, body: bytes) -> Any:
        self._repository(name, write=True)
        commit = self._commit(name, revision)
        told = []
        for file in json.loads(body)["files"]:
            path, blob = file["path"], commit.files.get(file["path"])
            is_lfs = file["size"] > 10_000_000 or b"\0" in base64.b64decode(file["sample"])
            is_lfs = is_lfs or path.endswith(".parquet")
            ignored = any(fnmatch.fnmatch(path, line) for line in self._lines(commit, ".gitignore"))
            entry = {"path": path, "uploadMode": "lfs" if is_lfs else "regular", "shouldIgnore": ignored}
            told.append(entry | ({"oid": blob.etag} if blob else {}))
        return {"files": told}

    def _lines(self, commit: Commit, path: str) -> list[str]:
        blob = commit.files.get(path)
        return (self.hub.folder / blob.sha256).read_text().split() if blob else []

    def batch(self, name: str, body: bytes) -> Any:
        self._repository(name, write=True)
        objects = []
        for asked in json.loads(body)["objects"]:
            place = {"href": f"{self.hub.endpoint}/lfs/{asked['oid']}"}
            check = {"href": f"{self.hub.endpoint}/lfs-verify"}
            held = (self.hub.folder / asked["oid"]).exists()
            objects.append(asked | ({} if held else {"actions": {"upload": place, "verify": check}}))
        return {"transfer": "basic", "objects": objects}

    def upload(self, oid: str, body: bytes) -> Any:
        if hashlib.sha256(body).hexdigest() != oid:
            raise RefusedError(400, message="the content does not match its SHA-256")
        (self.hub.folder / oid).write_bytes(body)
        return {}

    def verify(self, body: bytes) -> Any:
        asked = json.loads(body)
        if not (self.hub.folder / asked["oid"]).exists():
            raise RefusedError(404, message="not uploaded")
        return {}

    def commit(self, name: str, branch: str, body: bytes) -> Any:
        held = self._repository(name, write=True)
        lines = [json.loads(line) for line in body.splitlines()]
        head = self._commit(name, branch)
        if lines[0]["value"].get("parentCommit", head.sha) != head.sha:
            raise RefusedError(412, message="A commit has happened since. Please refresh and try again.")
        files = dict(head.files)
        for key, value in ((line["key"], line["value"]) for line in lines[1:]):
            path = value["path"]
            if key == "file":
                files[path] = self.hub.store(base64.b64decode(value["content"]))
            elif key == "lfsFile":
                if not (self.hub.folder / value["oid"]).exists():
                    raise RefusedError(400, message=f"{path} was not uploaded")
                files[path] = self.hub.blob(value["oid"], is_lfs=True)
            elif key == "deletedFile":
                if files.pop(path, None) is None:
                    raise RefusedError(404, "EntryNotFound", "A file with this name doesn't exist")
            elif key == "deletedFolder":
                files = {held: blob for held, blob in files.items() if not held.startswith(f"{path.rstrip('/')}/")}
        made = held.commit(branch, lines[0]["value"]["summary"], files)
        url = f"{self.hub.endpoint}/datasets/{name}/commit/{made.sha}"
        return {"success": True, "commitOid": made.sha, "commitUrl": url}

    def resolve(self, name: str, revision: str, path: str) -> Any:
        commit = self._commit(name, revision)
        if self._repository(name).gated and self.user != OWNER:
            raise RefusedError(403 if self.user else 401, "GatedRepo", f"Access to dataset {name} is restricted")
        blob = commit.files.get(path)
        headers = {"X-Repo-Commit": commit.sha}
        if blob is None:
            self._answer(404, b"", headers | {"X-Error-Code": "EntryNotFound"})
            return None
        headers |= {"ETag": f'"{blob.etag}"', "X-Linked-Etag": f'"{blob.etag}"', "X-Linked-Size": str(blob.size)}
        if self.hub.cdn and blob.is_lfs:
            place = f"http://localhost:{self.hub.port}/cdn/{self.hub.link_key}/{blob.sha256}"
            self._answer(302, b"", headers | {"Location": place})
            return None
        self._send_file(blob, headers)
        return None

    def resolve_model(self, name: str, revision: str, path: str) -> Any:
        return self.resolve(f"{MODELS}{name}", revision, path)

    def download(self, key: str, sha256: str) -> Any:
        if int(key) != self.hub.link_key:
            raise RefusedError(403, message="Request has expired")
        self._send_file(self.hub.blob(sha256, is_lfs=True), {})
        return None

    def _send_file(self, blob: Blob, headers: dict[str, str]) -> None:
        start, stop, status = 0, blob.size, 200
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.request_log.headers.get("range", ""))
        if wanted and not self.hub.fault(("ignore range",), self.request_log):
            start, status = int(wanted[1]), 206
            stop = min(int(wanted[2]) + 1, blob.size) if wanted[2] else blob.size
            if start >= blob.size:
                self._answer(416, b"", {"Content-Range": f"bytes */{blob.size}"})
                return
            headers = headers | {"Content-Range": f"bytes {start}-{stop - 1}/{blob.size}"}
        broken = self.hub.fault(("cut",), self.request_log) if self.command == "GET" else None
        self.request_log.status = status
        self.send_response(status)
        for name, value in {**headers, "Accept-Ranges": "bytes", "Content-Length": str(stop - start)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        stop = min(stop, start + broken.value) if broken else stop
        with (self.hub.folder / blob.sha256).open("rb") as file:
            file.seek(start)
            while start < stop:
                piece = file.read(min(CHUNK, stop - start))
                self.wfile.write(piece)
                start += len(piece)
                self.request_log.sent += len(piece)
        if broken:
            self._hang_up()


ROUTES: list[tuple[str, str, Callable[..., Any]]] = [
    ("POST", r"/api/repos/create", Handler.create),
    ("GET", r"/api/whoami-v2", Handler.who),
    ("POST", r"/api/validate-yaml", Handler.validate),
    ("GET", rf"{DATASET}(?:/revision/([^/]+))?", Handler.info),
    ("GET", rf"/api/({MODELS}[^/]+/[^/]+)(?:/revision/([^/]+))?", Handler.info),
    ("GET", rf"{DATASET}/tree/([^/]+)(?:/(.+))?", Handler.tree),
    ("POST", rf"{DATASET}/paths-info/([^/]+)", Handler.paths_info),
    ("GET", rf"{DATASET}/refs", Handler.refs),
    ("POST", rf"{DATASET}/tag/([^/]+)", Handler.tag),
    ("DELETE", rf"{DATASET}/tag/([^/]+)", Handler.untag),
    ("POST", rf"{DATASET}/branch/([^/]+)", Handler.branch),
    ("POST", rf"{DATASET}/preupload/([^/]+)", Handler.preupload),
    ("POST", rf"{DATASET}/commit/([^/]+)", Handler.commit),
    ("POST", rf"/datasets/{NAME}\.git/info/lfs/objects/batch", Handler.batch),
    ("PUT", r"/lfs/([0-9a-f]{64})", Handler.upload),
    ("POST", r"/lfs-verify", Handler.verify),
    ("GET HEAD", rf"/datasets/{NAME}/resolve/([^/]+)/(.+)", Handler.resolve),
    ("GET HEAD", rf"/{NAME}/resolve/([^/]+)/(.+)", Handler.resolve_model),
    ("GET HEAD", r"/cdn/(\d+)/([0-9a-f]{64})", Handler.download),
]
