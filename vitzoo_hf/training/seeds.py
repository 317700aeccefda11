"""Seeds of the steps of a run, and the global generators while it trains."""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


def derive_seed(seed: int, purpose: str, epoch: int = 0) -> int:
    """A seed for one purpose and epoch, unrelated to the seeds of other purposes.

    >>> derive_seed(42, "order", 1) != derive_seed(42, "views", 1)
    True
    """
    digest = hashlib.sha256(f"{seed}:{purpose}:{epoch}".encode()).digest()
    # 63 bits: torch's generators take seeds as signed 64-bit integers
    return int.from_bytes(digest[:8], "big") >> 1


@dataclass
class GlobalDraws:
    """The state of the global generators for one of several trainings that alternate in one process.

    Over all turns, `taken()` draws what `seeded_globals` would draw at one stretch.
    """

    seed: int
    device: str

    def __post_init__(self) -> None:
        with seeded_globals(self.seed):
            self._state = self._global_state()

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Draw from this training's generators; the global ones are put back afterwards."""
        before = self._global_state()
        self._set_global_state(self._state)
        try:
            yield
        finally:
            # first: the next turn goes on where this one stops, also after an error
            self._state = self._global_state()
            self._set_global_state(before)

    # Any: random and numpy promise no type for their states, only that the setter takes them
    def _global_state(self) -> tuple[Any, Any, Tensor, Tensor | None]:
        on_cuda = torch.cuda.get_rng_state(self.device) if self.device.startswith("cuda") else None
        return random.getstate(), np.random.get_state(), torch.get_rng_state(), on_cuda

    def _set_global_state(self, state: tuple[Any, Any, Tensor, Tensor | None]) -> None:
        random.setstate(state[0])
        np.random.set_state(state[1])
        torch.set_rng_state(state[2])
        if state[3] is not None:
            torch.cuda.set_rng_state(state[3], self.device)


@contextmanager
def seeded_globals(seed: int) -> Iterator[None]:
    """Seed the global generators that timm's Mixup and RandomErasing draw from; put them back afterwards."""
    before = random.getstate(), np.random.get_state()
    random.seed(seed)
    # numpy's legacy generator refuses larger seeds
    np.random.seed(seed % 2**32)
    # torch's generators too, of every CUDA device, as manual_seed seeds them all
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])
