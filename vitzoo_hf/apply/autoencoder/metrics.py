"""How good decoded networks are, by measures that a decoder of one good prototype cannot pass.

P originals and their reconstructions; functions of tensors, float64 out. Sources: agreement and retention of accuracy
as in Meynent et al. 2025; specificity, rank correlation and diversity are there to tell a reconstruction from a
prototype that is good at the task but not the model that went in.

What decoded networks compute on query images, all of them in one forward, with gradients to their weights.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Float64, Int64
from scipy.stats import spearmanr
from torch import Tensor

from vitzoo_hf.apply.autoencoder.tokens import Tokenizer
from vitzoo_hf.format.layout import Layout, unflatten
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.metrics.weight_distances import weight_distances
from vitzoo_hf.models.architecture import Architecture
from vitzoo_hf.models.batched import BatchedViT


@dataclass(frozen=True)
class Networks:
    """The networks that vectors of one layout make.

    Attributes:
        architecture: of the networks.
        layout: of the vectors.
        vit: sizes of the plain ViT.
    """

    architecture: Architecture
    layout: Layout
    vit: BatchedViT

    @classmethod
    def like(cls, row: Mapping[str, Any]) -> "Networks":
        """Those of the architecture and head of a row.

        Raises:
            ZooError: for an architecture other than a plain ViT without dropout.
        """
        return cls.of(Architecture.of(row))

    @classmethod
    def of(cls, architecture: Architecture) -> "Networks":
        """Those of an architecture and head.

        Raises:
            ZooError: as `like`.
        """
        vit = BatchedViT.trainable(architecture.skeleton)
        if vit is None:
            raise ZooError(
                f"a behavioural loss needs plain ViTs without dropout; {architecture.name!r} with"
                f" {dict(architecture.args)} is none"
            )
        return cls(architecture, architecture.layout, vit)

    def patches(self, images: Float[Tensor, "n C H W"]) -> Float[Tensor, "n t c"]:
        """Images cut as the patch embedding takes them."""
        return self.vit.patches(images)

    def logits(self, vectors: Float[Tensor, "M D"], patches: Float[Tensor, "n t c"]) -> Float[Tensor, "M n K"]:
        """Outputs of M networks on the same images, differentiable in the vectors."""
        return self.vit(unflatten(vectors, self.layout), patches, in_place=False).logits


def layer_r2(
    decoded: Float[Tensor, "P D"], original: Float[Tensor, "P D"], mean: Float[Tensor, " D"], tokenizer: Tokenizer
) -> Float64[Tensor, " G"]:
    """`1 - Σ(decoded - original)² / Σ(original - mean)²` of each layer, in the order of `tokenizer.groups`.

    Args:
        decoded: reconstructed weights.
        original: weights that went in.
        mean: what a decoder without input would give, such as the mean of training models, or of their layers.
        tokenizer: says which weights make a layer.

    Returns:
        NaN for a layer in which no original differs from the mean.
    """
    groups = tokenizer.groups
    error, spread = (
        torch.zeros(int(groups.max()) + 1, dtype=torch.float64).index_add_(0, groups, values)
        for values in (
            (decoded.double() - original.double()).square().sum(0).cpu(),
            (original.double() - mean.double()).square().sum(0).cpu(),
        )
    )
    return torch.where(spread > 0, 1 - error / spread, torch.nan)


def own_agreement(decoded: Int64[Tensor, "P N"], original: Int64[Tensor, "P N"]) -> Float64[Tensor, " P"]:
    """Share of images on which a reconstruction predicts what its own original does."""
    return (decoded == original).double().mean(1)


def specificity(decoded: Int64[Tensor, "P N"], original: Int64[Tensor, "P N"]) -> Float64[Tensor, " P"]:
    """Agreement with one's own original, less the mean agreement with the other originals.

    Near 0 for a decoder that gives one prototype whatever went in.

    Raises:
        ValueError: for fewer than two models.
    """
    if len(original) < 2:
        raise ValueError("specificity compares with other originals: give at least two models")
    among = torch.stack([(row == original).double().mean(1) for row in decoded])
    own = among.diagonal()
    return own - (among.sum(1) - own) / (len(original) - 1)


def retention(decoded: Float64[Tensor, " P"], original: Float64[Tensor, " P"], chance: float) -> Float64[Tensor, ""]:
    """`(accuracy of reconstructions - chance) / (accuracy of originals - chance)`, of the means.

    Raises:
        ValueError: if the originals are not better than chance.
    """
    better = original.mean() - chance
    if better <= 0:
        raise ValueError(f"originals of accuracy {original.mean():.3f} are no better than chance, {chance:.3f}")
    return (decoded.mean() - chance) / better


def rank_correlation(decoded: Float64[Tensor, " P"], original: Float64[Tensor, " P"]) -> float:
    """Spearman's ρ of accuracies; 0 where all reconstructions are equally good."""
    if decoded.unique().numel() < 2 or original.unique().numel() < 2:
        return 0.0
    return float(spearmanr(decoded.numpy(), original.numpy()).statistic)


def diversity(decoded: Float[Tensor, "P D"], original: Float[Tensor, "Q D"]) -> float:
    """Mean distance of pairs of reconstructions over that of pairs of originals."""
    return float(_mean_distance(decoded) / _mean_distance(original))


def _mean_distance(weights: Float[Tensor, "P D"]) -> Float64[Tensor, ""]:
    above = torch.ones(len(weights), len(weights), dtype=torch.bool).triu(1)
    return weight_distances(weights.cpu())[above].mean()


CLOSEST = 8


class Nearest(NamedTuple):
    """The nearest training model of each model: L2 distance, and its position."""

    distance: Float64[Tensor, " P"]
    position: Int64[Tensor, " P"]


def nearest(weights: Float[Tensor, "P D"], training: Float[Tensor, "Q D"]) -> Nearest:
    """The nearest training model of each model; copies are exactly 0 away.

    Products in float64 find the closest few, differences decide between them.
    """
    ours, theirs = weights.double(), training.double()
    few = torch.cdist(ours, theirs, compute_mode="use_mm_for_euclid_dist").topk(
        min(CLOSEST, len(theirs)), largest=False
    )
    far = torch.stack([(theirs[chosen] - row).square().sum(1) for row, chosen in zip(ours, few.indices, strict=True)])
    least = far.min(1)
    return Nearest(least.values.sqrt(), few.indices.gather(1, least.indices[:, None])[:, 0])


def shared_errors(
    decoded: Int64[Tensor, "P N"], original: Int64[Tensor, "P N"], labels: Int64[Tensor, " N"]
) -> Float64[Tensor, " P"]:
    """Images that both get wrong over images that either gets wrong; NaN where neither errs."""
    wrong, also = decoded != labels, original != labels
    either: Bool[Tensor, "P N"] = wrong | also
    return (wrong & also).sum(1).double() / either.sum(1)
