"""Similarity of the representations of all pairs of models: HSIC and centred kernel alignment.

Pure functions of tensors. P models, N images, F features; the result is float64 on the input's device and inputs
are never written to. `features` centres features in bounded memory, `gram_products` takes inner products of Gram
matrices. `MinibatchCKA` works on batches of images, so that features of all images never exist together.

With `L` and `K` the Gram matrices of two models, off their diagonals, and `r` their row sums,

    N(N-3) HSIC_1 = <K,L> - 2/(N-2) r_K.r_L + (sum r_K)(sum r_L)/((N-1)(N-2))       (Song et al. 2012)
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from vitzoo_hf.metrics.features import CentredFeatures, FeatureFile, Features
from vitzoo_hf.metrics.gram_products import Products, linear_products, median_distances, rbf_products

Kernel = Literal["linear", "rbf"]
LEAST_IMAGES = {True: 4, False: 2}  # debiased HSIC divides by N - 3, biased HSIC by N - 1
FLOAT64_EPS = torch.finfo(torch.float64).eps
LARGEST_EXPONENT = 16
"""Squared lengths in units of the kernel, above which float32 distances err by more than 1e-6 of such a unit."""
ESCALATE = 1e4
"""An own HSIC below this times its rounding is computed again in float64."""


def estimates(products: Products, debiased: bool) -> Float64[Tensor, "P P"]:
    """HSIC of the scaled Gram matrices, times N(N-3) if debiased, else (N-1)^2."""
    inner, rows, diagonal = products.inner, products.rows, products.diagonal
    N = rows.shape[1]
    if not debiased:  # the biased estimator is of whole Gram matrices: put the diagonals back
        inner, rows = inner + diagonal @ diagonal.T, rows + diagonal
    total = rows.sum(1)
    linear, constant = (2 / (N - 2), (N - 1) * (N - 2)) if debiased else (2 / N, N**2)
    values = inner - linear * (rows @ rows.T) + torch.outer(total, total) / constant
    return values.triu() + values.triu(1).T


def rounding(products: Products, eps: float | Float64[Tensor, " P"] | None = None) -> Float64[Tensor, " P"]:
    """Bound on the rounding error of the estimate of a model with itself, by the eps of the products or another."""
    eps = products.eps if eps is None else eps
    return 16 * eps * (products.inner.diagonal() + products.diagonal.square().sum(1))


def alignment(values: Float64[Tensor, "P P"], rounding: Float64[Tensor, " P"]) -> Float64[Tensor, "P P"]:
    """`HSIC(K,L) / sqrt(HSIC(K,K) HSIC(L,L))`, NaN for models whose `HSIC(K,K)` is within rounding of zero."""
    self_hsic = values.diagonal().where(values.diagonal() > rounding, torch.nan)
    return values / torch.outer(self_hsic, self_hsic).sqrt()


@torch.no_grad()
def cka(
    features: Features, *, debiased: bool = True, kernel: Kernel = "linear", bandwidth: float = 1.0
) -> Float64[Tensor, "P P"]:
    """Centred kernel alignment of all pairs of models, `HSIC(K,L) / sqrt(HSIC(K,K) HSIC(L,L))`.

    Debiased CKA (HSIC_1 of Song et al. 2012; Nguyen et al. 2021) is 0 on average for independent features, and may
    be negative; biased CKA (Kornblith et al. 2019) is in [0, 1] and grows with F / N. Neither is clamped. A constant
    representation has no CKA and gives NaN in its whole row and column, diagonal included. A representation whose
    HSIC with itself is within rounding of zero gives NaN too, such as debiased HSIC of images equally far apart.

    Args:
        features: `[P, N, F]`, or one `[N, F_p]` a model, tensors or `FeatureFile`s: widths may differ, and files
            need not fit in memory. Any floating dtype: below float32 computed in float32, float64 in float64. A
            column that varies by less than 4 ulp of its largest value counts as constant.
        debiased: the unbiased estimator, for N >= 4; else the biased one, for N >= 2.
        kernel: "linear", or "rbf": `exp(-|x - y|^2 / (2 bandwidth^2 median))`.
        bandwidth: width of the "rbf" kernel, as a fraction of the root of the median squared distance over all N^2
            pairs, each image with itself included: `threshold` in the notebook of Kornblith et al. (0.2 to 0.8).

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
    return _estimated(lambda double: _products(features, kernel, bandwidth, debiased, double), debiased).alignment()


