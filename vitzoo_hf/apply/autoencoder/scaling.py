"""Standardise weights by the statistics of training models, and undo it; principal components of each layer's tokens.

Costs: one pass over the training models for each of the two, in float64; D numbers, and W² numbers a layer.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from vitzoo_hf.apply.autoencoder.tokens import Tokenizer
from vitzoo_hf.format.schema import ZooError

CHOICES = ("none", "layer", "entry")


@dataclass(frozen=True)
class Scaling:
    """`(weights - mean) / std` and its inverse; decoded weights pass through the inverse inside the graph.

    Attributes:
        mean: mean of every weight.
        std: deviation of every weight, one for a layer; 1 where training models do not differ.
    """

    mean: Float[Tensor, " D"]
    std: Float[Tensor, " D"]

    @classmethod
    def fit(cls, batches: Iterable[Float[Tensor, "_ D"]], tokenizer: Tokenizer, how: str) -> "Scaling":
        """Compute the statistics of training models.

        Args:
            batches: weights of the models of the train split; iterated once.
            tokenizer: tokenizer of the weights, which says which weights make a layer.
            how: `none`; `layer` for one mean and deviation a layer; `entry` to centre every weight on its mean over
                models, and divide by the deviation of the centred weights of the layer.

        Raises:
            ZooError: for an unknown choice, no models, or `entry` of models that do not differ.
        """
        D = tokenizer.layout.num_parameters
        if how not in CHOICES:
            raise ZooError(f"unknown scaling {how!r}; expected one of {', '.join(CHOICES)}")
        if how == "none":
            return cls(torch.zeros(D), torch.ones(D))
        count, origin = 0, None
        first, second = torch.zeros(2, D, dtype=torch.float64)
        for batch in batches:
            values = batch.cpu().double()
            # sums about one model: without it, squares of large weights would cancel in the variance
            origin = values[0] if origin is None else origin
            first += (values - origin).sum(0)
            second += (values - origin).square().sum(0)
            count += len(values)
        if origin is None:
            raise ZooError("scaling has no model to be fitted on: the train split is empty")
        mean = origin + first / count
        # clamped: rounding may leave a variance of equal weights just below 0
        variance = (second / count - (first / count).square()).clamp(min=0)
        if how == "layer":
            centre = tokenizer.layer_means(mean)
            variance, mean = tokenizer.layer_means(variance + (mean - centre).square()), centre
        else:
            variance = tokenizer.layer_means(variance)
            if not variance.any():
                raise ZooError(f"the {count} training models do not differ in any weight: there is nothing to learn")
        std = variance.sqrt()
        # a spread below the resolution of float32 at the mean is rounding error, not signal
        smallest = torch.finfo(torch.float32).eps * mean.abs().clamp(min=1e-12)
        return cls(mean.float(), torch.where(std > smallest, std, 1.0).float())

    def normalised(self, vectors: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """Standardise weights."""
        return (vectors - self.mean.to(vectors.device)) / self.std.to(vectors.device)

    def restored(self, vectors: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """Undo `normalised`."""
        return vectors * self.std.to(vectors.device) + self.mean.to(vectors.device)


def layer_components(
    batches: Iterable[Float[Tensor, "_ D"]], tokenizer: Tokenizer, scaling: Scaling, count: int
) -> Float[Tensor, "L W count"]:
    """Directions in which scaled tokens of a layer vary most about 0, over all its tokens and all models.

    Args:
        batches: weights of training models; iterated once, and only W by W products of a layer stay in memory.
        tokenizer: tokenizer of the weights.
        scaling: scaling that is applied before.
        count: number of directions; directions beyond the span of a layer's tokens are 0.

    Returns:
        Orthonormal columns for every layer and role, in the order of `tokenizer.lengths`, the widest direction first.

    Raises:
        ZooError: if there is no model.
    """
    lengths, W = tokenizer.lengths, tokenizer.width
    # float64, because the products of all tokens of all models are summed
    products = torch.zeros(len(lengths), W, W, dtype=torch.float64)
    models = 0
    for batch in batches:
        models += len(batch)
        tokens = tokenizer.tokens(scaling.normalised(batch.cpu()))
        for layer, part in enumerate(tokens.split(lengths, 1)):
            rows = part.flatten(0, 1).double()
            products[layer] += rows.T @ rows
    if not models:
        raise ZooError("components have no model to be fitted on: the train split is empty")
    values, directions = torch.linalg.eigh(products)
    # eigh sorts ascending; the widest direction comes first
    values, directions = values.flip(1), directions.flip(2)
    # eigenvalues below the rounding error of W products in float32 belong to no direction
    is_spanned = values > W * torch.finfo(torch.float32).eps * values[:, :1].clamp(min=1e-30)
    axes = torch.where(is_spanned[:, None], directions, 0.0)[..., :count]
    return torch.nn.functional.pad(axes, (0, count - axes.shape[2])).float()
