"""A zoo to distances of all pairs of its models in weight space, statistics and spectra, in bounded memory.

Cost: one pass over the stored bytes gives distances, norms and statistics. Where models are too close to each other
for the first pass to tell them apart, epochs late in a run for instance, another pass reads only these columns.
Spectra and quantiles need whole tensors, so a further pass takes them model by model.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypedDict

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from vitzoo_hf.format.layout import Layout
from vitzoo_hf.format.messages import did_you_mean
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.metrics.blocks import Scratch, column_pieces
from vitzoo_hf.metrics.squared_distances import GRAM_ELEMENTS, SquaredDistances
from vitzoo_hf.metrics.weight_distances import Metric, distances_of
from vitzoo_hf.metrics.weight_statistics import Moments, matrices_of, singular_values, statistics_of, weight_quantiles
from vitzoo_hf.progress import progress_bar
from vitzoo_hf.zoo import Zoo
from vitzoo_hf.zoo.weight_columns import WeightColumns

Per = Literal["model", "block", "tensor"]
SQUARED_ERROR = 1e-5  # bound on the relative error of a squared distance; the error of the distance is half of it
STATISTICS = ("norm", "mean", "std", "sparsity", "excess_kurtosis")


@dataclass(frozen=True)
class WeightMetrics:
    """Geometry and statistics of the weights of P models, in G parts of the network.

    Attributes:
        model_ids: the order of the models.
        parts: the order of the parts: "model", all weights together, then the blocks or tensors asked for.
        layout: the layout of the compared weights, without heads where heads differ.
        squared: squared Euclidean distances.
        norms: Euclidean norms of the weights of each part.
        table: one row a model and tensor: `model_id`, `tensor`, `num_values` and its statistics.
        spectra: one row a model and matrix: `model_id`, `matrix`, `spectral_norm`, `stable_rank`, `singular_values`.
        passes: how often weights were read for the distances.
    """

    model_ids: list[str]
    parts: list[str]
    layout: Layout
    squared: Float64[Tensor, "G P P"]
    norms: Float64[Tensor, "G P"]
    table: pd.DataFrame
    spectra: pd.DataFrame
    passes: int

    @cached_property
    def l2(self) -> Float64[Tensor, "G P P"]:
        """Euclidean distances; relative error at most 1e-5."""
        return distances_of(self.squared, self.norms, "l2")

    @cached_property
    def normalized_l2(self) -> Float64[Tensor, "G P P"]:
        """Euclidean distances over the geometric mean of the two norms; NaN for zero vectors."""
        return distances_of(self.squared, self.norms, "normalized_l2")

    @cached_property
    def cosine(self) -> Float64[Tensor, "G P P"]:
        """Cosine of the angle between models; NaN for zero vectors."""
        return 1 - distances_of(self.squared, self.norms, "cosine")

    def matrix(self, metric: Metric, part: str = "model") -> pd.DataFrame:
        """One metric of one part as a model × model table.

        Raises:
            ZooError: for an unknown metric or part.
        """
        metrics = ("l2", "normalized_l2", "cosine")
        for name, names in ((metric, metrics), (part, self.parts)):
            if name not in names:
                hint = "; per='block' or 'tensor' measures parts" if name is part and len(self.parts) == 1 else ""
                raise ZooError(f"nothing was measured of {name!r}: {did_you_mean(name, names)}{hint}")
        values = getattr(self, metric)[self.parts.index(part)]
        return pd.DataFrame(values.cpu().numpy(), index=self.model_ids, columns=self.model_ids)


def zoo_weight_metrics(
    zoo: Zoo,
    *,
    per: Per = "model",
    statistics: bool = True,
    quantiles: Sequence[float | int] = (),
    spectra: int = 0,
    threshold: float = 0.0,
    device: str | torch.device = "cpu",
    num_workers: int = 1,
    progress: bool = True,
) -> WeightMetrics:
    """Distances, cosines, norms, statistics and spectra of the weights of a zoo's models.

    Heads are left out where they differ. Weights are not compared with their hashes; `vitzoo verify` does that.
    Memory is some 300 MB beside the matrices.

    Args:
        zoo: the models; a filtered zoo is measured as it is.
        per: also compare "block" by block (embedding, blocks, norm, head) or "tensor" by tensor.
        statistics: fill `table`.
        quantiles: quantiles that become columns of the table, such as `quantile_0.5`; sorts every tensor.
        spectra: number of the largest singular values of every matrix in the table of spectra; 0 for no table.
        threshold: values up to this size count as zero for the sparsity.
        device: where blocks of weights are multiplied.
        num_workers: threads that read ahead.
        progress: show a bar.

    Raises:
        ZooError: if the zoo is empty, models differ in layout beyond the head, weights are NaN or infinite, or a
            shard cannot be read.
        ValueError: for another `per`, a negative threshold or number of singular values.

    Example:
        >>> found = zoo_weight_metrics(Zoo.sample(), per="block", progress=False)
        >>> found.parts, tuple(found.l2.shape)
        (['model', 'embedding', 'blocks.0', 'blocks.1', 'norm'], (5, 8, 8))
        >>> float(found.matrix("cosine").iloc[0, 0])
        1.0
    """
    if spectra < 0:
        raise ValueError(f"spectra={spectra}; expected how many singular values of each matrix, 0 for none")
    columns = zoo.weight_columns(device=device, num_workers=num_workers)
    sums = _Sums(columns.model_ids, columns.layout, columns.device, per, threshold if statistics else None)
    passes = _read(columns, sums, lambda piece: piece, progress)
    ordered: list[Tensor] = []
    spectrum: list[_Spectrum] = []
    if quantiles or spectra:
        with progress_bar("taking spectra", "model", shown=progress, total=len(columns.model_ids)) as bar:
            for model_id, weights in zip(columns.model_ids, columns.rows(), strict=True):
                if quantiles:
                    ordered.append(weight_quantiles(weights[None], columns.layout, quantiles)[0])
                if spectra:
                    spectrum += _spectra(model_id, weights[None], columns.layout, spectra)
                bar.update()
    table = sums.table()
    for number, quantile in enumerate(quantiles):
        table[f"quantile_{quantile:g}"] = torch.stack(ordered)[..., number].flatten().cpu().numpy()
    return sums.metrics(table, pd.DataFrame(spectrum), passes)


def zoo_task_vectors(
    zoo: Zoo,
    *,
    per: Per = "model",
    statistics: bool = False,
    threshold: float = 0.0,
    device: str | torch.device = "cpu",
    num_workers: int = 1,
    progress: bool = True,
) -> WeightMetrics:
    """Distances, cosines and norms of task vectors: the weights of each model less the weights of its parent.

    `norms` says how far each model went, `cosine` which models went the same way. Models without a parent are left
    out; parents are read even where a filter has left them out.

    Args:
        zoo: the children.
        per: see `zoo_weight_metrics`.
        statistics: see `zoo_weight_metrics`.
        threshold: see `zoo_weight_metrics`.
        device: see `zoo_weight_metrics`.
        num_workers: see `zoo_weight_metrics`.
        progress: see `zoo_weight_metrics`.

    Raises:
        ZooError: if no model has a parent, a parent is not in the zoo, or `zoo_weight_metrics` refuses the weights.

    Example:
        >>> found = zoo_task_vectors(Zoo.sample(), progress=False)
        >>> len(found.model_ids), tuple(found.norms.shape)
        (6, (1, 6))
    """
    source = zoo.weight_columns().source
    place = dict(zip(source.table["model_id"].to_pylist(), range(source.table.num_rows), strict=True))
    index = zoo.to_pandas()
    family = {
        child: parent
        for child, parent in zip(index["model_id"], index["parent_id"], strict=True)
        if isinstance(parent, str)
    }
    if not family:
        raise ZooError(f"no model of {zoo.name} has a parent, so there are no task vectors: try stage='finetune'")
    orphans = [(child, parent) for child, parent in family.items() if parent not in place]
    if orphans:
        child, parent = orphans[0]
        raise ZooError(f"{zoo.name} does not hold {parent}, the parent of {child}: leave {child} out by a filter")
    positions = sorted({place[model_id] for model_id in (*family, *family.values())})
    columns = WeightColumns(source.selected(np.array(positions)), device=device, num_workers=num_workers)
    row = {model_id: number for number, model_id in enumerate(columns.model_ids)}
    children = torch.tensor([row[child] for child in family], device=columns.device)
    parents = torch.tensor([row[parent] for parent in family.values()], device=columns.device)
    sums = _Sums(list(family), columns.layout, columns.device, per, threshold if statistics else None)
    passes = _read(columns, sums, lambda piece: piece[children] - piece[parents], progress)
    return sums.metrics(sums.table(), pd.DataFrame(), passes)


class _Sums:
    """Sums over blocks of columns, from which the metrics follow."""

    def __init__(
        self, model_ids: list[str], layout: Layout, device: torch.device, per: Per, threshold: float | None
    ) -> None:
        self.model_ids, self.layout = model_ids, layout
        parts = layout.parts(per)
        self.parts = list(parts)
        self.part_of = [number for number, names in enumerate(parts.values()) for _ in names]
        self.names = [name for names in parts.values() for name in names]
        places = dict(layout.items())
        self.places = [places[name] for name in self.names]
        count, scratch = len(model_ids), Scratch()
        self.distances = [SquaredDistances(count, torch.float32, device, SQUARED_ERROR, scratch) for _ in parts]
        self.lengths = torch.zeros(len(self.names), count, dtype=torch.float64, device=device)
        self.moments = [] if threshold is None else [Moments(count, device, threshold, scratch) for _ in self.names]

    def fork(self, *, first: bool) -> "_Sums":
        """Sums of other columns in the next pass, for another thread, to be joined to these."""
        twin, scratch = copy(self), Scratch()
        twin.distances = [distances.fork(scratch) for distances in self.distances]
        twin.lengths = torch.zeros_like(self.lengths)
        twin.moments = [moments.fork(scratch) for moments in self.moments] if first else []
        return twin

    def join(self, twin: "_Sums") -> None:
        """Add the sums of a fork."""
        for distances, twin_distances in zip(self.distances, twin.distances, strict=True):
            distances.join(twin_distances)
        self.lengths += twin.lengths
        # a fork of a later pass has no moments
        for moments, twin_moments in zip(self.moments, twin.moments, strict=False):
            moments.join(twin_moments)

    def pending(self) -> list[slice]:
        """Columns that the next pass has to read."""
        return [
            place for place, part in zip(self.places, self.part_of, strict=True) if self.distances[part].is_pending
        ]

    def add(self, columns: slice, block: Tensor, transform: Callable[[Tensor], Tensor], *, first: bool) -> None:
        """Add a block; norms and moments in the first pass only."""
        for number, piece in self._pieces(columns, block):
            vectors = transform(piece)
            self.distances[self.part_of[number]].add(vectors, self.lengths[number] if first else None)
            if first and self.moments:
                self.moments[number].add(vectors)
        if first and not self.lengths.isfinite().all():
            raise ZooError(self._not_finite())

    def _pieces(self, columns: slice, block: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Pieces of a block that fit the cache, each with the number of its tensor."""
        for number, place in enumerate(self.places):
            first, last = max(place.start, columns.start), min(place.stop, columns.stop)
            if first < last:
                for piece in column_pieces(block[:, first - columns.start : last - columns.start], GRAM_ELEMENTS):
                    yield number, piece

    def _not_finite(self) -> str:
        tensors, models = (~self.lengths.isfinite()).nonzero().T.tolist()
        count = len(set(models))
        return (
            f"{self.model_ids[models[0]]} has NaN or infinite weights in {self.names[tensors[0]]}"
            + (f", and so have at least {count - 1} other models" if count > 1 else "")
            + ": leave it out by a filter, or look for a diverged run"
        )

    def table(self) -> pd.DataFrame:
        """Statistics, one row a model and tensor in the order of the layout."""
        names = self.layout.names
        sizes = dict(zip(names, self.layout.sizes, strict=True))
        columns: dict[str, Sequence[str] | Sequence[int] | np.ndarray] = {
            "model_id": np.repeat(self.model_ids, len(names)),
            "tensor": list(names) * len(self.model_ids),
            "num_values": [sizes[name] for name in names] * len(self.model_ids),
        }
        if self.moments:
            statistics = statistics_of([self.moments[self.names.index(name)] for name in names])
            columns |= {name: getattr(statistics, name).flatten().cpu().numpy() for name in STATISTICS}
        return pd.DataFrame(columns)

    def metrics(self, table: pd.DataFrame, spectra: pd.DataFrame, passes: int) -> WeightMetrics:
        """The result, with all weights together in front of parts of them."""
        squared = torch.stack([distances.squared for distances in self.distances])
        part_of = torch.tensor(self.part_of, device=self.lengths.device)
        lengths = torch.zeros(len(self.parts), len(self.model_ids), dtype=torch.float64, device=part_of.device)
        lengths.index_add_(0, part_of, self.lengths)
        parts = self.parts
        if parts != ["model"]:
            parts = ["model", *parts]
            squared = torch.cat([squared.sum(0, keepdim=True), squared])
            lengths = torch.cat([lengths.sum(0, keepdim=True), lengths])
        return WeightMetrics(self.model_ids, parts, self.layout, squared, lengths.sqrt(), table, spectra, passes)