@torch.no_grad()
def both_cka(
    features: Features, *, device: torch.device | None = None
) -> tuple[Float64[Tensor, "P P"], Float64[Tensor, "P P"]]:
    """Debiased and biased linear CKA of all pairs of models, from one set of products; for arguments see `cka`.

    Args:
        features: features of all models, of at least four images.
        device: where they are compared; by default where they lie. Files lie on the CPU.

    Returns:
        Debiased and biased CKA, each what `cka` gives.

    Raises:
        ValueError: see `cka`.

    Example:
        >>> x = torch.randn(2, 50, 8, generator=torch.Generator().manual_seed(0))
        >>> debiased, biased = both_cka(x)
        >>> torch.equal(debiased, cka(x)), torch.equal(biased, cka(x, debiased=False))
        (True, True)
    """
    products = _products(features, "linear", 1.0, True, False, device)
    debiased = _estimated(
        lambda double: _products(features, "linear", 1.0, True, True, device) if double else products, True
    )
    return debiased.alignment(), alignment(estimates(products, False), rounding(products))


@torch.no_grad()
def cka_between(
    first: Float[Tensor, "P N F"] | Sequence[Float[Tensor, "N _"] | FeatureFile],
    second: Float[Tensor, "Q N _"] | Sequence[Float[Tensor, "N _"] | FeatureFile],
    *,
    debiased: bool = True,
) -> Float64[Tensor, "P Q"]:
    """Linear CKA of each representation of one sequence with each of another: two models layer by layer, say.

    Pairs within a sequence are not computed. For arguments, NaN and errors see `cka`.

    Example:
        >>> x = torch.randn(3, 50, 8, generator=torch.Generator().manual_seed(0))
        >>> block = cka_between(x[:2], x)  # [2, 3]
        >>> block.shape, torch.equal(block.diagonal().round(decimals=6), torch.ones(2, dtype=torch.float64))
        (torch.Size([2, 3]), True)
    """
    features, minimum = [*first, *second], LEAST_IMAGES[debiased]

    def products(double: bool) -> Products:
        return linear_products(CentredFeatures(features, minimum, dtype=_dtype(double)), num_first=len(first))

    return _estimated(products, debiased).alignment()[: len(first), len(first) :]


@torch.no_grad()
def hsic(
    features: Features, *, debiased: bool = True, kernel: Kernel = "linear", bandwidth: float = 1.0
) -> Float64[Tensor, "P P"]:
    """Hilbert-Schmidt independence criterion of all pairs of models; for arguments and errors see `cka`.

    Biased `tr(KHLH) / (N-1)^2` (Gretton et al. 2005) or unbiased HSIC_1. A constant representation gives 0.

    Example:
        >>> hsic(torch.tensor([[[0.0], [1.0], [2.0]]]), debiased=False)
        tensor([[1.]], dtype=torch.float64)
    """
    estimate = _estimated(lambda double: _products(features, kernel, bandwidth, debiased, double), debiased)
    N = len(features[0])
    scales = torch.outer(estimate.scales, estimate.scales).square()
    return estimate.values * scales / (N * (N - 3) if debiased else (N - 1) ** 2)


class Estimate(NamedTuple):
    """HSIC of all pairs of models, as `estimates` gives it, with what it takes to judge and scale it."""

    values: Float64[Tensor, "P P"]
    rounding: Float64[Tensor, " P"]
    scales: Float64[Tensor, " P"]

    def alignment(self) -> Float64[Tensor, "P P"]:
        """CKA; NaN for a model whose HSIC with itself is within rounding of zero."""
        return alignment(self.values, self.rounding)


