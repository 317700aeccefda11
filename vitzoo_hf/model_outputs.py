"""Models of a zoo on images -> their outputs in a cache, some models at a time and each model once."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from vitzoo_hf.outputs_cache import OutputsCache, digest_of
from vitzoo_hf.population import Population
from vitzoo_hf.progress import progress_bar
from vitzoo_hf.ray_outputs import outputs_on_ray
from vitzoo_hf.schema import ZooError
from vitzoo_hf.zoo import Zoo

CHUNK_BYTES = 2**30
TASK_BYTES = 2**26


@dataclass(frozen=True, eq=False)
class ImageBatch:
    """Images as models are fed them, with labels and the hash by which a cache finds their outputs."""

    images: Float[Tensor, "N C H W"]
    labels: Int64[Tensor, " N"]
    digest: str

    @classmethod
    def of(cls, images: Tensor, labels: Tensor) -> "ImageBatch":
        """Images with their hash.

        Raises:
            ZooError: for images that are not float32 `[N, C, H, W]` and finite, or not one whole label for each.
        """
        if not isinstance(images, Tensor) or images.dtype != torch.float32 or images.ndim != 4 or not len(images):
            raise ZooError(f"images are {_described(images)}; expected a float32 tensor [N, C, H, W], normalised")
        if not images.isfinite().all():
            raise ZooError("NaN or infinite values among the images")
        whole = isinstance(labels, Tensor) and not labels.is_floating_point() and labels.dtype != torch.bool
        if not whole or labels.shape != images.shape[:1] or int(labels.min()) < 0:
            raise ZooError(
                f"labels are {_described(labels)}; expected a tensor of {len(images)} integers from 0, one an image"
            )
        return cls(images, labels.long(), digest_of(images))

    def check_classes(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Refuse labels that a classifier does not know.

        Raises:
            ZooError: naming the first such model.
        """
        highest = int(self.labels.max())
        for row in rows:
            outputs = json.loads(row["architecture_args"]).get("num_classes")
            if outputs is not None and highest >= outputs:
                raise ZooError(
                    f"labels go up to {highest}, but {row['model_id']} knows {outputs} classes: give images of those"
                )


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


def _described(values: Any) -> str:
    if not isinstance(values, Tensor):
        return f"a {type(values).__name__}"
    return f"{str(values.dtype).removeprefix('torch.')} {list(values.shape)}"


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
