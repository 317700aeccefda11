"""Values -> Markdown that shows exactly them: no name can end a table, a block of code or a page's markup."""

import html
import re
from collections.abc import Iterable, Sequence
from typing import Any

BAR = 24


def one_line(text: object) -> str:
    """Text without line breaks, control characters or white space at its ends.

    >>> one_line(" a\\n---\\tb ")
    'a --- b'
    """
    return " ".join("".join(part if part.isprintable() else " " for part in str(text)).split())


def plain(text: object) -> str:
    """Text of one line that Markdown and HTML leave as it is.

    >>> plain("<b>*a*|b</b>")
    '&lt;b&gt;\\\\*a\\\\*\\\\|b&lt;/b&gt;'
    """
    escaped = html.escape(one_line(text), quote=False)
    return re.sub(r"([\\`*_\[\]#|~$!{}])", r"\\\1", escaped)


def code(text: object) -> str:
    """Text of one line as code, also inside a table.

    >>> code("a|b")
    '`a\\\\|b`'
    """
    line = one_line(text).replace("|", "\\|")
    fence = "`" * (_longest_run(line) + 1)
    padding = " " if line.startswith("`") or line.endswith("`") or not line else ""
    return f"{fence}{padding}{line}{padding}{fence}"


def block(text: str, language: str) -> str:
    """Lines as a block of code, with a fence longer than any in them."""
    fence = "`" * max(3, _longest_run(text) + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)


def shown(value: Any) -> str:
    """A value of a column or setting.

    >>> shown(None), shown(0.0001), shown(True)
    ('none', '`0.0001`', '`true`')
    """
    if value is None or value != value:
        return "none"
    return code(str(value).lower() if isinstance(value, bool) else value)


def number(value: int) -> str:
    """A count with its thousands apart.

    >>> number(22050664)
    '22,050,664'
    """
    return f"{value:,}"


def size(count: int) -> str:
    """A number of bytes in a readable unit.

    >>> size(901640)
    '902 kB'
    """
    scaled = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if scaled < 999.5:
            return f"{scaled:.3g} {unit}"
        scaled /= 1000
    return f"{scaled:,.3g} TB"


def listing(values: Iterable[str]) -> str:
    """Values with commas between them."""
    return ", ".join(values)


def bar(count: int, largest: int) -> str:
    """A horizontal bar; anything above zero shows.

    >>> bar(6, 24), bar(0, 24)
    ('██████', '')
    """
    return "█" * -(-BAR * count // max(1, largest))


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table.

    >>> print(table(["a", "b"], [["1", "2"]]))
    | a | b |
    |---|---|
    | 1 | 2 |
    """
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("|" + "|".join(line) + "|" if line[0] == "---" else f"| {' | '.join(line)} |" for line in lines)
