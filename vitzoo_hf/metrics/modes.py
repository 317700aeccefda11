"""Pure functions of distances between models: their map in a plane, and the separation of groups of models."""

import math

import numpy as np
from jaxtyping import Float, Float64, Int64


def classical_mds(distances: Float[np.ndarray, "P P"]) -> tuple[Float64[np.ndarray, "P 2"], float]:
    """Points in the plane with distances closest to `distances`: Torgerson's classical scaling (1952).

    Double centring of the squared distances gives inner products; the points are its first two eigenvectors times the
    roots of their eigenvalues. Distances of points in a plane come back exactly. The sign of an axis means nothing:
    the largest coordinate is made positive. An axis whose eigenvalue is not positive is 0 throughout.

    Args:
        distances: symmetric, 0 on the diagonal; no NaN.

    Returns:
        float64 `[P, 2]`, and the share of the two eigenvalues in the sum of the positive ones; NaN if none is.

    Example:
        >>> points, share = classical_mds(np.array([[0.0, 3, 3], [3, 0, 0], [3, 0, 0]]))
        >>> points[:, 0].round(6).tolist(), round(share, 6)
        ([2.0, -1.0, -1.0], 1.0)
    """
    squared = distances.astype(np.float64) ** 2
    centred = squared - squared.mean(axis=0) - squared.mean(axis=1, keepdims=True) + squared.mean()
    values, vectors = np.linalg.eigh(-centred / 2)
    positive = np.where(values > 1e-12 * np.abs(values).max(), values, 0.0)[::-1]
    points = vectors[:, ::-1][:, :2] * np.sqrt(positive[:2])
    largest = points[np.abs(points).argmax(axis=0), np.arange(2)]
    share = positive[:2].sum() / positive.sum() if positive.any() else math.nan
    return points * np.where(largest < 0, -1.0, 1.0), float(share)


def silhouette(distances: Float[np.ndarray, "P P"], codes: Int64[np.ndarray, " P"]) -> float:
    """The mean silhouette of groups: scikit-learn's `silhouette_score`, in one matrix product.

    1: groups are tight and far apart; 0: they overlap; below: models are closer to another group than to their own.

    Args:
        distances: symmetric, 0 on the diagonal.
        codes: the group of each model, at least two different ones.
    """
    groups, group = np.unique(codes, return_inverse=True)
    members = np.eye(len(groups))[group]
    counts = members.sum(axis=0)
    sums = distances @ members
    rows = np.arange(len(codes))
    inside = sums[rows, group] / np.maximum(counts[group] - 1, 1)
    outside = np.where(members > 0, np.inf, sums / counts).min(axis=1)
    larger = np.maximum(inside, outside)
    alone = (counts[group] == 1) | (larger == 0)  # 0 by definition (Rousseeuw 1987), not 0 / 0
    return float(np.where(alone, 0.0, (outside - inside) / np.where(alone, 1.0, larger)).mean())
