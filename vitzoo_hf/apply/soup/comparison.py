"""Compare soups of groups of models with baselines on test images, which select nothing.

Baselines of each group: the best single model by selection images; the best by test images (an oracle, which nobody
could have selected); the mean accuracy of the ingredients; ensembles of the ingredients. Every model runs once on
selection and test images, or not at all where the cache has its outputs; a soup adds one run, a learned one its fit.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vitzoo_hf.apply.candidates import candidate_logits
from vitzoo_hf.apply.intervals import paired_difference
from vitzoo_hf.apply.soup.averaging import Soup, check_ingredients, greedy_soup, uniform_soup
from vitzoo_hf.apply.soup.learned import learned_soup
from vitzoo_hf.evaluation.outputs import run_models
from vitzoo_hf.evaluation.outputs_cache import ImageBatch, OutputsCache
from vitzoo_hf.format.messages import did_you_mean
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.format.tables import records
from vitzoo_hf.metrics.behavior import accuracy, cross_entropy, predictions
from vitzoo_hf.progress import progress_bar
from vitzoo_hf.zoo import Zoo

METHODS = ("uniform", "greedy", "learned", "unconstrained")
ROLES = ("selection", "test")


@dataclass(frozen=True, eq=False)
class MeasuredSoup:
    """A soup with its results on test images.

    Attributes:
        soup: the soup.
        group: column -> the value that its ingredients share, by which they were grouped.
        test_loss: cross-entropy in nats.
        test_accuracy: share of right predictions.
        num_test_images: number of test images.
    """

    soup: Soup
    group: dict[str, object]
    test_loss: float
    test_accuracy: float
    num_test_images: int


@dataclass(frozen=True, eq=False)
class Comparison:
    """The soups of every group.

    Attributes:
        table: one row a group and method; see `compare_soups`.
        soups: in the order of the table.
        left_out: group -> why it has no soup.
    """

    table: pd.DataFrame
    soups: list[MeasuredSoup]
    left_out: dict[str, str] = field(default_factory=dict)


def compare_soups(
    zoo: Zoo,
    *,
    by: Sequence[str] = ("parent_id", "head"),
    methods: Sequence[str] = METHODS[:3],
    seed: int = 0,
    device: str | torch.device = "cpu",
    cache: str | Path | None = None,
    progress: bool = True,
) -> Comparison:
    """Make soups of each group of models, and compare them with their baselines on test images.

    Args:
        zoo: the candidates, such as `zoo.filter(stage="finetune", is_final=True)`.
        by: columns; models that agree in all of them make a group. `["head"]` makes soups across parents,
            `["parent_id", "head", "factor_optimizer"]` within an optimizer.
        methods: some of `uniform`, `greedy`, `learned` and `unconstrained`; the last two start from the best
            single model.
        seed: seed of learned soups and of the bootstrap.
        device: where models run.
        cache: folder that stores the outputs of models, such as `ZOO/.evaluation` of `vitzoo evaluate`.
        progress: show bars.

    Returns:
        The table has the columns of `by`, then `method`, `candidates`, `ingredients`; `selection_accuracy` and
        `test_accuracy` of the soup; `best_single` (by selection), its `best_single_selection` and `best_single_test`;
        `oracle_test`, the best single by test; `mean_test` of the ingredients; `ensemble_test`, the accuracy of
        the mean of their probabilities, `logit_ensemble_test`, of the mean of their logits; `gain`, `gain_low`,
        `gain_high`, soup less best single, and `over_ensemble`, …, soup less ensemble, with 95 % intervals over
        resampled test images.

    Raises:
        ZooError: for an unknown column or method, a seed below 0, a group of several heads or datasets, models
            without a classifier, or a zoo without selection images; if no group has two models.

    Example:
        >>> zoo = Zoo.sample().filter(stage="finetune")
        >>> comparison = compare_soups(zoo, by=["head"], methods=["uniform", "greedy"], progress=False)
        >>> list(comparison.table["method"])
        ['uniform', 'greedy', 'uniform', 'greedy']
    """
    _check_options(methods, seed)
    groups, left_out = soup_groups(zoo, by)
    candidates = zoo.filter(model_id=[model_id for _, model_ids in groups for model_id in model_ids])
    batches = _held_out(candidates)
    rows = records(candidates.to_pandas())
    measured = []
    with OutputsCache.opened(None if cache is None else Path(cache), "float32") as stored:
        images = {row["model_id"]: set(batches[row["dataset"]].values()) for row in rows}
        # all models run before the first soup, so every group reads its outputs from the cache
        run_models(candidates, rows, images, stored, device=device, precision="float32", progress=progress)
        with progress_bar("soups", "soup", shown=progress, total=len(groups) * len(methods)) as bar:
            for group, model_ids in groups:
                members = zoo.filter(model_id=model_ids)
                outputs = _GroupOutputs(members, batches[members.index["dataset"][0]], stored)
                for method in methods:
                    soup = _soup(method, members, outputs, seed, device)
                    measured.append(_measured(soup, group, members, outputs, seed, device))
                    bar.update(1)
    return Comparison(pd.DataFrame([line for _, line in measured]), [soup for soup, _ in measured], left_out)


def _check_options(methods: Sequence[str], seed: int) -> None:
    for method in methods:
        if method not in METHODS:
            raise ZooError(f"unknown method {method!r}: {did_you_mean(method, METHODS)}")
    if seed < 0:
        raise ZooError(f"seed is {seed}; expected 0 or more")


def soup_groups(zoo: Zoo, by: Sequence[str]) -> tuple[list[tuple[dict[str, object], list[str]]], dict[str, str]]:
    """Groups of models that agree in some columns, with their model ids; and groups of one model, with the reason.

    Raises:
        ZooError: for an unknown column, a group that `check_ingredients` refuses, or if there is no group.
    """
    index = zoo.to_pandas()
    for column in by:
        if column not in index:
            raise ZooError(f"unknown column {column!r} to group by: {did_you_mean(column, list(index))}")
    groups: list[tuple[dict[str, object], list[str]]] = []
    left_out: dict[str, str] = {}
    # dropna=False: runs without a parent make a group of their own
    parts = index.groupby(list(by), sort=False, dropna=False) if by else [((), index)]
    for key, members in parts:
        values = [None if value != value else value for value in key]  # pandas has NaN for a missing value
        group = dict(zip(by, values, strict=True))
        model_ids = list(members["model_id"])
        if len(model_ids) < 2:
            left_out[group_text(group)] = f"one model only, {model_ids[0]}"
            continue
        check_ingredients(zoo.filter(model_id=model_ids))
        groups.append((group, model_ids))
    if not groups:
        reason = f"each of {len(left_out)} groups has one model only" if left_out else "the filter matches no model"
        raise ZooError(f"there is nothing to average: {reason}; widen --where, or group by fewer columns")
    return groups, left_out


def group_text(group: Mapping[str, object]) -> str:
    """A group in words.

    Example:
        >>> group_text({"head": "mlp", "factor_lr": 0.001})
        'head=mlp, factor_lr=0.001'
    """
    return ", ".join(f"{column}={value}" for column, value in group.items()) or "all"


def _held_out(zoo: Zoo) -> dict[str, dict[str, ImageBatch]]:
    """Dataset -> role -> images."""
    return {
        dataset: {role: ImageBatch.of(*zoo.probes(dataset, role)) for role in ROLES}
        for dataset in dict.fromkeys(zoo.index["dataset"])
    }


class _GroupOutputs:
    """Outputs of the models of a group on selection and test images."""

    def __init__(self, zoo: Zoo, batches: Mapping[str, ImageBatch], cache: OutputsCache) -> None:
        self.rows = {row["model_id"]: row for row in records(zoo.to_pandas())}
        self.batches, self.cache = batches, cache
        self.accuracies = {
            role: {model_id: self._accuracy(model_id, role) for model_id in self.rows} for role in ROLES
        }

    def logits(self, model_id: str, role: str) -> Float[Tensor, "N C"]:
        return self.cache.read(self.rows[model_id], self.batches[role].digest, "logits")

    def right(self, model_id: str) -> Bool[Tensor, " N"]:
        return predictions(self.logits(model_id, "test")) == self.batches["test"].labels

    def ensembles(self, model_ids: Sequence[str]) -> Iterator[Bool[Tensor, " N"]]:
        """Test images that the mean of probabilities classifies rightly, then those of the mean of logits."""
        images, classes = self.logits(model_ids[0], "test").shape
        probabilities, summed = torch.zeros(2, images, classes, dtype=torch.float64)
        for model_id in model_ids:
            logits = self.logits(model_id, "test").double()
            # model by model in float64: memory does not grow with the number of ingredients
            summed += logits
            probabilities += logits.softmax(-1)
        for mean in (probabilities, summed):
            yield predictions(mean) == self.batches["test"].labels

    def _accuracy(self, model_id: str, role: str) -> float:
        try:
            return float(accuracy(self.logits(model_id, role)[None], self.batches[role].labels))
        except ValueError as error:
            raise ZooError(f"{model_id} cannot be measured: {error}; leave it out with --where") from None


def _soup(method: str, zoo: Zoo, outputs: _GroupOutputs, seed: int, device: str | torch.device) -> Soup:
    if method == "uniform":
        return uniform_soup(zoo, device=device)
    accuracies, batch = outputs.accuracies["selection"], outputs.batches["selection"]
    if method == "greedy":
        return greedy_soup(zoo, batch.images, batch.labels, accuracies=accuracies, device=device)
    # a start at one model: early stopping then never returns a soup worse than it on judging images
    best = {max(accuracies, key=accuracies.__getitem__): 1.0}
    convex = method == "learned"
    return learned_soup(zoo, batch.images, batch.labels, convex=convex, start=best, seed=seed, device=device)


def _measured(
    soup: Soup, group: dict[str, object], zoo: Zoo, outputs: _GroupOutputs, seed: int, device: str | torch.device
) -> tuple[MeasuredSoup, dict[str, object]]:
    """The soup with its results on test images, and its row of the table."""
    like, test = next(zoo.rows()), outputs.batches["test"]
    logits = candidate_logits(soup.weights[None], like, test.images, device=device).cpu()
    right = predictions(logits[0]) == test.labels
    selection_accuracy = soup.selection_accuracy
    if selection_accuracy is None:
        batch = outputs.batches["selection"]
        selection = candidate_logits(soup.weights[None], like, batch.images, device=device).cpu()
        selection_accuracy = float(accuracy(selection, batch.labels))
    on_selection, on_test = outputs.accuracies["selection"], outputs.accuracies["test"]
    best = max(on_selection, key=on_selection.__getitem__)
    # ingredients of coefficient 0 run too: the ensemble is of all that a learned soup was given
    ensemble, logit_ensemble = outputs.ensembles(soup.ingredients)
    test_accuracy = float(right.double().mean())
    line: dict[str, object] = {**group, "method": soup.method, "candidates": len(zoo)}
    line |= {"ingredients": sum(share != 0 for share in soup.coefficients.values())}
    line |= {"selection_accuracy": selection_accuracy}
    line |= {"test_accuracy": test_accuracy, "best_single": best}
    line |= {"best_single_selection": on_selection[best], "best_single_test": on_test[best]}
    line |= {"oracle_test": max(on_test.values())}
    line |= {"mean_test": sum(on_test[model_id] for model_id in soup.ingredients) / len(soup.ingredients)}
    line |= {"ensemble_test": float(ensemble.double().mean())}
    line |= {"logit_ensemble_test": float(logit_ensemble.double().mean())}
    for name, baseline in (("gain", outputs.right(best)), ("over_ensemble", ensemble)):
        # paired: both models answer equal images, so most of the variance of the images cancels
        difference = paired_difference(right, baseline, seed=seed)
        line |= {name: difference.mean, f"{name}_low": difference.low, f"{name}_high": difference.high}
    line["test_images"] = len(right)
    loss = float(cross_entropy(logits, test.labels))
    return MeasuredSoup(soup, group, loss, test_accuracy, len(right)), line
