"""The original ViT model zoo as it was released: pre-trained and fine-tuned runs in nested folders.

Lineage is by folder: a fine-tuned run lies in a folder named like its parent. What its published trainer really did
is kept beside what its configs declare.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from vitzoo_hf import schema
from vitzoo_hf.flatten import is_head
from vitzoo_hf.foreign.files import read_state_dict
from vitzoo_hf.foreign.names import to_timm
from vitzoo_hf.foreign.places import FolderPlace, WebPlace
from vitzoo_hf.foreign.plan import LoadedModel, PlannedRow, SourcePlan
from vitzoo_hf.foreign.release_runs import RunFiles, public, read_run
from vitzoo_hf.foreign.table import LARGEST_RESULT
from vitzoo_hf.schema import ZooError

FOLDERS = (("vit_imagenet_pretrained", "vit_cifar100_finetuned"), ("pretraining", "finetuning"))
ABOVE = ("", "dataset", "vit-modelzoo")
ARCHITECTURES = {"vit_s_16": "vit_small_patch16_224"}
DATASETS = {"imagenet1k": "imagenet-1k", "imagenet": "imagenet-1k", "cifar100": "cifar-100"}
FACTORS = {
    "regime": "string",
    "ddp": "bool",
    "seed": "int",
    "parent_seed": "int",
    "lr": "float",
    "optimizer": "string",
    "weight_decay": "float",
    "head": "string",
}
DECLARED = ("mixup", "cutmix", "randerase", "label_smoothing")
PROBED_RUNS = 3

NOTES = (
    "Augmentation is as declared in the configs; the published trainer passes its arguments in another order, so that"
    " mixup was used as label smoothing, cutmix as mixup, and cutmix was off: see `declared` and `effective` in the"
    " provenance of each row. Whether the released weights were trained by exactly this code is not known.",
    "Heads of contrastive pre-training are projections, not classifiers: these rows have no accuracy.",
    "Test metrics were recorded on whole batches: at batch size 256 on 9,984 of the 10,000 test images of CIFAR-100;"
    " measured again they can differ by up to 0.16 points.",
    "No images were held out for selection: choosing models by test accuracy is choosing on test.",
    "The release states no licence for its weights.",
)
IMAGENET_STATISTICS = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


def is_release(place: FolderPlace | WebPlace) -> bool:
    """Whether a place has the layout of the release."""
    return _roots(place) is not None


def plan_release(
    place: FolderPlace | WebPlace,
    *,
    first_epoch: int | None = None,
    architecture: str | None = None,
    architecture_args: Mapping[str, Any] | None = None,
    name: str = "vit-model-zoo",
) -> SourcePlan:
    """Every checkpoint of a release, with lineage, factors and results; no checkpoint is read but two or so.

    Args:
        place: where it lies.
        first_epoch: epochs completed at checkpoint 0 (0 or 1). By default it is found out: by the number of
            checkpoints, and from fine-tuned runs whose checkpoint 0 still has the trunk of their parent.
        architecture: timm name; by default what the configs say.
        architecture_args: arguments of `timm.create_model` that shapes do not tell.
        name: of the zoo.

    Raises:
        ZooError: if the place does not have this layout.
        SourceError: if a server does not answer.
    """
    if first_epoch not in (None, 0, 1):
        raise ZooError(f"first_epoch is {first_epoch}; expected 0 (before training) or 1 (after one epoch)")
    planner = _Planner(place, architecture, dict(architecture_args or {}))
    runs = planner.runs()
    rows = planner.rows(runs, planner.first_epochs(runs, first_epoch))
    datasets = {row.columns["dataset"] for row in rows}
    images = {dataset: _image_record(dataset) for dataset in sorted(datasets)}
    refused = planner.refused | place.refused
    return SourcePlan(name, rows, dict(FACTORS), images, refused, list(NOTES) + planner.notes)


class _Run:
    """A run with its id, stage and parent."""

    def __init__(self, run_id: str, files: RunFiles, parent: "_Run | None", architecture: str) -> None:
        self.run_id, self.files, self.parent, self.architecture = run_id, files, parent, architecture

    @property
    def stage(self) -> str:
        return "pretrain" if self.parent is None else "finetune"

    @property
    def root(self) -> "_Run":
        return self if self.parent is None else self.parent

    @property
    def regime(self) -> str:
        config, folder = self.root.files.config, self.root.files.path.split("/")[-1]
        mode = str(config.get("training::mode") or folder[:2]).lower()
        return "contrastive" if mode == "cl" else "supervised"


class _Planner:
    """Reads the folders of a release and turns them into rows."""

    def __init__(self, place: FolderPlace | WebPlace, architecture: str | None, args: dict[str, Any]) -> None:
        self.place, self.architecture, self.args = place, architecture, args
        self.refused: dict[str, str] = {}
        self.notes: list[str] = []

    def runs(self) -> list[_Run]:
        """Pre-trained runs, then fine-tuned ones, sorted."""
        roots = _roots(self.place)
        if roots is None:
            raise ZooError(
                f"{self.place.name} is no release of the ViT model zoo: expected folders"
                f" {' and '.join(FOLDERS[0])}, or {' and '.join(FOLDERS[1])}"
            )
        pretrained, finetuned = roots
        parents = {}
        for folder in self._folders(pretrained):
            run = self._run(f"{pretrained}/{folder}", _safe(folder), None)
            if run is not None:
                parents[folder] = run
        kept = self._unique([*parents.values()])
        parents = {folder: run for folder, run in parents.items() if run in kept}
        tuned = []
        for folder in self._folders(finetuned) if finetuned else ():
            for child in self._children(f"{finetuned}/{folder}"):
                path = f"{finetuned}/{folder}/{child}"
                if folder not in parents:
                    self.refused[path] = f"its parent {folder} is not among the pre-trained runs"
                    continue
                run = self._run(path, f"{_safe(folder)}--{_safe(child)}", parents[folder])
                if run is not None:
                    tuned.append(run)
        return self._unique([*parents.values(), *tuned])

    def _folders(self, path: str) -> list[str]:
        return [entry.name for entry in self.place.listing(path) if entry.is_folder]

    def _children(self, path: str) -> list[str]:
        """The runs of a parent; none, and the folder refused, if it cannot be listed."""
        try:
            return self._folders(path)
        except ZooError as error:
            if type(error) is not ZooError:
                raise
            self.refused[path] = str(error)
            return []

    def _run(self, path: str, run_id: str, parent: _Run | None) -> _Run | None:
        try:
            files = read_run(self.place, path, self.refused)
            told = files.config.get("model::type")
            architecture = self.architecture or ARCHITECTURES.get(str(told))
            if architecture is None:
                raise ZooError(f"its model::type {told!r} is unknown: give --architecture")
            return _Run(run_id, files, parent, architecture)
        except ZooError as error:
            if type(error) is not ZooError:
                raise
            self.refused[path] = str(error)
            return None

    def _unique(self, runs: list[_Run]) -> list[_Run]:
        kept: dict[str, _Run] = {}
        for run in runs:
            if run.run_id in kept:
                self.refused[run.files.path] = f"its id {run.run_id} is that of {kept[run.run_id].files.path} too"
            else:
                kept[run.run_id] = run
        return list(kept.values())

    def first_epochs(self, runs: list[_Run], given: int | None) -> dict[str, int]:
        """Stage -> epochs completed at checkpoint 0."""
        if given is not None:
            return dict.fromkeys(schema.STAGES, given)
        found = {}
        for stage in schema.STAGES:
            votes = Counter(vote for run in runs if run.stage == stage and (vote := _vote(run.files)) is not None)
            found[stage] = votes.most_common(1)[0][0] if votes else 1
        for run in [run for run in runs if run.parent is not None and 0 in run.files.checkpoints][:PROBED_RUNS]:
            untrained = self._has_trunk_of_parent(run)
            if untrained is None:
                continue
            if untrained != (found["finetune"] == 0):
                found["finetune"] = 0 if untrained else 1
                state = "has" if untrained else "no longer has"
                self.notes.append(
                    f"Checkpoint 0 of fine-tuned runs counts as epoch {found['finetune']}, against the number of"
                    f" checkpoints: that of {run.run_id} {state} the trunk of its parent."
                )
            break
        return found

    def _has_trunk_of_parent(self, run: _Run) -> bool | None:
        """Whether checkpoint 0 of a fine-tuned run is its parent's last; None if either cannot be read."""
        assert run.parent is not None
        last = max(run.parent.files.checkpoints)
        try:
            first = self._loader(run, run.files.checkpoints[0][0])().tensors
            parent = self._loader(run.parent, run.parent.files.checkpoints[last][0])().tensors
        except ZooError as error:
            if type(error) is not ZooError:
                raise
            return None
        trunk = [name for name in parent if not is_head(name)]
        return all(name in first and torch.equal(first[name], parent[name]) for name in trunk)

    def rows(self, runs: list[_Run], first_epochs: Mapping[str, int]) -> list[PlannedRow]:
        """A row a checkpoint, in the order of the runs, epochs ascending."""
        rows = []
        for run in runs:
            last = max(run.files.checkpoints)
            offset = first_epochs[run.stage]
            if run.files.epochs is not None and last + offset != run.files.epochs:
                self.notes.append(
                    f"{run.run_id} ends after {last + offset} epochs; its config says {run.files.epochs}."
                )
            parent_epoch = 0
            if run.parent is not None:
                parent_epoch = max(run.parent.files.checkpoints) + first_epochs["pretrain"]
            for index, (path, size) in sorted(run.files.checkpoints.items()):
                columns = self._columns(run, index + offset, is_final=index == last, parent_epoch=parent_epoch)
                rows.append(PlannedRow(path, columns, run.root.run_id, self._loader(run, path), size))
        return rows

    def _loader(self, run: _Run, path: str) -> Any:
        return partial(_load, self.place, path, run.architecture, self.args)

    def _columns(self, run: _Run, epoch: int, *, is_final: bool, parent_epoch: int) -> dict[str, Any]:
        config = public(run.files.config)
        stage_default = "imagenet-1k" if run.parent is None else "cifar-100"
        told = re.sub(r"[^a-z0-9]", "", str(config.get("dataset::name", "")).lower())
        results, notes = _results(run, epoch)
        self.notes += [note for note in notes if note not in self.notes]
        return {
            "model_id": schema.model_id(run.run_id, epoch),
            "run_id": run.run_id,
            "parent_id": None if run.parent is None else schema.model_id(run.parent.run_id, parent_epoch),
            "stage": run.stage,
            "epoch": epoch,
            "is_final": is_final,
            "dataset": DATASETS.get(told, stage_default),
            **{f"factor_{name}": value for name, value in _factors(run).items()},
            **results,
            "provenance": {
                "release": "ViT model zoo",
                "config": config,
                "declared": {name: config.get(f"training::{name}") for name in DECLARED},
                "effective": _effective(config),
            },
        }


