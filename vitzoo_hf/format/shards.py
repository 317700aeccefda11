"""Rows -> one Parquet file whose weights also lie in it as plain memory.

Weights are not compressed and fill one page a row group, so they are the last bytes of their column chunk, row after
row (with four bytes of length before each where they are stored as bytes). `write_parquet` returns where each ends:
with that a reader takes a vector by one read of the file, or one range of a URL, and decodes nothing.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vitzoo_hf.format import schema
from vitzoo_hf.format.encoding import encode
from vitzoo_hf.format.layout import Layout
from vitzoo_hf.format.schema import ZooError

if TYPE_CHECKING:
    import datasets

RAW = ("weights", "image")
UNREPEATED = ("weights_sha256", *schema.RESULTS)
"""Columns whose values hardly ever repeat: a dictionary would only add to them."""

# More than any row group of format 1, so that its weights always fill one page.
WHOLE_PAGE = 1 << 30

ROW_GROUP_BYTES = 4_000_000
"""Weights stored as lists share row groups of about this size; a model stored as bytes has one of its own."""


def write_parquet(
    file: Path,
    features: "datasets.Features",
    groups: Iterable[Sequence[Mapping[str, object]]],
    layouts: Mapping[str, Layout],
) -> list[tuple[int, int]]:
    """Write rows, one row group for each list of `groups`, with page checksums.

    The layouts met so far are put into the file's metadata, so that one shard alone can be rebuilt. Files without
    weights are cut into pages by content: a changed row changes few bytes of the file.

    Returns:
        For each row group, its number of rows, and the position in the file where its last weights end (0 in a file
        without weights).

    Raises:
        ZooError: if the weights do not end where they should; then the file is of no use.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with pq.ParquetWriter(file, features.arrow_schema, **_options(features.arrow_schema)) as writer:
        written = [_write_group(writer, rows, features) for rows in groups]
        held = {key: layout.to_json() for key, layout in layouts.items()}
        metadata = {"vitzoo.format": str(schema.FORMAT_VERSION), "vitzoo.layouts": schema.canonical_json(held)}
        if "weights" not in features:
            metadata["use_content_defined_chunking"] = "true"  # the Hub looks for it to call a file optimised
        # after the rows: a generator of groups may meet layouts while it writes
        writer.add_key_value_metadata(metadata)
    return _weight_ends(file, written)


def _options(arrow_schema: pa.Schema) -> dict[str, object]:
    light = [name for name in arrow_schema.names if name not in RAW]
    options = {
        # weights are read in place, which compression would forbid
        "compression": {name: "zstd" if name in light else "none" for name in arrow_schema.names},
        "use_dictionary": [name for name in light if name not in UNREPEATED],
        # minima of weights serve nobody and take a pass over them
        "write_statistics": light,
        "write_page_index": True,
        "write_page_checksum": True,
    }
    # content-defined chunking would cut the one page that weights must fill
    if "weights" in arrow_schema.names:
        return options | {"data_page_size": WHOLE_PAGE}
    return options | {"use_content_defined_chunking": True}


@dataclass(frozen=True)
class _Written:
    """A row group as it was given to the writer: rows, bytes from the first weight to the last, and some of both."""

    rows: int
    span: int
    first: bytes
    last: bytes


def _write_group(
    writer: pq.ParquetWriter, rows: Sequence[Mapping[str, Any]], features: "datasets.Features"
) -> _Written:
    vectors = [encode(row["weights"], row["dtype"]) for row in rows] if "weights" in features else []
    writer.write_table(_table(rows, vectors, features), row_group_size=max(1, len(rows)))
    if not vectors:
        return _Written(len(rows), 0, b"", b"")
    # Parquet writes the length of each binary value before it
    gap = 4 if pa.types.is_binary(features.arrow_schema.field("weights").type) else 0
    span = sum(vector.size + gap for vector in vectors) - gap
    return _Written(len(rows), span, vectors[0][:64].tobytes(), vectors[-1][-64:].tobytes())


def _table(
    rows: Sequence[Mapping[str, object]], vectors: list[np.ndarray], features: "datasets.Features"
) -> pa.Table:
    arrow_schema = features.arrow_schema
    columns = []
    for column in arrow_schema:
        if column.name == "weights":
            columns.append(_weights_array(vectors, column.type))
            continue
        values = [row[column.name] for row in rows]
        feature = features[column.name]
        # ClassLabel, without importing `datasets` to ask
        if hasattr(feature, "str2int"):
            values = [feature.str2int(value) if isinstance(value, str) else value for value in values]
        columns.append(pa.array(values, column.type))
    return pa.Table.from_arrays(columns, schema=arrow_schema)


def _weights_array(vectors: list[np.ndarray], kind: pa.DataType) -> pa.Array:
    data = vectors[0] if len(vectors) == 1 else np.concatenate(vectors)
    # offsets of Arrow binary and list columns are int32
    if data.size > np.iinfo(np.int32).max:
        raise ZooError(f"a row group of {data.size / 1e9:.3g} GB: format 1 holds models of up to 2 GB")
    if pa.types.is_binary(kind):
        ends = np.cumsum([0] + [vector.size for vector in vectors], dtype=np.int32)
        return pa.BinaryArray.from_buffers(kind, len(vectors), [None, pa.py_buffer(ends), pa.py_buffer(data)])
    ends = np.cumsum([0] + [vector.size // 4 for vector in vectors], dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(ends), pa.array(data.view("<f4")), type=kind)


def _weight_ends(file: Path, written: list[_Written]) -> list[tuple[int, int]]:
    """Where the weights of each row group end, checked by their first and last bytes."""
    metadata = pq.read_metadata(file)
    ends = []
    with file.open("rb") as opened:
        for group, expected in enumerate(written):
            if not expected.span:
                ends.append((expected.rows, 0))
                continue
            held = metadata.row_group(group)
            chunk = held.column(held.num_columns - 1)
            end = chunk.data_page_offset + chunk.total_compressed_size
            # pyarrow promises no page layout: first and last bytes prove what it wrote
            opened.seek(end - expected.span)
            first = opened.read(len(expected.first))
            opened.seek(end - len(expected.last))
            last = opened.read(len(expected.last))
            if held.num_rows != expected.rows or (first, last) != (expected.first, expected.last):
                raise ZooError(f"{file.name}: this pyarrow ({pa.__version__}) does not write weights as one page")
            ends.append((expected.rows, end))
    return ends
