"""The verb that measures a zoo: on the images it carries, or on any others, clean and corrupted."""

from pathlib import Path
from shlex import quote
from typing import Annotated, Any

from cyclopts import Parameter

from vitzoo_hf.cli.options import (
    Json,
    Quiet,
    Where,
    folder_of,
    hint,
    open_zoo,
    print_json,
    print_table,
    table_records,
)
from vitzoo_hf.format.schema import ZooError

CACHE = ".evaluation"
Corrupt = Annotated[
    list[str] | None,
    Parameter(
        name="--corrupt", negative=(), help="NAME or NAME:SEVERITY (1 to 5), such as gaussian_noise:5; repeat."
    ),
]


def evaluate(
    zoo: str,
    *,
    data: str | None = None,
    corrupt: Corrupt = None,
    where: Where = None,
    out: Path | None = None,
    device: str = "cpu",
    precision: str = "float32",
    cache: Path | None = None,
    ray: str | None = None,
    verbose: bool = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure every model and every pair of final models, and write the result into the zoo.

    With --data, --corrupt or --where nothing is written into the zoo: give --out for the tables. Interrupted, the
    same command continues: outputs of models are kept by the hashes of weights and images.

    Args:
        zoo: The zoo's folder; with --out also a dataset id or `sample`.
        data: Other images: a source as blueprints name them, or a folder with one subfolder a class.
        out: Folder for the tables as CSV files.
        device: cpu or cuda.
        precision: float32, bfloat16 or float16.
        cache: Folder that keeps outputs; by default `.evaluation` in the zoo or in the folder of --out.
        ray: Address of a Ray cluster that runs the models: auto, or local to start one here.
        verbose: Say how the models run.
    """
    elsewhere = bool(data or corrupt or where)
    if elsewhere and out is None:
        raise ZooError("--data, --corrupt and --where measure something else than the zoo records: give --out FOLDER")
    if out is None and not Path(zoo).is_dir():
        raise ZooError(f"{zoo!r} is no folder, and results are written into the zoo: give --out FOLDER for tables")
    opened = open_zoo(zoo, where)
    place = cache or (out if out is not None else Path(zoo)) / CACHE
    options: dict[str, Any] = {"device": device, "precision": precision, "cache": place, "ray": ray}
    options["progress"] = not (json or quiet)
    if verbose:
        _tell_plan(opened, device, precision)
    if data or corrupt:
        assert out is not None
        _evaluate_images(opened, data, corrupt or [], out, options, json=json)
        return
    _evaluate_zoo(opened, zoo, out, options, json=json, quiet=quiet)


def _evaluate_zoo(
    opened: Any, zoo: str, out: Path | None, options: dict[str, Any], *, json: bool, quiet: bool
) -> None:
    from vitzoo_hf.evaluation.evaluate import evaluate as measure

    report = measure(opened, **options)
    if out is None:
        report.write(folder_of(zoo))
    else:
        _write_tables(out, {"evaluations": report.evaluations, "pairs": report.pairs})
    if json:
        counts = {"evaluations": len(report.evaluations), "pairs": len(report.pairs), "dataset": report.dataset}
        print_json(counts | {"failed": report.failed, "precision_effect": report.precision_effect})
        return
    place = zoo if out is None else out
    print(f"{len(report.evaluations)} models and {len(report.pairs)} pairs, compared on {report.dataset}, in {place}")
    for model_id, reason in report.failed.items():
        print(f"no metrics: {model_id}: {reason}")
    for name, value in report.precision_effect.items():
        print(f"{options['precision']} against float32: {name.replace('_', ' ')} {value:.4g}")
    if not quiet and out is None:
        hint(f"Next: vitzoo plot {quote(zoo)} --out REPORT")


def _evaluate_images(
    opened: Any, data: str | None, corrupt: list[str], out: Path, options: dict[str, Any], *, json: bool
) -> None:
    from vitzoo_hf.evaluation.evaluate import common_dataset, evaluate_on
    from vitzoo_hf.evaluation.image_sets import image_sets

    if not len(opened):
        raise ZooError("there is no model to evaluate: the filter matches none")
    dataset = common_dataset(opened.to_pandas())
    models = opened.filter(dataset=dataset, is_final=True)
    table = evaluate_on(models, image_sets(models, dataset, data=data, corruptions=corrupt), **options)
    _write_tables(out, {"images": table})
    if json:
        print_json(table_records(table))
        return
    print_table(
        table_records(table.groupby("images", sort=False)[["accuracy", "loss", "ece"]].median().reset_index())
    )
    print(f"medians of {table['model_id'].nunique()} final models; every model is in {out / 'images.csv'}")


def _write_tables(out: Path, tables: dict[str, Any]) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, table in tables.items():
            table.to_csv(out / f"{name}.csv", index=False)
    except OSError as error:
        raise ZooError(f"cannot write into {out}: {error.strerror}") from None


def _tell_plan(opened: Any, device: str, precision: str) -> None:
    """How one model of each layout, and all of its kind, run."""
    from vitzoo_hf.models.population import Population

    index = opened.to_pandas()
    for _, members in index.groupby(["architecture", "architecture_args", "head", "layout"], sort=False):
        rows = opened.filter(model_id=list(members["model_id"])[:64]).rows()
        for line in Population.from_rows(rows, device=device, precision=precision).describe(256):
            print(line)