def _load(place: FolderPlace | WebPlace, path: str, architecture: str, args: Mapping[str, Any]) -> LoadedModel:
    tensors = read_state_dict(place.open(path), path)
    return to_timm(tensors, name=path, architecture=architecture, architecture_args=args)


def _roots(place: FolderPlace | WebPlace) -> tuple[str, str | None] | None:
    """Paths of the pre-trained and the fine-tuned runs."""
    for above in ABOVE:
        try:
            names = {entry.name for entry in place.listing(above) if entry.is_folder}
        except ZooError as error:
            if type(error) is not ZooError:
                raise
            continue
        for pretrained, finetuned in FOLDERS:
            start = f"{above}/" if above else ""
            if pretrained in names:
                return f"{start}{pretrained}", f"{start}{finetuned}" if finetuned in names else None
    return None


def _vote(files: RunFiles) -> int | None:
    """Epochs completed at checkpoint 0, by the number of checkpoints; None if it does not tell."""
    if files.epochs is None:
        return None
    return {files.epochs: 0, files.epochs - 1: 1}.get(max(files.checkpoints))


def _safe(folder: str) -> str:
    """A folder's name as a part of a row's id."""
    return re.sub(r"[^A-Za-z0-9._=+-]+", "-", folder).lstrip("._=+-") or "run"


