"""One training of the original ViT model zoo as it lies in its folder: config, results per epoch, checkpoints.

Columns of a row of the original ViT model zoo: factors, results and provenance, from what its folder says.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vitzoo_hf.convert.sources.places import FolderPlace, WebPlace, parsed
from vitzoo_hf.format.schema import ZooError

MAX_CONFIG_BYTES = 1_000_000
MAX_RESULT_BYTES = 64_000_000
MAX_EPOCHS = 100_000
CHECKPOINT = re.compile(r"checkpoint_0*([0-9]{1,6})", re.ASCII)
MAX_DEPTH = 8
MAX_TEXT = 500
LARGEST = 1e300
PRIVATE = re.compile(
    r"host|node|pid|user|login|mail|path|dump|dir|root|cwd|home|cluster|address|trial_id|date|timestamp",
    re.IGNORECASE,
)
LOCATED = re.compile(
    r"(^|[\s=:,;\"'(])([/~]|[A-Za-z]:[\\/]|\\\\)|[\\/].*[\\/]|\d{1,3}(\.\d{1,3}){3}|@|([0-9a-f]{0,4}:){3,}",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class RunFiles:
    """A run's folder.

    Attributes:
        path: within the source.
        config: `config.json`.
        results: epochs completed -> what `result.json` says of them.
        checkpoints: index in the folder's name -> (path of the file, bytes where known).
        last: highest index of all checkpoints, those that cannot be taken among them.
        notes: what is to be known of it, in sentences about "it".
    """

    path: str
    config: dict[str, Any]
    results: dict[int, dict[str, Any]]
    checkpoints: dict[int, tuple[str, int | None]]
    last: int
    notes: list[str] = field(default_factory=list)

    @property
    def folder(self) -> str:
        """The name of its folder."""
        return self.path.rpartition("/")[2]

    @property
    def epochs(self) -> int | None:
        """How long the training was to be."""
        return epochs_of(self.config)


def epochs_of(config: Mapping[str, Any]) -> int | None:
    """How long a config says that a training was to be; None if it does not say it."""
    told = config.get("training::epochs_train")
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
    results, notes = _results(place, path, epochs_of(config)) if "result.json" in entries else ({}, [])
    seen: set[int] = set()
    checkpoints: dict[int, tuple[str, int | None]] = {}
    for entry in entries.values():
        if not (entry.is_folder and entry.name.startswith("checkpoint")):
            continue
        where = f"{path}/{entry.name}"
        match = CHECKPOINT.fullmatch(entry.name)
        if match is None:
            refused[where] = "its name has no epoch in ASCII digits, such as checkpoint_89"
            continue
        seen.add(int(match[1]))
        if int(match[1]) in checkpoints:
            refused[where] = f"its epoch is that of {checkpoints[int(match[1])][0]} too"
        else:
            try:
                checkpoints[int(match[1])] = (f"{where}/checkpoints", place.size(f"{where}/checkpoints"))
            except ZooError as error:
                refused[where] = str(error)
    if not checkpoints:
        raise ZooError("it has no checkpoint")
    return RunFiles(path, config, results, checkpoints, max(seen), notes)


def _results(
    place: FolderPlace | WebPlace, path: str, epochs: int | None
) -> tuple[dict[int, dict[str, Any]], list[str]]:
    """The results of a run, and what is to be noted of them; weights are taken without them too."""
    try:
        return parse_results(place.read(f"{path}/result.json", MAX_RESULT_BYTES), epochs)
    except ZooError as error:
        if type(error) is not ZooError:
            raise
        return {}, ["its result.json cannot be read: it has no results"]


def parse_results(data: bytes, epochs: int | None) -> tuple[dict[int, dict[str, Any]], list[str]]:
    """Epochs completed -> results, from JSON lines, an array of objects, or one object; and what is to be noted.

    Args:
        data: the file.
        epochs: how long the training was to be: objects that do not number themselves count in their order only if
            there are just as many.

    >>> parse_results(b'{"training_iteration": 2, "test_acc": 0.5}', None)[0][2]["test_acc"]
    0.5
    """
    whole = parsed(data)
    lines = [line for line in data.split(b"\n") if line.strip()]
    told = [parsed(line) for line in lines] if whole is None else whole if isinstance(whole, list) else [whole]
    entries = [entry for entry in told if isinstance(entry, dict)]
    notes = []
    if len(entries) < len(told):
        notes.append(f"{len(told) - len(entries)} of {len(told)} entries of its result.json cannot be read")
    found, unnumbered = {}, 0
    for position, entry in enumerate(entries):
        epoch = entry.get("training_iteration", position + 1 if len(told) == epochs else None)
        if isinstance(epoch, int) and not isinstance(epoch, bool) and 0 <= epoch <= MAX_EPOCHS:
            found[epoch] = entry
        else:
            unnumbered += 1
    if unnumbered:
        notes.append(f"{unnumbered} entries of its result.json do not say their epoch, and are left out")
    return found, notes


def public(value: Any, depth: int = 0) -> Any:
    """A config without paths, hosts and people: what is published of it.

    >>> public({"optim::lr": 0.1, "dataset::dump": "/home/me/data.pt", "seed": 7})
    {'optim::lr': 0.1, 'seed': 7}
    """
    if depth > MAX_DEPTH:
        return None
    if isinstance(value, Mapping):
        named = {str(key): entry for key, entry in value.items()}
        kept = {
            key: public(entry, depth + 1)
            for key, entry in named.items()
            if len(key) <= MAX_TEXT and not PRIVATE.search(key) and not LOCATED.search(key.replace("::", "."))
        }
        return {key: entry for key, entry in kept.items() if entry is not None}
    if isinstance(value, list):
        return [public(entry, depth + 1) for entry in value[:1000]]
    if isinstance(value, str):
        return None if LOCATED.search(value) or len(value) > MAX_TEXT else value
    if isinstance(value, bool):
        return value
    return value if isinstance(value, int | float) and abs(value) < LARGEST and math.isfinite(value) else None


def _object(data: bytes, name: str) -> dict[str, Any]:
    told = parsed(data)
    if not isinstance(told, dict):
        raise ZooError(f"{name} is no JSON object")
    return told


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
    """How a pre-trained run was trained, by its config, else by its folder's name; None if neither tells."""
    told = str(files.config.get("training::mode", "")).lower()
    return REGIMES.get(told) or REGIMES.get(files.folder[:2].lower())


