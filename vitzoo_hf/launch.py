"""Every run of a blueprint on this machine: one single-threaded worker process a core, parents before children.

Finished runs are skipped and unfinished ones continue, so the answer to any interruption is to launch again.
A worker that dies is replaced and its run tried again; if this process dies, its workers end by themselves.
"""

import multiprocessing
import os
import signal
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from filelock import FileLock, Timeout

from vitzoo_hf.blueprint import Blueprint, Run
from vitzoo_hf.progress import progress_bar
from vitzoo_hf.schema import ZooError

ATTEMPTS = 3


@dataclass
class Summary:
    """What became of the runs, by run id."""

    finished: list[str] = field(default_factory=list)
    diverged: dict[str, str] = field(default_factory=dict)
    orphaned: list[str] = field(default_factory=list)


@dataclass
class _Worker:
    process: BaseProcess
    connection: Connection
    run: Run | None = None
    epochs: int = 0


def launch(
    blueprint: Blueprint,
    folder: Path,
    *,
    workers: int | None = None,
    device: str = "cpu",
    progress: bool = True,
) -> Summary:
    """Train every run of `blueprint` that `folder` does not hold yet.

    Args:
        blueprint: what to train.
        folder: gets one folder a run.
        workers: processes; by default one a core, or one for a CUDA device.
        device: passed to `train_run`.
        progress: show a bar of epochs with the time left.

    Returns:
        Which runs are finished, diverged, or could not start because their parent diverged.

    Raises:
        ZooError: if a run cannot be trained, or another process is training into `folder`.
        KeyboardInterrupt: after stopping the workers; launching again continues.
    """
    if workers is not None and workers < 1:
        raise ZooError(f"workers is {workers}; it must be at least 1")
    if device != "cpu":
        from vitzoo_hf.rebuild import usable_device

        usable_device(device)
    with exclusive(folder):
        for leftover in folder.glob("*/.tmp-*"):
            leftover.unlink(missing_ok=True)
        summary = Summary()
        todo = unfinished(blueprint, folder, summary)
        if todo:
            count = min(workers or default_workers(device), len(todo))
            _Pool(blueprint, folder, device, summary, progress).train(todo, count)
    return summary


def default_workers(device: str) -> int:
    """One process a core this process may use; one for a CUDA device."""
    if device.startswith("cuda"):
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process alone; the lock goes with the process, however that ends.

    Raises:
        ZooError: if another process holds it, or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock", timeout=0)
        lock.acquire()
    except Timeout:
        raise ZooError(f"another process is working in {folder}: wait for it, or choose another folder") from None
    except OSError as error:
        raise ZooError(f"cannot write into {folder}: {error.strerror or error}") from None
    try:
        yield
    finally:
        lock.release()


def unfinished(blueprint: Blueprint, folder: Path, summary: Summary) -> list[Run]:
    """Runs still to train; those that are finished go into `summary`."""
    from vitzoo_hf.train import is_finished

    todo = []
    for run in blueprint.runs:
        if is_finished(blueprint, run, folder):
            summary.finished.append(run.run_id)
        else:
            todo.append(run)
    return todo


def take_orphans(waiting: list[Run], summary: Summary) -> list[Run]:
    """Move runs whose parent will never be finished from `waiting` into `summary`; returns them."""
    lost = set(summary.diverged) | set(summary.orphaned)
    orphans = [run for run in waiting if run.parent_run in lost]
    summary.orphaned += [run.run_id for run in orphans]
    waiting[:] = [run for run in waiting if run not in orphans]
    return orphans


