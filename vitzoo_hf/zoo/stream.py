"""Batches of weights in a fixed or shuffled order, resumable to the batch, shared between ranks and workers.

The whole order of an epoch follows from the seed, the epoch and the index, before anything is read. So the state of
a stream is two numbers, and continuing neither loses nor repeats a row. Batches are read ahead by threads.

Cost: `num_workers + 1` batches `[B, D]` of host memory, pinned where they go to CUDA.
"""

import fnmatch
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
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
from vitzoo_hf.read_ahead import mapped_ahead

ALIGNMENT = 256  # of memory of a device
WINDOW_BYTES = 256_000_000
"""Weights among which rows are shuffled: row groups of a window are read in one go, wherever its rows end up."""

Batch = dict[str, Any]
"""`weights`, float32 `[B, D]`; a tensor or list for each column; `tensors` where tensors were asked for by name."""


@dataclass(frozen=True)
class RowSource:
    """The selected rows of a zoo, their light columns, and the reader of their weights.

    Attributes:
        positions: the positions of the selected rows in the index, ascending.
        layout_ids: position -> layout fingerprint.
        layouts: fingerprint -> layout.
        columns: light column -> the values of all positions, as a list or a tensor.
        reader: the reader of the weights, by position.
    """

    positions: np.ndarray
    layout_ids: Sequence[str]
    layouts: Mapping[str, Layout]
    columns: Mapping[str, list[object] | Tensor]
    reader: WeightReader


@dataclass(frozen=True)
class Selection:
    """The tensors of one layout that a stream hands out."""

    parts: list[slice]
    layout: Layout


@dataclass
class _Slot:
    """Host memory for one batch, and the event of the copy that must end before the memory is filled again."""

    buffer: Tensor | None = None
    copy_event: torch.cuda.Event | None = None


@dataclass(frozen=True)
class _Loaded:
    batch: Batch
    copy_event: torch.cuda.Event | None


class Stream(IterableDataset[Batch]):
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
        self._copy_stream: torch.cuda.Stream | None = None

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_copy_stream": None}  # a stream of the device belongs to its process

    def __iter__(self) -> Iterator[Batch]:
        if self.device.type == "cuda" and self._copy_stream is None:
            # one for all batches, as each stream of the device has a pool of memory
            self._copy_stream = torch.cuda.Stream(self.device)
        for loaded in self._read_ahead(self._batches()[self.batches_done :]):
            if loaded.copy_event is not None:
                cuda_stream = torch.cuda.current_stream(self.device)
                cuda_stream.wait_event(loaded.copy_event)
                # without this the allocator may hand the memory out while kernels of the caller still read it
                loaded.batch["weights"].record_stream(cuda_stream)
            # counted before the batch is handed out: a state taken while the caller uses it must not repeat it
            self.batches_done += 1
            yield loaded.batch
        self.epoch += 1
        self.batches_done = 0

    def set_epoch(self, epoch: int) -> None:
        """Start at the beginning of this epoch, counted from 0."""
        self.epoch, self.batches_done = epoch, 0

    def state_dict(self) -> dict[str, int | str]:
        """The place of the stream: the epoch, the number of batches handed out, and a fingerprint of the order."""
        return {"epoch": self.epoch, "batches_done": self.batches_done, "order": self._order_fingerprint()}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Continue from `state_dict`.

        Raises:
            ZooError: if the state is of a stream with other rows or another order.
        """
        complete = isinstance(state, Mapping) and {"epoch", "batches_done", "order"} <= state.keys()
        epoch, batches_done = (state["epoch"], state["batches_done"]) if complete else (None, None)
        if not (isinstance(epoch, int) and isinstance(batches_done, int) and epoch >= 0 and batches_done >= 0):
            raise ZooError(f"this is no state of a stream: expected what `state_dict()` gives, got {str(state)[:80]}")
        if state["order"] != self._order_fingerprint():
            raise ZooError(
                "this state is of another stream: its zoo, filter, batch size, shuffle, seed, rank and world size"
                " must be equal"
            )
        self.epoch, self.batches_done = epoch, batches_done

    def _order_fingerprint(self) -> str:
        ids = self.source.reader.rows.model_ids
        rows = [ids[position] for position in self.source.positions.tolist()]
        return fingerprint([rows, self.batch_size, self.shuffle, self.seed, self.rank, self.world_size])

    def _batches(self) -> list[list[int]]:
        """The positions of the rows of every batch of this epoch, for this rank and loader worker."""
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
        """Neighbouring row groups joined up to `WINDOW_BYTES`: rows are shuffled within a window."""
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
        unfilled: dict[str, list[int]] = {}
        batches = []
        for window in windows:
            for position in window:
                layout = self.source.layout_ids[position]
                rows = unfilled.setdefault(layout, [])
                rows.append(position)
                if len(rows) == self.batch_size:
                    batches.append(unfilled.pop(layout))
        return batches + list(unfilled.values())

    def _read_ahead(self, batches: Sequence[list[int]]) -> Iterator[_Loaded]:
        """Load batches in their order, `num_workers` of them at a time while earlier ones are used."""
        # a slot more than batches read ahead, for the one in use: a slot comes round when its batch was given back
        slots = itertools.cycle([_Slot() for _ in range(self.num_workers + 1)])
        jobs = zip(batches, slots, strict=False)
        if self.num_workers == 0:
            return map(self._load, jobs)
        return mapped_ahead(self._load, jobs, threads=self.num_workers, ahead=self.num_workers)

    def _load(self, job: tuple[list[int], _Slot]) -> _Loaded:
        batch, slot = job
        layout_id = self.source.layout_ids[batch[0]]
        selection = self.selections.get(layout_id)
        layout = self.source.layouts[layout_id] if selection is None else selection.layout
        numbers = {name: values[batch] for name, values in self.source.columns.items() if isinstance(values, Tensor)}
        weights = self._host_memory(len(batch), layout.num_parameters, slot, numbers)
        rows, reader = weights.numpy(), self.source.reader
        for row, position in zip(rows, batch, strict=True):
            if selection is None:
                reader.read_into(position, row, verify=self.verify)
            else:
                reader.read_parts(position, selection.parts, row, verify=self.verify)
        if self._copy_stream is not None:
            weights, numbers = self._sent(slot, weights, numbers)
        columns: Batch = {
            name: numbers[name] if name in numbers else [values[position] for position in batch]
            for name, values in self.source.columns.items()
        }
        columns["weights"] = weights
        if selection is not None:
            columns["tensors"] = unflatten(weights, selection.layout)
        return _Loaded(columns, slot.copy_event)

    def _host_memory(self, rows: int, width: int, slot: _Slot, numbers: Mapping[str, Tensor]) -> Tensor:
        """Memory for weights `[B, D]`: fresh, or that of the slot where it is reused or only staged for a device.

        Staged memory begins with the numeric columns, so that one copy takes all of a batch.
        """
        staged = self._copy_stream is not None
        if not (staged or self.reuse):
            return torch.from_numpy(np.empty((rows, width), np.float32))  # numpy asks for huge pages, torch does not
        if slot.copy_event is not None:
            slot.copy_event.synchronize()
        start = sum(map(_padded_bytes, numbers.values())) if staged else 0
        size = start + 4 * rows * width
        if slot.buffer is None or slot.buffer.numel() < size:
            slot.buffer = torch.empty(size, dtype=torch.uint8, pin_memory=staged)
        return slot.buffer[start:size].view(torch.float32).view(rows, width)

    def _sent(self, slot: _Slot, weights: Tensor, numbers: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The batch on the device, by one copy that nothing waits for; the slot has the event of its end."""
        assert slot.buffer is not None
        start = 0
        for values in numbers.values():
            slot.buffer[start : start + values.nbytes].copy_(values.view(torch.uint8))
            start += _padded_bytes(values)
        # a stream of its own: on the caller's stream the copy would wait for the kernels that use the batch before
        with torch.cuda.stream(self._copy_stream):
            sent = slot.buffer[: start + weights.nbytes].to(self.device, non_blocking=True)
            slot.copy_event = torch.cuda.Event()
            slot.copy_event.record(self._copy_stream)
        columns, position = {}, 0
        for name, values in numbers.items():
            columns[name] = sent[position : position + values.nbytes].view(values.dtype)
            position += _padded_bytes(values)
        return sent[start:].view(torch.float32).view_as(weights), columns


