"""Count what a zoo's folder holds, from its light tables and the footers of its shards.

No weights are read: the cost is that of the index, and shards need not be in the folder.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vitzoo_hf.format import schema
from vitzoo_hf.format.atomic import read_json
from vitzoo_hf.format.schema import ZooError

CLASSES = {"stage": schema.STAGES, "head": schema.HEADS}

Columns = dict[str, Any]
"""Column -> value of a row of a light table."""


@dataclass(frozen=True)
class DataFile:
    """A Parquet file of a zoo.

    Attributes:
        path: path within the zoo's folder.
        rows: number of rows.
        size: number of bytes.
    """

    path: str
    rows: int
    size: int

    @property
    def config(self) -> str:
        """Config of the file, which is the name of its folder."""
        return self.path.split("/")[0]

    @property
    def split(self) -> str:
        """Split of the file, with which its name begins."""
        return self.path.split("/")[1].split("-")[0]


@dataclass(frozen=True)
class Facts:
    """Facts about a zoo's folder for its card.

    Attributes:
        folder: the zoo.
        files: the Parquet files of the zoo, in the order of configs and splits.
        rows: rows of the index, with a `split`, names instead of class numbers, and parsed provenance.
    """

    folder: Path
    files: list[DataFile]
    rows: list[Columns]

    @classmethod
    def read(cls, folder: Path) -> "Facts":
        """Read the facts of a folder; weight shards that are not in it are counted by `shards.json`.

        Raises:
            ZooError: if a table is damaged or missing, or `index` and `weights` differ in their rows.
        """
        try:
            files = _data_files(folder)
            index = [file for file in files if file.config == "index"]
            facts = cls(folder, files, [row for file in index for row in _index_rows(folder / file.path, file.split)])
            encoding = facts.encoding if facts.rows else None
        except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
            raise ZooError(
                f"no card can be written for {folder}: {' '.join(str(error).split())[:200]}; pack the zoo again"
            ) from None
        counts = {config: facts.split_rows(config) for config in ("index", "weights")}
        if encoding is None or counts["index"] != counts["weights"]:
            raise ZooError(
                f"no card can be written for {folder}: `weights` has rows {counts['weights']}, `index`"
                f" {counts['index']}; pack the zoo again"
            )
        return facts

    @cached_property
    def configs(self) -> dict[str, dict[str, list[DataFile]]]:
        """Config -> split -> files."""
        configs: dict[str, dict[str, list[DataFile]]] = {}
        for file in self.files:
            configs.setdefault(file.config, {}).setdefault(file.split, []).append(file)
        return configs

    def split_rows(self, config: str) -> dict[str, int]:
        """Split -> number of rows of a config; empty for a config that the zoo does not have."""
        splits = self.configs.get(config, {})
        return {split: sum(file.rows for file in files) for split, files in splits.items()}

    @cached_property
    def runs(self) -> dict[str, list[Columns]]:
        """Run -> its rows, epochs ascending."""
        runs: dict[str, list[Columns]] = {}
        for row in self.rows:
            runs.setdefault(row["run_id"], []).append(row)
        return {run_id: sorted(rows, key=lambda row: row["epoch"]) for run_id, rows in runs.items()}

    @cached_property
    def finals(self) -> list[Columns]:
        """The last row of every run."""
        return [rows[-1] for rows in self.runs.values()]

    @cached_property
    def encoding(self) -> str:
        """Encoding of the weights: `list` or `binary`."""
        for file in self.files:
            if file.config == "weights" and (self.folder / file.path).is_file():
                kind = pq.read_schema(self.folder / file.path).field("weights").type
                return "list" if pa.types.is_list(kind) or pa.types.is_large_list(kind) else "binary"
        # no shard is here to ask: the rule by which they were written
        return "list" if self.largest <= schema.LIST_LIMIT and self.dtypes == ["float32"] else "binary"

    @cached_property
    def largest(self) -> int:
        """Number of parameters of the largest row."""
        return max(row["num_parameters"] for row in self.rows)

    @cached_property
    def dtypes(self) -> list[str]:
        """Number formats of the stored weights."""
        return sorted({row["dtype"] for row in self.rows})

    @cached_property
    def accuracies(self) -> list[Columns]:
        """The last rows of runs with a test accuracy, on the dataset that most of these runs were trained on."""
        measured = [row for row in self.finals if row["test_accuracy"] is not None]
        if not measured:
            return []
        # accuracies on different images cannot be averaged
        (dataset, _), *_ = Counter(row["dataset"] for row in measured).most_common(1)
        return [row for row in measured if row["dataset"] == dataset]

    def recipes(self, stage: str) -> list[dict[str, object]]:
        """List the recipes of a stage's runs, where their provenance has one."""
        recipes = [row["provenance"].get("recipe") for row in self.finals if row["stage"] == stage]
        return [recipe for recipe in recipes if isinstance(recipe, dict)]

    def versions(self) -> dict[str, list[str]]:
        """List the versions of each software that runs were trained with."""
        used: dict[str, set[str]] = {}
        for row in self.finals:
            versions = row["provenance"].get("versions")
            for name, version in versions.items() if isinstance(versions, Mapping) else ():
                used.setdefault(str(name), set()).add(str(version))
        return {name: sorted(used[name]) for name in sorted(used)}

    def column_types(self) -> dict[str, str]:
        """Name the type of each column of a whole row."""
        first = next(file for file in self.files if file.config == "index")
        types = {field.name: str(field.type) for field in pq.read_schema(self.folder / first.path)}
        types |= {name: f"class: {', '.join(names)}" for name, names in CLASSES.items() if name in types}
        return types | {"weights": "list of float32" if self.encoding == "list" else "binary"}

    def table(self, config: str, columns: Iterable[str]) -> list[Columns]:
        """Read columns of all rows of a light config; a column that its files lack is None."""
        files = [self.folder / file.path for file in self.files if file.config == config]
        empty = dict.fromkeys(columns)
        return [
            empty | row
            for file in files
            for row in pq.read_table(
                file, columns=[name for name in empty if name in pq.read_schema(file).names]
            ).to_pylist()
        ]

    @cached_property
    def probes(self) -> dict[str, dict[str, int]]:
        """Split of the probe images -> dataset -> number of images."""
        return {
            split: dict(value_counts(self._column("probes", split, "dataset"), "dataset"))
            for split in self.configs.get("probes", {})
        }

    def _column(self, config: str, split: str, name: str) -> list[Columns]:
        files = self.configs[config][split]
        return [row for file in files for row in pq.read_table(self.folder / file.path, columns=[name]).to_pylist()]

    def digest(self, config: str) -> str:
        """Hash the content of a config; of weights, their hashes in the index."""
        digest = hashlib.sha256()
        for file in self.files:
            if file.config == config:
                digest.update(f"{file.path} {file.rows} {file.size}\n".encode())
            # shards may be absent or large; the index holds `weights_sha256` of every row
            if file.config == ("index" if config == "weights" else config):
                digest.update((self.folder / file.path).read_bytes())
        # 64 bits tell versions of one zoo apart; the card stays readable
        return digest.hexdigest()[:16]


