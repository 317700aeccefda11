"""Barriers between pairs of rows, as they are stored and after re-basin over each family of symmetries."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from vitzoo_hf.apply.candidates import candidate_logits
from vitzoo_hf.apply.interpolation import PathScores, path_scores, positions
from vitzoo_hf.apply.rebasin.rebasin import (
    WAYS,
    check_same_layout,
    finite_weights,
    matching_images,
    rebasin,
    some_images,
)
from vitzoo_hf.apply.rebasin.symmetries import FAMILIES
from vitzoo_hf.format.messages import did_you_mean
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
"""Each family with all before it, by the name of the last; and all permutations without maps, as in Git Re-Basin."""


def sample_pairs(
    table: pd.DataFrame, count: int | None, *, seed: int = 0, kind: str = "any"
) -> list[tuple[str, str]]:
    """Pairs of models of one layout and one dataset, as ids.

    Args:
        table: of a zoo's index.
        count: pairs to draw without replacement; None for all.
        seed: of the draw.
        kind: `any`; `across` parents; or `within` one parent.

    Raises:
        ZooError: for an unknown kind, fewer than 1 pair, or if there is no such pair.
    """
    if kind not in ("any", "across", "within"):
        raise ZooError(f"unknown kind of pairs {kind!r}: expected any, across or within")
    if count is not None and count < 1:
        raise ZooError(f"{count} pairs: expected at least 1")
    pairs = []
    for _, members in table.groupby(["architecture", "architecture_args", "layout", "dataset"], sort=False):
        for first, second in combinations(members[["model_id", "parent_id"]].itertuples(index=False), 2):
            within = isinstance(first.parent_id, str) and first.parent_id == second.parent_id
            if kind == "any" or (kind == "within") == within:
                pairs.append((first.model_id, second.model_id))
    if not pairs:
        raise ZooError(f"there are no pairs ({kind}) of models of one layout and dataset: widen the filter")
    if count is None or count >= len(pairs):
        return pairs
    chosen = np.random.default_rng(seed).choice(len(pairs), count, replace=False)
    return [pairs[position] for position in sorted(chosen)]


class Variant(NamedTuple):
    """A way to align pairs: families of symmetries, and one of `rebasin.WAYS`."""

    families: tuple[str, ...]
    by: str


LADDER = [Variant(rung, way) for rung in RUNGS.values() for way in WAYS if way != "both" or "residual" in rung]
"""Every rung by every way; without the residual stream, where descent begins makes no difference."""


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
    """Barriers of pairs of rows on test images, as stored and after each variant of re-basin.

    Activations are matched on selection images, barriers measured on test images.

    Args:
        zoo: has the rows and the images.
        pairs: of model ids, each of one layout and dataset; the second is aligned to the first.
        variants: to measure beside the rows as they are stored.
        points: along the straight path, both ends among them.
        num_images: test images at most, drawn by the seed; None for all.
        restarts: further descents by weights from random starts.
        seed: of images, order and starts.
        device: where models run.
        progress: show a bar.

    Returns:
        One row a pair and variant: `families` joined by "+" and `by`, both "none" for rows as stored; barrier,
        accuracy_barrier, midpoint_loss, midpoint_accuracy, mode_connectivity; `distance` of weights, and
        `distance_unaligned`, before alignment but in the form that is aligned (see `Rebasin`);
        `logit_change`, the largest change of a logit of the aligned row, by rounding alone, and `logit_scale`, its
        largest logit.

    Raises:
        ZooError: for no pair, an unknown id, rows of a pair that do not fit each other, too few points or images, a
            device that is not here, or a zoo that lacks images.
    """
    check_pairs(zoo, pairs)
    positions(points)
    usable_device(device)
    matched = any(variant.by != "weights" for variant in variants)
    records: list[dict[str, Any]] = []
    held: dict[str, tuple[Tensor, Tensor, Tensor | None]] = {}
    with progress_bar("re-basin", "pair", shown=progress, total=len(pairs)) as bar:
        for first, second in pairs:
            rows = (zoo.row(first), zoo.row(second))
            dataset = str(rows[0]["dataset"])
            if dataset not in held:
                test = some_images(*zoo.probes(dataset), num_images, seed)
                held[dataset] = (*test, matching_images(zoo, dataset, seed) if matched else None)
            options = {"restarts": restarts, "seed": seed, "device": device}
            images, labels, matching = held[dataset]
            found = _barriers_of(*rows, variants, images, labels, matching, points, options)
            records += [{"model_a": first, "model_b": second, "dataset": dataset, **record} for record in found]
            bar.update(1)
    return pd.DataFrame(records)


def check_pairs(zoo: Zoo, pairs: Sequence[tuple[str, str]]) -> None:
    """Refuse pairs that no barrier can be measured between, before anything is computed.

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
    one: Mapping[str, Any],
    other: Mapping[str, Any],
    variants: Sequence[Variant],
    images: Tensor,
    labels: Tensor,
    matching: Tensor | None,
    points: int,
    options: Mapping[str, Any],
) -> Iterator[dict[str, Any]]:
    """Measures of one pair, as stored and by every variant."""
    device = options["device"]
    first, second = (finite_weights(row) for row in (one, other))
    path = path_scores(first, second, one, images, labels, points=points, device=device)
    apart = float((first.double() - second.double()).norm())
    plain = {"distance": apart, "distance_unaligned": apart, "logit_change": 0.0}
    logits = candidate_logits(second[None], one, images, device=device)
    scale = float(logits.abs().max())
    yield {"families": "none", "by": "none", **path_record(path), **plain, "logit_scale": scale}
    for families, by in variants:
        found = rebasin(one, other, families=families, by=by, images=matching, **options)
        path = path_scores(found.target, found.aligned, one, images, labels, points=points, device=device)
        changed = candidate_logits(found.aligned[None], one, images, device=device)
        measured = {"distance": found.distance, "distance_unaligned": found.distance_unaligned}
        measured |= {"logit_change": float((changed - logits).abs().max())}
        yield {"families": "+".join(families), "by": by, **path_record(path), **measured, "logit_scale": scale}


def summary(table: pd.DataFrame, *, seed: int = 0, resamples: int = 2000) -> pd.DataFrame:
    """Medians over pairs of the table of `pair_barriers`, for each variant, with bootstrap intervals of 95 %.

    Pairs that share a model are not independent, so that intervals are too narrow where models are few.

    Args:
        table: of `pair_barriers`.
        seed: of the resampling of pairs, which is the same for every variant.
        resamples: of the bootstrap.

    Returns:
        One row a variant: the median of every measure, `barrier_low` and `barrier_high`; `change`, the median over
        pairs of the barrier minus that of the same pair as stored, with `change_low` and `change_high`; `lower`, the
        share of pairs whose barrier fell.
    """
    stored = table[table["families"] == "none"].set_index(["model_a", "model_b"])["barrier"]
    chosen = np.random.default_rng(seed).integers(len(stored), size=(resamples, len(stored)))
    records = []
    for (families, by), group in table.groupby(["families", "by"], sort=False):
        barriers = group.set_index(["model_a", "model_b"])["barrier"].loc[stored.index]
        change = barriers - stored
        record = {"families": families, "by": by, "pairs": len(barriers)}
        for name, values in (("barrier", barriers), ("change", change)):
            medians = np.median(values.to_numpy()[chosen], axis=1)
            low, high = np.quantile(medians, [0.025, 0.975])
            record |= {name: float(values.median()), f"{name}_low": float(low), f"{name}_high": float(high)}
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
