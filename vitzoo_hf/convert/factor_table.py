"""Read a CSV table with run, epoch and generating factors of each checkpoint.

Columns of the zoo's format keep their meaning; every other column becomes a generating factor, typed by all its
values. A mistake in the header is an error; a mistake in a line refuses the checkpoint of that line.
"""

import csv
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vitzoo_hf.format import schema
from vitzoo_hf.format.messages import did_you_mean, one_line
from vitzoo_hf.format.row import Factor
from vitzoo_hf.format.schema import ZooError

TEXT_COLUMNS = ("model_id", "run_id", "parent_id", "stage", "dataset", "architecture", "head")
KNOWN = (*TEXT_COLUMNS, "epoch", "is_final", "architecture_args", "head_hidden", *schema.RESULTS)
FROM_WEIGHTS = ("num_parameters", "layout", "weights_sha256", "dtype", "provenance", "split", "weights")
"""Columns of an index that are computed again from the checkpoint."""

FACTOR = re.compile(r"[a-z][a-z0-9_]*", re.ASCII)
# no leading zeros: `007` is a name, and as a number it would lose them
INTEGER = re.compile(r"[+-]?(0|[1-9]\d*)", re.ASCII)
NUMBER = re.compile(r"[+-]?(((0|[1-9]\d*)(\.\d*)?|\.\d+)(e[+-]?\d+)?|nan|inf(inity)?)", re.ASCII | re.IGNORECASE)
BOOLEANS = {"true": True, "false": False}
# epochs are stored as int32
LARGEST_EPOCH = 2**31 - 1
LARGEST_RESULT = 3e38  # results are stored as float32
# 2**63 has 19 digits; one more leaves room for a sign
MOST_DIGITS = 20


Values = dict[str, Any]
"""Column of the format -> parsed value of a line."""


@dataclass(frozen=True)
class Line:
    """A line of the table, on one checkpoint.

    Attributes:
        where: file and line, for messages.
        values: column of the format -> value, for cells that are not empty.
        factors: generating factor -> value, None where the cell is empty.
    """

    where: str
    values: Values
    factors: dict[str, Factor]


@dataclass(frozen=True)
class Table:
    """A factor table.

    Attributes:
        name: name of the file.
        lines: checkpoint -> its line, in the order of the lines; some may be refused for other reasons.
        factor_types: generating factor -> `string`, `float`, `int` or `bool`.
        refused: checkpoint -> the mistake in its line.
        notes: sentences on ignored columns.
        unread: model ids in lines with a mistake, where they can be read.
    """

    name: str
    lines: dict[str, Line]
    factor_types: dict[str, str]
    refused: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    unread: frozenset[str] = frozenset()


def read_table(file: Path, key: str) -> Table:
    """Read a factor table.

    Args:
        file: CSV in UTF-8 with a header, separated by commas; an empty cell is null.
        key: the column that names the checkpoint: `file` or `repo`.

    Raises:
        ZooError: if it cannot be read, or its header has a mistake.
    """
    header, records = _records(file)
    columns = _columns(header, key, file.name)
    cells: dict[str, dict[str, str]] = {}
    places: dict[str, list[int]] = {}
    refused: dict[str, str] = {}
    for number, record in records:
        # padded, so that a short line can still be refused by the name of its checkpoint
        subject = (record + [""] * len(header))[header.index(key)].strip()
        if not subject:
            raise ZooError(f"{file.name} line {number} has no {key}: fill it in, or remove the line")
        places.setdefault(subject, []).append(number)
        if len(record) != len(header):
            refused[subject] = f"{file.name} line {number} has {len(record)} cells; its header has {len(header)}"
        else:
            cells[subject] = {column: value.strip() for column, value in zip(header, record, strict=True)}
    for subject, numbers in places.items():
        if len(numbers) > 1:
            listed = ", ".join(str(number) for number in numbers)
            refused[subject] = f"{file.name} lists it more than once, in lines {listed}: keep one"
    valid = {subject: values for subject, values in cells.items() if subject not in refused}
    # lines with a mistake do not decide the type of a factor
    types = {name: _type_of([values[column] for values in valid.values()]) for column, name in columns.items()}
    empty = [column for column, name in columns.items() if types[name] is None]
    if valid and empty:
        raise ZooError(f"column {empty[0]!r} of {file.name} is empty, so its type is unknown: fill or remove it")
    lines = {}
    for subject, values in valid.items():
        where = f"{file.name} line {places[subject][0]}"
        try:
            lines[subject] = _line(where, values, columns, types)
        except ZooError as error:
            refused[subject] = str(error)
    dropped = [column for column in header if column in FROM_WEIGHTS]
    notes = [f"Columns of {file.name} that follow from the weights were not taken: {', '.join(dropped)}."]
    factor_types = {name: kind for name, kind in types.items() if kind is not None}
    # a child is not refused because the line of its parent has a mistake elsewhere
    unread = frozenset(_model_id(cells[subject]) for subject in refused if subject in cells)
    return Table(file.name, lines, factor_types, refused, notes if dropped else [], unread)


def _model_id(cells: Mapping[str, str]) -> str:
    return cells.get("model_id") or f"{cells.get('run_id')}@{cells.get('epoch')}"


