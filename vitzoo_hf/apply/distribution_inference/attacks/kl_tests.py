"""KL tests: compare a model's outputs with those of the shadows of two classes, by the vote of all pairs of shadows.

Costs: S T divergences of Q C numbers; the calibrated test adds S² divergences between shadows.
"""

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor
from torch.nn.functional import one_hot

from vitzoo_hf.apply.distribution_inference.attacks.meta_models import check_classes, clamped
from vitzoo_hf.apply.distribution_inference.attacks.pairs import DECIMALS, guess_by_pairs
from vitzoo_hf.apply.distribution_inference.game import Guesses, Queries, Shadows, Views, comparable
from vitzoo_hf.apply.distribution_inference.secrets import ClassSecret
from vitzoo_hf.format.schema import ZooError

CLIP = 1e-4
"""Lowest probability, as in the published test; without it, one sure error would decide a divergence."""
NEIGHBOURS = (1, 2, 4, 8, 16, 32, 64)
"""Numbers of nearest shadows that are tried for a secret that is a number."""


def kl_test(shadows: Shadows, targets: Views, seed: int = 0) -> Guesses:
    """Vote of all pairs of shadows: is the target closer to the shadow of the second class?

    The distance is `KL(shadow || target)`, the mean over the queries of a query set, of probabilities clipped to
    1e-4; real outputs are means of normal distributions of variance 1. Votes do not depend on other targets, unlike
    the normalisation over victims in the published default.

    For a number, the guess is the mean secret of the nearest shadows; their count is selected by leaving single
    shadows out. Targets of kind `labels` make it the label-only test, in which shadows are known by their labels too.
    The published label-only test keeps the probabilities of shadows: where shadows of one class are more confident
    than those of the other, all its guesses are the same class.

    Source: Suri, Lu, Chen and Evans, SaTML 2023.
    """
    return _by_divergence(shadows, targets, calibrated=False)


def calibrated_kl_test(shadows: Shadows, targets: Views, seed: int = 0) -> Guesses:
    """KL test with the threshold on the share of votes that separates shadows best, in place of one half.

    Each shadow is tested against the other shadows. Calibration helps where outputs of one class vary less than those
    of the other, because most votes then name that class. For a number: guesses of the KL test along a line that is
    fitted to shadows.

    Source: the test of Suri, Lu, Chen and Evans, SaTML 2023. The authors calibrate on other victim models; this
    version does not need any.
    """
    return _by_divergence(shadows, targets, calibrated=True)


def _by_divergence(shadows: Shadows, targets: Views, *, calibrated: bool) -> Guesses:
    queries = shadows.asked()
    views = comparable(shadows.views, targets)
    between = _divergences(views, targets, queries)
    if not isinstance(shadows.secret, ClassSecret):
        apart = _divergences(views, views, queries).mean(0)
        return Guesses(clamped(shadows, _nearest(apart, between.mean(0), shadows.secrets, calibrated=calibrated)))
    of_shadows = _divergences(views, views, queries) if calibrated else None
    check_classes(shadows, fewest=2 if calibrated else 1)

    def share_of_second(first: Tensor, second: Tensor) -> Tensor:
        share = _share_of_second(between, first, second)
        if of_shadows is None:
            return share
        return _rounded(share + 0.5 - _threshold_of_shares(*_shares_of_shadows(of_shadows, first, second)))

    return guess_by_pairs(shadows, share_of_second, rounded=True)


def _rounded(shares: Float64[Tensor, "*shape"]) -> Float64[Tensor, "*shape"]:
    """Round shares, so that shares that differ only by the order of sums are equal."""
    return shares.round(decimals=DECIMALS)


def _divergences(shadows: Views, targets: Views, queries: Queries) -> Float64[Tensor, "O S T"]:
    """Mean KL of the outputs of every shadow from those of every target, for each query set."""
    of_shadows, of_targets = shadows.answers(), targets.answers()
    divergences = []
    for origin in range(int(queries.origins.max()) + 1):
        members = queries.origins == origin
        if targets.kind == "labels":
            divergences.append(_divergences_of_labels(of_shadows[:, members], of_targets[:, members]))
            continue
        f, g = of_shadows[:, members].flatten(1), of_targets[:, members].flatten(1)
        if targets.kind == "real":
            # KL of two normal distributions of variance 1 is half the squared distance of their means
            divergences.append(torch.cdist(f.double(), g.double()).square() / (2 * int(members.sum())))
            continue
        f, g = (values.double().exp().clamp(CLIP, 1 - CLIP) for values in (f, g))
        # split in two, so that all pairs of models take one matrix product
        negative_entropy = (f * f.log()).sum(1)[:, None]
        divergences.append((negative_entropy - f @ g.log().mT) / int(members.sum()))
    return torch.stack(divergences)


