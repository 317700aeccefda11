"""Where a published zoo lies: in a folder, or behind a web server that lists its folders as JSON.

Names in listings are other people's input: what could lead out of the place is refused by name. Nothing of a server
is kept: one file at a time is in memory, and a broken connection is taken up where it broke.
"""

import io
import json
import re
import time
import unicodedata
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from vitzoo_hf.convert.pickles import MAX_FILE_BYTES
from vitzoo_hf.convert.rows import SourceError
from vitzoo_hf.format.messages import one_line
from vitzoo_hf.format.schema import ZooError

MAX_LISTING_BYTES = 32_000_000
MAX_ENTRIES = 200_000
MAX_NAME = 255
ATTEMPTS = 6
MOST_TRANSFERS = 200
LONGEST_ASKED_WAIT = 120
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


def shown(name: Any) -> str:
    """A name of a listing as it may be printed: short, on one line.

    >>> shown("a\\nb")
    "'a\\\\nb'"
    """
    return name if unsafe(name) is None else ascii(name)[:80]


def parsed(data: bytes) -> Any:
    """JSON that somebody else wrote; None if it is not JSON, or nested too deep to be read.

    >>> parsed(b'{"a": 1}'), parsed(b"{"), parsed(b"[" * 100_000)
    ({'a': 1}, None, None)
    """
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
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
        if len(found) > MAX_ENTRIES:
            raise ZooError(f"{path or self.name} has {len(found)} entries; at most {MAX_ENTRIES} are expected")
        entries = []
        for file in found:
            reason = unsafe(file.name)
            if reason is not None:
                self.refused[_join(path, shown(file.name))] = reason
            elif not file.name.startswith("."):
                try:
                    entries += self._entry(file)
                except ZooError as error:
                    self.refused[_join(path, file.name)] = str(error)
        return entries

    def _entry(self, file: Path) -> list[Entry]:
        """The entry of a file or folder; nothing for devices, pipes and the like."""
        if not self._is_inside(file):
            raise ZooError("it is a link that leaves the source, or leads nowhere")
        try:
            if file.is_dir():
                return [Entry(file.name, True)]
            return [Entry(file.name, False, file.stat().st_size)] if file.is_file() else []
        except OSError as error:
            raise ZooError(f"it cannot be read: {error.strerror}") from None

    def _is_inside(self, file: Path) -> bool:
        try:
            return file.resolve(strict=True).is_relative_to(self.root)
        except (OSError, RuntimeError):
            return False

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
        """The file of a checkpoint.

        Raises:
            SourceError: if the whole folder has gone, such as a disk that was unplugged.
        """
        if not self.root.is_dir():
            raise SourceError(f"{self.name} is not there any more; the same command continues later")
        return self.root / path

    def size(self, path: str) -> int | None:
        """Bytes of a file.

        Raises:
            ZooError: if it is missing, empty, or a link that leaves the source.
        """
        file = self.root / path
        found = self._entry(file) if self._is_inside(file) else []
        if not found or found[0].is_folder:
            raise ZooError(f"it has no file `{file.name}`")
        if found[0].size == 0:
            raise ZooError(f"its file `{file.name}` has 0 bytes")
        return found[0].size


@dataclass
class _Download:
    """What has come of a file so far, and which version of it that is.

    Attributes:
        data: from its first byte on.
        version: its entity tag or date, if the server tells one.
        total: bytes of the whole file, if the server tells them.
    """

    data: bytearray = field(default_factory=bytearray)
    version: str | None = None
    total: int | None = None

    @property
    def whole(self) -> bool:
        """Whether nothing is missing, as far as it can be told."""
        return self.total is None or len(self.data) == self.total

    def take_up(self, answer: Any) -> None:
        """Note what an answer tells; begin again if it does not continue this very version."""
        told = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", answer.headers.get("Content-Range", ""), re.ASCII)
        continues = answer.status == 206 and told is not None and int(told[1]) == len(self.data)
        if self.data and not (continues and told is not None and self.total in (None, int(told[2]))):
            self.data.clear()
            if answer.status == 206:
                raise ConnectionError("the server sent another part than the one asked for")
        tag = answer.headers.get("ETag", "")
        self.version = (None if tag.startswith("W/") else tag) or answer.headers.get("Last-Modified")
        self.total = None if answer.length is None else len(self.data) + answer.length