def _records(file: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Read the header, and the records with the line where each begins; blank lines are skipped."""
    try:
        # utf-8-sig drops the byte order mark that spreadsheet programs write first
        with file.open(encoding="utf-8-sig", newline="") as opened:
            reader = csv.reader(opened, strict=True)
            header = [name.strip() for name in next(reader, [])]
            # a quoted cell may hold line breaks, so records and lines are counted apart
            records, begins = [], reader.line_num + 1
            for record in reader:
                if any(cell.strip() for cell in record):
                    records.append((begins, record))
                begins = reader.line_num + 1
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise ZooError(f"the table {file} cannot be read as CSV in UTF-8: {reason}") from None
    return header, records


def _columns(header: list[str], key: str, name: str) -> dict[str, str]:
    """Name the generating factor of each column that is not of the format."""
    if key not in header:
        hint = "separate its columns by commas" if len(header) == 1 else did_you_mean(key, header or [key])
        raise ZooError(f"{name} has no column {key!r}, which says what a line is about: {hint}")
    twice = [column for column in header if header.count(column) > 1]
    if twice:
        raise ZooError(f"{name} has the column {twice[0]!r} more than once: keep one")
    columns: dict[str, str] = {}
    for column in header:
        if column == key or column in KNOWN or column in FROM_WEIGHTS:
            continue
        factor = re.sub(r"[\s.-]+", "_", column).lower().removeprefix("factor_")
        if not FACTOR.fullmatch(factor):
            raise ZooError(f"{name}: {column!r} cannot name a factor: use letters, digits and _, a letter first")
        if factor in columns.values():
            raise ZooError(f"{name} has two columns for the factor {factor!r}: rename or remove one")
        columns[column] = factor
    return columns


def _type_of(cells: list[str]) -> str | None:
    """Choose the narrowest type that holds every cell exactly; None if all are empty."""
    filled = [cell for cell in cells if cell]
    if not filled:
        return None
    # before numbers: 0 and 1 stay integers
    if all(cell.lower() in BOOLEANS for cell in filled):
        return "bool"
    integers = [cell for cell in filled if INTEGER.fullmatch(cell)]
    # the length first: int() of a very long text takes quadratic time
    if any(len(cell) > MOST_DIGITS or not -(2**63) <= int(cell) < 2**63 for cell in integers):
        return "string"
    if len(integers) == len(filled):
        return "int"
    numbers = all(NUMBER.fullmatch(cell) for cell in filled) and any(math.isfinite(float(cell)) for cell in filled)
    # integers above 2**53 may not survive as float64: such a column stays text
    return "float" if numbers and all(int(float(cell)) == int(cell) for cell in integers) else "string"


def _line(where: str, cells: Mapping[str, str], columns: Mapping[str, str], types: Mapping[str, str | None]) -> Line:
    values = {}
    for column in KNOWN:
        if cells.get(column):
            values[column] = _format_value(where, column, cells[column])
    factors: dict[str, Factor] = {}
    for column, name in columns.items():
        kind, cell = types[name], cells[column]
        factors[name] = PARSERS[kind](f"{where}: {column}", cell) if kind and cell else None
    return Line(where, _with_ids(where, values), factors)


def _format_value(where: str, column: str, cell: str) -> object:
    """Parse a cell of a column of the format."""
    what = f"{where}: {column}"
    if column in schema.RESULTS:
        result = _float(what, cell)
        if abs(result) > LARGEST_RESULT:
            raise ZooError(f"{what} is {cell}; expected a number up to {LARGEST_RESULT}")
        return result
    if column in ("epoch", "head_hidden"):
        number = _int(what, cell)
        if not 0 <= number <= LARGEST_EPOCH:
            raise ZooError(f"{what} is {cell}; expected a number from 0 to {LARGEST_EPOCH}")
        return number
    if column == "is_final":
        return _bool(what, cell)
    if column == "architecture_args":
        return _object(what, cell)
    allowed = {"stage": schema.STAGES, "head": schema.HEADS}.get(column)
    if allowed and cell not in allowed:
        raise ZooError(f"{what} is {cell!r}: {did_you_mean(cell, allowed)}")
    if column == "run_id" and not schema.RUN_ID.fullmatch(cell):
        raise ZooError(f"{what} is {cell!r}; expected letters, digits and ._=+-, a letter or digit first")
    if column in ("model_id", "parent_id") and not schema.MODEL_ID.fullmatch(cell):
        raise ZooError(f"{what} is {cell!r}; expected RUN@EPOCH, such as run1@20")
    return cell


def _with_ids(where: str, values: Values) -> Values:
    """Add run and epoch from `model_id` where they are missing; refuse values that contradict each other."""
    if "model_id" not in values:
        return values
    run, _, epoch = values["model_id"].rpartition("@")
    values = {"run_id": run, "epoch": _format_value(where, "epoch", epoch)} | values
    if values["model_id"] != schema.model_id(values["run_id"], values["epoch"]):
        raise ZooError(
            f"{where}: model_id is {values['model_id']!r};"
            f" run and epoch make {schema.model_id(values['run_id'], values['epoch'])!r}"
        )
    return values


def _float(what: str, cell: str) -> float:
    if not NUMBER.fullmatch(cell) or not math.isfinite(float(cell)):
        raise ZooError(f"{what} is {cell!r}; expected a finite number, or an empty cell")
    return float(cell)


def _int(what: str, cell: str) -> int:
    if not INTEGER.fullmatch(cell) or len(cell) > MOST_DIGITS:
        raise ZooError(f"{what} is {cell!r}; expected a whole number, or an empty cell")
    return int(cell)


def _bool(what: str, cell: str) -> bool:
    if cell.lower() not in BOOLEANS:
        raise ZooError(f"{what} is {cell!r}; expected true, false, or an empty cell")
    return BOOLEANS[cell.lower()]


def _string(what: str, cell: str) -> str:
    return cell


def _object(what: str, cell: str) -> dict[str, object]:
    try:
        value = json.loads(cell)
    # deeply nested brackets exhaust the stack of the parser
    except (json.JSONDecodeError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ZooError(f'{what} is {cell!r}; expected a JSON object, such as {{"num_classes": 10}}')
    return value


PARSERS: dict[str, Callable[[str, str], Factor]] = {"float": _float, "int": _int, "bool": _bool, "string": _string}