def _factors(run: _Run) -> dict[str, Any]:
    config, root = public(run.files.config), run.root.files
    seed = config.get("model::head::seed") if run.parent is not None else None
    ddp = root.config.get("training::ddp")
    optimizer = config.get("optim::optimizer")
    return {
        "regime": run.regime,
        "ddp": ddp if isinstance(ddp, bool) else "ddp" in root.path.split("/")[-1].lower(),
        "seed": _number(config.get("seed") if seed is None else seed, int),
        "parent_seed": None if run.parent is None else _number(root.config.get("seed"), int),
        "lr": _number(config.get("optim::lr"), float),
        "optimizer": optimizer.lower() if isinstance(optimizer, str) and optimizer else None,
        "weight_decay": _number(config.get("optim::wd"), float),
        "head": "mlp" if run.parent is not None and config.get("model::head::mlp") is True else "linear",
    }


def _number(value: Any, kind: type) -> Any:
    """The value as an int64 or a finite float; None if it is neither."""
    try:
        number = None if isinstance(value, bool) else kind(value)
    except (TypeError, ValueError, OverflowError):
        return None
    if isinstance(number, int):
        return number if -(2**63) <= number < 2**63 else None
    return number if number is not None and math.isfinite(number) else None


def _effective(config: Mapping[str, Any]) -> dict[str, Any]:
    """What the published trainer does with the declared augmentation."""
    declared = {name: config.get(f"training::{name}") for name in DECLARED}
    if declared["mixup"] is None and declared["cutmix"] is None:
        return {"label_smoothing": 0.0, "mixup": 0.0, "cutmix": 0.0, "random_erase": 0.0}
    return {
        "label_smoothing": declared["mixup"],
        "mixup": declared["cutmix"],
        "cutmix": 0.0,
        "random_erase": 0.25,
    }


