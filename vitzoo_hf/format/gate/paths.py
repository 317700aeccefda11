"""The one rule for paths of a zoo's files: within the folder, in any system, and by no link that leaves it."""

import os
import re
from pathlib import Path

from vitzoo_hf.format.gate.values import shown
from vitzoo_hf.format.schema import ZooError

# no part begins with a dot, so neither `..` nor hidden files; no backslash, drive, blank or control character
PATH = re.compile(r"(?!\.)[A-Za-z0-9._=+@-]+(/(?!\.)[A-Za-z0-9._=+@-]+)*", re.ASCII)
LONGEST_PATH = 500


def check_path(path: str, file: str) -> None:
    """Refuse a path that can be no file of a zoo.

    Args:
        path: relative to the zoo's folder.
        file: which file lists it, for the message.

    Raises:
        ZooError: for anything but names of letters, digits and `.`, `_`, `=`, `+`, `@`, `-`, with `/` between them.
    """
    if len(path) > LONGEST_PATH or PATH.fullmatch(path) is None:
        raise ZooError(f"{file} is damaged: it lists {shown(path)}, which is no file of a zoo")


def inside(folder: Path, name: str) -> Path:
    """The path of a file of a folder.

    Args:
        folder: the zoo; it may itself be a link.
        name: path within it.

    Raises:
        ZooError: if the name breaks the rule, or a link leads out of the folder; links of the Hub's cache from a
            snapshot to its content are followed.
    """
    check_path(name, f"the list of files of {folder}")
    file = folder / name
    root = os.path.realpath(folder)
    roots = [root]
    # .../snapshots/COMMIT/NAME is a link to .../blobs/SHA256
    if Path(root).parent.name == "snapshots":
        roots.append(os.path.realpath(Path(root).parents[1] / "blobs"))
    target = os.path.realpath(file)
    if not any(target.startswith(allowed.rstrip(os.sep) + os.sep) for allowed in roots):
        raise ZooError(f"{name} of {folder} is a link that leaves the folder: put the file itself there")
    return file
