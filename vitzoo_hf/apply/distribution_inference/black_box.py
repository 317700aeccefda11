"""Attacks on what models answer: log-probabilities of classes, predicted classes alone, or real outputs.

Each takes one array `[models, queries, outputs]`, for secrets of any kind. Tests of two classes play every pair of
classes where there are more; of a number they are regressions, as each says.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from vitzoo_hf.apply.distribution_inference.game import Attack, Guesses, Kind, Queries, Shadows, Views
from vitzoo_hf.apply.distribution_inference.meta_models import (
    clamped,
    guess_by_mlp,
    guess_by_published_mlp,
    guess_by_ridge,
)
from vitzoo_hf.apply.distribution_inference.secrets import ClassSecret
from vitzoo_hf.schema import ZooError

LABEL_EPSILON = 0.01
CLIP = 1e-4
NEIGHBOURS = (1, 2, 4, 8, 16, 32, 64)

Votes = Callable[[Float64[Tensor, "S F"], Bool[Tensor, " S"], Float64[Tensor, "T F"]], Float64[Tensor, " T"]]
"""Statistics of shadows, which of them are of the second class, statistics of targets -> share of votes for it."""


def label_only(outputs: Float[Tensor, "M Q K"], *, epsilon: float = LABEL_EPSILON) -> Float[Tensor, "M Q K"]:
    """Log-probabilities of an adversary that sees the predicted class: `1 - epsilon` for it, the rest shared.

    Example:
        >>> label_only(torch.tensor([[[2.0, 1.0]]])).exp()
        tensor([[[0.9900, 0.0100]]])
    """
    K = outputs.shape[2]
    found = torch.full_like(outputs, math.log(epsilon / (K - 1)))
    return found.scatter(2, outputs.argmax(2, keepdim=True), math.log(1 - epsilon))


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
    known, queries = _comparable(shadows.views, targets), shadows.asked()
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
    known, queries = _comparable(shadows.views, targets), shadows.asked()
    own, seen = _point_scores(known, queries), _point_scores(targets, queries)
    if not isinstance(shadows.secret, ClassSecret):
        return Guesses(clamped(shadows, _point_lines(own, shadows.secrets, seen)))
    return _by_pairs(partial(_point_votes, share=share), shadows, own, seen)


def kl_test(shadows: Shadows, targets: Views, seed: int = 0) -> Guesses:
    """Whether answers diverge more from those of shadows of one class or of the other, by vote of all their pairs.

    Divergences are taken for each query set, `KL(shadow || target)`, of probabilities clipped to 1e-4; of real
    outputs, as means of normal distributions of variance 1. Votes do not look at other targets, unlike the
    normalisation over victims in the published default. Of a number: mean secret of the nearest shadows, whose number
    is chosen by leaving single shadows out. With targets of kind `labels` it is the label-only test, in which
    shadows are known by their labels too; the published one keeps their probabilities, so that shadows of one class
    that are surer than those of the other decide every guess alike.

    Source: Suri, Lu, Chen and Evans, SaTML 2023.
    """
    return _by_divergence(shadows, targets, calibrated=False)


def calibrated_kl_test(shadows: Shadows, targets: Views, seed: int = 0) -> Guesses:
    """The KL test whose threshold, one half of the votes, is moved to where it tells shadows apart best.

    Shadows are judged by the others. It helps where models of one class answer more alike than those of the other, as
    then most votes name that class. Of a number: guesses of the KL test along a line that is fitted to shadows.

    Source: a remedy for the normalisation over victims of Suri, Lu, Chen and Evans that needs no other victim.
    """
    return _by_divergence(shadows, targets, calibrated=True)


def meta_classifier(shadows: Shadows, targets: Views, seed: int = 0) -> Guesses:
    """An MLP from all outputs to the secret.

    Source: Zhang, Tople and Ohrimenko, USENIX Security 2021; layers as in the published experiment.
    """
    return guess_by_mlp(shadows, *_flat(shadows, targets), seed)


def published_meta_classifier(shadows: Shadows, targets: Views, seed: int = 0) -> Guesses:
    """The same as the published experiment ran it, outputs not standardised, on half of the shadows.

    For replication alone: it is the weaker where outputs are large, and the more so the better models are trained.
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
    known = _comparable(shadows.views, targets)
    own, seen = (views.answers().flatten(1).double().numpy() for views in (known, targets))
    return own, seen


def seen_like(views: Views, kind: Kind) -> Views:
    """The same models, but only their predicted classes where others are known by those alone."""
    if kind == "labels" and views.kind == "log_probabilities" and views.outputs is not None:
        return replace(views, outputs=label_only(views.outputs), kind="labels")
    return views


def _comparable(own: Views, targets: Views) -> Views:
    """Shadows as targets are seen.

    Raises:
        ZooError: if they cannot be.
    """
    known = seen_like(own, targets.kind)
    if known.kind != targets.kind or known.answers().shape[1:] != targets.answers().shape[1:]:
        raise ZooError(
            f"shadows answer with {known.kind} {list(known.answers().shape[1:])}, targets with {targets.kind}"
            f" {list(targets.answers().shape[1:])}: ask both the same queries"
        )
    return known


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


