"""The KL test: which shadows a model answers like, by the vote of all their pairs, or with a calibrated threshold."""

import itertools

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor
from torch.nn.functional import one_hot

from vitzoo_hf.apply.distribution_inference.attacks.meta_models import check_classes, clamped
from vitzoo_hf.apply.distribution_inference.game import Guesses, Queries, Shadows, Views, comparable
from vitzoo_hf.apply.distribution_inference.secrets import ClassSecret
from vitzoo_hf.format.schema import ZooError

CLIP = 1e-4
NEIGHBOURS = (1, 2, 4, 8, 16, 32, 64)


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

    Source: the test of Suri, Lu, Chen and Evans; its published calibration is on other victims, which this needs not.
    """
    return _by_divergence(shadows, targets, calibrated=True)


def _by_divergence(shadows: Shadows, targets: Views, *, calibrated: bool) -> Guesses:
    queries = shadows.asked()
    known = comparable(shadows.views, targets)
    between = _divergences(known, targets, queries)
    if not isinstance(shadows.secret, ClassSecret):
        apart = _divergences(known, known, queries).mean(0)
        return Guesses(clamped(shadows, _nearest(apart, between.mean(0), shadows.secrets, calibrated=calibrated)))
    own = _divergences(known, known, queries) if calibrated else None
    classes = len(shadows.secret.values)
    votes = torch.zeros(between.shape[2], classes, dtype=torch.float64)
    share = votes[:, 0]
    check_classes(shadows, fewest=2 if calibrated else 1)
    for low, high in itertools.combinations(range(classes), 2):
        first, second = shadows.secrets == low, shadows.secrets == high
        share = _share_of_second(between, first, second)
        if own is not None:
            share = _rounded(share + 0.5 - _threshold_of_shares(*_shares_of_shadows(own, first, second)))
        votes[:, low] += 1 - share
        votes[:, high] += share
    if classes > 2:
        return Guesses(_rounded(votes).argmax(1))
    return Guesses((share >= 0.5).long(), share)


def _rounded(shares: Float64[Tensor, "*shape"]) -> Float64[Tensor, "*shape"]:
    """Without the last bits, so that shares that are equal but for the order of sums are equal."""
    return shares.round(decimals=12)


def _divergences(shadows: Views, targets: Views, queries: Queries) -> Float64[Tensor, "O S T"]:
    """Mean KL of every shadow's answers from every target's, for each query set."""
    own, seen = shadows.answers(), targets.answers()
    if own.shape[1:] != seen.shape[1:]:
        raise ZooError(f"shadows answer {list(own.shape[1:])}, targets {list(seen.shape[1:])}: ask the same queries")
    found = []
    for origin in range(int(queries.origins.max()) + 1):
        here = queries.origins == origin
        if targets.kind == "labels":
            found.append(_divergences_of_labels(own[:, here], seen[:, here]))
            continue
        f, g = own[:, here].flatten(1), seen[:, here].flatten(1)
        if targets.kind == "real":
            found.append(torch.cdist(f.double(), g.double()).square() / (2 * int(here.sum())))
            continue
        f, g = (values.double().exp().clamp(CLIP, 1 - CLIP) for values in (f, g))
        own_part = (f * f.log()).sum(1)[:, None]
        found.append((own_part - f @ g.log().mT) / int(here.sum()))
    return torch.stack(found)


def _divergences_of_labels(own: Float[Tensor, "S Q K"], seen: Float[Tensor, "T Q K"]) -> Float64[Tensor, "S T"]:
    """The same by counting queries on which predicted classes differ, so that equal counts are equal divergences."""
    Q, K = own.shape[1:]
    f, g = (one_hot(values.argmax(2), K).flatten(1).double() for values in (own, seen))
    first = own[0, 0].double().exp().clamp(CLIP, 1 - CLIP)
    sure, rest = first.max(), first.min()
    return (Q - f @ g.mT) * ((sure - rest) * (sure / rest).log() / Q)


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
    return _rounded(torch.stack([_share_above(each[first], each[second]) for each in between]).mean(0))


def _shares_of_shadows(
    own: Float64[Tensor, "O S S"], first: Bool[Tensor, " S"], second: Bool[Tensor, " S"]
) -> tuple[Float64[Tensor, " s"], Bool[Tensor, " s"]]:
    """Of each shadow of two classes by the pairs it is not in, and which are of the second class."""
    held = first | second
    own, second = own[:, held][:, :, held].clone(), second[held]
    pairs_with_itself = torch.where(second, torch.inf, -torch.inf).double()  # which then vote for the first class
    own.diagonal(dim1=1, dim2=2).copy_(pairs_with_itself)
    counts = torch.where(second, second.sum(), (~second).sum()).double()
    return _rounded(_share_of_second(own, ~second, second) * counts / (counts - 1)), second


def _threshold_of_shares(shares: Float64[Tensor, " s"], second: Bool[Tensor, " s"]) -> float:
    """Midway between two shares, where balanced accuracy is best; one half where none is better than chance."""
    values, order = shares.sort(stable=True)
    sign = torch.where(second, (~second).sum(), -second.sum())[order]
    above = -sign.cumsum(0)[:-1]  # balanced accuracy of "second above", but for a factor and a constant
    gain = torch.where(values[1:] > values[:-1], above, 0)
    cut = int(gain.argmax())
    return float(values[cut] + values[cut + 1]) / 2 if gain[cut] > 0 else 0.5


def _nearest(
    own: Float64[Tensor, "S S"], between: Float64[Tensor, "S T"], secrets: Tensor, *, calibrated: bool
) -> Tensor:
    """Mean secret of the nearest shadows, their number chosen on shadows; calibrated, along a line fitted to them."""
    apart = own.clone().fill_diagonal_(torch.inf)
    order = apart.argsort(dim=0, stable=True)
    if len(secrets) < 2:
        raise ZooError("one shadow has no other to be compared with: give at least 2")
    counts = [count for count in NEIGHBOURS if count < len(secrets)]
    held_out = [secrets[order[:count]].mean(0) for count in counts]
    best = int(np.argmin([(values - secrets).abs().mean().item() for values in held_out]))
    found = secrets[between.argsort(dim=0, stable=True)[: counts[best]]].mean(0)
    if not calibrated:
        return found
    x, y = held_out[best] - held_out[best].mean(0), secrets - secrets.mean(0)
    slope = (x * y).sum(0) / x.square().sum(0).clamp(min=1e-30)
    return secrets.mean(0) + (found - held_out[best].mean(0)) * slope
