"""Weights as an autoencoder sees them: standardised by the statistics of training models, and back.

Principal components of the tokens of each layer: where an autoencoder's linear maps begin.
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
    """`(weights - mean) / std`, and its inverse, which decoded weights pass through inside the graph.

    Attributes:
        mean: of every weight.
        std: of every weight; all of a layer share one. 1 where training models do not differ.
    """

    mean: Float[Tensor, " D"]
    std: Float[Tensor, " D"]

    @classmethod
    def fit(cls, batches: Iterable[Float[Tensor, "_ D"]], tokenizer: Tokenizer, how: str) -> "Scaling":
        """The statistics of training models.

        Args:
            batches: weights of the models of the train split, in one pass.
            tokenizer: says which weights make a layer.
            how: `none`; `layer` for one mean and deviation a layer; `entry` to centre each weight on its mean over
                models, and divide by the deviation of what is left, layer by layer.

        Raises:
            ZooError: for an unknown choice, no models, or `entry` of models that do not differ.
        """
        D = tokenizer.layout.num_parameters
        if how not in CHOICES:
            raise ZooError(f"unknown scaling {how!r}; expected one of {', '.join(CHOICES)}")
        if how == "none":
            return cls(torch.zeros(D), torch.ones(D))
        count, origin, first, second = (
            0,
            None,
            torch.zeros(D, dtype=torch.float64),
            torch.zeros(D, dtype=torch.float64),
        )
        for batch in batches:
            values = batch.cpu().double()
            origin = values[0] if origin is None else origin
            first += (values - origin).sum(0)
            second += (values - origin).square().sum(0)
            count += len(values)
        if origin is None:
            raise ZooError("scaling has no model to be fitted on: the train split is empty")
        mean = origin + first / count
        variance = (second / count - (first / count).square()).clamp(min=0)
        groups = tokenizer.groups
        size = torch.zeros(int(groups.max()) + 1, dtype=torch.float64).index_add_(0, groups, torch.ones_like(mean))

        def of_layer(values: Tensor) -> Tensor:
            return (torch.zeros_like(size).index_add_(0, groups, values) / size)[groups]

        if how == "layer":
            centre = of_layer(mean)
            variance, mean = of_layer(variance + (mean - centre).square()), centre
        else:
            variance = of_layer(variance)
            if not variance.any():
                raise ZooError(f"the {count} training models do not differ in any weight: there is nothing to learn")
        std = variance.sqrt()
        smallest = torch.finfo(torch.float32).eps * mean.abs().clamp(min=1e-12)
        return cls(mean.float(), torch.where(std > smallest, std, 1.0).float())

    def normalised(self, vectors: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """Weights as the autoencoder sees them."""
        return (vectors - self.mean.to(vectors.device)) / self.std.to(vectors.device)

    def restored(self, vectors: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """Weights of networks again."""
        return vectors * self.std.to(vectors.device) + self.mean.to(vectors.device)


def layer_components(
    batches: Iterable[Float[Tensor, "_ D"]], tokenizer: Tokenizer, scaling: Scaling, count: int
) -> Float[Tensor, "G T count"]:
    """The directions in which scaled tokens of a layer vary most about 0, over all its tokens and all models.

    Args:
        batches: weights of training models, in one pass; only products of T by T numbers a layer are kept.
        tokenizer: of the vectors.
        scaling: of the weights.
        count: of directions; those beyond what the tokens of a layer span are 0.

    Returns:
        Orthonormal columns for each layer and role, in the order of `tokenizer.lengths`, the widest direction first.

    Raises:
        ZooError: if there is no model.
    """
    lengths, T = tokenizer.lengths, tokenizer.width
    products = torch.zeros(len(lengths), T, T, dtype=torch.float64)
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
    values, directions = values.flip(1), directions.flip(2)
    spanned = values > T * torch.finfo(torch.float32).eps * values[:, :1].clamp(min=1e-30)
    found = torch.where(spanned[:, None], directions, 0.0)[..., :count]
    return torch.nn.functional.pad(found, (0, count - found.shape[2])).float()
