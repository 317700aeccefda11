"""Weights of rows as tensors, refused if one of them is not finite."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vitzoo_hf.schema import ZooError


def vectors_of(rows: Iterable[Mapping[str, Any]]) -> Float[Tensor, "P D"]:
    """Weights of rows, one below the other.

    Raises:
        ZooError: naming the first row with a weight that is NaN or infinite; or if there is no row.
    """
    held = list(rows)
    if not held:
        raise ZooError("there is no model among those chosen: loosen the filter")
    vectors = torch.stack([torch.from_numpy(row["weights"]) for row in held])
    check_finite(vectors, [row["model_id"] for row in held])
    return vectors


def check_finite(vectors: Float[Tensor, "P D"], model_ids: Sequence[str]) -> None:
    """Refuse weights that are not finite.

    Raises:
        ZooError: naming the first model with one.
    """
    broken = ~vectors.isfinite().all(1)
    if broken.any():
        name = model_ids[int(broken.int().argmax())]
        raise ZooError(f"{name} has weights that are NaN or infinite: leave it out, by --where or Zoo.filter")
