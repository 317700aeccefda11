"""The verb `properties`: predict properties of models from their weights and from their outputs."""

from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from vitzoo_hf.cli.options import Json, Quiet, Where, hint, open_zoo, print_json, print_table, writing_into
from vitzoo_hf.format.atomic import make_folder
from vitzoo_hf.format.messages import one_line
from vitzoo_hf.format.schema import ZooError

if TYPE_CHECKING:
    import pandas

    from vitzoo_hf.apply.properties.features import Features

Names = Annotated[list[str] | None, Parameter(negative=(), consume_multiple=True)]
SHOWN = ("target", "rows", "features", "model", "split", "metric", "value", "low", "high", "shuffled")


def properties(
    zoo: str,
    *,
    targets: Names = None,
    features: Names = None,
    models: Names = None,
    split: Annotated[list[str] | None, Parameter(negative=())] = None,
    embedding: Path | None = None,
    repeats: int = 3,
    shuffles: int = 20,
    seed: int = 0,
    where: Where = None,
    out: Path | None = None,
    device: str = "cpu",
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Predict accuracy, generalisation gap, epoch and factors of unseen models.

    Two references stand beside: predictions from shuffled labels, and from outputs on a few probe images.

    Args:
        zoo: Folder, dataset id, or `sample`.
        targets: Columns of the index to predict; by default every column that varies.
        features: constant, epoch, training_log, statistics, spectra, flat, norm, probing_16, probing_64, measured_64.
        models: ridge (the default), lightgbm (pip install 'vitzoo-hf[properties]'), hist_gradient_boosting.
        split: What a fold keeps together: the epochs of a run, all descendants in a lineage, or both by default.
        embedding: CSV or Parquet file with model_id and numeric columns, such as the embeddings of `vitzoo encode`.
        repeats: Number of cross-validations, each with other folds.
        shuffles: Number of shuffles of the labels in each repeat.
        seed: Seed of folds and shuffles.
        out: Folder for properties.csv and properties.png.
        device: cpu or cuda.
    """
    from vitzoo_hf.apply.properties.properties import FEATURES, predict_properties
    from vitzoo_hf.apply.properties.targets import SPLITS

    if out is not None:
        # before the cross-validations: a folder that cannot be written fails at once
        make_folder(out)
    # beside an embedding, features of the package are computed only where they are named
    columns: list[str | Features] = list(features or ([] if embedding else FEATURES))
    if embedding is not None:
        columns.append(_embedding(embedding))
    table = predict_properties(
        open_zoo(zoo, where),
        targets=targets,
        features=columns,
        models=models or ["ridge"],
        splits=split or list(SPLITS),
        repeats=repeats,
        shuffles=shuffles,
        seed=seed,
        device=device,
        progress=not (json or quiet),
    )
    _finish(table, zoo, out, json=json, quiet=quiet)


def _finish(table: "pandas.DataFrame", zoo: str, out: Path | None, *, json: bool, quiet: bool) -> None:
    if out is not None:
        _write(table, out)
    if json:
        print_json(table)
        return
    _tell(table, out)
    if not quiet:
        command = f"plot {quote(zoo)} --out REPORT" if out else f"properties {quote(zoo)} --out FOLDER"
        hint(f"Next: vitzoo {command}")


def _tell(table: "pandas.DataFrame", out: Path | None) -> None:
    print_table(table[list(SHOWN)])
    for note in table.attrs["notes"]:
        print(note)
    if out is not None:
        print(f"{len(table)} rows and the figure in {out}")


def _embedding(file: Path) -> "Features":
    """Read features from a table with a column `model_id`."""
    import pandas as pd

    from vitzoo_hf.apply.properties.features import table_features

    try:
        table = pd.read_parquet(file) if file.suffix == ".parquet" else pd.read_csv(file)
    # pyarrow and pandas raise subclasses of ValueError for a file that is no table
    except (OSError, ValueError) as error:
        raise ZooError(f"cannot read {file} as a table: {one_line(error)}") from None
    if "model_id" not in table:
        raise ZooError(
            f"{file} has no column model_id: expected a column model_id and one numeric column per feature"
        )
    return table_features("embedding", table.set_index("model_id"))


def _write(table: "pandas.DataFrame", out: Path) -> None:
    from vitzoo_hf.apply.properties.plot import plot_properties

    with writing_into(out):
        table.to_csv(out / "properties.csv", index=False)
        plot_properties(table).savefig(out / "properties.png", dpi=110)
