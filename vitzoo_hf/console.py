"""What the command line prints: tables, JSON, sizes, durations, hints."""

import json
from collections.abc import Mapping, Sequence
from typing import Any


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


def counted(count: int, one: str, many: str) -> str:
    """A number of things in words.

    >>> counted(1, "tree", "trees"), counted(2, "tree", "trees")
    ('1 tree', '2 trees')
    """
    return f"{count} {one if count == 1 else many}"


def hint(text: str) -> None:
    """Print what to do next, set off by an empty line."""
    print(f"\n{text}")
