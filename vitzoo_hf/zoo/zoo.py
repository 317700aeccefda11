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
from vitzoo_hf.format.messages import REPAIR, did_you_mean
from vitzoo_hf.format.row import Row
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.format.tables import check_classes, features_of, matches, with_class_names
from vitzoo_hf.format.weight_reader import RowTable, WeightReader
from vitzoo_hf.images.preparation import normalize
from vitzoo_hf.models.rebuild import reconstruct
from vitzoo_hf.zoo.pushed_copy import open_any
from vitzoo_hf.zoo.stream import RowSource, Stream, light_columns
from vitzoo_hf.zoo.weight_columns import BLOCK_BYTES, WeightColumns

if TYPE_CHECKING:
    import datasets
    import pandas

    from vitzoo_hf.publish.push import Push

SAMPLE = Path(__file__).parents[1] / "sample"


class Zoo:
    """A published population of models.

    Args:
        path: a folder written by `vitzoo pack`, or a dataset id such as `ModelZoos/vit-zoo`, also as `ORG/NAME@REVISION`.
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
        self._index = self._opened.index
        self._named_index = with_class_names(self._index, schema.row_features(self.manifest["factors"], weights=None))
        self._positions = np.arange(self._index.num_rows)
        self._readers: list[WeightReader] = []
        self._lists: dict[str, list[Any]] = {}

    @classmethod
    def sample(cls) -> "Zoo":
        """Eight real models of the mini zoo that come with the package."""
        return cls(SAMPLE)

    def __len__(self) -> int:
        return len(self._positions)

    def __repr__(self) -> str:
        runs, factors = len(set(self._column("run_id"))), ", ".join(self.factors)
        return f"Zoo({self.name!r}: {len(self)} rows of {runs} runs, factors {factors})"

    @property
    def factors(self) -> list[str]:
        """Names of the factor columns."""
        return [f"factor_{name}" for name in self.manifest["factors"]]

    @property
    def column_types(self) -> dict[str, type]:
        """Columns that `filter` takes -> the Python type of their values."""
        kinds: dict[str, type] = {}
        for column in self._named_index.schema:
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
        return self._column("model_id")

    def splits_of(self, model_ids: Sequence[str]) -> list[str]:
        """The split of each of these models."""
        splits = dict(zip(self.model_ids, self._column("split"), strict=True))
        return [splits[model_id] for model_id in model_ids]

    @property
    def index(self) -> "datasets.Dataset":
        """The rows without their weights."""
        import datasets

        table = self._index.drop_columns(["split"]).take(self._positions)
        return datasets.Dataset(pa.table(table.columns, schema=table.schema))

    def to_pandas(self, config: str = "index") -> "pandas.DataFrame":
        """A light config as a data frame, with names instead of class numbers; `index` follows the filter.

        Raises:
            ZooError: if the zoo has no such config.
        """
        if config == "index":
            return self._named_index.take(self._positions).to_pandas(integer_object_nulls=True)
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
        table = self._named_index
        mask = np.ones(table.num_rows, dtype=bool)
        for column, condition in conditions.items():
            if column not in table.column_names:
                raise ZooError(f"unknown column {column!r}: {did_you_mean(column, table.column_names)}")
            if column in ("stage", "head"):
                check_classes(column, condition)
            mask &= matches(table[column], column, condition)
        return self._select_rows(self._positions[mask[self._positions]])

    def rows(self, *, verify: bool = True) -> Iterator[Row]:
        """All rows in order, read-only; the weights of a row, float32 `[D]`, are read when they are first asked for.

        Args:
            verify: compare every row with its hash when it is first read.

        Raises:
            ZooError: naming the damaged row, when its weights are asked for.
        """
        for position in self._positions.tolist():
            columns = {name: values[position] for name, values in self._records.items()}
            yield Row(columns, partial(self._reader.read, position, verify=verify), verified=verify)

    def row(self, model_id: str) -> Row:
        """One row by id; its weights are read when they are first asked for.

        Raises:
            ZooError: for an unknown id, with the closest known one.
        """
        ids = self.model_ids
        if not isinstance(model_id, str):
            raise ZooError(f"model_id is {model_id!r}; expected the text in column `model_id`")
        if model_id not in ids:
            raise ZooError(f"{self.name} has no model {model_id!r}: {did_you_mean(model_id, ids)}")
        return next(self._select_rows(self._positions[[ids.index(model_id)]]).rows())

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
        tensors: Sequence[str] | None = None,
        shuffle: bool = False,
        seed: int = 0,
        num_workers: int = 1,
        rank: int = 0,
        world_size: int = 1,
        verify: bool = True,
        reuse: bool = False,
    ) -> Stream:
        """Batches of rows of one layout each, for a training loop.

        Args:
            batch_size: rows a batch; the last batch of a layout may be smaller.
            device: where `weights` go; for CUDA they are copied from pinned memory while an earlier batch is used.
            columns: columns of the index to hand out beside `weights`; all by default.
            tensors: names or patterns such as `blocks.*.attn.qkv.weight`: `weights` then holds only these, in the
                order of the layout, and `tensors` maps their names to views `[B, *shape]`. Other tensors are read
                only to hash a row the first time; `verify=False` avoids that too.
            shuffle: another order every epoch: row groups are permuted, and rows within windows of 256 MB. That is a
                permutation of all rows where a zoo is smaller than that, or a model has a row group of its own.
            seed: seed of the order.
            num_workers: threads that read ahead, a batch each; 0 reads when a batch is asked for.
            rank: number of this process among `world_size`. Ranks share the rows, as evenly as possible.
            world_size: number of processes.
            verify: compare every row with its hash when it is first read.
            reuse: hand out the same memory again, so that a batch's `weights` hold only until the next is asked for.

        Returns:
            A `Stream`, to iterate once an epoch, with `state_dict` and `load_state_dict`. A batch maps columns to
            values: `weights` is float32 `[B, D]`; `epoch` and `num_parameters` are int64 `[B]`; other numbers, which
            may be null, are float64 `[B]` with NaN for null; the rest are lists.

        Raises:
            ZooError: for a batch size below 1, a rank outside the world, an unknown column or tensor.

        Example:
            >>> batch = next(iter(Zoo.sample().filter(head="linear", stage="finetune").stream(batch_size=2)))
            >>> batch["weights"].shape, batch["test_accuracy"].dtype
            (torch.Size([2, 26922]), torch.float64)
        """
        return Stream(
            self._row_source(columns),
            batch_size=batch_size,
            device=device,
            tensors=tensors,
            shuffle=shuffle,
            seed=seed,
            num_workers=num_workers,
            rank=rank,
            world_size=world_size,
            verify=verify,
            reuse=reuse,
        )

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
        import datasets

        every_dataset = self._tables.read("probes", role)
        names = [] if every_dataset is None else sorted(set(every_dataset["dataset"].to_pylist()))
        if every_dataset is None or dataset not in names:
            raise ZooError(f"{self.name} carries no {role} images of {dataset!r}; it has them of: {names or 'none'}")
        table = every_dataset.filter(pc.equal(every_dataset["dataset"], dataset))
        record = self.manifest["images"].get(dataset)
        if record is None:
            raise ZooError(f"zoo.json of {self.name} does not say how images of {dataset!r} are prepared; {REPAIR}")
        images = datasets.Dataset(table).with_format("numpy")["image"][:]
        pixels = torch.from_numpy(np.stack([np.atleast_3d(image) for image in images])).permute(0, 3, 1, 2)
        return normalize(pixels, record["mean"], record["std"]), torch.tensor(table["label"].to_pylist())

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
        if len(self) != self._index.num_rows:
            raise ZooError(
                f"{len(self)} of {self._index.num_rows} rows are chosen: write them as a zoo of their own by"
                " `vitzoo_hf.convert.export.export_subset`, and push that"
            )
        return push(self.name, repository, private=private, tag=tag, dry_run=dry_run)

    @property
    def unfiltered(self) -> "Zoo":
        """All rows of the zoo, whatever was filtered."""
        return self._select_rows(np.arange(self._index.num_rows))

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
        light = light_columns(self._records, self.column_types, columns)
        return RowSource(self._positions, self._records["layout"], self.layouts, light, self._reader)

    @property
    def _reader(self) -> WeightReader:
        """The reader of the weights, shared by every zoo over the same files."""
        if not self._readers:
            records = self._records
            rows = RowTable(
                records["model_id"], np.array(records["num_parameters"]), records["dtype"], records["weights_sha256"]
            )
            self._readers.append(WeightReader(self._at_hand, self._opened.shards, rows))
        return self._readers[0]

    @property
    def _records(self) -> dict[str, list[Any]]:
        """Column -> the values of all rows, with names instead of class numbers."""
        if not self._lists:
            table = self._named_index.drop_columns(["split"])
            self._lists |= {name: table[name].to_pylist() for name in table.column_names}
        return self._lists

    def _column(self, name: str) -> list[Any]:
        return self._index[name].take(self._positions).to_pylist()
