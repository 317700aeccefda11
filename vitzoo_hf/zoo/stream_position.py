"""Where a stream is: the place that its next iteration starts from, and the cursor of each iteration.

The place lies in memory that worker processes of a `DataLoader` share, so they see `set_epoch` while they live.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral

import torch
from torch import Tensor

from vitzoo_hf.format.schema import ZooError

WORKERS = 512
"""Worker processes of one `DataLoader` that are told apart."""
STATE_VERSION = 2


class SharedPosition:
    """The epoch of the next iteration and the batch of the plan that it starts from, seen by worker processes."""

    def __init__(self, epoch: int = 0, batches: int = 0) -> None:
        # epoch, batches, whether workers read; then the epoch and the first batch that each worker began last
        self._shared: Tensor = torch.full((3 + 2 * WORKERS,), -1, dtype=torch.int64).share_memory_()
        self.set(epoch, batches)

    def __getstate__(self) -> dict[str, object]:
        return {"_shared": self._shared}

    def __setstate__(self, state: dict[str, Tensor]) -> None:
        # a process that DataLoader starts is given the very memory, any other pickle a copy
        self._shared = state["_shared"] if state["_shared"].is_shared() else state["_shared"].share_memory_()

    @property
    def epoch(self) -> int:
        """Epoch of the next iteration."""
        return int(self._shared[0])

    @property
    def batches(self) -> int:
        """Batch of the plan that the next iteration starts from."""
        return int(self._shared[1])

    @property
    def workers_read(self) -> bool:
        """Whether the last iteration was one of worker processes."""
        return bool(self._shared[2])

    def set(self, epoch: int, batches: int) -> None:
        """Start the next iteration here."""
        self._shared.fill_(-1)
        self._shared[0], self._shared[1], self._shared[2] = epoch, batches, 0

    def begin(self, worker: int) -> bool:
        """Note that a worker process begins an iteration; false if it began this rest of an epoch before."""
        mine = self._shared[3 + 2 * worker : 5 + 2 * worker]
        is_new = not self.batches or mine.tolist() != [self.epoch, self.batches]
        mine[0], mine[1] = self.epoch, self.batches
        self._shared[2] = 1
        return is_new


@dataclass
class Cursor:
    """The place of one iteration.

    Attributes:
        epoch: the epoch that it iterates over.
        first: batch of the plan that it started from.
        done: batches that it handed out.
        world_size: ranks that share the plan.
        worker: number of the worker process; 0 without any.
        workers: number of worker processes; 1 without any.
    """

    epoch: int
    first: int
    world_size: int
    worker: int = 0
    workers: int = 1
    done: int = 0
    is_spent: bool = False

    def number(self, done: int) -> int:
        """Which batch of its rank comes after `done` batches of this worker, counted from `first`."""
        return done * self.workers + self.worker

    def after(self, done: int) -> int:
        """Batches of the plan that all ranks and workers have handed out after `done` batches of this worker."""
        return self.first + (self.number(done - 1) + 1) * self.world_size if done else self.first

    def state(self, plan: str, num_batches: int) -> dict[str, int | str]:
        """What `state_dict` gives."""
        state: dict[str, int | str] = {"version": STATE_VERSION, "plan": plan, "epoch": self.epoch}
        if self.workers == 1:
            return state | {"batches": min(self.after(self.done), num_batches)}
        # of several workers none knows how far the others are: their loader puts the states together
        return state | {
            "batches": self.first,
            "worker": self.worker,
            "workers": self.workers,
            "world_size": self.world_size,
            "done": self.done,
        }


def is_count(value: object) -> bool:
    """Whether this is a whole number from 0 on, which a tensor of one may be."""
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_floating_point():
        value = value.item()
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 0


def checked_state(state: object, plan: str, num_batches: int) -> Mapping[str, int]:
    """The numbers of a state of a stream.

    Raises:
        ZooError: if it is none, of an earlier version, or of another stream.
    """
    if isinstance(state, Mapping) and {"epoch", "batches_done", "order"} <= state.keys():
        raise ZooError(
            "this state is of an earlier vitzoo-hf, whose ranks and workers shared rows in another way: it cannot be"
            " continued exactly; start an epoch with set_epoch()"
        )
    numbers = {"version", "epoch", "batches"}
    if isinstance(state, Mapping) and "workers" in state:
        numbers |= {"worker", "workers", "world_size", "done"}
    if (
        not isinstance(state, Mapping)
        or not numbers <= state.keys()
        or not all(is_count(state[name]) for name in numbers)
    ):
        raise ZooError(f"this is no state of a stream: expected what `state_dict()` gives, got {str(state)[:80]}")
    if int(state["version"]) != STATE_VERSION:
        raise ZooError(f"this state is of version {state['version']}, this version continues {STATE_VERSION}")
    if state.get("plan") != plan or int(state["batches"]) > num_batches:
        raise ZooError(
            "this state is of another stream: its zoo, filter, batch size, shuffle, seed, drop_last, tensors and pad"
            " must be equal; rank, world size and workers may change"
        )
    return {name: int(state[name]) for name in numbers}
