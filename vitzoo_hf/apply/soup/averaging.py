"""Soups: weighted means of the weights of models that share a layout ("Model soups", Wortsman et al. 2022).

Every parameter is averaged: weights, biases, class token, position embedding, head. Rows are read one at a time and
summed in float64, which is rounded once. Memory is a few vectors, whatever the number of ingredients.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from vitzoo_hf.apply.candidates import Scores, candidate_scores
from vitzoo_hf.evaluation.evaluate import is_classifier
from vitzoo_hf.format.row import Row
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.format.tables import records
from vitzoo_hf.models.rebuild import usable_device
from vitzoo_hf.zoo import Zoo

ONE_OF_EACH = ("architecture", "head", "head_hidden", "dataset", "layout")
"""Columns in which all ingredients must agree, because they decide what the numbers in a vector mean."""


@dataclass(frozen=True, eq=False)
class Soup:
    """Averaged weights with their ingredients.

    Attributes:
        weights: the average, float32 `[D]` in the layout of the ingredients.
        coefficients: ingredient -> its share; shares sum to 1 unless the method is `unconstrained`.
        method: `uniform`, `greedy`, `learned`, `unconstrained`, or the name of an average of epochs.
        selection_accuracy: accuracy of the soup on all selection images; None for a method that uses none.
        num_selection_images: number of images that selected ingredients or coefficients; 0 for none.
        details: settings of the method, for the provenance.
    """

    weights: Float[Tensor, " D"]
    coefficients: dict[str, float]
    method: str
    selection_accuracy: float | None = None
    num_selection_images: int = 0
    details: Mapping[str, object] | None = None

    @property
    def ingredients(self) -> list[str]:
        """Ids of the rows in the soup."""
        return list(self.coefficients)


def check_ingredients(zoo: Zoo, *, classify: bool = True) -> None:
    """Refuse rows whose weights have no meaningful mean.

    Args:
        zoo: the ingredients.
        classify: also refuse models whose head gives no classes.

    Raises:
        ZooError: for fewer than two rows, several architectures, heads, datasets or layouts, or contrastive models.
    """
    index = zoo.to_pandas()
    if len(index) < 2:
        number = f"there is one, {zoo.model_ids[0]}" if len(index) else "the filter matches none"
        raise ZooError(f"a soup needs at least two models, and {number}: widen --where, or group by fewer columns")
    for column in ONE_OF_EACH:
        values = sorted(set(index[column].map(str)))
        if len(values) > 1:
            raise ZooError(
                f"a soup needs models of one {column}, and these {len(index)} have {', '.join(values[:4])}:"
                f" narrow them down with --where {column}=…, or group by it with --by"
            )
    headless = [row["model_id"] for row in records(index) if classify and not is_classifier(row, zoo.manifest)]
    if headless:
        raise ZooError(
            f"{len(headless)} of {len(index)} models have no classifier, {headless[0]} the first (a contrastive head"
            " is a projection): there is no accuracy to measure a soup by; leave them out with --where stage=finetune"
        )


def weights_on(row: Row, device: torch.device) -> Float[Tensor, " D"]:
    """The vector of a row of `Zoo.rows()` on a device.

    Raises:
        ZooError: if a weight is not finite, naming the row.
    """
    vector = torch.from_numpy(row.weights)
    bad = int((~vector.isfinite()).sum())
    if bad:
        raise ZooError(f"{row.model_id} has {bad} weights that are not finite: leave it out with --where")
    return vector.to(device)


def weighted_sums(
    zoo: Zoo,
    coefficients: Mapping[str, Sequence[float]],
    *,
    divisor: float = 1.0,
    device: str | torch.device = "cpu",
) -> Float[Tensor, "P D"]:
    """P sums `sum_i c_pi theta_i / divisor` of some rows in one pass; float64, rounded once to float32.

    Args:
        zoo: holds the rows; rows without coefficients are not read.
        coefficients: model_id -> its P coefficients.
        divisor: number by which the sums are divided at the end.
        device: where the sums are computed.

    Raises:
        ZooError: for an unknown row, unequal numbers of coefficients, rows of several layouts, or a weight that is
            not finite.
    """
    unknown = coefficients.keys() - set(zoo.model_ids)
    if unknown:
        raise ZooError(f"{zoo.name} has no model {min(unknown)!r} to average")
    counts = {len(shares) for shares in coefficients.values()}
    if len(counts) > 1:
        raise ZooError(
            f"models have {min(counts)} to {max(counts)} coefficients: give every model the same number, one a sum"
        )
    place, totals = usable_device(device), torch.empty(0)
    for row in zoo.filter(model_id=list(coefficients)).rows():
        vector, shares = weights_on(row, place), coefficients[row.model_id]
        if not len(totals):
            # float64: a float32 sum would round at every row, by the order of the rows
            totals = torch.zeros(len(shares), len(vector), dtype=torch.float64, device=place)
        if totals.shape != (len(shares), len(vector)):
            raise ZooError(
                f"{row.model_id} has {len(vector)} weights and earlier rows {totals.shape[1]}: give one layout"
            )
        for total, share in zip(totals, shares, strict=True):
            # in place: memory is the sums and one row, whatever the number of rows
            total.add_(vector, alpha=share)
    return totals.div_(divisor).float()


def uniform_soup(zoo: Zoo, *, device: str | torch.device = "cpu") -> Soup:
    """The mean of all rows; contrastive models may be averaged too.

    Example:
        >>> soup = uniform_soup(Zoo.sample().filter(stage="finetune", head="linear"))
        >>> len(soup.ingredients), tuple(soup.weights.shape)
        (3, (26922,))

    Raises:
        ZooError: for fewer than two rows, rows that differ in architecture, head, dataset or layout, or a weight that
            is not finite.
    """
    check_ingredients(zoo, classify=False)
    # Ones, divided at the end: sums of 1 / P would depend on the order of the rows.
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
    """Add models in order of accuracy, as long as the mean does not get worse (Wortsman et al. 2022, recipe 1).

    A model is added if the accuracy of the mean with it is at least the accuracy without it. On these images the soup
    is therefore never below the best single model: report it on other images.

    Args:
        zoo: the candidates.
        images: selection images, normalised, ready for the models.
        labels: one class an image.
        accuracies: candidate -> its accuracy on these images; measured if not given. Candidates of equal accuracy
            keep the order of the zoo.
        device: where models run.

    Raises:
        ZooError: if `check_ingredients` refuses the candidates, a weight is not finite, or a candidate has no
            accuracy.

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
    unmeasured = [model_id for model_id in zoo.model_ids if model_id not in accuracies]
    if unmeasured:
        raise ZooError(
            f"{len(unmeasured)} of {len(zoo)} candidates have no accuracy, {unmeasured[0]} the first: give one for"
            " every candidate, or leave `accuracies` out to have them measured"
        )
    # sorted is stable: models of equal accuracy keep the order of the zoo
    order = sorted(zoo.model_ids, key=lambda model_id: -accuracies[model_id])
    first = zoo.row(order[0])
    total = weights_on(first, place).double()
    ingredients, best = order[:1], accuracies[order[0]]
    for model_id in order[1:]:
        # a sum, so that adding a model does not rescale a rounded mean
        trial = total + weights_on(zoo.row(model_id), place)
        # measured after rounding, because the soup is stored as float32
        mean = (trial / (len(ingredients) + 1)).float()
        accuracy = float(_scores(mean, first, images, labels, place).accuracy)
        if accuracy >= best:  # equality adds a model, as in the paper: a larger soup at no loss
            total, best = trial, accuracy
            ingredients.append(model_id)
    weights = (total / len(ingredients)).float()
    shares = dict.fromkeys(ingredients, 1 / len(ingredients))
    details = {"rule": "kept if selection accuracy >= before", "accuracies": {key: accuracies[key] for key in order}}
    return Soup(weights, shares, "greedy", best, len(labels), details)


def single_accuracies(
    zoo: Zoo,
    images: Float[Tensor, "N C H W"],
    labels: Int64[Tensor, " N"],
    *,
    device: str | torch.device = "cpu",
) -> dict[str, float]:
    """Model -> its accuracy on some images; models run one at a time."""
    place = usable_device(device)
    return {
        row.model_id: float(_scores(weights_on(row, place), row, images, labels, place).accuracy)
        for row in zoo.rows()
    }


def _scores(vector: Float[Tensor, " D"], like: Row, images: Tensor, labels: Tensor, device: torch.device) -> Scores:
    return candidate_scores(vector[None], like, images, labels, device=device)
