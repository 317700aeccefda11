"""Batches of weights in a fixed or shuffled order, resumable to the batch, shared between ranks and workers.

The whole order of an epoch follows from the seed, the epoch and the index, before anything is read. So the state of
a stream is two numbers, and continuing neither loses nor repeats a row. Batches are read ahead by threads.
"""

import fnmatch
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from vitzoo_hf.format.layout import Layout, unflatten
from vitzoo_hf.format.messages import did_you_mean
from vitzoo_hf.format.schema import ZooError, fingerprint
from vitzoo_hf.format.weight_reader import WeightReader
from vitzoo_hf.models.rebuild import usable_device

WINDOW_BYTES = 256_000_000


@dataclass(frozen=True)
class RowSource:
    """What a stream knows of a zoo.

    Attributes:
        positions: of the chosen rows, ascending.
        layout_ids: position -> layout fingerprint.
        layouts: fingerprint -> layout.
        columns: light column -> the values of all positions, as a list or a tensor.
        reader: of their weights.
    """

    positions: np.ndarray
    layout_ids: Sequence[str]
    layouts: Mapping[str, Layout]
    columns: Mapping[str, list[Any] | Tensor]
    reader: WeightReader


@dataclass(frozen=True)
class Selection:
    """The tensors of one layout that a stream hands out."""

    parts: list[slice]
    layout: Layout


@dataclass
class _Slot:
    """A batch's memory on the host, and what must have happened before it may be filled again."""

    buffer: Tensor | None = None
    copied: Any = None


@dataclass(frozen=True)
class _Loaded:
    batch: dict[str, Any]
    copied: Any = field(default=None)


