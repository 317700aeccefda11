"""Checkpoints -> a zoo: a folder of Parquet that `datasets.load_dataset` opens, exactly what goes to the Hub.

`weights` and `index` have one file or more a split, `probes` the held-out images as the models are fed them. The
folder appears complete or not at all. `write_config` adds tables to a finished zoo, as `evaluate` does.
"""

import hashlib
import io
import itertools
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from vitzoo_hf import schema
from vitzoo_hf.blueprint import Blueprint, Run
from vitzoo_hf.card import card_text
from vitzoo_hf.checkpoint import RunFolder, read_json, write_json
from vitzoo_hf.flatten import Layout, flatten
from vitzoo_hf.images import ImageSet, load_images
from vitzoo_hf.launch import progress_bar
from vitzoo_hf.rebuild import architecture_of
from vitzoo_hf.schema import ZooError
from vitzoo_hf.shards import write_parquet
from vitzoo_hf.train import architecture_args, head_hidden, is_finished
from vitzoo_hf.vit import layout_of

SHARD_BYTES = 500_000_000
ROW_GROUP_BYTES = 4_000_000
MAX_PROBES = 20_000


def pack(blueprint: Blueprint, runs: Path, folder: Path, *, progress: bool = True) -> Path:
    """Write the finished runs of a blueprint as a zoo.

    Args:
        blueprint: what was trained.
        runs: the folder `launch` filled.
        folder: the zoo; one that is there already is replaced once the new one is complete.
        progress: show a bar.

    Returns:
        `folder`.

    Raises:
        ZooError: if a run is unfinished, a checkpoint is damaged or not finite, or the folder cannot be written.
    """
    kept, missing = _runs_to_pack(blueprint, runs)
    members = {split: [run for run in kept if run.split == split] for split in schema.SPLITS}
    write_zoo(
        folder,
        _manifest(blueprint, missing),
        {
            split: Rows(sum(len(run.keep_epochs) for run in part), _rows(blueprint, part, runs))
            for split, part in members.items()
        },
        {role: _probes(blueprint, role) for role in ("selection", "test")},
        blueprint.text,
        progress=progress,
    )
    return folder


@dataclass(frozen=True)
class Rows:
    """Rows still to be read, and how many there are."""

    count: int
    rows: Iterator[dict[str, Any]]


