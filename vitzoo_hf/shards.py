"""Rows -> one Parquet file: raw weights, light columns compressed, checksums on every page."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vitzoo_hf import schema
from vitzoo_hf.flatten import Layout


def write_parquet(
    file: Path, features: Any, groups: Iterable[list[dict[str, Any]]], layouts: Mapping[str, Layout]
) -> None:
    """Write rows, one row group for each list of `groups`, with page checksums.

    Weights are neither compressed nor dictionary-encoded: the file is as large as they are. The layouts met so far
    are put into the file's metadata, so that one shard alone can be rebuilt.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    arrow_schema = features.arrow_schema
    light = [name for name in arrow_schema.names if name not in ("weights", "image")]
    with pq.ParquetWriter(
        file,
        arrow_schema,
        compression={name: "snappy" if name in light else "none" for name in arrow_schema.names},
        use_dictionary=light,
        write_statistics=light,
        write_page_index=True,
        write_page_checksum=True,
    ) as writer:
        for rows in groups:
            writer.write_table(_table(rows, features))
        held = {key: layout.to_json() for key, layout in layouts.items()}
        writer.add_key_value_metadata(
            {"vitzoo.format": str(schema.FORMAT_VERSION), "vitzoo.layouts": schema.canonical_json(held)}
        )


def _table(rows: list[dict[str, Any]], features: Any) -> pa.Table:
    arrow_schema = features.arrow_schema
    columns = []
    for column in arrow_schema:
        values = [row[column.name] for row in rows]
        if column.name == "weights":
            columns.append(_weights_array(values, column.type))
            continue
        feature = features[column.name]
        if hasattr(feature, "str2int"):
            values = [feature.str2int(value) if isinstance(value, str) else value for value in values]
        columns.append(pa.array(values, column.type))
    return pa.Table.from_arrays(columns, schema=arrow_schema)


def _weights_array(vectors: list[np.ndarray], kind: pa.DataType) -> pa.Array:
    if pa.types.is_binary(kind):
        return pa.array([vector.tobytes() for vector in vectors], kind)
    ends = np.cumsum([0] + [len(vector) for vector in vectors], dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(ends), pa.array(np.concatenate(vectors)), type=kind)
