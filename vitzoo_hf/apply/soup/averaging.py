"""Soups: weighted means of the weights of models that share a layout ("Model soups", Wortsman et al. 2022).

Every parameter is averaged: weights, biases, class token, position embedding, head. Rows are read one at a time and
added up in float64, which is rounded once, so that memory is a few vectors however many ingredients there are.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from vitzoo_hf.apply.candidates import Scores, candidate_scores
from vitzoo_hf.evaluation.evaluate import is_classifier
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.format.tables import records
from vitzoo_hf.models.rebuild import usable_device
from vitzoo_hf.zoo import Zoo

ONE_OF_EACH = ("architecture", "head", "head_hidden", "dataset", "layout")
"""Columns that all ingredients must share: what the numbers in a vector mean."""


@dataclass(frozen=True, eq=False)
class Soup:
    """Averaged weights, and what they were made from.

    Attributes:
        weights: float32 `[D]` in the layout of the ingredients.
        coefficients: ingredient -> its share; they sum to 1, but for unconstrained ones.
        method: `uniform`, `greedy`, `learned`, `unconstrained`, or the name of an average of epochs.
        selection_accuracy: of the soup on all selection images; None where none were used.
        num_selection_images: on which ingredients or coefficients were chosen; 0 if nothing was chosen.
        details: settings of the method, for the provenance.
    """

    weights: Float[Tensor, " D"]
    coefficients: dict[str, float]
    method: str
    selection_accuracy: float | None = None
    num_selection_images: int = 0
    details: Mapping[str, Any] | None = None

    @property
    def ingredients(self) -> list[str]:
        """Ids of the rows in the soup."""
        return list(self.coefficients)


def check_ingredients(zoo: Zoo, *, classify: bool = True) -> None:
    """Refuse rows whose weights have no mean that means anything.

    Args:
        zoo: the ingredients.
        classify: also refuse models whose head gives no classes.

    Raises:
        ZooError: for fewer than two rows; more than one architecture, head, dataset or layout; contrastive models.
    """
    index = zoo.to_pandas()
    if len(index) < 2:
        held = f"there is one, {zoo.model_ids[0]}" if len(index) else "the filter matches none"
        raise ZooError(f"a soup needs at least two models, and {held}: widen --where, or group by fewer columns")
    for column in ONE_OF_EACH:
        values = sorted(set(index[column].map(str)))
        if len(values) > 1:
            raise ZooError(
                f"a soup needs models of one {column}, and these {len(index)} have {', '.join(values[:4])}:"
                f" narrow them down with --where {column}=…, or group by it with --by"
            )
    others = [row["model_id"] for row in records(index) if not is_classifier(row, zoo.manifest)] if classify else []
    if others:
        raise ZooError(
            f"{len(others)} of {len(index)} models have no classifier, {others[0]} the first (a contrastive head is a"
            " projection): there is no accuracy to measure a soup by; leave them out with --where stage=finetune"
        )


def weights_on(row: Mapping[str, Any], device: torch.device) -> Float[Tensor, " D"]:
    """The vector of a row of `Zoo.rows()` on a device.

    Raises:
        ZooError: if a weight is not finite, naming the row.
    """
    vector = torch.from_numpy(row["weights"])
    bad = int((~vector.isfinite()).sum())
    if bad:
        raise ZooError(f"{row['model_id']} has {bad} weights that are not finite: leave it out with --where")
    return vector.to(device)


def weighted_sums(
    zoo: Zoo,
    coefficients: Mapping[str, Sequence[float]],
    *,
    divisor: float = 1.0,
    device: str | torch.device = "cpu",
) -> Float[Tensor, "M D"]:
    """M sums `sum_i c_mi theta_i / divisor` of the same rows in one pass; float64, rounded once to float32.

    Args:
        zoo: holds the rows; those without coefficients are not read.
        coefficients: model_id -> its M coefficients.
        divisor: of the sums: a mean of ones divided at the end does not depend on the order of the rows.
        device: where sums are taken.

    Raises:
        ZooError: for an unknown row, unequal numbers of coefficients, rows of several layouts, or a weight that is
            not finite.
    """
    unknown = coefficients.keys() - set(zoo.model_ids)
    if unknown:
        raise ZooError(f"{zoo.name} has no model {min(unknown)!r} to average")
    counts = {len(shares) for shares in coefficients.values()}
    if len(counts) > 1:
        raise ZooError(f"models have {min(counts)} to {max(counts)} coefficients: give each as many, one a sum")
    place, totals = usable_device(device), torch.empty(0)
    for row in zoo.filter(model_id=list(coefficients)).rows():
        vector, shares = weights_on(row, place), coefficients[row["model_id"]]
        if not len(totals):
            totals = torch.zeros(len(shares), len(vector), dtype=torch.float64, device=place)
        if totals.shape != (len(shares), len(vector)):
            raise ZooError(
                f"{row['model_id']} has {len(vector)} weights and others {totals.shape[1]}: no soup of both"
            )
        for total, share in zip(totals, shares, strict=True):
            total.add_(vector, alpha=share)
    return totals.div_(divisor).float()


def uniform_soup(zoo: Zoo, *, device: str | torch.device = "cpu") -> Soup:
    """The mean of all rows.

    Example:
        >>> soup = uniform_soup(Zoo.sample().filter(stage="finetune", head="linear"))
        >>> len(soup.ingredients), tuple(soup.weights.shape)
        (3, (26922,))

    Raises:
        ZooError: as `check_ingredients` and `weighted_sums`; contrastive models may be averaged.
    """
    check_ingredients(zoo, classify=False)
    ones = {model_id: [1.0] for model_id in zoo.model_ids}
    mean = weighted_sums(zoo, ones, divisor=float(len(zoo)), device=device)
    return Soup(mean[0], dict.fromkeys(zoo.model_ids, 1 / len(zoo)), "uniform")


def greedy_soup(
    zoo: Zoo,
    images: Float[Tensor, "N C H W"],
    labels: Int64[Tensor, " N"],
    *,
    accuracies: Mapping[str, float] | None = None,
    device: str | torch.device = "cpu",
) -> Soup:
    """Recipe 1 of Wortsman et al. 2022: models in order of accuracy, each kept where the mean does not get worse.

    A model is added if the accuracy of the mean with it is greater than or equal to that without it, as in the paper.
    So on these images the soup is never below the best single model; report it on others.

    Args:
        zoo: the candidates.
        images: selection images, normalised as the models are fed them.
        labels: of `images`.
        accuracies: of every candidate on these images, where they are known; else they are measured. Models of equal
            accuracy are taken in the order of the zoo.
        device: where models run.

    Raises:
        ZooError: as `check_ingredients`; for a weight that is not finite, or a candidate without an accuracy.

    Example:
        >>> zoo = Zoo.sample().filter(stage="finetune", head="linear")
        >>> soup = greedy_soup(zoo, *zoo.probes("digits", "selection"))
        >>> soup.selection_accuracy >= max(soup.details["accuracies"].values())
        True
    """
    check_ingredients(zoo)
    place = usable_device(device)
    if accuracies is None:
        accuracies = single_accuracies(zoo, images, labels, device=place)
    missing = [model_id for model_id in zoo.model_ids if model_id not in accuracies]
    if missing:
        raise ZooError(
            f"{len(missing)} of {len(zoo)} candidates have no accuracy, {missing[0]} the first: give that of every"
            " candidate, or leave `accuracies` out to have them measured"
        )
    order = sorted(zoo.model_ids, key=lambda model_id: -accuracies[model_id])
    first = zoo.row(order[0])
    total = weights_on(first, place).double()
    chosen, best = order[:1], accuracies[order[0]]
    for model_id in order[1:]:
        trial = total + weights_on(zoo.row(model_id), place)
        mean = (trial / (len(chosen) + 1)).float()
        reached = float(_scores(mean, first, images, labels, place).accuracy)
        if reached >= best:
            total, best = trial, reached
            chosen.append(model_id)
    weights = (total / len(chosen)).float()
    shares = dict.fromkeys(chosen, 1 / len(chosen))
    details = {"rule": "kept if selection accuracy >= before", "accuracies": {key: accuracies[key] for key in order}}
    return Soup(weights, shares, "greedy", best, len(labels), details)


def single_accuracies(
    zoo: Zoo,
    images: Float[Tensor, "N C H W"],
    labels: Int64[Tensor, " N"],
    *,
    device: str | torch.device = "cpu",
) -> dict[str, float]:
    """Model -> its accuracy on these images, one model at a time."""
    place = usable_device(device)
    return {
        row["model_id"]: float(_scores(weights_on(row, place), row, images, labels, place).accuracy)
        for row in zoo.rows()
    }


def _scores(
    vector: Float[Tensor, " D"], like: Mapping[str, Any], images: Tensor, labels: Tensor, device: torch.device
) -> Scores:
    return candidate_scores(vector[None], like, images, labels, device=device)
