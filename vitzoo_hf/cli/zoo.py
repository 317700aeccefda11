"""The verbs that take a zoo as it is: list, describe, get, export, convert, push, verify."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from json import loads as parse_json
from pathlib import Path
from shlex import quote
from typing import Any

from vitzoo_hf.cli.options import (
    Json,
    Quiet,
    Revision,
    Where,
    folder_of,
    format_bytes,
    hint,
    join,
    open_zoo,
    print_json,
    print_table,
    table_records,
)
from vitzoo_hf.format.schema import ZooError


def list_rows(
    zoo: str,
    *,
    where: Where = None,
    limit: int = 20,
    revision: Revision = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """List rows with their factors and results.

    Args:
        zoo: Folder, dataset id, or `sample`.
        limit: At most so many rows; 0 for all.
    """
    opened = open_zoo(zoo, where, revision=revision)
    index = opened.to_pandas()
    columns = ["model_id", "stage", "epoch", *opened.factors, "test_accuracy", "test_loss"]
    shown = index[columns] if limit <= 0 else index[columns].head(limit)
    if json:
        print_json(table_records(shown))
        return
    print_table(table_records(shown.rename(columns={name: name.removeprefix("factor_") for name in columns})))
    if not quiet:
        more = f"{len(shown)} of {len(index)} rows; --limit 0 shows all. " if len(shown) < len(index) else ""
        hint(f"{more}Next: vitzoo get {quote(zoo)} MODEL_ID --out FILE.safetensors")


def info(zoo: str, *, revision: Revision = None, json: Json = False, quiet: Quiet = False) -> None:
    """Say what a zoo holds: rows, runs, factors and their values, configs, images.

    Args:
        zoo: Folder, dataset id, or `sample`.
    """
    opened = open_zoo(zoo, None, revision=revision)
    index = opened.to_pandas()
    facts = {
        "name": opened.manifest["name"],
        "format": opened.manifest["format"],
        "rows": len(index),
        "runs": int(index["run_id"].nunique()),
        "final_models": int(index["is_final"].sum()),
        "parameters": sorted({int(count) for count in index["num_parameters"]}),
        "factors": {name: sorted(set(opened.index[name]) - {None}) for name in opened.factors},
        "splits": {split: opened.splits_of(opened.model_ids).count(split) for split in opened.splits},
        "configs": opened.configs,
        "images": {name: record["licence"] for name, record in opened.manifest["images"].items()},
        "missing_runs": opened.manifest["missing_runs"],
    }
    if json:
        print_json(facts)
        return
    for name, value in facts.items():
        if isinstance(value, Mapping):
            print(f"{name}")
            for key, entry in value.items():
                print(f"    {key}: {join(entry)}")
        else:
            print(f"{name:<14}{join(value)}")
    if not quiet:
        hint(f"Next: vitzoo ls {quote(zoo)}")


def get(
    zoo: str,
    model_id: str,
    *,
    out: Path,
    format: str = "timm",
    revision: Revision = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write one model as safetensors with timm's tensor names, or as a folder that transformers loads.

    Args:
        zoo: Folder, dataset id, or `sample`.
        model_id: A model of the zoo, as `vitzoo ls` shows it.
        out: The .safetensors file to write, or the folder for transformers.
        format: timm or transformers.
    """
    from vitzoo_hf.convert.export import export_row

    row = open_zoo(zoo, None, revision=revision).row(model_id)
    export_row(row, out, format=format)
    if json:
        print_json({"model_id": model_id, "file": str(out)})
        return
    print(f"{model_id} in {out}")
    if not quiet:
        hint(f"Next: vitzoo export {quote(zoo)} --out FOLDER --where is_final=true")


