"""Choose the config of a zoo that the Hub's dataset viewer opens first, by what the viewer can read.

The limits are the production settings of the dataset viewer, as published in 2026.
"""

from vitzoo_hf.format.encoding import ITEM_BYTES, check_dtype
from vitzoo_hf.format.messages import did_you_mean
from vitzoo_hf.format.schema import ZooError

PAGE_ROWS = 100
"""Rows the viewer shows at once."""

MOST_BYTES_IN_MEMORY = 300_000_000
"""Bytes of Parquet that the viewer reads at once, over all columns; with a page index only the pages it needs."""


def default_config(row_parameters: int, encoding: str, dtype: str) -> str:
    """Name the config that `load_dataset(id)` and the viewer open: whole rows while a page of them can be read.

    Args:
        row_parameters: parameters of the largest row.
        encoding: `list` or `binary`.
        dtype: number format of the stored weights: `float32`, `float16` or `bfloat16`.

    Returns:
        `weights`, or `index` if 100 rows of that size are more than the viewer reads.

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
    return "weights" if page <= MOST_BYTES_IN_MEMORY else "index"
