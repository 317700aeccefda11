"""Distances in weight space: ours beside cdist, pdist and loops in memory, and beside bare streaming out of core.

python benchmarks/distances.py [--smoke] [--json FILE] [--large]
"""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numkong
import numpy as np
import side_by_side
import torch
from scipy.spatial.distance import pdist

from vitzoo_hf.evaluation.weight_metrics import zoo_weight_metrics
from vitzoo_hf.metrics.weight_distances import weight_distances
from vitzoo_hf.zoo import Zoo

MODELS = 250
WEIGHTS = 1_000_000
ERROR_WEIGHTS = 100_000
LOOP_PAIRS = 40
SLOW_MODELS = 60
ROUNDS = 3
STREAMED_ROWS = 40
LARGE_ROWS = 250
CLOSE_WEIGHTS, COPIES = 200_000, 25
STREAMED = side_by_side.VIT_S
EXACT = "donot_use_mm_for_euclid_dist"
SMOKE = {"MODELS": 6, "WEIGHTS": 1000, "LOOP_PAIRS": 3, "SLOW_MODELS": 3, "ROUNDS": 1, "ERROR_WEIGHTS": 1000}
SMOKE |= {"CLOSE_WEIGHTS": 1000, "COPIES": 2, "STREAMED_ROWS": 2, "STREAMED": side_by_side.MICRO}


def main() -> None:
    parser = side_by_side.parser(__doc__)
    parser.add_argument("--large", action="store_true", help=f"stream {LARGE_ROWS} rows (22 GB of disk)")
    given = side_by_side.parsed(parser, globals(), SMOKE)
    with tempfile.TemporaryDirectory() as folder:
        rows = streamed(Path(folder), LARGE_ROWS if given.large else STREAMED_ROWS)
    torch.set_num_threads(1)
    rows += errors() + in_memory() + close_models()
    side_by_side.report("distances", rows, given)


def figure(what: str, way: str, **values: object) -> dict:
    columns = (
        "relative_error",
        "cpu_s",
        "wall_s",
        "over_ours_cpu",
        "gb_per_s",
        "of_the_stream_wall",
        "of_the_stream_cpu",
    )
    return {"what": what, "way": way, **dict.fromkeys(columns, ""), "note": "", **values}


