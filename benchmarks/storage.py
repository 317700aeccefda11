"""Writing rows of ViT-S size and of 27k parameters: size and speed, ours beside `Dataset.to_parquet`.

python benchmarks/storage.py [--smoke] [--json FILE]
"""

import tempfile
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import side_by_side

from vitzoo_hf.format import schema
from vitzoo_hf.format.encoding import encoding_of, rounded
from vitzoo_hf.format.shards import write_parquet

LARGE_ROWS = 2
SMALL_ROWS = 500
ROUNDS = 3
LARGE = side_by_side.VIT_S
SMOKE = {"LARGE_ROWS": 1, "SMALL_ROWS": 38, "ROUNDS": 1, "LARGE": side_by_side.MICRO}


def main() -> None:
    given = side_by_side.parsed(side_by_side.parser(__doc__), globals(), SMOKE)
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        rows = measure("ViT-S, 22.05M", LARGE, LARGE_ROWS, 1, Path(folder))
        rows += measure("nano, 26.9k", side_by_side.NANO, SMALL_ROWS, 37, Path(folder))
    side_by_side.report("storage", rows, given)


def measure(name: str, architecture: tuple, count: int, group: int, folder: Path) -> list[dict]:
    models = list(side_by_side.random_rows(architecture, count))
    raw = sum(row["weights"].nbytes for row in models)

    def ours(dtype: str) -> Callable[[], object]:
        held = [row | {"dtype": dtype, "weights": rounded(row["weights"], dtype)} for row in models]
        encoding = encoding_of(models[0]["num_parameters"], dtype)
        features = schema.row_features({"seed": "int"}, weights=encoding)
        step = group if encoding == "list" else 1
        groups = [held[start : start + step] for start in range(0, count, step)]
        return lambda: write_parquet(folder / f"ours-{dtype}.parquet", features, groups, {})

    features = schema.row_features({"seed": "int"}, weights="list")
    arrow = [{**row, "stage": 0, "head": 0} for row in models]
    as_list = datasets.Dataset.from_generator(lambda: iter(arrow), features=features, cache_dir=str(folder / name))
    as_bytes = as_list.remove_columns("weights").add_column("weights", [row["weights"].tobytes() for row in models])
    ways = {
        "ours, float32": ours("float32"),
        "ours, bfloat16": ours("bfloat16"),
        "Dataset.to_parquet, list column": lambda: as_list.to_parquet(folder / "list.parquet"),
        "Dataset.to_parquet, binary column": lambda: as_bytes.to_parquet(folder / "bytes.parquet"),
        "numpy.save of the bare matrix": lambda: np.save(
            folder / "x.npy", np.stack([row["weights"] for row in models])
        ),
    }
    files = ("ours-float32.parquet", "ours-bfloat16.parquet", "list.parquet", "bytes.parquet", "x.npy")
    written = dict(zip(ways, files, strict=True))
    taken = side_by_side.interleaved(ways, ROUNDS)
    base = taken["Dataset.to_parquet, list column"]["cpu_s"]
    return [
        {
            "rows": name,
            "way": way,
            "size_over_raw_float32": (folder / written[way]).stat().st_size / raw,
            "gb_per_cpu_s": raw / t["cpu_s"] / 1e9,
            "times_to_parquet_on_list": base / t["cpu_s"],
            "times_to_parquet_on_list_wall": taken["Dataset.to_parquet, list column"]["wall_s"] / t["wall_s"],
        }
        for way, t in taken.items()
    ]


if __name__ == "__main__":
    main()
