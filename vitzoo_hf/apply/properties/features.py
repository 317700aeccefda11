"""Features of models from the weights of their trunks.

Heads are excluded, because the layout alone of a head reveals its kind. A tensor `attn.qkv` counts as three tensors:
of queries, keys and values. Every function reads all weights once, some rows or columns at a time.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from vitzoo_hf.format.layout import Layout, is_head
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.metrics.weight_statistics import matrices_of, singular_values, weight_quantiles, weight_statistics
from vitzoo_hf.progress import progress_bar
from vitzoo_hf.zoo import Zoo
from vitzoo_hf.zoo.weight_columns import WeightColumns

QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)
STATISTICS = ("mean", "variance", *(f"quantile_{quantile:g}" for quantile in QUANTILES))
TOP_SINGULAR_VALUES = 3
BATCH_BYTES = 2**26
COMPONENTS = 256


@dataclass(frozen=True, eq=False)
class Features:
    """A matrix with one row a model.

    Attributes:
        name: name of the kind of features.
        model_ids: ids of the models, one a row.
        values: the matrix, float64 `[P, F]`.
        names: names of the columns.
        components: number of principal components to reduce the columns to; None standardises them instead. Both are
            fitted on the training models.

    Raises:
        ZooError: if sizes disagree, or a value is NaN or infinite.
    """

    name: str
    model_ids: tuple[str, ...]
    values: Float64[np.ndarray, "P F"]
    names: tuple[str, ...]
    components: int | None = None

    def __post_init__(self) -> None:
        if self.values.shape != (len(self.model_ids), len(self.names)):
            raise ZooError(
                f"features {self.name!r} are {list(self.values.shape)} for {len(self.model_ids)} models and "
                f"{len(self.names)} names: give one row a model and one name a column"
            )
        broken = ~np.isfinite(self.values).all(axis=1)
        if broken.any():
            raise ZooError(
                f"features {self.name!r} of {self.model_ids[int(broken.argmax())]} are NaN or infinite: its training "
                "diverged, or a matrix is zero; filter such models out"
            )

    def of(self, model_ids: Sequence[str]) -> Float64[np.ndarray, "P F"]:
        """The rows of some models.

        Raises:
            ZooError: naming the first model without features.
        """
        place = {model_id: position for position, model_id in enumerate(self.model_ids)}
        unknown = [model_id for model_id in model_ids if model_id not in place]
        if unknown:
            raise ZooError(f"features {self.name!r} lack {len(unknown)} models, such as {unknown[0]}")
        return self.values[[place[model_id] for model_id in model_ids]]


def table_features(name: str, table: pd.DataFrame) -> Features:
    """Features from a table indexed by model id, such as the embedding of an autoencoder.

    Example:
        >>> table_features("embedding", pd.DataFrame({"z0": [0.5, 1.0]}, index=["a@1", "b@1"])).values.shape
        (2, 1)

    Raises:
        ZooError: for a column that is not numeric, two rows of one model, or NaN or infinite values.
    """
    for column in table:
        if not pd.api.types.is_numeric_dtype(table[column]):
            raise ZooError(f"column {column!r} of features {name!r} is not numeric: drop it")
    if table.index.has_duplicates:
        raise ZooError(f"features {name!r} have {table.index[table.index.duplicated()][0]} twice: one row a model")
    return Features(name, tuple(map(str, table.index)), table.to_numpy(np.float64), tuple(map(str, table)))


def statistics_features(
    zoo: Zoo, *, device: str | torch.device = "cpu", num_workers: int = 1, verify: bool = True, progress: bool = False
) -> Features:
    """Seven numbers of every tensor of the trunk: mean, variance, and quantiles 0, 1/4, 1/2, 3/4 and 1.

    Source: Unterthiner et al., "Predicting Neural Network Accuracy from Weights", 2020.

    Args:
        zoo: models whose trunks have one layout.
        device: where features are computed.
        num_workers: number of threads that read.
        verify: compare every row with its hash when it is first read.
        progress: show a bar.

    Raises:
        ZooError: if there is no model, trunks differ, a row is damaged, or weights are not finite.

    Example:
        >>> features = statistics_features(Zoo.sample())
        >>> features.values.shape, features.names[0]
        ((8, 266), 'cls_token mean')
    """

    def statistics(weights: Tensor, layout: Layout) -> dict[str, Tensor]:
        moments = weight_statistics(weights, layout)
        quantiles = weight_quantiles(weights, layout, QUANTILES)
        values = torch.cat([torch.stack([moments.mean, moments.std**2], 2), quantiles], 2)
        return {name: values[:, number] for number, name in enumerate(layout.names)}

    columns = zoo.weight_columns(device=device, num_workers=num_workers)
    columns = columns.verified() if verify else columns
    return _by_rows("statistics", STATISTICS, columns, statistics, progress)


def spectra_features(
    zoo: Zoo, *, device: str | torch.device = "cpu", num_workers: int = 1, verify: bool = True, progress: bool = False
) -> Features:
    """The three largest singular values and the stable rank of every matrix of the trunk.

    Source: the spectral features of Martin, Peng and Mahoney, "Predicting trends in the quality of state-of-the-art
    neural networks without access to training or testing data", 2021; see `vitzoo_hf.stable_rank`.

    Args:
        zoo: models whose trunks have one layout.
        device: where features are computed.
        num_workers: number of threads that read.
        verify: compare every row with its hash when it is first read.
        progress: show a bar.

    Raises:
        ZooError: if there is no model, trunks differ, a row is damaged, weights are not finite, or a matrix is zero.

    Example:
        >>> spectra_features(Zoo.sample()).names[:4:3]
        ('patch_embed.proj.weight singular_value_1', 'patch_embed.proj.weight stable_rank')
    """

    def spectra(weights: Tensor, layout: Layout) -> dict[str, Tensor]:
        features = {}
        for name, matrix in matrices_of(weights, layout).items():
            top = singular_values(matrix, TOP_SINGULAR_VALUES)
            # stable rank: squared Frobenius norm over squared spectral norm
            rank = matrix.double().square().sum((1, 2)) / top[:, 0].square()
            features[name] = torch.cat([top, rank[:, None]], 1)
        return features

    columns = zoo.weight_columns(device=device, num_workers=num_workers)
    columns = columns.verified() if verify else columns
    names = (*(f"singular_value_{place}" for place in range(1, TOP_SINGULAR_VALUES + 1)), "stable_rank")
    return _by_rows("spectra", names, columns, spectra, progress)


def norm_features(
    zoo: Zoo, *, device: str | torch.device = "cpu", num_workers: int = 1, verify: bool = True, progress: bool = False
) -> Features:
    """The Euclidean norm of the trunk: one number, as the baseline of other features of weights."""

    def norm(weights: Tensor, layout: Layout) -> dict[str, Tensor]:
        return {"trunk": weights.double().norm(dim=1, keepdim=True)}

    columns = zoo.weight_columns(device=device, num_workers=num_workers)
    columns = columns.verified() if verify else columns
    return _by_rows("norm", ("norm",), columns, norm, progress)


def flat_features(
    zoo: Zoo,
    *,
    components: int = COMPONENTS,
    device: str | torch.device = "cpu",
    num_workers: int = 1,
    verify: bool = True,
    progress: bool = False,
) -> Features:
    """The flat weights of the trunk, as coordinates of the space that the models span.

    The P × P inner products of the centred weights are summed in float64 over blocks of columns, out of core. The
    coordinates are their eigenvectors times the roots of their eigenvalues. Coordinates have the inner products of
    the weights, so principal components or ridge regression of some rows give exactly the result of the weights.

    Args:
        zoo: models whose trunks have one layout.
        components: number of principal components of the training models to predict from.
        device: where the products are computed.
        num_workers: number of threads that read.
        verify: compare every row with its hash when it is first read.
        progress: show a bar.

    Example:
        >>> flat_features(Zoo.sample()).values.shape  # eight points span seven dimensions
        (8, 7)
    """
    columns = zoo.weight_columns(device=device, num_workers=num_workers)
    columns = columns.verified() if verify else columns
    trunk = [place for name, place in columns.layout.items() if not is_head(name)]
    count = len(columns.model_ids)
    gram = torch.zeros(count, count, dtype=torch.float64, device=columns.device)
    with progress_bar("multiplying weights", "block", shown=progress, total=len(columns.blocks(trunk))) as bar:
        for span, block in columns.read(trunk):
            for place in trunk:
                # a block may hold parts of several tensors, and of the head
                part = slice(max(span.start, place.start) - span.start, min(span.stop, place.stop) - span.start)
                if part.start < part.stop:
                    # float64, because squares of many small differences are summed
                    values = block[:, part].double()
                    gram += (values - values.mean(0)) @ (values - values.mean(0)).mT
            bar.update()
    if not gram.isfinite().all():
        raise ZooError("NaN or infinite weights among these models: filter diverged runs out")
    squares, vectors = torch.linalg.eigh(gram)
    # Eigenvalues below the rounding of the largest are noise, and at least one is, because the weights are centred.
    above = squares > squares[-1] * count * torch.finfo(torch.float64).eps
    values = (vectors[:, above] * squares[above].sqrt()).flip(1).cpu().numpy()
    names = tuple(f"coordinate {number}" for number in range(1, values.shape[1] + 1))
    return Features("flat", tuple(columns.model_ids), values, names, components)


def split_qkv(layout: Layout) -> Layout:
    """A layout without head, with tensors of queries, keys and values in place of `qkv`.

    Example:
        >>> split_qkv(Layout(("attn.qkv.bias", "head.bias"), ((6,), (2,)))).names
        ('attn.q.bias', 'attn.k.bias', 'attn.v.bias')
    """
    parts: list[tuple[str, tuple[int, ...]]] = []
    for name, shape in zip(layout.names, layout.shapes, strict=True):
        if is_head(name):
            continue
        if ".qkv." in name:
            parts += [(name.replace(".qkv.", f".{kind}."), (shape[0] // 3, *shape[1:])) for kind in "qkv"]
        else:
            parts.append((name, shape))
    return Layout(tuple(name for name, _ in parts), tuple(shape for _, shape in parts))


def _by_rows(
    name: str,
    measures: Sequence[str],
    columns: WeightColumns,
    measure: Callable[[Tensor, Layout], dict[str, Tensor]],
    progress: bool,
) -> Features:
    """Features of tensors, `[rows, measures]` a tensor, from some rows at a time."""
    layout, trunk = columns.layout, columns.layout.trunk().to(columns.device)
    tensors = split_qkv(layout)
    names: list[str] = []
    features: list[np.ndarray] = []
    with progress_bar(f"taking {name}", "model", shown=progress, total=len(columns.model_ids)) as bar:
        for weights in _batches(columns):
            values = weights if trunk.numel() == weights.shape[1] else weights[:, trunk]
            broken = ~values.isfinite().all(1)
            if broken.any():
                # rows come in the order of the ids, so the rows so far count the models
                model_id = columns.model_ids[sum(map(len, features)) + int(broken.int().argmax())]
                raise ZooError(f"{model_id} has NaN or infinite weights: filter diverged runs out")
            parts = measure(values, tensors)
            names = [f"{tensor} {name_of_measure}" for tensor in parts for name_of_measure in measures]
            features.append(torch.cat(list(parts.values()), 1).cpu().numpy())
            bar.update(len(weights))
    return Features(name, tuple(columns.model_ids), np.concatenate(features), tuple(names))


def _batches(columns: WeightColumns) -> Iterator[Float[Tensor, "B D"]]:
    size = max(1, BATCH_BYTES // (4 * columns.layout.num_parameters))
    batch: list[Tensor] = []
    for vector in columns.rows():
        batch.append(vector)
        if len(batch) == size:
            yield torch.stack(batch)
            batch = []
    if batch:
        yield torch.stack(batch)


WEIGHT_FEATURES: dict[str, Callable[..., Features]] = {
    "statistics": statistics_features,
    "spectra": spectra_features,
    "flat": flat_features,
    "norm": norm_features,
}
