"""What the benchmarks share: zoos of random models, interleaved timing, a results file."""

import argparse
import csv
import json
import os
import resource
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vitzoo_hf.environment import describe
from vitzoo_hf.format import schema
from vitzoo_hf.models.architecture import Architecture
from vitzoo_hf.publish.folder import Rows, write_zoo

REPOSITORY = Path(__file__).parent.parent
VIT_S = ("vit_small_patch16_224", {"num_classes": 1000}, "linear", None)
NANO = (
    "vit_tiny_patch16_224",
    {"img_size": 16, "patch_size": 4, "in_chans": 1, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 10},
    "linear",
    None,
)
MICRO = (
    "vit_tiny_patch16_224",
    {"img_size": 32, "patch_size": 4, "embed_dim": 64, "depth": 6, "num_heads": 4, "num_classes": 100},
    "linear",
    None,
)
"""The smallest of these models whose weights a zoo stores as raw bytes; smoke runs take it for `VIT_S`."""


def random_rows(architecture: tuple[Any, ...], count: int, *, dtype: str = "float32") -> Iterator[dict[str, Any]]:
    """Rows of random weights, as large as real ones."""
    name, args, head, hidden = architecture
    layout = Architecture(*architecture).layout
    for number in range(count):
        vector = np.random.default_rng(number).standard_normal(layout.num_parameters, np.float32) * np.float32(0.02)
        yield {
            "model_id": f"run{number:05d}@1",
            "run_id": f"run{number:05d}",
            "parent_id": None,
            "stage": "pretrain",
            "epoch": 1,
            "is_final": True,
            "dataset": "none",
            "architecture": name,
            "architecture_args": schema.canonical_json(args),
            "head": head,
            "head_hidden": hidden,
            "factor_seed": number,
            **dict.fromkeys(schema.RESULTS, 0.5),
            "num_parameters": layout.num_parameters,
            "layout": layout.fingerprint,
            "weights_sha256": schema.weights_sha256(vector),
            "dtype": dtype,
            "provenance": "{}",
            "weights": vector,
        }


def random_zoo(folder: Path, architecture: tuple[Any, ...], count: int) -> Path:
    """A zoo of random models in `folder`."""
    largest = Architecture(*architecture).layout.num_parameters
    manifest = {
        "format": schema.FORMAT_VERSION,
        "name": "random",
        "blueprint_fingerprint": None,
        "factors": {"seed": "int"},
        "images": {},
        "splits": {"by": "run", "seed": 0, "train": 1.0, "validation": 0.0, "test": 0.0},
        "missing_runs": {},
    }
    write_zoo(folder, manifest, {"train": Rows(count, largest, random_rows(architecture, count))}, {}, "")
    return folder


def interleaved(ways: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, dict[str, float]]:
    """Median wall and processor seconds of each way, all of them taking turns in every round."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            wall, cpu = time.perf_counter(), time.process_time()
            way()
            taken[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return {
        name: {
            "wall_s": statistics.median(wall for wall, _ in pairs),
            "cpu_s": statistics.median(cpu for _, cpu in pairs),
        }
        for name, pairs in taken.items()
    }


def peak_memory_mb() -> float:
    """The largest resident memory this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def parser(description: str) -> argparse.ArgumentParser:
    """The options that all benchmarks have."""
    options = argparse.ArgumentParser(description=description.splitlines()[0])
    options.add_argument("--json", type=Path, help="write the figures to this file too")
    options.add_argument("--smoke", action="store_true", help="smallest sizes, to see that it runs; keeps no figures")
    return options


def parsed(options: argparse.ArgumentParser, sizes: dict[str, Any], smoke: Mapping[str, Any]) -> argparse.Namespace:
    """The options given; `--smoke` replaces the constants of the script, its `globals()`, by the smallest sizes."""
    given = options.parse_args()
    if given.smoke:
        if unknown := smoke.keys() - sizes.keys():
            raise ValueError(f"the smoke run sets {sorted(unknown)}, which the script does not have")
        sizes.update(smoke)
    return given


def machine() -> dict[str, str]:
    """Machine, versions, commit and date; the commit is that of COMMIT where the copy has no history."""
    commit = os.environ.get("COMMIT", "")
    if not commit and shutil.which("git"):
        command = ["git", "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False).stdout.strip()
    about = {key: str(value) for key, value in describe().items()}
    return about | {"commit": commit, "date": time.strftime("%Y-%m-%d")}


def write_csv(file: Path, rows: list[dict[str, Any]], about: Mapping[str, str]) -> None:
    """Rows with the machine behind each; a row need not have every column."""
    columns = dict.fromkeys(column for row in rows for column in row)
    with file.open("w", newline="") as opened:
        writer = csv.DictWriter(opened, [*columns, *about], lineterminator="\n")
        writer.writeheader()
        writer.writerows(row | about for row in rows)


def report(name: str, rows: list[dict[str, Any]], given: argparse.Namespace) -> None:
    """Print the figures, and keep them with machine, versions and commit in results/ and in the file of `--json`.

    Figures of a smoke run say nothing of speed: results/ keeps those that were measured.
    """
    about = machine()
    if not given.smoke:
        write_csv(Path(__file__).parent / "results" / f"{name}.csv", rows, about)
    for row in rows:
        print(
            "  ".join(f"{key}={value:.4g}" if isinstance(value, float) else f"{value}" for key, value in row.items())
        )
    if given.json is not None:
        given.json.write_text(json.dumps({"figures": rows, "about": about}, indent=1) + "\n")
