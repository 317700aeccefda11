"""Folders that are costly to build, built once for all processes and sessions of tests until code changes.

They lie beside pytest's own temporary folders, or in the folder of `--basetemp`. A folder is renamed to a name that
holds the hash of its files once it is whole, so one that is cut short is never used.
"""

import hashlib
import inspect
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from places import TESTS

PACKAGES = ("datasets", "numpy", "pandas", "pyarrow", "safetensors", "scikit-learn", "scipy", "timm", "torch")
PREFIX = "vitzoo-shared-"
UNUSED_SECONDS = 24 * 3600
"""A folder that no process opened for so long, longer than any session, is removed."""


class SharedFolders:
    """Builds folders, or opens those that another process built, and checks that no test changed them.

    Attributes:
        root: where the folders lie.
        opened: name -> the folder that this process uses.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.opened: dict[str, Path] = {}

    def get(self, name: str, build: Callable[[Path], object]) -> Path:
        """The folder that `build` wrote, here or in another process; it is given an empty folder.

        Args:
            name: says in paths what the folder holds.
            build: must decide on the contents alone: of what it uses only the package, the helpers of the tests, the
                file that defines it and the versions of some packages are in the fingerprint.
        """
        builder = Path(inspect.getfile(build))
        key = fingerprint(builder, AT_START)
        place = self._reserve(f"{PREFIX}{name}-{key}")
        with FileLock(place / "lock"):
            for leftover in place.glob("partial-*"):
                shutil.rmtree(leftover, ignore_errors=True)
            whole = next(place.glob("whole-*"), None)
            if whole is None:
                # a name of its own: orphans of a killed process may still be writing into the folder they know
                partial = Path(tempfile.mkdtemp(prefix="partial-", dir=place))
                build(partial)
                if fingerprint(builder, hashes_of_files()) != key:
                    pytest.fail(
                        "the code changed since this session began, so that it builds no shared folder: rerun"
                    )
                whole = partial.rename(place / f"whole-{digest(partial)}")
        self.opened[name] = whole
        self.check_all()
        return whole

    def check_all(self) -> None:
        """Fail if the files of a folder in use are no longer those that were built, and remove such folders."""
        changed = [whole for whole in self.opened.values() if not is_whole(whole)]
        for whole in changed:
            shutil.rmtree(whole, ignore_errors=True)
        if changed:
            named = ", ".join(map(str, changed))
            pytest.fail(f"a test changed the shared folder {named}: change a copy; the next session builds it again")

    def _reserve(self, name: str) -> Path:
        """Make the place of a folder, and remove those that are out of use."""
        place = self.root / name
        with FileLock(self.root / f"{PREFIX}lock"):
            place.mkdir(exist_ok=True)
            os.utime(place)
            for other in self.root.glob(f"{PREFIX}*-*"):
                if other.stat().st_mtime < time.time() - UNUSED_SECONDS:
                    shutil.rmtree(other, ignore_errors=True)
        return place


def root_of(basetemp: Path, in_worker: bool) -> Path:
    """Where processes share folders: for all sessions of a user, or with `--basetemp` for those of this session."""
    session = basetemp.parent if in_worker else basetemp
    return session.parent if session.parent.name.startswith("pytest-of-") else session


def is_whole(folder: Path) -> bool:
    """Whether the files are those that the name of the folder was made from."""
    return folder.is_dir() and folder.name == f"whole-{digest(folder)}"


def digest(folder: Path) -> str:
    """A hash of the names and contents of all files in a folder."""
    sha = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        content = file.read_bytes() if file.is_file() else b""
        sha.update(f"{file.relative_to(folder)}\0{len(content)}\0".encode() + content)
    return sha.hexdigest()[:32]


def hashes_of_files() -> dict[Path, bytes]:
    """Hashes of all that a build may read of this repository."""
    files = {*TESTS.glob("*.yaml"), *TESTS.rglob("*.py")}
    for folder in (TESTS.parent / "vitzoo_hf", TESTS.parent / "cards"):
        files |= {file for file in folder.rglob("*") if file.is_file() and file.suffix != ".pyc"}
    return {file: hashlib.sha256(file.read_bytes()).digest() for file in sorted(files)}


def fingerprint(builder: Path, hashes: dict[Path, bytes]) -> str:
    """Changes with what decides on a build: code and blueprints, but no tests beside the builder's, and versions."""
    versions = [f"{package} {version(package)}" for package in PACKAGES]
    sha = hashlib.sha256(
        repr([platform.python_version(), torch.backends.cpu.get_cpu_capability(), versions]).encode()
    )
    if builder not in hashes:
        sha.update(builder.read_bytes())
    for file, hashed in hashes.items():
        if file == builder or not file.name.startswith("test_"):
            sha.update(f"{file.relative_to(TESTS.parent)}\0".encode() + hashed)
    return sha.hexdigest()[:16]


AT_START = hashes_of_files()
"""Of the code that this process imports: a file that is edited later is not what it runs."""
