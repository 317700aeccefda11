"""Open a zoo: its index, a filter over factors, single models, a stream of weights.

A zoo is a folder, or the id of a dataset on the Hub. Cost: opening reads the index, which is small. The weights of a
row are read when they are asked for, and compared with their hash the first time. Small shards of the Hub go through
its cache; of large ones only needed rows are read.
"""

import copy
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor, nn

from vitzoo_hf.format import schema
from vitzoo_hf.format.messages import did_you_mean
from vitzoo_hf.format.row import Row
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.format.tables import check_classes, features_of, matches, with_class_names
from vitzoo_hf.format.weight_reader import RowTable, WeightReader
from vitzoo_hf.models.rebuild import reconstruct
from vitzoo_hf.zoo.index import Index, plain
from vitzoo_hf.zoo.probes import load_probes
from vitzoo_hf.zoo.pushed_copy import open_any
from vitzoo_hf.zoo.row_dataset import RowDataset
from vitzoo_hf.zoo.row_source import RowSource, chosen_columns
from vitzoo_hf.zoo.stream import Stream
from vitzoo_hf.zoo.weight_columns import BLOCK_BYTES, WeightColumns

if TYPE_CHECKING:
    import datasets
    import pandas

    from vitzoo_hf.publish.push import Push

SAMPLE = Path(__file__).parents[1] / "sample"


