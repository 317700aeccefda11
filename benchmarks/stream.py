"""Streaming weights: ours beside pyarrow, `datasets`, LitData and safetensors, for rows of 88 MB and of 108 kB.

LitData reads the same Parquet files, where it is installed (`pip install --no-deps litdata==0.2.76
lightning-utilities boto3 botocore s3transfer jmespath tifffile obstore polars polars-runtime-32`).

python benchmarks/stream.py [--smoke] [--json FILE]
"""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import side_by_side
import torch
from safetensors.torch import load_file, save_file

from vitzoo_hf.format import schema
from vitzoo_hf.format.shards import write_parquet
from vitzoo_hf.models.architecture import Architecture
from vitzoo_hf.models.rebuild import weights_of
from vitzoo_hf.zoo import Zoo

LARGE_ROWS = 8
SMALL_ROWS = 500
ROUNDS = 5
LARGE = side_by_side.VIT_S
SMOKE = {"LARGE_ROWS": 3, "SMALL_ROWS": 60, "ROUNDS": 1, "LARGE": side_by_side.MICRO}


def main() -> None:
    given = side_by_side.parsed(side_by_side.parser(__doc__), globals(), SMOKE)
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_HOME"] = folder
        rows = large(Path(folder)) + small(Path(folder))
    side_by_side.report("stream", rows, given)


def large(folder: Path) -> list[dict]:
    """Rows of ViT-S size into one reused tensor, each touched by a sum of a few values."""
    place = side_by_side.random_zoo(folder / "large", LARGE, LARGE_ROWS)
    models = list(side_by_side.random_rows(LARGE, 3))
    features = schema.row_features({"seed": "int"}, weights="list")
    write_parquet(folder / "list.parquet", features, [[row] for row in models], {})
    save_file({"weights": torch.from_numpy(models[0]["weights"])}, folder / "one.safetensors")
    del models
    shards = sorted((place / "weights").glob("*.parquet"))
    target = torch.empty(Architecture(*LARGE).layout.num_parameters)
    checked = Zoo(place)
    list(checked.stream(batch_size=1, reuse=True))

    def by_pyarrow(read: Callable[[pq.ParquetFile, int], object]) -> Callable[[], object]:
        def way() -> None:
            for shard in shards:
                opened = pq.ParquetFile(shard)
                for group in range(opened.num_row_groups):
                    read(opened, group)

        return way

    def copied(opened: pq.ParquetFile, group: int) -> None:
        target.numpy()[:] = weights_of(opened.read_row_group(group))

    def by_datasets() -> None:
        for row in datasets.load_dataset(
            "parquet", data_files=str(folder / "list.parquet"), split="train", streaming=True
        ).with_format("torch"):
            target[:] = row["weights"]

    cached = datasets.load_dataset(
        "parquet", data_files=[str(shard) for shard in shards], split="train", cache_dir=str(folder / "cache")
    ).with_format("arrow")

    def map_style() -> None:
        for number in range(LARGE_ROWS):
            target.numpy()[:] = weights_of(cached[number])

    def by_safetensors() -> None:
        for _ in range(LARGE_ROWS):
            target.numpy()[:] = load_file(folder / "one.safetensors")["weights"].numpy()

    ways = {
        "zoo.stream(reuse=True), rows verified before": lambda: drain(checked.stream(batch_size=1, reuse=True)),
        "zoo.stream(reuse=True), hashing every row": lambda: drain(Zoo(place).stream(batch_size=1, reuse=True)),
        "zoo.stream(reuse=True, num_workers=2), hashing every row": lambda: drain(
            Zoo(place).stream(batch_size=1, reuse=True, num_workers=2)
        ),
        "zoo.stream(reuse=True, verify=False)": lambda: drain(
            Zoo(place).stream(batch_size=1, reuse=True, verify=False)
        ),
        "zoo.stream(verify=False), fresh memory": lambda: drain(Zoo(place).stream(batch_size=1, verify=False)),
        "pyarrow.read_row_group": by_pyarrow(lambda opened, group: opened.read_row_group(group)),
        "pyarrow.read_row_group, copied into a tensor": by_pyarrow(copied),
        "load_dataset(streaming=True).with_format('torch'), list column": by_datasets,
        "map-style from the Arrow cache, weights_of": map_style,
        "safetensors.load_file": by_safetensors,
        **litdata_ways(shards, folder / "litdata-large"),
    }
    counts = dict.fromkeys(ways, LARGE_ROWS) | {"load_dataset(streaming=True).with_format('torch'), list column": 3}
    return figures("88 MB", ways, counts, target.nbytes)


