"""Checkpoints that are kept unpacked, as a dataset: a folder of safetensors files and a `factors.csv`.

    from vit_zoo_builder import load, state_dict

    rows = load("FOLDER")                                    # or streaming=True
    tensors = state_dict(rows["train"][0])                   # name -> torch tensor

`factors.csv` has a column `file`, the path of a checkpoint in the folder, maybe `split` (by default all are `train`),
and any other columns; rows have those, and `names`, `shapes`, `dtype`, `num_parameters` and `weights`: the raw
little-endian bytes of all tensors, one behind the other. Files are read one by one, when they are needed.
"""

import csv
import hashlib
import json
import math
import re
import struct
from dataclasses import dataclass
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.csv

TABLE = "factors.csv"
DTYPES = {"F32": ("float32", 4), "F16": ("float16", 2), "BF16": ("bfloat16", 2)}
KEPT = {"bool": pa.bool_(), "int64": pa.int64(), "double": pa.float64()}
LONGEST_HEADER = 100_000_000
OWN_COLUMNS = {
    "names": datasets.List(datasets.Value("string")),
    "shapes": datasets.List(datasets.List(datasets.Value("int64"))),
    "dtype": datasets.Value("string"),
    "num_parameters": datasets.Value("int64"),
    "weights": datasets.Value("binary"),
}


def load(folder, split=None, streaming=False, cache_dir=None, num_proc=None):
    """The checkpoints of a folder.

    Args:
        folder: has `factors.csv` and the files it lists.
        split: one of its splits; all of them as a dictionary by default.
        streaming: read files while iterating, instead of copying them into the cache of `datasets` first.
        cache_dir: where that cache is.
        num_proc: processes that fill it.

    Raises:
        ValueError: naming the file, column or row that is wrong.
    """
    builder = ViTZooBuilder(folder=str(Path(folder).absolute()), state=_state(Path(folder)), cache_dir=cache_dir)
    if streaming:
        return builder.as_streaming_dataset(split=split)
    try:
        builder.download_and_prepare(num_proc=num_proc)
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, ValueError):
            raise error.__cause__ from None
        raise
    return builder.as_dataset(split=split)


def state_dict(row):
    """The tensors of a row, as views of one buffer.

    Raises:
        ValueError: if the weights are not as long as the shapes say.
    """
    import torch

    kind = getattr(torch, row["dtype"])
    lengths = [math.prod(shape) for shape in row["shapes"]]
    if not isinstance(row["weights"], bytes) or len(row["weights"]) != sum(lengths) * kind.itemsize:
        raise ValueError(
            f"{row['file']} has {len(row['weights'])} bytes of weights instead of {sum(lengths) * kind.itemsize}: the"
            " formats torch and numpy of datasets cut zeros off the end; take rows without a format"
        )
    if not lengths:
        return {}
    parts = torch.frombuffer(bytearray(row["weights"]), dtype=kind).split(lengths)
    shaped = zip(row["names"], parts, row["shapes"], strict=True)
    return {name: part.view(tuple(shape)) for name, part, shape in shaped}


@dataclass
class ViTZooConfig(datasets.BuilderConfig):
    """Which folder, and a hash of what is in it: `datasets` would otherwise go on using what it has in its cache."""

    folder: str = ""
    state: str = ""


class ViTZooBuilder(datasets.ArrowBasedBuilder):
    """One row a file, one shard a file."""

    BUILDER_CONFIG_CLASS = ViTZooConfig

    def _info(self):
        table = _read_factors(Path(self.config.folder))
        columns = datasets.Features.from_arrow_schema(table.schema)
        columns.pop("split", None)
        return datasets.DatasetInfo(features=datasets.Features({**columns, **OWN_COLUMNS}))

    def _split_generators(self, dl_manager):
        rows = _read_factors(Path(self.config.folder)).to_pylist()
        members = {}
        for row in rows:
            members.setdefault(row.pop("split", "train"), []).append(row)
        return [
            datasets.SplitGenerator(name=split, gen_kwargs={"folder": self.config.folder, "rows": held})
            for split, held in members.items()
        ]

    def _generate_tables(self, folder, rows):
        schema = self.info.features.arrow_schema
        for number, row in enumerate(rows):
            values = row | read_checkpoint(Path(folder, row["file"]))
            columns = [pa.array([values[name]], schema.field(name).type) for name in schema.names]
            yield datasets.builder.Key(number, 0), pa.Table.from_arrays(columns, schema=schema)