class Stream(IterableDataset[dict[str, Any]]):
    """Batches of one layout each; made by `Zoo.stream`.

    Iterating gives one epoch; the next iteration gives the next one, in another order if shuffled. An iteration that
    was left early is continued by the next one; `set_epoch` starts at the beginning. In a
    `torch.utils.data.DataLoader(stream, batch_size=None, num_workers=…)` each worker reads rows of its own; there,
    call `set_epoch` before every epoch, as workers count epochs for themselves.
    """

    def __init__(
        self,
        source: RowSource,
        *,
        batch_size: int,
        device: str | torch.device = "cpu",
        tensors: Sequence[str] | None = None,
        shuffle: bool = False,
        seed: int = 0,
        num_workers: int = 1,
        rank: int = 0,
        world_size: int = 1,
        verify: bool = True,
        reuse: bool = False,
    ) -> None:
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("num_workers", num_workers, 0),
            ("seed", seed, 0),
            ("world_size", world_size, 1),
            ("rank", rank, 0),
        ):
            if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
                raise ZooError(f"{name} is {value!r}; it must be a whole number of at least {least}")
        if not rank < world_size:
            raise ZooError(f"rank {rank} of {world_size}: ranks count from 0 to world_size - 1")
        self.source, self.batch_size, self.device = source, batch_size, usable_device(device)
        check_names("tensors", tensors)
        self.tensors = None if tensors is None else list(tensors)
        self.selections = {} if tensors is None else _selections(source, list(tensors))
        self.shuffle, self.seed = shuffle, seed
        self.num_workers, self.verify, self.reuse = num_workers, verify, reuse
        self.rank, self.world_size = rank, world_size
        self.epoch = 0
        self.batches_done = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for loaded in self._read_ahead(self._batches()[self.batches_done :]):
            if loaded.copied is not None:
                here = torch.cuda.current_stream(self.device)
                here.wait_event(loaded.copied)
                loaded.batch["weights"].record_stream(here)
            self.batches_done += 1
            yield loaded.batch
        self.epoch += 1
        self.batches_done = 0

    def set_epoch(self, epoch: int) -> None:
        """Start at the beginning of this epoch, counted from 0."""
        self.epoch, self.batches_done = epoch, 0

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is: the epoch, and the batches of it that were handed out."""
        return {"epoch": self.epoch, "batches_done": self.batches_done, "order": self._order_fingerprint()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`.

        Raises:
            ZooError: if the state is of a stream with other rows or another order.
        """
        known = isinstance(state, Mapping) and {"epoch", "batches_done", "order"} <= state.keys()
        if not known or not all(isinstance(state[key], int) and state[key] >= 0 for key in ("epoch", "batches_done")):
            raise ZooError(f"this is no state of a stream: expected what `state_dict()` gives, got {str(state)[:80]}")
        if state["order"] != self._order_fingerprint():
            raise ZooError(
                "this state is of another stream: its zoo, filter, batch size, shuffle, seed, rank and world size"
                " must be equal"
            )
        self.epoch, self.batches_done = state["epoch"], state["batches_done"]

    def _order_fingerprint(self) -> str:
        ids = self.source.reader.rows.model_ids
        rows = [ids[position] for position in self.source.positions.tolist()]
        return fingerprint([rows, self.batch_size, self.shuffle, self.seed, self.rank, self.world_size])

    def _batches(self) -> list[list[int]]:
        """The positions of every batch of this epoch that is this rank's and worker's."""
        numbers = self.source.reader.places.groups()[self.source.positions]
        starts = np.flatnonzero(np.diff(numbers, prepend=-1))
        groups = [part.tolist() for part in np.split(self.source.positions, starts[1:])] if len(numbers) else []
        generator = np.random.default_rng([self.seed, self.epoch])
        if self.shuffle:
            groups = [groups[index] for index in generator.permutation(len(groups))]
        worker = get_worker_info()
        part, parts = self.rank, self.world_size
        if worker is not None:
            part, parts = self.rank * worker.num_workers + worker.id, self.world_size * worker.num_workers
        windows = self._windows(_share(groups, part, parts))
        if self.shuffle:
            windows = [[window[index] for index in generator.permutation(len(window))] for window in windows]
        return self._in_batches(windows)

    def _windows(self, groups: Sequence[Sequence[int]]) -> list[list[int]]:
        """Neighbouring row groups together, up to `WINDOW_BYTES`: rows are shuffled within a window."""
        windows: list[list[int]] = []
        size = WINDOW_BYTES
        for group in groups:
            group_bytes = sum(self.source.reader.row_bytes(position) for position in group)
            if size + group_bytes > WINDOW_BYTES:
                windows.append([])
                size = 0
            windows[-1] += group
            size += group_bytes
        return windows

    def _in_batches(self, windows: Sequence[Sequence[int]]) -> list[list[int]]:
        waiting: dict[str, list[int]] = {}
        batches = []
        for window in windows:
            for position in window:
                layout = self.source.layout_ids[position]
                rows = waiting.setdefault(layout, [])
                rows.append(position)
                if len(rows) == self.batch_size:
                    batches.append(waiting.pop(layout))
        return batches + list(waiting.values())

    def _read_ahead(self, batches: Sequence[list[int]]) -> Iterator[_Loaded]:
        """Load batches in their order, `num_workers` of them at a time while earlier ones are used."""
        slots = deque(_Slot() for _ in range(self.num_workers + 1))
        if self.num_workers == 0:
            for batch in batches:
                yield self._load(batch, slots[0])
            return
        with ThreadPoolExecutor(self.num_workers, thread_name_prefix="vitzoo-stream") as pool:
            pending: deque[Future[_Loaded]] = deque()
            upcoming = iter(batches)
            try:
                for batch in upcoming:
                    pending.append(pool.submit(self._load, batch, slots[0]))
                    slots.rotate(-1)
                    if len(pending) == self.num_workers:
                        break
                while pending:
                    loaded = pending.popleft().result()
                    following = next(upcoming, None)
                    if following is not None:
                        pending.append(pool.submit(self._load, following, slots[0]))
                        slots.rotate(-1)
                    yield loaded
            finally:
                for future in pending:
                    future.cancel()

    def _load(self, batch: Sequence[int], slot: _Slot) -> _Loaded:
        host = self._host_memory(batch, slot)
        rows, reader = host.numpy(), self.source.reader
        selection = self.selections.get(self.source.layout_ids[batch[0]])
        for row, position in zip(rows, batch, strict=True):
            if selection is None:
                reader.read_into(position, row, verify=self.verify)
            else:
                reader.read_parts(position, selection.parts, row, verify=self.verify)
        weights, slot.copied = _sent(host, self.device)
        loaded: dict[str, Any] = {}
        for name, values in self.source.columns.items():
            if isinstance(values, Tensor):
                loaded[name] = values[list(batch)].to(self.device)
            else:
                loaded[name] = [values[position] for position in batch]
        loaded["weights"] = weights
        if selection is not None:
            loaded["tensors"] = unflatten(weights, selection.layout)
        return _Loaded(loaded, slot.copied)

    def _host_memory(self, batch: Sequence[int], slot: _Slot) -> Tensor:
        """Memory for a batch `[B, D]`: fresh, or the slot's own where it is reused or only staged for a device."""
        layout_id = self.source.layout_ids[batch[0]]
        selection = self.selections.get(layout_id)
        layout = self.source.layouts[layout_id] if selection is None else selection.layout
        shape = (len(batch), layout.num_parameters)
        staged = self.device.type == "cuda"
        if not (staged or self.reuse):
            return torch.from_numpy(np.empty(shape, np.float32))  # numpy asks for huge pages, torch does not
        if slot.copied is not None:
            slot.copied.synchronize()
        if slot.buffer is None or slot.buffer.numel() < shape[0] * shape[1]:
            slot.buffer = torch.empty(shape[0] * shape[1], pin_memory=staged)
        return slot.buffer[: shape[0] * shape[1]].view(shape)


