"""What the verbs of the command line share: options, and how a zoo is named."""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from vitzoo_hf.schema import ZooError

if TYPE_CHECKING:
    from vitzoo_hf.zoo import Zoo

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
    from vitzoo_hf.row_tables import parse_condition
    from vitzoo_hf.zoo import Zoo

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
    from vitzoo_hf.zoo import SAMPLE

    return str(SAMPLE) if name == "sample" and not Path(name).exists() else name


def make_folder(out: Path) -> None:
    """Make the folder that a verb is to fill, before it computes anything.

    Raises:
        ZooError: if it cannot be made or written into.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise ZooError(f"--out: cannot write into {out}: {error.strerror}; give another folder") from None


def table_records(table: Any) -> list[dict[str, Any]]:
    """Rows of a data frame, with None for every missing value."""
    from vitzoo_hf.row_tables import records

    return records(table)
