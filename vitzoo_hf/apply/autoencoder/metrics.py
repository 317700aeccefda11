"""Measures of decoded networks that a decoder which returns one good prototype cannot pass.

Functions of tensors of P originals and their reconstructions; results are float64. Agreement and retention of
accuracy follow Meynent et al. 2025. Specificity, rank correlation and diversity separate a reconstruction from a
prototype that is good at the task but is not the model that went in.

`Networks` computes the outputs of all decoded networks in one forward pass, with gradients to their weights.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Float64, Int64
from scipy.stats import spearmanr
from torch import Tensor

from vitzoo_hf.apply.autoencoder.tokens import Tokenizer
from vitzoo_hf.format.layout import Layout, unflatten
from vitzoo_hf.format.row import RowLike
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.metrics.agreement import agreement, error_overlap
from vitzoo_hf.metrics.weight_distances import weight_distances
from vitzoo_hf.models.architecture import Architecture
from vitzoo_hf.models.batched import BatchedViT


@dataclass(frozen=True)
class Networks:
    """Networks whose weights are the vectors of one layout.

    Attributes:
        architecture: architecture of the networks.
        layout: layout of the vectors.
        vit: sizes of the plain ViT.
    """

    architecture: Architecture
    layout: Layout
    vit: BatchedViT

    @classmethod
    def like(cls, row: RowLike) -> "Networks":
        """Make the networks of the architecture and head of a row.

        Raises:
            ZooError: for an architecture other than a plain ViT without dropout.
        """
        return cls.of(Architecture.of(row))

    @classmethod
    def of(cls, architecture: Architecture) -> "Networks":
        """Make the networks of an architecture and head.

        Raises:
            ZooError: for an architecture other than a plain ViT without dropout.
        """
        # one batched forward keeps gradients to the weights of every network
        vit = BatchedViT.trainable(architecture.skeleton)
        if vit is None:
            raise ZooError(
                f"a behavioural loss needs plain ViTs without dropout; {architecture.name!r} with"
                f" {dict(architecture.args)} is none"
            )
        return cls(architecture, architecture.layout, vit)

    def patches(self, images: Float[Tensor, "N C H W"]) -> Float[Tensor, "N t c"]:
        """Cut images into the patches of the patch embedding."""
        return self.vit.patches(images)

    def logits(self, vectors: Float[Tensor, "P D"], patches: Float[Tensor, "N t c"]) -> Float[Tensor, "P N C"]:
        """Outputs of P networks on the same images, differentiable in the vectors."""
        return self.vit(unflatten(vectors, self.layout), patches, in_place=False).logits


def layer_r2(
    decoded: Float[Tensor, "P D"], original: Float[Tensor, "P D"], mean: Float[Tensor, " D"], tokenizer: Tokenizer
) -> Float64[Tensor, " L"]:
    """`1 - Σ(decoded - original)² / Σ(original - mean)²` of each layer, in the order of `tokenizer.groups`.

    Args:
        decoded: reconstructed weights.
        original: weights that went in.
        mean: output of a decoder without input, such as the mean of training models, or of their layers.
        tokenizer: tokenizer of the weights, which says which weights make a layer.

    Returns:
        One value a layer; NaN for a layer in which no original differs from the mean.
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
    """Share of images on which a reconstruction predicts the class that its original predicts."""
    return (decoded == original).double().mean(1)


def shared_errors(
    decoded: Int64[Tensor, "P N"], original: Int64[Tensor, "P N"], labels: Int64[Tensor, " N"]
) -> Float64[Tensor, " P"]:
    """`error_overlap` of each reconstruction with its original; NaN where neither makes an error."""
    return error_overlap(torch.cat([decoded, original]), labels).diagonal(len(decoded))


def specificity(decoded: Int64[Tensor, "P N"], original: Int64[Tensor, "P N"]) -> Float64[Tensor, " P"]:
    """Agreement of a reconstruction with its original, less the mean agreement with the other originals.

    Near 0 for a decoder that returns one prototype for every input.

    Raises:
        ValueError: for fewer than two models.
    """
    if len(original) < 2:
        raise ValueError("specificity compares with other originals: give at least two models")
    P = len(original)
    # one call gives all pairs; the block above the diagonal pairs reconstructions with originals
    shares = agreement(torch.cat([decoded, original]))[:P, P:].contiguous()
    matched = shares.diagonal()
    return matched - (shares.sum(1) - matched) / (P - 1)


def retention(decoded: Float64[Tensor, " P"], original: Float64[Tensor, " P"], chance: float) -> Float64[Tensor, ""]:
    """`(accuracy of reconstructions - chance) / (accuracy of originals - chance)`, both accuracies means over models.

    Raises:
        ValueError: if the originals are not better than chance.
    """
    gain = original.mean() - chance
    if gain <= 0:
        raise ValueError(f"originals of accuracy {original.mean():.3f} are no better than chance, {chance:.3f}")
    return (decoded.mean() - chance) / gain


def rank_correlation(decoded: Float64[Tensor, " P"], original: Float64[Tensor, " P"]) -> float:
    """Spearman's ρ of accuracies; 0 where all reconstructions, or all originals, are equally good."""
    # scipy warns of constant input and returns NaN
    if decoded.unique().numel() < 2 or original.unique().numel() < 2:
        return 0.0
    return float(spearmanr(decoded.numpy(), original.numpy()).statistic)


def diversity(decoded: Float[Tensor, "P D"], original: Float[Tensor, "Q D"]) -> float:
    """Mean distance of pairs of reconstructions, divided by the mean distance of pairs of originals."""
    return float(_mean_distance(decoded) / _mean_distance(original))


def _mean_distance(weights: Float[Tensor, "P D"]) -> Float64[Tensor, ""]:
    # every pair once, without the zero diagonal
    above = torch.ones(len(weights), len(weights), dtype=torch.bool).triu(1)
    return weight_distances(weights.cpu())[above].mean()


CLOSEST = 8
"""Candidates for the nearest model; rounding of products may exchange models that are about equally far."""


class Nearest(NamedTuple):
    """Nearest training model of each model: its L2 distance and its position."""

    distance: Float64[Tensor, " P"]
    position: Int64[Tensor, " P"]


def nearest(weights: Float[Tensor, "P D"], training: Float[Tensor, "Q D"]) -> Nearest:
    """Find the nearest training model of each model; a copy is at distance exactly 0.

    Products in float64 select the closest few, and differences decide between them.
    """
    ours, theirs = weights.double(), training.double()
    distances = torch.cdist(ours, theirs, compute_mode="use_mm_for_euclid_dist")
    closest = distances.topk(min(CLOSEST, len(theirs)), largest=False).indices
    # differences instead of products: a copy then has distance exactly 0
    squares = torch.stack([(theirs[few] - row).square().sum(1) for row, few in zip(ours, closest, strict=True)])
    least = squares.min(1)
    return Nearest(least.values.sqrt(), closest.gather(1, least.indices[:, None])[:, 0])
