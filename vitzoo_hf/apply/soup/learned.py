"""Learned soups: one coefficient a model, fitted by Adam on selection images with early stopping.

The weights of all ingredients are never in memory together. A step reads their columns twice: to mix them, and to
turn the gradient by the mixture into the gradient by the coefficients, `dL/dc_i = <dL/dtheta, theta_i>`.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from vitzoo_hf.apply.candidates import candidate_scores
from vitzoo_hf.apply.soup.averaging import Soup, check_ingredients, weights_on
from vitzoo_hf.format.layout import Layout, unflatten
from vitzoo_hf.format.row import Row
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.models.rebuild import reconstruct, usable_device
from vitzoo_hf.zoo import Zoo
from vitzoo_hf.zoo.weight_columns import WeightColumns


def learned_soup(
    zoo: Zoo,
    images: Float[Tensor, "N C H W"],
    labels: Int64[Tensor, " N"],
    *,
    convex: bool = True,
    start: Mapping[str, float] | None = None,
    epochs: int = 20,
    lr: float = 0.02,
    batch_size: int = 128,
    kept: float = 0.5,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> Soup:
    """Fit coefficients that minimise the cross-entropy of the mixture (the learned soup of Wortsman et al. 2022).

    Adam fits on half of the images; the other half selects the epoch, or the start, of the lowest cross-entropy.

    Args:
        zoo: the ingredients.
        images: selection images, normalised, ready for the models.
        labels: one class an image.
        convex: project the coefficients onto the simplex after each step (Duchi et al. 2008). False leaves them free
            to be negative and to sum to any number, and the soup is called `unconstrained`.
        start: model -> first coefficient, such as that of a greedy soup; by default all are equal.
        epochs: number of passes over the images that fit.
        lr: learning rate of Adam; a coefficient moves by about `lr` a step.
        batch_size: images a step.
        kept: share of the images that select the epoch.
        seed: seed of the division of the images, and of their order.
        device: where the mixture is made and runs.

    Raises:
        ZooError: if `check_ingredients` refuses the rows; for infinite weights, too few images or invalid settings.

    Example:
        >>> zoo = Zoo.sample().filter(stage="finetune", head="linear")
        >>> soup = learned_soup(zoo, *zoo.probes("digits", "selection"), epochs=1)
        >>> round(sum(soup.coefficients.values()), 6)
        1.0
    """
    check_ingredients(zoo)
    _check_settings(epochs, batch_size, lr, kept)
    generator = torch.Generator().manual_seed(seed)
    judging, fitting = _parted(len(labels), kept, generator)  # drawn first: independent of the number of epochs
    mixture = _Mixture(zoo, usable_device(device))
    coefficients = _start(mixture.columns.model_ids, start).to(mixture.columns.device).requires_grad_()
    adam = torch.optim.Adam([coefficients], lr=lr)
    best, best_epoch = mixture.loss(coefficients, images[judging], labels[judging]), 0
    best_coefficients = coefficients.detach().clone()
    for epoch in range(1, epochs + 1):
        for batch in fitting[torch.randperm(len(fitting), generator=generator)].split(batch_size):
            coefficients.grad = mixture.gradient(coefficients, images[batch], labels[batch])
            adam.step()
            coefficients.data = onto_simplex(coefficients.data) if convex else coefficients.data
        loss = mixture.loss(coefficients, images[judging], labels[judging])
        if loss < best:
            best, best_coefficients, best_epoch = loss, coefficients.detach().clone(), epoch
    details = {"convex": convex, "epochs": epochs, "best_epoch": best_epoch, "lr": lr, "batch_size": batch_size}
    sizes = {"images_to_fit": len(fitting), "images_to_choose": len(judging)}
    return mixture.soup(best_coefficients, images, labels, details | sizes | {"seed": seed})


def _check_settings(epochs: int, batch_size: int, lr: float, kept: float) -> None:
    if epochs < 1 or batch_size < 1 or not lr > 0 or not 0 < kept < 1:
        raise ZooError(
            f"epochs={epochs}, batch_size={batch_size}, lr={lr}, kept={kept}; expected at least 1 epoch and image a"
            " step, a positive lr, and a share of images between 0 and 1"
        )


def onto_simplex(values: Float64[Tensor, " P"]) -> Float64[Tensor, " P"]:
    """The nearest point that is non-negative and sums to 1 (Duchi et al. 2008, Figure 1).

    Example:
        >>> onto_simplex(torch.tensor([1.5, 0.5]).double())
        tensor([1., 0.], dtype=torch.float64)
    """
    falling = values.sort(descending=True).values
    excess = (falling.cumsum(0) - 1) / torch.arange(1, len(values) + 1, device=values.device)
    last = int((falling > excess).sum()) - 1
    return (values - excess[last]).clamp(min=0)


def _parted(count: int, kept: float, generator: torch.Generator) -> tuple[Int64[Tensor, " J"], Int64[Tensor, " F"]]:
    """Positions of the images that select the epoch, and of those that fit the coefficients."""
    # two parts, because images that fit the coefficients cannot show when the coefficients overfit them
    order = torch.randperm(count, generator=generator)
    judging, fitting = order[: int(kept * count)], order[int(kept * count) :]
    if not len(judging) or not len(fitting):
        raise ZooError(f"{count} selection images cannot be divided into two parts: give at least 2")
    return judging, fitting


def _start(model_ids: list[str], start: Mapping[str, float] | None) -> Float64[Tensor, " P"]:
    if start is None:
        return torch.full((len(model_ids),), 1 / len(model_ids), dtype=torch.float64)
    unknown = start.keys() - set(model_ids)
    if unknown:
        raise ZooError(
            f"start names {min(unknown)!r}, which is none of the {len(model_ids)} ingredients: name ingredients alone"
        )
    return torch.tensor([start.get(model_id, 0.0) for model_id in model_ids], dtype=torch.float64)


class _Mixture:
    """The network whose weights are `sum_i c_i theta_i`."""

    def __init__(self, zoo: Zoo, device: torch.device) -> None:
        for row in zoo.rows():
            weights_on(row, torch.device("cpu"))  # columns are read without hashes: every row is checked here
            self.like: Row = row
        self.columns: WeightColumns = zoo.weight_columns(device=device)
        self.layout: Layout = self.columns.layout
        self.model: nn.Module = reconstruct(self.like, device=device, copy=True)

    def weights(self, coefficients: Float64[Tensor, " P"]) -> Float[Tensor, " D"]:
        """The mixture, summed in float64 and rounded once."""
        # every entry is written below, as blocks cover all columns
        mixed = torch.empty(self.layout.num_parameters, device=self.columns.device)
        for columns, block in self.columns:
            mixed[columns] = (coefficients.detach() @ block.double()).float()
        return mixed

    def loss(self, coefficients: Float64[Tensor, " P"], images: Tensor, labels: Tensor) -> float:
        """Mean cross-entropy on images, in nats."""
        weights = self.weights(coefficients)[None]
        return float(candidate_scores(weights, self.like, images, labels, device=self.columns.device).loss)

    def soup(
        self, coefficients: Float64[Tensor, " P"], images: Tensor, labels: Tensor, details: Mapping[str, object]
    ) -> Soup:
        """The mixture as a soup, with its accuracy on all selection images."""
        weights = self.weights(coefficients)
        accuracy = candidate_scores(weights[None], self.like, images, labels, device=self.columns.device).accuracy
        shares = dict(zip(self.columns.model_ids, coefficients.tolist(), strict=True))
        method = "learned" if details["convex"] else "unconstrained"
        return Soup(weights, shares, method, float(accuracy), len(labels), details)

    def gradient(self, coefficients: Float64[Tensor, " P"], images: Tensor, labels: Tensor) -> Float64[Tensor, " P"]:
        """Gradient of the mean cross-entropy on images by the coefficients."""
        device = self.columns.device
        # the mixture is the leaf: autograd need not hold the weights of all ingredients
        weights = self.weights(coefficients).requires_grad_()
        logits = torch.func.functional_call(self.model, unflatten(weights, self.layout), (images.to(device),))
        (slope,) = torch.autograd.grad(cross_entropy(logits, labels.to(device)), weights)
        gradient = torch.zeros_like(coefficients)
        for columns, block in self.columns:
            # the chain rule, block by block: dL/dc_i = <dL/dtheta, theta_i>
            gradient += block.double() @ slope[columns].double()
        return gradient.detach()
