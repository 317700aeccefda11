"""How alike two models represent the same images: HSIC and centred kernel alignment for all pairs.

Pure functions of tensors. P models, N images, F features; the result is float64 on the input's device and inputs
are never written to. `centred_features` says how features are centred and how memory stays bounded,
`gram_products` what is computed of them, `cka_batches` does the same from batches of images.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from vitzoo_hf.centred_features import CentredFeatures, Features
from vitzoo_hf.feature_file import FeatureFile
from vitzoo_hf.gram_products import Products, linear_products, median_distances, rbf_products
from vitzoo_hf.hsic_estimators import alignment, estimates, rounding

Kernel = Literal["linear", "rbf"]


@torch.no_grad()
def cka(
    features: Features, *, debiased: bool = True, kernel: Kernel = "linear", bandwidth: float = 1.0
) -> Float64[Tensor, "P P"]:
    """Centred kernel alignment of all pairs of models, `HSIC(K,L) / sqrt(HSIC(K,K) HSIC(L,L))`.

    Debiased CKA (HSIC_1 of Song et al. 2012; Nguyen et al. 2021) is 0 on average for independent features, and may
    be negative; biased CKA (Kornblith et al. 2019) is in [0, 1] and grows with F / N. Neither is clamped. A constant
    representation has no CKA and gives NaN in its whole row and column, diagonal included. So does one whose own
    HSIC is within rounding of zero, as debiased HSIC is when all images are equally far apart.

    Args:
        features: `[P, N, F]`, or one `[N, F_p]` a model, tensors or `FeatureFile`s: widths may differ, and files
            need not fit in memory. Any floating dtype: below float32 computed in float32, float64 in float64. A
            column that varies by less than 4 ulp of its largest value counts as constant.
        debiased: the unbiased estimator, for N >= 4; else the biased one, for N >= 2.
        kernel: "linear", or "rbf": `exp(-|x - y|^2 / (2 bandwidth^2 median))`.
        bandwidth: of "rbf", as a fraction of the root of the median squared distance over all N^2 pairs, each image
            with itself included: `threshold` in the notebook of Kornblith et al., who report 0.2 to 0.8.

    Returns:
        A symmetric matrix with ones on the diagonal.

    Raises:
        ValueError: on too few images, features that are not finite or do not fit together, or another kernel.

    Layers are models too: `cka(layers.flatten(0, 1)).unflatten(0, layers.shape[:2]).unflatten(2, layers.shape[:2])`
    compares every layer of every model, `layers` being `[P, layers, N, F]`; for two models see `cka_between`.

    Example:
        >>> x = torch.randn(2, 50, 8, generator=torch.Generator().manual_seed(0))
        >>> similarity = cka(torch.stack([x[0], 3 * x[0] + 7, x[1]]))
        >>> similarity[0, 1].item() > 0.9999, abs(similarity[0, 2].item()) < 0.2
        (True, True)
    """
    products = _products(features, debiased, kernel, bandwidth)
    return alignment(estimates(products, debiased), rounding(products))


@torch.no_grad()
def cka_between(
    first: Float[Tensor, "A N F"] | Sequence[Float[Tensor, "N _"] | FeatureFile],
    second: Float[Tensor, "B N G"] | Sequence[Float[Tensor, "N _"] | FeatureFile],
    *,
    debiased: bool = True,
) -> Float64[Tensor, "A B"]:
    """Linear CKA of each representation of one sequence with each of another: two models layer by layer, say.

    Costs what these pairs cost: those within a sequence are left out. Arguments, NaN and errors as `cka`.

    Example:
        >>> x = torch.randn(3, 50, 8, generator=torch.Generator().manual_seed(0))
        >>> block = cka_between(x[:2], x)  # [2, 3]
        >>> block.shape, torch.equal(block.diagonal().round(decimals=6), torch.ones(2, dtype=torch.float64))
        (torch.Size([2, 3]), True)
    """
    products = linear_products(CentredFeatures([*first, *second], 4 if debiased else 2), num_first=len(first))
    return alignment(estimates(products, debiased), rounding(products))[: len(first), len(first) :]


@torch.no_grad()
def hsic(
    features: Features, *, debiased: bool = True, kernel: Kernel = "linear", bandwidth: float = 1.0
) -> Float64[Tensor, "P P"]:
    """Hilbert-Schmidt independence criterion of all pairs of models; arguments and errors as `cka`.

    Biased `tr(KHLH) / (N-1)^2` (Gretton et al. 2005) or unbiased HSIC_1. A constant representation gives 0.

    Example:
        >>> hsic(torch.tensor([[[0.0], [1.0], [2.0]]]), debiased=False)
        tensor([[1.]], dtype=torch.float64)
    """
    products = _products(features, debiased, kernel, bandwidth)
    N = products.rows.shape[1]
    scales = torch.outer(products.scales, products.scales).square()
    return estimates(products, debiased) * scales / (N * (N - 3) if debiased else (N - 1) ** 2)


def _products(features: Features, debiased: bool, kernel: str, bandwidth: float) -> Products:
    if kernel not in ("linear", "rbf") or not bandwidth > 0:
        raise ValueError(
            f"kernel={kernel!r}, bandwidth={bandwidth}; expected 'linear' or 'rbf' and a bandwidth above 0"
        )
    centred = CentredFeatures(features, 4 if debiased else 2)
    if kernel == "linear":
        return linear_products(centred)
    medians = median_distances(centred)
    return rbf_products(centred, torch.where(medians > 0, 0.5 / bandwidth**2 / medians, 0), medians)
