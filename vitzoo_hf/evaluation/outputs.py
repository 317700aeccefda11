"""Models of a zoo on images -> their outputs in a cache, some models at a time and each model once."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from vitzoo_hf.evaluation.outputs_cache import ImageBatch, OutputsCache
from vitzoo_hf.evaluation.outputs_on_ray import outputs_on_ray
from vitzoo_hf.models.population import Population
from vitzoo_hf.progress import progress_bar
from vitzoo_hf.zoo import Zoo

CHUNK_BYTES = 2**30
TASK_BYTES = 2**26


def run_models(
    zoo: Zoo,
    rows: Sequence[Mapping[str, Any]],
    wanted: Mapping[str, set[ImageBatch]],
    cache: OutputsCache,
    *,
    device: str | torch.device,
    precision: str,
    ray: str | None = None,
    progress: bool,
) -> set[str]:
    """Put the outputs of models on images into the cache; what is there already is not run again.

    Args:
        zoo: the models.
        rows: of the index, those to run.
        wanted: model -> the images it is to see.
        cache: where outputs go, model by model.
        device: where models run.
        precision: that they run in.
        ray: address of a Ray cluster whose workers run them, or `local`; None runs them here.
        progress: show a bar.

    Returns:
        The models whose rows were read, and so verified, by this process.
    """
    missing = {
        row["model_id"]: [batch for batch in wanted[row["model_id"]] if not cache.has(row, batch.digest)]
        for row in rows
    }
    todo = [row for row in rows if missing[row["model_id"]]]
    by_id = {row["model_id"]: row for row in todo}
    with progress_bar("evaluating", "model", shown=progress, total=len(rows), done=len(rows) - len(todo)) as bar:
        if ray is None:
            results = _outputs_here(zoo, _chunks(todo, missing, CHUNK_BYTES), missing, device, precision)
        else:
            ids = [[row["model_id"] for row in chunk] for chunk in _chunks(todo, missing, TASK_BYTES)]
            options: dict[str, Any] = {"device": str(device), "precision": precision, "address": ray}
            results = outputs_on_ray(zoo.source, ids, missing, **options)
        for result in results:
            for model_id, digest, parts in result:
                cache.write(by_id[model_id], digest, parts)
            bar.update(len({model_id for model_id, _, _ in result}))
    return set() if ray is not None else set(by_id)


def _outputs_here(
    zoo: Zoo,
    chunks: Iterable[Sequence[Mapping[str, Any]]],
    missing: Mapping[str, Sequence[ImageBatch]],
    device: str | torch.device,
    precision: str,
) -> Iterator[list[tuple[str, str, dict[str, np.ndarray]]]]:
    """Outputs of a model at a time: model id, digest of the images, and the arrays."""
    for chunk in chunks:
        by_kind: dict[tuple[ImageBatch, ...], list[dict[str, Any]]] = {}
        for row in zoo.filter(model_id=[row["model_id"] for row in chunk]).rows():
            unseen = sorted(missing[row["model_id"]], key=lambda batch: batch.digest)
            by_kind.setdefault(tuple(unseen), []).append(row)
        for batches, members in by_kind.items():
            population = Population.from_rows(members, device=device, precision=precision)
            outputs = {batch.digest: population.each(batch.images) for batch in batches}
            for number, model_id in enumerate(population.model_ids):
                yield [
                    (
                        model_id,
                        digest,
                        {"logits": _array(each[number].logits), "features": _array(each[number].features)},
                    )
                    for digest, each in outputs.items()
                ]


def _array(values: Float[Tensor, "1 N F"]) -> np.ndarray:
    return values[0].cpu().numpy()


def _chunks(
    rows: Sequence[Mapping[str, Any]], missing: Mapping[str, Sequence[ImageBatch]], most: int
) -> Iterator[list[Mapping[str, Any]]]:
    """Rows whose weights and outputs together stay below so many bytes, at least one."""
    chunk: list[Mapping[str, Any]] = []
    size = 0
    for row in rows:
        images = max(len(batch.images) for batch in missing[row["model_id"]])
        classes = json.loads(row["architecture_args"]).get("num_classes") or 0
        needed = 4 * (row["num_parameters"] + images * (classes + 1024))
        if chunk and size + needed > most:
            yield chunk
            chunk, size = [], 0
        chunk.append(row)
        size += needed
    if chunk:
        yield chunk
