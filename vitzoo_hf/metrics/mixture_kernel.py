"""A Triton kernel of the one pairwise metric that no matrix product gives: `sum_k s log s` with `s = p_k + q_k`.

Written with torch alone, every pair of values passes through memory several times. The kernel keeps a tile of pairs
in registers, and takes one logarithm for each pair of values. Triton comes with CUDA builds of torch; it is imported
when a CUDA tensor is there, or under `TRITON_INTERPRET=1`, which runs the kernel on the CPU for tests.
"""

import importlib.util
from functools import cache

import torch
from jaxtyping import Float, Float64
from torch import Tensor

MODELS, COLUMNS = 16, 32
"""Models by models, and values of each, of a tile: 8,192 sums in the registers of one program."""
MOST_SPLITS, MOST_SUMS = 64, 2**25
"""Parts of the columns that run side by side, with sums `[P, P]` each: no atomics, so equal bits each time."""
LEAST_COLUMNS = 4096


def has_triton() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


@cache
def _kernel():  # type: ignore[no-untyped-def]  # Triton has no types
    import triton
    import triton.language as tl

    @triton.jit
    def mixture(values, sums, P, K, columns, BLOCK: tl.constexpr, STEP: tl.constexpr):  # type: ignore[no-untyped-def]
        i, j, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
        if j >= i:  # the rest is the transpose
            first, second = i * BLOCK + tl.arange(0, BLOCK), j * BLOCK + tl.arange(0, BLOCK)
            total = tl.zeros([BLOCK, BLOCK], dtype=tl.float64)
            start = split * columns
            for offset in range(0, columns, STEP):
                k = start + offset + tl.arange(0, STEP)
                # int64: 250 models by 10,000 images by 1,000 classes pass 2^31 values
                a = tl.load(values + first[:, None].to(tl.int64) * K + k, (first[:, None] < P) & (k < K), 1.0)
                b = tl.load(values + second[:, None].to(tl.int64) * K + k, (second[:, None] < P) & (k < K), 1.0)
                s = a[:, None, :] + b[None, :, :]
                s = tl.where((k < K)[None, None, :], s, 1.0)  # 1 log 1 adds nothing
                total += tl.sum(s * tl.log(s), axis=2).to(tl.float64)
            place = sums + (split * P + first[:, None]).to(tl.int64) * P + second[None, :]
            tl.store(place, total, (first[:, None] < P) & (second[None, :] < P))

    return mixture


def mixture_sums(values: Float[Tensor, "P K"]) -> Float64[Tensor, "P P"]:
    """The upper triangle of `sum_k s log s` with `s = p_k + q_k`, of all pairs of rows; the rest is arbitrary.

    Args:
        values: positive, float32 or float64, contiguous.
    """
    P, K = values.shape
    # 256 MB of sums at most, however many models there are
    splits = max(1, min(MOST_SPLITS, K // LEAST_COLUMNS, MOST_SUMS // P**2))
    columns = -(-K // (splits * COLUMNS)) * COLUMNS  # whole steps, or the next part would count their end again
    sums = torch.zeros(splits, P, P, dtype=torch.float64, device=values.device)
    tiles = -(-P // MODELS)
    _kernel()[(tiles, tiles, splits)](values, sums, P, K, columns, BLOCK=MODELS, STEP=COLUMNS)
    return sums.sum(0)
