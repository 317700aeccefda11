"""Losses that the learners of `vitzoo_hf.blueprint.world.Learner` minimise, for many models at once.

They see environments: invariant risk minimisation, V-REx, GroupDRO.

Pure, differentiable functions with a leading axis of models: P models are trained at once, each on E environments of
n examples with C classes. Sums over models are what a stack of models is trained on, since no two share a parameter.
"""

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from vitzoo_hf.blueprint.world import Learner


def scale_gradients(
    outputs: Float[Tensor, "P E n"], targets: Float[Tensor, "P E n"], counted: Bool[Tensor, "P E n"] | None = None
) -> Float[Tensor, "P E"]:
    """Derivative by w at 1 of an environment's mean squared loss `(w f - y)^2`: `2 mean f (f - y)`.

    Source: the dummy classifier of Arjovsky et al., "Invariant Risk Minimization", 2019, in closed form.

    Args:
        outputs: f, of P models on the n examples of E environments.
        targets: y.
        counted: examples that are there, where environments differ in size; all by default. An environment without
            any has derivative 0.

    Example:
        >>> scale_gradients(torch.tensor([[[2.0, 1.0]]]), torch.tensor([[[1.0, 1.0]]]))
        tensor([[2.]])
    """
    return _mean(2 * outputs * (outputs - targets), counted)


def half_scale_gradients(
    outputs: Float[Tensor, "P E n"], targets: Float[Tensor, "P E n"], order: Int64[Tensor, " n"]
) -> Float[Tensor, "2 P E"]:
    """Like `scale_gradients`, on the examples at even and at odd places of an order.

    Example:
        >>> half_scale_gradients(torch.tensor([[[2.0, 1.0]]]), torch.tensor([[[1.0, 1.0]]]), torch.tensor([0, 1]))
        tensor([[[4.]],
        <BLANKLINE>
                [[0.]]])
    """
    halves = torch.zeros(len(order), 2, dtype=outputs.dtype, device=outputs.device)
    for half in (0, 1):
        places = order[half::2].to(outputs.device)
        # the 2 of the derivative; one product then gives the means of both halves
        halves[places, half] = 2 / len(places)
    return ((outputs * (outputs - targets)) @ halves).movedim(-1, 0)


def logit_scale_gradients(
    logits: Float[Tensor, "P E n C"], labels: Int64[Tensor, "P E n"], counted: Bool[Tensor, "P E n"] | None = None
) -> Float[Tensor, "P E"]:
    """Derivative by w at 1 of an environment's mean cross-entropy of `w logits`: `mean sum_k (p_k - y_k) logit_k`.

    Args:
        logits: outputs of P models on the n examples of E environments.
        labels: from 0 to C - 1.
        counted: examples that are there; all by default. An environment without any has derivative 0.

    Example:
        >>> logit_scale_gradients(torch.tensor([[[[0.0, 0.0]]]]), torch.tensor([[[1]]]))
        tensor([[0.]])
    """
    expected = (logits.softmax(-1) * logits).sum(-1)
    return _mean(expected - logits.gather(-1, labels[..., None])[..., 0], counted)


def invariance_penalty(gradients: Float[Tensor, "P E"]) -> Float[Tensor, " P"]:
    """IRMv1: the squared derivatives, summed over environments. Never negative.

    Example:
        >>> invariance_penalty(torch.tensor([[1.0, -2.0]]))
        tensor([5.])
    """
    return gradients.square().sum(1)


def invariance_product(first: Float[Tensor, "P E"], second: Float[Tensor, "P E"]) -> Float[Tensor, " P"]:
    """IRMv1 without bias: products of derivatives on two halves of the examples, summed over environments.

    It has no lower bound, so training with it can diverge: count the models that do, and report them.

    Source: appendix of Arjovsky et al., 2019; used in the published experiment on causal learning.

    Example:
        >>> invariance_product(torch.tensor([[1.0, -2.0]]), torch.tensor([[1.0, 3.0]]))
        tensor([-5.])
    """
    return (first * second).sum(1)


