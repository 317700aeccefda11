"""Agreement of 250 models on 10,000 images of 100 classes, and the other pairs: ours beside loops and peers.

python benchmarks/agreement.py [--smoke] [--json FILE]

One thread, processor time. A way that is too slow for all pairs is timed on some of them and scaled: column
`pairs_timed` says on how many.
"""

import os

os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")

import ctypes
import itertools
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import side_by_side
import torch
from numkong import cdist
from scipy.spatial.distance import jensenshannon
from sklearn.metrics import accuracy_score, cohen_kappa_score

import vitzoo_hf as vz
from vitzoo_hf.timm_import import declare_operator_schemas, needs_operator_schemas

if needs_operator_schemas():  # or torchmetrics cannot be imported beside a CPU build of torch
    declare_operator_schemas()

from torchmetrics.functional.classification import multiclass_accuracy

P, N, C = 250, 10_000, 100
PAIRS = math.comb(P, 2)
SAMPLED = 60
COUNT = "np.count_nonzero(a == b) of uint8, loop over pairs"
ROUNDS = 5
JSD_SHAPE = (24, 500, C)
LARGE_JSD_SHAPE = (240, 1000, C)
SMOKE = {"P": 12, "N": 200, "C": 5, "PAIRS": 66, "SAMPLED": 3, "ROUNDS": 1}
SMOKE |= {"JSD_SHAPE": (4, 50, 5), "LARGE_JSD_SHAPE": (6, 20, 5)}


def main() -> None:
    given = side_by_side.parsed(side_by_side.parser(__doc__), globals(), SMOKE)
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(C, (N,), generator=generator)
    noise = torch.randint(C, (P, N), generator=generator)
    predicted = torch.where(torch.rand(P, N, generator=generator) < 0.7, labels, noise)
    logits, large = (2 * torch.randn(shape, generator=generator) for shape in (JSD_SHAPE, LARGE_JSD_SHAPE))
    del noise
    memory = {
        way.__name__: peak_memory_above(way, *arguments)
        for way, arguments in (
            (vz.agreement, (predicted,)),
            (vz.cohen_kappa, (predicted,)),
            (vz.error_consistency, (predicted, labels)),
            (vz.error_overlap, (predicted, labels)),
            (vz.jensen_shannon, (large,)),
        )
    }
    rows = agreement_rows(predicted) + kappa_rows(predicted) + error_rows(predicted, labels)
    rows += divergence_rows(logits, large)
    for row in rows:
        row["peak_mb_above_input"] = memory.get(row["way"].removeprefix("vz."), "")
    side_by_side.report("agreement", rows, given)


def agreement_rows(predicted: torch.Tensor) -> list[dict]:
    codes, wide = predicted.numpy().astype(np.uint8), predicted.numpy()

    def count_nonzero() -> np.ndarray:
        return of_all_pairs(P, lambda i, j: np.count_nonzero(codes[i] == codes[j]) / N)

    def mean_of_int64() -> np.ndarray:
        return of_all_pairs(P, lambda i, j: (wide[i] == wide[j]).mean())

    def numkong_alone() -> np.ndarray:
        return 1 - np.asarray(cdist(codes, codes, "hamming")) / N

    def one_hot_gemm() -> torch.Tensor:
        matches = torch.zeros(P, P)
        for block in predicted.split(512, dim=1):
            one_hot = torch.zeros(*block.shape, C).scatter_(2, block[..., None], 1).flatten(1)
            matches += one_hot @ one_hot.T
        return matches / N

    def broadcasting() -> torch.Tensor:  # at once it would take 625 MB
        return torch.cat([(rows[:, None] == predicted).sum(-1) for rows in predicted.split(10)]) / N

    ways = {
        "vz.agreement": lambda: vz.agreement(predicted),
        COUNT: count_nonzero,
        "(a == b).mean() of int64, loop over pairs": mean_of_int64,
        "numkong.cdist(codes, codes, 'hamming') of uint8": numkong_alone,
        "one-hot GEMM, float32": one_hot_gemm,
        "broadcasting": broadcasting,
        "torchmetrics multiclass_accuracy": lambda: some_pairs(
            predicted, lambda a, b: multiclass_accuracy(a, b, num_classes=C, average="micro")
        ),
        "sklearn accuracy_score": lambda: some_pairs(codes, accuracy_score),
    }
    for name in [way for way in ways if not way.startswith(("torchmetrics", "sklearn"))][1:]:
        np.testing.assert_allclose(ways[name](), vz.agreement(predicted), atol=1e-7)
    return compared("agreement", ways)


