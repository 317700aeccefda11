"""CKA of all pairs of models from batches of images, so that features of all images never exist together."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from vitzoo_hf.centred_features import CentredFeatures
from vitzoo_hf.gram_products import Products, linear_products, rbf_products
from vitzoo_hf.hsic_estimators import alignment, estimates, rounding

STATE = {"kernel", "bandwidth", "num_images", "num_batches", "hsic", "rounding"}


class MinibatchCKA:
    """Debiased CKA of all pairs of models, image batch by image batch (Nguyen et al. 2021).

    HSIC_1 is unbiased for every batch of at least 4 images, so its sum over batches, each weighted by its images, is
    an unbiased estimate of HSIC whatever the batch size; a shorter last batch counts. The ratio of sums is close to
    the CKA of all images: of 2048 images, batches of 256 came within 0.004 (`benchmarks/cka_pairs.py`). Batches of
    n images take P N n (P + F) operations, all images together P N^2 (P + F).

    Args:
        kernel: "linear", or "rbf": `exp(-|x - y|^2 / (2 bandwidth^2))`.
        bandwidth: of "rbf", in units of the features, one for all models or one a model. It must be the same in
            every batch, so it is not taken from the data; roots of median distances of a first batch are usual.

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

    def __init__(
        self, *, kernel: Literal["linear", "rbf"] = "linear", bandwidth: float | Sequence[float] | None = None
    ) -> None:
        widths = [] if bandwidth is None else [float(width) for width in torch.tensor(bandwidth).reshape(-1)]
        if (
            kernel not in ("linear", "rbf")
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
        """Count a batch: features of the same images by every model, in the same order of models as before.

        Raises:
            ValueError: on fewer than 4 images, another number of models than before, or features that are not finite
                or do not fit together; nothing is counted then.
        """
        if self.num_batches and len(features) != len(self._hsic):
            raise ValueError(f"features of {len(features)} models; expected {len(self._hsic)}, as in earlier batches")
        if len(self.bandwidth) not in (0, 1, len(features)):
            raise ValueError(
                f"features of {len(features)} models, but {len(self.bandwidth)} bandwidths: give as many"
            )
        centred = CentredFeatures(features, 4)
        products = self._products(centred)
        weight = products.scales.square() / (centred.num_images - 3) ** 0.5  # N HSIC_1 = estimate / (N-3)
        hsic = estimates(products, debiased=True) * torch.outer(weight, weight)
        noise = rounding(products) * weight.square()
        self._count(hsic, noise, centred.num_images, 1)

    @torch.no_grad()
    def cka(self) -> Float64[Tensor, "P P"]:
        """Debiased CKA of the batches so far; NaN as in `vitzoo_hf.cka`.

        Raises:
            ValueError: before the first batch.
        """
        if not self.num_batches:
            raise ValueError("no batch was counted yet: call update(features) first")
        return alignment(self._hsic, self._rounding)

    def merge(self, other: "MinibatchCKA") -> None:
        """Count what another one has counted, of other images by the same models.

        Raises:
            ValueError: if kernel, bandwidth or number of models differ.
        """
        self._add(other.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` continues from; plain values and tensors."""
        return {
            "kernel": self.kernel,
            "bandwidth": list(self.bandwidth),
            "num_images": self.num_images,
            "num_batches": self.num_batches,
            "hsic": self._hsic.clone(),
            "rounding": self._rounding.clone(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state; what was counted here is forgotten.

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
        given, expected = (state["kernel"], list(state["bandwidth"])), (self.kernel, list(self.bandwidth))
        if given != expected:
            raise ValueError(f"state of kernel and bandwidth {given}; expected {expected}: make both alike")
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
        return rbf_products(centred, rates, 2 * centred.squares.mean(1))
