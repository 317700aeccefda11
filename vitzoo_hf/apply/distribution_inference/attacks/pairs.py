"""Votes of binary tests, one for every pair of classes; costs grow with the square of the number of classes."""

import itertools
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float64
from torch import Tensor

from vitzoo_hf.apply.distribution_inference.game import Guesses, Shadows
from vitzoo_hf.apply.distribution_inference.secrets import ClassSecret

DECIMALS = 12
"""Shares that differ only by the order of sums are equal after rounding."""

Test = Callable[[Bool[Tensor, " S"], Bool[Tensor, " S"]], Float64[Tensor, " T"]]
"""Shadows of the first class, shadows of the second class -> share of votes for the second, of each target."""


def guess_by_pairs(shadows: Shadows, share_of_second: Test, *, rounded: bool = False) -> Guesses:
    """Play every pair of classes; the guess is the class with most votes, and of two classes the share is the score.

    Args:
        shadows: shadows with a class as their secret.
        share_of_second: binary test of two classes.
        rounded: round the sums of votes to `DECIMALS`, so that ties go to the first class.
    """
    assert isinstance(shadows.secret, ClassSecret)
    classes = len(shadows.secret.values)
    pairs = list(itertools.combinations(range(classes), 2))
    shares = [share_of_second(shadows.secrets == low, shadows.secrets == high) for low, high in pairs]
    if classes == 2:
        # of two classes the share is a score as well, so it is not turned into votes
        return Guesses((shares[0] >= 0.5).long(), shares[0])
    votes = torch.zeros(len(shares[0]), classes, dtype=torch.float64)
    for (low, high), share in zip(pairs, shares, strict=True):
        votes[:, low] += 1 - share
        votes[:, high] += share
    return Guesses((votes.round(decimals=DECIMALS) if rounded else votes).argmax(1))