def kappa_rows(predicted: torch.Tensor) -> list[dict]:
    codes = predicted.numpy()
    shares = np.stack([np.bincount(row, minlength=C) / N for row in codes])

    def kappa(i: int, j: int) -> float:
        chance = shares[i] @ shares[j]
        return ((codes[i] == codes[j]).mean() - chance) / (1 - chance)

    ways = {
        "vz.cohen_kappa": lambda: vz.cohen_kappa(predicted),
        "numpy, loop over pairs": lambda: of_all_pairs(P, kappa),
        "sklearn cohen_kappa_score": lambda: some_pairs(codes, cohen_kappa_score),
    }
    np.testing.assert_allclose(ways["numpy, loop over pairs"](), vz.cohen_kappa(predicted), atol=1e-12)
    return compared("kappa", ways)


def error_rows(predicted: torch.Tensor, labels: torch.Tensor) -> list[dict]:
    right = (predicted == labels).numpy()

    def consistency(i: int, j: int) -> float:
        a, b = right[i].mean(), right[j].mean()
        chance = a * b + (1 - a) * (1 - b)
        return ((right[i] == right[j]).mean() - chance) / (1 - chance)

    def overlap(i: int, j: int) -> float:
        return (~right[i] & ~right[j]).sum() / (~right[i] | ~right[j]).sum()

    ways = {
        "vz.error_consistency": lambda: vz.error_consistency(predicted, labels),
        "numpy, loop over pairs": lambda: of_all_pairs(P, consistency),
        "both-correct counts alone, one float32 GEMM": lambda: both_correct(predicted, labels),
    }
    overlaps = {
        "vz.error_overlap": lambda: vz.error_overlap(predicted, labels),
        "numpy, loop over pairs": lambda: of_all_pairs(P, overlap),
    }
    np.testing.assert_allclose(of_all_pairs(P, consistency), vz.error_consistency(predicted, labels), atol=1e-12)
    np.testing.assert_allclose(of_all_pairs(P, overlap), vz.error_overlap(predicted, labels), atol=1e-12)
    return compared("error consistency", ways) + compared("error overlap", overlaps)


def both_correct(predicted: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    right = (predicted == labels).float()
    return right @ right.T


def divergence_rows(logits: torch.Tensor, large: torch.Tensor) -> list[dict]:
    probabilities = logits.softmax(-1)
    double = logits.double().softmax(-1).numpy()
    P = len(logits)

    def by_entropies(i: int, j: int) -> float:
        p, q = probabilities[i], probabilities[j]
        entropy = torch.special.entr
        mixed = entropy((p + q) / 2).sum(-1)
        return (mixed - (entropy(p).sum(-1) + entropy(q).sum(-1)) / 2).mean().item()

    def by_scipy(i: int, j: int) -> float:
        return (jensenshannon(double[i], double[j], axis=-1) ** 2).mean()

    ways = {
        "vz.jensen_shannon": lambda: vz.jensen_shannon(logits),
        "vz.jensen_shannon, float64": lambda: vz.jensen_shannon(logits.double()),
        "torch.special.entr, loop over pairs": lambda: of_all_pairs(P, by_entropies, diagonal=0.0),
        "scipy jensenshannon, loop over pairs": lambda: of_all_pairs(P, by_scipy, diagonal=0.0),
    }
    for way in ways.values():
        np.testing.assert_allclose(way(), vz.jensen_shannon(logits.double()), atol=2e-6)
    small = compared("divergence, " + " x ".join(map(str, JSD_SHAPE)), ways, pairs=math.comb(P, 2))
    task = "divergence, " + " x ".join(map(str, LARGE_JSD_SHAPE))
    alone = {"vz.jensen_shannon": lambda: vz.jensen_shannon(large)}
    return small + compared(task, alone, pairs=math.comb(len(large), 2))


def of_all_pairs(count: int, measure: Callable[[int, int], float], diagonal: float = 1.0) -> np.ndarray:
    matrix = np.full((count, count), diagonal)
    for i, j in itertools.combinations(range(count), 2):
        matrix[i, j] = matrix[j, i] = measure(i, j)
    return matrix


def some_pairs(predicted, measure: Callable) -> None:
    for other in range(1, SAMPLED + 1):
        measure(predicted[0], predicted[other])


def compared(task: str, ways: dict[str, Callable[[], object]], pairs: int | None = None) -> list[dict]:
    pairs = PAIRS if pairs is None else pairs
    peers = ("torchmetrics", "sklearn")
    taken = side_by_side.interleaved(ways, ROUNDS)
    timed = {name: SAMPLED if name.startswith(peers) else pairs for name in ways}
    seconds = {name: t["cpu_s"] * pairs / timed[name] for name, t in taken.items()}
    ours = next(iter(seconds.values()))
    return [
        {"task": task, "way": name, "cpu_s": cpu_s, "times_ours": cpu_s / ours, "pairs_timed": timed[name]}
        for name, cpu_s in seconds.items()
    ]


def peak_memory_above(way: Callable, *arguments: torch.Tensor) -> float:
    """MB by which the process's peak rises above what it held before; freed memory is given back first."""

    def status(key: str) -> float:
        (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key)]
        return int(line.split()[1]) / 1e3

    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    way(*arguments)
    return status("VmHWM") - before


if __name__ == "__main__":
    main()
