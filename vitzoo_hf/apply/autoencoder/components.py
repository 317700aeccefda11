"""Principal components of the tokens of each layer: where an autoencoder's linear maps begin."""

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from vitzoo_hf.apply.autoencoder.scaling import Scaling
from vitzoo_hf.apply.autoencoder.tokens import Tokenizer
from vitzoo_hf.schema import ZooError


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
