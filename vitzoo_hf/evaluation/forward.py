"""Rows and images to logits and features as arrays: one way, in this process and in the tasks of Ray."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from vitzoo_hf.format.row import Row
from vitzoo_hf.models.population import Population

Computed = list[tuple[str, str, dict[str, np.ndarray]]]
"""One entry a model and set of images: model id, hash of the images, `logits` `[N, C]` and `features` `[N, F]`."""


def outputs_of(
    rows: Iterable[Row],
    digests: Mapping[str, Sequence[str]],
    images: Mapping[str, Tensor],
    device: str | torch.device,
    precision: str,
) -> Iterator[Computed]:
    """Outputs of models, one model after the other; models that see the same images run as one population.

    Args:
        rows: rows with their weights.
        digests: model id -> hashes of the images that the model is run on.
        images: hash -> images `[N, C, H, W]`, normalised.
        device: where the models run.
        precision: the precision that the models run in.
    """
    members: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        members.setdefault(tuple(sorted(digests[row.model_id])), []).append(row)
    for group_digests, group_rows in members.items():
        population = Population.from_rows(group_rows, device=device, precision=precision)
        outputs = {digest: population.each(images[digest]) for digest in group_digests}
        for number, model_id in enumerate(population.model_ids):
            yield [
                (
                    model_id,
                    digest,
                    {"logits": _array(models[number].logits), "features": _array(models[number].features)},
                )
                for digest, models in outputs.items()
            ]


def _array(values: Tensor) -> np.ndarray:
    return values[0].cpu().numpy()