def read_checkpoint(path):
    """Names, shapes, dtype, length and raw bytes of a safetensors file, tensors in the order they lie in it."""
    with path.open("rb") as file:
        entries = _header(file, path)
        dtype, item = _common_dtype(entries, path)
        length = sum(math.prod(entry["shape"]) for _, entry in entries)
        data = file.read()
    end = 0
    for name, entry in entries:
        if entry["data_offsets"] != [end, end + item * math.prod(entry["shape"])]:
            raise ValueError(f"{path} is damaged: tensor {name!r} does not lie where its shape says")
        end = entry["data_offsets"][1]
    if len(data) != item * length:
        raise ValueError(f"{path} is damaged: {len(data)} bytes follow its header, {item * length} should")
    names, shapes = [name for name, _ in entries], [entry["shape"] for _, entry in entries]
    return {"names": names, "shapes": shapes, "dtype": dtype, "num_parameters": length, "weights": data}


def _header(file, path):
    """Tensors of a safetensors file, by their place in it."""
    start = file.read(8)
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
    if not 2 <= length <= LONGEST_HEADER:
        raise ValueError(f"{path} is no safetensors file: its first bytes are no length of a header")
    try:
        held = json.loads(file.read(length))
        held.pop("__metadata__", None)
        return sorted(held.items(), key=lambda entry: entry[1]["data_offsets"])
    except (ValueError, AttributeError, KeyError, TypeError):
        raise ValueError(f"{path} is no safetensors file, or damaged: its header is no JSON of tensors") from None


def _common_dtype(entries, path):
    kinds = sorted({entry["dtype"] for _, entry in entries})
    if len(kinds) != 1 or kinds[0] not in DTYPES:
        raise ValueError(
            f"{path} has tensors of {', '.join(kinds) or 'no type'}; expected one of {', '.join(DTYPES)}"
        )
    return DTYPES[kinds[0]]


def _read_factors(folder):
    """`factors.csv` with typed columns, checked."""
    table = folder / TABLE
    if not table.is_file():
        raise ValueError(f"{folder} has no {TABLE}: it needs a column `file`, maybe `split`, and any factors")
    try:
        with table.open(newline="", encoding="utf-8") as file:
            head = next(csv.reader(file), [])
        text = pa.csv.ConvertOptions(column_types={name: pa.string() for name in ("file", "split")})
        rows = pa.csv.read_csv(table, convert_options=text)
    except (pa.ArrowInvalid, UnicodeDecodeError, StopIteration) as error:
        raise ValueError(f"{table} cannot be read: {error}") from None
    if "file" not in head or len(set(head)) < len(head):
        raise ValueError(f"{table} has the columns {', '.join(head)}; it needs `file`, and none twice")
    taken = sorted(set(head) & set(OWN_COLUMNS))
    if taken:
        raise ValueError(f"{table} has a column {taken[0]!r}, which is filled from the files: rename it")
    files = rows["file"].to_pylist()
    if not files:
        raise ValueError(f"{table} lists no file")
    seen = {}
    for number, name in enumerate(files, 1):
        if seen.setdefault(name, number) != number:
            raise ValueError(f"{table} lists {name!r} twice, in rows {seen[name]} and {number}")
        if not name or Path(name).is_absolute() or ".." in Path(name).parts or not (folder / name).is_file():
            raise ValueError(f"{table} lists {name!r} in row {number}, which is no file in {folder}")
    for number, split in enumerate(rows["split"].to_pylist() if "split" in head else (), 1):
        if not re.fullmatch(r"\w+", split):
            raise ValueError(f"{table} has the split {split!r} in row {number}: a split is letters, digits and _")
    types = [pa.field(name, KEPT.get(str(rows[name].type), pa.string())) for name in rows.column_names]
    return rows.cast(pa.schema(types))


def _state(folder):
    """Changes with the table, and with the size or time of any file it lists."""
    rows = _read_factors(folder)
    digest = hashlib.sha256((folder / TABLE).read_bytes())
    for name in rows["file"].to_pylist():
        status = (folder / name).stat()
        digest.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]
