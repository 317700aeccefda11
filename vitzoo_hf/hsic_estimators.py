"""The two estimators of HSIC, and the alignment that they make, from inner products of Gram matrices.

With `L` and `K` the Gram matrices of two models, off their diagonals, and `r` their row sums,

    N(N-3) HSIC_1 = <K,L> - 2/(N-2) r_K.r_L + (sum r_K)(sum r_L)/((N-1)(N-2))       (Song et al. 2012)
"""

import torch
from jaxtyping import Float64
from torch import Tensor

from vitzoo_hf.gram_products import Products


def estimates(products: Products, debiased: bool) -> Float64[Tensor, "P P"]:
    """HSIC of the scaled Gram matrices, times N(N-3) if debiased, else (N-1)^2."""
    inner, rows, diagonal, _, _ = products
    N = rows.shape[1]
    if not debiased:
        inner, rows = inner + diagonal @ diagonal.T, rows + diagonal
    total = rows.sum(1)
    linear, constant = (2 / (N - 2), (N - 1) * (N - 2)) if debiased else (2 / N, N**2)
    values = inner - linear * (rows @ rows.T) + torch.outer(total, total) / constant
    return values.triu() + values.triu(1).T


def rounding(products: Products) -> Float64[Tensor, " P"]:
    """How far rounding may take the estimate of a model with itself from zero."""
    return 16 * products.eps * (products.inner.diagonal() + products.diagonal.square().sum(1))


def alignment(values: Float64[Tensor, "P P"], rounding: Float64[Tensor, " P"]) -> Float64[Tensor, "P P"]:
    """`HSIC(K,L) / sqrt(HSIC(K,K) HSIC(L,L))`, NaN for models whose own HSIC is within rounding of zero."""
    own = values.diagonal().where(values.diagonal() > rounding, torch.nan)
    return values / torch.outer(own, own).sqrt()
