"""Folders by one absolute name, and held by one process at a time."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from vitzoo_hf.schema import ZooError


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
