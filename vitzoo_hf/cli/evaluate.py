"""The verb `evaluate`: measure a zoo on the probe images that it carries, or on any other images, also corrupted."""

from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, TypedDict

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
    writing_into,
)
from vitzoo_hf.format.schema import ZooError

if TYPE_CHECKING:
    import pandas

    from vitzoo_hf.zoo.zoo import Zoo

# hidden: hidden folders are no part of a zoo, and are never pushed
CACHE = ".evaluation"
Corrupt = Annotated[
    list[str] | None,
    Parameter(
        name="--corrupt",
        negative=(),
        help="Corruption to evaluate under: NAME or NAME:SEVERITY (1 to 5), such as gaussian_noise:5; repeatable.",
    ),
]


class _Options(TypedDict):
    """Keyword arguments that `evaluate` and `evaluate_on` share."""

    device: str
    precision: str
    cache: Path
    ray: str | None
    progress: bool


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
    """Measure every model and every pair of final models, and write the results into the zoo.

    With --data, --corrupt or --where the results go into the folder of --out, and the zoo stays as it is. After an
    interruption, the same command continues: it keeps the outputs of models, identified by hashes of weights and
    images.

    Args:
        zoo: Folder of the zoo; with --out also a dataset id or `sample`.
        data: Images to evaluate on instead of the probe images: an image source as in blueprints, or a folder with
            one subfolder per class.
        out: Folder for the tables, as CSV files.
        device: cpu or cuda.
        precision: float32, tf32 (on CUDA), bfloat16 or float16; zoo.json then says so, with the measured effect.
        cache: Folder in which outputs of models are kept; by default `.evaluation` in the zoo, or in the folder of
            --out.
        ray: Address of the Ray cluster that runs the models: auto, or local to start a cluster on this machine.
        verbose: Print how the models are run.
    """
    if out is None and (data or corrupt or where):
        raise ZooError("results of --data, --corrupt and --where do not belong into the zoo: give --out FOLDER")
    if out is None and not Path(zoo).is_dir():
        raise ZooError(f"{zoo!r} is not a folder, so results cannot be written into the zoo: give --out FOLDER")
    opened = open_zoo(zoo, where)
    options = _Options(
        device=device,
        precision=precision,
        cache=cache or (out if out is not None else Path(zoo)) / CACHE,
        ray=ray,
        progress=not (json or quiet),
    )
    if verbose:
        _tell_plan(opened, device, precision)
    if data or corrupt:
        # refused above otherwise; tells the type checker
        assert out is not None
        _evaluate_images(opened, data, corrupt or [], out, options, json=json)
        return
    _evaluate_zoo(opened, zoo, out, options, json=json, quiet=quiet)


def _evaluate_zoo(opened: "Zoo", zoo: str, out: Path | None, options: _Options, *, json: bool, quiet: bool) -> None:
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
    opened: "Zoo", data: str | None, corrupt: list[str], out: Path, options: _Options, *, json: bool
) -> None:
    from vitzoo_hf.evaluation.evaluate import common_dataset, evaluate_on
    from vitzoo_hf.evaluation.image_sets import image_sets

    if not len(opened):
        raise ZooError("there is no model to evaluate: --where matches no row; widen it")
    dataset = common_dataset(opened.to_pandas())
    # classes of other datasets have no labels among these images
    models = opened.filter(dataset=dataset, is_final=True)
    table = evaluate_on(models, image_sets(models, dataset, data=data, corruptions=corrupt), **options)
    _write_tables(out, {"images": table})
    if json:
        print_json(table)
        return
    # medians: a few models at chance level would pull a mean down
    print_table(table.groupby("images", sort=False)[["accuracy", "loss", "ece"]].median().reset_index())
    print(f"medians of {table['model_id'].nunique()} final models; every model is in {out / 'images.csv'}")


def _write_tables(out: Path, tables: "dict[str, pandas.DataFrame]") -> None:
    with writing_into(out):
        out.mkdir(parents=True, exist_ok=True)
        for name, table in tables.items():
            table.to_csv(out / f"{name}.csv", index=False)


def _tell_plan(opened: "Zoo", device: str, precision: str) -> None:
    """Print how the models of every architecture and layout are run."""
    from vitzoo_hf.models.population import Population

    index = opened.to_pandas()
    # the columns that decide which models can be run together
    for _, members in index.groupby(["architecture", "architecture_args", "head", "layout"], sort=False):
        # 64 rows are enough to see how a group is run, without reading all weights
        rows = opened.filter(model_id=list(members["model_id"])[:64]).rows()
        for line in Population.from_rows(rows, device=device, precision=precision).describe(256):
            print(line)
