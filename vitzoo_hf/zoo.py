"""Open a zoo: its index, a filter over factors, single models, a stream of weights.

The index is read at once and is small; weights are read row group by row group, only those asked for, and every
row is checked against its hash. A zoo is a folder, or the id of a dataset on the Hub, whose shards are then
fetched when they are first needed.
"""

import copy
import hashlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

from vitzoo_hf import schema
from vitzoo_hf.locate import REPAIR, locator, one_line, read_layouts, read_manifest
from vitzoo_hf.rebuild import reconstruct
from vitzoo_hf.row_tables import check_classes, features_of, matches, vector_of, with_class_names
from vitzoo_hf.schema import ZooError, did_you_mean
from vitzoo_hf.stream import RowSource, Stream

if TYPE_CHECKING:
    import datasets
    import pandas

SAMPLE = Path(__file__).parent / "sample"


class Zoo:
    """A published population of models.

    Args:
        path: a folder written by `vitzoo pack`, or a dataset id such as `ModelZoos/vit-zoo`.
        revision: branch, tag or commit of a dataset on the Hub.

    Raises:
        ZooError: if there is no zoo, it has a newer format, or a file is missing or has the wrong length.

    Example:
        >>> zoo = Zoo.sample()
        >>> len(zoo), len(zoo.filter(stage="finetune", factor_optimizer="adamw"))
        (8, 4)
    """

    def __init__(self, path: str | Path, *, revision: str | None = None) -> None:
        self.name = str(path)
        self._locate = locator(path, revision)
        self.manifest = read_manifest(self._locate(schema.MANIFEST))
        self._check_sizes()
        self.layouts = read_layouts(self._locate(schema.LAYOUTS))
        self._splits = [split for split in schema.SPLITS if self._files("index", split)]
        self._index = self._read_index()
        self._positions = np.arange(self._index.num_rows)

    @classmethod
    def sample(cls) -> "Zoo":
        """Eight real models of the mini zoo that come with the package."""
        return cls(SAMPLE)

    def __len__(self) -> int:
        return len(self._positions)

    def __repr__(self) -> str:
        runs = len(set(self._column("run_id")))
        return f"Zoo({self.name!r}: {len(self)} rows of {runs} runs, factors {', '.join(self.factors)})"

    @property
    def factors(self) -> list[str]:
        """Names of the factor columns."""
        return [f"factor_{name}" for name in self.manifest["factors"]]

    @property
    def column_types(self) -> dict[str, type]:
        """Columns that `filter` takes -> the Python type of their values."""
        kinds: dict[str, type] = {}
        for column in with_class_names(self._index, self._features).schema:
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
        return list(self._splits)

    @property
    def configs(self) -> list[str]:
        """Configs of the dataset, `weights` first."""
        held = {name.split("/")[0] for name in self.manifest["files"] if "/" in name}
        return [config for config in schema.CONFIGS if config in held]

    @property
    def model_ids(self) -> list[str]:
        """Ids of the rows, in order."""
        return self._column("model_id")

    def splits_of(self, model_ids: Sequence[str]) -> list[str]:
        """The split each of these models is in."""
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
            return with_class_names(self._index, self._features).take(self._positions).to_pandas()
        known = [held for held in self.configs if held != "weights"]
        if config not in known:
            hint = "; `vitzoo evaluate` writes it" if config in ("evaluations", "pairs") else ""
            raise ZooError(f"{self.name} has no config {config!r}{hint}: {did_you_mean(config, known)}")
        tables = [self._read(file) for file in self._files(config)]
        table = pa.concat_tables(tables)
        return with_class_names(table, features_of(table)).to_pandas()

    def filter(self, **conditions: Any) -> "Zoo":
        """The rows that meet every condition, as a zoo over the same files.

        Args:
            conditions: column -> a value; a list of values; or a pair `(low, high)`, a range including both ends,
                where None leaves an end open. `split` counts as a column.

        Raises:
            ZooError: for an unknown column, a value of the wrong type, or an unknown class name.

        Example:
            >>> zoo = Zoo.sample().filter(factor_lr=[1e-3, 3e-3], test_accuracy=(0.9, None))
            >>> all(row["test_accuracy"] >= 0.9 for row in zoo.index)
            True
        """
        table = with_class_names(self._index, self._features)
        mask = np.ones(table.num_rows, dtype=bool)
        for column, condition in conditions.items():
            if column not in table.column_names:
                raise ZooError(f"unknown column {column!r}: {did_you_mean(column, table.column_names)}")
            if column in ("stage", "head"):
                check_classes(column, condition)
            mask &= matches(table[column], column, condition)
        return self._at(self._positions[mask[self._positions]])

    def rows(self, *, verify: bool = True) -> Iterator[dict[str, Any]]:
        """Every row with its weights, a float32 array `[D]`; class columns as names.

        Args:
            verify: compare every row with its hash.

        Raises:
            ZooError: naming shard and row of the first damaged one.
        """
        for position, weights in self._weights(self._positions):
            row = self._names_table.slice(position, 1).to_pylist()[0]
            yield self._checked(row, weights, verify) | {"weights": weights}

    def row(self, model_id: str) -> dict[str, Any]:
        """One row with its weights.

        Raises:
            ZooError: for an unknown id, with the closest known one.
        """
        ids = self.model_ids
        if model_id not in ids:
            raise ZooError(f"{self.name} has no model {model_id!r}: {did_you_mean(model_id, ids)}")
        return next(self._at(self._positions[[ids.index(model_id)]]).rows())

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
        shuffle: bool = False,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        verify: bool = True,
    ) -> Stream:
        """Batches of rows of one layout each, for a training loop.

        Args:
            batch_size: rows a batch; the last batch of a layout may be smaller.
            device: where `weights` go.
            shuffle: another order every epoch: row groups are permuted, and rows within windows of 256 MB. That is a
                permutation of all rows where a zoo is smaller than that, or a model has a row group of its own.
            seed: of the order.
            rank: this process among `world_size`; each reads row groups of its own.
            world_size: number of processes.
            verify: compare every row with its hash.

        Returns:
            A `Stream`, to iterate once an epoch, with `state_dict` and `load_state_dict`. A batch maps columns to
            values: `weights` is float32 `[B, D]`; `epoch` and `num_parameters` are int64 `[B]`; other numbers, which
            may be null, are float64 `[B]` with NaN for null; the rest are lists.

        Raises:
            ZooError: for a batch size below 1 or a rank outside the world.

        Example:
            >>> batch = next(iter(Zoo.sample().filter(head="linear", stage="finetune").stream(batch_size=2)))
            >>> batch["weights"].shape, batch["test_accuracy"].dtype
            (torch.Size([2, 26922]), torch.float64)
        """
        groups = [
            self._positions[(self._positions >= start) & (self._positions < start + count)]
            for start, _, _, count in self._row_groups
        ]
        source = RowSource(
            groups=[group for group in groups if len(group)],
            layouts=self._index["layout"].to_pylist(),
            row_bytes=[4 * count for count in self._index["num_parameters"].to_pylist()],
            model_ids=self._index["model_id"].to_pylist(),
            read=lambda positions: self._at(positions).rows(verify=verify),
            schema=self._names_table.schema,
        )
        return Stream(
            source,
            batch_size=batch_size,
            device=device,
            shuffle=shuffle,
            seed=seed,
            rank=rank,
            world_size=world_size,
        )

    def probes(self, dataset: str, role: str = "test") -> tuple[Tensor, Tensor]:
        """Held-out images of a dataset as its models are fed them, and their labels.

        Args:
            dataset: a `dataset` of the index.
            role: `test`, or `selection` for choosing models.

        Returns:
            float32 `[N, C, H, W]`, normalised, and int64 `[N]`.

        Raises:
            ZooError: if the zoo does not carry them.
        """
        import datasets

        files = self._files("probes", role)
        held = pa.concat_tables([self._read(file) for file in files]) if files else None
        table = held.filter(pc.equal(held["dataset"], dataset)) if held is not None else None
        if table is None or table.num_rows == 0:
            known = sorted(set(held["dataset"].to_pylist())) if held is not None else []
            raise ZooError(f"{self.name} carries no {role} images of {dataset!r}; it has them of: {known}")
        record = self.manifest["images"].get(dataset)
        if record is None:
            raise ZooError(f"zoo.json of {self.name} does not say how images of {dataset!r} are prepared; {REPAIR}")
        images = datasets.Dataset(table).with_format("numpy")["image"][:]
        pixels = torch.from_numpy(np.stack([np.atleast_3d(image) for image in images])).permute(0, 3, 1, 2)
        normalised = (pixels.float() / 255 - record["mean"]) / record["std"]
        return normalised, torch.tensor(table["label"].to_pylist())

    def probe_rows(self, role: str) -> list[dict[str, Any]]:
        """Rows of the `probes` config as they are stored, images still encoded."""
        tables = [self._read(file) for file in self._files("probes", role)]
        return pa.concat_tables(tables).to_pylist() if tables else []

    @property
    def blueprint_text(self) -> str:
        """The blueprint the zoo was made from."""
        return self._locate("blueprint.yaml").read_text(encoding="utf-8")

    def _at(self, positions: np.ndarray) -> "Zoo":
        """A zoo over the same files with only the rows at these positions of the index."""
        chosen = copy.copy(self)
        chosen._positions = positions
        return chosen

    def _checked(self, row: dict[str, Any], weights: np.ndarray, verify: bool) -> dict[str, Any]:
        layout = self.layouts.get(row["layout"])
        if layout is None or layout.num_parameters != len(weights) or row["num_parameters"] != len(weights):
            raise ZooError(
                f"{row['model_id']} has {len(weights)} weights, not the {row['num_parameters']} of its layout"
                f" {row['layout']}: the shard is damaged; {REPAIR}"
            )
        if verify and schema.weights_sha256(weights) != row["weights_sha256"]:
            raise ZooError(f"the weights of {row['model_id']} do not match their hash; {REPAIR}")
        return row

    def _weights(self, positions: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """`(position, vector)` for ascending positions, each row group read once."""
        wanted = np.asarray(positions)
        for start, file, group, count in self._row_groups:
            chosen = wanted[(wanted >= start) & (wanted < start + count)]
            if len(chosen) == 0:
                continue
            try:
                table = self._open(file).read_row_group(group, columns=["model_id", "weights"])
                ids, vectors = table["model_id"].to_pylist(), table["weights"].combine_chunks()
                vectors.validate(full=False)
            except (OSError, pa.ArrowException) as error:
                raise ZooError(f"{file}, row group {group}, cannot be read ({one_line(error)}); {REPAIR}") from None
            for position in chosen:
                if ids[position - start] != self._index["model_id"][int(position)].as_py():
                    raise ZooError(f"{file}, row group {group}, does not hold the rows the index says; {REPAIR}")
                yield int(position), vector_of(vectors[int(position - start)])

    @cached_property
    def _row_groups(self) -> list[tuple[int, str, int, int]]:
        """`(first position, file, row group, rows)` over all shards, in the order of the index."""
        groups, start = [], 0
        for split in self._splits:
            for file in self._files("weights", split):
                metadata = self._open(file).metadata
                for group in range(metadata.num_row_groups):
                    count = metadata.row_group(group).num_rows
                    groups.append((start, file, group, count))
                    start += count
        if start != self._index.num_rows:
            raise ZooError(f"{self.name}: {start} rows of weights for {self._index.num_rows} of the index; {REPAIR}")
        return groups

    @cached_property
    def _features(self) -> Any:
        return schema.row_features(self.manifest["factors"], weights=None)

    @cached_property
    def _names_table(self) -> pa.Table:
        return with_class_names(self._index, self._features).drop_columns(["split"])

    def _read_index(self) -> pa.Table:
        tables = []
        for split in self._splits:
            for file in self._files("index", split):
                table = self._read(file)
                tables.append(table.append_column("split", pa.array([split] * table.num_rows)))
        if not tables:
            raise ZooError(f"{self.name} has no rows: its index is missing; {REPAIR}")
        return pa.concat_tables(tables)

    def _files(self, config: str, split: str | None = None) -> list[str]:
        start = f"{config}/{split}-" if split else f"{config}/"
        return sorted(name for name in self.manifest["files"] if name.startswith(start))

    def _read(self, file: str) -> pa.Table:
        """A light table, whose file is compared with its hash in the manifest first."""
        try:
            data = self._locate(file).read_bytes()
        except OSError as error:
            raise ZooError(f"{file} of {self.name} cannot be read ({one_line(error)}); {REPAIR}") from None
        if hashlib.sha256(data).hexdigest() != self.manifest["files"][file].get("sha256"):
            raise ZooError(f"{file} of {self.name} does not match its hash: it is damaged; {REPAIR}")
        return pq.read_table(pa.BufferReader(data))

    def _open(self, file: str) -> pq.ParquetFile:
        try:
            return pq.ParquetFile(self._locate(file), page_checksum_verification=True)
        except (OSError, pa.ArrowException) as error:
            raise ZooError(f"{file} of {self.name} cannot be read ({one_line(error)}); {REPAIR}") from None

    def _check_sizes(self) -> None:
        folder = self._locate(schema.MANIFEST).parent
        for name, entry in self.manifest["files"].items():
            file = folder / name
            if not Path(self.name).is_dir():
                continue
            if not file.is_file():
                raise ZooError(f"{name} of {self.name} is missing; {REPAIR}")
            if file.suffix == ".parquet" and file.stat().st_size != entry["bytes"]:
                raise ZooError(f"{name} has {file.stat().st_size} bytes, not {entry['bytes']}: it was cut; {REPAIR}")

    def _column(self, name: str) -> list[Any]:
        return self._index[name].take(self._positions).to_pylist()
