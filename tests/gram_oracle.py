"""HSIC and CKA in float64 numpy, written from their definitions: no code or formula of the package."""

import numpy as np
import torch
from sklearn.metrics.pairwise import rbf_kernel


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def related(P, N, F, seed=0):
    """Models that share a signal, each in its own basis, with an offset and a scale of its own."""
    signal, noise = randn(1, N, F, seed=seed), randn(P, N, F, seed=seed + 1)
    mixed = signal @ randn(P, F, F, seed=seed + 2) / F**0.5 + noise
    return mixed * torch.logspace(-2, 2, P)[:, None, None] + torch.linspace(-3, 3, P)[:, None, None]


def gram(x, kernel, bandwidth):
    x = x.double().numpy()
    if kernel == "linear":
        return x @ x.T
    distances = ((x[:, None] - x[None]) ** 2).sum(-1)
    return rbf_kernel(x, gamma=1 / (2 * bandwidth**2 * np.median(distances)))


def hsic_of_grams(grams, debiased):
    """Biased by centring matrices; unbiased by U-centring (Szekely and Rizzo 2014), not by Song's formula."""
    n = len(grams[0])
    centred = []
    for k in grams:
        k = k.copy()
        if debiased:
            np.fill_diagonal(k, 0)
            k = k - k.sum(0) / (n - 2) - k.sum(1)[:, None] / (n - 2) + k.sum() / ((n - 1) * (n - 2))
            np.fill_diagonal(k, 0)
        else:
            h = np.eye(n) - 1 / n
            k = h @ k @ h
        centred.append(k)
    return np.array([[(k * m).sum() for m in centred] for k in centred]) / (n * (n - 3) if debiased else (n - 1) ** 2)


def hsic_oracle(features, debiased, kernel="linear", bandwidth=1.0):
    return hsic_of_grams([gram(x, kernel, bandwidth) for x in features], debiased)


def aligned(hsic):
    return hsic / np.sqrt(np.outer(np.diag(hsic), np.diag(hsic)))


def cka_oracle(*args, **kwargs):
    return aligned(hsic_oracle(*args, **kwargs))