def _data_files(folder: Path) -> list[DataFile]:
    # first from `shards.json`, so that a folder without its shards can be described
    shards = read_json(folder / schema.SHARDS) if (folder / schema.SHARDS).is_file() else {}
    files = {name: DataFile(name, entry["rows"], entry["bytes"]) for name, entry in shards.items()}
    for file in folder.glob("*/*.parquet"):
        # hidden folders are the temporary ones of a config that is being written
        if not file.parent.name.startswith("."):
            name = file.relative_to(folder).as_posix()
            files[name] = DataFile(name, pq.read_metadata(file).num_rows, file.stat().st_size)
    # folders list files in any order, and the card must not depend on it
    return sorted(files.values(), key=_order)


def _order(file: DataFile) -> tuple[int, str, int, str]:
    return (*position(file.config, schema.CONFIGS), *position(file.split, (*schema.SPLITS, "selection")))


def position(name: str, known: tuple[str, ...]) -> tuple[int, str]:
    """Make a key that sorts known names in their order, and other names behind them."""
    return (known.index(name) if name in known else len(known), name)


def _index_rows(file: Path, split: str) -> list[Columns]:
    rows = pq.read_table(file).to_pylist()
    # rows of a run have equal provenance: it is parsed once, and shared
    parsed: dict[str | None, Columns] = {}
    for row in rows:
        text = row["provenance"]
        if text not in parsed:
            value = json.loads(text) if text else {}
            parsed[text] = value if isinstance(value, dict) else {}
        # the index stores class labels as numbers, as `datasets` does
        named = {name: names[row[name]] for name, names in CLASSES.items() if isinstance(row[name], int)}
        row |= named | {"provenance": parsed[text], "split": split}
    return rows


def value_counts(rows: Iterable[Columns], column: str) -> list[tuple[Any, int]]:
    """Count the values of a column, ascending, None last."""
    counts = Counter(row[column] for row in rows)
    # None does not compare with numbers or text
    return sorted(counts.items(), key=lambda entry: (entry[0] is None, 0 if entry[0] is None else entry[0]))
