"""Weights that are no row of a zoo, averages and interpolations of rows, and how the networks they make behave."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from vitzoo_hf.format.row import Row, RowLike
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.metrics.behavior import accuracy, cross_entropy
from vitzoo_hf.models.architecture import Architecture
from vitzoo_hf.models.population import Population


class Scores(NamedTuple):
    """Of P networks on labelled images: mean cross-entropy in nats, and the share of right predictions."""

    loss: Float64[Tensor, " P"]
    accuracy: Float64[Tensor, " P"]


def check_images(like: RowLike, images: Tensor, labels: Tensor | None = None) -> None:
    """Refuse images that networks of a row's architecture do not take, and labels that are not one an image.

    Raises:
        ZooError: for other channels, or another number of labels than of images.
    """
    model: Any = Architecture.of(like).skeleton
    channels = model.patch_embed.proj.in_channels
    if images.ndim != 4 or images.shape[1] != channels:
        raise ZooError(
            f"the images are {list(images.shape)}, and networks like {like.get('model_id', 'the row')} take"
            f" [N, {channels}, H, W]: take the images of its dataset, Zoo.probes({str(like.get('dataset'))!r})"
        )
    if labels is not None and len(labels) != len(images):
        raise ZooError(f"{len(images)} images have {len(labels)} labels: give one label an image")


def check_vectors(like: RowLike, *vectors: Tensor) -> None:
    """Refuse vectors that are not weights of a row's architecture and head.

    Raises:
        ZooError: for another number of weights.
    """
    wanted = Architecture.of(like).layout.num_parameters
    for vector in vectors:
        if vector.shape != (wanted,):
            raise ZooError(
                f"weights of shape {list(vector.shape)} do not fit {like.get('model_id', 'the row')}, whose"
                f" architecture and head have [{wanted}]: take models of one architecture and head"
            )


def candidate_rows(weights: Float[Tensor, "P D"], like: RowLike) -> Iterator[Row]:
    """Rows, without a hash, of networks of the architecture and head of another row.

    Args:
        weights: one vector a network, float32, in the layout of `like`.
        like: any row with the architecture columns.

    Raises:
        ZooError: if a weight is not finite.
    """
    kept = {name: value for name, value in like.items() if name not in ("weights", "weights_sha256", "model_id")}
    for position, vector in enumerate(weights):
        if not vector.isfinite().all():
            raise ZooError(f"candidate {position} of {len(weights)} has weights that are not finite")
        columns = {**kept, "model_id": f"candidate {position}", "dtype": "float32", "weights": vector}
        yield Row(columns, verified=True)


def candidate_logits(
    weights: Float[Tensor, "P D"],
    like: RowLike,
    images: Float[Tensor, "N C H W"],
    *,
    device: str | torch.device = "cpu",
) -> Float[Tensor, "P N K"]:
    """Logits of networks of the architecture and head of a row, with other weights.

    Example:
        >>> from vitzoo_hf.zoo import Zoo
        >>> row = next(Zoo.sample().rows())
        >>> vector = torch.from_numpy(row["weights"])
        >>> candidate_logits(torch.stack([vector, 0.9 * vector]), row, torch.zeros(4, 1, 16, 16)).shape
        torch.Size([2, 4, 10])
    """
    check_images(like, images)
    return Population.from_rows(candidate_rows(weights, like), device)(images)


def candidate_scores(
    weights: Float[Tensor, "P D"],
    like: RowLike,
    images: Float[Tensor, "N C H W"],
    labels: Int64[Tensor, " N"],
    *,
    device: str | torch.device = "cpu",
) -> Scores:
    """Loss and accuracy of networks of the architecture and head of a row, with other weights.

    Raises:
        ZooError: as `candidate_logits`; or if outputs of a network are not finite.
    """
    check_images(like, images, labels)
    logits = candidate_logits(weights, like, images, device=device)
    broken = ~logits.isfinite().all(2).all(1)
    if broken.any():
        raise ZooError(f"network {int(broken.int().argmax())} of {len(weights)} gives NaN or infinite outputs")
    place = labels.to(logits.device)
    return Scores(cross_entropy(logits, place).double(), accuracy(logits, place).double())
