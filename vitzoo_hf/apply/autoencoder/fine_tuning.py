"""Fine-tune generated networks for a few epochs, all in one batched forward; no network changes another.

Costs: weights, gradients and the two moments of Adam of all P networks are in memory at once.
"""

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
    """Settings of fine-tuning: Adam with L2 decay, after Meynent et al. 2025.

    Attributes:
        epochs: passes over the training images.
        lr: learning rate of Adam, constant.
        weight_decay: factor of the weights that is added to the gradient.
        batch_size: number of images in a step; every network sees the same batches.
        seed: seed of the order of images.
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


def training_images(zoo: Zoo, dataset: str) -> tuple[Float[Tensor, "N C H W"], Int64[Tensor, " N"]]:
    """Load the training images of a dataset, normalised for its models, by the blueprint that the zoo carries.

    Raises:
        ZooError: if the zoo was not made from a blueprint with these images, or they are not on this machine.
    """
    images = Blueprint.parse(zoo.blueprint_text).images
    if dataset not in images:
        raise ZooError(f"the blueprint of {zoo.name} has images {', '.join(images)}, not {dataset!r}")
    image_set = load_images(dataset, images[dataset])
    pixels, labels = image_set.part("train")
    return image_set.normalize(pixels), labels


def fine_tuned(
    networks: Networks,
    vectors: Float[Tensor, "P D"],
    images: Float[Tensor, "N C H W"],
    labels: Int64[Tensor, " N"],
    how: FineTuning | None = None,
    *,
    device: str = "cpu",
) -> Iterator[Float[Tensor, "P D"]]:
    """Yield the weights of all networks after each epoch, on the CPU.

    Args:
        networks: networks of the layout of the vectors.
        vectors: weights of P networks; they are not changed.
        images: training images, normalised.
        labels: labels of the images.
        how: settings, `FineTuning()` by default.
        device: device that trains.

    Raises:
        ZooError: if the weights of a network are no longer finite.
    """
    how, place = how or FineTuning(), usable_device(device)
    # one leaf for all networks: Adam works element by element, so networks do not mix
    weights = vectors.detach().clone().to(place).requires_grad_()
    optimizer = torch.optim.Adam([weights], lr=how.lr, weight_decay=how.weight_decay)
    patches, labels = networks.patches(images.to(place)), labels.to(place)
    generator = torch.Generator().manual_seed(how.seed)
    for epoch in range(how.epochs):
        for batch in torch.randperm(len(labels), generator=generator).to(place).split(how.batch_size):
            logits = networks.logits(weights, patches[batch])
            targets = labels[batch].expand(len(weights), -1)
            losses = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
            optimizer.zero_grad(set_to_none=True)
            # a sum over networks, so that the gradient of a network is the one of its loss alone
            losses.view(targets.shape).mean(1).sum().backward()
            optimizer.step()
        diverged = (~weights.detach().isfinite().all(1)).nonzero().flatten().tolist()
        if diverged:
            raise ZooError(f"networks {diverged} are not finite after epoch {epoch + 1}: lower lr, now {how.lr:g}")
        # a clone, because the next epoch changes the weights in place
        yield weights.detach().cpu().clone()
