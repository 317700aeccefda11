"""Columns of a row of the original ViT model zoo: factors, results and provenance, from what its folder says."""

import re
from typing import Any

from vitzoo_hf.foreign.release_runs import RunFiles, public

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
