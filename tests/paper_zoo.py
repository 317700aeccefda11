"""The light files of a zoo of the paper's size: every epoch of 250 ViT-S, without their 1.1 TB of weights."""

import hashlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vitzoo_hf.format import schema
from vitzoo_hf.models.architecture import Architecture
from vitzoo_hf.publish.folder import Shard, assemble, shard_name

SHARD_ROWS = 5
PRETRAINED = [("supervised", False, seed) for seed in (42, 6312)]
PRETRAINED += [("supervised", True, seed) for seed in (1957, 2517, 3753, 6312, 7853)]
PRETRAINED += [("contrastive", False, seed) for seed in (42, 2517, 6312)]
FINETUNED = list(itertools.product(("adamw", "sgd"), (0.003, 0.001, 0.0001), ("linear", "mlp"), (42, 6312)))
FACTORS = {"regime": "string", "ddp": "bool", "seed": "int", "parent_seed": "int", "optimizer": "string"}
FACTORS |= {"lr": "float", "head": "string"}
WHERE = {"stage": "finetune", "is_final": True, "factor_lr": 0.001, "head": "mlp"}
"""A question to the index, which 10 x 2 x 2 models answer."""


def write_light_files(folder: Path) -> None:
    """All of the zoo, its shards of weights empty: index, layouts, list of shards, card, manifest."""
    rows = list(_rows())
    parts: dict[str, list[dict[str, Any]]] = {"train": [], "validation": [], "test": []}
    for row in rows:
        share = hashlib.sha256(row["run_id"].encode()).digest()[0] / 256
        parts["train" if share < 0.7 else "validation" if share < 0.85 else "test"].append(row)
    layouts = {row["layout"]: Architecture(*_architecture(row["stage"], row["head"])).layout for row in rows}
    shards = {}
    for split, members in parts.items():
        count = -(-len(members) // SHARD_ROWS)
        for number in range(count):
            light = members[number * SHARD_ROWS : (number + 1) * SHARD_ROWS]
            shards[shard_name(split, number, count)] = Shard(_entry(split, number, light), light, layouts)
    manifest = {
        "format": schema.FORMAT_VERSION,
        "name": "vit-s",
        "blueprint_fingerprint": schema.fingerprint("paper"),
        "factors": FACTORS,
        "images": {},
        "splits": {"by": "run", "seed": 0, "train": 0.7, "validation": 0.15, "test": 0.15},
        "missing_runs": {},
    }
    assemble(folder, manifest, shards, {}, "name: vit-s\n")
    for name in shards:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()


def _entry(split: str, number: int, light: list[dict[str, Any]]) -> dict[str, Any]:
    ends = (np.cumsum([4 * row["num_parameters"] + 2467 for row in light]) + 4).tolist()
    about = {"rows": len(light), "bytes": ends[-1] + 20_117, "sha256": _digest(f"{split}{number}")}
    return about | {"gap": 4, "groups": [[1, end] for end in ends]}


def _architecture(stage: str, head: str) -> tuple[str, dict[str, Any], str, int | None]:
    classes = {"num_classes": 1000 if stage == "pretrain" else 100}
    return "vit_small_patch16_224", classes, head, 256 if head == "mlp" else None


def _rows() -> Iterator[dict[str, Any]]:
    for regime, ddp, seed in PRETRAINED:
        parent = f"{regime[0]}l{'-ddp' * ddp}-s{seed}"
        factors = {"regime": regime, "ddp": ddp, "seed": seed, "parent_seed": None}
        factors |= {"optimizer": "adamw", "lr": 0.001, "head": "linear"}
        yield from _run(parent, None, "pretrain", 90, factors)
        for optimizer, lr, head, own in FINETUNED:
            factors = {"regime": regime, "ddp": ddp, "seed": own, "parent_seed": seed}
            factors |= {"optimizer": optimizer, "lr": lr, "head": head}
            run_id = f"{parent}--{optimizer}-lr{lr}-{head}-s{own}"
            yield from _run(run_id, f"{parent}@90", "finetune", 50, factors)


def _run(
    run_id: str, parent_id: str | None, stage: str, epochs: int, factors: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    name, args, head, hidden = _architecture(stage, factors["head"])
    layout = Architecture(name, args, head, hidden).layout
    recipe = factors | {"batch_size": 256, "schedule": "constant", "mixup": 0.8, "cutmix": 1.0, "random_erase": 0.25}
    recipe |= {"label_smoothing": 0.1, "weight_decay": 0.0, "momentum": 0.0, "freeze_trunk": False}
    versions = {"timm": "1.0.31", "torch": "2.13.0", "vitzoo_hf": schema.VERSION}
    provenance = {"blueprint": "vit-s", "run_fingerprint": schema.fingerprint(run_id), "recipe": recipe}
    random = np.random.default_rng(int(_digest(run_id)[:8], 16))
    for epoch in range(1, epochs + 1):
        train, test = (int(random.integers(0, 9985)) / 9984 for _ in range(2))
        losses = random.random(2).astype(np.float32) * 5
        yield {
            "model_id": schema.model_id(run_id, epoch),
            "run_id": run_id,
            "parent_id": parent_id,
            "stage": stage,
            "epoch": epoch,
            "is_final": epoch == epochs,
            "dataset": "imagenet1k" if stage == "pretrain" else "cifar100",
            "architecture": name,
            "architecture_args": schema.canonical_json(args),
            "head": head,
            "head_hidden": hidden,
            **{f"factor_{factor}": value for factor, value in factors.items()},
            "train_loss": float(losses[0]),
            "train_accuracy": train,
            "test_loss": float(losses[1]),
            "test_accuracy": test,
            "generalization_gap": train - test,
            "num_parameters": layout.num_parameters,
            "layout": layout.fingerprint,
            "weights_sha256": _digest(f"{run_id}@{epoch}"),
            "dtype": "float32",
            "provenance": schema.canonical_json(provenance | {"epochs": epochs, "versions": versions}),
        }


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