def _padded_bytes(values: Tensor) -> int:
    """Bytes of a column with its padding: what comes next starts where any dtype may."""
    return -(-values.nbytes // ALIGNMENT) * ALIGNMENT


def check_names(what: str, names: object) -> None:
    """Refuse names that are not a list of texts, and an empty list of tensors.

    Raises:
        ZooError: quoting the argument.
    """
    fits = names is None or (
        not isinstance(names, str) and isinstance(names, Sequence) and all(isinstance(name, str) for name in names)
    )
    if not fits or (names is not None and not names and what == "tensors"):
        raise ZooError(f"{what}={names!r}: expected a list of names")


def _share(groups: Sequence[list[int]], part: int, parts: int) -> list[list[int]]:
    """The row groups of one of several readers, in their order, cut so that all readers have as many rows."""
    total = sum(len(group) for group in groups)
    first, last = total * part // parts, total * (part + 1) // parts
    share, start = [], 0
    for group in groups:
        piece = group[max(0, first - start) : max(0, last - start)]
        start += len(group)
        if piece:
            share.append(piece)
    return share


def _selections(source: RowSource, patterns: list[str]) -> dict[str, Selection]:
    """Layout -> the tensors whose names match a pattern, neighbours read as one."""
    selections = {}
    for layout_id in {source.layout_ids[position] for position in source.positions.tolist()}:
        layout = source.layouts[layout_id]
        unmatched = [pattern for pattern in patterns if not fnmatch.filter(layout.names, pattern)]
        if unmatched:
            raise ZooError(
                f"tensors={unmatched[0]!r} matches no tensor of layout {layout_id}:"
                f" {did_you_mean(unmatched[0], layout.names)}"
            )
        names = [name for name in layout.names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
        shapes = dict(zip(layout.names, layout.shapes, strict=True))
        selections[layout_id] = Selection(
            _merged([layout.place(name) for name in names]),
            Layout(tuple(names), tuple(shapes[name] for name in names)),
        )
    return selections


def _merged(parts: Sequence[slice]) -> list[slice]:
    merged: list[slice] = []
    for part in parts:
        if merged and merged[-1].stop == part.start:
            merged[-1] = slice(merged[-1].start, part.stop)
        else:
            merged.append(part)
    return merged


def light_columns(
    records: Mapping[str, list[Any]], kinds: Mapping[str, type], selection: Sequence[str] | None
) -> dict[str, list[object] | Tensor]:
    """Columns of the index as a stream hands them out; what becomes a tensor depends on the type alone.

    Args:
        records: column -> values of all rows.
        kinds: column -> Python type of its values.
        selection: names of the columns to hand out; None for all.

    Raises:
        ZooError: for an unknown column.
    """
    check_names("columns", selection)
    for name in selection or ():
        if name not in records:
            raise ZooError(f"unknown column {name!r}: {did_you_mean(name, records)}")
    columns: dict[str, list[object] | Tensor] = {}
    for name in records if selection is None else selection:
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
