"""Write values as Markdown that shows them exactly: no name can end a table, a block of code or the markup."""

import html
import re
from collections.abc import Iterable, Sequence

# characters of the longest bar
BAR = 24


def one_line(text: object) -> str:
    """Remove line breaks, control characters, and white space at the ends.

    >>> one_line(" a\\n---\\tb ")
    'a --- b'
    """
    return " ".join("".join(part if part.isprintable() else " " for part in str(text)).split())


def plain(text: object) -> str:
    """Escape text, on one line, so that Markdown and HTML show it unchanged.

    >>> plain("<b>*a*|b</b>")
    '&lt;b&gt;\\\\*a\\\\*\\\\|b&lt;/b&gt;'
    """
    # HTML before Markdown: the escapes of HTML contain no character that Markdown escapes
    escaped = html.escape(one_line(text), quote=False)
    return re.sub(r"([\\`*_\[\]#|~$!{}])", r"\\\1", escaped)


def code(text: object) -> str:
    """Write text as inline code on one line, also for a cell of a table.

    >>> code("a|b")
    '`a\\\\|b`'
    """
    line = one_line(text).replace("|", "\\|")
    # CommonMark: a code span ends at a run of backticks of its own length, so none inside may match
    fence = "`" * (_longest_run(line) + 1)
    # CommonMark strips one space at each end, which sets a backtick there off the fence
    padding = " " if line.startswith("`") or line.endswith("`") or not line else ""
    return f"{fence}{padding}{line}{padding}{fence}"


def block(text: str, language: str) -> str:
    """Write lines as a block of code, with a fence longer than any in the lines."""
    fence = "`" * max(3, _longest_run(text) + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)


def shown(value: object) -> str:
    """Write a value of a column or setting.

    >>> shown(None), shown(0.0001), shown(True)
    ('none', '`0.0001`', '`true`')
    """
    if value is None or value != value:  # NaN is the one value that differs from itself
        return "none"
    return code(str(value).lower() if isinstance(value, bool) else value)


def number(value: int) -> str:
    """Write a count with commas between thousands.

    >>> number(22050664)
    '22,050,664'
    """
    return f"{value:,}"


def size(count: int) -> str:
    """Write a number of bytes in a readable unit.

    >>> size(901640)
    '902 kB'
    """
    scaled = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        # from 999.5 on, three digits would round to 1e+03
        if scaled < 999.5:
            return f"{scaled:.3g} {unit}"
        scaled /= 1000
    return f"{scaled:,.3g} TB"


def listing(values: Iterable[str]) -> str:
    """Join values with commas."""
    return ", ".join(values)


def bar(count: int, largest: int) -> str:
    """Draw a horizontal bar; any count above zero is visible.

    >>> bar(6, 24), bar(0, 24)
    ('██████', '')
    """
    # rounded up, so that one model among thousands is still drawn
    return "█" * -(-BAR * count // max(1, largest))


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Write a table.

    >>> print(table(["a", "b"], [["1", "2"]]))
    | a | b |
    |---|---|
    | 1 | 2 |
    """
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("|" + "|".join(line) + "|" if line[0] == "---" else f"| {' | '.join(line)} |" for line in lines)
