"""Checkpoints -> a zoo: a folder of Parquet that `datasets.load_dataset` opens, exactly what goes to the Hub.

`weights` and `index` have one file or more a split, `probes` the held-out images as the models are fed them. The
folder appears complete or not at all. `write_config` adds tables to a finished zoo, as `evaluate` does.
"""

import hashlib
import io
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from torch import Tensor

from vitzoo_hf import schema
from vitzoo_hf.blueprint import Blueprint, Run
from vitzoo_hf.checkpoint import RunFolder, read_json, write_json
from vitzoo_hf.flatten import Layout, flatten
from vitzoo_hf.images import ImageSet, load_images
from vitzoo_hf.launch import progress_bar
from vitzoo_hf.schema import ZooError
from vitzoo_hf.shards import write_parquet
from vitzoo_hf.train import architecture_args, head_hidden, is_finished

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
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    except OSError as error:
        raise ZooError(f"cannot write into {folder.parent}: {error.strerror}") from None
    try:
        temporary.chmod(0o755)
        layouts: dict[str, Layout] = {}
        manifest = _manifest(blueprint, missing)
        _write_rows(blueprint, kept, runs, temporary, layouts, progress)
        _write_probes(blueprint, temporary)
        write_json(temporary / schema.LAYOUTS, {key: layout.to_json() for key, layout in layouts.items()})
        (temporary / "blueprint.yaml").write_text(blueprint.text, encoding="utf-8")
        _finish(temporary, manifest)
        _swap(temporary, folder)
    except OSError as error:
        raise ZooError(f"cannot write the zoo {folder}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


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


def _write_rows(
    blueprint: Blueprint,
    kept: list[Run],
    runs: Path,
    folder: Path,
    layouts: dict[str, Layout],
    progress: bool,
) -> None:
    total = sum(len(run.keep_epochs) for run in kept)
    largest = max(_num_parameters(run, runs) for run in kept)
    encoding = "list" if largest <= schema.LIST_LIMIT else "binary"
    with progress_bar("packing", "row", shown=progress, total=total) as bar:
        for split in schema.SPLITS:
            members = [run for run in kept if run.split == split]
            light: list[dict[str, Any]] = []
            rows = _rows(blueprint, members, runs, layouts)
            group_rows = max(1, ROW_GROUP_BYTES // (4 * largest)) if encoding == "list" else 1
            shard_rows = max(1, SHARD_BYTES // (4 * largest) // group_rows) * group_rows
            count = sum(len(run.keep_epochs) for run in members)
            shards = -(-count // shard_rows)
            features = schema.row_features(blueprint.factor_types, weights=encoding)
            for shard in range(shards):
                file = folder / "weights" / f"{split}-{shard:05d}-of-{shards:05d}.parquet"
                taken = min(shard_rows, count - shard * shard_rows)
                groups = _groups(rows, taken, group_rows)
                write_parquet(file, features, _remember(groups, light, bar), layouts)
            if light:
                index = schema.row_features(blueprint.factor_types, weights=None)
                write_parquet(folder / "index" / f"{split}-00000-of-00001.parquet", index, [light], layouts)


def _num_parameters(run: Run, runs: Path) -> int:
    tensors, _ = RunFolder(runs / run.run_id).load_epoch(run.epochs)
    return Layout.of(tensors).num_parameters


def _remember(
    groups: Iterable[list[dict[str, Any]]], light: list[dict[str, Any]], bar: Any
) -> Iterator[list[dict[str, Any]]]:
    for group in groups:
        light.extend({name: value for name, value in row.items() if name != "weights"} for row in group)
        bar.update(len(group))
        yield group


def _groups(rows: Iterator[dict[str, Any]], count: int, size: int) -> Iterator[list[dict[str, Any]]]:
    while count > 0:
        group = [next(rows) for _ in range(min(size, count))]
        count -= len(group)
        yield group


def _rows(
    blueprint: Blueprint, members: Iterable[Run], runs: Path, layouts: dict[str, Layout]
) -> Iterator[dict[str, Any]]:
    for run in members:
        place = RunFolder(runs / run.run_id)
        images = load_images(run.images, blueprint.images[run.images])
        args = schema.canonical_json(architecture_args(blueprint, run, len(images.class_names)))
        provenance = _provenance(blueprint, place.spec)
        for epoch in run.keep_epochs:
            tensors, results = place.load_epoch(epoch)
            layout = Layout.of(tensors)
            layouts.setdefault(layout.fingerprint, layout)
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


def _write_probes(blueprint: Blueprint, folder: Path) -> None:
    """Selection and test images of every dataset whose held-out images are few enough to travel with the zoo."""
    for role in ("selection", "test"):
        rows = []
        for name in dict.fromkeys(run.images for run in blueprint.runs):
            images = load_images(name, blueprint.images[name])
            if len(images.splits[role]) <= MAX_PROBES:
                rows += list(_probe_rows(images, role))
        if rows:
            write_parquet(folder / "probes" / f"{role}-00000-of-00001.parquet", schema.probe_features(), [rows], {})


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
        fresh = Path(tempfile.mkdtemp(dir=folder, prefix=f".{config}-"))
        try:
            fresh.chmod(0o755)
            for split, rows in tables.items():
                write_parquet(fresh / f"{split}-00000-of-00001.parquet", features, [rows], {})
            _swap(fresh, folder / config)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
        _finish(folder, manifest)
    except OSError as error:
        raise ZooError(f"cannot write into {folder}: {error.strerror or error}") from None


def _swap(fresh: Path, place: Path) -> None:
    old = Path(tempfile.mkdtemp(dir=place.parent, prefix=f".old-{place.name}-"))
    try:
        if place.exists():
            place.replace(old / "it")
        fresh.replace(place)
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _finish(folder: Path, manifest: dict[str, Any]) -> None:
    """Write the card, then the manifest that lists every other file with its size and hash."""
    files = sorted(file for file in folder.glob("*/*.parquet") if not file.parent.name.startswith("."))
    header = {
        "license": "cc-by-4.0",
        "pretty_name": manifest["name"],
        "tags": ["model-zoo", "weight-space", "vision-transformer"],
        "configs": [entry for config in schema.CONFIGS if (entry := _config_entry(folder, config))],
    }
    text = f"---\n{yaml.safe_dump(header, sort_keys=False)}---\n\n{_card_body(manifest)}"
    (folder / "README.md").write_text(text, encoding="utf-8")
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


def _config_entry(folder: Path, config: str) -> dict[str, Any] | None:
    splits = dict.fromkeys(file.name.split("-")[0] for file in sorted((folder / config).glob("*.parquet")))
    known = [split for split in schema.SPLITS if split in splits]
    known += [split for split in splits if split not in known]
    if not known:
        return None
    entry: dict[str, Any] = {"config_name": config}
    entry["data_files"] = [{"split": split, "path": f"{config}/{split}-*.parquet"} for split in known]
    return entry | ({"default": True} if config == "weights" else {})


def _card_body(manifest: Mapping[str, Any]) -> str:
    images = "\n".join(f"- `{name}`: {record['licence']}" for name, record in manifest["images"].items())
    factors = ", ".join(f"`factor_{name}`" for name in manifest["factors"])
    return f"""# {manifest["name"]}: a population of vision transformers

Each row is one checkpoint: its flat float32 weights in the `state_dict` order of timm, its generating
factors ({factors}), its lineage (`parent_id`) and its results.

```python
from datasets import load_dataset

rows = load_dataset("PATH_OR_ID")            # weights and factors
index = load_dataset("PATH_OR_ID", "index")  # the same rows without weights
```

Splits are by {manifest["splits"]["by"]}: no run has epochs in two of them. `layouts.json` gives names, shapes
and offsets of the tensors in a vector; `blueprint.yaml` is what the zoo was made from; `probes` holds the
held-out images exactly as the models are fed them, before `(x / 255 − mean) / std` (see `{schema.MANIFEST}`).

Images trained on:

{images}
"""
