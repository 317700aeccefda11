"""The verbs for whole zoos: list, describe, get, export, convert, push, verify."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from json import loads as parse_json
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

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
    say_without_statistics,
)
from vitzoo_hf.format.schema import ZooError

if TYPE_CHECKING:
    from vitzoo_hf.convert.convert import Conversion


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
        limit: Largest number of rows to print; 0 for all.
    """
    opened = open_zoo(zoo, where, revision=revision)
    index = opened.to_pandas()
    columns = ["model_id", "stage", "epoch", *opened.factors, "test_accuracy", "test_loss"]
    shown = index[columns] if limit <= 0 else index[columns].head(limit)
    if json:
        print_json(shown)
        return
    print_table(shown.rename(columns={name: name.removeprefix("factor_") for name in columns}))
    if not quiet:
        more = f"{len(shown)} of {len(index)} rows; --limit 0 shows all. " if len(shown) < len(index) else ""
        hint(f"{more}Next: vitzoo get {quote(zoo)} MODEL_ID --out FILE.safetensors")


def info(zoo: str, *, revision: Revision = None, json: Json = False, quiet: Quiet = False) -> None:
    """Describe a zoo: rows, runs, factors and their values, configs, images.

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
        # None does not compare with numbers or text; it means that the factor does not apply
        "factors": {name: sorted(set(opened.index[name]) - {None}) for name in opened.factors},
        "splits": {split: opened.splits_of(opened.model_ids).count(split) for split in opened.splits},
        "configs": opened.configs,
        "images": {name: record.get("licence") for name, record in opened.manifest["images"].items()},
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
    """Write one model as a safetensors file with the tensor names of timm, or as a folder that transformers loads.

    Args:
        zoo: Folder, dataset id, or `sample`.
        model_id: Id of the model, as `vitzoo ls` lists it.
        out: File to write, .safetensors; with --format transformers, the folder.
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
    """Write many models as safetensors files, one file per model.

    Args:
        zoo: Folder, dataset id, or `sample`.
        out: Folder for the files. Files that are already complete are not written again.
        format: timm for one safetensors file per model, or transformers for one folder per model.
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
    default_config: str | None = None,
    workers: int = 2,
    replace: bool = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Convert published checkpoints into a zoo. After an interruption, the same command continues.

    Args:
        source: The original ViT model zoo; a checkpoint, a folder of these or of models; hf:ORG/NAME; a .txt list.
        out: Folder for the zoo.
        dtype: Storage type of the weights: float32, or float16 or bfloat16 for half the size with rounded weights.
        table: CSV file, one row per checkpoint: a column `file` (or `repo`), columns of rows, and factors.
        architecture: Name of the architecture in timm, if the source does not state it.
        architecture_args: Arguments of timm.create_model that cannot be inferred from the weights, as JSON.
        first_epoch: Epochs completed at the first checkpoint of a release, 0 or 1; detected by default.
        name: Name of the zoo.
        split_by: Unit that stays within one split: lineage or run.
        validation: Share of the lineages or runs in the validation split.
        test: Share of the lineages or runs in the test split.
        licence: Licence of the weights, as the Hub names it, such as cc-by-4.0.
        default_config: What load_dataset and the Hub's viewer open, weights or index; by default by the models' size.
        workers: Number of checkpoints loaded at the same time.
        replace: Replace another zoo that is in the folder.
    """
    from vitzoo_hf.convert.convert import convert as write
    from vitzoo_hf.convert.sources.plan import plan_source

    plan = plan_source(
        source,
        table=table,
        architecture=architecture,
        architecture_args=_json_object(architecture_args, "--architecture-args"),
        first_epoch=first_epoch,
        name=name,
    )
    splits = _splits(split_by, validation, test)
    with _naming_all_refused():
        conversion = write(
            plan, out, dtype=dtype, splits=splits, licence=licence, default_config=default_config,
            workers=workers, replace=replace, progress=not (json or quiet),
        )  # fmt: skip
    _tell_conversion(conversion, out, json=json, quiet=quiet)


