"""Read the folder of a run of the original ViT model zoo, and derive factors, results and provenance of its rows.

A folder has a config, results for each epoch, and checkpoints. All of it is untrusted: a value of the wrong type or
size becomes None, and paths, hosts and names of people are removed before anything is published.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypedDict

from vitzoo_hf.convert.sources.places import FolderPlace, WebPlace, parsed
from vitzoo_hf.format.schema import ZooError

Json = dict[str, object]
"""A JSON object of the release, untrusted."""

Results = dict[int, Json]
"""Epochs completed -> entry of `result.json`."""

# limits on untrusted files; above them a file is no config or result of this release
MAX_CONFIG_BYTES = 1_000_000
MAX_RESULT_BYTES = 64_000_000
MAX_EPOCHS = 100_000
# ASCII only: `\d` of text also matches digits of other scripts
CHECKPOINT = re.compile(r"checkpoint_0*([0-9]{1,6})", re.ASCII)
# a config may be nested without end, and is published
MAX_DEPTH = 8
MAX_TEXT = 500
LARGEST = 1e300
PRIVATE = re.compile(
    r"host|node|pid|user|login|mail|path|dump|dir|root|cwd|home|cluster|address|trial_id|date|timestamp",
    re.IGNORECASE,
)
# paths, network addresses and mail addresses in values, whatever the name of their entry
LOCATED = re.compile(
    r"(^|[\s=:,;\"'(])([/~]|[A-Za-z]:[\\/]|\\\\)|[\\/].*[\\/]|\d{1,3}(\.\d{1,3}){3}|@|([0-9a-f]{0,4}:){3,}",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class RunFiles:
    """A run's folder.

    Attributes:
        path: path of the folder within the source.
        config: content of `config.json`.
        results: epochs completed -> entry of `result.json`.
        checkpoints: index in the folder's name -> path of the file, and number of bytes where known.
        last: highest index of all checkpoints, refused ones included.
        notes: facts for users of the zoo, in clauses about "it".
    """

    path: str
    config: Json
    results: Results
    checkpoints: dict[int, tuple[str, int | None]]
    last: int
    notes: list[str] = field(default_factory=list)

    @property
    def folder(self) -> str:
        """Name of the folder."""
        return self.path.rpartition("/")[2]

    @property
    def epochs(self) -> int | None:
        """Planned epochs of the training; None if the config does not say."""
        return epochs_of(self.config)


def epochs_of(config: Json) -> int | None:
    """Read the planned epochs of a training; None if the config does not say."""
    epochs = config.get("training::epochs_train")
    # True is an int in Python
    return epochs if isinstance(epochs, int) and not isinstance(epochs, bool) and 0 < epochs <= MAX_EPOCHS else None


def read_run(place: FolderPlace | WebPlace, path: str, refused: dict[str, str]) -> RunFiles:
    """Read a run's folder; unreadable checkpoints are added to `refused`.

    Raises:
        ZooError: if the whole run is refused.
    """
    entries = {entry.name: entry for entry in place.listing(path)}
    if "config.json" not in entries:
        raise ZooError("it has no config.json")
    config = _object(place.read(f"{path}/config.json", MAX_CONFIG_BYTES), f"{path}/config.json")
    results, notes = _results(place, path, epochs_of(config)) if "result.json" in entries else ({}, [])
    indices: set[int] = set()
    checkpoints: dict[int, tuple[str, int | None]] = {}
    for entry in entries.values():
        if not (entry.is_folder and entry.name.startswith("checkpoint")):
            continue
        where = f"{path}/{entry.name}"
        match = CHECKPOINT.fullmatch(entry.name)
        if match is None:
            refused[where] = "its name has no epoch in ASCII digits, such as checkpoint_89"
            continue
        indices.add(int(match[1]))
        if int(match[1]) in checkpoints:
            refused[where] = f"its epoch is that of {checkpoints[int(match[1])][0]} too"
        else:
            try:
                checkpoints[int(match[1])] = (f"{where}/checkpoints", place.size(f"{where}/checkpoints"))
            except ZooError as error:
                refused[where] = str(error)
    if not checkpoints:
        raise ZooError("it has no checkpoint")
    return RunFiles(path, config, results, checkpoints, max(indices), notes)


def _results(place: FolderPlace | WebPlace, path: str, epochs: int | None) -> tuple[Results, list[str]]:
    """Read the results of a run, with notes; a run without readable results is converted too."""
    try:
        return parse_results(place.read(f"{path}/result.json", MAX_RESULT_BYTES), epochs)
    except ZooError as error:
        # a `SourceError` ends the conversion instead: the place is gone
        if type(error) is not ZooError:
            raise
        return {}, ["its result.json cannot be read: it has no results"]


def parse_results(data: bytes, epochs: int | None) -> tuple[Results, list[str]]:
    """Parse results from JSON lines, an array of objects, or one object: epochs completed -> results, and notes.

    Args:
        data: content of the file.
        epochs: planned epochs of the training; objects without a number are counted in their order only if there are
            exactly as many.

    >>> parse_results(b'{"training_iteration": 2, "test_acc": 0.5}', None)[0][2]["test_acc"]
    0.5
    """
    # JSON lines do not parse as one document, unless there is one line
    document = parsed(data)
    items: list[object]
    if document is None:
        items = [parsed(line) for line in data.split(b"\n") if line.strip()]
    else:
        items = document if isinstance(document, list) else [document]
    entries = [entry for entry in items if isinstance(entry, dict)]
    notes = []
    if len(entries) < len(items):
        notes.append(f"{len(items) - len(entries)} of {len(items)} entries of its result.json cannot be read")
    results, unnumbered = {}, 0
    for position, entry in enumerate(entries):
        # position counts only for a complete file: a gap would shift every later epoch
        epoch = entry.get("training_iteration", position + 1 if len(items) == epochs else None)
        if isinstance(epoch, int) and not isinstance(epoch, bool) and 0 <= epoch <= MAX_EPOCHS:
            results[epoch] = entry
        else:
            unnumbered += 1
    if unnumbered:
        notes.append(f"{unnumbered} entries of its result.json do not say their epoch, and are left out")
    return results, notes


def public(value: object, depth: int = 0) -> object:
    """Remove paths, hosts and people from a config before it is published.

    >>> public({"optim::lr": 0.1, "dataset::dump": "/home/me/data.pt", "seed": 7})
    {'optim::lr': 0.1, 'seed': 7}
    """
    if depth > MAX_DEPTH:
        return None
    if isinstance(value, Mapping):
        named = {str(key): entry for key, entry in value.items()}
        entries = {
            key: public(entry, depth + 1)
            for key, entry in named.items()
            if len(key) <= MAX_TEXT and not PRIVATE.search(key) and not LOCATED.search(key.replace("::", "."))
        }
        return {key: entry for key, entry in entries.items() if entry is not None}
    if isinstance(value, list):
        return [public(entry, depth + 1) for entry in value[:1000]]
    if isinstance(value, str):
        return None if LOCATED.search(value) or len(value) > MAX_TEXT else value
    if isinstance(value, bool):
        return value
    # JSON has neither NaN nor infinity
    return value if isinstance(value, int | float) and abs(value) < LARGEST and math.isfinite(value) else None


def _object(data: bytes, name: str) -> Json:
    content = parsed(data)
    if not isinstance(content, dict):
        raise ZooError(f"{name} is no JSON object")
    return content


DATASETS = {"imagenet1k": "imagenet-1k", "imagenet": "imagenet-1k", "cifar100": "cifar-100"}
FACTORS = {
    "regime": "string",
    "ddp": "bool",
    "seed": "int",
    "parent_seed": "int",
    "lr": "float",
    "optimizer": "string",
    "weight_decay": "float",
    "head": "string",
}
DECLARED = ("mixup", "cutmix", "randerase", "label_smoothing")
REGIMES = {"sl": "supervised", "cl": "contrastive"}
LARGEST_INT = 2**63
# results are stored as float32
LARGEST_FLOAT32 = 3.4028234e38
IMAGENET_STATISTICS = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
IMAGES = {
    "imagenet-1k": {
        "interpolation": "bilinear",
        "licence": "ImageNet terms of access; no image is part of this zoo",
    },
    "cifar-100": {"interpolation": "bicubic", "licence": "not stated by its authors; no image is part of this zoo"},
}


def regime_of(files: RunFiles) -> str | None:
    """Read the regime of a pre-trained run from its config, else from its folder's name; None if neither has it."""
    mode = str(files.config.get("training::mode", "")).lower()
    return REGIMES.get(mode) or REGIMES.get(files.folder[:2].lower())


