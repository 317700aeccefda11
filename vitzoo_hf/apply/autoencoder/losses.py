"""Losses of an autoencoder of weights: structure, contrast, behaviour, and their weighted sum.

Formulas follow Meynent et al. 2025 ("Structure Is Not Enough") and SANE (Schürholt et al. 2024): masked mean squared
error of weights, NT-Xent on two views, mean squared error of softmax outputs on query images.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.training.losses import info_nce

BEHAVIOURS = ("softmax", "distillation", "logits")
SOFTENING = 2.0
"""Temperature of distillation."""
LEAST_SCALE = 1e-11
"""A first loss below this is rounding error; as a scale it would blow the part up by the inverse."""


def structural_loss(
    decoded: Float[Tensor, "B T W"],
    target: Float[Tensor, "B T W"],
    mask: Bool[Tensor, "T W"],
    *,
    normalise: bool = False,
) -> Float[Tensor, ""]:
    """Mean squared error over weights; padding is left out of the sum and of the count.

    Args:
        decoded: tokens from the autoencoder.
        target: tokens that went into the autoencoder.
        mask: true where a token has a weight, false at padding.
        normalise: divide by the variance of the batch's weights ("masked loss normalisation").

    Example:
        >>> mask = torch.tensor([[True, False]])
        >>> structural_loss(torch.tensor([[[3.0, 7.0]]]), torch.tensor([[[1.0, 0.0]]]), mask)
        tensor(4.)
    """
    squares = (decoded - target).square().masked_fill(~mask, 0.0)
    # padding does not count: it would dilute the loss of layers with short rows
    number = mask.sum() * len(target)
    loss = squares.sum() / number
    if not normalise:
        return loss
    mean = target.masked_fill(~mask, 0.0).sum() / number
    variance = (target - mean).square().masked_fill(~mask, 0.0).sum() / number
    return loss / variance


def contrastive_loss(
    first: Float[Tensor, "B F"], second: Float[Tensor, "B F"], temperature: float = 0.1
) -> Float[Tensor, ""]:
    """NT-Xent (Chen et al. 2020): find the other view of a model among all views of the batch, by cosine similarity.

    Raises:
        ZooError: for fewer than two models, which have no negatives.
    """
    if len(first) < 2:
        raise ZooError("contrast needs at least two models in a batch")
    return info_nce(torch.cat([first, second]), temperature)


class Behaviour(NamedTuple):
    """The behavioural loss, and the number of decoded networks left out because their loss was not finite."""

    loss: Float[Tensor, ""]
    dropped: int


def behavioural_loss(
    decoded: Float[Tensor, "P N C"], original: Float[Tensor, "P N C"], kind: str = "softmax"
) -> Behaviour:
    """Distance of outputs of decoded networks to those of the originals on the same images, mean over networks.

    Args:
        decoded: logits of the decoded networks, with gradients.
        original: logits of the original networks.
        kind: `softmax`: mean squared error of probabilities; `distillation`: `T² KL(original ‖ decoded)` at T = 2,
            in nats; `logits`: mean squared error of logits.

    Raises:
        ZooError: for an unknown kind, or if no decoded network has a finite loss.
    """
    # float32 under autocast too, because softmax in bfloat16 rounds away small differences
    decoded, original = decoded.float(), original.float()
    if kind == "softmax":
        losses = (decoded.softmax(2) - original.softmax(2)).square().mean((1, 2))
    elif kind == "distillation":
        soft, target = (decoded / SOFTENING).log_softmax(2), (original / SOFTENING).log_softmax(2)
        divergence = functional.kl_div(soft, target, reduction="none", log_target=True)
        # T² keeps gradients at the size of those without softening (Hinton et al. 2015)
        losses = SOFTENING**2 * divergence.sum(2).mean(1)
    elif kind == "logits":
        losses = (decoded - original).square().mean((1, 2))
    else:
        raise ZooError(f"unknown behavioural loss {kind!r}; expected one of {', '.join(BEHAVIOURS)}")
    finite = losses.isfinite()
    if not finite.any():
        raise ZooError(f"none of {len(losses)} decoded networks has finite outputs: lower the learning rate")
    # the mean of the finite ones, so that one diverged network does not stop the step
    return Behaviour(losses[finite].mean(), int((~finite).sum()))


@dataclass
class Composite:
    """`contrast C + (1 - contrast) [structure S + (1 - structure) B]`, each part divided by its first value.

    Attributes:
        contrast: γ, the share of the contrastive loss.
        structure: β, the share of the structural loss in the remainder.
        scales: value of each part on the first batch; a checkpoint stores them.

    Example:
        >>> loss = Composite(contrast=0.05, structure=0.1)
        >>> parts = {"structure": torch.tensor(4.0), "behaviour": torch.tensor(0.1), "contrast": torch.tensor(2.0)}
        >>> loss(parts), loss({name: value / 2 for name, value in parts.items()})
        (tensor(1.), tensor(0.5000))
    """

    contrast: float
    structure: float
    scales: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, share in (("contrast", self.contrast), ("structure", self.structure)):
            if not 0 <= share <= 1:
                raise ZooError(f"the share of {name} is {share}; expected 0 to 1")

    @property
    def shares(self) -> dict[str, float]:
        """Part -> its weight; parts of weight 0 need not be computed."""
        remainder = 1 - self.contrast
        return {
            "contrast": self.contrast,
            "structure": remainder * self.structure,
            "behaviour": remainder * (1 - self.structure),
        }

    def __call__(self, parts: dict[str, Float[Tensor, ""]]) -> Float[Tensor, ""]:
        """Weighted sum of parts; the first call sets their scales.

        Raises:
            ZooError: if a part with a share is missing, or its first value is not finite or only rounding error.
        """
        total: Tensor = torch.zeros(())
        for name, share in self.shares.items():
            if share == 0:
                continue
            if name not in parts:
                raise ZooError(f"the loss has a share of {share:g} for {name}, which was not computed")
            value = parts[name]
            if name not in self.scales:
                scale = float(value.detach())
                if not scale < float("inf"):
                    raise ZooError(f"the first {name} loss is {scale:g}; it cannot set a scale")
                if scale < LEAST_SCALE:
                    raise ZooError(
                        f"the first {name} loss is {scale:g}, only rounding error: the autoencoder already"
                        " copies its input before the first step; take fewer latent numbers a token"
                    )
                self.scales[name] = scale
            total = total.to(value.device) + share * value / self.scales[name]
        return total
