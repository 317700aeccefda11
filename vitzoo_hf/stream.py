"""Batches of weights in a fixed or shuffled order, resumable to the batch, shared between ranks and workers.

The whole order of an epoch follows from the seed, the epoch and the index, before anything is read. So the state of
a stream is two numbers, and continuing neither loses nor repeats a row.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch.utils.data import IterableDataset, get_worker_info

from vitzoo_hf.rebuild import usable_device
from vitzoo_hf.row_tables import collate
from vitzoo_hf.schema import ZooError, fingerprint

WINDOW_BYTES = 256_000_000


@dataclass(frozen=True)
class RowSource:
    """What a stream knows of a zoo.

    Attributes:
        groups: positions of the chosen rows, one array a row group.
        layouts: position -> layout fingerprint.
        row_bytes: position -> bytes of its weights.
        model_ids: position -> id.
        read: positions, ascending -> rows in that order.
        schema: Arrow types of the light columns.
    """

    groups: Sequence[np.ndarray]
    layouts: Sequence[str]
    row_bytes: Sequence[int]
    model_ids: Sequence[str]
    read: Callable[[np.ndarray], Iterator[dict[str, Any]]]
    schema: pa.Schema


class Stream(IterableDataset[dict[str, Any]]):
    """Batches of one layout each; made by `Zoo.stream`.

    Iterating gives one epoch; the next iteration gives the next one, in another order if shuffled. In a
    `torch.utils.data.DataLoader(stream, batch_size=None, num_workers=…)` each worker reads row groups of its own.
    """

    def __init__(
        self,
        source: RowSource,
        *,
        batch_size: int,
        device: str | torch.device = "cpu",
        shuffle: bool = False,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if batch_size < 1:
            raise ZooError(f"batch_size is {batch_size}; it must be at least 1")
        if not 0 <= rank < world_size:
            raise ZooError(f"rank {rank} of {world_size}: ranks count from 0 to world_size - 1")
        self.source, self.batch_size, self.device = source, batch_size, usable_device(device)
        self.shuffle, self.seed = shuffle, seed
        self.rank, self.world_size = rank, world_size
        self.epoch = 0
        self.batches_done = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        windows, batches = self._plan()
        remaining = batches[self.batches_done :]
        wanted = {position for batch in remaining for position in batch}
        read = self._read([[position for position in window if position in wanted] for window in windows])
        held: dict[int, dict[str, Any]] = {}
        for batch in remaining:
            while not held.keys() >= set(batch):
                held |= next(read)
            self.batches_done += 1
            yield collate([held.pop(position) for position in batch], self.source.schema, self.device)
        self.epoch += 1
        self.batches_done = 0

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is: the epoch, and the batches of it that were handed out."""
        return {"epoch": self.epoch, "batches_done": self.batches_done, "order": self._order_fingerprint()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`.

        Raises:
            ZooError: if the state is of a stream with other rows or another order.
        """
        if state["order"] != self._order_fingerprint():
            raise ZooError(
                "this state is of another stream: its zoo, filter, batch size, shuffle, seed, rank and world size"
                " must be equal"
            )
        self.epoch, self.batches_done = state["epoch"], state["batches_done"]

    def _order_fingerprint(self) -> str:
        rows = [self.source.model_ids[position] for group in self.source.groups for position in group]
        return fingerprint([rows, self.batch_size, self.shuffle, self.seed, self.rank, self.world_size])

    def _plan(self) -> tuple[list[list[int]], list[list[int]]]:
        """The windows that are read one after the other, and the batches made of their rows."""
        groups = [group.tolist() for group in self.source.groups]
        generator = np.random.default_rng([self.seed, self.epoch])
        if self.shuffle:
            groups = [groups[index] for index in generator.permutation(len(groups))]
        worker = get_worker_info()
        part, parts = self.rank, self.world_size
        if worker is not None:
            part, parts = self.rank * worker.num_workers + worker.id, self.world_size * worker.num_workers
        windows = self._windows(groups[part::parts])
        if self.shuffle:
            windows = [[window[index] for index in generator.permutation(len(window))] for window in windows]
        return windows, self._batches(windows)

    def _windows(self, groups: Sequence[Sequence[int]]) -> list[list[int]]:
        """Neighbouring row groups together, up to `WINDOW_BYTES`: rows are shuffled within a window."""
        windows: list[list[int]] = []
        size = WINDOW_BYTES
        for group in groups:
            group_bytes = sum(self.source.row_bytes[position] for position in group)
            if size + group_bytes > WINDOW_BYTES:
                windows.append([])
                size = 0
            windows[-1] += group
            size += group_bytes
        return windows

    def _batches(self, windows: Sequence[Sequence[int]]) -> list[list[int]]:
        waiting: dict[str, list[int]] = {}
        batches = []
        for window in windows:
            for position in window:
                rows = waiting.setdefault(self.source.layouts[position], [])
                rows.append(position)
                if len(rows) == self.batch_size:
                    batches.append(waiting.pop(self.source.layouts[position]))
        return batches + list(waiting.values())

    def _read(self, windows: Sequence[Sequence[int]]) -> Iterator[dict[int, dict[str, Any]]]:
        for window in windows:
            positions = np.sort(np.asarray(window, dtype=np.int64))
            yield dict(zip(positions.tolist(), self.source.read(positions), strict=True))
