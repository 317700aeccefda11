"""CKA of all pairs of models beside pytorch-cka and ckatorch, and how much memory files of features take.

python benchmarks/cka_pairs.py [--smoke] [--json FILE] [--large]

Peers: pip install pytorch-cka==1.1.3 ckatorch==1.0.3 seaborn. ckatorch is timed on PEER_PAIRS pairs and scaled.
`--large` writes 250 files of 10,000 x 384 float32 (3.84 GB) to a temporary folder, and takes minutes on all cores.
"""

import argparse
import importlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import side_by_side
import torch

import vitzoo_hf as vz

MODELS, IMAGES, FEATURES = 50, 2048, 192
BATCH = 256
PEER_PAIRS = 2
LARGE = (250, 10_000, 384)
ROUNDS = 5
SMOKE = {"MODELS": 24, "IMAGES": 64, "FEATURES": 8, "BATCH": 32, "PEER_PAIRS": 1, "LARGE": (4, 100, 8), "ROUNDS": 1}


def main() -> None:
    parser = side_by_side.parser(__doc__)
    parser.add_argument("--large", action="store_true", help="features of 250 x 10,000 x 384 from files, minutes")
    parser.add_argument("--from-folder", type=Path, help=argparse.SUPPRESS)
    given = side_by_side.parsed(parser, globals(), SMOKE)
    if given.from_folder:
        from_folder(given.from_folder)
        return
    side_by_side.report("cka_pairs", speed(given.smoke), given)
    if given.large:
        side_by_side.report("cka_from_files", [large()], given)


def peer(module: str, package: str, smoke: bool) -> Any:
    """The package to compare with; a smoke run goes on without it, a measurement does not."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        missing = f"{error}: python -m pip install {package}"
        if not smoke:
            sys.exit(missing)
        print(f"skipped the rows of {module}: {missing}")
        return None


def related(models: int, images: int, features: int) -> torch.Tensor:
    """Models that share a signal, each with a basis and noise of its own."""
    random = torch.Generator().manual_seed(0)
    signal = torch.randn(1, images, features, generator=random)
    bases = torch.randn(models, features, features, generator=random) / features**0.5
    return signal @ bases + torch.randn(models, images, features, generator=random)


def minibatch(features: torch.Tensor) -> torch.Tensor:
    similarity = vz.MinibatchCKA()
    for batch in features.split(BATCH, dim=1):
        similarity.update(batch)
    return similarity.cka()


def speed(smoke: bool) -> list[dict]:
    pytorch_cka = peer("cka", "pytorch-cka==1.1.3", smoke)
    ckatorch = peer("ckatorch.core", "--no-deps ckatorch==1.0.3 seaborn", smoke)
    torch.set_num_threads(1)
    features = related(MODELS, IMAGES, FEATURES)
    layers = features[:24]
    pairs = MODELS * (MODELS + 1) // 2
    few = [(0, other) for other in range(1, 1 + PEER_PAIRS)]

    def loop() -> list[torch.Tensor]:
        return [ckatorch.cka_base(features[p], features[q], unbiased=True) for p, q in few]

    ways: dict[str, tuple[Callable[[], object], float, str]] = {
        "cka": (lambda: vz.cka(features), 1, ""),
        f"MinibatchCKA, batches of {BATCH}": (lambda: minibatch(features), 1, "estimate"),
        "cka_between, 12 x 12 layers": (lambda: vz.cka_between(layers[:12], layers[12:]), 1, "144 pairs"),
        "cka, 24 layers": (lambda: vz.cka(layers), 1, "300 pairs"),
    }
    if pytorch_cka:
        ways["pytorch-cka cka_from_features"] = lambda: pytorch_cka.cka_from_features(features, features), 1, ""
    if ckatorch:
        note = f"{PEER_PAIRS} pairs timed, scaled to {pairs}"
        ways["ckatorch cka_base, unbiased"] = loop, pairs / PEER_PAIRS, note
    taken = side_by_side.interleaved({name: way for name, (way, _, _) in ways.items()}, ROUNDS)
    base = taken["cka"]["cpu_s"]
    exact = vz.cka(features[:8].double())
    errors = {"cka": vz.cka(features)[:8, :8], f"MinibatchCKA, batches of {BATCH}": minibatch(features)[:8, :8]}
    return [
        {
            "way": name,
            "cpu_s": taken[name]["cpu_s"] * times,
            "wall_s": taken[name]["wall_s"] * times,
            "times_cka": taken[name]["cpu_s"] * times / base,
            "largest_error": float((errors[name] - exact).abs().max()) if name in errors else float("nan"),
            "gemm_gflops": gemm_gflops(),
            "note": note,
        }
        for name, (_, times, note) in ways.items()
    ]


def gemm_gflops() -> float:
    """Speed of a large float32 product on one thread: what the figures are bound by."""
    square = torch.randn(2048, 2048)
    start = time.process_time()
    square @ square
    return 2 * 2048**3 / (time.process_time() - start) / 1e9


def large() -> dict:
    """Features of many models from files, in a process of its own whose peak memory is measured."""
    models, images, width = LARGE
    with tempfile.TemporaryDirectory() as folder:
        random = np.random.default_rng(0)
        signal = random.standard_normal((images, width), np.float32)
        for model in range(models):
            noise = random.standard_normal((images, width), np.float32)
            np.save(Path(folder) / f"{model:03d}.npy", signal + noise)
        start = time.perf_counter()
        command = [sys.executable, __file__, "--from-folder", folder]
        printed = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ).stdout
        megabytes, cpu, value = map(float, printed.split())
        return {
            "way": "cka of " + " x ".join(map(str, LARGE)) + " float32 from FeatureFile",
            "features_mb": models * images * width * 4 / 1e6,
            "peak_memory_mb": megabytes,
            "cpu_s": cpu,
            "wall_s": time.perf_counter() - start,
            "threads": torch.get_num_threads(),
            "mean_off_diagonal": value,
        }


def from_folder(folder: Path) -> None:
    result = vz.cka([vz.FeatureFile(path) for path in sorted(folder.glob("*.npy"))])
    value = (result.sum() - result.trace()) / (result.numel() - len(result))
    print(side_by_side.peak_memory_mb(), time.process_time(), value.item())


if __name__ == "__main__":
    main()