def _by_divergence(shadows: Shadows, targets: Views, *, calibrated: bool) -> Guesses:
    queries = shadows.asked()
    known = _comparable(shadows.views, targets)
    between = _divergences(known, targets, queries)
    if not isinstance(shadows.secret, ClassSecret):
        own = _divergences(known, known, queries).mean(0)
        return Guesses(clamped(shadows, _nearest(own, between.mean(0), shadows.secrets, calibrated=calibrated)))
    own = _divergences(known, known, queries) if calibrated else None
    classes = len(shadows.secret.values)
    votes = torch.zeros(between.shape[2], classes, dtype=torch.float64)
    share = votes[:, 0]
    for low, high in itertools.combinations(range(classes), 2):
        first, second = shadows.secrets == low, shadows.secrets == high
        share = _share_of_second(between, first, second)
        if own is not None:
            share = share + 0.5 - _threshold_of_shares(*_shares_of_shadows(own, first, second))
        votes[:, low] += 1 - share
        votes[:, high] += share
    if classes > 2:
        return Guesses(votes.argmax(1))
    return Guesses((share >= 0.5).long(), share)


def _divergences(shadows: Views, targets: Views, queries: Queries) -> Float64[Tensor, "O S T"]:
    """Mean KL of every shadow's answers from every target's, for each query set."""
    own, seen = shadows.answers(), targets.answers()
    if own.shape[1:] != seen.shape[1:]:
        raise ZooError(f"shadows answer {list(own.shape[1:])}, targets {list(seen.shape[1:])}: ask the same queries")
    found = []
    for origin in range(int(queries.origins.max()) + 1):
        here = queries.origins == origin
        f, g = own[:, here].flatten(1), seen[:, here].flatten(1)
        if targets.kind == "real":
            found.append(torch.cdist(f.double(), g.double()).square() / (2 * int(here.sum())))
            continue
        f, g = (values.double().exp().clamp(CLIP, 1 - CLIP) for values in (f, g))
        own_part = (f * f.log()).sum(1)[:, None]
        found.append((own_part - f @ g.log().mT) / int(here.sum()))
    return torch.stack(found)


def _share_above(first: Float64[Tensor, "A T"], second: Float64[Tensor, "B T"]) -> Float64[Tensor, " T"]:
    """Share of pairs in which the first is farther than the second, ties half."""
    ordered = second.mT.contiguous().sort(1).values
    wanted = first.mT.contiguous()
    below = torch.searchsorted(ordered, wanted) + torch.searchsorted(ordered, wanted, right=True)
    return below.double().mean(1) / (2 * second.shape[0])


def _share_of_second(
    between: Float64[Tensor, "O S T"], first: Bool[Tensor, " S"], second: Bool[Tensor, " S"]
) -> Float64[Tensor, " T"]:
    """Share of pairs of shadows that vote for the second class, the mean over query sets."""
    return torch.stack([_share_above(each[first], each[second]) for each in between]).mean(0)


def _shares_of_shadows(
    own: Float64[Tensor, "O S S"], first: Bool[Tensor, " S"], second: Bool[Tensor, " S"]
) -> tuple[Float64[Tensor, " s"], Bool[Tensor, " s"]]:
    """Of each shadow of two classes by the pairs it is not in, and which are of the second class."""
    held = first | second
    own, second = own[:, held][:, :, held].clone(), second[held]
    pairs_with_itself = torch.where(second, torch.inf, -torch.inf).double()  # which then vote for the first class
    own.diagonal(dim1=1, dim2=2).copy_(pairs_with_itself)
    counts = torch.where(second, second.sum(), (~second).sum()).double()
    return _share_of_second(own, ~second, second) * counts / (counts - 1).clamp(min=1), second


def _threshold_of_shares(shares: Float64[Tensor, " s"], second: Bool[Tensor, " s"]) -> float:
    """Midway between two shares, where balanced accuracy is best; one half where none is better than chance."""
    values, order = shares.sort(stable=True)
    sign = torch.where(second, 1 / second.sum(), -1 / (~second).sum()).double()[order]
    above = -sign.cumsum(0)[:-1]  # balanced accuracy of "second above", but for a constant
    gain = torch.where(values[1:] > values[:-1], above, 0.0)
    cut = int(gain.argmax())
    return float(values[cut] + values[cut + 1]) / 2 if gain[cut] > 1e-12 else 0.5


def _nearest(
    own: Float64[Tensor, "S S"], between: Float64[Tensor, "S T"], secrets: Tensor, *, calibrated: bool
) -> Tensor:
    """Mean secret of the nearest shadows, their number chosen on shadows; calibrated, along a line fitted to them."""
    apart = own.clone().fill_diagonal_(torch.inf)
    order = apart.argsort(0)
    counts = [count for count in NEIGHBOURS if count < len(secrets)]
    held_out = [secrets[order[:count]].mean(0) for count in counts]
    best = int(np.argmin([(values - secrets).abs().mean().item() for values in held_out]))
    found = secrets[between.argsort(0)[: counts[best]]].mean(0)
    if not calibrated:
        return found
    x, y = held_out[best] - held_out[best].mean(0), secrets - secrets.mean(0)
    slope = (x * y).sum(0) / x.square().sum(0).clamp(min=1e-30)
    return secrets.mean(0) + (found - held_out[best].mean(0)) * slope
