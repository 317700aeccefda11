"""What an autoencoder of weights is trained on: structure, contrast and behaviour, and their sum.

Formulas are those of Meynent et al. 2025 ("Structure Is Not Enough") and of SANE (Schürholt et al. 2024): masked mean
squared error of weights, NT-Xent on two views, mean squared error of softmax outputs on query images.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from vitzoo_hf.format.schema import ZooError

BEHAVIOURS = ("softmax", "distillation", "logits")
SOFTENING = 2.0
LEAST_SCALE = 1e-11


def structural_loss(
    decoded: Float[Tensor, "B N T"],
    target: Float[Tensor, "B N T"],
    mask: Bool[Tensor, "N T"],
    *,
    normalise: bool = False,
) -> Float[Tensor, ""]:
    """Mean squared error over weights; padding counts neither in the sum nor in the number.

    Args:
        decoded: tokens from the autoencoder.
        target: tokens that went in.
        mask: where tokens hold weights.
        normalise: divide by the variance of the batch's weights ("masked loss normalisation").

    Example:
        >>> mask = torch.tensor([[True, False]])
        >>> structural_loss(torch.tensor([[[3.0, 7.0]]]), torch.tensor([[[1.0, 0.0]]]), mask)
        tensor(4.)
    """
    squares = (decoded - target).square().masked_fill(~mask, 0.0)
    number = mask.sum() * len(target)
    loss = squares.sum() / number
    if not normalise:
        return loss
    mean = target.masked_fill(~mask, 0.0).sum() / number
    variance = (target - mean).square().masked_fill(~mask, 0.0).sum() / number
    return loss / variance


def contrastive_loss(
    first: Float[Tensor, "B P"], second: Float[Tensor, "B P"], temperature: float = 0.1
) -> Float[Tensor, ""]:
    """NT-Xent (Chen et al. 2020): each view's other view among all others of the batch, by cosine similarity.

    Raises:
        ZooError: for fewer than two models, which have no negatives.
    """
    if len(first) < 2:
        raise ZooError("contrast needs at least two models in a batch")
    views = functional.normalize(torch.cat([first, second]), dim=1)
    similarity = (views @ views.T / temperature).fill_diagonal_(float("-inf"))
    partner = torch.arange(len(views), device=views.device).roll(len(first))
    return functional.cross_entropy(similarity, partner)


class Behaviour(NamedTuple):
    """The behavioural loss, and how many decoded networks were left out because theirs was not finite."""

    loss: Float[Tensor, ""]
    dropped: int


def behavioural_loss(
    decoded: Float[Tensor, "M n K"], original: Float[Tensor, "M n K"], kind: str = "softmax"
) -> Behaviour:
    """How far outputs of decoded networks are from those of the originals on the same images, mean over networks.

    Args:
        decoded: logits of the decoded networks, with gradients.
        original: logits of the originals.
        kind: `softmax`: mean squared error of probabilities; `distillation`: `T² KL(original ‖ decoded)` at T = 2,
            in nats; `logits`: mean squared error of logits.

    Raises:
        ZooError: for an unknown kind, or if no decoded network has a finite loss.
    """
    decoded, original = decoded.float(), original.float()
    if kind == "softmax":
        losses = (decoded.softmax(2) - original.softmax(2)).square().mean((1, 2))
    elif kind == "distillation":
        soft, target = (decoded / SOFTENING).log_softmax(2), (original / SOFTENING).log_softmax(2)
        divergence = functional.kl_div(soft, target, reduction="none", log_target=True)
        losses = SOFTENING**2 * divergence.sum(2).mean(1)
    elif kind == "logits":
        losses = (decoded - original).square().mean((1, 2))
    else:
        raise ZooError(f"unknown behavioural loss {kind!r}; expected one of {', '.join(BEHAVIOURS)}")
    finite = losses.isfinite()
    if not finite.any():
        raise ZooError(f"none of {len(losses)} decoded networks has finite outputs: lower the learning rate")
    return Behaviour(losses[finite].mean(), int((~finite).sum()))


@dataclass
class Composite:
    """`contrast C + (1 - contrast) [structure S + (1 - structure) B]`, each divided by its value on the first batch.

    Attributes:
        contrast: γ, the share of the contrastive loss.
        structure: β, the share of the structural loss in the rest.
        scales: the first values, which a checkpoint keeps.

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
        """The weight of each part; parts of weight 0 need not be computed."""
        rest = 1 - self.contrast
        return {
            "contrast": self.contrast,
            "structure": rest * self.structure,
            "behaviour": rest * (1 - self.structure),
        }

    def __call__(self, parts: dict[str, Float[Tensor, ""]]) -> Float[Tensor, ""]:
        """The sum; the first call sets the scales of the parts it is given.

        Raises:
            ZooError: if a part that counts is missing, or is rounding alone or not finite when it sets its scale.
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
                        f"the first {name} loss is {scale:g}, rounding alone: before any step, what is decoded is"
                        " what went in; take fewer latent numbers a token"
                    )
                self.scales[name] = scale
            total = total.to(value.device) + share * value / self.scales[name]
        return total