def _read(columns: WeightColumns, sums: _Sums, transform: Callable[[Tensor], Tensor], progress: bool) -> int:
    """Read blocks until every distance is accurate; returns the number of passes."""
    passes = 0
    with _single_threads(columns.device) as (pool, threads):
        while pending := sums.pending():
            first = passes == 0
            selection = None if first else pending
            forks = [sums.fork(first=first) for _ in range(threads)]
            with progress_bar(
                "reading weights", "block", shown=progress, total=len(columns.blocks(selection))
            ) as bar:
                for part, block in columns.read(selection):
                    _add_in_threads(pool, forks, part, block, transform, first)
                    bar.update()
            for fork in forks:
                sums.join(fork)
            for distances in sums.distances:
                distances.finish_pass()
            passes += 1
    return passes


def _add_in_threads(
    pool: ThreadPoolExecutor,
    forks: Sequence[_Sums],
    columns: slice,
    block: Tensor,
    transform: Callable[[Tensor], Tensor],
    first: bool,
) -> None:
    """Give each fork a share of the columns of a block, and wait for all.

    A fork gets the share of one place in every block, so that sums have one order whatever the speed of threads.
    """
    share = -(-block.shape[1] // len(forks))
    futures = []
    for number, fork in enumerate(forks):
        start, stop = number * share, min((number + 1) * share, block.shape[1])
        if start < stop:
            part = slice(columns.start + start, columns.start + stop)
            futures.append(pool.submit(fork.add, part, block[:, start:stop], transform, first=first))
    for future in futures:
        future.result()


@contextmanager
def _single_threads(device: torch.device) -> Iterator[tuple[ThreadPoolExecutor, int]]:
    """As many threads as torch would use, each with a torch of one thread.

    Sums of a piece that fits the cache are too short for torch to share them among threads.
    """
    before = torch.get_num_threads()
    count = before if device.type == "cpu" else 1
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(count, "vitzoo-sums", initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool, count
    finally:
        torch.set_num_threads(before)


class _Spectrum(TypedDict):
    """A row of the table of spectra."""

    model_id: str
    matrix: str
    spectral_norm: float
    stable_rank: float
    singular_values: list[float]


def _spectra(model_id: str, weights: Float[Tensor, "1 D"], layout: Layout, top: int) -> list[_Spectrum]:
    rows: list[_Spectrum] = []
    for name, (matrix,) in matrices_of(weights, layout).items():
        values = singular_values(matrix, min(top, *matrix.shape))
        rows.append(
            {
                "model_id": model_id,
                "matrix": name,
                "spectral_norm": values[0].item(),
                "stable_rank": (matrix.double().square().sum() / values[0].square()).item(),
                "singular_values": values.tolist(),
            }
        )
    return rows
