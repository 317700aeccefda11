"""Arrow tables of rows: names for class numbers, conditions.

Tables of a zoo without weights: index, evaluations, pairs, probes; each compared with its hash when it is read.
"""

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vitzoo_hf.format import schema
from vitzoo_hf.format.files import FolderFiles, HubFiles
from vitzoo_hf.format.messages import REPAIR, did_you_mean, one_line
from vitzoo_hf.format.schema import ZooError

if TYPE_CHECKING:
    import datasets

    from vitzoo_hf.format.manifest import Manifest


EXPANSION = 1_000
"""Compressed files whose content is more times their size are refused; text that repeats comes to about 100."""


UNREPEATED = ("model_id", "run_id", "parent_id", "weights_sha256")
"""Texts of the index that hardly repeat; others are held as dictionaries, as a million rows would take 1 GB."""


class LightTables:
    """Reads light configs of a zoo.

    Args:
        files: files of the zoo.
        manifest: what `zoo.json` says.
    """

    def __init__(self, files: FolderFiles | HubFiles, manifest: "Manifest") -> None:
        self.files, self.manifest = files, manifest

    def names(self, config: str, split: str | None = None) -> list[str]:
        """The files of a config, or of one split of it."""
        start = f"{config}/{split}-" if split else f"{config}/"
        return sorted(name for name in self.manifest["files"] if name.startswith(start))

    def read(self, config: str, split: str | None = None, *, coded: bool = False) -> pa.Table | None:
        """A config, or one split of it; None where the zoo has no such files.

        Args:
            config: name of the config.
            split: name of the split; all of them by default.
            coded: hold columns of texts that repeat as Arrow dictionaries.

        Raises:
            ZooError: if a file cannot be read or does not match its hash.
        """
        tables = [self._read(name, coded=coded) for name in self.names(config, split)]
        return joined(tables, f"{config} of {self.files.name}") if tables else None

    def index(self) -> pa.Table:
        """The index of all splits, one behind the other, with a column `split`.

        Raises:
            ZooError: if there is none, or it is damaged.
        """
        tables = []
        for split in schema.SPLITS:
            table = self.read("index", split, coded=True)
            if table is not None and "split" in table.column_names:
                raise ZooError(f"the index of {self.files.name} is damaged: it has a column 'split'; {REPAIR}")
            if table is not None:
                # as text, one for each row would take as long as reading the index
                splits = pa.DictionaryArray.from_arrays(np.zeros(table.num_rows, np.int32), [split])
                tables.append(table.append_column("split", splits))
        if not tables:
            raise ZooError(f"{self.files.name} has no rows: its index is missing; {REPAIR}")
        return joined(tables, f"the index of {self.files.name}")

    def _read(self, name: str, *, coded: bool) -> pa.Table:
        try:
            data = self.files.path(name).read_bytes()
        except OSError as error:
            raise ZooError(f"{name} of {self.files.name} cannot be read ({one_line(error)}); {REPAIR}") from None
        entry = self.manifest["files"][name]
        # a zoo without `zoo.json` has no hashes; where there is one, `parse_manifest` refuses an entry without a hash
        if "sha256" in entry and hashlib.sha256(data).hexdigest() != entry["sha256"]:
            raise ZooError(f"{name} of {self.files.name} does not match its hash: it is damaged; {REPAIR}")
        return read_table(data, f"{name} of {self.files.name}", coded=coded)


def joined(tables: list[pa.Table], what: str) -> pa.Table:
    """One table of several that have equal columns.

    Raises:
        ZooError: if their columns differ.
    """
    try:
        return pa.concat_tables(tables)
    except pa.ArrowException as error:
        raise ZooError(
            f"{what} is damaged: its files differ in their columns ({one_line(error)}); {REPAIR}"
        ) from None


def read_table(data: bytes, what: str, *, coded: bool = False) -> pa.Table:
    """Read a light Parquet file within limits.

    Args:
        data: content of the file.
        what: name of the file, for messages.
        coded: hold columns of texts that repeat as Arrow dictionaries.

    Raises:
        ZooError: if it is no Parquet, or a few bytes stand for very many.
    """
    try:
        file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
        groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
        size = sum(
            group.column(number).total_uncompressed_size for group in groups for number in range(group.num_columns)
        )
        if max(file.metadata.num_rows, size // EXPANSION) > len(data):
            raise ZooError(f"{what} is damaged: its {len(data)} bytes stand for {size}; {REPAIR}")
        if coded:
            texts = [column.name for column in file.schema_arrow if pa.types.is_string(column.type)]
            repeated = [name for name in texts if name not in UNREPEATED]
            file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True, read_dictionary=repeated)
        # of small tables, starting threads costs more than it saves
        table = file.read(use_threads=file.metadata.num_rows > 100_000)
        # values that do not fit their type, such as text that is not UTF-8, would fail where they are used
        table.validate(full=True)
    except (OSError, pa.ArrowException, ValueError, OverflowError) as error:
        if isinstance(error, ZooError):
            raise
        raise ZooError(f"{what} cannot be read ({one_line(error)}); {REPAIR}") from None
    return table


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows of a data frame, with None for every missing value."""
    # object first: None in a float column would turn back into NaN
    return frame.astype(object).where(frame.notna(), None).to_dict("records")


def features_of(table: pa.Table) -> "datasets.Features":
    """The Hugging Face `Features` kept in a table's metadata."""
    import datasets

    return datasets.Features.from_arrow_schema(table.schema)