def _splits(by: str, validation: float, test: float) -> dict[str, str | int | float]:
    # training gets the rest; a negative rest is refused with the shares
    return {"by": by, "seed": 0, "train": 1 - validation - test, "validation": validation, "test": test}


def _tell_conversion(conversion: "Conversion", out: Path, *, json: bool, quiet: bool) -> None:
    if json:
        # JSON has no paths
        print_json(vars(conversion) | {"folder": str(out)})
        return
    print(f"{conversion.rows} rows in {out}")
    print(*(f"refused: {path}: {reason}\n" for path, reason in conversion.refused.items()), sep="", end="")
    print(*(f"note: {note}\n" for note in conversion.notes), sep="", end="")
    say_without_statistics(out)
    if not quiet:
        hint(f"Next: vitzoo verify {quote(str(out))}, then vitzoo push {quote(str(out))} ORG/NAME")


@contextmanager
def _naming_all_refused() -> Iterator[None]:
    """Print the reason for every refused checkpoint if none could be converted."""
    from vitzoo_hf.convert.convert import NothingTakenError

    try:
        yield
    except NothingTakenError as error:
        # on standard error: with --json, standard output holds JSON only
        for path, reason in error.refused.items():
            print(f"refused: {path}: {reason}", file=sys.stderr)
        raise


def _json_object(text: str | None, option: str) -> dict[str, object] | None:
    if text is None:
        return None
    try:
        value = parse_json(text)
    # JSONDecodeError is a ValueError; the message below shows the text
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ZooError(f"{option} {text!r}: expected a JSON object, such as '{{\"num_heads\": 6}}'")
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
    """Publish a zoo on the Hugging Face Hub, or update it there. Only changed files are uploaded.

    Args:
        zoo: Folder of the zoo, or `sample`.
        repository: Dataset id on the Hub, ORG/NAME.
        private: Make the dataset private if it is new.
        dry_run: List what would be uploaded, and change nothing.
        tag: Additional tag for this version, such as v1.0.
    """
    from vitzoo_hf.publish.push import push as publish

    result = publish(
        folder_of(str(zoo)), repository, private=private, dry_run=dry_run, tag=tag, progress=not (json or quiet)
    )
    if json:
        print_json(vars(result))
        return
    would = "would be " if dry_run else ""
    uploads = f"{len(result.uploaded)} files ({format_bytes(result.uploaded_bytes)}) {would}uploaded"
    print(f"{uploads}, {result.unchanged} unchanged, {len(result.deleted)} {would}deleted")
    for name, count in result.uploaded if dry_run else ():
        print(f"    {name}  {format_bytes(count)}")
    for name in result.deleted if dry_run else ():
        print(f"    delete {name}")
    if result.left_out:
        print(f"left out, not part of the zoo: {', '.join(result.left_out)}")
    if not dry_run:
        print(f"commit {str(result.commit)[:8]}, tags {', '.join(result.tags)}")
    print(result.url)
    if not quiet:
        hint(f"Next: vitzoo push {quote(str(zoo))} {repository}" if dry_run else f"Next: vitzoo info {repository}")


def verify(zoo: str, *, revision: Revision = None, json: Json = False, quiet: Quiet = False) -> None:
    """Compare every file of a zoo with its hash, and name damaged files; exit status 1 if a file is damaged.

    Args:
        zoo: Folder, `sample`, or dataset id. The files of a dataset are downloaded once and not stored.
    """
    from vitzoo_hf.zoo.verify import verify as check

    result = check(folder_of(zoo), revision=revision, progress=not (json or quiet))
    if json:
        print_json(vars(result) | {"intact": result.intact})
    else:
        for name, reason in result.damaged.items():
            print(f"damaged: {name}: {reason}")
            for model_id in result.rows.get(name, ()):
                print(f"    lost: {model_id}")
        for note in result.notes:
            print(f"note: {note}")
    # after the report, so that damage sets the exit status with --json too
    if not result.intact:
        raise ZooError(
            f"{len(result.damaged)} of {result.files} files of {zoo} are damaged: download them again,"
            " or pack the zoo again"
        )
    if not json:
        print(f"{result.files} files of {zoo}, {format_bytes(result.size)}, are as they were written")
