"""What the learners of `vitzoo_hf.world.Learner` minimise, for many models at once."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from vitzoo_hf.penalties import (
    annealed,
    invariance_penalty,
    invariance_product,
    logit_scale_gradients,
    risk_variance,
)
from vitzoo_hf.world import Learner


def penalised_risk(
    learner: Learner, losses: Float[Tensor, "M E b"], logits: Float[Tensor, "M E b K"], labels: Tensor, step: int
) -> Float[Tensor, " M"]:
    """Mean risk over environments plus the learner's weighted penalty, as `penalties.annealed` weighs them.

    Args:
        learner: one of `irm`, `irm-product`, `v-rex`.
        losses: cross-entropies of E environments, b images each.
        logits: of the same images.
        labels: int64 `[M, E, b]`.
        step: optimiser steps made before; the weight is at most 1 until `penalty_from`.

    Example:
        >>> learner = Learner("v-rex", penalty_weight=2.0)
        >>> losses = torch.tensor([[[1.0, 1.0], [3.0, 3.0]]])
        >>> penalised_risk(learner, losses, torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 2).long(), step=0)
        tensor([2.])
    """
    risks = losses.mean(2)
    weight = min(learner.penalty_weight, 1.0) if step < learner.penalty_from else learner.penalty_weight
    return annealed(risks.mean(1), _penalty(learner, risks, logits, labels), weight)


def _penalty(
    learner: Learner, risks: Float[Tensor, "M E"], logits: Float[Tensor, "M E b K"], labels: Int64[Tensor, "M E b"]
) -> Float[Tensor, " M"]:
    environments = risks.shape[1]
    if learner.learner == "v-rex":
        return risk_variance(risks)
    if learner.learner == "irm":
        return invariance_penalty(logit_scale_gradients(logits, labels)) / environments
    halves = [logit_scale_gradients(logits[:, :, part::2], labels[:, :, part::2]) for part in (0, 1)]
    return invariance_product(*halves) / environments


def even_shares(models: int, environments: int) -> Float[Tensor, "M E"]:
    """What `group-dro` begins with.

    >>> even_shares(1, 4)
    tensor([[0.2500, 0.2500, 0.2500, 0.2500]])
    """
    return torch.full((models, environments), 1 / environments)
