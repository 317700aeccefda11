"""The work of a Ray task: train a group of runs, from what storage holds of them, and keep storage up to date."""

import contextlib
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from vitzoo_hf.blueprint.blueprint import Blueprint, Run
from vitzoo_hf.format.atomic import exclusive
from vitzoo_hf.format.schema import VERSION, ZooError
from vitzoo_hf.images.prepared import PreparedBlueprint
from vitzoo_hf.launch.run_storage import RunStorage
from vitzoo_hf.models.rebuild import usable_device
from vitzoo_hf.timm_import import import_timm
from vitzoo_hf.training.checkpoint import RunFolder
from vitzoo_hf.training.stacked import train_stacked

SCRATCH = "vitzoo-run-"
YOUNG = 60.0


@dataclass(frozen=True)
class Job:
    """The facts that all tasks of one launch share.

    Attributes:
        blueprint: the zoo to train.
        folder: where runs are trained if there is no storage.
        storage: URL of a `RunStorage`; None where runs are trained in `folder`.
        shared: a folder that every machine must see, and that the launching process has locked.
        device: `cpu` or `cuda`.
        threads: number of torch threads of a task.
        versions: versions of packages in the launching process.
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


def train_on_worker(job: Job, run_ids: Sequence[str], reports: Any) -> tuple[str, Any]:
    """Train runs of one shape together, or one alone.

    Args:
        job: what all tasks share.
        run_ids: the runs.
        reports: handle of an actor of `Reports`.

    Returns:
        `done`, and run id -> message for runs that diverged; or `mistake`, and the message.
    """
    torch.set_num_threads(job.threads)
    runs = [run for run in job.blueprint.runs if run.run_id in run_ids]
    try:
        _check_machine(job)
        return "done", train_stored(job, runs, reports.tell.remote)
    except ZooError as error:
        return "mistake", str(error)


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


def train_stored(job: Job, runs: Sequence[Run], on_epoch: Callable[[str, int], None]) -> dict[str, str]:
    """Train runs in the shared folder, or in scratch space, each checkpoint copied to storage once it is written.

    Returns:
        Run id -> message, for every run that diverged.

    Raises:
        ZooError: if a run cannot be trained, storage cannot be used, or a parent in it is damaged.
    """
    if job.storage is None:
        return train_stacked(_prepared(job.blueprint), runs, job.folder, device=job.device, on_epoch=on_epoch)
    storage = RunStorage(job.storage)

    def keep(run_id: str, epoch: int) -> None:
        storage.store(run_id, folder)
        on_epoch(run_id, epoch)

    with _scratch() as folder:
        for run in runs:
            storage.fetch(run.run_id, folder)
        for parent_id in sorted({run.parent_id for run in runs if run.parent_id}):
            _fetch_parent(storage, parent_id, folder)
        diverged = train_stacked(_prepared(job.blueprint), runs, folder, device=job.device, on_epoch=keep)
        for run in runs:
            storage.store(run.run_id, folder)
    return diverged


_last_prepared: list[PreparedBlueprint] = []


def _prepared(blueprint: Blueprint) -> PreparedBlueprint:
    """The blueprint with its images, which stay in memory for the next task of this process."""
    # Ray unpickles the blueprint anew for every task, and gives tasks of several launches to one process
    if not _last_prepared or _last_prepared[0].blueprint != blueprint:
        _last_prepared[:] = [PreparedBlueprint(blueprint)]
    return _last_prepared[0]


def _fetch_parent(storage: RunStorage, parent_id: str, folder: Path) -> None:
    run_id, _, final = parent_id.rpartition("@")
    storage.fetch(run_id, folder, epochs=[int(final)])
    if int(final) not in RunFolder(folder / run_id).epochs():
        raise ZooError(f"{storage.url}/{run_id} is damaged: delete it there, and train again")


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
