"""The selected rows of a zoo: their light columns, their weights, and which tensors of these are handed out."""

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from vitzoo_hf.format.layout import Layout, is_head
from vitzoo_hf.format.messages import did_you_mean
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.format.weight_reader import WeightReader
from vitzoo_hf.zoo.index import plain
from vitzoo_hf.zoo.plan import PlannedRows

EXACT = ("epoch", "num_parameters")
"""Columns of whole numbers that are never null, which are handed out as int64."""


@dataclass(frozen=True)
class RowSource:
    """The selected rows of a zoo and the reader of their weights.

    Attributes:
        positions: the positions of the selected rows in the index, ascending.
        table: light columns of the index with names for class numbers, a row each position.
        columns: names of the columns to hand out.
        layouts: fingerprint -> layout.
        reader: the reader of the weights, by position.
    """

    positions: np.ndarray
    table: pa.Table
    columns: tuple[str, ...]
    layouts: Mapping[str, Layout]
    reader: WeightReader

    def __getstate__(self) -> dict[str, object]:
        # other processes get the selected rows alone, not an index of a million
        used = set(self.used_layouts)
        return {
            "positions": np.arange(len(self.positions)),
            "table": self.handed_out_table(self.positions),
            "columns": self.columns,
            "layouts": {name: layout for name, layout in self.layouts.items() if name in used},
            "reader": self.reader.of_rows(self.positions),
        }

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def layout_ids(self) -> list[str]:
        """Layout fingerprint of each selected row."""
        names = np.array(self.used_layouts, dtype=object)
        return list(names[self.layout_codes]) if len(names) else []

    @property
    def used_layouts(self) -> list[str]:
        """Fingerprints of the layouts that selected rows have, in the order of their first rows."""
        return self._layout_codes[1]

    @property
    def layout_codes(self) -> np.ndarray:
        """Place in `used_layouts` of each selected row: int64 `[n]`."""
        return self._layout_codes[0]

    @cached_property
    def _layout_codes(self) -> tuple[np.ndarray, list[str]]:
        layouts = self.table.select(["layout"]).take(pa.array(self.positions))
        coded = plain(layouts)["layout"].combine_chunks().dictionary_encode()
        return np.asarray(coded.indices, dtype=np.int64), coded.dictionary.to_pylist()

    @property
    def model_ids(self) -> list[str]:
        """Ids of the selected rows."""
        return self.table["model_id"].take(pa.array(self.positions)).to_pylist()

    def selected(self, positions: np.ndarray) -> "RowSource":
        """The source of other rows of the same zoo."""
        return replace(self, positions=positions)

    def handed_out_table(self, positions: np.ndarray) -> pa.Table:
        """The columns to hand out of the rows at these positions, and those that a plan needs."""
        names = dict.fromkeys((*self.columns, "model_id", "layout"))
        return plain(self.table.select(list(names)).take(pa.array(positions))).combine_chunks()

    def planned(self, shapes: Sequence[int]) -> PlannedRows:
        """What a plan needs of the rows.

        Args:
            shapes: number of the shape of weights that rows of each of `used_layouts` hand out.
        """
        return PlannedRows(
            self.reader.places.groups()[self.positions],
            self.reader.rows.row_bytes[self.positions],
            np.asarray(shapes, np.int64)[self.layout_codes],
        )

    def id_bytes(self) -> bytes:
        """Bytes that two selections share exactly when their rows and the order of them are equal."""
        return "\n".join(self.model_ids).encode()

    def light(self, rows: np.ndarray, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, list[object]]]:
        """Light columns of some rows: numbers as tensors `[B]`, the rest as lists.

        Args:
            rows: places in `positions`.
            dtype: number format of columns that may be null, with NaN for null.
        """
        numbers, texts = {}, {}
        table = self.table.select(list(self.columns)).take(pa.array(self.positions[rows]))
        for name, column in zip(self.columns, table.columns, strict=True):
            values = _as_tensor(name, column, dtype)
            if values is None:
                texts[name] = column.to_pylist()
            else:
                numbers[name] = values
        return numbers, texts