def _results(run: _Run, epoch: int) -> tuple[dict[str, float | None], list[str]]:
    """The results of an epoch, and what is to be noted of them."""
    told = run.files.results.get(epoch, {})
    found = {
        "train_loss": _number(told.get("train_loss"), float),
        "test_loss": _number(told.get("test_loss"), float),
        "train_accuracy": _number(told.get("train_acc"), float),
        "test_accuracy": _number(told.get("test_acc"), float),
    }
    notes = []
    for name in ("train_accuracy", "test_accuracy"):
        value = found[name]
        if run.parent is None and run.regime == "contrastive":
            found[name] = None
        elif value is not None and not 0 <= value <= 1:
            notes.append(f"{run.run_id} records accuracies outside 0 to 1, which are left out.")
            found[name] = None
    for name in ("train_loss", "test_loss"):
        if abs(found[name] or 0.0) > LARGEST_RESULT:
            found[name] = None
    train, test = found["train_accuracy"], found["test_accuracy"]
    gap = None if train is None or test is None else train - test
    return found | {"generalization_gap": gap}, notes


def _image_record(dataset: str) -> dict[str, Any]:
    licence = {
        "imagenet-1k": "ImageNet terms of access; no image is part of this zoo",
        "cifar-100": "not stated by its authors; no image is part of this zoo",
    }
    record = {"source": dataset, "size": 224, "resize": 256, "crop": 224, "channels": 3, "class_names": []}
    return record | IMAGENET_STATISTICS | {"licence": licence.get(dataset, "unknown")}
