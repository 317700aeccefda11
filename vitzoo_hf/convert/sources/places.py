"""Read a published zoo from a folder, or from a web server that lists its folders as JSON.

Names in listings are untrusted: a name that could lead out of the place is refused. Files of a server are not stored:
each is in memory while it is converted, and an interrupted transfer resumes.
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
from vitzoo_hf.format.hub_errors import ATTEMPTS, FIRST_WAIT, LONGEST_WAIT, TRANSIENT
from vitzoo_hf.format.messages import one_line
from vitzoo_hf.format.schema import ZooError

# limits on what an untrusted server or folder may put into memory
MAX_LISTING_BYTES = 32_000_000
MAX_ENTRIES = 200_000
# the longest name that common file systems hold
MAX_NAME = 255
MOST_TRANSFERS = 200  # of one file: a server that sends a byte a time would never end
LONGEST_ASKED_WAIT = 120
TIMEOUT = 30.0
CHUNK = 1 << 20
NOT_SHOWN = "its name has characters that cannot be shown: rename it"


@dataclass(frozen=True)
class Entry:
    """A file or folder of a listing.

    Attributes:
        name: name without a path.
        is_folder: whether the entry is a folder.
        size: number of bytes, where the place gives it.
    """

    name: str
    is_folder: bool
    size: int | None = None


def unsafe(name: object) -> str | None:
    """Give the reason for which a name of a listing is refused; None for a plain name.

    >>> unsafe("checkpoint_89") is None
    True
    >>> unsafe("../secret")
    'it is no plain name'
    """
    if not isinstance(name, str) or not name or name in (".", ".."):
        return "it is no plain name"
    if len(name) > MAX_NAME:
        return f"it has {len(name)} characters"
    # percent escapes too: a server may decode them to a path that leads out
    if re.search(r"[/\\]|%2e|%2f|%5c", name, re.IGNORECASE) or not is_shown(name):
        return "it is no plain name"
    return None


def is_shown(name: str) -> bool:
    """Return whether a name is free of control and formatting characters, line breaks, and invalid UTF-8."""
    # control and format characters can rewrite a line of a terminal, or hide a part of a name
    return not any(unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") for character in name)


def shown(name: object) -> str:
    """Make a name of a listing printable: short, on one line.

    >>> shown("a\\nb")
    "'a\\\\nb'"
    """
    return name if isinstance(name, str) and unsafe(name) is None else ascii(name)[:80]


def parsed(data: bytes) -> object:
    """Parse untrusted JSON; None if it is not JSON, or nested too deep to be read.

    >>> parsed(b'{"a": 1}'), parsed(b"{"), parsed(b"[" * 100_000)
    ({'a': 1}, None, None)
    """
    try:
        content: object = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return content


class FolderPlace:
    """A folder on this machine."""

    def __init__(self, root: Path) -> None:
        self.name = str(root)
        self.root = root.resolve()
        self.refused: dict[str, str] = {}

    def listing(self, path: str = "") -> list[Entry]:
        """List a folder by name; hidden entries are left out.

        Raises:
            ZooError: if it cannot be listed.
        """
        folder = self.root / path
        try:
            # by name: the order of a directory differs between file systems, and decides the order of rows
            files = sorted(folder.iterdir(), key=lambda file: file.name)
        except OSError as error:
            raise ZooError(f"{path or self.name} cannot be listed: {error.strerror}") from None
        if len(files) > MAX_ENTRIES:
            raise ZooError(f"{path or self.name} has {len(files)} entries; at most {MAX_ENTRIES} are expected")
        entries = []
        for file in files:
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
        """Make the entry of a file or folder; none for devices and pipes."""
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
            # resolved: a link may lead anywhere, whatever its own path is
            return file.resolve(strict=True).is_relative_to(self.root)
        # older Pythons raise RuntimeError for a loop of links
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
        """Return the file of a checkpoint.

        Raises:
            SourceError: if the whole folder is gone, such as a disk that was unplugged.
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
        entries = self._entry(file) if self._is_inside(file) else []
        if not entries or entries[0].is_folder:
            raise ZooError(f"it has no file `{file.name}`")
        if entries[0].size == 0:
            raise ZooError(f"its file `{file.name}` has 0 bytes")
        return entries[0].size


@dataclass
class _Download:
    """The received part of a file, and its version.

    Attributes:
        data: bytes from the start of the file.
        version: entity tag or date of the file, if the server sends one.
        total: number of bytes of the complete file, if the server sends it.
    """

    data: bytearray = field(default_factory=bytearray)
    version: str | None = None
    total: int | None = None

    @property
    def is_complete(self) -> bool:
        """Whether all bytes have been received, as far as the server gives their number."""
        return self.total is None or len(self.data) == self.total

    def begin(self, answer: Any) -> None:
        """Prepare for the body of an answer; begin anew if it does not continue this very version."""
        # a server may ignore the range and send the file from its start, with status 200
        part = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", answer.headers.get("Content-Range", ""), re.ASCII)
        continues = answer.status == 206 and part is not None and int(part[1]) == len(self.data)
        if self.data and not (continues and part is not None and self.total in (None, int(part[2]))):
            self.data.clear()
            if answer.status == 206:
                raise ConnectionError("the server sent another part than the one asked for")
        tag = answer.headers.get("ETag", "")
        # a weak tag (W/) does not promise equal bytes, so a transfer cannot resume by it
        self.version = (None if tag.startswith("W/") else tag) or answer.headers.get("Last-Modified")
        self.total = None if answer.length is None else len(self.data) + answer.length


