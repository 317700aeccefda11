"""What the Hub's dataset viewer refuses, checked on files alone: it shares no code with the package.

Parquet footers and page indexes are read here by a small reader of Thrift's compact protocol, because pyarrow does
not tell where pages begin. `problems` says what is wrong with a zoo's folder, config by config.
"""

import base64
import fnmatch
import json
import re
import struct
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

# limits of the viewer's production settings, as published in 2026
PAGE_ROWS = 100
MOST_BYTES_IN_MEMORY = 300_000_000
FIRST_ROWS_BYTES = 200_000  # of JSON; above, cells are cut, and then rows left out
FIRST_ROWS_AT_LEAST = 10
CUT_CELL_BYTES = 100
MOST_COLUMNS = 1_000
LONGEST_COLUMN_NAME = 500
MOST_SPLITS = 30
MOST_CONFIGS = 4_000
CATEGORY_SHARE = 0.2  # a string column with at most this share of unique values has a histogram of categories
MOST_CATEGORIES = 1_000
ALWAYS_CATEGORIES = 10


def read_struct(data: bytes, at: int = 0) -> tuple[dict[int, Any], int]:
    """A Thrift struct as field id -> value, and where it ends."""
    fields: dict[int, Any] = {}
    field = 0
    while data[at]:
        step, kind = data[at] >> 4, data[at] & 15
        at += 1
        if step:
            field += step
        else:
            field, at = _integer(data, at)
        fields[field], at = _value(data, at, kind)
    return fields, at + 1


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (data[at] & 127) << shift
        shift += 7
        at += 1
        if data[at - 1] < 128:
            return value, at


def _integer(data: bytes, at: int) -> tuple[int, int]:
    value, at = _varint(data, at)
    return (value >> 1) ^ -(value & 1), at


def _value(data: bytes, at: int, kind: int) -> tuple[Any, int]:
    if kind in (1, 2):
        return kind == 1, at
    if kind == 3:
        return data[at], at + 1
    if kind in (4, 5, 6):
        return _integer(data, at)
    if kind == 7:
        return struct.unpack_from("<d", data, at)[0], at + 8
    if kind == 8:
        length, at = _varint(data, at)
        return data[at : at + length], at + length
    if kind in (9, 10):
        length, inner = data[at] >> 4, data[at] & 15
        at += 1
        if length == 15:
            length, at = _varint(data, at)
        values = []
        for _ in range(length):
            value, at = (data[at] == 1, at + 1) if inner in (1, 2) else _value(data, at, inner)
            values.append(value)
        return values, at
    if kind == 12:
        return read_struct(data, at)
    raise ValueError(f"Thrift type {kind}")


def fetched_bytes(file: Path, first: int, count: int) -> list[int]:
    """Uncompressed bytes that rows `first` to `first + count` take, for each row group they touch, over all columns.

    Of a column with a page index the pages with these rows are read; of others the whole chunk.
    """
    with file.open("rb") as opened:
        opened.seek(-8, 2)
        length = struct.unpack("<I", opened.read(4))[0]
        opened.seek(-8 - length, 2)
        footer, _ = read_struct(opened.read(length))
        sizes, start = [], 0
        for group in footer[4]:
            rows = group[3]
            low, high = max(first - start, 0), min(first + count - start, rows)
            if low < high:
                sizes.append(sum(_chunk_bytes(opened, chunk, rows, low, high) for chunk in group[1]))
            start += rows
        return sizes