def write_zoo(
    folder: Path,
    manifest: Mapping[str, Any],
    splits: Mapping[str, Rows],
    probes: Mapping[str, list[dict[str, Any]]],
    blueprint_text: str,
    *,
    progress: bool = False,
) -> None:
    """Write a zoo from rows, in a temporary folder that replaces `folder` at the end.

    Args:
        folder: the zoo.
        manifest: what `zoo.json` says besides the files.
        splits: split -> its rows, with weights and in their final order.
        probes: role -> rows of held-out images.
        blueprint_text: what the zoo was made from.
        progress: show a bar.

    Raises:
        ZooError: if the folder cannot be written, or what stands there is not a zoo.
    """
    _refuse_to_replace(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _sweep(folder)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-", suffix=".tmp"))
    except OSError as error:
        raise ZooError(f"cannot write into {folder.parent}: {error.strerror}") from None
    try:
        temporary.chmod(0o755)
        layouts: dict[str, Layout] = {}
        with progress_bar("packing", "row", shown=progress, total=sum(part.count for part in splits.values())) as bar:
            for split, part in splits.items():
                if part.count:
                    _write_split(temporary, split, part, manifest["factors"], layouts, bar)
        for role, rows in probes.items():
            if rows:
                write_parquet(_only_shard(temporary, "probes", role), schema.probe_features(), [rows], {})
        write_json(temporary / schema.LAYOUTS, {key: layout.to_json() for key, layout in layouts.items()})
        (temporary / "blueprint.yaml").write_text(blueprint_text, encoding="utf-8")
        _finish(temporary, dict(manifest))
        _swap(temporary, folder)
    except OSError as error:
        raise ZooError(f"cannot write the zoo {folder}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _refuse_to_replace(folder: Path) -> None:
    """Never delete what is not a zoo."""
    if (
        folder.exists()
        and not (folder / schema.MANIFEST).is_file()
        and not (folder.is_dir() and not any(folder.iterdir()))
    ):
        raise ZooError(f"{folder} exists and is not a zoo: choose another folder, or remove it yourself")


def _only_shard(folder: Path, config: str, split: str) -> Path:
    return folder / config / f"{split}-00000-of-00001.parquet"


def is_packed(blueprint: Blueprint, folder: Path) -> bool:
    """Whether `folder` holds the zoo of exactly this blueprint with all its files in full length."""
    try:
        manifest = read_json(folder / schema.MANIFEST)
        same = manifest["blueprint_fingerprint"] == blueprint.fingerprint
        sizes = {name: (folder / name).stat().st_size for name in manifest["files"]}
    except (ZooError, OSError, KeyError, TypeError):
        return False
    return same and all(sizes[name] == entry["bytes"] for name, entry in manifest["files"].items())


def _runs_to_pack(blueprint: Blueprint, runs: Path) -> tuple[list[Run], dict[str, str]]:
    kept, missing, unfinished = [], {}, []
    for run in blueprint.runs:
        divergence = RunFolder(runs / run.run_id).divergence
        if divergence:
            missing[run.run_id] = f"diverged in epoch {divergence['epoch']}"
        elif run.parent_run in missing:
            missing[run.run_id] = f"its parent {run.parent_run} is missing"
        elif is_finished(blueprint, run, runs):
            kept.append(run)
        else:
            unfinished.append(run.run_id)
    if unfinished:
        raise ZooError(
            f"{len(unfinished)} of {len(blueprint.runs)} runs in {runs} are unfinished, {unfinished[0]} the first:"
            " run `vitzoo train` again"
        )
    if not kept:
        raise ZooError(f"no run of {blueprint.name!r} in {runs} can be packed: all of them diverged")
    return kept, missing


def _write_split(
    folder: Path, split: str, part: Rows, factors: Mapping[str, str], layouts: dict[str, Layout], bar: Any
) -> None:
    first = next(part.rows)
    rows = itertools.chain([first], part.rows)
    size = 4 * first["num_parameters"]
    encoding = "list" if first["num_parameters"] <= schema.LIST_LIMIT else "binary"
    group_rows = max(1, ROW_GROUP_BYTES // size) if encoding == "list" else 1
    shard_rows = max(1, SHARD_BYTES // size // group_rows) * group_rows
    shards = -(-part.count // shard_rows)
    features = schema.row_features(factors, weights=encoding)
    light: list[dict[str, Any]] = []
    for shard in range(shards):
        file = folder / "weights" / f"{split}-{shard:05d}-of-{shards:05d}.parquet"
        groups = _groups(rows, min(shard_rows, part.count - shard * shard_rows), group_rows)
        write_parquet(file, features, _remember(groups, light, layouts, bar), layouts)
    write_parquet(_only_shard(folder, "index", split), schema.row_features(factors, weights=None), [light], {})


def _remember(
    groups: Iterable[list[dict[str, Any]]], light: list[dict[str, Any]], layouts: dict[str, Layout], bar: Any
) -> Iterator[list[dict[str, Any]]]:
    """Pass groups on, keeping their light columns and noting their layouts."""
    for group in groups:
        for row in group:
            layouts.setdefault(row["layout"], layout_of(*architecture_of(row)))
            light.append({name: value for name, value in row.items() if name != "weights"})
        bar.update(len(group))
        yield group


def _groups(rows: Iterator[dict[str, Any]], count: int, size: int) -> Iterator[list[dict[str, Any]]]:
    while count > 0:
        group = [next(rows) for _ in range(min(size, count))]
        count -= len(group)
        yield group


def _rows(blueprint: Blueprint, members: Iterable[Run], runs: Path) -> Iterator[dict[str, Any]]:
    for run in members:
        place = RunFolder(runs / run.run_id)
        images = load_images(run.images, blueprint.images[run.images])
        args = schema.canonical_json(architecture_args(blueprint, run, len(images.class_names)))
        provenance = _provenance(blueprint, place.spec)
        for epoch in run.keep_epochs:
            tensors, results = place.load_epoch(epoch)
            layout = Layout.of(tensors)
            vector = finite_weights(flatten(tensors), schema.model_id(run.run_id, epoch))
            yield {
                "model_id": schema.model_id(run.run_id, epoch),
                "run_id": run.run_id,
                "parent_id": run.parent_id,
                "stage": run.stage,
                "epoch": epoch,
                "is_final": epoch == run.epochs,
                "dataset": run.images,
                "architecture": blueprint.architecture,
                "architecture_args": args,
                "head": run.recipe.head,
                "head_hidden": head_hidden(run.recipe),
                **{f"factor_{name}": run.factors[name] for name in blueprint.factor_types},
                **{name: results.get(name) for name in schema.RESULTS},
                "num_parameters": layout.num_parameters,
                "layout": layout.fingerprint,
                "weights_sha256": schema.weights_sha256(vector),
                "dtype": "float32",
                "provenance": provenance,
                "weights": vector,
            }


def finite_weights(vector: Tensor, model_id: str) -> np.ndarray:
    """The vector as little-endian float32.

    Raises:
        ZooError: if a weight is not finite, naming the row.
    """
    values = vector.numpy().astype("<f4", copy=False)
    bad = int(values.size - np.isfinite(values).sum())
    if bad:
        raise ZooError(f"{model_id} has {bad} weights that are not finite: train the run again or leave it out")
    return values


def _provenance(blueprint: Blueprint, spec: Mapping[str, Any]) -> str:
    return schema.canonical_json(
        {
            "blueprint": blueprint.name,
            "blueprint_fingerprint": blueprint.fingerprint,
            "run_fingerprint": spec["fingerprint"],
            "recipe": spec["recipe"],
            "images": spec["images"],
            "epochs": spec["epochs"],
            "versions": spec["versions"],
        }
    )


def _probes(blueprint: Blueprint, role: str) -> list[dict[str, Any]]:
    """Held-out images of every dataset that has few enough of them to travel with the zoo."""
    rows: list[dict[str, Any]] = []
    for name in dict.fromkeys(run.images for run in blueprint.runs):
        images = load_images(name, blueprint.images[name])
        if len(images.splits[role]) <= MAX_PROBES:
            rows += list(_probe_rows(images, role))
    return rows


def _probe_rows(images: ImageSet, role: str) -> Iterator[dict[str, Any]]:
    from PIL import Image

    pixels, labels = images.part(role)
    for position, image, label in zip(images.splits[role].tolist(), pixels.numpy(), labels.tolist(), strict=True):
        buffer = io.BytesIO()
        Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0)).save(buffer, "PNG")
        yield {
            "dataset": images.name,
            "position": position,
            "label": label,
            "image": {"bytes": buffer.getvalue(), "path": None},
        }


def _manifest(blueprint: Blueprint, missing: Mapping[str, str]) -> dict[str, Any]:
    used = dict.fromkeys(run.images for run in blueprint.runs)
    return {
        "format": schema.FORMAT_VERSION,
        "name": blueprint.name,
        "blueprint_fingerprint": blueprint.fingerprint,
        "factors": blueprint.factor_types,
        "images": {name: load_images(name, blueprint.images[name]).record for name in used},
        "splits": blueprint.splits,
        "missing_runs": dict(missing),
    }


def write_config(folder: Path, config: str, tables: Mapping[str, list[dict[str, Any]]], features: Any) -> None:
    """Add or replace a config of a finished zoo: one file a split, then the manifest and the card's header.

    Raises:
        ZooError: if the folder cannot be written.
    """
    manifest = read_json(folder / schema.MANIFEST)
    try:
        _sweep(folder / config)
        fresh = Path(tempfile.mkdtemp(dir=folder, prefix=f".{config}-", suffix=".tmp"))
        try:
            fresh.chmod(0o755)
            for split, rows in tables.items():
                write_parquet(_only_shard(fresh.parent, fresh.name, split), features, [rows], {})
            _swap(fresh, folder / config)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
        _finish(folder, manifest)
    except OSError as error:
        raise ZooError(f"cannot write into {folder}: {error.strerror or error}") from None


def _sweep(place: Path) -> None:
    """Remove what a killed process left beside `place`."""
    for stale in place.parent.glob(f".{place.name}-*.tmp"):
        shutil.rmtree(stale, ignore_errors=True)


def _swap(fresh: Path, place: Path) -> None:
    old = Path(tempfile.mkdtemp(dir=place.parent, prefix=f".{place.name}-old-", suffix=".tmp"))
    try:
        if place.exists():
            place.replace(old / "it")
        fresh.replace(place)
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _finish(folder: Path, manifest: dict[str, Any]) -> None:
    """Write the card, then the manifest that lists every other file with its size and hash."""
    files = sorted(file for file in folder.glob("*/*.parquet") if not file.parent.name.startswith("."))
    held = [(file.parent.name, file.name.split("-")[0]) for file in files]
    (folder / "README.md").write_text(card_text(manifest, held), encoding="utf-8")
    files += [folder / schema.LAYOUTS, folder / "blueprint.yaml", folder / "README.md"]
    manifest["files"] = {
        file.relative_to(folder).as_posix(): {
            "bytes": file.stat().st_size,
            "sha256": _sha256(file),
        }
        for file in files
        if file.is_file()
    }
    write_json(folder / schema.MANIFEST, manifest)


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