class _Pool:
    """Worker processes and the runs they are given."""

    def __init__(self, blueprint: Blueprint, folder: Path, device: str, summary: Summary, progress: bool) -> None:
        self.blueprint, self.folder, self.device = blueprint, folder, device
        self.summary = summary
        self.attempts: dict[str, int] = {}
        self.progress = progress
        self.workers: list[_Worker] = []
        self.total = 0

    def train(self, todo: Sequence[Run], count: int) -> None:
        waiting = list(todo)
        self.total = sum(run.epochs for run in waiting)
        self.bar = progress_bar("training", "epoch", shown=self.progress, total=self.total)
        try:
            self.workers = [self._spawn() for _ in range(count)]
            while waiting or any(worker.run for worker in self.workers):
                self.total -= sum(run.epochs for run in take_orphans(waiting, self.summary))
                self.bar.total = self.total
                self._assign(waiting)
                busy = [worker for worker in self.workers if worker.run]
                if not busy:
                    break
                ready = set(wait([end for worker in busy for end in (worker.connection, worker.process.sentinel)]))
                for worker in busy:
                    if worker.connection in ready:
                        self._receive(worker, waiting)
                    elif worker.process.sentinel in ready:
                        self._replace(worker, waiting)
        finally:
            self._stop()

    def _assign(self, waiting: list[Run]) -> None:
        finished = set(self.summary.finished)
        for worker in self.workers:
            run = next((run for run in waiting if run.parent_run is None or run.parent_run in finished), None)
            if worker.run is None and run is not None:
                waiting.remove(run)
                worker.run, worker.epochs = run, 0
                try:
                    worker.connection.send(run.run_id)
                except (BrokenPipeError, ConnectionResetError):
                    self._replace(worker, waiting)

    def _receive(self, worker: _Worker, waiting: list[Run]) -> None:
        assert worker.run is not None
        try:
            kind, value = worker.connection.recv()
        except (EOFError, ConnectionResetError):
            self._replace(worker, waiting)
            return
        if kind == "epoch":
            self.bar.update(value - worker.epochs)
            worker.epochs = value
            return
        run, worker.run = worker.run, None
        if kind == "finished":
            self.summary.finished.append(run.run_id)
        elif kind == "diverged":
            self.summary.diverged[run.run_id] = value
            self.bar.update(run.epochs - worker.epochs)
        elif kind == "mistake":
            raise ZooError(value)
        else:
            raise RuntimeError(f"training {run.run_id} failed:\n{value}")

    def _replace(self, worker: _Worker, waiting: list[Run]) -> None:
        """Put a fresh process in the place of a dead one and its run back in front of the queue."""
        worker.process.join()
        code, run = worker.process.exitcode, worker.run
        if run is not None:
            self.attempts[run.run_id] = self.attempts.get(run.run_id, 0) + 1
            if self.attempts[run.run_id] >= ATTEMPTS:
                raise ZooError(
                    f"the worker training {run.run_id} died {ATTEMPTS} times (exit code {code});"
                    " if memory ran out, train with fewer workers"
                )
            waiting.insert(0, run)
            self.bar.update(-worker.epochs)
        worker.connection.close()
        fresh = self._spawn()
        worker.process, worker.connection, worker.run, worker.epochs = (
            fresh.process,
            fresh.connection,
            None,
            0,
        )

    def _spawn(self) -> _Worker:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        with _single_threaded_children():
            process = context.Process(
                target=_work, args=(theirs, self.blueprint, self.folder, self.device), daemon=True
            )
            process.start()
        theirs.close()
        return _Worker(process, ours)

    def _stop(self) -> None:
        for worker in self.workers:
            worker.connection.close()
            worker.process.terminate()
        for worker in self.workers:
            worker.process.join()
        self.bar.close()


@contextmanager
def _single_threaded_children() -> Iterator[None]:
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before


def _work(connection: Connection, blueprint: Blueprint, folder: Path, device: str) -> None:
    """A worker: trains the runs it is sent until the other end of the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    import torch

    from vitzoo_hf.train import train_run
    from vitzoo_hf.trainer import DivergedError

    torch.set_num_threads(1)
    runs = {run.run_id: run for run in blueprint.runs}
    try:
        while True:
            run = runs[connection.recv()]
            try:
                train_run(
                    blueprint,
                    run,
                    folder,
                    device=device,
                    on_epoch=lambda epoch: connection.send(("epoch", epoch)),
                )
                connection.send(("finished", None))
            except DivergedError as error:
                connection.send(("diverged", str(error)))
            except ZooError as error:
                connection.send(("mistake", str(error)))
            except (BrokenPipeError, ConnectionResetError):
                raise
            except Exception:
                connection.send(("failure", traceback.format_exc()))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
