"""Runs in a storage that every machine reaches: a shared folder or an object store, through fsspec.

A run lies there as it lies in its `RunFolder`, file by file. Weights are written before the record that names them,
and what is read is compared with the record's size and hash, so that an upload cut short is trained again, never
believed. Nothing but the resume file is ever removed.
"""

import json
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitzoo_hf.format.atomic import write_atomically
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.training.checkpoint import RunFolder

RESUME = "resume.safetensors"
PROBE = ".vitzoo-probe"


@dataclass(frozen=True)
class StoredRun:
    """A run in storage: the fingerprint of its training, and the epochs that are there in full length."""

    fingerprint: str | None
    epochs: frozenset[int]


class RunStorage:
    """Runs under one fsspec URL.

    Args:
        url: `s3://BUCKET/FOLDER`, `file:///shared/folder` or any other URL of fsspec, or an absolute path.

    Raises:
        ZooError: if the URL cannot be used, or its fsspec backend is not installed.

    Example:
        >>> RunStorage("memory://runs").survey(["sl-s1"])
        {}
    """

    def __init__(self, url: str) -> None:
        try:
            from fsspec.core import url_to_fs
        except ImportError:
            raise ZooError("fsspec is not installed: run `pip install 'vitzoo-hf[ray]'`") from None
        scheme, separator, path = url.rpartition("://")
        # every machine would take a relative path from a directory of its own
        if (not separator or scheme in ("file", "local")) and not Path(path).is_absolute():
            raise ZooError(f"storage {url!r} is neither a URL nor an absolute path: give s3://…, file:///… or /…")
        # fsspec reads these characters as patterns of many files
        if set(url) & set("*?["):
            raise ZooError(f"storage {url!r} has one of *, ? and [: choose a name without them")
        try:
            self.fs, root = url_to_fs(url)
        except ImportError as error:
            raise ZooError(f"storage {url!r} needs a package that is not installed here: {error}") from None
        except Exception as error:
            raise ZooError(f"storage {url!r} cannot be used: {_reason(error)}") from None
        self.url, self.root = url.rstrip("/"), str(root).rstrip("/")
        self._stored: dict[Path, tuple[int, int]] = {}

    @property
    def folder(self) -> Path | None:
        """The storage as a folder of this machine; None where it is none."""
        from fsspec.implementations.local import LocalFileSystem

        return Path(self.root) if isinstance(self.fs, LocalFileSystem) else None

    @property
    def in_memory(self) -> bool:
        """Whether the storage is this process's own memory, which no other process sees."""
        from fsspec.implementations.memory import MemoryFileSystem

        return isinstance(self.fs, MemoryFileSystem)

    def check_writable(self) -> None:
        """Write a small object, read it and remove it.

        Raises:
            ZooError: if that cannot be done.
        """
        probe = f"{self.root}/{PROBE}"
        with self._explained("write into", self.url):
            self.fs.makedirs(self.root, exist_ok=True)
            self.fs.pipe_file(probe, b"vitzoo")
            content = self.fs.cat_file(probe)
            self.fs.rm_file(probe)
        if content != b"vitzoo":
            raise ZooError(f"{self.url} does not give back what is written into it: choose another storage")

    def survey(self, run_ids: Collection[str]) -> dict[str, StoredRun]:
        """What there is of these runs, by the sizes in their records; hashes are compared when epochs are fetched.

        Raises:
            ZooError: if the storage cannot be read.
        """
        sizes = self._sizes("")
        names = [
            name
            for name in sizes
            if name.partition("/")[0] in run_ids and (name.endswith("/run.json") or _is_record(name))
        ]
        with self._explained("read", self.url):
            contents = self.fs.cat([f"{self.root}/{name}" for name in names]) if names else {}
        epochs: dict[str, set[int]] = {}
        fingerprints: dict[str, str | None] = {}
        for name in names:
            run_id, value = name.partition("/")[0], _parsed(contents[f"{self.root}/{name}"])
            complete = epochs.setdefault(run_id, set())
            if not _is_record(name):
                fingerprints[run_id] = (value or {}).get("fingerprint")
            elif _is_full(value, sizes.get(_weights_of(name))):
                complete.add(_epoch(name))
        return {run_id: StoredRun(fingerprints.get(run_id), frozenset(epochs[run_id])) for run_id in epochs}

    def fetch(self, run_id: str, folder: Path, *, epochs: Collection[int] | None = None) -> None:
        """Copy a run, or only some of its kept epochs, into `folder / run_id`.

        What is damaged or incomplete in storage is left out; epochs that are there already are not copied again.

        Args:
            run_id: the run; it need not be in storage.
            folder: holds one folder a run.
            epochs: kept epochs to copy; by default all, and everything else of the run.

        Raises:
            ZooError: if the storage cannot be read, or the folder not be written.
        """
        place = folder / run_id
        try:
            place.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ZooError(f"cannot make {place}: {error.strerror}") from None
        sizes = {name.rpartition("/")[2]: size for name, size in self._sizes(run_id).items()}
        for name in ("run.json", "images.json", "diverged.json", RESUME) if epochs is None else ():
            if name in sizes:
                self._fetch_file(run_id, name, place)
        for name in sorted(filter(_is_record, sizes)):
            if epochs is None or _epoch(name) in epochs:
                self._fetch_epoch(run_id, name, sizes.get(_weights_of(name)), place)

    def store(self, run_id: str, folder: Path) -> None:
        """Copy what is new in `folder / run_id` into storage: weights first, then the record that names them.

        The resume file goes last, and is removed from storage where the folder has none.

        Raises:
            ZooError: if the storage cannot be written, or is full.
        """
        place = folder / run_id
        records = sorted(place.glob("epoch-*.json"))
        # weights before record: an upload cut short leaves no record that names missing weights
        epochs = [file for record in records for file in (record.with_suffix(".safetensors"), record)]
        for file in (place / "run.json", place / "images.json", *epochs, place / "diverged.json", place / RESUME):
            if file.is_file() and self._stored.get(file) != _state(file):
                # read before the upload, so that a file that changes meanwhile is uploaded again
                state = _state(file)
                self._put(file, f"{run_id}/{file.name}")
                self._stored[file] = state
        resume = f"{self.root}/{run_id}/{RESUME}"
        if not (place / RESUME).is_file():
            with self._explained("write", resume):
                if self.fs.exists(resume):
                    self.fs.rm_file(resume)

    def _sizes(self, below: str) -> dict[str, int]:
        """Sizes of all files below a folder of the storage, by their path in it."""
        with self._explained("read", self.url):
            # other machines write here meanwhile, and fsspec backends remember listings
            self.fs.invalidate_cache()
            try:
                entries: Mapping[str, Any] = self.fs.find(f"{self.root}/{below}".rstrip("/"), detail=True)
            except FileNotFoundError:
                entries = {}
        return {path.removeprefix(self.root).lstrip("/"): int(entry["size"]) for path, entry in entries.items()}

    def _fetch_file(self, run_id: str, name: str, place: Path) -> None:
        """Copy one file; JSON that cannot be read is left out."""
        path = f"{self.root}/{run_id}/{name}"
        if name.endswith(".json"):
            with self._explained("read", path):
                text = self.fs.cat_file(path)
            if _parsed(text) is None:
                return
            write_atomically(place / name, lambda file: file.write_bytes(text))
        else:
            write_atomically(place / name, lambda file: self._get(path, file))
        self._stored[place / name] = _state(place / name)

    def _fetch_epoch(self, run_id: str, name: str, size: int | None, place: Path) -> None:
        """Copy weights and record of an epoch, unless they are there or storage does not hold all of them."""
        path = f"{self.root}/{run_id}/{name}"
        with self._explained("read", path):
            text = self.fs.cat_file(path)
        record, weights = place / name, place / _weights_of(name)
        if not _is_full(_parsed(text), size):
            return
        if not (record.is_file() and record.read_bytes() == text and weights.is_file()) or (
            weights.stat().st_size != size
        ):
            # weights first: a record must never name weights that are not there
            write_atomically(weights, lambda file: self._get(f"{self.root}/{run_id}/{weights.name}", file))
            write_atomically(record, lambda file: file.write_bytes(text))
            try:
                RunFolder(place).load_epoch(_epoch(name))  # compares the hash of the record
            except ZooError:
                # damaged in storage: without the epoch here, training makes it again
                record.unlink()
                weights.unlink()
                return
        self._stored |= {file: _state(file) for file in (weights, record)}

    def _get(self, path: str, file: Path) -> None:
        with self._explained("fetch", path):
            self.fs.get_file(path, str(file))

    def _put(self, file: Path, name: str) -> None:
        """Write one object: by a rename in a folder; object stores show an object when all of it is there."""
        path = f"{self.root}/{name}"
        with self._explained("write", path):
            self.fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            if self.folder:
                write_atomically(Path(path), lambda temporary: shutil.copyfile(file, temporary))
            else:
                self.fs.put_file(str(file), path)

    @contextmanager
    def _explained(self, doing: str, what: str) -> Iterator[None]:
        """Say in one line what failed; backends of fsspec raise errors of many libraries."""
        try:
            yield
        except ZooError:
            raise
        except Exception as error:
            raise ZooError(f"cannot {doing} {what}: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    strerror = getattr(error, "strerror", None)
    lines = str(error).strip().splitlines()
    return strerror or (lines[0] if lines else type(error).__name__)


def _is_record(name: str) -> bool:
    name = name.rpartition("/")[2]
    return name.startswith("epoch-") and name.endswith(".json")


def _epoch(name: str) -> int:
    return int(name.rpartition("/")[2].removeprefix("epoch-").removesuffix(".json"))


def _weights_of(record: str) -> str:
    return record.removesuffix(".json") + ".safetensors"


def _is_full(record: dict[str, Any] | None, size: int | None) -> bool:
    return record is not None and size is not None and record.get("file_size") == size


def _parsed(text: bytes) -> dict[str, Any] | None:
    """The object that `text` is in JSON; None where it was cut short."""
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _state(file: Path) -> tuple[int, int]:
    status = file.stat()
    # a checkpoint that is replaced may have the size of the old one: the time tells them apart
    return status.st_size, status.st_mtime_ns
