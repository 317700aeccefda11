"""One training of the original ViT model zoo as it lies in its folder: config, results per epoch, checkpoints."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vitzoo_hf.foreign.places import FolderPlace, WebPlace
from vitzoo_hf.schema import ZooError

MAX_CONFIG_BYTES = 1_000_000
MAX_RESULT_BYTES = 64_000_000
MAX_EPOCHS = 100_000
MAX_LEVELS = 20
CHECKPOINT = re.compile(r"checkpoint_?0*([0-9]{1,6})", re.ASCII)
PRIVATE = re.compile(
    r"hostname|node_ip|pid|user|path|dump|dir|cluster|address|trial_id|date|timestamp", re.IGNORECASE
)
LOCATED = re.compile(r"^(/|~|[A-Za-z]:[\\/])|[\\/].*[\\/]|\b\d{1,3}(\.\d{1,3}){3}\b|@")


@dataclass(frozen=True)
class RunFiles:
    """A run's folder.

    Attributes:
        path: within the source.
        config: `config.json`.
        results: epochs completed -> what `result.json` says of them.
        checkpoints: index in the folder's name -> (path of the file, bytes where known).
    """

    path: str
    config: dict[str, Any]
    results: dict[int, dict[str, Any]]
    checkpoints: dict[int, tuple[str, int | None]]

    @property
    def epochs(self) -> int | None:
        """How long the training was to be."""
        told = self.config.get("training::epochs_train")
        return told if isinstance(told, int) and not isinstance(told, bool) and 0 < told <= MAX_EPOCHS else None


def read_run(place: FolderPlace | WebPlace, path: str, refused: dict[str, str]) -> RunFiles:
    """Read what a run's folder says; checkpoints that cannot be are added to `refused`.

    Raises:
        ZooError: if the run cannot be taken at all.
    """
    entries = {entry.name: entry for entry in place.listing(path)}
    if "config.json" not in entries:
        raise ZooError("it has no config.json")
    config = _object(place.read(f"{path}/config.json", MAX_CONFIG_BYTES), f"{path}/config.json")
    results: dict[int, dict[str, Any]] = {}
    if "result.json" in entries:
        results = parse_results(place.read(f"{path}/result.json", MAX_RESULT_BYTES), f"{path}/result.json")
    checkpoints: dict[int, tuple[str, int | None]] = {}
    for entry in entries.values():
        if not (entry.is_folder and entry.name.startswith("checkpoint")):
            continue
        where = f"{path}/{entry.name}"
        match = CHECKPOINT.fullmatch(entry.name)
        if match is None:
            refused[where] = "its name has no epoch in ASCII digits, such as checkpoint_89"
        elif int(match[1]) in checkpoints:
            refused[where] = f"its epoch is that of {checkpoints[int(match[1])][0]} too"
        else:
            try:
                checkpoints[int(match[1])] = (f"{where}/checkpoints", place.size(f"{where}/checkpoints"))
            except ZooError as error:
                refused[where] = str(error)
    if not checkpoints:
        raise ZooError("it has no checkpoint")
    return RunFiles(path, config, results, checkpoints)


def parse_results(data: bytes, name: str) -> dict[int, dict[str, Any]]:
    """Epochs completed -> results, from JSON lines, an array of objects, or one object.

    >>> parse_results(b'{"training_iteration": 1, "test_acc": 0.5}\\n{"training_iteration": 2}', "x")[1]["test_acc"]
    0.5

    Raises:
        ZooError: if it is neither.
    """
    text = data.decode("utf-8", errors="replace").strip()
    try:
        told = json.loads(text)
        entries = told if isinstance(told, list) else [told]
    except (ValueError, RecursionError):
        try:
            entries = [json.loads(line) for line in text.splitlines() if line.strip()]
        except (ValueError, RecursionError):
            raise ZooError(f"{name} is neither JSON nor JSON lines") from None
    if not all(isinstance(entry, dict) for entry in entries):
        raise ZooError(f"{name} does not hold objects, one an epoch")
    found = {}
    for position, entry in enumerate(entries):
        epoch = entry.get("training_iteration", position + 1)
        if isinstance(epoch, int) and not isinstance(epoch, bool) and 0 <= epoch <= MAX_EPOCHS:
            found[epoch] = entry
    return found


def public(value: Any, level: int = 0) -> Any:
    """A config without paths, hosts and people, as strict JSON can hold it: what is published of it."""
    if level > MAX_LEVELS:
        return None
    if isinstance(value, Mapping):
        keys = [key for key in map(str, value) if not PRIVATE.search(key) and public(key) is not None]
        kept = {key: public(value[key], level + 1) for key in keys}
        return {key: entry for key, entry in kept.items() if entry is not None}
    if isinstance(value, list):
        return [public(entry, level + 1) for entry in value[:1000]]
    if isinstance(value, str):
        return None if LOCATED.search(value) or len(value) > 500 else value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, bool | int) else None


def _object(data: bytes, name: str) -> dict[str, Any]:
    try:
        told = json.loads(data)
    except (ValueError, RecursionError):
        told = None
    if not isinstance(told, dict):
        raise ZooError(f"{name} is no JSON object")
    return told
