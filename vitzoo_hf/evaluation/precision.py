"""The effect of a lower precision than float32 on predictions, accuracies and logits."""

from collections.abc import Iterable

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from vitzoo_hf.format.row import RowLike
from vitzoo_hf.models.population import Population


def precision_effect(
    rows: Iterable[RowLike],
    images: Float[Tensor, "N channels H W"],
    labels: Integer[Tensor, " N"],
    precision: str,
    device: str | torch.device = "cpu",
) -> dict[str, float]:
    """Compare a lower precision with float32, over all models and images.

    Returns:
        `agreement`, the share of equal predictions; `accuracy_difference`, the largest change of a model's accuracy;
        `largest_logit_difference`.

    Example:
        >>> from vitzoo_hf.zoo import Zoo
        >>> zoo = Zoo.sample().filter(stage="finetune")
        >>> precision_effect(zoo.rows(), *zoo.probes("digits"), "bfloat16")["agreement"] > 0.97
        True
    """
    rows = list(rows)
    exact = Population.from_rows(rows, device=device)(images)
    rounded = Population.from_rows(rows, device=device, precision=precision)(images)
    labels = labels.to(exact.device)
    accuracy, rounded_accuracy = ((logits.argmax(-1) == labels).double().mean(-1) for logits in (exact, rounded))
    return {
        "agreement": float((exact.argmax(-1) == rounded.argmax(-1)).double().mean()),
        "accuracy_difference": float((accuracy - rounded_accuracy).abs().max()),
        "largest_logit_difference": float((exact - rounded).abs().max()),
    }
