"""Every pair of final models: similarity of predictions, similarity of representations, distance of weights.

Metrics that compare predictions are NaN for a pair with a model that does not classify these images; distances of
weights are NaN for models whose trunks differ in layout.
"""

import itertools
from collections.abc import Collection, Sequence

import pandas as pd
import torch
from jaxtyping import Float64
from torch import Tensor

from vitzoo_hf.evaluation.outputs_cache import ImageBatch, OutputsCache
from vitzoo_hf.evaluation.weight_metrics import zoo_weight_metrics
from vitzoo_hf.format import schema
from vitzoo_hf.format.layout import trunk_key
from vitzoo_hf.format.row import Row
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.metrics.agreement import agreement, cohen_kappa, error_consistency, error_overlap, jensen_shannon
from vitzoo_hf.metrics.behavior import predictions
from vitzoo_hf.metrics.blocks import block_bytes
from vitzoo_hf.metrics.cka import both_cka
from vitzoo_hf.metrics.features import FeatureFile
from vitzoo_hf.zoo import Zoo

BLOCK_BYTES = 2**28
"""Logits of all models on a block of images."""
LEAST_IMAGES = 4  # the debiased HSIC divides by N - 3


def measure_pairs(
    zoo: Zoo,
    rows: Sequence[Row],
    classifiers: Sequence[int],
    cache: OutputsCache,
    batch: ImageBatch,
    *,
    dataset: str,
    left_out: Collection[str] = (),
    device: torch.device,
    progress: bool = True,
) -> pd.DataFrame:
    """One row a pair of models, the columns of `schema.pair_features`.

    Args:
        zoo: exactly the models to compare.
        rows: the rows of the zoo, without weights.
        classifiers: positions of the models that classify the images.
        cache: a cache that has the outputs of all models on the images.
        batch: the images, with their labels.
        dataset: name of the images.
        left_out: models whose outputs are not finite, for which only distances of weights are measured.
        device: where the metrics are computed.
        progress: show bars.

    Raises:
        ZooError: for fewer than four images.
    """
    digest, labels = batch.digest, batch.labels
    if len(labels) < LEAST_IMAGES:
        raise ZooError(f"there are {len(labels)} test images of {dataset!r}; comparing models takes at least 4")
    if len(rows) < 2:
        return pd.DataFrame({name: [] for name in schema.pair_features()})
    matrices = _of_features(rows, left_out, cache, digest, device)
    matrices |= _of_weights(zoo, rows, device, progress)
    matrices |= _of_predictions([rows[i] for i in classifiers], classifiers, len(rows), cache, digest, labels, device)
    tables = {name: matrix.cpu().tolist() for name, matrix in matrices.items()}
    return pd.DataFrame(
        [
            {
                "model_a": rows[i].model_id,
                "model_b": rows[j].model_id,
                "same_parent": rows[i].parent_id is not None and rows[i].parent_id == rows[j].parent_id,
                "same_head": rows[i].head == rows[j].head,
                "dataset": dataset,
                **{name: tables[name][i][j] for name in schema.PAIR_METRICS},
            }
            for i, j in itertools.combinations(range(len(rows)), 2)
        ]
    )


def _of_features(
    rows: Sequence[Row], left_out: Collection[str], cache: OutputsCache, digest: str, device: torch.device
) -> dict[str, Float64[Tensor, "P P"]]:
    """CKA of models whose features are finite."""
    positions = [position for position, row in enumerate(rows) if row.model_id not in left_out]
    features = [FeatureFile(cache.place(rows[position], digest) / "features.npy") for position in positions]
    matrices = {"cka": _nan(len(rows)), "cka_biased": _nan(len(rows))}
    if positions:
        debiased, biased = both_cka(features, device=device)
        _fill(matrices["cka"], positions, debiased)
        _fill(matrices["cka_biased"], positions, biased)
    return matrices


def _of_weights(
    zoo: Zoo, rows: Sequence[Row], device: torch.device, progress: bool
) -> dict[str, Float64[Tensor, "P P"]]:
    """Distances between trunks, for models whose trunks have one layout."""
    members: dict[str, list[int]] = {}
    for position, row in enumerate(rows):
        members.setdefault(trunk_key(zoo.layouts[row["layout"]]), []).append(position)
    names = {"weight_l2": "l2", "weight_l2_normalized": "normalized_l2", "weight_cosine": "cosine"}
    matrices = {name: _nan(len(rows)) for name in names}
    for positions in members.values():
        models = zoo.filter(model_id=[rows[position].model_id for position in positions])
        metrics = zoo_weight_metrics(models, statistics=False, device=device, progress=progress)
        for name, metric in names.items():
            _fill(matrices[name], positions, getattr(metrics, metric)[0])
    return matrices


def _of_predictions(
    rows: Sequence[Row],
    positions: Sequence[int],
    count: int,
    cache: OutputsCache,
    digest: str,
    labels: Tensor,
    device: torch.device,
) -> dict[str, Float64[Tensor, "P P"]]:
    """Similarity of the predictions of classifiers; NaN for every other pair of the `count` models."""
    names = ("agreement", "cohen_kappa", "error_consistency", "error_overlap", "jensen_shannon")
    matrices = {name: _nan(count) for name in names}
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
        for name, matrix in values.items():
            _fill(matrices[name], positions, matrix)
    return matrices


def _fill(matrix: Float64[Tensor, "P P"], positions: Sequence[int], values: Float64[Tensor, "p p"]) -> None:
    """Put the values of some models into the matrix of all models."""
    place = torch.tensor(positions)
    matrix[place[:, None], place] = values.cpu()


def _divergence(
    rows: Sequence[Row], cache: OutputsCache, digest: str, num_images: int, device: torch.device
) -> Float64[Tensor, "P P"]:
    """Mean Jensen-Shannon divergence, over blocks of images whose logits fit into memory."""
    classes = cache.read(rows[0], digest, "logits").shape[1]
    step = max(1, block_bytes(device, BLOCK_BYTES) // (len(rows) * classes * 4))
    total = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=device)
    for start in range(0, num_images, step):
        block = torch.stack([cache.read(row, digest, "logits")[start : start + step] for row in rows])
        total += jensen_shannon(block.to(device)) * block.shape[1]
    return total / num_images


def _nan(count: int) -> Float64[Tensor, "P P"]:
    return torch.full((count, count), torch.nan, dtype=torch.float64)
