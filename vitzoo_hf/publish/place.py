"""Hold the place of a zoo while it is written: one writer, exact temporary names, and a folder that appears whole.

What lies beside a place under these names belongs to whoever holds it, so whoever holds it next may remove it.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from vitzoo_hf.format.atomic import absolute, exclusive
from vitzoo_hf.format.schema import ZooError


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold the place of a zoo for this process alone; the lock goes with the process, however that ends.

    Args:
        folder: the zoo, which need not exist; whoever writes tables into a zoo holds its place, too.

    Raises:
        ZooError: if another process writes this zoo, or the folder that it lies in cannot be written.
    """
    place = absolute(folder)
    with ExitStack() as entered:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            if os.access(place.parent, os.W_OK):
                # beside the zoo, which is replaced as a whole; timeout 0: the second writer must say so at once
                entered.enter_context(FileLock(beside(place, "lock"), timeout=0))
                restore(place)
            else:
                # a zoo cannot be replaced there, only get tables
                entered.enter_context(exclusive(place))
        except Timeout:
            raise ZooError(f"another process writes {folder}: wait for it, or choose another folder") from None
        except OSError as error:
            raise ZooError(f"cannot write into {folder.parent}: {error.strerror or error}") from None
        yield


def beside(place: Path, purpose: str) -> Path:
    """The name of what belongs to a place: exact, so that it is never that of another place."""
    return place.with_name(f".{place.name}.{purpose}")


@contextmanager
def fresh_folder(place: Path) -> Iterator[Path]:
    """An empty folder beside a place that is held, to be filled and swapped in; it is gone at the end.

    One that a killed writer left is removed: its lock is free, so it is dead.
    """
    fresh = beside(place, "writing")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    try:
        yield fresh
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def swap(fresh: Path, place: Path) -> None:
    """Put `fresh` in the place of `place`, which is removed."""
    restore(place)
    old = beside(place, "replaced")
    # two renames rather than a deletion first: `place` is missing for an instant only
    if place.exists():
        place.replace(old)
    fresh.replace(place)
    shutil.rmtree(old, ignore_errors=True)


def restore(place: Path) -> None:
    """Put back what a process that was killed between the renames of `swap` had moved away."""
    old = beside(place, "replaced")
    # a rename replaces an empty folder: somebody may have made one since
    if old.exists() and not (place.exists() and any(place.iterdir())):
        old.replace(place)
    shutil.rmtree(old, ignore_errors=True)