class Zoo:
    """A published population of models.

    Args:
        path: a folder written by `vitzoo pack`, or a dataset id: `ORG/NAME`, or `ORG/NAME@REVISION`.
        revision: branch, tag or commit of a dataset on the Hub.

    Raises:
        ZooError: if there is no zoo, it has a newer format, a file is missing or has the wrong length, or a field of
            its files holds what no zoo holds.

    Example:
        >>> zoo = Zoo.sample()
        >>> len(zoo), len(zoo.filter(stage="finetune", factor_optimizer="adamw"))
        (8, 4)
    """

    def __init__(self, path: str | Path, *, revision: str | None = None) -> None:
        self.name = str(path)
        # everything that a stranger's files say is checked here, once
        self._opened = open_any(path, revision)
        self._at_hand, self.manifest = self._opened.files, self._opened.manifest
        self.layouts, self._tables = self._opened.layouts, self._opened.tables
        self.source: tuple[str, str | None] = self._at_hand.source
        self._index = Index(self._opened.index, self.manifest["factors"])
        self._positions = np.arange(len(self._index))
        self._readers: list[WeightReader] = []

    @classmethod
    def sample(cls) -> "Zoo":
        """Eight real models of the mini zoo that come with the package."""
        return cls(SAMPLE)

    def __len__(self) -> int:
        return len(self._positions)

    def __repr__(self) -> str:
        runs, factors = pc.count_distinct(self._chosen("run_id")).as_py(), ", ".join(self.factors)
        return f"Zoo({self.name!r}: {len(self)} rows of {runs} runs, factors {factors})"

    @property
    def factors(self) -> list[str]:
        """Names of the factor columns."""
        return [f"factor_{name}" for name in self.manifest["factors"]]

    @property
    def column_types(self) -> dict[str, type]:
        """Columns that `filter` takes -> the Python type of their values."""
        kinds: dict[str, type] = {}
        for column in self._index.table.schema:
            if pa.types.is_floating(column.type):
                kinds[column.name] = float
            elif pa.types.is_integer(column.type):
                kinds[column.name] = int
            else:
                kinds[column.name] = bool if pa.types.is_boolean(column.type) else str
        return kinds

    @property
    def splits(self) -> list[str]:
        """Splits that have rows."""
        return [split for split in schema.SPLITS if self._tables.names("index", split)]

    @property
    def configs(self) -> list[str]:
        """Configs of the dataset, `weights` first."""
        # shards.json lists the weights, so the manifest may name no file of this config
        folders = {name.split("/")[0] for name in self.manifest["files"] if "/" in name} | {"weights"}
        return [config for config in schema.CONFIGS if config in folders]

    @property
    def model_ids(self) -> list[str]:
        """Ids of the rows, in order."""
        return self._chosen("model_id").to_pylist()

    def splits_of(self, model_ids: Sequence[str]) -> list[str]:
        """The split of each of these models."""
        splits = dict(zip(self.model_ids, self._chosen("split").to_pylist(), strict=True))
        return [splits[model_id] for model_id in model_ids]

    @property
    def index(self) -> "datasets.Dataset":
        """The rows without their weights, and the split of each."""
        return self._index.dataset(self._positions)

    def to_pandas(self, config: str = "index") -> "pandas.DataFrame":
        """A light config as a data frame, with names instead of class numbers; `index` follows the filter.

        Raises:
            ZooError: if the zoo has no such config.
        """
        if config == "index":
            table = plain(self._index.table.take(pa.array(self._positions)))
            return table.to_pandas(integer_object_nulls=True)
        configs = [name for name in self.configs if name != "weights"]
        if config not in configs:
            hint = "; `vitzoo evaluate` writes it" if config in ("evaluations", "pairs") else ""
            raise ZooError(f"{self.name} has no config {config!r}{hint}: {did_you_mean(config, configs)}")
        table = self._tables.read(config)
        return with_class_names(table, features_of(table)).to_pandas(integer_object_nulls=True)

    def filter(self, **conditions: Any) -> "Zoo":
        """The rows that meet every condition, as a zoo over the same files.

        Args:
            conditions: column -> a value; a list of values; or a pair `(low, high)`, a range including both ends,
                where None leaves an end open. `split` counts as a column.

        Raises:
            ZooError: for an unknown column, a value of the wrong type, or an unknown class name.

        Example:
            >>> zoo = Zoo.sample().filter(factor_lr=[1e-3, 3e-3], test_accuracy=(0.75, None))
            >>> all(row["test_accuracy"] >= 0.75 for row in zoo.index)
            True
        """
        names = self._index.table.column_names
        mask = np.ones(len(self._index), dtype=bool)
        for column, condition in conditions.items():
            if column not in names:
                raise ZooError(f"unknown column {column!r}: {did_you_mean(column, names)}")
            if column in ("stage", "head"):
                check_classes(column, condition)
            mask &= matches(self._index.column(column), column, condition)
        return self._select_rows(self._positions[mask[self._positions]])

    def rows(self, *, verify: bool = True) -> Iterator[Row]:
        """All rows in order, read-only; the weights of a row, float32 `[D]`, are read when they are first asked for.

        Args:
            verify: compare every row with its hash when it is first read.

        Raises:
            ZooError: naming the damaged row, when its weights are asked for.
        """
        for position, columns in self._index.records(self._positions):
            yield Row(columns, partial(self._reader.read, position, verify=verify), verified=verify)

    def row(self, model_id: str) -> Row:
        """One row by id; its weights are read when they are first asked for.

        Raises:
            ZooError: for an unknown id, with the closest known one.
        """
        position = self._index.position_of(model_id, self._positions, self.name)
        return next(self._select_rows(np.array([position])).rows())

    def model(self, model_id: str, *, device: str | torch.device = "cpu") -> nn.Module:
        """A live timm ViT in eval mode, with exactly the stored weights.

        Example:
            >>> zoo = Zoo.sample()
            >>> model = zoo.model(zoo.model_ids[-1])
            >>> model(torch.zeros(1, 1, 16, 16)).shape
            torch.Size([1, 10])
        """
        return reconstruct(self.row(model_id), device=device)

    def stream(
        self,
        *,
        batch_size: int = 16,
        device: str | torch.device = "cpu",
        columns: Sequence[str] | None = None,
        tensors: str | Sequence[str] | None = None,
        pad: bool = False,
        shuffle: bool = False,
        seed: int = 0,
        drop_last: bool = False,
        num_workers: int = 1,
        rank: int = 0,
        world_size: int = 1,
        verify: bool = True,
        reuse: bool = False,
        dtype: torch.dtype = torch.float64,
    ) -> Stream:
        """Batches of rows for a training loop.

        Models of different architectures or heads have weights of different lengths, so a batch holds rows of one
        layout. `tensors="trunk"` gives models that differ in their heads one shape, `pad=True` gives all one shape.

        Args:
            batch_size: rows a batch; the last batch of a layout may be smaller.
            device: where `weights` go; for CUDA they are copied from pinned memory while an earlier batch is used.
            columns: columns of the index to hand out beside `weights`; all by default.
            tensors: `trunk` (all but the head), `head`, or names and patterns such as `blocks.*.attn.qkv.weight`:
                `weights` then holds only these, in the order of the layout, and `tensors` maps their names to views
                `[B, *shape]`. Other tensors are read only to hash a row the first time, or not with `verify=False`.
            pad: fill batches with rows of any layout; zeros stand behind the shorter, and `lengths` says where.
            shuffle: another order every epoch: row groups are permuted, and rows within windows of 256 MB. That is a
                permutation of all rows where a zoo is smaller than that, or a model has a row group of its own.
            seed: seed of the order.
            drop_last: leave out batches that are not full, and those that ranks cannot share evenly. Otherwise ranks
                that would have a batch less hand out one of another rank, whose rows say `repeated`.
            num_workers: threads that read ahead, a batch each; 0 reads when a batch is asked for.
            rank: number of this process, from 0.
            world_size: number of processes that share the batches.
            verify: compare every row with its hash when it is first read.
            reuse: hand out the same memory again, so that a batch's `weights` hold only until the next is asked for.
            dtype: float64 or float32, for columns of numbers that may be null, such as results.

        Returns:
            A `Stream`, to iterate once an epoch, with `state_dict` and `load_state_dict`. A batch maps columns to
            values: `weights` is float32 `[B, D]`; `epoch` and `num_parameters` are int64 `[B]`; other numbers, which
            may be null, are of `dtype` `[B]` with NaN for null; the rest are lists. `place` is for `state_dict`.

        Raises:
            ZooError: for a batch size below 1, a rank outside the world, an unknown column or tensor.

        Example:
            >>> batch = next(iter(Zoo.sample().filter(head="linear", stage="finetune").stream(batch_size=2)))
            >>> batch["weights"].shape, batch["test_accuracy"].dtype
            (torch.Size([2, 26922]), torch.float64)
        """
        return Stream(
            self._row_source(columns), batch_size=batch_size, device=device, tensors=tensors, pad=pad, dtype=dtype,
            shuffle=shuffle, seed=seed, drop_last=drop_last, rank=rank, world_size=world_size,
            num_workers=num_workers, verify=verify, reuse=reuse,
        )  # fmt: skip

    def torch_dataset(
        self,
        *,
        columns: Sequence[str] | None = None,
        tensors: str | Sequence[str] | None = None,
        pad: bool = False,
        verify: bool = True,
        dtype: torch.dtype = torch.float32,
    ) -> RowDataset:
        """The rows as a map-style `torch.utils.data.Dataset`, for `transformers.Trainer`, `accelerate` and samplers.

        Args:
            columns: see `stream`; in a row numbers are tensors without axes, and texts that are null are empty.
            tensors: see `stream`.
            pad: see `stream`.
            verify: see `stream`.
            dtype: see `stream`.

        Raises:
            ZooError: for an unknown column or tensor, and for rows of different lengths without `pad`.

        Example:
            >>> rows = Zoo.sample().torch_dataset(columns=["test_accuracy"], tensors="trunk")
            >>> len(rows), rows[0]["weights"].shape, rows[0]["test_accuracy"].dtype
            (8, torch.Size([26592]), torch.float32)
        """
        return RowDataset(self._row_source(columns), tensors=tensors, pad=pad, verify=verify, dtype=dtype)

    def weight_columns(
        self, *, device: str | torch.device = "cpu", num_workers: int = 1, block_bytes: int = BLOCK_BYTES
    ) -> WeightColumns:
        """Blocks of columns of all weights, `(slice, float32 [P, c])`, to measure pairs of models out of core.

        Args:
            device: where blocks go.
            num_workers: threads that read.
            block_bytes: memory of a block, of which there are two.

        Raises:
            ZooError: if there is no row, or rows differ in layout beyond the head.
        """
        return WeightColumns(self._row_source([]), device=device, num_workers=num_workers, block_bytes=block_bytes)

    def probes(self, dataset: str, role: str = "test") -> tuple[Tensor, Tensor]:
        """Probe images of a dataset, prepared as in training, and their labels.

        Args:
            dataset: a `dataset` of the index.
            role: `test`, or `selection` for choosing models.

        Returns:
            float32 `[N, channels, H, W]`, normalised, and int64 `[N]`.

        Raises:
            ZooError: if the zoo does not carry them.
        """
        return load_probes(self._tables, self.manifest["images"], dataset, role)

    def probe_rows(self, role: str) -> list[dict[str, Any]]:
        """Rows of the `probes` config as they are stored, images still encoded."""
        table = self._tables.read("probes", role)
        return [] if table is None else table.to_pylist()

    def push(
        self, repository: str, *, private: bool = False, tag: str | None = None, dry_run: bool = False
    ) -> "Push":
        """Publish the zoo on the Hub, or update a published zoo; see `vitzoo_hf.publish.push.push`.

        Args:
            repository: dataset id, `ORG/NAME`.
            private: make a new dataset private.
            tag: also tag this version.
            dry_run: only list the files that would be uploaded.

        Raises:
            ZooError: for a zoo that is not a folder here, or only some of its rows.
        """
        from vitzoo_hf.publish.push import push

        if self._at_hand.is_remote:
            raise ZooError(f"{self.name} is on the Hub: push takes a zoo's folder")
        if len(self) != len(self._index):
            raise ZooError(
                f"{len(self)} of {len(self._index)} rows are chosen: write them as a zoo of their own by"
                " `vitzoo_hf.convert.export.export_subset`, and push that"
            )
        return push(self.name, repository, private=private, tag=tag, dry_run=dry_run)

    @property
    def unfiltered(self) -> "Zoo":
        """All rows of the zoo, whatever was filtered."""
        return self._select_rows(np.arange(len(self._index)))

    @property
    def blueprint_text(self) -> str:
        """The blueprint the zoo was made from."""
        return self._at_hand.path("blueprint.yaml").read_text(encoding="utf-8")

    def _select_rows(self, positions: np.ndarray) -> "Zoo":
        """A zoo over the same files with only the rows at these positions of the index."""
        zoo = copy.copy(self)  # shares the reader, and with it what was verified
        zoo._positions = positions
        return zoo

    def _row_source(self, columns: Sequence[str] | None) -> RowSource:
        table = self._index.table
        return RowSource(
            self._positions, table, chosen_columns(table.column_names, columns), self.layouts, self._reader
        )

    @property
    def _reader(self) -> WeightReader:
        """The reader of the weights, shared by every zoo over the same files."""
        if not self._readers:
            rows = RowTable.of(self._index.table)
            self._readers.append(WeightReader(self._at_hand, self._opened.shards, rows))
        return self._readers[0]

    def _chosen(self, name: str) -> pa.ChunkedArray:
        return self._index.column(name).take(pa.array(self._positions))