def _chunk_bytes(opened: Any, chunk: dict[int, Any], rows: int, low: int, high: int) -> int:
    uncompressed, compressed = chunk[3][6], chunk[3][7]
    if 4 not in chunk:
        return uncompressed
    opened.seek(chunk[4])
    index, _ = read_struct(opened.read(chunk[5]))
    pages = [(page[3], page[2]) for page in index[1]]
    ends = [begin for begin, _ in pages[1:]] + [rows]
    needed = sum(size for (begin, size), end in zip(pages, ends, strict=True) if begin < high and end > low)
    dictionary = compressed - sum(size for _, size in pages)
    return -(-(needed + dictionary) * uncompressed // max(1, compressed))


def scan_problems(file: Path, *, page: int = PAGE_ROWS, limit: int = MOST_BYTES_IN_MEMORY) -> list[str]:
    """Pages of rows that cannot be read, because what they take of a row group is too big."""
    rows = pq.read_metadata(file).num_rows
    return [
        f"{file.name}: rows {first} to {first + page} need {size} bytes of one row group, more than {limit}"
        for first in range(0, rows, page)
        for size in fetched_bytes(file, first, page)
        if size > limit
    ]


def page_problems(file: Path, *, page: int = PAGE_ROWS, limit: int = MOST_BYTES_IN_MEMORY) -> list[str]:
    """A page of the largest rows that does not fit into memory, by the raw bytes of heavy columns."""
    metadata = pq.read_metadata(file)
    largest = max(
        -(-metadata.row_group(i).total_byte_size // metadata.row_group(i).num_rows)
        for i in range(metadata.num_row_groups)
    )
    return [f"{file.name}: {page} rows of {largest} bytes"] if page * largest > 1.01 * limit else []


def first_rows(
    file: Path,
    *,
    limit: int = FIRST_ROWS_BYTES,
    rows: int = PAGE_ROWS,
    at_least: int = FIRST_ROWS_AT_LEAST,
    cut: int = CUT_CELL_BYTES,
) -> list[str]:
    """The rows of the first page as JSON, cut as the viewer cuts them.

    Raises:
        ValueError: if even the cut rows are too big.
    """
    held: list[dict[str, Any]] = []
    for batch in pq.ParquetFile(file).iter_batches(batch_size=at_least):
        held += [{name: _json_value(value) for name, value in row.items()} for row in batch.to_pylist()]
        if len(held) >= rows:
            break
    held = held[:rows]
    texts = [json.dumps(row) for row in held]
    while len(texts) > at_least and sum(map(len, texts)) > limit:
        texts.pop()
    for position in reversed(range(len(texts))):
        if sum(map(len, texts)) <= limit:
            break
        row = {name: json.dumps(value)[:cut] for name, value in held[position].items()}
        texts[position] = json.dumps(row)
    if sum(map(len, texts)) > limit:
        raise ValueError(f"{file.name}: the first rows take {sum(map(len, texts))} bytes, cut as they are")
    return texts


def _json_value(value: Any) -> Any:
    if isinstance(value, dict) and set(value) == {"bytes", "path"}:
        return {"src": "https://datasets-server.huggingface.co/cached-assets/" + "x" * 200, "height": 1, "width": 1}
    return base64.b64encode(value).decode() if isinstance(value, bytes) else value


def statistics(table: pa.Table) -> dict[str, str]:
    """How a column is shown: as `classes`, `categories`, `lengths`, `histogram`, `bool`, or `skipped`."""
    told = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    shown = {}
    for name in table.column_names:
        feature, kind = told[name], table.schema.field(name).type
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel":
            shown[name] = "classes"
        elif isinstance(feature, dict) and feature.get("_type") == "Image":
            shown[name] = "histogram"
        elif pa.types.is_binary(kind):
            shown[name] = "skipped"
        elif pa.types.is_list(kind):
            shown[name] = "lengths"
        elif pa.types.is_string(kind):
            unique = len(set(table[name].to_pylist()))
            few = unique <= max(ALWAYS_CATEGORIES, min(MOST_CATEGORIES, CATEGORY_SHARE * table.num_rows))
            shown[name] = "categories" if few else "lengths"
        elif pa.types.is_boolean(kind):
            shown[name] = "bool"
        elif pa.types.is_integer(kind) or pa.types.is_floating(kind):
            shown[name] = "histogram"
        else:
            raise ValueError(f"{name}: the viewer has no statistics for {kind}")
    return shown


def header(folder: Path) -> dict[str, Any]:
    """The YAML header of a card."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)[1])


def problems(folder: Path, *, repository: str | None = None) -> list[str]:
    """What the viewer would not show or `load_dataset` not load of a zoo's folder."""
    found = []
    configs = header(folder)["configs"]
    files = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*.parquet"))
    if (folder / "shards.json").is_file():
        files = sorted({*files, *json.loads((folder / "shards.json").read_text())})
    owners: dict[str, list[str]] = {name: [] for name in files}
    for config in configs:
        if len(config["data_files"]) > MOST_SPLITS:
            found.append(f"{config['config_name']} has {len(config['data_files'])} splits")
        for entry in config["data_files"]:
            if not re.fullmatch(r"\w+(\.\w+)*", entry["split"]):
                found.append(f"{entry['split']} is no name of a split")
            matching = fnmatch.filter(files, entry["path"])
            if not matching:
                found.append(f"{entry['path']} matches no file")
            for name in matching:
                owners[name].append(f"{config['config_name']}/{entry['split']}")
    found += [f"{name} belongs to {held or 'no config'}" for name, held in owners.items() if len(held) != 1]
    found += [f"{owners[name]}: {name}" for name in files if not name.endswith(".parquet")]
    script = f"{repository or folder.name}.py"
    found += [f"{script} is named like the dataset"] if (folder / script).exists() else []
    defaults = [config["config_name"] for config in configs if config.get("default") is True]
    if len(defaults) != 1 or len(configs) > MOST_CONFIGS:
        return [*found, f"default configs: {defaults}; {len(configs)} configs"]
    for file in sorted(folder.rglob("*.parquet")):
        found += _file_problems(file, is_default=file.parent.name == defaults[0])
    return found


def _file_problems(file: Path, *, is_default: bool) -> list[str]:
    found = []
    names = pq.read_schema(file).names
    if len(names) > MOST_COLUMNS or max(map(len, names)) > LONGEST_COLUMN_NAME:
        found.append(f"{file.name} has {len(names)} columns, the longest name has {max(map(len, names))} characters")
    if not is_default:
        return found
    found += scan_problems(file) + page_problems(file)
    if not found:
        first_rows(file)
    return found