class Factors(TypedDict):
    """The generating factors of a run; None where the release does not give a value that a column can hold."""

    regime: str | None
    ddp: bool
    seed: int | None
    parent_seed: int | None
    lr: float | None
    optimizer: str | None
    weight_decay: float | None
    head: str | None


def factors_of(files: RunFiles, parent: RunFiles | None) -> Factors:
    """Read the generating factors of a run; a fine-tuned run inherits factors of its parent."""
    root = files if parent is None else parent
    config = files.config
    head_seed = None if parent is None else whole_number(config.get("model::head::seed"))
    return {
        "regime": regime_of(root),
        # the name decides where the config does not say true
        "ddp": root.config.get("training::ddp") is True or "ddp" in root.folder.lower(),
        "seed": _seed(files) if head_seed is None else head_seed,
        "parent_seed": None if parent is None else _seed(parent),
        "lr": number(config.get("optim::lr")),
        "optimizer": _word(config.get("optim::optimizer")),
        "weight_decay": number(config.get("optim::wd")),
        "head": "linear" if parent is None else _head(files),
    }


def dataset_of(files: RunFiles, *, is_pretraining: bool) -> str:
    """Read the dataset of a run from its config; by default the dataset of its stage."""
    name = _word(files.config.get("dataset::name"))
    if name is None:
        return "imagenet-1k" if is_pretraining else "cifar-100"
    return DATASETS.get(re.sub(r"[^a-z0-9]", "", name), name)


