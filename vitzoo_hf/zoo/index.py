"""The rows of a zoo without their weights, in Arrow: records, a search by id, and columns of any selection."""

from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from vitzoo_hf.format import schema
from vitzoo_hf.format.messages import did_you_mean
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.format.tables import with_class_names

if TYPE_CHECKING:
    import datasets

BLOCK_ROWS = 256
"""Rows that are turned into Python values at once."""


class Index:
    """The index of a zoo, shared by everything that selects from it.

    Args:
        table: the index of all splits, with class numbers and a column `split`; columns may be dictionary-encoded.
        factors: generating factor -> type.

    Attributes:
        table: the same with names for class numbers, one chunk a column.
    """

    def __init__(self, table: pa.Table, factors: dict[str, str]) -> None:
        self._coded = table
        features = schema.row_features(factors, weights=None)
        self.table = with_class_names(table, features).combine_chunks()

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def column(self, name: str) -> pa.ChunkedArray:
        """A column with names for class numbers, as plain values."""
        return plain(self.table.select([name]))[name]

    def dataset(self, positions: np.ndarray) -> "datasets.Dataset":
        """Rows as `load_dataset` gives them, and their split."""
        import datasets

        table = plain(self._coded.take(pa.array(positions)))
        features = datasets.Features.from_arrow_schema(table.drop_columns(["split"]).schema)
        features["split"] = datasets.Value("string")
        return datasets.Dataset(table.cast(features.arrow_schema))

    def records(self, positions: np.ndarray) -> Iterator[tuple[int, dict[str, Any]]]:
        """Position and columns of each of these rows."""
        for start in range(0, len(positions), BLOCK_ROWS):
            block = positions[start : start + BLOCK_ROWS]
            yield from zip(block.tolist(), self.table.take(pa.array(block)).to_pylist(), strict=True)

    def position_of(self, model_id: str, positions: np.ndarray, zoo: str) -> int:
        """Where the row with this id lies, among the ascending `positions`.

        Raises:
            ZooError: if it is not there, with the closest id that is.
        """
        if not isinstance(model_id, str):
            raise ZooError(f"model_id is {model_id!r}; expected the text in column `model_id`")
        position = self._positions.get(model_id, -1)
        place = int(np.searchsorted(positions, position))
        if position < 0 or place == len(positions) or positions[place] != position:
            ids = self.table["model_id"].take(pa.array(positions)).to_pylist()
            raise ZooError(f"{zoo} has no model {model_id!r}: {did_you_mean(model_id, ids)}")
        return position

    @cached_property
    def _positions(self) -> dict[str, int]:
        return {model_id: position for position, model_id in enumerate(self.table["model_id"].to_pylist())}


def plain(table: pa.Table) -> pa.Table:
    """The table with dictionary-encoded columns decoded."""
    fields = [
        field.with_type(field.type.value_type) if pa.types.is_dictionary(field.type) else field
        for field in table.schema
    ]
    return table.cast(pa.schema(fields, metadata=table.schema.metadata))
