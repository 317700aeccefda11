"""Streaming weights into the GPU, for rows of 88 MB and of 108 kB: ours beside simple loaders and a bare copy.

python benchmarks/gpu_stream.py --out FOLDER [--simulate]

All files were just written, so they lie in the page cache. `line` holds the code that ran.
"""

import tempfile
from collections.abc import Iterable
from pathlib import Path

import gpu_shared
import pyarrow.parquet as pq
import side_by_side
import torch
from safetensors.torch import load_file, save_file

from vitzoo_hf.models.architecture import Architecture
from vitzoo_hf.models.rebuild import weights_of
from vitzoo_hf.zoo import Zoo

LARGE, LARGE_ROWS = side_by_side.VIT_S, 12
SMALL_ROWS = 500
TINY = {"LARGE": side_by_side.MICRO, "LARGE_ROWS": 2, "SMALL_ROWS": 20}
BATCH = 50
OF_LARGE = (
    "drain(zoo.stream(batch_size=1, device='cuda', num_workers=2))",
    "drain(zoo.stream(batch_size=1, device='cuda'))",
    "drain(zoo.stream(batch_size=1, device='cuda', reuse=True))",
    "drain(zoo.stream(batch_size=1, device='cuda', verify=False))",
    "drain(new_zoo().stream(batch_size=1, device='cuda', num_workers=2))",
    "[load_file(file, device='cuda') for _ in range(rows)]",
    "[torch.from_numpy(weights_of(pq.ParquetFile(s).read_row_group(g))).cuda() for s in shards for g in groups(s)]",
    "[pinned.to('cuda', non_blocking=True) for _ in range(rows)]",
)
OF_SMALL = (
    "drain(zoo.stream(batch_size=batch, device='cuda', num_workers=2))",
    "drain(zoo.stream(batch_size=batch, device='cuda'))",
    "drain(zoo.stream(batch_size=batch, device='cuda', shuffle=True))",
    "[row.to('cuda') for row in vectors]",
    "[part.pin_memory().to('cuda', non_blocking=True) for part in vectors.split(batch)]",
)


def main(figures: gpu_shared.Figures) -> None:
    if figures.simulated:
        globals().update(TINY)
    with tempfile.TemporaryDirectory() as folder:
        measure(figures, OF_LARGE, LARGE, LARGE_ROWS, Path(folder) / "large")
        measure(figures, OF_SMALL, side_by_side.NANO, SMALL_ROWS, Path(folder) / "small")


def measure(figures: gpu_shared.Figures, lines: Iterable[str], architecture: tuple, rows: int, folder: Path) -> None:
    """A row for each line; ours is first, and what a way reads is verified before, unless it opens a new zoo."""
    side_by_side.random_zoo(folder, architecture, rows)
    shards = sorted((folder / "weights").glob("*.parquet"))
    numbers = Architecture(*architecture).layout.num_parameters
    save_file({"weights": torch.randn(numbers)}, folder / "one.safetensors")
    names = {
        "zoo": Zoo(folder),
        "new_zoo": lambda: Zoo(folder),
        "drain": drain,
        "load_file": load_file,
        "weights_of": weights_of,
        "pq": pq,
        "groups": lambda shard: range(pq.ParquetFile(shard).num_row_groups),
        "shards": shards,
        "file": folder / "one.safetensors",
        "rows": rows,
        "batch": BATCH,
        "pinned": torch.randn(numbers).pin_memory(),
        "vectors": torch.randn(rows if numbers < 1e6 else 1, numbers),
    }
    ours: float | None = None
    for number, line in enumerate(lines):
        with figures.row(parameters=numbers, rows=rows, line=line) as row:
            timing = gpu_shared.timed(gpu_shared.code(line, names))
            ours = timing.seconds if number == 0 else ours
            row |= {"ms": timing.seconds * 1e3, "gb_per_s": rows * numbers * 4 / timing.seconds / 1e9}
            row |= {"rows_per_s": rows / timing.seconds, "times_ours": timing.seconds / ours if ours else ""}


def drain(stream: Iterable[dict]) -> None:
    """Use each batch on the device, as a training would."""
    for batch in stream:
        batch["weights"].reshape(-1)[:4].sum()


if __name__ == "__main__":
    gpu_shared.main("stream", __doc__, main)
