"""What it changes to run models in a lower precision."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from vitzoo_hf.models.population import Population


def precision_effect(
    rows: Iterable[Mapping[str, Any]],
    images: Float[Tensor, "N C H W"],
    labels: Integer[Tensor, " N"],
    precision: str,
    device: str | torch.device = "cpu",
) -> dict[str, float]:
    """What a lower precision changes, over all models and images.

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
    right, rounded_right = ((logits.argmax(-1) == labels).double().mean(-1) for logits in (exact, rounded))
    return {
        "agreement": float((exact.argmax(-1) == rounded.argmax(-1)).double().mean()),
        "accuracy_difference": float((right - rounded_right).abs().max()),
        "largest_logit_difference": float((exact - rounded).abs().max()),
    }