def export(
    zoo: str,
    *,
    out: Path,
    where: Where = None,
    format: str = "timm",
    revision: Revision = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write many models as safetensors, one file each.

    Args:
        zoo: Folder, dataset id, or `sample`.
        out: Folder for the files; those it already has in full are kept.
        format: timm, one safetensors file a model, or transformers, one folder a model.
    """
    from vitzoo_hf.convert.export import export_zoo

    files = export_zoo(open_zoo(zoo, where, revision=revision), out, format=format, progress=not (json or quiet))
    if json:
        print_json([str(file) for file in files])
        return
    print(f"{len(files)} models in {out}")


def convert(
    source: str,
    *,
    out: Path,
    dtype: str = "float32",
    table: Path | None = None,
    architecture: str | None = None,
    architecture_args: str | None = None,
    first_epoch: int | None = None,
    name: str | None = None,
    split_by: str = "lineage",
    validation: float = 0.0,
    test: float = 0.0,
    licence: str = "unknown",
    workers: int = 2,
    replace: bool = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Make a zoo of checkpoints somebody else has published; interrupted, the same command continues.

    Args:
        source: Folder or http address of the original ViT model zoo; a checkpoint, a model folder or a folder of
            those; hf:ORG/NAME, or a .txt file of Hub model ids.
        out: Folder for the zoo.
        dtype: float32, or float16 or bfloat16 for half the size with rounded weights.
        table: CSV with a row a checkpoint: column `file` (or `repo`), columns of the row, and factors.
        architecture: timm name, where the source does not tell it.
        architecture_args: Arguments of timm.create_model that shapes do not tell, as JSON.
        first_epoch: Epochs completed at a release's first checkpoint (0 or 1), if it is not to be found out.
        name: Of the zoo.
        split_by: What stays in one split: lineage or run.
        validation: Share of the lineages or runs that is held out for validation.
        test: Share that is held out for testing.
        licence: Of the weights, as the Hub names it, such as cc-by-4.0.
        workers: Checkpoints loaded at the same time.
        replace: Replace another zoo that is in the folder.
    """
    from vitzoo_hf.convert.convert import convert as write
    from vitzoo_hf.convert.sources.any import plan_source

    plan = plan_source(
        source,
        table=table,
        architecture=architecture,
        architecture_args=_json_object(architecture_args, "--architecture-args"),
        first_epoch=first_epoch,
        name=name,
    )
    splits = {"by": split_by, "seed": 0, "train": 1 - validation - test, "validation": validation, "test": test}
    options: dict[str, Any] = {"dtype": dtype, "splits": splits, "licence": licence, "workers": workers}
    with _naming_all_refused():
        done = write(plan, out, **options, replace=replace, progress=not (json or quiet))
    if json:
        print_json(vars(done) | {"folder": str(out)})
        return
    print(f"{done.rows} rows in {out}")
    print(*(f"refused: {path}: {reason}\n" for path, reason in done.refused.items()), sep="", end="")
    print(*(f"note: {note}\n" for note in done.notes), sep="", end="")
    if not quiet:
        hint(f"Next: vitzoo verify {quote(str(out))}, then vitzoo push {quote(str(out))} ORG/NAME")


@contextmanager
def _naming_all_refused() -> Iterator[None]:
    """Print why each checkpoint was refused where all were."""
    from vitzoo_hf.convert.convert import NothingTakenError

    try:
        yield
    except NothingTakenError as error:
        for path, reason in error.refused.items():
            print(f"refused: {path}: {reason}", file=sys.stderr)
        raise


def _json_object(text: str | None, option: str) -> dict[str, Any] | None:
    if text is None:
        return None
    try:
        value = parse_json(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ZooError(f"{option} {text!r} is no JSON object, such as '{{\"num_heads\": 6}}'")
    return value


def push(
    zoo: Path,
    repository: str,
    *,
    private: bool = False,
    dry_run: bool = False,
    tag: str | None = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Publish a zoo on the Hugging Face Hub, or bring it up to date: only what changed is uploaded.

    Args:
        zoo: The zoo's folder, or `sample`.
        repository: Dataset id, ORG/NAME.
        private: Make a new dataset private.
        dry_run: Say what would be uploaded, and change nothing.
        tag: Also tag this version, such as v1.0.
    """
    from vitzoo_hf.publish.push import push as publish

    done = publish(
        folder_of(str(zoo)), repository, private=private, dry_run=dry_run, tag=tag, progress=not (json or quiet)
    )
    if json:
        print_json(vars(done))
        return
    would = "would be " if dry_run else ""
    sent = f"{len(done.uploaded)} files ({format_bytes(done.uploaded_bytes)}) {would}uploaded"
    print(f"{sent}, {done.unchanged} unchanged, {len(done.deleted)} {would}deleted")
    for name, count in done.uploaded if dry_run else ():
        print(f"    {name}  {format_bytes(count)}")
    for name in done.deleted if dry_run else ():
        print(f"    delete {name}")
    if done.left_out:
        print(f"left out, not part of the zoo: {', '.join(done.left_out)}")
    if not dry_run:
        print(f"commit {str(done.commit)[:8]}, tags {', '.join(done.tags)}")
    print(done.url)
    if not quiet:
        hint(f"Next: vitzoo push {quote(str(zoo))} {repository}" if dry_run else f"Next: vitzoo info {repository}")


def verify(zoo: str, *, revision: Revision = None, json: Json = False, quiet: Quiet = False) -> None:
    """Hash every file of a zoo again and name what is damaged; exit status 1 if anything is.

    Args:
        zoo: Folder, `sample`, or dataset id, of which every file is read once and nothing kept.
    """
    from vitzoo_hf.zoo.verify import verify as check

    found = check(folder_of(zoo), revision=revision, progress=not (json or quiet))
    if json:
        print_json(vars(found) | {"intact": found.intact})
    else:
        for name, reason in found.damaged.items():
            print(f"damaged: {name}: {reason}")
            for model_id in found.rows.get(name, ()):
                print(f"    lost: {model_id}")
    if not found.intact:
        raise ZooError(f"{len(found.damaged)} of {found.files} files of {zoo} are damaged; get or pack those again")
    if not json:
        print(f"{found.files} files of {zoo}, {format_bytes(found.size)}, are as they were written")
