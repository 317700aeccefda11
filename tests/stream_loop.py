"""A training loop over a stream as people write it, run rank by rank, for tests that interrupt and continue it."""

import json
import multiprocessing
import os
import pickle
import signal
from dataclasses import dataclass, replace
from pathlib import Path

from torch.utils.data import DataLoader

from vitzoo_hf.zoo import Zoo


@dataclass(frozen=True)
class Loop:
    """How a stream is driven.

    Attributes:
        zoo: folder.
        layouts: 1 or 3 layouts among the rows.
        driver: `plain`, `DataLoader` or `StatefulDataLoader`.
        workers: processes of the loader.
        start: how they are started, `fork` or `spawn`.
        persistent: whether they live from epoch to epoch.
        world_size: ranks, which this process plays one after the other.
    """

    zoo: str
    layouts: int
    driver: str
    workers: int = 0
    start: str = "fork"
    persistent: bool = False
    world_size: int = 2

    def rank(self, rank):
        zoo = Zoo(self.zoo)
        rows = zoo if self.layouts > 1 else zoo.filter(layout=zoo.row(zoo.model_ids[-1]).layout)
        stream = rows.stream(
            batch_size=2 if self.layouts > 1 else 1, shuffle=True, seed=7, num_workers=0, columns=["model_id"],
            rank=rank, world_size=self.world_size,
        )  # fmt: skip
        if self.driver == "plain":
            return stream, stream
        kind = DataLoader
        if self.driver == "StatefulDataLoader":
            from torchdata.stateful_dataloader import StatefulDataLoader as kind  # noqa: N813
        context = {"multiprocessing_context": self.start, "persistent_workers": self.persistent}
        return stream, kind(stream, batch_size=None, num_workers=self.workers, **(context if self.workers else {}))

    def state(self, stream, loader, batch, elastic):
        if self.driver == "StatefulDataLoader" and not (elastic and self.workers):
            return loader.state_dict()
        return stream.state_dict(after=batch) if self.workers else stream.state_dict()

    def load(self, stream, loader, state):
        if "version" in state:
            stream.load_state_dict(state)
        else:
            loader.load_state_dict(state)


def play(loop, rank, epochs, log, *, state=None, stop_at=None, kill=False, save=None, elastic=False):
    """One rank's loop, which logs `[epoch, ids, repeated]` a line and saves after each batch.

    It leaves its first epoch after `stop_at` batches and goes on with the next by the same loader, or is killed.
    """
    stream, loader = loop.rank(rank)
    if state is not None:
        loop.load(stream, loader, state)
    saving = True
    for epoch in epochs:
        stream.set_epoch(epoch)
        for number, batch in enumerate(loader):
            with Path(log).open("a") as file:
                file.write(json.dumps([epoch, batch["model_id"], bool(batch["repeated"].any())]) + "\n")
            if save is not None and saving:
                Path(f"{save}.tmp").write_bytes(pickle.dumps((epoch, loop.state(stream, loader, batch, elastic))))
                Path(f"{save}.tmp").rename(save)
            if stop_at is not None and saving and number + 1 == stop_at:
                if kill:
                    os.kill(os.getpid(), signal.SIGKILL)
                saving = False
                break


def played(loop, folder, ending, resumed):
    """Run every rank to an `ending` in epoch 0 or 1, then the ranks of `resumed` to the end of epoch 2.

    Returns:
        epoch -> ids handed out over all ranks that are no declared repeats; and the numbers of batches of the ranks
        of each phase in each epoch.
    """
    elastic = replace(resumed, world_size=loop.world_size, workers=loop.workers) == loop and resumed != loop
    stop = {"end": None, "break": 2, "kill": 3}[ending]
    logs = []
    for rank in range(loop.world_size):
        log, save = folder / f"first-{rank}", folder / f"state-{rank}"
        options = {"stop_at": stop, "kill": ending == "kill", "save": save, "elastic": elastic}
        if ending == "kill":
            child = multiprocessing.get_context("fork").Process(
                target=play, args=(loop, rank, [0], log), kwargs=options
            )
            child.start()
            child.join()
            assert child.exitcode == -signal.SIGKILL
        else:
            play(loop, rank, [0, 1] if ending == "break" else [0], log, **options)
        logs.append(log)
    for rank in range(resumed.world_size):
        log = folder / f"second-{rank}"
        # a rank more than before takes the state of any: all say the same place
        epoch, state = pickle.loads((folder / f"state-{min(rank, loop.world_size - 1)}").read_bytes())
        play(resumed, rank, range(epoch, 2 if ending == "break" else 3), log, state=state)
        logs.append(log)
    return logs


def read(logs):
    """`(epoch, ids, repeated)` of every batch in a log."""
    return [json.loads(line) for line in Path(logs).read_text().splitlines()] if Path(logs).exists() else []
