"""Blocks of work: how much they hold, pieces of columns, memory that is used again.

A block holds what stays in a core's cache, or a share of an accelerator's memory.

Sizes of blocks depend on the device alone, so a call repeated gives the same bits while the same inputs `fits`: only
whether they stay on an accelerator depends on what is free when the call begins.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

BLOCK_ELEMENTS = 2**18  # values of a piece: 1 MB, which stays in a core's cache
MAX_COLUMNS = 4096  # longer float32 sums would lose a digit
SHARE_OF_MEMORY = 32
"""An accelerator's memory over this is one temporary: kernels of gigabytes, and room for a dozen of them."""


def block_bytes(device: torch.device, cached: int) -> int:
    """Bytes of one temporary of a computation in blocks.

    Args:
        device: where the computation runs.
        cached: bytes on the CPU, where larger temporaries fall out of the cache.
    """
    if device.type != "cuda":
        return cached
    # kernels start in 5 us each: blocks sized for a processor's cache would take longer to start than to compute
    return max(cached, int(torch.cuda.get_device_properties(device).total_memory) // SHARE_OF_MEMORY)


def fits(device: torch.device, size: int, limit: int) -> bool:
    """Whether `size` bytes may stay on the device for the whole of a call.

    Args:
        device: where they would lie.
        size: bytes.
        limit: bytes on the CPU; an accelerator holds half of what is free when it is asked.
    """
    if device.type != "cuda":
        return size <= limit
    return size <= torch.cuda.mem_get_info(device)[0] // 2


class Scratch:
    """Memory of temporaries that is taken once: fresh memory of their size costs more than filling it."""

    def __init__(self) -> None:
        self._buffers: dict[int, Tensor] = {}

    def like(
        self, piece: Float[Tensor, "P c"], number: int = 0, dtype: torch.dtype | None = None
    ) -> Float[Tensor, "P c"]:
        """Uninitialised memory of the shape of `piece`; the next call with this number overwrites it."""
        size, kind = piece.numel(), (dtype or piece.dtype, piece.device)
        buffer = self._buffers.get(number)
        if buffer is None or buffer.numel() < size or (buffer.dtype, buffer.device) != kind:
            buffer = self._buffers[number] = torch.empty(size, dtype=kind[0], device=piece.device)
        return buffer[:size].view(piece.shape)


def column_pieces(block: Float[Tensor, "P c"], elements: int | None = None) -> Iterator[Tensor]:
    """The block in pieces of columns that fit the cache, or an accelerator's block, in the working precision.

    Args:
        block: some columns of all vectors.
        elements: values of a piece on the CPU, by default as many as fit beside two temporaries.
    """
    if block.device.type == "cuda":
        width = max(MAX_COLUMNS, block_bytes(block.device, 0) // (8 * len(block)) // MAX_COLUMNS * MAX_COLUMNS)
    else:
        width = max(256, min(MAX_COLUMNS, (elements or BLOCK_ELEMENTS) // len(block)))
    for piece in block.split(width, dim=1):
        yield piece.to(working(block.dtype))


def working(dtype: torch.dtype) -> torch.dtype:
    """The precision that weights of this dtype are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32