def _as_tensor(name: str, column: pa.ChunkedArray, dtype: torch.dtype) -> Tensor | None:
    """A column of numbers; what becomes a tensor depends on the type of the column alone."""
    if pa.types.is_boolean(column.type):
        return torch.from_numpy(np.array(column.fill_null(False).to_numpy()))
    if not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type)):
        return None
    if name in EXACT and pa.types.is_integer(column.type):
        return torch.from_numpy(np.array(column.to_numpy(), np.int64))
    return torch.from_numpy(np.array(column.cast(pa.float64()).to_numpy())).to(dtype)


def check_names(what: str, names: object) -> None:
    """Refuse names that are not a list of texts, and an empty list of tensors.

    Raises:
        ZooError: quoting the argument.
    """
    fits = names is None or (
        not isinstance(names, str) and isinstance(names, Sequence) and all(isinstance(name, str) for name in names)
    )
    if not fits or (names is not None and not names and what == "tensors"):
        raise ZooError(f"{what}={names!r}: expected a list of names")


def chosen_columns(known: Sequence[str], columns: Sequence[str] | None) -> tuple[str, ...]:
    """Names of the light columns to hand out; all by default.

    Raises:
        ZooError: for an unknown one.
    """
    check_names("columns", columns)
    for name in columns or ():
        if name not in known:
            raise ZooError(f"unknown column {name!r}: {did_you_mean(name, known)}")
    return tuple(known if columns is None else dict.fromkeys(columns))


@dataclass(frozen=True)
class HandedOut:
    """The tensors that rows of one layout hand out.

    Attributes:
        parts: where they lie in the vector of a row, neighbours joined; None for all of it.
        layout: their names and shapes, one behind the other.
    """

    parts: list[slice] | None
    layout: Layout


def handed_out(source: RowSource, tensors: str | Sequence[str] | None) -> list[HandedOut]:
    """What rows of each of `source.used_layouts` hand out.

    Args:
        source: the rows.
        tensors: `trunk`, `head`, names or patterns; None for all.

    Raises:
        ZooError: if it is none of these, or matches no tensor of a layout.
    """
    if tensors is None:
        return [HandedOut(None, source.layouts[layout_id]) for layout_id in source.used_layouts]
    if isinstance(tensors, str) and tensors not in ("trunk", "head"):
        raise ZooError(f"tensors={tensors!r}: expected 'trunk', 'head', or a list of names or patterns")
    if not isinstance(tensors, str):
        check_names("tensors", tensors)
    parts = []
    for layout_id in source.used_layouts:
        layout = source.layouts[layout_id]
        if isinstance(tensors, str):
            names = [name for name in layout.names if is_head(name) == (tensors == "head")]
            unmatched = [] if names else [tensors]
        else:
            names = [name for name in layout.names if any(fnmatch.fnmatchcase(name, pattern) for pattern in tensors)]
            unmatched = [pattern for pattern in tensors if not fnmatch.filter(layout.names, pattern)]
        if unmatched:
            raise ZooError(
                f"tensors={unmatched[0]!r} matches no tensor of layout {layout_id}:"
                f" {did_you_mean(unmatched[0], layout.names)}"
            )
        shapes = dict(zip(layout.names, layout.shapes, strict=True))
        chosen = Layout(tuple(names), tuple(shapes[name] for name in names))
        parts.append(HandedOut(_merged([layout.place(name) for name in names]), chosen))
    return parts


def _merged(parts: Sequence[slice]) -> list[slice]:
    merged: list[slice] = []
    for part in parts:
        if merged and merged[-1].stop == part.start:
            merged[-1] = slice(merged[-1].start, part.stop)
        else:
            merged.append(part)
    return merged
