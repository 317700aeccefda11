"""What a Ray worker does: train one run, from what storage holds of it, and keep storage up to date."""

import contextlib
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from vitzoo_hf.blueprint import Blueprint, Run
from vitzoo_hf.checkpoint import RunFolder
from vitzoo_hf.launch import exclusive
from vitzoo_hf.rebuild import usable_device
from vitzoo_hf.run_storage import RunStorage
from vitzoo_hf.schema import VERSION, ZooError
from vitzoo_hf.train import train_run
from vitzoo_hf.trainer import DivergedError
from vitzoo_hf.vit import import_timm

SCRATCH = "vitzoo-run-"
YOUNG = 60.0


@dataclass(frozen=True)
class Job:
    """What all tasks of one launch share.

    Attributes:
        blueprint: what is trained.
        folder: where runs are trained if there is no storage.
        storage: URL of a `RunStorage`.
        shared: a folder that every machine must see, and that the launching process has locked.
        device: `cpu` or `cuda`.
        threads: of torch.
        versions: of the launching process.
    """

    blueprint: Blueprint
    folder: Path
    storage: str | None
    shared: Path | None
    device: str
    threads: int
    versions: dict[str, str]


class Reports:
    """How far each run is; lives in an actor of its own."""

    def __init__(self) -> None:
        self.epochs: dict[str, int] = {}

    def tell(self, run_id: str, epoch: int) -> None:
        """Say that a run has completed this many epochs."""
        self.epochs[run_id] = epoch

    def all(self) -> dict[str, int]:
        """Completed epochs by run id."""
        return self.epochs


def versions() -> dict[str, str]:
    """The versions that training depends on."""
    return {"vitzoo_hf": VERSION, "torch": torch.__version__, "timm": import_timm().__version__}


def train_on_worker(job: Job, run_id: str, reports: Any) -> tuple[str, str]:
    """Train one run.

    Args:
        job: what all tasks share.
        run_id: the run.
        reports: handle of an actor of `Reports`.

    Returns:
        `finished`, `diverged` or `mistake`, and the reason.
    """
    torch.set_num_threads(job.threads)
    run = next(run for run in job.blueprint.runs if run.run_id == run_id)
    try:
        _check_machine(job)
        train_stored(job, run, lambda epoch: reports.tell.remote(run_id, epoch))
    except DivergedError as error:
        return "diverged", str(error)
    except ZooError as error:
        return "mistake", str(error)
    return "finished", ""


def _check_machine(job: Job) -> None:
    if versions() != job.versions:
        raise ZooError(
            f"{socket.gethostname()} has {versions()}, the launching process {job.versions}: install the same"
            " everywhere"
        )
    if job.shared and not (job.shared / ".lock").exists():
        raise ZooError(
            f"{socket.gethostname()} does not see {job.shared}: share it between the machines, or give a storage"
            " that all reach"
        )
    usable_device(job.device)


def train_stored(job: Job, run: Run, on_epoch: Callable[[int], None]) -> None:
    """Train a run in the shared folder, or in scratch space, each checkpoint copied to storage once it is written.

    Raises:
        DivergedError, ZooError: as `train_run`; and if storage cannot be used, or holds a damaged parent.
    """
    if job.storage is None:
        train_run(job.blueprint, run, job.folder, device=job.device, on_epoch=on_epoch)
        return
    storage = RunStorage(job.storage)

    def keep(epoch: int) -> None:
        storage.store(run.run_id, folder)
        on_epoch(epoch)

    with _scratch() as folder:
        storage.fetch(run.run_id, folder)
        if run.parent_run and run.parent_id:
            final = int(run.parent_id.rpartition("@")[2])
            storage.fetch(run.parent_run, folder, epochs=[final])
            if final not in RunFolder(folder / run.parent_run).epochs():
                raise ZooError(f"{storage.url}/{run.parent_run} is damaged: delete it there, and train again")
        try:
            train_run(job.blueprint, run, folder, device=job.device, on_epoch=keep)
        except DivergedError:
            storage.store(run.run_id, folder)
            raise
        storage.store(run.run_id, folder)


@contextmanager
def _scratch() -> Iterator[Path]:
    """A temporary folder that goes with the context; those of workers that were killed go first."""
    for old in Path(tempfile.gettempdir()).glob(f"{SCRATCH}*"):
        with contextlib.suppress(OSError, Timeout):
            if time.time() - old.stat().st_mtime > YOUNG:
                with FileLock(old / ".lock", timeout=0):
                    shutil.rmtree(old)
    with tempfile.TemporaryDirectory(prefix=SCRATCH) as name, exclusive(Path(name)):
        yield Path(name)
