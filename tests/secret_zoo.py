"""A zoo whose rows carry a secret that only the bias of one class tells, and a role."""

from pathlib import Path
from typing import Any

import numpy as np

from vitzoo_hf.format import schema
from vitzoo_hf.publish.folder import Rows, write_zoo
from vitzoo_hf.zoo import Zoo

RATIOS = (0.3, 0.5)


def secret_zoo(
    folder: Path,
    tiny_zoo: Path,
    *,
    models: int = 40,
    leak: float = 1.0,
    noise: float = 0.01,
    ratios: tuple[float, ...] = RATIOS,
    examples: tuple[int, ...] = (1024,),
) -> Zoo:
    """Fine-tunes of one parent: noise on every weight, and `leak` times the class of the ratio on the last bias."""
    source = Zoo(tiny_zoo)
    child = next(source.filter(stage="finetune", head="linear", is_final=True, factor_optimizer="adamw").rows())
    parent = source.row(child["parent_id"])
    extra = {"role": "string", "label_ratio": "float", "number": "int"}
    extra |= {"trained_images": "int", "trained_steps": "int", "trained_sha256": "string"}
    rows = [dict(parent) | {f"factor_{name}": None for name in extra}]
    for number in range(models):
        rows.append(_row(child, number, leak, noise, ratios, examples))
    manifest = {name: value for name, value in source.manifest.items() if name != "files"}
    manifest["factors"] = dict(manifest["factors"]) | extra
    probes = {role: source.probe_rows(role) for role in ("selection", "test")}
    largest = max(row["num_parameters"] for row in rows)
    write_zoo(folder, manifest, {"train": Rows(len(rows), largest, iter(rows))}, probes, source.blueprint_text)
    return Zoo(folder)


def _row(
    like: dict[str, Any], number: int, leak: float, noise: float, ratios: tuple[float, ...], examples: tuple[int, ...]
) -> dict[str, Any]:
    """Every second model is a target; classes take turns within a role."""
    secret = (number // 2) % len(ratios)
    drawn = np.random.default_rng(number).standard_normal(like["num_parameters"]).astype(np.float32)
    weights = like["weights"] + np.float32(noise) * drawn
    weights[-1] += np.float32(leak * secret)
    row = dict(like) | {"run_id": f"run{number}", "model_id": f"run{number}@{like['epoch']}", "weights": weights}
    row |= {"factor_role": ("target", "shadow")[number % 2], "factor_label_ratio": ratios[secret]}
    row |= {"factor_number": number, "factor_trained_images": examples[secret % len(examples)]}
    row |= {"factor_trained_steps": 100, "factor_trained_sha256": f"{number:064x}"}
    return row | {"weights_sha256": schema.weights_sha256(weights)}
