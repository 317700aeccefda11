"""Every pair of final models: how alike they predict, represent and lie in weight space.

Metrics that compare predictions are NaN for a pair with a model that does not classify these images; distances of
weights are NaN for models whose trunks differ in layout.
"""

import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from vitzoo_hf.evaluation.outputs_cache import OutputsCache
from vitzoo_hf.evaluation.weight_metrics import zoo_weight_metrics
from vitzoo_hf.format import schema
from vitzoo_hf.format.layout import trunk_key
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.metrics.agreement import agreement, cohen_kappa, error_consistency, error_overlap, jensen_shannon
from vitzoo_hf.metrics.behavior import predictions
from vitzoo_hf.metrics.cka import cka
from vitzoo_hf.metrics.features import FeatureFile
from vitzoo_hf.zoo import Zoo

BLOCK_BYTES = 2**28
LEAST_IMAGES = 4


def measure_pairs(
    zoo: Zoo,
    rows: Sequence[Mapping[str, Any]],
    classifiers: Sequence[int],
    cache: OutputsCache,
    digest: str,
    labels: Int64[Tensor, " N"],
    *,
    dataset: str,
    left_out: Collection[str] = (),
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> pd.DataFrame:
    """One row a pair of models, the columns of `schema.pair_features`.

    Args:
        zoo: exactly these models.
        rows: the same, without weights.
        classifiers: positions of those that classify the images.
        cache: has the outputs of all on the images.
        digest: of the images.
        labels: of the images.
        dataset: their name.
        left_out: models whose outputs are not finite: they have distances of weights alone.
        device: where the metrics are computed.
        progress: show bars.

    Raises:
        ZooError: for fewer than four images.
    """
    if len(labels) < LEAST_IMAGES:
        raise ZooError(f"there are {len(labels)} test images of {dataset!r}; comparing models takes at least 4")
    if len(rows) < 2:
        return pd.DataFrame({name: [] for name in schema.pair_features()})
    matrices = _of_features(rows, left_out, cache, digest)
    matrices |= _of_weights(zoo, rows, device, progress)
    matrices |= _of_predictions([rows[i] for i in classifiers], classifiers, len(rows), cache, digest, labels, device)
    tables = {name: matrix.cpu().tolist() for name, matrix in matrices.items()}
    return pd.DataFrame(
        [
            {
                "model_a": rows[i]["model_id"],
                "model_b": rows[j]["model_id"],
                "same_parent": rows[i]["parent_id"] is not None and rows[i]["parent_id"] == rows[j]["parent_id"],
                "same_head": rows[i]["head"] == rows[j]["head"],
                "dataset": dataset,
                **{name: tables[name][i][j] for name in schema.PAIR_METRICS},
            }
            for i, j in itertools.combinations(range(len(rows)), 2)
        ]
    )


def _of_features(
    rows: Sequence[Mapping[str, Any]], left_out: Collection[str], cache: OutputsCache, digest: str
) -> dict[str, Float64[Tensor, "P P"]]:
    """CKA of models whose features are finite."""
    chosen = [position for position, row in enumerate(rows) if row["model_id"] not in left_out]
    features = [FeatureFile(cache.place(rows[position], digest) / "features.npy") for position in chosen]
    found = {"cka": _nan(len(rows)), "cka_biased": _nan(len(rows))}
    place = torch.tensor(chosen, dtype=torch.int64)
    for name, debiased in (("cka", True), ("cka_biased", False)) if chosen else ():
        found[name][place[:, None], place] = cka(features, debiased=debiased).cpu()
    return found


def _of_weights(
    zoo: Zoo, rows: Sequence[Mapping[str, Any]], device: str | torch.device, progress: bool
) -> dict[str, Float64[Tensor, "P P"]]:
    """Distances between trunks, for models whose trunks have one layout."""
    members: dict[str, list[int]] = {}
    for position, row in enumerate(rows):
        members.setdefault(trunk_key(zoo.layouts[row["layout"]]), []).append(position)
    names = {"weight_l2": "l2", "weight_l2_normalized": "normalized_l2", "weight_cosine": "cosine"}
    found = {name: _nan(len(rows)) for name in names}
    for positions in members.values():
        alike = zoo.filter(model_id=[rows[position]["model_id"] for position in positions])
        measured = zoo_weight_metrics(alike, statistics=False, device=device, progress=progress)
        place = torch.tensor(positions)
        for name, metric in names.items():
            found[name][place[:, None], place] = getattr(measured, metric)[0].cpu()
    return found


def _of_predictions(
    rows: Sequence[Mapping[str, Any]],
    positions: Sequence[int],
    count: int,
    cache: OutputsCache,
    digest: str,
    labels: Tensor,
    device: str | torch.device,
) -> dict[str, Float64[Tensor, "P P"]]:
    """What classifiers predict alike; NaN for every other pair."""
    names = ("agreement", "cohen_kappa", "error_consistency", "error_overlap", "jensen_shannon")
    found = {name: _nan(count) for name in names}
    if rows:
        predicted = torch.stack([predictions(cache.read(row, digest, "logits")) for row in rows]).to(device)
        labels = labels.to(device)
        values = {
            "agreement": agreement(predicted),
            "cohen_kappa": cohen_kappa(predicted),
            "error_consistency": error_consistency(predicted, labels),
            "error_overlap": error_overlap(predicted, labels),
            "jensen_shannon": _divergence(rows, cache, digest, len(labels), device),
        }
        place = torch.tensor(positions)
        for name, matrix in values.items():
            found[name][place[:, None], place] = matrix.cpu()
    return found


def _divergence(
    rows: Sequence[Mapping[str, Any]], cache: OutputsCache, digest: str, num_images: int, device: str | torch.device
) -> Float64[Tensor, "P P"]:
    """Mean Jensen-Shannon divergence, over blocks of images whose logits fit into memory."""
    classes = cache.read(rows[0], digest, "logits").shape[1]
    step = max(1, BLOCK_BYTES // (len(rows) * classes * 4))
    total = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    for start in range(0, num_images, step):
        block = torch.stack([cache.read(row, digest, "logits")[start : start + step] for row in rows])
        total += jensen_shannon(block.to(device)).cpu() * block.shape[1]
    return total / num_images


def _nan(count: int) -> Float64[Tensor, "P P"]:
    return torch.full((count, count), torch.nan, dtype=torch.float64)