def population(models: int, weights: int, epsilon: float) -> torch.Tensor:
    """A base and noise of `epsilon` of its size."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(models, weights, generator=generator)
    return noise if epsilon == 1 else torch.randn(weights, generator=generator) + epsilon * noise


def errors() -> list[dict]:
    """Largest relative error of any pair, against float64."""
    rows = []
    for epsilon in (1, 1e-2, 1e-3, 1e-4):
        weights = population(50, ERROR_WEIGHTS, epsilon)
        exact = torch.cdist(weights.double(), weights.double(), compute_mode=EXACT)
        off = ~torch.eye(50, dtype=torch.bool)
        ways = {
            "ours": weight_distances(weights),
            "torch.cdist, default": torch.cdist(weights, weights),
            f"torch.cdist, {EXACT}": torch.cdist(weights, weights, compute_mode=EXACT),
        }
        for way, found in ways.items():
            error = ((found.double() - exact).abs() / exact)[off].max().item()
            rows.append(figure(f"50 x {ERROR_WEIGHTS / 1e3:g}k, models {epsilon:g} apart", way, relative_error=error))
    return rows


def in_memory() -> list[dict]:
    weights = population(MODELS, WEIGHTS, 1e-4)
    pairs = MODELS * (MODELS - 1) // 2
    some = [(i, j) for i in range(LOOP_PAIRS) for j in range(i)][:LOOP_PAIRS]
    slow = weights[:SLOW_MODELS]
    slow_share = pairs / (SLOW_MODELS * (SLOW_MODELS - 1) / 2)

    def loop() -> None:
        for i, j in some:
            torch.linalg.vector_norm(weights[i] - weights[j])

    ways: dict[str, tuple[Callable[[], object], float]] = {
        "ours": (lambda: weight_distances(weights), 1.0),
        "torch.cdist, default (matrix products, wrong: see errors)": (lambda: torch.cdist(weights, weights), 1.0),
        f"torch.cdist, {EXACT}": (
            lambda: torch.cdist(slow, slow, compute_mode=EXACT),
            (MODELS / SLOW_MODELS) ** 2,
        ),
        "loop over pairs, norm(w_i - w_j)": (loop, pairs / len(some)),
        "scipy pdist": (lambda: pdist(slow.numpy()), slow_share),
    }
    taken = side_by_side.interleaved({name: way for name, (way, _) in ways.items()}, ROUNDS)
    ours = taken["ours"]["cpu_s"]
    return [
        figure(
            f"{MODELS} x {WEIGHTS / 1e6:g}M, models 0.0001 apart, in memory",
            name,
            cpu_s=taken[name]["cpu_s"] * scale,
            wall_s=taken[name]["wall_s"] * scale,
            over_ours_cpu=taken[name]["cpu_s"] * scale / ours,
            note="" if scale == 1 else f"timed on fewer models or pairs, times {scale:.1f}",
        )
        for name, (_, scale) in ways.items()
    ]


def close_models() -> list[dict]:
    """Models that are far apart, and populations whose Gram matrix cancels: ours beside a float64 Gram matrix."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    apart = drawn(MODELS, CLOSE_WEIGHTS)
    families = drawn(MODELS // COPIES, 1, CLOSE_WEIGHTS).expand(-1, COPIES, -1).flatten(0, 1)
    children = families.clone()
    children[:, -CLOSE_WEIGHTS // 20 :] = drawn(len(children), CLOSE_WEIGHTS // 20)
    populations = {
        "independent": apart,
        "half are duplicates": apart[: MODELS // 2].repeat(2, 1),
        f"{MODELS // COPIES} x {COPIES} copies": families.contiguous(),
        "a chain of epochs": apart[:1] + 1e-3 * drawn(MODELS, CLOSE_WEIGHTS).cumsum(0),
        "children at epoch 0, other heads": children,
        "geometric, 0.9 from one to the next": apart[:1]
        + drawn(1, CLOSE_WEIGHTS) * 0.9 ** torch.arange(MODELS)[:, None],
    }
    rows, best = [], 0.0
    for name, weights in populations.items():
        ways = {
            "ours": lambda weights=weights: weight_distances(weights),
            "float64 Gram of w - w.mean(0): (g_ii + g_jj - 2 g_ij).sqrt()": lambda weights=weights: by_gram(weights),
            "numkong.cdist(w, w, 'euclidean')": lambda weights=weights: numkong.cdist(
                weights.numpy(), weights.numpy(), "euclidean"
            ),
        }
        taken = side_by_side.interleaved(ways, ROUNDS)
        ours = taken["ours"]["cpu_s"]
        best = best or ours
        some = torch.randint(len(weights), (2, 300), generator=generator)
        exact = (weights[some[0]].double() - weights[some[1]].double()).norm(dim=1)
        for way, measure in ways.items():
            distances = torch.as_tensor(np.asarray(measure()))[some[0], some[1]].double()
            error = ((distances - exact).abs() / exact.where(exact > 0, 1)).max().item()
            note = f"{taken[way]['cpu_s'] / best:.2f} times ours of independent models"
            what = f"{len(weights)} x {CLOSE_WEIGHTS / 1e6:g}M, {name}"
            cpu_s, wall_s = taken[way]["cpu_s"], taken[way]["wall_s"]
            ratio = {"cpu_s": cpu_s, "wall_s": wall_s, "over_ours_cpu": cpu_s / ours}
            rows.append(figure(what, way, relative_error=error, note=note, **ratio))
    return rows


def by_gram(weights: torch.Tensor) -> torch.Tensor:
    centred = weights.double() - weights.double().mean(0)
    gram = centred @ centred.T
    squares = gram.diagonal()
    return (squares[:, None] + squares - 2 * gram).clamp(min=0).sqrt()


def streamed(folder: Path, count: int) -> list[dict]:
    """Distances from the shards beside the stream of the same rows, in turns: from the page cache, and from disk."""
    zoo = Zoo(side_by_side.random_zoo(folder / "zoo", STREAMED, count))
    shards = sorted((folder / "zoo" / "weights").iterdir())
    os.sync()
    size = zoo.weight_columns().num_bytes

    def stream() -> None:
        for batch in zoo.stream(batch_size=1, reuse=True, verify=False, columns=[]):
            batch["weights"][0, 0].item()

    def metrics(**options: object) -> Callable[[], object]:
        return lambda: zoo_weight_metrics(zoo, progress=False, **options)

    def columns() -> None:
        for _, block in zoo.weight_columns():
            block[0, 0].item()

    def uncached(way: Callable[[], object]) -> Callable[[], object]:
        def from_disk() -> None:
            for shard in shards:
                with shard.open("rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            way()

        return from_disk

    ways = {
        "zoo.stream(reuse=True, verify=False)": stream,
        "blocks of columns, nothing computed": columns,
        "distances": metrics(statistics=False),
        "distances by block": metrics(statistics=False, per="block"),
        "distances and statistics": metrics(),
    }
    disk = [name for name in ways if "block" not in name]
    both = {(name, "page cache"): way for name, way in ways.items()}
    both |= {(name, "disk"): uncached(ways[name]) for name in disk}
    taken = side_by_side.interleaved(both, 1 if count > STREAMED_ROWS else ROUNDS)
    rows = []
    for (name, source), t in taken.items():
        base = taken["zoo.stream(reuse=True, verify=False)", source]
        rows.append(
            figure(
                f"{count} ViT-S, {size / 1e9:.2f} GB, from {source}",
                name,
                cpu_s=t["cpu_s"],
                wall_s=t["wall_s"],
                gb_per_s=size / t["wall_s"] / 1e9,
                of_the_stream_wall=base["wall_s"] / t["wall_s"],
                of_the_stream_cpu=base["cpu_s"] / t["cpu_s"],
                note=f"peak memory of the process {side_by_side.peak_memory_mb():.0f} MB",
            )
        )
    return rows


if __name__ == "__main__":
    main()
