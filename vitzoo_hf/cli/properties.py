"""The verb that predicts what models are like from their weights, and from what they answer."""

from pathlib import Path
from shlex import quote
from typing import Annotated, Any

from cyclopts import Parameter

from vitzoo_hf.cli.options import Json, Quiet, Where, hint, open_zoo, print_json, print_table, table_records
from vitzoo_hf.format.atomic import make_folder
from vitzoo_hf.format.schema import ZooError

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
    """Predict accuracy, generalisation gap, epoch and factors of unseen models; beside shuffled labels and probing.

    Args:
        zoo: Folder, dataset id, or `sample`.
        targets: Columns of the index to predict; all that vary by default.
        features: constant, epoch, training_log, statistics, spectra, flat, norm, probing_16, probing_64, measured_64;
            all by default.
        models: ridge (the default), lightgbm (pip install 'vitzoo-hf[properties]'), hist_gradient_boosting.
        split: run keeps the epochs of a run together, lineage all descendants of a pre-trained run; both by default.
        embedding: CSV or Parquet with a column model_id and numbers, such as an autoencoder's, as features.
        repeats: Cross-validations with other folds.
        shuffles: Shuffled labels a repeat.
        out: Folder for properties.csv and properties.png.
        device: cpu or cuda.
    """
    from vitzoo_hf.apply.properties.properties import FEATURES, predict_properties
    from vitzoo_hf.apply.properties.targets import SPLITS

    if out is not None:
        make_folder(out)
    given: list[Any] = list(features or ([] if embedding else FEATURES))
    if embedding is not None:
        given.append(_embedding(embedding))
    table = predict_properties(
        open_zoo(zoo, where),
        targets=targets,
        features=given,
        models=models or ["ridge"],
        splits=split or list(SPLITS),
        repeats=repeats,
        shuffles=shuffles,
        seed=seed,
        device=device,
        progress=not (json or quiet),
    )
    if out is not None:
        _write(table, out)
    if json:
        print_json(table_records(table))
        return
    _tell(table, out)
    if not quiet:
        kept = f"plot {quote(zoo)} --out REPORT" if out else f"properties {quote(zoo)} --out FOLDER"
        hint(f"Next: vitzoo {kept}")


def _tell(table: Any, out: Path | None) -> None:
    print_table(table_records(table[list(SHOWN)]))
    for note in table.attrs["notes"]:
        print(note)
    if out is not None:
        print(f"{len(table)} rows and the figure in {out}")


def _embedding(file: Path) -> Any:
    """Features of a table with a column `model_id`."""
    import pandas as pd

    from vitzoo_hf.apply.properties.features import table_features

    try:
        table = pd.read_parquet(file) if file.suffix == ".parquet" else pd.read_csv(file)
    except (OSError, ValueError) as error:
        raise ZooError(f"cannot read {file} as a table: {str(error).splitlines()[0]}") from None
    if "model_id" not in table:
        raise ZooError(f"{file} has no column model_id: expected that and one column a number")
    return table_features("embedding", table.set_index("model_id"))


def _write(table: Any, out: Path) -> None:
    from vitzoo_hf.apply.properties.plot import plot_properties

    try:
        table.to_csv(out / "properties.csv", index=False)
        plot_properties(table).savefig(out / "properties.png", dpi=110)
    except OSError as error:
        raise ZooError(f"cannot write into {out}: {error.strerror}") from None
