"""JSON that a stranger wrote, parsed within limits, and its fields, each checked where it is read."""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from vitzoo_hf.format.messages import REPAIR
from vitzoo_hf.format.schema import ZooError

DEEPEST = 32
"""Largest number of lists and objects inside each other."""
MOST_VALUES = 8_000_000
"""Values of a file: the list of shards of a million rows with a row group each has three million."""
LARGEST_INTEGER = 2**53
"""Integers beyond are not exact in every reader of JSON."""
HEX_SHA256 = re.compile("[0-9a-f]{64}")


def shown(value: object, most: int = 80) -> str:
    """A value as one line of a message, cut to `most` characters.

    >>> shown("a" * 100)[-3:]
    'aa…'
    """
    # before repr: the text of a large number or list would cost more than the message is worth
    if isinstance(value, int) and abs(value) > 10**40:
        return "an integer of more than 40 digits"
    if isinstance(value, list | dict) and len(value) > 20:
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)} values"
    try:
        text = ascii(value[:most] if isinstance(value, str) else value)
    except RecursionError:
        return "values nested too deeply"
    return text if len(text) <= most else f"{text[: most - 1].rstrip(chr(39))}…"


def damaged(file: str, reason: str) -> ZooError:
    """The error for a file that says what no zoo says."""
    return ZooError(f"{file} is damaged: {reason}; {REPAIR}")


def parse_json(data: bytes | str, file: str, *, most_values: int = MOST_VALUES) -> Any:
    """Parse JSON within limits.

    Args:
        data: the content of the file.
        file: name of the file, for messages.
        most_values: largest number of values, which bounds the memory.

    Raises:
        ZooError: for what is no JSON, is nested too deeply, has too many values, a key twice in an object, numbers
            that are not finite, or integers beyond 2^53.
    """
    try:
        text = data.decode("utf-8") if isinstance(data, bytes) else data
    except UnicodeDecodeError as error:
        raise damaged(file, f"byte {error.start} is not UTF-8") from None
    # each value but the first follows one of these: an empty list takes three bytes here, and 56 once parsed
    if sum(text.count(mark) for mark in ",[{") > most_values:
        raise damaged(file, f"it has more than {most_values:,} values")
    try:
        value = json.loads(
            text, object_pairs_hook=_without_repeats, parse_constant=_no_constant, parse_float=_finite_number
        )
    except RecursionError:
        raise damaged(file, f"it has more than {DEEPEST} lists and objects inside each other") from None
    except ValueError as error:
        # also what Python raises for integers of more than 4,300 digits
        raise damaged(file, f"it is no JSON ({' '.join(str(error).split())[:120]})") from None
    _check_tree(value, file)
    return value


def parse_provenance(text: object, row: str) -> dict[str, Any]:
    """Parse the column `provenance` of a row; null is an empty object.

    Raises:
        ZooError: for anything but a JSON object.
    """
    if text is None or text == "":
        return {}
    if not isinstance(text, str):
        raise ZooError(f"provenance of {row} is {shown(text)}; expected a JSON object")
    value = parse_json(text, f"provenance of {row}")
    if not isinstance(value, dict):
        raise ZooError(f"provenance of {row} is {shown(text)}; expected a JSON object")
    return value


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        names = [name for name, _ in pairs]
        # readers differ in which of two values they take
        raise ValueError(f"the key {shown(next(name for name in names if names.count(name) > 1))} is there twice")
    return entries


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is no number of JSON")


def _finite_number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:40]} is too large for a number")
    return number


def _check_tree(root: object, file: str) -> None:
    """Refuse values nested too deeply, large integers, and text that is not Unicode; level by level."""
    level = [root]
    for _ in range(DEEPEST + 1):
        following: list[object] = []
        for value in level:
            if isinstance(value, dict):
                following += value
                following += value.values()
            elif isinstance(value, list):
                following += value
            elif isinstance(value, int) and abs(value) > LARGEST_INTEGER:
                raise damaged(file, f"{shown(value)} is not between -2^53 and 2^53")
            elif isinstance(value, str) and not value.isascii() and not _is_unicode(value):
                raise damaged(file, f"{shown(value)} holds half a surrogate pair, which is no Unicode text")
        if not following:
            return
        level = following
    raise damaged(file, f"it has more than {DEEPEST} lists and objects inside each other")


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@dataclass(frozen=True)
class Field:
    """A value with its place in a file.

    Attributes:
        value: the parsed value.
        file: name of the file, for messages.
        place: path of the field, such as `images.digits.mean`; empty for the whole file.
    """

    value: Any
    file: str
    place: str = ""

    def refused(self, expected: str) -> ZooError:
        """The error for this field."""
        where = f"`{self.place}` is" if self.place else "it holds"
        return damaged(self.file, f"{where} {shown(self.value)}; expected {expected}")

    def entries(self) -> dict[str, "Field"]:
        """The entries of an object.

        Raises:
            ZooError: for anything but an object.
        """
        if not isinstance(self.value, dict):
            raise self.refused("an object")
        return {name: self._inner(name, value) for name, value in self.value.items()}

    def items(self) -> Iterator["Field"]:
        """The values of a list.

        Raises:
            ZooError: for anything but a list.
        """
        if not isinstance(self.value, list):
            raise self.refused("a list")
        return (self._inner(str(number), value) for number, value in enumerate(self.value))

    def get(self, name: str) -> "Field":
        """An entry of an object.

        Raises:
            ZooError: for anything but an object with this entry.
        """
        if not isinstance(self.value, dict):
            raise self.refused("an object")
        if name not in self.value:
            raise damaged(self.file, f"it lacks {(f'{self.place}.' if self.place else '') + name!r}")
        return self._inner(name, self.value[name])

    def integer(self, low: int, high: int = LARGEST_INTEGER) -> int:
        """An integer between two bounds, both included.

        Raises:
            ZooError: for anything else.
        """
        # True is an int in Python
        if type(self.value) is not int or not low <= self.value <= high:
            raise self.refused(f"an integer from {low} to {high}")
        return self.value

    def number(self) -> float:
        """A number.

        Raises:
            ZooError: for anything else.
        """
        if type(self.value) not in (int, float):
            raise self.refused("a number")
        return float(self.value)

    def text(self, pattern: re.Pattern[str] | None = None, expected: str = "text") -> str:
        """Text, all of which matches the pattern.

        Raises:
            ZooError: for anything else.
        """
        if not isinstance(self.value, str) or (pattern is not None and pattern.fullmatch(self.value) is None):
            raise self.refused(expected)
        return self.value

    def sha256(self) -> str:
        """A SHA-256 as 64 hexadecimal digits.

        Raises:
            ZooError: for anything else.
        """
        return self.text(HEX_SHA256, "64 hexadecimal digits")

    def _inner(self, name: str, value: object) -> "Field":
        # names are a stranger's too: no line break may enter a message
        name = name if name.isascii() and name.isprintable() and len(name) <= 80 else shown(name)
        return Field(value, self.file, f"{self.place}.{name}" if self.place else name)
