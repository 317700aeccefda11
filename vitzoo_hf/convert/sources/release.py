"""Plan the conversion of the original ViT model zoo: pre-trained and fine-tuned runs in nested folders.

Lineage is by folder: a fine-tuned run lies in a folder named like its parent. The recipe that the published trainer
effectively ran is recorded beside the declared one. Planning lists every folder and reads at most nine checkpoints.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from vitzoo_hf.convert.names import to_timm
from vitzoo_hf.convert.pickles import read_state_dict
from vitzoo_hf.convert.rows import LoadedModel, PlannedRow, SourceError, SourcePlan
from vitzoo_hf.convert.sources.places import FolderPlace, WebPlace
from vitzoo_hf.convert.sources.release_runs import (
    CHECKPOINT,
    FACTORS,
    RunFiles,
    dataset_of,
    factors_of,
    image_record,
    provenance_of,
    read_run,
    regime_of,
    results_of,
    whole_number,
)
from vitzoo_hf.format import schema
from vitzoo_hf.format.layout import is_head
from vitzoo_hf.format.schema import ZooError

FOLDERS = (("vit_imagenet_pretrained", "vit_cifar100_finetuned"), ("pretraining", "finetuning"))
ABOVE = ("", "dataset", "vit-modelzoo")
ARCHITECTURES = {"vit_s_16": "vit_small_patch16_224"}
PROBED_RUNS = 3
LONGEST_ID_PART = 100

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


def is_release(place: FolderPlace | WebPlace) -> bool:
    """Return whether a place has the layout of the release."""
    return _roots(place) is not None


def plan_release(
    place: FolderPlace | WebPlace,
    *,
    first_epoch: int | None = None,
    architecture: str | None = None,
    architecture_args: Mapping[str, object] | None = None,
    name: str = "vit-model-zoo",
) -> SourcePlan:
    """Plan every checkpoint of a release, with lineage, factors and results; few checkpoints are read.

    Args:
        place: folder or server of the release.
        first_epoch: epochs completed at checkpoint 0 (0 or 1). By default it follows from the number of checkpoints,
            and from fine-tuned runs whose checkpoint 0 still has the trunk of their parent.
        architecture: timm name; by default the one in the configs.
        architecture_args: arguments of `timm.create_model` that do not follow from the shapes.
        name: name of the zoo.

    Raises:
        ZooError: if the place does not have this layout.
        SourceError: if a server does not answer.
    """
    if first_epoch not in (None, 0, 1):
        raise ZooError(f"first_epoch is {first_epoch}; expected 0 (before training) or 1 (after one epoch)")
    planner = _Planner(place, architecture, dict(architecture_args or {}))
    runs = planner.runs()
    planner.find_offsets(runs, first_epoch)
    rows = planner.rows(runs)
    datasets = sorted({row.columns["dataset"] for row in rows})
    images = {dataset: record for dataset in datasets if (record := image_record(dataset)) is not None}
    planner.notes += [
        f"{dataset} is not among the images the release is known to have: how they were prepared is not known."
        for dataset in datasets
        if dataset not in images
    ]
    refused = planner.refused | place.refused
    return SourcePlan(name, rows, dict(FACTORS), images, refused, list(NOTES) + planner.sentences())


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
        """Regime of this very run: a fine-tuned one is supervised, whatever its parent is."""
        return (regime_of(self.files) if self.parent is None else None) or "supervised"

    @property
    def outputs(self) -> int | None:
        """Number of outputs of the head, by the config."""
        return whole_number(self.files.config.get("model::o_dim"))


class _Planner:
    """Reads the folders of a release and plans their rows."""

    def __init__(self, place: FolderPlace | WebPlace, architecture: str | None, args: dict[str, object]) -> None:
        self.place, self.architecture, self.args = place, architecture, args
        self.refused: dict[str, str] = {}
        self.notes: list[str] = []
        self.notes_on_runs: dict[str, dict[str, None]] = {}
        self.offsets: dict[str, int] = {}
        self.is_given = False

    def runs(self) -> list[_Run]:
        """Read the pre-trained runs, then the fine-tuned ones, sorted."""
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
        tuned = []
        for folder in self._folders(finetuned) if finetuned else ():
            for child in self._folders(f"{finetuned}/{folder}"):
                path = f"{finetuned}/{folder}/{child}"
                if folder not in parents:
                    self.refused[path] = f"its parent {folder} is not among the pre-trained runs"
                    continue
                run = self._run(path, f"{_safe(folder)}--{_safe(child)}", parents[folder])
                if run is not None:
                    tuned.append(run)
        return self._unique([*parents.values(), *tuned])

    def _folders(self, path: str) -> list[str]:
        """List the folders in a folder; refuse a folder that cannot be listed."""
        try:
            return [entry.name for entry in self.place.listing(path) if entry.is_folder]
        except SourceError:
            raise
        except ZooError as error:
            self.refused[path] = str(error)
            return []

    def _run(self, path: str, run_id: str, parent: _Run | None) -> _Run | None:
        try:
            files = read_run(self.place, path, self.refused)
            kind = files.config.get("model::type")
            architecture = self.architecture or ARCHITECTURES.get(str(kind))
            if architecture is None:
                raise ZooError(f"its model::type {kind!r} is unknown: give --architecture")
            if parent is None and regime_of(files) is None:
                raise ZooError("neither its training::mode nor its name says sl or cl: its regime is unknown")
            return _Run(run_id, files, parent, architecture)
        except SourceError:
            raise
        except ZooError as error:
            self.refused[path] = str(error)
            return None

    def _unique(self, runs: list[_Run]) -> list[_Run]:
        """Refuse runs whose parent is refused, or whose id another run has."""
        unique: dict[str, _Run] = {}
        for run in runs:
            if run.parent is not None and unique.get(run.parent.run_id) is not run.parent:
                self.refused[run.files.path] = f"its parent {run.parent.files.folder} is not taken"
            elif run.run_id in unique:
                self.refused[run.files.path] = f"its id {run.run_id} is that of {unique[run.run_id].files.path} too"
            else:
                unique[run.run_id] = run
        return list(unique.values())

    def find_offsets(self, runs: list[_Run], given: int | None) -> None:
        """Find out, for each stage, how many epochs were completed at checkpoint 0."""
        if given is not None:
            self.is_given = True
            self.offsets = dict.fromkeys(schema.STAGES, given)
            return
        for stage in schema.STAGES:
            members = [run for run in runs if run.stage == stage]
            # the most frequent offset: a single run may have been stopped early
            votes = Counter(vote for run in members if (vote := _vote(run.files)) is not None)
            self.offsets[stage] = votes.most_common(1)[0][0] if votes else 1
            if members and not votes:
                self.notes.append(
                    f"Whether checkpoint 0 is from before training or from after one epoch is not known for {stage}"
                    " runs, as their configs do not fit their checkpoints: it counts as epoch 1."
                )
        self._probe([run for run in runs if run.parent is not None and 0 in run.files.checkpoints])

    def _probe(self, tuned: list[_Run]) -> None:
        """Correct the offset of fine-tuned runs by the weights of one of them."""
        # each probe reads up to three checkpoints, so only a few runs are tried
        for run in tuned[:PROBED_RUNS]:
            untrained = self._has_trunk_of_parent(run)
            if untrained is None:
                continue
            if untrained != (self.offsets["finetune"] == 0):
                self.offsets["finetune"] = 0 if untrained else 1
                state = "has" if untrained else "no longer has"
                self.notes.append(
                    f"Checkpoint 0 of fine-tuned runs counts as epoch {self.offsets['finetune']}, against the number"
                    f" of checkpoints: that of {run.run_id} {state} the trunk of its parent."
                )
            return

    def _has_trunk_of_parent(self, run: _Run) -> bool | None:
        """Return whether checkpoint 0 of a fine-tuned run has its parent's last trunk; None if neither shows it."""
        assert run.parent is not None
        parent = self._tensors(run.parent, run.parent.files.last)
        if parent is None:
            return None
        trunk = {name: tensor for name, tensor in parent.items() if not is_head(name)}
        first = self._tensors(run, 0)
        if first is None or not _has_tensors(first, trunk):
            return None if first is None else False
        last = self._tensors(run, run.files.last)
        # a trunk that never changes was frozen: it does not show when training began
        return None if last is None or run.files.last == 0 or _has_tensors(last, trunk) else True

    def _tensors(self, run: _Run, index: int) -> dict[str, Tensor] | None:
        """Read the weights of a checkpoint; None if it is refused."""
        if index not in run.files.checkpoints:
            return None
        try:
            return self._loader(run, run.files.checkpoints[index][0])().tensors
        except SourceError:
            raise
        except ZooError:
            return None

    def rows(self, runs: list[_Run]) -> list[PlannedRow]:
        """Plan a row for each checkpoint, in the order of the runs, epochs ascending."""
        rows = []
        for run in runs:
            offset = self._offset(run)
            self._note_contradictions(run)
            parent_epoch = 0
            if run.parent is not None:
                parent_epoch = run.parent.files.last + self._offset(run.parent)
            for index, (path, size) in sorted(run.files.checkpoints.items()):
                is_final = index == run.files.last
                columns = self._columns(run, index + offset, is_final=is_final, parent_epoch=parent_epoch)
                rows.append(PlannedRow(path, columns, run.root.run_id, self._loader(run, path), size))
        return rows

    def _offset(self, run: _Run) -> int:
        """Return the epochs completed at checkpoint 0 of a run."""
        offset, last, epochs = self.offsets[run.stage], run.files.last, run.files.epochs
        # a run that would end after its planned epochs counts from 0, unlike its stage
        if self.is_given or epochs is None or last + offset <= epochs:
            return offset
        return 0 if last == epochs else offset

    def _note(self, run: _Run, notes: list[str]) -> None:
        """Add notes on a run."""
        for note in notes:
            self.notes_on_runs.setdefault(note, {})[run.run_id] = None

    def sentences(self) -> list[str]:
        """Write all notes as sentences; a note that several runs share is one sentence."""
        shared = {note: list(runs) for note, runs in self.notes_on_runs.items()}
        return self.notes + [
            f"{runs[0]}: {note}." if len(runs) == 1 else f"{len(runs)} runs, {runs[0]} the first: {note}."
            for note, runs in shared.items()
        ]

    def _note_contradictions(self, run: _Run) -> None:
        """Note contradictions between the config of a run, its checkpoints and its parent."""
        config, files = run.files.config, run.files
        notes = list(files.notes)
        ends = files.last + self._offset(run)
        if files.epochs is not None and ends != files.epochs:
            notes.append(f"it ends after {ends} epochs, its config says {files.epochs}")
        if self._offset(run) != self.offsets[run.stage]:
            notes.append("its checkpoints count from before training, unlike those of other runs")
        if run.parent is not None:
            parent_path = CHECKPOINT.search(str(config.get("pretraining::model::path", "")))
            if parent_path is not None and int(parent_path[1]) != run.parent.files.last:
                notes.append(f"its config names checkpoint {int(parent_path[1])} of its parent, not the last")
            seed, parent_seed = config.get("pretraining::seed"), factors_of(run.parent.files, None)["seed"]
            if seed is not None and whole_number(seed) != parent_seed:
                notes.append(f"its config names another seed of pre-training than its parent's, {parent_seed}")
        self._note(run, notes)

    def _loader(self, run: _Run, path: str) -> Callable[[], LoadedModel]:
        parent = None if run.parent is None else run.parent.files
        outputs = None if "num_classes" in self.args else run.outputs
        head = factors_of(run.files, parent)["head"]
        return partial(_load, self.place, path, run.architecture, self.args, outputs=outputs, head=head)

    def _columns(self, run: _Run, epoch: int, *, is_final: bool, parent_epoch: int) -> dict[str, object]:
        """Return the light columns of a row that follow from the run's folder."""
        # a contrastive head projects and has no classes, so its accuracies mean nothing
        is_projection = run.parent is None and run.regime == "contrastive"
        results, notes = results_of(run.files, epoch, has_accuracy=not is_projection)
        self._note(run, notes)
        parent = None if run.parent is None else run.parent.files
        return {
            "model_id": schema.model_id(run.run_id, epoch),
            "run_id": run.run_id,
            "parent_id": None if run.parent is None else schema.model_id(run.parent.run_id, parent_epoch),
            "stage": run.stage,
            "epoch": epoch,
            "is_final": is_final,
            "dataset": dataset_of(run.files, is_pretraining=run.parent is None),
            **{f"factor_{name}": value for name, value in factors_of(run.files, parent).items()},
            **results,
            "provenance": provenance_of(run.files, run.regime),
        }


