"""What the Hub's dataset viewer can show of a zoo: the config that it opens first, and columns without statistics.

The limits are the production settings of the dataset viewer, as published in 2026; what has no statistics was seen
by running its functions (`libcommon.statistics_utils`, commit f62009e). One such column costs a split all of them.
"""

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vitzoo_hf.format import schema
from vitzoo_hf.format.encoding import ITEM_BYTES, check_dtype
from vitzoo_hf.format.messages import did_you_mean
from vitzoo_hf.format.schema import ZooError

CLASSES = ("stage", "head")
"""Columns of whole numbers that are classes, of which the viewer counts each."""

MOST_CATEGORIES, CATEGORY_SHARE, ALWAYS_CATEGORIES = 1_000, 0.2, 10
"""Distinct texts that the viewer counts one by one: so many at most, this share of the rows, and so many always."""

PAGE_ROWS = 100
"""Rows the viewer shows at once."""

MOST_BYTES_IN_MEMORY = 300_000_000
"""Bytes of Parquet that the viewer reads at once, over all columns; with a page index only the pages it needs."""

MOST_JSON_BYTES = 64_000_000
"""JSON that a page may come to: the viewer cuts no cell of it, and a browser has to take it in."""

LIST_JSON_BYTES = 21.5
"""JSON of a float32 weight, which is written with the digits of a float64: 20.6 to 21.2 were counted."""


def default_config(row_parameters: int, encoding: str, dtype: str) -> str:
    """Name the config that `load_dataset(id)` and the viewer open: whole rows while a page of them can be shown.

    Args:
        row_parameters: parameters of the largest row.
        encoding: `list` or `binary`.
        dtype: number format of the stored weights: `float32`, `float16` or `bfloat16`.

    Returns:
        `weights`, or `index` if 100 rows of that size are more than the viewer reads, or more than 64 MB of JSON.

    Raises:
        ZooError: for an unknown encoding or dtype, or a list of something else than float32.

    Example:
        >>> default_config(27_000, "list", "float32"), default_config(22_050_664, "binary", "float32")
        ('weights', 'index')
    """
    check_dtype(dtype)
    if encoding not in ("list", "binary"):
        raise ZooError(f"unknown encoding {encoding!r}: {did_you_mean(encoding, ('list', 'binary'))}")
    if encoding == "list" and dtype != "float32":
        raise ZooError(f"a list of {dtype} was given: lists hold float32, store {dtype} as binary")
    # counted without compression, by which float weights hardly shrink
    page = PAGE_ROWS * row_parameters * ITEM_BYTES[dtype]
    # bytes are sent as base64
    text = PAGE_ROWS * row_parameters * LIST_JSON_BYTES if encoding == "list" else page * 4 / 3
    return "weights" if page <= MOST_BYTES_IN_MEMORY and text <= MOST_JSON_BYTES else "index"


def chosen_default(config: str | None) -> dict[str, str]:
    """The entry of `zoo.json` for a default config that a user chose; none for None.

    Raises:
        ZooError: if it is neither `weights` nor `index`.
    """
    if config not in (None, "weights", "index"):
        raise ZooError(f"default config {config!r}: expected weights or index")
    return {} if config is None else {"default_config": config}


def columns_without_statistics(folder: Path) -> list[str]:
    """Sentences on columns of a zoo's light tables that the viewer computes no statistics of; none if all have some.

    Args:
        folder: the zoo.
    """
    sentences = []
    for config in (name for name in schema.CONFIGS if name not in ("weights", "probes")):
        for file in sorted((folder / config).glob("*.parquet")):
            reasons = _reasons(pq.read_table(file))
            if reasons:
                where = f"`{config}` ({file.name.split('-')[0]})"
                also = " and `weights`" if config == "index" else ""
                sentences.append(f"The viewer has no statistics of {where}{also}: {'; '.join(reasons)}.")
    return sentences


def _reasons(table: pa.Table) -> list[str]:
    """Why a split has no statistics."""
    if table.num_rows == 1:
        return ["it has one row"]
    reasons = []
    for name, column in zip(table.column_names, table.columns, strict=True):
        is_float, is_integer = pa.types.is_floating(column.type), pa.types.is_integer(column.type)
        # the viewer counts NaN as null
        missing = pc.sum(pc.is_null(column, nan_is_null=is_float)).as_py() or 0
        if (is_float or is_integer) and table.num_rows - missing == 1:
            reasons.append(f"`{name}` has one value that is not null")
        elif is_integer and name not in CLASSES:
            reasons += [f"`{name}` is {low} or {high}" for low, high in _neighbours(column)]
        elif pa.types.is_string(column.type) and not _are_categories(column):
            lengths = pc.utf8_length(column)
            reasons += [f"texts of `{name}` have {low} or {high} letters" for low, high in _neighbours(lengths)]
        if is_float and pc.any(pc.is_inf(column)).as_py():
            reasons.append(f"`{name}` has infinite values")
    return reasons


def _neighbours(numbers: pa.ChunkedArray) -> list[tuple[int, int]]:
    """The least and the largest of whole numbers where they differ by one: the viewer's histogram has no bin then."""
    low, high = pc.min_max(numbers).as_py().values()
    return [(low, high)] if low is not None and high - low == 1 else []


def _are_categories(texts: pa.ChunkedArray) -> bool:
    """Whether the viewer counts each text; of others it draws a histogram of their lengths."""
    distinct = pc.count_distinct(texts, mode="all").as_py()
    return distinct <= max(ALWAYS_CATEGORIES, min(MOST_CATEGORIES, CATEGORY_SHARE * len(texts)))