def _estimated(products: Callable[[bool], Products], debiased: bool) -> Estimate:
    """HSIC from float32 products; from float64 ones where rounding would show in the sixth digit of a CKA.

    Debiased HSIC is a difference of sums, which nearly cancel where one image is much longer than all others, as with
    the massive activations of large transformers.

    Args:
        products: takes the products in the precision of the features, or in float64.
        debiased: which estimator.
    """
    single = products(False)
    values, noise = estimates(single, debiased), rounding(single)
    if debiased and single.eps > FLOAT64_EPS and bool((values.diagonal().abs() < ESCALATE * noise).any()):
        double = products(True)
        # rounding of the float32 features themselves moves an HSIC that should be zero by the square of their ulp
        noise = rounding(double, double.ulps.square().clamp(min=FLOAT64_EPS))
        return Estimate(estimates(double, debiased), noise, double.scales)
    return Estimate(values, noise, single.scales)


def _dtype(double: bool) -> torch.dtype | None:
    """float64, or None for the precision of the features."""
    return torch.float64 if double else None


def _products(
    features: Features,
    kernel: str,
    bandwidth: float,
    debiased: bool,
    double: bool,
    device: torch.device | None = None,
) -> Products:
    if kernel not in get_args(Kernel) or not bandwidth > 0:
        raise ValueError(
            f"kernel={kernel!r}, bandwidth={bandwidth}; expected 'linear' or 'rbf' and a bandwidth above 0"
        )
    centred = CentredFeatures(features, LEAST_IMAGES[debiased], device=device, dtype=_dtype(double))
    if kernel == "linear":
        return linear_products(centred)
    medians = median_distances(centred)
    rates = torch.where(medians > 0, 0.5 / bandwidth**2 / medians, 0)
    if _distances_cancel(centred, rates):
        return _products(features, kernel, bandwidth, debiased, True, device)
    return rbf_products(centred, rates, medians)


def _distances_cancel(centred: CentredFeatures, rates: Float64[Tensor, " P"]) -> bool:
    """Whether squared distances would lose digits that the kernel sees: most images are far from their mean.

    One image far from all others moves the mean away from them.
    """
    exponents = rates * centred.squares.median(1).values
    return centred.dtype != torch.float64 and bool((exponents > LARGEST_EXPONENT).any())


STATE = {"kernel", "bandwidth", "num_images", "num_batches", "hsic", "rounding"}