class WebPlace:
    """A web server with JSON listings: a list of `{"name", "type": "directory" | "file", "size"}` for each folder.

    Args:
        address: of the folder.

    Raises:
        ZooError: if it is no plain http(s) address.
    """

    attempts = ATTEMPTS

    def __init__(self, address: str) -> None:
        try:
            parts = urlsplit(address)
            plain = parts.scheme in ("http", "https") and parts.hostname and (parts.port or 1)
        except ValueError:
            plain = False
        if not plain or "@" in parts.netloc or parts.query or parts.fragment or not address.isascii():
            raise ZooError("the address of a source is http(s)://HOST/PATH: without user, password, ? or #")
        self.name = self.address = address.rstrip("/")
        self.refused: dict[str, str] = {}
        self._was_listed = False

    def listing(self, path: str = "") -> list[Entry]:
        """What lies in a folder, by name.

        Raises:
            ZooError: if the server lists no such folder, or not as JSON.
            SourceError: if the server does not answer.
        """
        told = parsed(bytes(self._fetch(f"{path}/" if path else "", MAX_LISTING_BYTES)))
        if not isinstance(told, list) or len(told) > MAX_ENTRIES:
            what = path or self.address
            raise ZooError(f"{what} is no listing: expected a JSON list of at most {MAX_ENTRIES} entries")
        self._was_listed = self._was_listed or not path
        entries = {}
        for item in told:
            name = item.get("name") if isinstance(item, dict) else None
            reason = unsafe(name)
            if not isinstance(name, str) or reason is not None:
                self.refused[_join(path, shown(name))] = str(reason)
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
        """All bytes of a file; a broken transfer goes on where it broke, if the server can."""
        got = _Download()
        failures = 0
        for _ in range(MOST_TRANSFERS):
            before, asked = len(got.data), 0.0
            try:
                self._transfer(path, limit, got)
                if got.whole:
                    return got.data
                reason = "the answer ended early"
            except urllib.error.HTTPError as error:
                error.close()
                reason = f"the server says {error.code}"
                if error.code == 416 and got.data:
                    got.data.clear()
                elif error.code not in TRANSIENT:
                    raise self._missing(path, reason) from None
                asked = _seconds(error.headers.get("Retry-After", ""))
            except (OSError, http_errors()) as error:
                reason = one_line(error)
            failures = 1 if len(got.data) > before else failures + 1
            if failures >= self.attempts:
                break
            time.sleep(max(asked, min(FIRST_WAIT * 2 ** (failures - 1), LONGEST_WAIT)))
        raise SourceError(f"{self.address}/{path} cannot be read: {reason}; the same command continues later")

    def _missing(self, path: str, reason: str) -> ZooError:
        """The error for a file that the server refuses: of the file alone, or of all if it refuses everything now."""
        if path and self._was_listed:
            try:
                self.listing()
            except SourceError:
                raise
            except ZooError:
                return SourceError(
                    f"{self.address} is not listed any more: {reason}; the same command continues later"
                )
        return ZooError(f"{path or self.address} cannot be read: {reason}")

    def _transfer(self, path: str, limit: int, got: _Download) -> None:
        """Add what one request brings."""
        headers = {"User-Agent": "vitzoo-hf", "Accept-Encoding": "identity"}
        if got.data:
            headers["Range"] = f"bytes={len(got.data)}-"
            if got.version is not None:
                headers["If-Range"] = got.version
        request = urllib.request.Request(f"{self.address}/{quote(path)}", headers=headers)
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
            got.take_up(answer)
            too_long = f"{path or self.address} has more than {limit} bytes, which is not expected"
            if got.total is not None and got.total > limit:
                raise ZooError(too_long)
            while chunk := answer.read(CHUNK):
                got.data += chunk
                if len(got.data) > limit:
                    raise ZooError(too_long)


def _seconds(told: str) -> float:
    """How long a busy server asks to be left alone, at most two minutes."""
    return float(min(int(told), LONGEST_ASKED_WAIT)) if re.fullmatch(r"[0-9]{1,6}", told) else 0.0


def http_errors() -> type[Exception]:
    """What the client raises for an answer that is cut or malformed."""
    from http.client import HTTPException

    return HTTPException


def _join(path: str, name: str) -> str:
    return f"{path}/{name}" if path else name