def factors_of(files: RunFiles, parent: RunFiles | None) -> dict[str, Any]:
    """Generating factors of a run; a fine-tuned one has those of its pre-training too."""
    root = files if parent is None else parent
    config = files.config
    head_seed = None if parent is None else whole_number(config.get("model::head::seed"))
    return {
        "regime": regime_of(root),
        "ddp": root.config.get("training::ddp") is True or "ddp" in root.folder.lower(),
        "seed": _seed(files) if head_seed is None else head_seed,
        "parent_seed": None if parent is None else _seed(parent),
        "lr": number(config.get("optim::lr")),
        "optimizer": _word(config.get("optim::optimizer")),
        "weight_decay": number(config.get("optim::wd")),
        "head": "linear" if parent is None else _head(files),
    }


def dataset_of(files: RunFiles, *, is_pretraining: bool) -> str:
    """The images a run was trained on; those of its stage if its config does not say."""
    told = _word(files.config.get("dataset::name"))
    if told is None:
        return "imagenet-1k" if is_pretraining else "cifar-100"
    return DATASETS.get(re.sub(r"[^a-z0-9]", "", told), told)


def results_of(files: RunFiles, epoch: int, *, has_accuracy: bool) -> tuple[dict[str, float | None], list[str]]:
    """The results of an epoch, and what is to be noted of them."""
    told = files.results.get(epoch, {})
    found = {f"{part}_loss": number(told.get(f"{part}_loss")) for part in ("train", "test")}
    accuracies = {f"{part}_accuracy": number(told.get(f"{part}_acc")) for part in ("train", "test")}
    notes = []
    for name, value in accuracies.items():
        if not has_accuracy:
            accuracies[name] = None
        elif value is not None and not 0 <= value <= 1:
            notes.append("it records accuracies outside 0 to 1, which are left out")
            accuracies[name] = None
    train, test = accuracies.values()
    gap = None if train is None or test is None else train - test
    return found | accuracies | {"generalization_gap": gap}, notes


def provenance_of(files: RunFiles, regime: str) -> dict[str, Any]:
    """Where a run comes from: its config, and what its trainer did beside what that declares."""
    declared = {name: public(files.config.get(f"training::{name}")) for name in DECLARED}
    return {
        "release": "ViT model zoo",
        "recipe": {"regime": regime},
        "config": public(files.config),
        "declared": declared,
        "effective": _effective(declared),
    }


def image_record(dataset: str) -> dict[str, Any] | None:
    """How images are prepared for these models; None for a dataset that the release is not known to have."""
    if dataset not in IMAGES:
        return None
    record = {"source": dataset, "size": 224, "resize": 256, "crop": 224, "channels": 3, "class_names": []}
    return record | IMAGENET_STATISTICS | IMAGES[dataset]


def number(value: Any) -> float | None:
    """A finite number of JSON, or text of one, that a float32 can hold; None for anything else."""
    if isinstance(value, str) and re.fullmatch(r"[-+.0-9eE]{1,30}", value):
        try:
            value = float(value)
        except ValueError:
            return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= LARGEST_FLOAT32:
        return None
    return float(value)


def whole_number(value: Any) -> int | None:
    """A whole number of JSON that a column can hold; None for anything else."""
    held = number(value)
    if held is None or not held.is_integer() or not -LARGEST_INT <= int(value) < LARGEST_INT:
        return None
    return int(value)


def _head(files: RunFiles) -> str | None:
    """The head of a fine-tuned run, by its config, else by its folder's name."""
    told = files.config.get("model::head::mlp")
    if not isinstance(told, bool):
        named = re.search(r"FCMLP_(True|False)", files.folder)
        told = None if named is None else named[1] == "True"
    return {True: "mlp", False: "linear", None: None}[told]


def _seed(files: RunFiles) -> int | None:
    told = whole_number(files.config.get("seed"))
    named = re.search(r"seed_([0-9]{1,18})(?![0-9])", files.folder)
    return int(named[1]) if told is None and named is not None else told


def _word(value: Any) -> str | None:
    """A short plain name in lower case."""
    if not isinstance(value, str) or re.fullmatch(r"[A-Za-z0-9._+-]{1,60}", value) is None:
        return None
    return value.lower()


def _effective(declared: dict[str, Any]) -> dict[str, Any]:
    """What the published trainer does with the declared augmentation."""
    if declared["mixup"] is None and declared["cutmix"] is None:
        return {"label_smoothing": 0.0, "mixup": 0.0, "cutmix": 0.0, "random_erase": 0.0}
    return {
        "label_smoothing": declared["mixup"],
        "mixup": declared["cutmix"],
        "cutmix": 0.0,
        "random_erase": 0.25,
    }
