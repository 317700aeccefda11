"""A run's folder on disk: kept epochs as safetensors + JSON, one resume file, all written atomically.

An epoch counts once its JSON is there, and the JSON is written after the weights it describes; so a kill at any
moment leaves a folder from which training continues. No pickle is written or read.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, safe_open, save_file
from torch import Tensor

from vitzoo_hf.format.atomic import read_json, write_atomically, write_json
from vitzoo_hf.format.layout import flatten
from vitzoo_hf.format.schema import ZooError, weights_sha256

Results = dict[str, float | None]
"""Results of a kept epoch by name, such as `test_accuracy`; None where a run has no such result."""


class Divergence(TypedDict):
    """Where and why a run diverged."""

    epoch: int
    reason: str


@dataclass(frozen=True)
class RunFolder:
    """The checkpoints of one run, under `path`."""

    path: Path

    def open(self, spec: Mapping[str, object]) -> None:
        """Create the folder, or check that it belongs to the same training.

        Args:
            spec: everything that determines the weights; `fingerprint` is compared, the rest is for provenance.

        Raises:
            ZooError: if the folder holds another training, or cannot be made.
        """
        try:
            # a folder that a kill left without its run.json is taken over
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ZooError(f"cannot make {self.path}: {error.strerror}") from None
        file = self.path / "run.json"
        if file.is_file():
            # not the whole record: versions of torch and timm may differ from those that began the run
            recorded = self._recorded(file, "fingerprint")
            if recorded != spec["fingerprint"]:
                raise ZooError(
                    f"{self.path} holds a run trained by another blueprint ({recorded}, not {spec['fingerprint']}):"
                    " choose another output folder, or delete this one"
                )
            return
        write_json(file, spec)

    def _recorded(self, file: Path, name: str) -> object:
        try:
            return read_json(file)[name]
        except (KeyError, TypeError):
            raise ZooError(f"{file} is damaged (no {name}): delete {self.path} and train again") from None

    def check_images(self, images: Mapping[str, object], *, record: bool = True) -> None:
        """Check that the run began with these images; record them where nothing is recorded yet.

        Args:
            images: facts about the images, of which `digest` is compared.
            record: write the record where there is none.

        Raises:
            ZooError: if the run began with other images.
        """
        file = self.path / "images.json"
        if not file.is_file():
            if record:
                write_json(file, dict(images))
        elif self._recorded(file, "digest") != images["digest"]:
            raise ZooError(
                f"{self.path} began with other images than these (another path, or images that were changed since):"
                " choose another output folder, or delete this one"
            )

    @property
    def spec(self) -> dict[str, Any]:
        """The specification that `open` recorded when the run began."""
        return read_json(self.path / "run.json")

    def epochs(self) -> list[int]:
        """Kept epochs that are complete on disk, ascending."""
        return sorted(int(file.stem.removeprefix("epoch-")) for file in self.path.glob("epoch-*.json"))

    def intact(self) -> bool:
        """Whether the weights of every complete epoch are there in full length; `load_epoch` also checks the hash."""
        try:
            return all(
                self._weights(epoch).is_file()
                and self._weights(epoch).stat().st_size == read_json(self._record(epoch))["file_size"]
                for epoch in self.epochs()
            )
        except (ZooError, KeyError, TypeError):
            return False

    def save_epoch(self, epoch: int, state_dict: Mapping[str, Tensor], results: Mapping[str, float | None]) -> None:
        """Keep the weights of `epoch` with its results."""
        # safetensors refuses tensors that are not contiguous
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state_dict.items()}
        order = {"order": json.dumps(list(tensors))}
        write_atomically(self._weights(epoch), lambda file: save_file(tensors, file, metadata=order))
        # over the flat vector: the hash that a row of the zoo has
        sha256 = weights_sha256(flatten(tensors).numpy())
        record = {"epoch": epoch, "results": dict(results), "weights_sha256": sha256}
        # after the weights: an epoch counts once this file is there. The size tells a short file without reading it
        write_json(self._record(epoch), record | {"file_size": self._weights(epoch).stat().st_size})

    def load_epoch(self, epoch: int) -> tuple[dict[str, Tensor], dict[str, float | None]]:
        """Weights and results of a kept epoch; the weights are checked against their hash.

        Raises:
            ZooError: if the epoch is missing or damaged.
        """
        if not self._record(epoch).is_file():
            raise ZooError(f"{self.path} has no finished epoch {epoch}: train the run first")
        record = read_json(self._record(epoch))
        try:
            tensors = load_file(self._weights(epoch))
        except (OSError, SafetensorError) as error:
            raise ZooError(
                f"{self._weights(epoch)} is damaged ({error}): delete {self.path} and train again"
            ) from None
        # safetensors returns tensors by position in the file, which is not the order of the state dict
        with safe_open(self._weights(epoch), framework="pt") as file:
            order = json.loads((file.metadata() or {}).get("order", "null")) or list(tensors)
        tensors = {name: tensors[name] for name in order}
        if weights_sha256(flatten(tensors).numpy()) != record["weights_sha256"]:
            raise ZooError(f"{self._weights(epoch)} does not match its hash: delete {self.path} and train again")
        return tensors, record["results"]

    def save_resume(self, epoch: int, tensors: Mapping[str, Tensor]) -> None:
        """Keep what is needed to continue after `epoch`, replacing what was kept before."""
        contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        write_atomically(
            self.path / "resume.safetensors",
            # epoch and hash in the same file: two files could be of different epochs after a kill
            lambda file: save_file(contiguous, file, metadata={"epoch": str(epoch), "sha256": _digest(contiguous)}),
        )

    def load_resume(self) -> tuple[int, dict[str, Tensor]] | None:
        """Epoch and tensors of the resume file; None where there is none or it is damaged."""
        file = self.path / "resume.safetensors"
        try:
            with safe_open(file, framework="pt") as opened:
                metadata = opened.metadata()
                epoch, sha256 = int(metadata["epoch"]), metadata["sha256"]
            tensors = load_file(file)
            return (epoch, tensors) if _digest(tensors) == sha256 else None
        # a damaged file costs a few epochs, which train again: no reason to stop
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            return None

    def drop_resume(self) -> None:
        """Remove the resume file of a finished run."""
        (self.path / "resume.safetensors").unlink(missing_ok=True)

    def record_divergence(self, epoch: int, reason: str) -> None:
        """Mark the run as diverged: it is not tried again, and its rows stay out of the zoo."""
        write_json(self.path / "diverged.json", {"epoch": epoch, "reason": reason})

    @property
    def divergence(self) -> Divergence | None:
        """Epoch and reason if the run diverged."""
        file = self.path / "diverged.json"
        return read_json(file) if file.is_file() else None

    def _weights(self, epoch: int) -> Path:
        return self.path / f"epoch-{epoch:05d}.safetensors"

    def _record(self, epoch: int) -> Path:
        return self.path / f"epoch-{epoch:05d}.json"


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    # by name: safetensors gives tensors back in another order
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].numpy().tobytes())
    return digest.hexdigest()


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state of an optimizer as named tensors, for `save_resume`."""
    return {
        f"optimizer.{index}.{name}": torch.as_tensor(value)
        for index, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
        # SGD without momentum remembers None
        if value is not None
    }


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Restore the state that `optimizer_tensors` gave."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".", 2)
            state.setdefault(int(index), {})[name] = value
    # groups come from the recipe; the learning rate is set anew at each step
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