def _divergences_of_labels(
    of_shadows: Float[Tensor, "S Q C"], of_targets: Float[Tensor, "T Q C"]
) -> Float64[Tensor, "S T"]:
    """Divergences from the count of queries with different predicted classes: equal counts give equal divergences."""
    Q, C = of_shadows.shape[1:]
    f, g = (one_hot(values.argmax(2), C).flatten(1).double() for values in (of_shadows, of_targets))
    # every output has one probability for its class and one for each other class
    first = of_shadows[0, 0].double().exp().clamp(CLIP, 1 - CLIP)
    top, bottom = first.max(), first.min()
    return (Q - f @ g.mT) * ((top - bottom) * (top / bottom).log() / Q)


def _share_above(first: Float64[Tensor, "A T"], second: Float64[Tensor, "B T"]) -> Float64[Tensor, " T"]:
    """Share of pairs in which the first is farther than the second; a tie counts half."""
    ordered = second.mT.contiguous().sort(1).values
    values = first.mT.contiguous()
    # sorting takes S log S steps in place of all pairs; the two sides count a tie half
    below = torch.searchsorted(ordered, values) + torch.searchsorted(ordered, values, right=True)
    return below.double().mean(1) / (2 * second.shape[0])


def _share_of_second(
    between: Float64[Tensor, "O S T"], first: Bool[Tensor, " S"], second: Bool[Tensor, " S"]
) -> Float64[Tensor, " T"]:
    """Share of pairs of shadows that vote for the second class, the mean over query sets."""
    return _rounded(torch.stack([_share_above(distances[first], distances[second]) for distances in between]).mean(0))


def _shares_of_shadows(
    of_shadows: Float64[Tensor, "O S S"], first: Bool[Tensor, " S"], second: Bool[Tensor, " S"]
) -> tuple[Float64[Tensor, " s"], Bool[Tensor, " s"]]:
    """Share of each shadow of two classes by the pairs without it, and whether it is of the second class."""
    members = first | second
    of_shadows, second = of_shadows[:, members][:, :, members].clone(), second[members]
    pairs_with_itself = torch.where(second, torch.inf, -torch.inf).double()  # which then vote for the first class
    of_shadows.diagonal(dim1=1, dim2=2).copy_(pairs_with_itself)
    counts = torch.where(second, second.sum(), (~second).sum()).double()
    return _rounded(_share_of_second(of_shadows, ~second, second) * counts / (counts - 1)), second


def _threshold_of_shares(shares: Float64[Tensor, " s"], second: Bool[Tensor, " s"]) -> float:
    """Midway between two shares, where balanced accuracy is best; one half where none is better than chance."""
    values, order = shares.sort(stable=True)
    sign = torch.where(second, (~second).sum(), -second.sum())[order]
    above = -sign.cumsum(0)[:-1]  # balanced accuracy of "second above", but for a factor and a constant
    gain = torch.where(values[1:] > values[:-1], above, 0)
    cut = int(gain.argmax())
    return float(values[cut] + values[cut + 1]) / 2 if gain[cut] > 0 else 0.5


def _nearest(
    of_shadows: Float64[Tensor, "S S"], between: Float64[Tensor, "S T"], secrets: Tensor, *, calibrated: bool
) -> Tensor:
    """Mean secret of the nearest shadows, their count selected on shadows; calibrated: on a line fitted to them."""
    # a shadow must not be its own neighbour when the count is selected
    apart = of_shadows.clone().fill_diagonal_(torch.inf)
    # stable, so that ties go to the first shadow on every machine
    order = apart.argsort(dim=0, stable=True)
    if len(secrets) < 2:
        raise ZooError("one shadow has no other to be compared with: give at least 2")
    counts = [count for count in NEIGHBOURS if count < len(secrets)]
    held_out = [secrets[order[:count]].mean(0) for count in counts]
    best = int(np.argmin([(values - secrets).abs().mean().item() for values in held_out]))
    guesses = secrets[between.argsort(dim=0, stable=True)[: counts[best]]].mean(0)
    if not calibrated:
        return guesses
    x, y = held_out[best] - held_out[best].mean(0), secrets - secrets.mean(0)
    slope = (x * y).sum(0) / x.square().sum(0).clamp(min=1e-30)
    return secrets.mean(0) + (guesses - held_out[best].mean(0)) * slope
