"""What the Hub's dataset viewer can show, and which config of a zoo it can therefore open first.

The limits are those of the production settings of the dataset viewer, as published in 2026.
"""

from vitzoo_hf.format.messages import did_you_mean
from vitzoo_hf.format.schema import ZooError

PAGE_ROWS = 100
"""Rows the viewer shows at once."""

MOST_BYTES_IN_MEMORY = 300_000_000
"""Bytes of Parquet it reads at once, over all columns; with a page index only the pages it needs."""

FIRST_ROWS_BYTES = 200_000
"""JSON bytes of the first page; above, cells are cut, and then rows left out."""

FIRST_ROWS_AT_LEAST = 10
"""Rows of the first page that are never left out."""

CUT_CELL_BYTES = 100
"""JSON bytes a cut cell keeps."""

MOST_COLUMNS = 1_000
LONGEST_COLUMN_NAME = 500
MOST_SPLITS = 30
MOST_CONFIGS = 4_000

CATEGORY_SHARE = 0.2
"""A string column with at most this share of unique values has a histogram of categories."""

MOST_CATEGORIES = 1_000
STATISTICS_BYTES = 5_000_000_000
"""Statistics, search and filters see the first bytes of a split, up to here."""


def default_config(row_parameters: int, encoding: str, dtype: str) -> str:
    """The config that `load_dataset(id)` and the viewer open: whole rows while a page of them can be read.

    Args:
        row_parameters: parameters of the largest row.
        encoding: `list` or `binary`.
        dtype: that the weights are stored as.

    Returns:
        `weights`, or `index` if 100 rows of that size are more than the viewer reads.

    Raises:
        ZooError: for an unknown encoding or dtype, or a list of something else than float32.

    Example:
        >>> default_config(27_000, "list", "float32"), default_config(22_050_664, "binary", "float32")
        ('weights', 'index')
    """
    from vitzoo_hf.format.encoding import ITEM_BYTES, check_dtype

    check_dtype(dtype)
    if encoding not in ("list", "binary"):
        raise ZooError(f"unknown encoding {encoding!r}: {did_you_mean(encoding, ('list', 'binary'))}")
    if encoding == "list" and dtype != "float32":
        raise ZooError(f"a list of {dtype} was given: lists hold float32, store {dtype} as binary")
    page = PAGE_ROWS * row_parameters * ITEM_BYTES[dtype]
    return "weights" if page <= MOST_BYTES_IN_MEMORY else "index"