def check_names(what: str, names: Any) -> None:
    """Refuse names that are no list of texts, or an empty one.

    Raises:
        ZooError: saying what was given.
    """
    fits = names is None or (
        not isinstance(names, str) and isinstance(names, Sequence) and all(isinstance(name, str) for name in names)
    )
    if not fits or (names is not None and not names and what == "tensors"):
        raise ZooError(f"{what}={names!r}: expected a list of names")


def _share(groups: Sequence[list[int]], part: int, parts: int) -> list[list[int]]:
    """The row groups of one of several readers, in their order: as many rows for each, so that few are cut."""
    total = sum(len(group) for group in groups)
    first, last = total * part // parts, total * (part + 1) // parts
    mine, start = [], 0
    for group in groups:
        piece = group[max(0, first - start) : max(0, last - start)]
        start += len(group)
        if piece:
            mine.append(piece)
    return mine


def _sent(host: Tensor, device: torch.device) -> tuple[Tensor, Any]:
    """The batch on its device, and the event after which it is there; host memory itself for the CPU."""
    if device.type != "cuda":
        return host.to(device), None
    side = torch.cuda.Stream(device)
    with torch.cuda.stream(side):
        there = host.to(device, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record(side)
    return there, copied


def _selections(source: RowSource, patterns: list[str]) -> dict[str, Selection]:
    """Layout -> the tensors whose names match a pattern, neighbours read as one."""
    used = {source.layout_ids[position] for position in source.positions.tolist()}
    chosen = {}
    for layout_id in used:
        layout = source.layouts[layout_id]
        unmatched = [pattern for pattern in patterns if not fnmatch.filter(layout.names, pattern)]
        if unmatched:
            raise ZooError(
                f"tensors={unmatched[0]!r} matches no tensor of layout {layout_id}:"
                f" {did_you_mean(unmatched[0], layout.names)}"
            )
        names = [name for name in layout.names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
        shapes = dict(zip(layout.names, layout.shapes, strict=True))
        chosen[layout_id] = Selection(
            _merged([layout.place(name) for name in names]),
            Layout(tuple(names), tuple(shapes[name] for name in names)),
        )
    return chosen


def _merged(parts: Sequence[slice]) -> list[slice]:
    merged: list[slice] = []
    for part in parts:
        if merged and merged[-1].stop == part.start:
            merged[-1] = slice(merged[-1].start, part.stop)
        else:
            merged.append(part)
    return merged


def light_columns(
    records: Mapping[str, list[Any]], kinds: Mapping[str, type], chosen: Sequence[str] | None
) -> dict[str, list[Any] | Tensor]:
    """Columns of the index as a stream hands them out; what becomes a tensor depends on the type alone.

    Args:
        records: column -> values of all rows.
        kinds: column -> Python type of its values.
        chosen: columns to keep; None for all.

    Raises:
        ZooError: for an unknown column.
    """
    check_names("columns", chosen)
    for name in chosen or ():
        if name not in records:
            raise ZooError(f"unknown column {name!r}: {did_you_mean(name, records)}")
    columns: dict[str, Any] = {}
    for name in records if chosen is None else chosen:
        values = records[name]
        if kinds[name] is bool:
            columns[name] = torch.tensor([bool(value) for value in values])
        elif kinds[name] is int and name in ("epoch", "num_parameters"):
            columns[name] = torch.tensor(values, dtype=torch.int64)
        elif kinds[name] in (int, float):
            numbers = [float("nan") if value is None else value for value in values]
            columns[name] = torch.tensor(numbers, dtype=torch.float64)
        else:
            columns[name] = values
    return columns
