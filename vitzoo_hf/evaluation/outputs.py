"""Models of a zoo on images to outputs in a cache, some models at a time and each model once.

Cost: the weights of a chunk of models and their outputs, up to `CHUNK_BYTES`, or `TASK_BYTES` for a task of Ray.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch

from vitzoo_hf.evaluation.forward import Computed, outputs_of
from vitzoo_hf.evaluation.outputs_cache import ImageBatch, OutputsCache
from vitzoo_hf.evaluation.outputs_on_ray import outputs_on_ray
from vitzoo_hf.format.row import Row, RowLike
from vitzoo_hf.models.architecture import Architecture
from vitzoo_hf.progress import progress_bar
from vitzoo_hf.zoo import Zoo

CHUNK_BYTES = 2**30
TASK_BYTES = 2**26
"""Smaller than a chunk of this process: a task whose worker dies is run again from its beginning."""
ASSUMED_WIDTH = 1024
"""Feature width to reckon with before a model is built: that of a ViT-L, the widest common one."""


def run_models(
    zoo: Zoo,
    rows: Sequence[RowLike],
    wanted: Mapping[str, set[ImageBatch]],
    cache: OutputsCache,
    *,
    device: str | torch.device,
    precision: str,
    ray: str | None = None,
    progress: bool,
) -> set[str]:
    """Put the outputs of models on images into the cache; outputs that are in the cache are not computed again.

    Args:
        zoo: the models.
        rows: rows of the index, without weights, of the models to run.
        wanted: model -> the images that the model is run on.
        cache: where outputs go, model by model.
        device: where models run.
        precision: the precision that models run in.
        ray: address of a Ray cluster whose workers run them, or `local`; None runs them here.
        progress: show a bar.

    Returns:
        The models whose rows were read, and so verified, by this process.
    """
    index = {row.model_id: row for row in map(Row.of, rows)}
    batches = {
        model_id: [batch for batch in wanted[model_id] if not cache.has(row, batch.digest)]
        for model_id, row in index.items()
    }
    unfinished = [row for row in index.values() if batches[row.model_id]]
    chunks = _chunks(unfinished, batches, CHUNK_BYTES if ray is None else TASK_BYTES)
    results = (
        _outputs_here(zoo, chunks, batches, device, precision)
        if ray is None
        else outputs_on_ray(zoo.source, list(chunks), batches, device=str(device), precision=precision, address=ray)
    )
    done = len(index) - len(unfinished)
    with progress_bar("evaluating", "model", shown=progress, total=len(index), done=done) as bar:
        for result in results:
            for model_id, digest, parts in result:
                cache.write(index[model_id], digest, parts)
            bar.update(len({model_id for model_id, _, _ in result}))
    return set() if ray is not None else {row.model_id for row in unfinished}


def _outputs_here(
    zoo: Zoo,
    chunks: Iterator[list[str]],
    batches: Mapping[str, Sequence[ImageBatch]],
    device: str | torch.device,
    precision: str,
) -> Iterator[Computed]:
    for model_ids in chunks:
        digests = {model_id: [batch.digest for batch in batches[model_id]] for model_id in model_ids}
        images = {batch.digest: batch.images for model_id in model_ids for batch in batches[model_id]}
        yield from outputs_of(zoo.filter(model_id=model_ids).rows(), digests, images, device, precision)


def _chunks(rows: Sequence[Row], batches: Mapping[str, Sequence[ImageBatch]], most: int) -> Iterator[list[str]]:
    """Ids of models whose weights and outputs together stay below `most` bytes, at least one model a chunk."""
    chunk: list[str] = []
    size = 0
    for row in rows:
        images = max(len(batch.images) for batch in batches[row.model_id])
        classes = Architecture.of(row).args.get("num_classes") or 0
        needed = 4 * ((row.num_parameters or 0) + images * (classes + ASSUMED_WIDTH))
        if chunk and size + needed > most:
            yield chunk
            chunk, size = [], 0
        chunk.append(row.model_id)
        size += needed
    if chunk:
        yield chunk