class MinibatchCKA:
    """Debiased CKA of all pairs of models, image batch by image batch (Nguyen et al. 2021).

    HSIC_1 is unbiased for every batch of at least 4 images, so its sum over batches, each weighted by its images, is
    an unbiased estimate of HSIC whatever the batch size; a shorter last batch counts. The ratio of sums is close to
    the CKA of all images: of 2048 images, batches of 256 came within 0.004 (`benchmarks/cka_pairs.py`). Batches of
    n images take P N n (P + F) operations, all images together P N^2 (P + F).

    Args:
        kernel: "linear", or "rbf": `exp(-|x - y|^2 / (2 bandwidth^2))`.
        bandwidth: width of the "rbf" kernel in units of the features, one for all models or one a model. It must be
            equal in every batch, so it is not taken from the data; usual are roots of median distances of a batch.

    Example:
        >>> x = torch.randn(2, 64, 8, generator=torch.Generator().manual_seed(0))
        >>> features = torch.stack([x[0], 3 * x[0] + 7, x[1]])
        >>> similarity = MinibatchCKA()
        >>> for batch in features.split(20, dim=1):  # the last one has 4 images
        ...     similarity.update(batch)
        >>> result = similarity.cka()
        >>> similarity.num_images, result[0, 1].item() > 0.9999, abs(result[0, 2].item()) < 0.2
        (64, True, True)
    """

    def __init__(self, *, kernel: Kernel = "linear", bandwidth: float | Sequence[float] | None = None) -> None:
        widths = [] if bandwidth is None else [float(width) for width in torch.tensor(bandwidth).reshape(-1)]
        if (
            kernel not in get_args(Kernel)
            or (kernel == "rbf") != bool(widths)
            or not all(0 < width < float("inf") for width in widths)
        ):
            raise ValueError(
                f"kernel={kernel!r}, bandwidth={bandwidth}; expected 'linear' without bandwidth, or 'rbf' with a "
                "bandwidth above 0, in units of the features"
            )
        self.kernel = kernel
        self.bandwidth = tuple(widths)
        self.num_images = 0
        self.num_batches = 0
        self._hsic: Float64[Tensor, "P P"] = torch.zeros(0, 0, dtype=torch.float64)
        self._rounding: Float64[Tensor, " P"] = torch.zeros(0, dtype=torch.float64)

    @torch.no_grad()
    def update(self, features: Float[Tensor, "P n F"] | Sequence[Float[Tensor, "n _"]]) -> None:
        """Count a batch: features of the same images by every model, with the models in the order of earlier batches.

        Raises:
            ValueError: on fewer than 4 images, another number of models than before, or features that are not finite
                or do not fit together; the batch is then not counted.
        """
        if self.num_batches and len(features) != len(self._hsic):
            raise ValueError(f"features of {len(features)} models; expected {len(self._hsic)}, as in earlier batches")
        if len(self.bandwidth) not in (0, 1, len(features)):
            raise ValueError(
                f"features of {len(features)} models, but {len(self.bandwidth)} bandwidths: give as many"
            )
        estimate = _estimated(lambda double: self._products(CentredFeatures(features, 4, dtype=_dtype(double))), True)
        num_images = len(features[0])
        weight = estimate.scales.square() / (num_images - 3) ** 0.5  # N HSIC_1 = estimate / (N-3)
        hsic = estimate.values * torch.outer(weight, weight)
        self._count(hsic, estimate.rounding * weight.square(), num_images, 1)

    @torch.no_grad()
    def cka(self) -> Float64[Tensor, "P P"]:
        """Debiased CKA of the batches so far; NaN where `vitzoo_hf.metrics.cka.cka` gives NaN.

        Raises:
            ValueError: before the first batch.
        """
        if not self.num_batches:
            raise ValueError("no batch was counted yet: call update(features) first")
        return alignment(self._hsic, self._rounding)

    def merge(self, other: "MinibatchCKA") -> None:
        """Add the batches that `other` has counted, of other images by the same models.

        Raises:
            ValueError: if kernel, bandwidth or number of models differ.
        """
        self._add(other.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """The sums so far, as plain values and tensors, for `load_state_dict`."""
        return {
            "kernel": self.kernel,
            "bandwidth": list(self.bandwidth),
            "num_images": self.num_images,
            "num_batches": self.num_batches,
            "hsic": self._hsic.clone(),
            "rounding": self._rounding.clone(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state, in place of the batches counted so far.

        Raises:
            ValueError: if the state is of another kernel or bandwidth.
        """
        fresh = type(self)(kernel=self.kernel, bandwidth=self.bandwidth or None)
        fresh._add(state)
        self.__dict__.update(fresh.__dict__)

    def _add(self, state: Mapping[str, Any]) -> None:
        missing = sorted(STATE - state.keys())
        if missing:
            raise ValueError(f"state lacks {', '.join(missing)}: give what state_dict() returned")
        kernel, expected = (state["kernel"], list(state["bandwidth"])), (self.kernel, list(self.bandwidth))
        if kernel != expected:
            raise ValueError(f"state of kernel and bandwidth {kernel}; expected {expected}: make both alike")
        hsic, noise = state["hsic"].double(), state["rounding"].double()
        if self.num_batches and state["num_batches"] and len(hsic) != len(self._hsic):
            raise ValueError(f"state of {len(hsic)} models; expected {len(self._hsic)}, the same as here")
        if state["num_batches"]:
            self._count(hsic, noise, state["num_images"], state["num_batches"])

    def _count(
        self, hsic: Float64[Tensor, "P P"], noise: Float64[Tensor, " P"], num_images: int, num_batches: int
    ) -> None:
        if self.num_batches:
            hsic, noise = self._hsic + hsic.to(self._hsic.device), self._rounding + noise.to(self._hsic.device)
        self._hsic, self._rounding = hsic, noise
        self.num_images += num_images
        self.num_batches += num_batches

    def _products(self, centred: CentredFeatures) -> Products:
        if self.kernel == "linear":
            return linear_products(centred)
        width = torch.tensor(self.bandwidth, dtype=torch.float64, device=centred.device)
        rates = (centred.scales / width).square() / 2
        if _distances_cancel(centred, rates):
            return self._products(centred.in_float64())
        return rbf_products(centred, rates, 2 * centred.squares.mean(1))
