"""Checks of the columns of an index, a column at a time: a million rows take less than a second."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc

from vitzoo_hf.format import schema
from vitzoo_hf.format.encoding import ITEM_BYTES
from vitzoo_hf.format.gate.architecture_args import check_size, parse_args
from vitzoo_hf.format.gate.values import shown
from vitzoo_hf.format.messages import REPAIR
from vitzoo_hf.format.schema import ZooError

if TYPE_CHECKING:
    from vitzoo_hf.format.layout import Layout

LONGEST_ID = 255
"""Most file systems limit names to so many bytes, and exported files are named by ids."""
REQUIRED = (
    *("model_id", "run_id", "epoch", "dataset", "architecture", "architecture_args", "head"),
    *("num_parameters", "layout", "weights_sha256", "dtype"),
)
"""Columns that are never null."""
ARCHITECTURE = ("architecture", "architecture_args", "head", "head_hidden", "layout")
MOST_ARCHITECTURES = 100_000


def check_index(table: pa.Table, factors: Mapping[str, str], layouts: "Mapping[str, Layout]", file: str) -> None:
    """Check types and values of an index.

    Args:
        table: the rows.
        factors: generating factor -> type.
        layouts: fingerprint -> layout.
        file: what is read, for messages.

    Raises:
        ZooError: naming the column, the first row that is wrong, and its value.
    """
    _check_types(table, factors, file)
    check = _Columns(table, file)
    run_id, model_id = schema.RUN_ID.pattern, schema.MODEL_ID.pattern
    check.text("model_id", model_id, "RUN@EPOCH of letters, digits and . _ = + -")
    check.text("run_id", run_id, "letters, digits and . _ = + -, a letter or digit first")
    check.text("parent_id", model_id, "RUN@EPOCH of letters, digits and . _ = + -")
    check.text("weights_sha256", "[0-9a-f]{64}", "64 hexadecimal digits")
    check.text("architecture", r"[A-Za-z0-9][A-Za-z0-9_.\-]{0,199}", "a name of timm")
    check.unique("model_id")
    check.classes("stage", schema.STAGES)
    check.classes("head", schema.HEADS)
    check.members("dtype", list(ITEM_BYTES), f"one of {', '.join(ITEM_BYTES)}")
    check.between("epoch", 0, 2**31 - 1)
    check.between("head_hidden", 1, 2**31 - 1)
    _check_layouts(check, layouts)
    _check_architectures(table, layouts, file)


def _check_types(table: pa.Table, factors: Mapping[str, str], file: str) -> None:
    if len(set(table.column_names)) != table.num_columns:
        raise ZooError(f"{file} is damaged: it has a column twice; {REPAIR}")
    expected = schema.row_features(factors, weights=None).arrow_schema
    for field in expected:
        if field.name not in table.column_names:
            # all of them are columns of format 1; one that is added later must be let through here
            raise ZooError(f"{file} is damaged: it lacks the column {field.name!r}; {REPAIR}")
        column = table[field.name]
        # names instead of class numbers, as other writers store them
        kind = value_type(column)
        if kind != field.type and not (field.name in ("stage", "head") and pa.types.is_string(kind)):
            raise ZooError(
                f"{file} is damaged: column {field.name!r} is of type {' '.join(str(kind).split())[:60]};"
                f" expected {field.type}; {REPAIR}"
            )
        if field.name in REQUIRED and column.null_count:
            raise ZooError(
                f"{file} is damaged: `{field.name}` is null in {column.null_count} rows; expected a value; {REPAIR}"
            )


def value_type(column: pa.ChunkedArray) -> pa.DataType:
    """The type of the values of a column, which may be dictionary-encoded."""
    return column.type.value_type if pa.types.is_dictionary(column.type) else column.type


class _Columns:
    """Refuses the first value of a column that breaks a rule; null is left to the check of types."""

    def __init__(self, table: pa.Table, file: str) -> None:
        self.table, self.file = table, file

    def text(self, name: str, pattern: str, expected: str) -> None:
        if name in self.table.column_names:
            column = self.table[name].cast(pa.string())
            # \z, not $, which also matches before a line break at the end
            matching = pc.match_substring_regex(column, rf"\A(?:{pattern})\z")
            self._refuse(name, pc.and_(matching, pc.less_equal(pc.binary_length(column), LONGEST_ID)), expected)

    def unique(self, name: str) -> None:
        column = self.table[name]
        if pc.count_distinct(column).as_py() != len(column):
            counts = pc.value_counts(column)
            repeated = counts.filter(pc.greater(counts.field("counts"), 1))[0]
            raise ZooError(
                f"{self.file} is damaged: {repeated['counts'].as_py()} rows have the {name}"
                f" {shown(repeated['values'].as_py())}; expected one; {REPAIR}"
            )

    def classes(self, name: str, names: tuple[str, ...]) -> None:
        if name in self.table.column_names:
            if pa.types.is_string(value_type(self.table[name])):
                self.members(name, list(names), f"one of {', '.join(names)}")
            else:
                self.between(name, 0, len(names) - 1)

    def members(self, name: str, values: list[str], expected: str) -> None:
        column = self.table[name]
        known = pc.is_in(column, value_set=pa.array(values, value_type(column)))
        self._refuse(name, pc.or_(known, pc.is_null(column)), expected)

    def between(self, name: str, low: int, high: int) -> None:
        if name in self.table.column_names:
            column = self.table[name]
            within = pc.and_(pc.greater_equal(column, low), pc.less_equal(column, high))
            self._refuse(name, within, f"{low} to {high}")

    def _refuse(self, name: str, right: pa.ChunkedArray, expected: str) -> None:
        """Raise an error for the first row where `right` is false; null is right."""
        wrong = pc.index(right, False).as_py()
        if wrong >= 0:
            raise ZooError(
                f"{self.file} is damaged: `{name}` of row {wrong} is {shown(self.table[name][wrong].as_py())};"
                f" expected {expected}; {REPAIR}"
            )


def _check_layouts(check: _Columns, layouts: "Mapping[str, Layout]") -> None:
    """Compare layout and length of each row with `layouts.json`."""
    table = check.table
    keys, lengths = list(layouts), [layout.num_parameters for layout in layouts.values()]
    numbers = pc.index_in(table["layout"], value_set=pa.array(keys, pa.string()))
    held = pc.take(pa.array(lengths, pa.int64()), numbers)
    wrong = pc.index(pc.fill_null(pc.equal(held, table["num_parameters"]), False), False).as_py()
    if wrong < 0:
        return
    row = {name: table[name][wrong].as_py() for name in ("model_id", "layout", "num_parameters")}
    layout = layouts.get(row["layout"])
    expected = "lacks" if layout is None else f"gives {layout.num_parameters} weights"
    raise ZooError(
        f"{check.file} is damaged: {row['model_id']} has {row['num_parameters']} weights of layout"
        f" {shown(row['layout'])}, which layouts.json {expected}; {REPAIR}"
    )


def _check_architectures(table: pa.Table, layouts: "Mapping[str, Layout]", file: str) -> None:
    """Parse the arguments of each distinct architecture once, and compare them with its layout."""
    columns = [name for name in ARCHITECTURE if name in table.column_names]
    # without threads the rows come in their order, and the first wrong one is named
    distinct = table.select(columns).group_by(columns, use_threads=False).aggregate([])
    if distinct.num_rows > MOST_ARCHITECTURES:
        raise ZooError(
            f"{file} is damaged: `architecture_args` has {distinct.num_rows} different values; expected at most"
            f" {MOST_ARCHITECTURES}; {REPAIR}"
        )
    for row in distinct.to_pylist():
        layout, hidden = layouts[row["layout"]], row.get("head_hidden")
        what = f"`architecture_args` of {file}"
        check_size(
            parse_args(row["architecture_args"], what),
            what,
            num_parameters=layout.num_parameters,
            tensors=len(layout.names),
        )
        is_mlp = row["head"] in ("mlp", schema.HEADS.index("mlp"))
        if is_mlp != (hidden is not None) or (hidden or 0) > layout.num_parameters:
            raise ZooError(
                f"{file} is damaged: `head_hidden` is {hidden} where `head` is {schema.HEADS[is_mlp]} and a model has"
                f" {layout.num_parameters} weights; only an mlp head has, and needs, a hidden width; {REPAIR}"
            )