class WebPlace:
    """A web server with JSON listings: a list of `{"name", "type": "directory" | "file", "size"}` for each folder.

    Args:
        address: address of the folder.

    Raises:
        ZooError: if it is no plain http(s) address.
    """

    attempts = ATTEMPTS

    def __init__(self, address: str) -> None:
        try:
            parts = urlsplit(address)
            # `port` raises ValueError for a number that is none, which is why it is read here
            plain = parts.scheme in ("http", "https") and parts.hostname and (parts.port or 1)
        except ValueError:
            plain = False
        if not plain or "@" in parts.netloc or parts.query or parts.fragment or not address.isascii():
            raise ZooError("the address of a source is http(s)://HOST/PATH: without user, password, ? or #")
        self.name = self.address = address.rstrip("/")
        self.refused: dict[str, str] = {}
        self._was_listed = False

    def listing(self, path: str = "") -> list[Entry]:
        """List a folder by name.

        Raises:
            ZooError: if the server lists no such folder, or not as JSON.
            SourceError: if the server does not answer.
        """
        items = parsed(bytes(self._fetch(f"{path}/" if path else "", MAX_LISTING_BYTES)))
        if not isinstance(items, list) or len(items) > MAX_ENTRIES:
            what = path or self.address
            raise ZooError(f"{what} is no listing: expected a JSON list of at most {MAX_ENTRIES} entries")
        self._was_listed = self._was_listed or not path
        entries = {}
        for item in items:
            name = item.get("name") if isinstance(item, dict) else None
            reason = unsafe(name)
            if not isinstance(name, str) or reason is not None:
                self.refused[_join(path, shown(name))] = str(reason)
            elif not name.startswith("."):
                size = item.get("size")
                # True is an int in Python
                is_size = isinstance(size, int) and not isinstance(size, bool) and size >= 0
                entries[name] = Entry(name, item.get("type") == "directory", size if is_size else None)
        # a dictionary first: a server may list a name twice
        return [entries[name] for name in sorted(entries)]

    def read(self, path: str, limit: int) -> bytes:
        """A small file.

        Raises:
            ZooError: if it is missing or larger than `limit`.
            SourceError: if the server does not answer.
        """
        return bytes(self._fetch(path, limit))

    def open(self, path: str) -> io.BytesIO:
        """Fetch the file of a checkpoint into memory.

        Raises:
            ZooError: if it is missing.
            SourceError: if the server does not answer.
        """
        return io.BytesIO(self._fetch(path, MAX_FILE_BYTES))

    def size(self, path: str) -> int | None:
        """Return None: the size of every file of a release would take as many requests."""
        return None

    def _fetch(self, path: str, limit: int) -> bytearray:
        """Fetch all bytes of a file; an interrupted transfer resumes, if the server can."""
        download = _Download()
        failures = 0
        for _ in range(MOST_TRANSFERS):
            before, requested_wait = len(download.data), 0.0
            try:
                self._transfer(path, limit, download)
                if download.is_complete:
                    return download.data
                reason = "the answer ended early"
            except urllib.error.HTTPError as error:
                error.close()
                reason = f"the server says {error.code}"
                if error.code == 416 and download.data:
                    # the file is shorter now: it was replaced while it was read
                    download.data.clear()
                elif error.code not in TRANSIENT:
                    raise self._missing(path, reason) from None
                requested_wait = _seconds(error.headers.get("Retry-After", ""))
            except (OSError, http_errors()) as error:
                reason = one_line(error)
            # a transfer with progress starts the count anew: a slow line may break many times
            failures = 1 if len(download.data) > before else failures + 1
            if failures >= self.attempts:
                break
            # the wait doubles with every failure in a row
            time.sleep(max(requested_wait, min(FIRST_WAIT * 2 ** (failures - 1), LONGEST_WAIT)))
        raise SourceError(f"{self.address}/{path} cannot be read: {reason}; the same command continues later")

    def _missing(self, path: str, reason: str) -> ZooError:
        """Make the error for a refused file: a `SourceError` if the server now refuses the whole source too."""
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

    def _transfer(self, path: str, limit: int, download: _Download) -> None:
        """Add the bytes of one request to a download."""
        # identity: a compressed answer could not resume, and its length would not be that of the file
        headers = {"User-Agent": "vitzoo-hf", "Accept-Encoding": "identity"}
        if download.data:
            headers["Range"] = f"bytes={len(download.data)}-"
            if download.version is not None:
                # the server then sends the whole file if it has changed since the first part
                headers["If-Range"] = download.version
        request = urllib.request.Request(f"{self.address}/{quote(path)}", headers=headers)
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
            download.begin(answer)
            # checked by the header and again while reading: a header may be missing or wrong
            too_long = f"{path or self.address} has more than {limit} bytes, which is not expected"
            if download.total is not None and download.total > limit:
                raise ZooError(too_long)
            while chunk := answer.read(CHUNK):
                download.data += chunk
                if len(download.data) > limit:
                    raise ZooError(too_long)


def _seconds(header: str) -> float:
    """Read the wait that a busy server requests, at most two minutes."""
    return float(min(int(header), LONGEST_ASKED_WAIT)) if re.fullmatch(r"[0-9]{1,6}", header) else 0.0


def http_errors() -> type[Exception]:
    """Return the error that the client raises for an answer that is cut or malformed."""
    from http.client import HTTPException

    return HTTPException


def _join(path: str, name: str) -> str:
    return f"{path}/{name}" if path else name