def small(folder: Path) -> list[dict]:
    """Rows of 27k parameters in batches of 50."""
    place = side_by_side.random_zoo(folder / "small", side_by_side.NANO, SMALL_ROWS)
    files = [str(shard) for shard in (place / "weights").glob("*.parquet")]
    checked = Zoo(place)
    drain(checked.stream(batch_size=50))
    cached = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(folder / "cache"))

    def streamed(form: str) -> Callable[[], object]:
        return lambda: drain(
            datasets.load_dataset("parquet", data_files=files, split="train", streaming=True).with_format(form)
        )

    ways = {
        "zoo.stream(batch_size=50), rows verified before": lambda: drain(checked.stream(batch_size=50)),
        "zoo.stream(batch_size=50), hashing every row": lambda: drain(Zoo(place).stream(batch_size=50)),
        "zoo.stream(batch_size=50, shuffle=True), rows verified before": lambda: drain(
            checked.stream(batch_size=50, shuffle=True)
        ),
        "load_dataset(streaming=True).with_format('torch'), by row": streamed("torch"),
        "load_dataset(...).with_format('torch'), map-style by row": lambda: drain(cached.with_format("torch")),
        "load_dataset(...).with_format('torch').iter(50), map-style": lambda: drain(
            cached.with_format("torch").iter(50)
        ),
        "zoo.stream(batch_size=1), rows verified before": lambda: drain(checked.stream(batch_size=1)),
        "zoo.stream(batch_size=1), hashing every row": lambda: drain(Zoo(place).stream(batch_size=1)),
        **litdata_ways([Path(file) for file in files], folder / "litdata-small"),
    }
    return figures("108 kB", ways, dict.fromkeys(ways, SMALL_ROWS), 4 * 26_922)


def litdata_ways(shards: list[Path], folder: Path) -> dict[str, Callable[[], object]]:
    """LitData over the same shards, row by row; nothing if it is not there."""
    try:
        from litdata import StreamingDataset, index_parquet_dataset
        from litdata.streaming.item_loader import ParquetLoader
    except ImportError:
        return {}
    folder.mkdir()
    for shard in shards:  # its index lies beside them
        (folder / shard.name).symlink_to(shard)
    index_parquet_dataset(str(folder))

    def rows(columns: list[str] | None) -> StreamingDataset:
        return StreamingDataset(str(folder), item_loader=ParquetLoader(columns=columns))

    def tensors(items: object) -> None:
        for item in items:
            held = item["weights"]
            values = torch.frombuffer(bytearray(held), dtype=torch.float32) if isinstance(held, bytes) else held
            torch.as_tensor(values)[:4].sum()

    return {
        "litdata.StreamingDataset": lambda: tensors(rows(None)),
        "litdata.StreamingDataset, weights alone": lambda: tensors(rows(["weights"])),
    }


def drain(rows: object) -> None:
    for row in rows:
        if isinstance(row["weights"], torch.Tensor | np.ndarray):
            row["weights"].reshape(-1)[:4].sum()


def figures(size: str, ways: dict, counts: dict[str, int], row_bytes: int) -> list[dict]:
    taken = side_by_side.interleaved(ways, ROUNDS)
    ours, *_ = taken
    return [
        {
            "row": size,
            "way": way,
            "rows_per_s": counts[way] / t["wall_s"],
            "gb_per_s": counts[way] * row_bytes / t["wall_s"] / 1e9,
            "gb_per_cpu_s": counts[way] * row_bytes / t["cpu_s"] / 1e9,
            "ours_over_it_wall": t["wall_s"] / counts[way] * counts[ours] / taken[ours]["wall_s"],
            "ours_over_it_cpu": t["cpu_s"] / counts[way] * counts[ours] / taken[ours]["cpu_s"],
        }
        for way, t in taken.items()
    ]


if __name__ == "__main__":
    main()
