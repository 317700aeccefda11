"""Where a published zoo lies: in a folder, or behind a web server that lists its folders as JSON.

Names in listings are other people's input: what could lead out of the place is refused by name. Nothing of a server
is kept: one file at a time is in memory, and a broken connection is taken up where it broke.
"""

import io
import json
import re
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from vitzoo_hf.foreign.plan import SourceError
from vitzoo_hf.hub_files import one_line
from vitzoo_hf.schema import ZooError

MAX_LISTING_BYTES = 32_000_000
MAX_ENTRIES = 200_000
MAX_NAME = 255
ATTEMPTS = 6
FIRST_WAIT, LONGEST_WAIT = 0.5, 8.0
TIMEOUT = 30.0
TRANSIENT = (408, 429, 500, 502, 503, 504)
CHUNK = 1 << 20


@dataclass(frozen=True)
class Entry:
    """A file or folder of a listing.

    Attributes:
        name: without a path.
        is_folder: whether it can be listed.
        size: bytes, where the place tells them.
    """

    name: str
    is_folder: bool
    size: int | None = None


def unsafe(name: Any) -> str | None:
    """Why a name of a listing is refused; None if it is a plain name.

    >>> unsafe("checkpoint_89") is None
    True
    >>> unsafe("../secret")
    'it is no plain name'
    """
    if not isinstance(name, str) or not name or name in (".", ".."):
        return "it is no plain name"
    if len(name) > MAX_NAME:
        return f"it has {len(name)} characters"
    if re.search(r"[/\\\x00-\x1f\x7f]|%2e|%2f|%5c", name, re.IGNORECASE):
        return "it is no plain name"
    return None


class FolderPlace:
    """A folder on this machine."""

    def __init__(self, root: Path) -> None:
        self.name = str(root)
        self.root = root.resolve()
        self.refused: dict[str, str] = {}

    def listing(self, path: str = "") -> list[Entry]:
        """What lies in a folder, by name; hidden entries are left out.

        Raises:
            ZooError: if it cannot be listed.
        """
        folder = self.root / path
        try:
            found = sorted(folder.iterdir(), key=lambda file: file.name)
        except OSError as error:
            raise ZooError(f"{path or self.name} cannot be listed: {error.strerror}") from None
        entries = []
        for file in found:
            if file.name.startswith("."):
                continue
            if not file.resolve().is_relative_to(self.root):
                self.refused[_join(path, file.name)] = "it is a link that leaves the source"
            elif file.is_dir() or file.is_file():
                entries.append(Entry(file.name, file.is_dir(), None if file.is_dir() else file.stat().st_size))
        return entries

    def read(self, path: str, limit: int) -> bytes:
        """A small file.

        Raises:
            ZooError: if it is missing or larger than `limit`.
        """
        file = self.root / path
        try:
            if file.stat().st_size > limit:
                raise ZooError(f"{path} has {file.stat().st_size} bytes; at most {limit} are expected")
            return file.read_bytes()
        except OSError as error:
            raise ZooError(f"{path} cannot be read: {error.strerror}") from None

    def open(self, path: str) -> Path:
        """The file of a checkpoint."""
        return self.root / path

    def size(self, path: str) -> int | None:
        """Bytes of a file.

        Raises:
            ZooError: if it is missing, empty, or a link that leaves the source.
        """
        file = self.root / path
        if not file.is_file() or not file.resolve().is_relative_to(self.root):
            raise ZooError(f"it has no file `{file.name}`")
        if file.stat().st_size == 0:
            raise ZooError(f"its file `{file.name}` has 0 bytes")
        return file.stat().st_size


class WebPlace:
    """A web server with JSON listings: a list of `{"name", "type": "directory" | "file", "size"}` for each folder."""

    attempts = ATTEMPTS

    def __init__(self, address: str) -> None:
        self.name = self.address = address.rstrip("/")
        self.refused: dict[str, str] = {}

    def listing(self, path: str = "") -> list[Entry]:
        """What lies in a folder, by name.

        Raises:
            ZooError: if the server lists no such folder, or not as JSON.
            SourceError: if the server does not answer.
        """
        data = bytes(self._fetch(f"{path}/" if path else "", MAX_LISTING_BYTES))
        try:
            told = json.loads(data)
        except ValueError:
            told = None
        if not isinstance(told, list) or len(told) > MAX_ENTRIES:
            raise ZooError(
                f"{self.address}/{path} is no listing: expected a JSON list of at most {MAX_ENTRIES} entries"
            )
        entries = {}
        for item in told:
            name = item.get("name") if isinstance(item, dict) else None
            reason = unsafe(name)
            if not isinstance(name, str) or reason is not None:
                self.refused[_join(path, ascii(name)[:80])] = str(reason)
            elif not name.startswith("."):
                size = item.get("size")
                known = size if isinstance(size, int) and not isinstance(size, bool) and size >= 0 else None
                entries[name] = Entry(name, item.get("type") == "directory", known)
        return [entries[name] for name in sorted(entries)]

    def read(self, path: str, limit: int) -> bytes:
        """A small file.

        Raises:
            ZooError: if it is missing or larger than `limit`.
            SourceError: if the server does not answer.
        """
        return bytes(self._fetch(path, limit))

    def open(self, path: str) -> io.BytesIO:
        """The file of a checkpoint, in memory.

        Raises:
            ZooError: if it is missing.
            SourceError: if the server does not answer.
        """
        return io.BytesIO(self._fetch(path, None))

    def size(self, path: str) -> int | None:
        """None: asking for the size of every file of a release would take as many requests."""
        return None

    def _fetch(self, path: str, limit: int | None) -> bytearray:
        """All bytes of a file; a broken transfer goes on where it broke, if the server can."""
        held = bytearray()
        failures = 0
        while True:
            before = len(held)
            try:
                if self._transfer(path, limit, held):
                    return held
                raise ConnectionError("the answer ended early")
            except urllib.error.HTTPError as error:
                error.close()
                if error.code not in TRANSIENT:
                    raise ZooError(f"{self.address}/{path} cannot be read: the server says {error.code}") from None
                reason = f"the server says {error.code}"
            except (urllib.error.URLError, OSError, ConnectionError, http_errors()) as error:
                reason = one_line(error)
            failures = 1 if len(held) > before else failures + 1
            if failures >= self.attempts:
                raise SourceError(f"{self.address}/{path} cannot be read: {reason}; the same command continues later")
            time.sleep(min(FIRST_WAIT * 2 ** (failures - 1), LONGEST_WAIT))

    def _transfer(self, path: str, limit: int | None, held: bytearray) -> bool:
        """Add what one request brings to `held`; whether that is all of it."""
        headers = {"User-Agent": "vitzoo-hf", "Accept-Encoding": "identity"}
        if held:
            headers["Range"] = f"bytes={len(held)}-"
        request = urllib.request.Request(f"{self.address}/{quote(path)}", headers=headers)
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
            told = answer.headers.get("Content-Range", "")
            if held and not (answer.status == 206 and told.startswith(f"bytes {len(held)}-")):
                held.clear()
            expected = answer.headers.get("Content-Length")
            end = None if expected is None else len(held) + int(expected)
            while chunk := answer.read(CHUNK):
                held += chunk
                if limit is not None and len(held) > limit:
                    raise ZooError(f"{self.address}/{path} has more than {limit} bytes, which is not expected")
            return end is None or len(held) == end


def http_errors() -> type[Exception]:
    """What the client raises for an answer that is cut or malformed."""
    from http.client import HTTPException

    return HTTPException


def _join(path: str, name: str) -> str:
    return f"{path}/{name}" if path else name
