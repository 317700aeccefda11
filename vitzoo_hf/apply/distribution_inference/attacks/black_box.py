"""Attacks on outputs of models: log-probabilities of classes, predicted classes alone, or real outputs.

Attacks take one array `[P, Q, C]` of outputs on Q queries, and secrets of any kind. For more than two classes, binary
tests play every pair of classes. For a number, tests become regressions, which their docstrings describe.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from jaxtyping import Bool, Float64
from torch import Tensor

from vitzoo_hf.apply.distribution_inference.attacks.kl_tests import calibrated_kl_test, kl_test
from vitzoo_hf.apply.distribution_inference.attacks.meta_models import (
    clamped,
    guess_by_mlp,
    guess_by_published_mlp,
    guess_by_ridge,
)
from vitzoo_hf.apply.distribution_inference.attacks.pairs import guess_by_pairs
from vitzoo_hf.apply.distribution_inference.game import Attack, Guesses, Queries, Shadows, Views, comparable
from vitzoo_hf.apply.distribution_inference.secrets import ClassSecret
from vitzoo_hf.format.schema import ZooError

Votes = Callable[[Float64[Tensor, "S F"], Bool[Tensor, " S"], Float64[Tensor, "T F"]], Float64[Tensor, " T"]]
"""Statistics of shadows, true for shadows of the second class, statistics of targets -> share of votes for it."""


def qualities(views: Views, queries: Queries) -> Float64[Tensor, "P O"]:
    """Quality of each model on each query set: accuracy, or the negative mean squared error of real outputs.

    Raises:
        ZooError: if there are no outputs or labels.
    """
    if queries.labels is None:
        raise ZooError("this attack compares answers with true labels, and the queries have none")
    outputs, labels = views.answers(), queries.labels
    hits = -(outputs[..., 0] - labels).square() if views.kind == "real" else (outputs.argmax(2) == labels)
    sets = range(int(queries.origins.max()) + 1)
    return torch.stack([hits[:, queries.origins == origin].double().mean(1) for origin in sets], 1)


def loss_test(shadows: Shadows, targets: Views, seed: int = 0) -> Guesses:
    """Guess the candidate distribution on which a model has the best quality. Needs no shadows.

    Source: Suri and Evans, PETS 2022.

    Raises:
        ZooError: if query sets are not those of candidate distributions.
    """
    queries = shadows.asked()
    if queries.candidates is None:
        raise ZooError("the loss test needs a query set of every candidate distribution")
    quality, candidates = qualities(targets, queries), queries.candidates
    if sorted(candidates.flatten().tolist()) == [0, 1] and candidates.dtype == torch.int64:
        quality = quality[:, candidates.argsort()]
        return Guesses((quality[:, 1] > quality[:, 0]).long(), quality[:, 1] - quality[:, 0])
    return Guesses(candidates[quality.argmax(1)])


def threshold_test(shadows: Shadows, targets: Views, seed: int = 0) -> Guesses:
    """Compare accuracy on the query set that separates shadows best with a threshold selected on shadows.

    The threshold lies midway between two shadows; the published test tries multiples of one hundredth. For a number:
    ridge regression on the qualities of all query sets.

    Source: Suri and Evans, PETS 2022.
    """
    views, queries = comparable(shadows.views, targets), shadows.asked()
    of_shadows, of_targets = qualities(views, queries), qualities(targets, queries)
    if not isinstance(shadows.secret, ClassSecret):
        return guess_by_ridge(shadows, of_shadows.numpy(), of_targets.numpy())
    return _by_pairs(_threshold_votes, shadows, of_shadows, of_targets)


def per_point_threshold_test(shadows: Shadows, targets: Views, seed: int = 0, *, share: float = 1.0) -> Guesses:
    """Apply a threshold test at every query; the queries that separate shadows best vote.

    The score of a query is the log-probability of its true label, of the last class if there are no labels, or the
    real output. For a number: a straight line through the shadows at every query, averaged with weights of one over
    the residual variance.

    Source: Suri, Lu, Chen and Evans, "Dissecting Distribution Inference", SaTML 2023.

    Args:
        shadows: models that select the thresholds.
        targets: models whose secret is guessed.
        seed: unused.
        share: share of the queries that vote; queries whose means differ most between classes come first.
    """
    views, queries = comparable(shadows.views, targets), shadows.asked()
    of_shadows, of_targets = _point_scores(views, queries), _point_scores(targets, queries)
    if not isinstance(shadows.secret, ClassSecret):
        return Guesses(clamped(shadows, _point_lines(of_shadows, shadows.secrets, of_targets)))
    return _by_pairs(partial(_point_votes, share=share), shadows, of_shadows, of_targets)


def meta_classifier(shadows: Shadows, targets: Views, seed: int = 0) -> Guesses:
    """Guess the secret from all outputs by an MLP.

    Source: Zhang, Tople and Ohrimenko, USENIX Security 2021; layers as in the published experiment.
    """
    return guess_by_mlp(shadows, *_flat(shadows, targets), seed)


def published_meta_classifier(shadows: Shadows, targets: Views, seed: int = 0) -> Guesses:
    """Run `meta_classifier` as the published experiment did: outputs not standardised, on half of the shadows.

    For replication only: for numbers it has a larger error than `meta_classifier` in every replicated cell.
    """
    return guess_by_published_mlp(shadows, *_flat(shadows, targets), seed)


def ridge_on_outputs(shadows: Shadows, targets: Views, seed: int = 0) -> Guesses:
    """Guess the secret from all outputs by ridge regression."""
    return guess_by_ridge(shadows, *_flat(shadows, targets))


BLACK_BOX: dict[str, Attack] = {
    "loss_test": loss_test,
    "threshold_test": threshold_test,
    "per_point_threshold_test": per_point_threshold_test,
    "kl_test": kl_test,
    "calibrated_kl_test": calibrated_kl_test,
    "meta_classifier": meta_classifier,
    "ridge_on_outputs": ridge_on_outputs,
}


def _flat(shadows: Shadows, targets: Views) -> tuple[np.ndarray, np.ndarray]:
    views = comparable(shadows.views, targets)
    of_shadows, of_targets = (part.answers().flatten(1).double().numpy() for part in (views, targets))
    return of_shadows, of_targets


def _by_pairs(votes_of: Votes, shadows: Shadows, of_shadows: Tensor, of_targets: Tensor) -> Guesses:
    def share_of_second(first: Tensor, second: Tensor) -> Tensor:
        members = first | second
        return votes_of(of_shadows[members], second[members], of_targets)

    return guess_by_pairs(shadows, share_of_second)


def _threshold_votes(of_shadows: Tensor, second: Tensor, of_targets: Tensor) -> Tensor:
    """Vote 0 or 1 by the statistic whose class means differ most."""
    best = int((of_shadows[second].mean(0) - of_shadows[~second].mean(0)).abs().argmax())
    return _point_votes(of_shadows[:, [best]], second, of_targets[:, [best]], share=1.0)


def _point_votes(of_shadows: Tensor, second: Tensor, of_targets: Tensor, *, share: float) -> Tensor:
    """Share of statistics that vote for the second class, by the threshold and side that are best on shadows."""
    gaps = (of_shadows[second].mean(0) - of_shadows[~second].mean(0)).abs()
    # stable, so that equal gaps keep the order of the queries
    columns = gaps.argsort(descending=True, stable=True)[: max(1, round(share * len(gaps)))]
    of_shadows, of_targets = of_shadows[:, columns], of_targets[:, columns]
    values, order = of_shadows.sort(dim=0, stable=True)
    sign = torch.where(second, 1.0, -1.0).double()[order] / torch.where(second, second.sum(), (~second).sum())[order]
    above = sign.sum(0) - sign.cumsum(0)[:-1]  # balanced accuracy of "second above", but for a constant
    # no threshold lies between two equal values
    gain = torch.where(values[1:] > values[:-1], above.abs(), -1.0)
    cut = gain.argmax(0)
    number = torch.arange(of_shadows.shape[1])
    threshold = (values[cut, number] + values[cut + 1, number]) / 2
    upper = above[cut, number] >= 0
    votes = ((of_targets > threshold) == upper).double()
    useful = gain[cut, number] > 0
    return votes[:, useful].mean(1) if useful.any() else torch.full((len(of_targets),), 0.5, dtype=torch.float64)


def _point_scores(views: Views, queries: Queries) -> Float64[Tensor, "P Q"]:
    outputs = views.answers()
    if views.kind == "real" or queries.labels is None:
        return outputs[..., -1].double()
    return outputs.gather(2, queries.labels.expand(len(outputs), -1)[..., None])[..., 0].double()


def _point_lines(of_shadows: Tensor, secrets: Float64[Tensor, "S V"], of_targets: Tensor) -> Float64[Tensor, "T V"]:
    """Predict the secret by a line at every query, averaged with weights of one over the residual variance."""
    centre, middle = of_shadows.mean(0), secrets.mean(0)
    x, y = of_shadows - centre, secrets - middle
    # the bound guards queries on which all shadows answer alike; their slope is 0
    slope = (x.mT @ y) / x.square().sum(0)[:, None].clamp(min=1e-30)
    residual = y.square().sum(0) - slope.square() * x.square().sum(0)[:, None]
    # a perfect fit of few shadows would have infinite weight
    weight = 1 / residual.clamp(min=1e-12)
    weight = weight / weight.sum(0)
    return middle + (of_targets - centre) @ (slope * weight)
