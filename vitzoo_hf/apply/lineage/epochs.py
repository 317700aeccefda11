"""Order the checkpoints of a run by their weights, and score the order.

The weights of every run are read twice: once for the trunk, once with the head.
"""

from collections.abc import Callable, Mapping

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
    """Scores that grow with the epoch, from the weights of checkpoints alone.

    A score is the position on the line between the two checkpoints that are farthest apart.

    Args:
        squared: squared distances between checkpoints.
        lengths: norms of the weights.

    Example:
        >>> points = np.array([3.0, 1.0, 2.0])
        >>> order_along_path((points[:, None] - points) ** 2, points).argsort().tolist()
        [1, 2, 0]
    """
    first, last = np.unravel_index(squared.argmax(), squared.shape)
    if lengths[first] > lengths[last]:  # the shorter vector comes first, since weights tend to grow in training
        first, last = last, first
    return squared[first] - squared[last]  # 2 |first - last| times the position, up to a constant


def order_epochs(
    zoo: Zoo,
    *,
    device: str | torch.device = "cpu",
    num_workers: int = 1,
    verify: bool = True,
    progress: bool = True,
) -> pd.DataFrame:
    """Order the checkpoints of every run by their weights, and compare with the true order.

    "start known" orders by the distance from the parent's trunk, for runs whose parent is in the zoo. "nothing known"
    orders by `order_along_path`, once for the trunk and once for all weights. Epochs serve the score alone.

    Args:
        zoo: several epochs of some runs; runs with fewer than three are left out.
        device: where weights are compared.
        num_workers: number of threads that read.
        verify: compare every row with its hash when it is first read.
        progress: show a bar.

    Returns:
        One row a run and way: `run_id`, `knowledge`, `weights` (trunk or all), `checkpoints`, and `kendall_tau`, from
        -1 (reversed) to 1 (right); NaN where all checkpoints are equal.

    Raises:
        ZooError: if no run has three checkpoints, or a row is damaged.
    """

    def columns_of(model_ids: list[str]) -> WeightColumns:
        columns = zoo.filter(model_id=model_ids).weight_columns(device=device, num_workers=num_workers)
        return columns.verified() if verify else columns

    index = zoo.to_pandas()
    rows: list[dict[str, str | int | float]] = []
    # two checkpoints have one pair, whose order is right or wrong by a coin
    runs = [run for run in index.groupby("run_id", sort=False) if len(run[1]) >= 3]
    if not runs:
        raise ZooError("no run has three checkpoints here, so there is no order to recover: take more epochs")
    ids = set(index["model_id"])
    with progress_bar("ordering epochs", "run", shown=progress, total=len(runs)) as bar:
        for run_id, run in runs:
            epochs = dict(zip(run["model_id"], run["epoch"], strict=True))
            parent = run["parent_id"].iloc[0]
            true, ways = _orders(columns_of, epochs, parent if parent in ids else None)
            rows += [
                {
                    "run_id": str(run_id),
                    "knowledge": knowledge,
                    "weights": weights,
                    "checkpoints": len(true),
                    "kendall_tau": kendalltau(scores, true).statistic,
                }
                for knowledge, weights, scores in ways
            ]
            bar.update()
    return pd.DataFrame(rows)


def _orders(
    columns_of: Callable[[list[str]], WeightColumns], epochs: Mapping[str, int], parent: str | None
) -> tuple[np.ndarray, list[tuple[str, str, np.ndarray]]]:
    """True epochs of a run's checkpoints, and the scores of every way to order them: knowledge, weights, scores."""
    squared, lengths, order = _distances(columns_of([*epochs, *([parent] if parent else [])]), trunk_only=True)
    of_run = [row for row, model_id in enumerate(order) if model_id in epochs]
    path = order_along_path(squared[np.ix_(of_run, of_run)], lengths[of_run])
    ways = [("nothing known", "trunk", path)]
    if parent:
        ways.append(("start known", "trunk", squared[order.index(parent)][of_run]))
    # without the parent: its head has other classes, so that the two have no common columns of a head
    squared, lengths, _ = _distances(columns_of([*epochs]), trunk_only=False)
    ways.append(("nothing known", "all", order_along_path(squared, lengths)))
    return np.array([epochs[order[row]] for row in of_run]), ways


def random_taus(checkpoints: int, runs: int, *, draws: int = DRAWS, seed: int = 0) -> Float64[np.ndarray, " N"]:
    """N draws of the mean Kendall's tau of some runs in random order, as a baseline."""
    generator = np.random.default_rng(seed)
    first, second = np.triu_indices(checkpoints, 1)
    orders = generator.permuted(np.tile(np.arange(checkpoints), (draws * runs, 1)), axis=1)
    # Kendall's tau of orders without ties: concordant less discordant pairs, over all pairs.
    taus = np.sign(orders[:, second] - orders[:, first]).mean(1)
    return taus.reshape(draws, runs).mean(1)


def _distances(columns: WeightColumns, *, trunk_only: bool) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Squared distances and norms of the trunks or of all weights of the models, and the ids of the models."""
    layout = columns.layout
    places = trunk_places(layout) if trunk_only else [slice(0, layout.num_parameters)]
    count = len(columns.model_ids)
    # float32 products, repeated in further passes where their digits cancelled
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
