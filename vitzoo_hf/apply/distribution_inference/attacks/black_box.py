"""Attacks on what models answer: log-probabilities of classes, predicted classes alone, or real outputs.

Each takes one array `[models, queries, outputs]`, for secrets of any kind. Tests of two classes play every pair of
classes where there are more; of a number they are regressions, as each says.
"""

import itertools
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
from vitzoo_hf.apply.distribution_inference.game import Attack, Guesses, Queries, Shadows, Views, comparable
from vitzoo_hf.apply.distribution_inference.secrets import ClassSecret
from vitzoo_hf.format.schema import ZooError

Votes = Callable[[Float64[Tensor, "S F"], Bool[Tensor, " S"], Float64[Tensor, "T F"]], Float64[Tensor, " T"]]
"""Statistics of shadows, which of them are of the second class, statistics of targets -> share of votes for it."""


def qualities(views: Views, queries: Queries) -> Float64[Tensor, "M O"]:
    """How well each model answers each query set: accuracy, or the negative mean squared error of real outputs.

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
    """The candidate distribution that a model answers best. Needs no shadows.

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
    """Accuracy on the query set that tells shadows apart best, above or below a threshold chosen on shadows.

    The threshold lies midway between shadows, where the published test tries hundredths. Of a number: ridge on the
    qualities of all query sets.

    Source: Suri and Evans, PETS 2022.
    """
    known, queries = comparable(shadows.views, targets), shadows.asked()
    own, seen = qualities(known, queries), qualities(targets, queries)
    if not isinstance(shadows.secret, ClassSecret):
        return guess_by_ridge(shadows, own.numpy(), seen.numpy())
    return _by_pairs(_threshold_votes, shadows, own, seen)


def per_point_threshold_test(shadows: Shadows, targets: Views, seed: int = 0, *, share: float = 1.0) -> Guesses:
    """A threshold test at every query, and the vote of those that tell shadows apart best.

    It reads the log-probability of a query's true label, of the last class without labels, or the real output. Of a
    number: a straight line through the shadows at every query, their mean weighted by the inverse of its variance.

    Source: Suri, Lu, Chen and Evans, "Dissecting Distribution Inference", SaTML 2023.

    Args:
        shadows: to choose thresholds on.
        targets: to guess.
        seed: unused.
        share: of the queries that vote, those whose means differ most between classes.
    """
    known, queries = comparable(shadows.views, targets), shadows.asked()
    own, seen = _point_scores(known, queries), _point_scores(targets, queries)
    if not isinstance(shadows.secret, ClassSecret):
        return Guesses(clamped(shadows, _point_lines(own, shadows.secrets, seen)))
    return _by_pairs(partial(_point_votes, share=share), shadows, own, seen)


def meta_classifier(shadows: Shadows, targets: Views, seed: int = 0) -> Guesses:
    """An MLP from all outputs to the secret.

    Source: Zhang, Tople and Ohrimenko, USENIX Security 2021; layers as in the published experiment.
    """
    return guess_by_mlp(shadows, *_flat(shadows, targets), seed)


def published_meta_classifier(shadows: Shadows, targets: Views, seed: int = 0) -> Guesses:
    """The same as the published experiment ran it, outputs not standardised, on half of the shadows.

    For replication alone: of numbers it errs more than `meta_classifier` in every cell there.
    """
    return guess_by_published_mlp(shadows, *_flat(shadows, targets), seed)


def ridge_on_outputs(shadows: Shadows, targets: Views, seed: int = 0) -> Guesses:
    """Ridge regression from all outputs to the secret."""
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
    known = comparable(shadows.views, targets)
    own, seen = (views.answers().flatten(1).double().numpy() for views in (known, targets))
    return own, seen


def _by_pairs(votes_of: Votes, shadows: Shadows, own: Tensor, seen: Tensor) -> Guesses:
    """Every pair of classes plays a binary test; a target's guess is the class with most votes."""
    assert isinstance(shadows.secret, ClassSecret)
    classes = len(shadows.secret.values)
    tally = torch.zeros(len(seen), classes, dtype=torch.float64)
    share = tally[:, 0]
    for low, high in itertools.combinations(range(classes), 2):
        held = (shadows.secrets == low) | (shadows.secrets == high)
        share = votes_of(own[held], shadows.secrets[held] == high, seen)
        tally[:, high] += share
        tally[:, low] += 1 - share
    if classes > 2:
        return Guesses(tally.argmax(1))
    return Guesses((share >= 0.5).long(), share)


def _threshold_votes(own: Tensor, second: Tensor, seen: Tensor) -> Tensor:
    """0 or 1, by the statistic whose class means differ most."""
    best = int((own[second].mean(0) - own[~second].mean(0)).abs().argmax())
    return _point_votes(own[:, [best]], second, seen[:, [best]], share=1.0)


def _point_votes(own: Tensor, second: Tensor, seen: Tensor, *, share: float) -> Tensor:
    """Share of statistics that vote for the second class, each by the threshold and side best on shadows."""
    gaps = (own[second].mean(0) - own[~second].mean(0)).abs()
    kept = gaps.argsort(descending=True, stable=True)[: max(1, round(share * len(gaps)))]
    own, seen = own[:, kept], seen[:, kept]
    values, order = own.sort(dim=0, stable=True)
    sign = torch.where(second, 1.0, -1.0).double()[order] / torch.where(second, second.sum(), (~second).sum())[order]
    above = sign.sum(0) - sign.cumsum(0)[:-1]  # balanced accuracy of "second above", but for a constant
    gain = torch.where(values[1:] > values[:-1], above.abs(), -1.0)
    cut = gain.argmax(0)
    columns = torch.arange(own.shape[1])
    threshold = (values[cut, columns] + values[cut + 1, columns]) / 2
    upper = above[cut, columns] >= 0
    votes = ((seen > threshold) == upper).double()
    useful = gain[cut, columns] > 0
    return votes[:, useful].mean(1) if useful.any() else torch.full((len(seen),), 0.5, dtype=torch.float64)


def _point_scores(views: Views, queries: Queries) -> Float64[Tensor, "M Q"]:
    outputs = views.answers()
    if views.kind == "real" or queries.labels is None:
        return outputs[..., -1].double()
    return outputs.gather(2, queries.labels.expand(len(outputs), -1)[..., None])[..., 0].double()


def _point_lines(own: Tensor, secrets: Float64[Tensor, "S V"], seen: Tensor) -> Float64[Tensor, "T V"]:
    """Least squares of the secret on the score at every query, weighted by one over the residual variance."""
    centre, middle = own.mean(0), secrets.mean(0)
    x, y = own - centre, secrets - middle
    slope = (x.mT @ y) / x.square().sum(0)[:, None].clamp(min=1e-30)
    residual = y.square().sum(0) - slope.square() * x.square().sum(0)[:, None]
    weight = 1 / residual.clamp(min=1e-12)
    weight = weight / weight.sum(0)
    return middle + (seen - centre) @ (slope * weight)