def _load(
    place: FolderPlace | WebPlace,
    path: str,
    architecture: str,
    args: Mapping[str, object],
    *,
    outputs: int | None,
    head: str | None,
) -> LoadedModel:
    """Read a checkpoint, and compare its outputs and head with its run's config."""
    model = to_timm(
        read_state_dict(place.open(path), path), name=path, architecture=architecture, architecture_args=args
    )
    num_classes = model.architecture_args.get("num_classes")
    if outputs is not None and num_classes != outputs:
        raise ZooError(f"{path} has {num_classes} outputs; its config says model::o_dim {outputs}")
    if head not in (None, model.head):
        raise ZooError(f"{path} has a head of kind {model.head}; its run is to have one of kind {head}")
    return model


def _has_tensors(tensors: Mapping[str, Tensor], part: Mapping[str, Tensor]) -> bool:
    return all(name in tensors and torch.equal(tensors[name], tensor) for name, tensor in part.items())


def _roots(place: FolderPlace | WebPlace) -> tuple[str, str | None] | None:
    """Find the folders of the pre-trained and the fine-tuned runs; None if the layout is another one."""
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
    """Infer the epochs completed at checkpoint 0 from the number of checkpoints; None if it fits neither 0 nor 1."""
    if files.epochs is None:
        return None
    return {files.epochs: 0, files.epochs - 1: 1}.get(max(files.checkpoints))


def _safe(folder: str) -> str:
    """Make a folder's name a part of a run id; different names give different parts.

    >>> _safe("sl_vit_s_16_seed_42"), _safe("a b") == _safe("a-b")
    ('sl_vit_s_16_seed_42', False)
    """
    # `--` separates parent and child in an id, so a part must not contain it
    bare = schema.safe_id(re.sub("-{2,}", "-", folder)).strip("._=+-")[:LONGEST_ID_PART] or "run"
    return folder if bare == folder else f"{bare}-{schema.fingerprint(folder, 8)}"
