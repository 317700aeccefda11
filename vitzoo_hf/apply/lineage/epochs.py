"""Checkpoints of one run in an order that their weights tell, and how right it is."""

from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float64
from scipy.stats import kendalltau

from vitzoo_hf.apply.lineage.costs import trunk_places
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.metrics.squared_distances import SquaredDistances
from vitzoo_hf.progress import progress_bar
from vitzoo_hf.zoo import Zoo
from vitzoo_hf.zoo.weight_columns import WeightColumns

DRAWS = 1000


def order_along_path(
    squared: Float64[np.ndarray, "E E"], lengths: Float64[np.ndarray, " E"]
) -> Float64[np.ndarray, " E"]:
    """Scores that grow with the epoch, of checkpoints of which nothing else is known.

    They are the positions on the line between the two checkpoints that lie farthest apart; of these the shorter
    vector comes first, since weights tend to grow in training.

    Args:
        squared: squared distances.
        lengths: norms of the weights.

    Example:
        >>> points = np.array([3.0, 1.0, 2.0])
        >>> order_along_path((points[:, None] - points) ** 2, points).argsort().tolist()
        [1, 2, 0]
    """
    first, last = np.unravel_index(squared.argmax(), squared.shape)
    if lengths[first] > lengths[last]:
        first, last = last, first
    return squared[first] - squared[last]


def order_epochs(
    zoo: Zoo,
    *,
    device: str | torch.device = "cpu",
    num_workers: int = 1,
    verify: bool = True,
    progress: bool = True,
) -> pd.DataFrame:
    """The order of every run's checkpoints by their weights, beside the true one.

    "start known" takes distances from the parent's trunk, of runs whose parent is in the zoo; "nothing known" takes
    `order_along_path`, of the trunk or of all weights with the head. Epochs are used for the score alone.

    Args:
        zoo: several epochs of some runs; runs of fewer than three are left out.
        device, num_workers, verify, progress: see `recover_lineage`.

    Returns:
        One row a run and way: `run_id`, `knowledge`, `weights` (trunk or all), `checkpoints`, and `kendall_tau`, of
        -1 (reversed) to 1 (right); NaN where all checkpoints are equal.

    Raises:
        ZooError: if no run has three checkpoints, or a row is damaged.
    """
    index = zoo.to_pandas()
    rows: list[dict[str, Any]] = []
    runs = [run for run in index.groupby("run_id", sort=False) if len(run[1]) >= 3]
    if not runs:
        raise ZooError("no run has three checkpoints here, so there is no order to find: take more epochs")
    ids = set(index["model_id"])
    with progress_bar("ordering epochs", "run", shown=progress, total=len(runs)) as bar:
        for run_id, run in runs:
            epochs = dict(zip(run["model_id"], run["epoch"], strict=True))
            parent = run["parent_id"].iloc[0]
            known = isinstance(parent, str) and parent in ids
            members = [*epochs, *([parent] if known else [])]
            columns = zoo.filter(model_id=members).weight_columns(device=device, num_workers=num_workers)
            columns = columns.verified() if verify else columns
            squared, lengths, order = _distances(columns, trunk_places(columns.layout))
            own = [row for row, model_id in enumerate(order) if model_id in epochs]
            true = np.array([epochs[order[row]] for row in own])
            ways = [("nothing known", "trunk", order_along_path(squared[np.ix_(own, own)], lengths[own]))]
            if known:
                ways.append(("start known", "trunk", squared[order.index(parent)][own]))
            columns = zoo.filter(model_id=list(epochs)).weight_columns(device=device, num_workers=num_workers)
            columns = columns.verified() if verify else columns
            squared, lengths, order = _distances(columns, [slice(0, columns.layout.num_parameters)])
            ways.append(("nothing known", "all", order_along_path(squared, lengths)))
            rows += [
                {
                    "run_id": run_id,
                    "knowledge": knowledge,
                    "weights": weights,
                    "checkpoints": len(own),
                    "kendall_tau": kendalltau(scores, true).statistic,
                }
                for knowledge, weights, scores in ways
            ]
            bar.update()
    return pd.DataFrame(rows)


def random_taus(checkpoints: int, runs: int, *, draws: int = DRAWS, seed: int = 0) -> Float64[np.ndarray, " N"]:
    """Mean Kendall's tau of so many runs in random order, drawn anew N times."""
    generator = np.random.default_rng(seed)
    first, second = np.triu_indices(checkpoints, 1)
    orders = generator.permuted(np.tile(np.arange(checkpoints), (draws * runs, 1)), axis=1)
    taus = np.sign(orders[:, second] - orders[:, first]).mean(1)
    return taus.reshape(draws, runs).mean(1)


def _distances(columns: WeightColumns, places: list[slice]) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Squared distances and norms of these columns of all models, and the models."""
    count = len(columns.model_ids)
    distances = SquaredDistances(count, torch.float32, columns.device)
    lengths = torch.zeros(count, dtype=torch.float64, device=columns.device)
    first = True
    while distances.is_pending:
        for part, block in columns.read(places):
            for place in places:
                begin, end = max(place.start, part.start), min(place.stop, part.stop)
                if begin < end:
                    distances.add(block[:, begin - part.start : end - part.start], lengths if first else None)
        distances.finish_pass()
        first = False
    return distances.squared.cpu().numpy(), lengths.sqrt().cpu().numpy(), columns.model_ids
