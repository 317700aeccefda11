"""Evaluate weight vectors that are not stored in a zoo, such as averages or interpolations of its rows."""

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
    """Mean cross-entropy in nats and accuracy of P networks on labelled images."""

    loss: Float64[Tensor, " P"]
    accuracy: Float64[Tensor, " P"]


def check_images(like: RowLike, images: Tensor, labels: Tensor | None = None) -> None:
    """Refuse images that do not fit a row's architecture, and labels that do not fit the images.

    Raises:
        ZooError: if the number of channels is not the architecture's, or there is not one label an image.
    """
    row = Row.of(like)
    model: Any = Architecture.of(row).skeleton
    channels = model.patch_embed.proj.in_channels
    if images.ndim != 4 or images.shape[1] != channels:
        raise ZooError(
            f"the images are {list(images.shape)}, and networks like {row.name} take"
            f" [N, {channels}, H, W]: take the images of its dataset, Zoo.probes({str(row.dataset)!r})"
        )
    if labels is not None and len(labels) != len(images):
        raise ZooError(f"{len(images)} images have {len(labels)} labels: give one label an image")


def check_vectors(like: RowLike, *vectors: Tensor) -> None:
    """Refuse vectors that do not fit a row's architecture and head.

    Raises:
        ZooError: if a vector has another number of weights than the row.
    """
    row = Row.of(like)
    size = Architecture.of(row).layout.num_parameters
    for vector in vectors:
        if vector.shape != (size,):
            raise ZooError(
                f"weights of shape {list(vector.shape)} do not fit {row.name}, whose"
                f" architecture and head have [{size}]: take models of one architecture and head"
            )


def candidate_rows(weights: Float[Tensor, "P D"], like: RowLike) -> Iterator[Row]:
    """Make rows from weights: the columns of `like` with new weights and without a hash.

    Args:
        weights: one vector a network, float32, in the layout of `like`.
        like: a row with the architecture columns.

    Raises:
        ZooError: if a weight is not finite.
    """
    row = Row.of(like)
    # the id and the hash are of other weights
    columns = {name: row[name] for name in row if name not in ("weights", "weights_sha256", "model_id")}
    for position, vector in enumerate(weights):
        if not vector.isfinite().all():
            raise ZooError(f"candidate {position} of {len(weights)} has weights that are not finite")
        changes = {"model_id": f"candidate {position}", "dtype": "float32", "weights": vector}
        # verified, because there is no hash to compare with, and finiteness has just been checked
        yield Row({**columns, **changes}, verified=True)


def candidate_logits(
    weights: Float[Tensor, "P D"],
    like: RowLike,
    images: Float[Tensor, "N C H W"],
    *,
    device: str | torch.device = "cpu",
) -> Float[Tensor, "P N K"]:
    """Logits of networks that have the architecture and head of a row, and new weights.

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
    """Loss and accuracy of networks that have the architecture and head of a row, and new weights.

    Raises:
        ZooError: if images, labels or weights do not fit the row, or outputs of a network are not finite.
    """
    check_images(like, images, labels)
    logits = candidate_logits(weights, like, images, device=device)
    # finite weights may still overflow in a forward, as in a mean of distant models
    broken = ~logits.isfinite().all(2).all(1)
    if broken.any():
        raise ZooError(f"network {int(broken.int().argmax())} of {len(weights)} gives NaN or infinite outputs")
    labels = labels.to(logits.device)
    # float64, because paths and tables subtract losses that are nearly equal
    return Scores(cross_entropy(logits, labels).double(), accuracy(logits, labels).double())