def results_of(files: RunFiles, epoch: int, *, has_accuracy: bool) -> tuple[dict[str, float | None], list[str]]:
    """Read the results of an epoch, with notes."""
    entry = files.results.get(epoch, {})
    losses = {f"{part}_loss": number(entry.get(f"{part}_loss")) for part in ("train", "test")}
    accuracies = {f"{part}_accuracy": number(entry.get(f"{part}_acc")) for part in ("train", "test")}
    notes = []
    for name, value in accuracies.items():
        if not has_accuracy:
            accuracies[name] = None
        elif value is not None and not 0 <= value <= 1:
            notes.append("it records accuracies outside 0 to 1, which are left out")
            accuracies[name] = None
    train, test = accuracies.values()
    # train minus test, both at this epoch
    gap = None if train is None or test is None else train - test
    return losses | accuracies | {"generalization_gap": gap}, notes


def provenance_of(files: RunFiles, regime: str) -> dict[str, object]:
    """Describe the origin of a run: its public config, with declared and effective augmentation."""
    declared = {name: public(files.config.get(f"training::{name}")) for name in DECLARED}
    return {
        "release": "ViT model zoo",
        "recipe": {"regime": regime},
        "config": public(files.config),
        "declared": declared,
        "effective": _effective(declared),
    }


def image_record(dataset: str) -> dict[str, object] | None:
    """Describe how images are prepared for these models; None for a dataset that the release does not document."""
    if dataset not in IMAGES:
        return None
    record: dict[str, object] = {
        "source": dataset,
        "size": 224,
        "resize": 256,
        "crop": 224,
        "channels": 3,
        "class_names": [],
    }
    return record | IMAGENET_STATISTICS | IMAGES[dataset]


def number(value: object) -> float | None:
    """Read a finite number, or text of one, that a float32 can hold; None for anything else."""
    if isinstance(value, str) and re.fullmatch(r"[-+.0-9eE]{1,30}", value):
        try:
            value = float(value)
        except ValueError:
            return None
    # `not … <=` refuses NaN as well
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= LARGEST_FLOAT32:
        return None
    return float(value)


def whole_number(value: Any) -> int | None:
    """Read a whole number that a column can hold; None for anything else."""
    finite = number(value)
    # int(value), not the float: a float64 rounds whole numbers above 2**53
    if finite is None or not finite.is_integer() or not -LARGEST_INT <= int(value) < LARGEST_INT:
        return None
    return int(value)


def _head(files: RunFiles) -> str | None:
    """Read the head of a fine-tuned run from its config, else from its folder's name."""
    is_mlp = files.config.get("model::head::mlp")
    if not isinstance(is_mlp, bool):
        match = re.search(r"FCMLP_(True|False)", files.folder)
        is_mlp = None if match is None else match[1] == "True"
    return {True: "mlp", False: "linear", None: None}[is_mlp]


def _seed(files: RunFiles) -> int | None:
    # the name of the folder counts only where the config has no seed
    seed = whole_number(files.config.get("seed"))
    match = re.search(r"seed_([0-9]{1,18})(?![0-9])", files.folder)
    return int(match[1]) if seed is None and match is not None else seed


def _word(value: object) -> str | None:
    """Read a short plain name in lower case; None for anything else."""
    if not isinstance(value, str) or re.fullmatch(r"[A-Za-z0-9._+-]{1,60}", value) is None:
        return None
    return value.lower()


def _effective(declared: Mapping[str, object]) -> dict[str, object]:
    """Return the augmentation that the published trainer ran for a declared one.

    Its call shifted three positional arguments by one: `label_smoothing` received the value of `mixup`, `mixup` that
    of `cutmix`, and `cutmix` was off.
    """
    if declared["mixup"] is None and declared["cutmix"] is None:
        return {"label_smoothing": 0.0, "mixup": 0.0, "cutmix": 0.0, "random_erase": 0.0}
    return {
        "label_smoothing": declared["mixup"],
        "mixup": declared["cutmix"],
        "cutmix": 0.0,
        "random_erase": 0.25,
    }
