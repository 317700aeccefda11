"""Write files whole or not at all, read JSON, and hold a folder for one process."""

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from vitzoo_hf.format.schema import ZooError


def absolute(folder: Path) -> Path:
    """The one name of a folder, absolute and without links: what locks compare and other processes are given."""
    # Path.resolve raises RuntimeError at a loop of links before Python 3.13; here mkdir then says what is wrong
    return Path(os.path.realpath(folder))


@contextmanager
def exclusive(folder: Path) -> Iterator[Path]:
    """Hold `folder` for this process alone; the lock goes with the process, however that ends.

    Yields:
        The folder as `absolute` names it: what is handed on, to other processes too.

    Raises:
        ZooError: if another process holds it, or the folder cannot be written.
    """
    folder = absolute(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # timeout 0: a second process must say so at once, not wait for hours of training
        lock = FileLock(folder / ".lock", timeout=0)
        lock.acquire()
    except Timeout:
        raise ZooError(f"another process is working in {folder}: wait for it, or choose another folder") from None
    except OSError as error:
        raise ZooError(f"cannot write into {folder}: {error.strerror or error}") from None
    try:
        yield folder
    finally:
        lock.release()


def make_folder(out: Path) -> None:
    """Make the folder that a verb is to fill, before it computes anything.

    Raises:
        ZooError: if it cannot be made or written into.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        # the permission bits do not tell (root, read-only mounts, quotas): only writing does
        with TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise ZooError(f"--out: cannot write into {out}: {error.strerror}; give another folder") from None


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it: readers see all of it or nothing.

    Raises:
        ZooError: if the folder cannot be written or the disk is full; `path` is left as it was.
    """
    try:
        # in the same folder, as a rename is atomic within one file system only
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=".tmp-", suffix=path.suffix)
        os.close(descriptor)
    except OSError as error:
        raise ZooError(f"cannot write into {path.parent}: {error.strerror}") from None
    temporary = Path(name)
    try:
        write(temporary)
        # mkstemp makes files that only their owner can read
        temporary.chmod(0o644)
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ZooError(
            f"cannot write {path}: {reason}; what was finished is kept, the same command continues"
        ) from None
    finally:
        # after a rename there is nothing left; after an error or an interrupt there is
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: object, *, indent: int | None = 1) -> None:
    """Write `value` as JSON, atomically; with `indent=None` on one line."""
    text = json_text(value, indent=indent)
    write_atomically(path, lambda file: file.write_text(text, encoding="utf-8"))


def json_text(value: object, *, indent: int | None = 1) -> str:
    """What `write_json` writes, line break included."""
    return json.dumps(value, indent=indent, ensure_ascii=False) + "\n"


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        ZooError: if the file is missing or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ZooError(f"cannot read {path}: {error}") from None
