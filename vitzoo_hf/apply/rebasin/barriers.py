"""Measure barriers between pairs of rows, as stored and after re-basin over families of symmetries.

A pair costs one path of networks, and as many paths and alignments as there are variants.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import combinations
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from vitzoo_hf.apply.candidates import candidate_logits
from vitzoo_hf.apply.interpolation import PathScores, path_scores, positions
from vitzoo_hf.apply.intervals import percentile_interval, resampled_places
from vitzoo_hf.apply.rebasin.rebasin import (
    WAYS,
    Rebasin,
    check_same_layout,
    finite_weights,
    matching_images,
    rebasin,
    some_images,
)
from vitzoo_hf.apply.rebasin.symmetries import FAMILIES
from vitzoo_hf.format.messages import did_you_mean
from vitzoo_hf.format.row import Row
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.format.tables import records as table_records
from vitzoo_hf.models.rebuild import usable_device
from vitzoo_hf.progress import progress_bar
from vitzoo_hf.zoo import Zoo

PERMUTATIONS = ("mlp", "heads", "residual")
RUNGS = {
    "mlp": ("mlp",),
    "heads": ("mlp", "heads"),
    "permutations": PERMUTATIONS,
    **{name: FAMILIES[: number + 1] for number, name in enumerate(FAMILIES) if number > 1},
}
"""Every family with all before it, named after the last; and all permutations without maps, as in Git Re-Basin."""


def sample_pairs(
    table: pd.DataFrame, count: int | None, *, seed: int = 0, kind: str = "any"
) -> list[tuple[str, str]]:
    """Draw pairs of models of one layout and dataset.

    Args:
        table: the index of a zoo, such as `Zoo.to_pandas()`.
        count: number of pairs to draw without replacement; None for all.
        seed: seed of the draw.
        kind: `any`; `across` parents; or `within` one parent.

    Returns:
        Pairs of model ids.

    Raises:
        ZooError: for an unknown kind, a count below 1, or if there is no such pair.
    """
    if kind not in ("any", "across", "within"):
        raise ZooError(f"unknown kind of pairs {kind!r}: expected any, across or within")
    if count is not None and count < 1:
        raise ZooError(f"{count} pairs: expected at least 1")
    pairs = []
    for _, members in table.groupby(["architecture", "architecture_args", "layout", "dataset"], sort=False):
        for first, second in combinations(members[["model_id", "parent_id"]].itertuples(index=False), 2):
            same_parent = isinstance(first.parent_id, str) and first.parent_id == second.parent_id
            # a model without parent shares none, so its pairs count as across
            if kind == "any" or (kind == "within") == same_parent:
                pairs.append((first.model_id, second.model_id))
    if not pairs:
        raise ZooError(f"there are no pairs ({kind}) of models of one layout and dataset: widen the filter")
    if count is None or count >= len(pairs):
        return pairs
    drawn = np.random.default_rng(seed).choice(len(pairs), count, replace=False)
    return [pairs[position] for position in sorted(drawn)]


class Variant(NamedTuple):
    """A way to align pairs: families of symmetries, and one of `rebasin.WAYS`."""

    families: tuple[str, ...]
    by: str


LADDER = [Variant(rung, way) for rung in RUNGS.values() for way in WAYS if way != "both" or "residual" in rung]
"""Every rung by every way. Without the residual stream, the start of the descent does not matter: no `both` then."""


def pair_barriers(
    zoo: Zoo,
    pairs: Sequence[tuple[str, str]],
    variants: Sequence[Variant] = LADDER,
    *,
    points: int = 11,
    num_images: int | None = 2000,
    restarts: int = 0,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> pd.DataFrame:
    """Measure barriers of pairs of rows on test images, as stored and after each variant of re-basin.

    Activations are matched on selection images.

    Args:
        zoo: has the rows and the images.
        pairs: pairs of model ids of one layout and dataset; the second model is aligned to the first.
        variants: ways to align, measured in addition to the rows as stored.
        points: number of points along the straight path, both ends included.
        num_images: largest number of test images, drawn by the seed; None for all.
        restarts: number of further descents by weights from random starts.
        seed: seed of images, order and starts.
        device: where models run.
        progress: show a bar.

    Returns:
        One row a pair and variant: `families` joined by "+" and `by`, both "none" for rows as stored; barrier,
        accuracy_barrier, midpoint_loss, midpoint_accuracy, mode_connectivity; `distance` of weights, and
        `distance_unaligned`, before alignment but in the form that is aligned (see `Rebasin`);
        `logit_change`, the largest change of a logit of the aligned row, by rounding alone, and `logit_scale`, the
        largest logit of the row.

    Raises:
        ZooError: for no pair, an unknown id, a pair of rows of two layouts or datasets, too few points or images, a
            device that this machine lacks, or a zoo without images.
    """
    # before the first alignment: a late error would lose all measured pairs
    check_pairs(zoo, pairs)
    positions(points)
    usable_device(device)
    matched = any(variant.by != "weights" for variant in variants)
    align = partial(rebasin, restarts=restarts, seed=seed, device=device)
    records: list[dict[str, str | float]] = []
    images_of: dict[str, tuple[Tensor, Tensor, Tensor | None]] = {}
    with progress_bar("re-basin", "pair", shown=progress, total=len(pairs)) as bar:
        for first, second in pairs:
            rows = (zoo.row(first), zoo.row(second))
            dataset = str(rows[0]["dataset"])
            # images and their draw are equal for all pairs of a dataset, so barriers are comparable
            if dataset not in images_of:
                test = some_images(*zoo.probes(dataset), num_images, seed)
                images_of[dataset] = (*test, matching_images(zoo, dataset, seed) if matched else None)
            lines = _barriers_of(*rows, variants, images_of[dataset], points, align, device)
            records += [{"model_a": first, "model_b": second, "dataset": dataset, **line} for line in lines]
            bar.update(1)
    return pd.DataFrame(records)


def check_pairs(zoo: Zoo, pairs: Sequence[tuple[str, str]]) -> None:
    """Refuse pairs without a measurable barrier, before anything is computed.

    Raises:
        ZooError: for no pair, an unknown id, or rows of a pair of several architectures, heads or datasets.
    """
    if not pairs:
        raise ZooError("there is no pair to measure: give at least one")
    rows = {row["model_id"]: row for row in table_records(zoo.to_pandas())}
    for first, second in pairs:
        for model_id in (first, second):
            if model_id not in rows:
                raise ZooError(f"{zoo.name} has no model {model_id!r}: {did_you_mean(model_id, zoo.model_ids)}")
        check_same_layout(rows[first], rows[second])
        if rows[first]["dataset"] != rows[second]["dataset"]:
            raise ZooError(
                f"{first} was trained on {rows[first]['dataset']}, {second} on {rows[second]['dataset']}: a barrier"
                " needs one data set"
            )


def _barriers_of(
    one: Row,
    other: Row,
    variants: Sequence[Variant],
    image_sets: tuple[Tensor, Tensor, Tensor | None],
    points: int,
    align: Callable[..., Rebasin],
    device: str | torch.device,
) -> Iterator[dict[str, str | float]]:
    """Measures of one pair, as stored and by every variant."""
    images, labels, matching = image_sets
    first, second = (finite_weights(row) for row in (one, other))
    path = path_scores(first, second, one, images, labels, points=points, device=device)
    # float64: weights of related models differ in their last digits
    apart = float((first.double() - second.double()).norm())
    plain = {"distance": apart, "distance_unaligned": apart, "logit_change": 0.0}
    logits = candidate_logits(second[None], one, images, device=device)
    scale = float(logits.abs().max())
    yield {"families": "none", "by": "none", **path_record(path), **plain, "logit_scale": scale}
    for families, by in variants:
        result = align(one, other, families=families, by=by, images=matching)
        path = path_scores(result.target, result.aligned, one, images, labels, points=points, device=device)
        changed = candidate_logits(result.aligned[None], one, images, device=device)
        measured = {"distance": result.distance, "distance_unaligned": result.distance_unaligned}
        measured |= {"logit_change": float((changed - logits).abs().max())}
        yield {"families": "+".join(families), "by": by, **path_record(path), **measured, "logit_scale": scale}


def summary(table: pd.DataFrame, *, seed: int = 0, resamples: int = 2000) -> pd.DataFrame:
    """Medians over the pairs of `pair_barriers` for each variant, with bootstrap intervals of 95 %.

    Pairs that share a model are not independent, so intervals of few models are too narrow.

    Args:
        table: result of `pair_barriers`.
        seed: seed of the resampling of pairs, which is the same for every variant.
        resamples: how many times pairs are resampled.

    Returns:
        One row a variant: the median of every measure, `barrier_low` and `barrier_high`; `change`, the median over
        pairs of the barrier minus the barrier of the pair as stored, with `change_low` and `change_high`; `lower`,
        the share of pairs whose barrier fell.
    """
    # pairs of every variant are aligned to these, so that differences are paired
    stored = table[table["families"] == "none"].set_index(["model_a", "model_b"])["barrier"]
    places = resampled_places(len(stored), resamples, seed)
    records = []
    for (families, by), group in table.groupby(["families", "by"], sort=False):
        barriers = group.set_index(["model_a", "model_b"])["barrier"].loc[stored.index]
        change = barriers - stored
        record = {"families": families, "by": by, "pairs": len(barriers)}
        for name, values in (("barrier", barriers), ("change", change)):
            # the median of every resample of pairs: one diverged pair would rule a mean
            low, high = percentile_interval(np.median(values.to_numpy()[places], axis=1), tail=0.025)
            record |= {name: float(values.median()), f"{name}_low": low, f"{name}_high": high}
        record |= {"lower": float((change < 0).mean())}
        names = ("accuracy_barrier", "midpoint_loss", "midpoint_accuracy", "mode_connectivity", "distance")
        records.append(record | {name: float(group[name].median()) for name in names})
    return pd.DataFrame(records)


def path_record(path: PathScores) -> dict[str, float]:
    """Measures of a path by name."""
    return {
        "barrier": path.barrier,
        "accuracy_barrier": path.accuracy_barrier,
        "midpoint_loss": float(path.loss[path.midpoint]),
        "midpoint_accuracy": float(path.accuracy[path.midpoint]),
        "mode_connectivity": path.connectivity,
    }