def annealed(risks: Float[Tensor, " P"], penalties: Float[Tensor, " P"], weight: float | int) -> Float[Tensor, " P"]:
    """Risk plus weighted penalty, divided by the weight where that is above 1, so that steps do not grow with it.

    Source: the training loop of Arjovsky et al., 2019, where the weight is 1 for the first steps.

    Raises:
        ValueError: for a negative weight.

    Example:
        >>> annealed(torch.tensor([1.0]), torch.tensor([0.5]), 100.0)
        tensor([0.5100])
    """
    if not weight >= 0:
        raise ValueError(f"weight={weight}; expected 0 or more")
    return (risks + weight * penalties) / max(weight, 1.0)


def risk_variance(risks: Float[Tensor, "P E"], present: Bool[Tensor, "P E"] | None = None) -> Float[Tensor, " P"]:
    """V-REx: variance of the risks over environments, divided by their number.

    Source: Krueger et al., "Out-of-Distribution Generalization via Risk Extrapolation", 2021.

    Args:
        risks: mean loss of each model on each environment.
        present: environments that a model is trained on; all by default.

    Example:
        >>> risk_variance(torch.tensor([[1.0, 3.0]]))
        tensor([1.])
    """
    share = _shares(risks, present)
    mean = (share * risks).sum(1, keepdim=True)
    return (share * (risks - mean).square()).sum(1)


def group_shares(
    shares: Float[Tensor, "P E"], risks: Float[Tensor, "P E"], *, rate: float = 0.01
) -> Float[Tensor, "P E"]:
    """GroupDRO's next weights of environments: `q exp(rate * risk)`, normalised. The loss is `(q * risks).sum(1)`.

    An environment that a model does not see keeps the weight 0 that it was given. There are no gradients through the
    weights.

    Source: Sagawa et al., "Distributionally Robust Neural Networks for Group Shifts", 2020.

    Args:
        shares: q, of which those of a model sum to 1.
        risks: mean loss of each model on each environment.
        rate: step size of the weights.

    Example:
        >>> group_shares(torch.tensor([[0.5, 0.5]]), torch.tensor([[0.0, 1.0]]), rate=1.0)
        tensor([[0.2689, 0.7311]])
    """
    # in logarithms, as exp(rate * risk) can overflow; a risk that is not finite must not reach a share of 0
    logits = shares.log() + rate * risks.detach().masked_fill(shares == 0, 0.0)
    return logits.softmax(1)


def _shares(risks: Float[Tensor, "P E"], present: Bool[Tensor, "P E"] | None) -> Float[Tensor, "P E"]:
    weights = torch.ones_like(risks) if present is None else present.to(risks.dtype)
    return weights / weights.sum(1, keepdim=True)


def _mean(values: Float[Tensor, "P E n"], counted: Bool[Tensor, "P E n"] | None) -> Float[Tensor, "P E"]:
    if counted is None:
        return values.mean(-1)
    # 0 / 1 rather than 0 / 0 for an environment without examples
    return values.masked_fill(~counted, 0.0).sum(-1) / counted.sum(-1).clamp(min=1)


def penalised_risk(
    learner: Learner, losses: Float[Tensor, "P E b"], logits: Float[Tensor, "P E b C"], labels: Tensor, step: int
) -> Float[Tensor, " P"]:
    """Mean risk over environments plus the learner's weighted penalty, as `penalties.annealed` weighs them.

    Args:
        learner: one of `irm`, `irm-product`, `v-rex`.
        losses: cross-entropies of E environments, b images each.
        logits: outputs on the same images.
        labels: int64 `[P, E, b]`.
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
    learner: Learner, risks: Float[Tensor, "P E"], logits: Float[Tensor, "P E b C"], labels: Int64[Tensor, "P E b"]
) -> Float[Tensor, " P"]:
    environments = risks.shape[1]
    if learner.learner == "v-rex":
        return risk_variance(risks)
    if learner.learner == "irm":
        return invariance_penalty(logit_scale_gradients(logits, labels)) / environments
    # batches are in a random order, so that even and odd places are independent samples
    halves = [logit_scale_gradients(logits[:, :, part::2], labels[:, :, part::2]) for part in (0, 1)]
    return invariance_product(*halves) / environments


def even_shares(models: int, environments: int) -> Float[Tensor, "P E"]:
    """The shares of environments with which `group-dro` begins.

    >>> even_shares(1, 4)
    tensor([[0.2500, 0.2500, 0.2500, 0.2500]])
    """
    return torch.full((models, environments), 1 / environments)
