"""Zoos for the tests of soups: rows of a trained model with noise added, as runs of several epochs."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vitzoo_hf.format import schema
from vitzoo_hf.publish.folder import Rows, write_zoo
from vitzoo_hf.zoo import Zoo


def noisy_zoo(
    folder: Path,
    tiny_zoo: Path,
    *,
    head: str = "linear",
    runs: int = 3,
    epochs: int = 4,
    noise: float = 0.05,
    change: Callable[[dict[str, Any]], Mapping[str, Any]] = lambda row: {},
    roles: tuple[str, ...] = ("selection", "test"),
    splits: tuple[str, ...] = ("train",),
) -> Zoo:
    """Runs of a supervised parent's child, each epoch with less noise than the one before, over splits in turn."""
    source = Zoo(tiny_zoo)
    like = next(source.filter(stage="finetune", head=head, is_final=True, factor_optimizer="adamw").rows())
    rows = [_row(like, run, epoch, epochs, noise, change) for run in range(runs) for epoch in range(epochs + 1)]
    probes = {role: source.probe_rows(role) for role in roles}
    manifest = {name: value for name, value in source.manifest.items() if name != "files"}
    parts = {}
    for number, split in enumerate(splits):
        some = [row for row in rows if int(row["run_id"].removeprefix("run")) % len(splits) == number]
        parts[split] = Rows(len(some), max(row["num_parameters"] for row in some), iter(some))
    write_zoo(folder, manifest, parts, probes, source.blueprint_text)
    return Zoo(folder)


def _row(
    like: Mapping[str, Any], run: int, epoch: int, epochs: int, noise: float, change: Callable[..., Any]
) -> dict[str, Any]:
    scale = noise * (1 + (epochs - epoch) / 4) * (1 + run / 4)
    drawn = np.random.default_rng([run, epoch]).standard_normal(like["num_parameters"]).astype(np.float32)
    row = dict(like) | {"run_id": f"run{run}", "model_id": f"run{run}@{epoch}", "epoch": epoch}
    row |= {"is_final": epoch == epochs, "weights": like["weights"] + np.float32(scale) * drawn}
    row |= {"provenance": json.dumps({"recipe": {"regime": "supervised"}})}
    row |= change(row)
    return row | {"weights_sha256": schema.weights_sha256(row["weights"])}