def with_class_names(table: pa.Table, features: Mapping[str, object]) -> pa.Table:
    """The table with class numbers replaced by their names."""
    for position, column in enumerate(table.column_names):
        names = getattr(features.get(column), "names", None)
        if names and pa.types.is_integer(table[column].type):
            table = table.set_column(position, column, pa.array(names).take(table[column].combine_chunks()))
    return table.replace_schema_metadata(None)


def check_classes(column: str, condition: object) -> None:
    """Refuse a name that the class column does not have.

    Raises:
        ZooError: naming the closest known one.
    """
    known = {"stage": schema.STAGES, "head": schema.HEADS}[column]
    for value in condition if isinstance(condition, list | tuple) else [condition]:
        if value not in known:
            raise ZooError(f"unknown {column} {value!r}: {did_you_mean(str(value), known)}")


def matches(values: pa.ChunkedArray, column: str, condition: object) -> np.ndarray:
    """Which values meet the condition; null never does, except for the condition None.

    Args:
        values: a column.
        column: name of the column, for the error.
        condition: a value, a list of values, or a pair `(low, high)`.

    Raises:
        ZooError: if the condition does not fit the column's type.
    """
    if isinstance(condition, tuple) and len(condition) == 2 and None not in condition and condition[0] > condition[1]:
        raise ZooError(f"{column}={condition!r} holds nothing: the first of a pair is the lower end")
    try:
        if condition is None:
            mask = pc.is_null(values)
        elif isinstance(condition, tuple):
            low, high = condition
            if (low is not None and low != low) or (high is not None and high != high):
                raise ValueError
            # an open range still excludes null
            mask = pc.is_valid(values)
            if low is not None:
                mask = pc.and_(mask, pc.greater_equal(values, _end(low, values.type)))
            if high is not None:
                mask = pc.and_(mask, pc.less_equal(values, _end(high, values.type)))
        else:
            wanted = list(condition) if isinstance(condition, list | set) else [condition]
            # NaN equals nothing: a filter by it would silently give no rows
            if any(value != value for value in wanted):
                raise ValueError
            kind = pa.array(wanted).type if wanted else values.type
            # pyarrow would cast "3" to 3 and 3 to "3"
            if pa.types.is_string(kind) != pa.types.is_string(values.type):
                raise TypeError
            held = pa.array(wanted, values.type)
            # pyarrow cuts 3.5 to 3
            if pa.types.is_integer(values.type) and held.to_pylist() != list(wanted):
                raise TypeError
            mask = pc.is_in(values, held)
    except (TypeError, ValueError, OverflowError, pa.ArrowException):
        raise ZooError(
            f"{column}={condition!r} does not fit the column's type {values.type}:"
            " give a value, a list of values, or a pair (low, high)"
        ) from None
    return mask.fill_null(False).to_numpy()


def _end(value: object, kind: pa.DataType) -> pa.Scalar:
    """The end of a range, rounded as the column's values were: 0.9 in a float32 column is the float32 next to 0.9."""
    return pa.scalar(value, kind) if pa.types.is_floating(kind) else pa.scalar(value)


def parse_condition(text: str, types: Mapping[str, type], option: str = "--where") -> tuple[str, object]:
    """`COLUMN=VALUE`, `COLUMN=A,B` or `COLUMN=LOW..HIGH` as a column and a condition of its type.

    >>> parse_condition("factor_lr=1e-3..", {"factor_lr": float})
    ('factor_lr', (0.001, None))
    >>> parse_condition("head=linear,mlp", {"head": str})
    ('head', ['linear', 'mlp'])

    Raises:
        ZooError: for an unknown column, or a value that is not of the column's type.
    """
    column, equals, value = text.partition("=")
    if not equals:
        raise ZooError(f"{option} {text!r}: expected COLUMN=VALUE, such as factor_lr=0.001")
    if column not in types:
        raise ZooError(f"{option}: unknown column {column!r}: {did_you_mean(column, types)}")
    parse = _parse_bool if types[column] is bool else types[column]
    try:
        # texts may hold two dots: only numbers have ranges
        if ".." in value and parse is not str:
            low, _, high = value.partition("..")
            return column, (parse(low) if low else None, parse(high) if high else None)
        entries = [parse(entry) for entry in value.split(",")]
    except ValueError:
        raise ZooError(
            f"{option} {text!r}: {value!r} is not a value of {column}, which is {types[column].__name__}"
        ) from None
    return column, entries if len(entries) > 1 else entries[0]


def _parse_bool(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError(text)
    return text.lower() == "true"
