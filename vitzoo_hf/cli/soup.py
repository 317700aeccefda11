"""The verb `soup`: average the weights of groups of models, or of the epochs of each run."""

from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Literal, TypedDict

from cyclopts import Parameter

from vitzoo_hf.cli.options import (
    Json,
    Quiet,
    Where,
    check_least,
    hint,
    names_of,
    open_zoo,
    print_json,
    print_table,
)
from vitzoo_hf.format.schema import ZooError

if TYPE_CHECKING:
    import pandas

    from vitzoo_hf.zoo.zoo import Zoo

SHOWN = ("ingredients", "selection_accuracy", "test_accuracy", "best_single_test", "ensemble_test", "gain")
By = Annotated[
    str | None,
    Parameter(
        name="--by",
        help="Columns that define a group, COLUMN,COLUMN…: models with equal values in all of them are averaged into "
        "one soup; by default parent_id,head.",
    ),
]
Method = Literal["uniform", "greedy", "learned", "unconstrained", "epochs"]


class _Averages(TypedDict, total=False):
    """Options of `average_epochs` that were given; it has defaults for the others."""

    last: list[int]
    decays: list[float]


def soup(
    zoo: str,
    *,
    out: Path,
    method: Method = "greedy",
    by: By = None,
    where: Where = None,
    last: str | None = None,
    decay: float | None = None,
    seed: int = 0,
    device: str = "cpu",
    cache: Path | None = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Average the weights of models (model soups), and write the soups as a zoo.

    Choices are made on selection images, and results are reported on test images. Each soup is a row whose
    provenance lists its ingredients. The table compares it with the best single model by selection and with the
    ensemble of the ingredients, with 95 % intervals over test images. soups.csv or epochs.csv has all columns.

    Args:
        zoo: Folder, dataset id, or `sample`. Only final fine-tuned models are averaged, unless --where names a stage,
            a run or a model.
        out: Folder for the zoo of soups and the table.
        method: uniform average; greedy selection (Wortsman et al. 2022); learned or unconstrained coefficients;
            epochs averages the stored epochs of each run.
        last: For --method epochs: numbers of last stored epochs to average, K,K…; by default 2,3,5.
        decay: For --method epochs: decay of the exponential average, from 0 to below 1; by default 0.5.
        seed: Seed of learned coefficients and intervals.
        device: cpu or cuda.
        cache: Folder in which outputs of models are kept, such as ZOO/.evaluation.
    """
    from vitzoo_hf.apply.made_zoos import check_folder
    from vitzoo_hf.models.rebuild import usable_device

    opened = open_zoo(zoo, where)
    # before any model is averaged
    check_folder(out, opened, "soups_of")
    usable_device(device)
    check_least("--seed", seed, 0)
    if method == "epochs":
        if by is not None:
            raise ZooError("--by groups models; --method epochs averages each run by itself: leave --by out")
        _soup_epochs(opened, out, _averages(last, decay), seed, device, json=json, quiet=quiet)
        return
    if last is not None or decay is not None:
        raise ZooError(
            f"--last and --decay do not apply to --method {method}: leave them out, or use --method epochs"
        )
    # names of the columns alone: whatever their values, the user has restricted the rows
    conditions = {text.split("=")[0] for text in where or ()}
    # a condition of the user on epochs replaces the default of final models
    finals = opened.filter(is_final=True) if not conditions & {"epoch", "is_final"} else opened
    models = finals if conditions & {"stage", "model_id", "run_id"} else finals.filter(stage="finetune")
    columns = ["parent_id", "head"] if by is None else names_of("--by", by, "parent_id,head")
    _soup_groups(models, out, method, columns, seed, device, cache, json=json, quiet=quiet)


def _soup_groups(
    models: "Zoo",
    out: Path,
    method: str,
    columns: list[str],
    seed: int,
    device: str,
    cache: Path | None,
    *,
    json: bool,
    quiet: bool,
) -> None:
    from vitzoo_hf.apply.soup.comparison import compare_soups, group_text
    from vitzoo_hf.apply.soup.rows import soup_row, write_soups

    comparison = compare_soups(
        models,
        by=columns,
        methods=[method],
        seed=seed,
        device=device,
        cache=cache,
        progress=not (json or quiet),
    )
    rows = [
        soup_row(
            models,
            measured.soup,
            # `, ` is no part of a model id; `--` separates parts of ids elsewhere too
            name=group_text(measured.group).replace(", ", "--"),
            test_loss=measured.test_loss,
            test_accuracy=measured.test_accuracy,
        )
        for measured in comparison.soups
    ]
    write_soups(models, rows, out)
    _finish(comparison.table, out, "soups.csv", comparison.left_out, json=json)
    if json:
        return
    print_table(comparison.table[[*columns, *SHOWN]])
    print(f"{len(rows)} soups in {out}; gain: test accuracy minus that of the best single model by selection")
    if not quiet:
        hint(f"Next: vitzoo evaluate {quote(str(out))}")


def _averages(last: str | None, decay: float | None) -> _Averages:
    averages = _Averages()
    if last is not None:
        texts = [text.strip() for text in last.split(",")]
        # an average of the last 1 is the last epoch itself
        if not all(text.isdecimal() and int(text) >= 2 for text in texts):
            raise ZooError(f"--last {last}: expected K,K…, whole numbers of at least 2, such as 2,3,5")
        averages["last"] = [int(text) for text in texts]
    if decay is not None:
        # with a decay of 1 the average would never leave its first epoch
        if not 0 <= decay < 1:
            raise ZooError(f"--decay {decay:g}: expected a number from 0 to below 1, such as 0.5")
        averages["decays"] = [decay]
    return averages


def _soup_epochs(
    opened: "Zoo", out: Path, options: _Averages, seed: int, device: str, *, json: bool, quiet: bool
) -> None:
    from vitzoo_hf.apply.soup.epochs import average_epochs
    from vitzoo_hf.apply.soup.rows import soup_row, write_soups

    averages = average_epochs(opened, **options, device=device, progress=not (json or quiet))
    selected = averages.table[averages.table["is_chosen"]].set_index("run_id")
    rows = [
        soup_row(
            opened,
            average,
            name=run_id,
            test_loss=float(selected.loc[run_id, "test_loss"]),
            test_accuracy=float(selected.loc[run_id, "test_accuracy"]),
        )
        for run_id, average in averages.soups.items()
    ]
    write_soups(opened, rows, out)
    _finish(averages.table, out, "epochs.csv", averages.left_out, json=json)
    if json:
        return
    print_table(averages.gains(seed=seed))
    # a run with fewer stored epochs than K has no such average
    names = set(averages.table["average"])
    for k in options.get("last", ()):
        if f"last {k}" not in names:
            print(f"no run has {k} stored epochs beside epoch 0, so there is no average of the last {k}")
    print(
        f"{len(rows)} runs in {out}, each averaged as is best on selection images;"
        " gain: test accuracy minus that of the last epoch"
    )
    if not quiet:
        hint(f"Next: vitzoo evaluate {quote(str(out))}")


def _finish(table: "pandas.DataFrame", out: Path, name: str, left_out: dict[str, str], *, json: bool) -> None:
    """Write the table into the folder of the zoo, and report the groups without a soup."""
    table.to_csv(out / name, index=False)
    if json:
        print_json({"zoo": str(out), "table": table, "left_out": left_out})
        return
    for group, reason in left_out.items():
        print(f"left out: {group}: {reason}")
