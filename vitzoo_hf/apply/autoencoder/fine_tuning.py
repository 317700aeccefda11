"""Generated networks trained on for a few epochs, all of them at once, each as if it were alone."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional

from vitzoo_hf.apply.autoencoder.metrics import Networks
from vitzoo_hf.blueprint.blueprint import Blueprint
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.images.sources import load_images
from vitzoo_hf.models.rebuild import usable_device
from vitzoo_hf.zoo import Zoo


@dataclass(frozen=True)
class FineTuning:
    """How generated networks are trained on: Adam with L2 decay, as Meynent et al. 2025 do.

    Attributes:
        epochs: over the training images.
        lr: of Adam, constant.
        weight_decay: added to the gradient.
        batch_size: images a step; every network sees the same batches.
        seed: of their order.
    """

    epochs: int = 5
    lr: float = 5e-4
    weight_decay: float = 5e-4
    batch_size: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "lr", "batch_size"):
            if getattr(self, name) <= 0:
                raise ZooError(f"{name} of fine-tuning is {getattr(self, name)}; it must be positive")


def training_images(zoo: Zoo, dataset: str) -> tuple[Float[Tensor, "n C H W"], Int64[Tensor, " n"]]:
    """The training images of a dataset as its models are fed them, by the blueprint that the zoo carries.

    Raises:
        ZooError: if the zoo was not made from a blueprint with these images, or they are not on this machine.
    """
    images = Blueprint.parse(zoo.blueprint_text).images
    if dataset not in images:
        raise ZooError(f"the blueprint of {zoo.name} has images {', '.join(images)}, not {dataset!r}")
    found = load_images(dataset, images[dataset])
    pixels, labels = found.part("train")
    return found.normalize(pixels), labels


def fine_tuned(
    networks: Networks,
    vectors: Float[Tensor, "M D"],
    images: Float[Tensor, "n C H W"],
    labels: Int64[Tensor, " n"],
    how: FineTuning | None = None,
    *,
    device: str = "cpu",
) -> Iterator[Float[Tensor, "M D"]]:
    """Weights after each epoch, on the CPU; no network's depend on the others'.

    Args:
        networks: whose weights the vectors are.
        vectors: of M networks; they are not changed.
        images: for training, as the networks are fed them.
        labels: of the images.
        how: `FineTuning()` by default.
        device: where.

    Raises:
        ZooError: if the weights of a network are no longer finite.
    """
    how, place = how or FineTuning(), usable_device(device)
    weights = vectors.detach().clone().to(place).requires_grad_()
    optimizer = torch.optim.Adam([weights], lr=how.lr, weight_decay=how.weight_decay)
    patches, labels = networks.patches(images.to(place)), labels.to(place)
    generator = torch.Generator().manual_seed(how.seed)
    for epoch in range(how.epochs):
        for chosen in torch.randperm(len(labels), generator=generator).to(place).split(how.batch_size):
            logits = networks.logits(weights, patches[chosen])
            targets = labels[chosen].expand(len(weights), -1)
            losses = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
            optimizer.zero_grad(set_to_none=True)
            losses.view(targets.shape).mean(1).sum().backward()
            optimizer.step()
        bad = (~weights.detach().isfinite().all(1)).nonzero().flatten().tolist()
        if bad:
            raise ZooError(f"networks {bad} are not finite after epoch {epoch + 1}: lower lr, now {how.lr:g}")
        yield weights.detach().cpu().clone()
