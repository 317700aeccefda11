"""What the verbs of the command line share: options, and how a zoo is named.

What the command line prints: tables, JSON, sizes, durations, hints.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from vitzoo_hf.format.schema import ZooError

if TYPE_CHECKING:
    from vitzoo_hf.zoo.zoo import Zoo


def print_json(value: Any) -> None:
    """Print one JSON value."""
    print(json.dumps(value, indent=1, ensure_ascii=False))


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows as aligned columns."""
    if not rows:
        print("no rows")
        return
    cells = [[cell(value) for value in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(list(rows[0]), *cells, strict=True)]
    for line in [list(rows[0]), *cells]:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())


def cell(value: Any) -> str:
    """A value as a table shows it."""
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def join(value: Any) -> str:
    """A value, or the values of a list, as text."""
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def format_bytes(count: int | float) -> str:
    """A number of bytes in a readable unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"


def format_duration(seconds: int | float) -> str:
    """Seconds in a readable unit."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"


def hint(text: str) -> None:
    """Print what to do next, set off by an empty line."""
    print(f"\n{text}")


Json = Annotated[bool, Parameter(name="--json", negative=(), help="Print one JSON value, and nothing else.")]
Quiet = Annotated[bool, Parameter(name="--quiet", negative=(), help="No progress bars and no hints.")]
Where = Annotated[
    list[str] | None,
    Parameter(
        name="--where",
        negative=(),
        help="COLUMN=VALUE, COLUMN=A,B (any of them) or COLUMN=LOW..HIGH; repeat it to narrow down.",
    ),
]
Revision = Annotated[str | None, Parameter(help="Branch, tag or commit of a dataset on the Hub.")]
Ray = Annotated[
    bool | str,
    Parameter(name="--ray", negative=(), help="Train on a Ray cluster at this address, auto or local (the default)."),
]
Workers = Annotated[int | None, Parameter(help="Training processes; one a core by default.")]


def open_zoo(name: str, where: Sequence[str] | None, *, revision: str | None = None) -> "Zoo":
    """The zoo of this name, a folder, a dataset id or `sample`, with the rows that meet all conditions."""
    from vitzoo_hf.format.tables import parse_condition
    from vitzoo_hf.zoo.zoo import Zoo

    zoo = Zoo.sample() if name == "sample" else Zoo(name, revision=revision)
    conditions = dict(parse_condition(text, zoo.column_types) for text in where or ())
    return zoo.filter(**conditions) if conditions else zoo


def check_least(option: str, value: int, least: int) -> None:
    """Refuse a number that is too small.

    Raises:
        ZooError: with the option, the number, and what was expected.
    """
    if value < least:
        raise ZooError(f"{option} {value}: expected a whole number of at least {least}")


def names_of(option: str, text: str, such_as: str) -> list[str]:
    """Names joined by commas, spaces around them left out.

    Raises:
        ZooError: if one of them is empty.
    """
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise ZooError(f"{option} {text!r} has an empty name: expected NAME,NAME…, such as {such_as}")
    return names


def folder_of(name: str) -> str:
    """What a verb that reads files is to open: the folder of the sample for `sample`, else what was given."""
    from vitzoo_hf.zoo.zoo import SAMPLE

    return str(SAMPLE) if name == "sample" and not Path(name).exists() else name


def table_records(table: Any) -> list[dict[str, Any]]:
    """Rows of a data frame, with None for every missing value."""
    from vitzoo_hf.format.tables import records

    return records(table)
