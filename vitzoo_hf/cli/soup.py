"""The verb that averages weights: soups of groups of models, and averages over the epochs of runs."""

from pathlib import Path
from shlex import quote
from typing import Annotated, Any, Literal

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
    table_records,
)
from vitzoo_hf.format.schema import ZooError

SHOWN = ("ingredients", "selection_accuracy", "test_accuracy", "best_single_test", "ensemble_test", "gain")
By = Annotated[
    str | None,
    Parameter(
        name="--by",
        help="COLUMN,COLUMN…: models that agree in all of them make one soup; by default parent_id,head.",
    ),
]
Method = Literal["uniform", "greedy", "learned", "unconstrained", "epochs"]


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
    """Average the weights of models, choose on selection images, report on test images; soups become a zoo.

    Each soup is a row with its ingredients as provenance. Beside it stand the best single model by selection, the
    ensemble of the ingredients, and 95 % intervals over test images; soups.csv or epochs.csv has all columns.

    Args:
        zoo: Folder, dataset id, or `sample`. Soups are of final fine-tuned models where --where names no stage.
        out: Folder for the zoo of soups and the table.
        method: uniform; greedy (Wortsman et al. 2022); learned or unconstrained coefficients; epochs of each run.
        last: Of --method epochs: K,K…, how many of the last kept epochs to average, by default 2,3,5.
        decay: Of --method epochs: of the exponential average, from 0 to below 1, by default 0.5.
        seed: Of learned coefficients and intervals.
        device: cpu or cuda.
        cache: Folder that keeps outputs of models, such as ZOO/.evaluation.
    """
    from vitzoo_hf.apply.made_zoos import check_folder
    from vitzoo_hf.models.rebuild import usable_device

    opened = open_zoo(zoo, where)
    check_folder(out, opened, "soups_of")
    usable_device(device)
    check_least("--seed", seed, 0)
    if method == "epochs":
        if by is not None:
            raise ZooError("--by groups models; --method epochs averages each run by itself: leave --by out")
        _soup_epochs(opened, out, _averages(last, decay), seed, device, json=json, quiet=quiet)
        return
    if last is not None or decay is not None:
        raise ZooError(f"--last and --decay are of epochs: leave them out of --method {method}, or --method epochs")
    conditions = {text.split("=")[0] for text in where or ()}
    finals = opened.filter(is_final=True) if not conditions & {"epoch", "is_final"} else opened
    models = finals if conditions & {"stage", "model_id", "run_id"} else finals.filter(stage="finetune")
    columns = ["parent_id", "head"] if by is None else names_of("--by", by, "parent_id,head")
    _soup_groups(models, out, method, columns, seed, device, cache, json=json, quiet=quiet)


def _soup_groups(
    models: Any,
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

    found = compare_soups(
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
            name=group_text(measured.group).replace(", ", "--"),
            test_loss=measured.test_loss,
            test_accuracy=measured.test_accuracy,
        )
        for measured in found.soups
    ]
    write_soups(models, rows, out)
    _finish(found.table, out, "soups.csv", found.left_out, json=json)
    if json:
        return
    print_table(table_records(found.table[[*columns, *SHOWN]]))
    print(f"{len(rows)} soups in {out}; gain is test accuracy less that of the best single model by selection")
    if not quiet:
        hint(f"Next: vitzoo evaluate {quote(str(out))}")


def _averages(last: str | None, decay: float | None) -> dict[str, Any]:
    """What to average of each run: options of `average_epochs` that differ from its own."""
    chosen: dict[str, Any] = {}
    if last is not None:
        texts = [text.strip() for text in last.split(",")]
        if not all(text.isdecimal() and int(text) >= 2 for text in texts):
            raise ZooError(f"--last {last}: expected K,K…, whole numbers of at least 2, such as 2,3,5")
        chosen["last"] = [int(text) for text in texts]
    if decay is not None:
        if not 0 <= decay < 1:
            raise ZooError(f"--decay {decay:g}: expected a number from 0 to below 1, such as 0.5")
        chosen["decays"] = [decay]
    return chosen


def _soup_epochs(
    opened: Any, out: Path, averages: dict[str, Any], seed: int, device: str, *, json: bool, quiet: bool
) -> None:
    from vitzoo_hf.apply.soup.epochs import average_epochs
    from vitzoo_hf.apply.soup.rows import soup_row, write_soups

    found = average_epochs(opened, **averages, device=device, progress=not (json or quiet))
    chosen = found.table[found.table["is_chosen"]].set_index("run_id")
    rows = [
        soup_row(
            opened,
            average,
            name=run_id,
            test_loss=float(chosen.loc[run_id, "test_loss"]),
            test_accuracy=float(chosen.loc[run_id, "test_accuracy"]),
        )
        for run_id, average in found.soups.items()
    ]
    write_soups(opened, rows, out)
    _finish(found.table, out, "epochs.csv", found.left_out, json=json)
    if json:
        return
    print_table(table_records(found.gains(seed=seed)))
    reached = set(found.table["average"])
    for k in averages.get("last", ()):
        if f"last {k}" not in reached:
            print(f"no run keeps {k} trained epochs, so there is no average of the last {k}")
    print(
        f"{len(rows)} runs in {out}, each as selection images chose; gains are of test accuracy, over the last epoch"
    )
    if not quiet:
        hint(f"Next: vitzoo evaluate {quote(str(out))}")


def _finish(table: Any, out: Path, name: str, left_out: dict[str, str], *, json: bool) -> None:
    """Keep the table beside the zoo, and say what has no soup."""
    table.to_csv(out / name, index=False)
    if json:
        print_json({"zoo": str(out), "table": table_records(table), "left_out": left_out})
        return
    for group, reason in left_out.items():
        print(f"left out: {group}: {reason}")
