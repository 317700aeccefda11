"""Where a published zoo lies: in a folder, or behind a web server that lists its folders as JSON.

Names in listings are other people's input: what could lead out of the place is refused by name. Nothing of a server
is kept: one file at a time is in memory, and a broken connection is taken up where it broke.
"""

import io
import json
import os
import re
import time
import unicodedata
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from vitzoo_hf.foreign.files import MAX_FILE_BYTES
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
NOT_SHOWN = "its name has characters that cannot be shown: rename it"


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
    if re.search(r"[/\\]|%2e|%2f|%5c", name, re.IGNORECASE) or not is_shown(name):
        return "it is no plain name"
    return None


def is_shown(name: str) -> bool:
    """Whether a name is free of control and formatting characters, line breaks, and bytes that are no UTF-8."""
    return not any(unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") for character in name)


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
            if not is_shown(file.name):
                self.refused[_join(path, ascii(file.name))] = NOT_SHOWN
            elif not self._holds(file):
                self.refused[_join(path, file.name)] = "it is a link that leaves the source, or leads nowhere"
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
        if not file.is_file() or not self._holds(file):
            raise ZooError(f"it has no file `{file.name}`")
        if file.stat().st_size == 0:
            raise ZooError(f"its file `{file.name}` has 0 bytes")
        return file.stat().st_size

    def _holds(self, file: Path) -> bool:
        """Whether a file, or what a link means, lies in the source; links may go in circles."""
        return file.exists() and Path(os.path.realpath(file)).is_relative_to(self.root)


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
        except (ValueError, RecursionError):
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
        return io.BytesIO(self._fetch(path, MAX_FILE_BYTES))

    def size(self, path: str) -> int | None:
        """None: asking for the size of every file of a release would take as many requests."""
        return None

    def _fetch(self, path: str, limit: int) -> bytearray:
        """All bytes of a file; a broken transfer goes on where it broke, if the file is still the same."""
        held = bytearray()
        version: list[str] = []
        failures = 0
        while True:
            before = len(held)
            try:
                if self._transfer(path, limit, held, version):
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

    def _transfer(self, path: str, limit: int, held: bytearray, version: list[str]) -> bool:
        """Add what one request brings to `held`, which is of `version`; whether that is all of it."""
        headers = {"User-Agent": "vitzoo-hf", "Accept-Encoding": "identity"}
        if held:
            headers["Range"] = f"bytes={len(held)}-"
            headers |= {"If-Range": version[0]} if version else {}
        request = urllib.request.Request(f"{self.address}/{quote(path)}", headers=headers)
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
            told = answer.headers.get("Content-Range", "")
            if held and not (answer.status == 206 and told.startswith(f"bytes {len(held)}-")):
                held.clear()
            if not held:
                tag = answer.headers.get("ETag", "")
                version[:] = [tag] if tag.startswith('"') else []
            expected = answer.headers.get("Content-Length", "")
            end = len(held) + int(expected) if expected.isdecimal() else None
            while chunk := answer.read(CHUNK):
                held += chunk
                if len(held) > limit:
                    raise ZooError(f"{self.address}/{path} has more than {limit} bytes, which is not expected")
            return end is None or len(held) == end


def http_errors() -> type[Exception]:
    """What the client raises for an answer that is cut or malformed."""
    from http.client import HTTPException

    return HTTPException


def _join(path: str, name: str) -> str:
    return f"{path}/{name}" if path else name
