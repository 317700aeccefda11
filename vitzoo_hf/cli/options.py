"""Options that verbs share, and the output of verbs: tables, JSON, sizes, durations, hints."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from vitzoo_hf.format.schema import ZooError

if TYPE_CHECKING:
    import pandas

    from vitzoo_hf.zoo.zoo import Zoo


def print_json(value: object) -> None:
    """Print one JSON value; a data frame inside it becomes a list of records."""
    # names of models and factors may hold any script: they stay readable
    print(json.dumps(value, indent=1, ensure_ascii=False, default=_records))


def _records(table: object) -> list[dict[str, object]]:
    import pandas

    from vitzoo_hf.format.tables import records

    if not isinstance(table, pandas.DataFrame):
        raise TypeError(f"cannot print a {type(table).__name__}: expected a data frame or a JSON value")
    return records(table)


def print_table(table: "Sequence[Mapping[str, object]] | pandas.DataFrame") -> None:
    """Print records, or the rows of a data frame, as aligned columns."""
    rows = table if isinstance(table, Sequence) else _records(table)
    if not rows:
        print("no rows")
        return
    cells = [[cell(value) for value in row.values()] for row in rows]
    # the header counts too: values may be shorter than their column's name
    widths = [max(map(len, column)) for column in zip(list(rows[0]), *cells, strict=True)]
    # trailing spaces are cut: they would wrap in a narrow terminal
    for line in [list(rows[0]), *cells]:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())


def cell(value: object) -> str:
    """Format a value for a cell of a printed table."""
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def join(value: object) -> str:
    """Format a value, or the values of a list joined by commas."""
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def format_bytes(count: int | float) -> str:
    """Format a number of bytes in a readable unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"


def format_duration(seconds: int | float) -> str:
    """Format a duration in a readable unit."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"


def say_without_statistics(zoo: Path) -> None:
    """Print which columns the Hub's viewer will show no statistics of."""
    from vitzoo_hf.publish.viewer import columns_without_statistics

    print(*(f"note: {sentence}\n" for sentence in columns_without_statistics(zoo)), sep="", end="")


def hint(text: str) -> None:
    """Print a suggestion for the next step after an empty line."""
    print(f"\n{text}")


Json = Annotated[bool, Parameter(name="--json", negative=(), help="Print one JSON value, and nothing else.")]
Quiet = Annotated[bool, Parameter(name="--quiet", negative=(), help="Print no progress bars and no hints.")]
Where = Annotated[
    list[str] | None,
    Parameter(
        name="--where",
        negative=(),
        help="Select rows by COLUMN=VALUE, COLUMN=A,B (any of them) or COLUMN=LOW..HIGH. Repeat the option to "
        "combine conditions: a row must meet all of them.",
    ),
]
Revision = Annotated[str | None, Parameter(help="Branch, tag or commit of a dataset on the Hub.")]
Ray = Annotated[
    bool | str,
    Parameter(name="--ray", negative=(), help="Train on a Ray cluster at this address, auto or local (the default)."),
]
Workers = Annotated[int | None, Parameter(help="Number of training processes; by default one per CPU core.")]


def open_zoo(name: str, where: Sequence[str] | None, *, revision: str | None = None) -> "Zoo":
    """Open a zoo by its folder, dataset id or `sample`, restricted to rows that meet all conditions of `where`."""
    from vitzoo_hf.format.tables import parse_condition
    from vitzoo_hf.zoo.zoo import Zoo

    zoo = Zoo.sample() if name == "sample" else Zoo(name, revision=revision)
    # types of the columns decide whether `1` is a number or text
    conditions = dict(parse_condition(text, zoo.column_types) for text in where or ())
    return zoo.filter(**conditions) if conditions else zoo


def check_least(option: str, value: int, least: int) -> None:
    """Refuse a number that is too small.

    Raises:
        ZooError: with the option, the number, and the least number that is allowed.
    """
    if value < least:
        raise ZooError(f"{option} {value}: expected a whole number of at least {least}")


def names_of(option: str, text: str, such_as: str) -> list[str]:
    """Split a list of names at its commas, and strip spaces around each name.

    Raises:
        ZooError: if one of them is empty.
    """
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise ZooError(f"{option} {text!r} has an empty name: expected NAME,NAME…, such as {such_as}")
    return names


def folder_of(name: str) -> str:
    """Replace the name `sample` by the folder of the sample zoo; any other name stays as it is."""
    from vitzoo_hf.zoo.zoo import SAMPLE

    # a folder of this name on disk wins
    return str(SAMPLE) if name == "sample" and not Path(name).exists() else name


@contextmanager
def writing_into(folder: Path) -> Iterator[None]:
    """Report a failure to write a file as an error that names the folder.

    Raises:
        ZooError: if the block raises an OSError.
    """
    try:
        yield
    except OSError as error:
        raise ZooError(f"cannot write into {folder}: {error.strerror}") from None
