"""How much a block of work holds: what stays in a core's cache, or a share of an accelerator's memory.

Sizes depend on the device alone, never on what is free at the moment, so that a call repeated gives the same bits.
"""

import torch

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
