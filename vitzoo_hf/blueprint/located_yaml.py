"""YAML whose every value knows its line, so that a mistake is reported where it stands."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args

import yaml

from vitzoo_hf.format.messages import did_you_mean
from vitzoo_hf.format.schema import ZooError


@dataclass(frozen=True)
class Located:
    """A value of a YAML file with its place."""

    value: object
    path: Path
    line: int
    key: str

    def error(self, message: str) -> ZooError:
        """An error that names file and line; the caller raises it."""
        return ZooError(f"{self.path.name}, line {self.line}: {message}")

    def __contains__(self, key: str) -> bool:
        return key in self._mapping()

    def get(self, key: str) -> "Located":
        """The value under `key`.

        Raises:
            ZooError: if it is missing.
        """
        mapping = self._mapping()
        if key not in mapping:
            raise self.error(f"{self.key} lacks {key!r}")
        return mapping[key]

    def items(self) -> Iterator[tuple[str, "Located"]]:
        """Keys and values of a mapping."""
        yield from self._mapping().items()

    def only(self, *expected: str) -> None:
        """Refuse keys that are not among `expected`."""
        for key, node in self.items():
            if key not in expected:
                raise node.error(f"unknown key {key!r} in {self.key}: {did_you_mean(key, expected)}")

    @property
    def is_sequence(self) -> bool:
        """Whether the value is a list."""
        return isinstance(self.value, list)

    def sequence(self) -> list["Located"]:
        """The entries of a list."""
        if not isinstance(self.value, list):
            raise self.error(f"{self.key} must be a list")
        return self.value

    def typed(self, kind: Any) -> Any:
        """The value as `kind`: `str`, `int`, `float`, `bool`, or one of these `| None` or `| tuple[kind, ...]`.

        `3e-3` is a number here, although YAML 1.1 reads it as text.
        """
        if isinstance(kind, UnionType):
            kind, *alternatives = get_args(kind)
            if self.value is None and NoneType in alternatives:
                return None
            if isinstance(self.value, list) and tuple[kind, ...] in alternatives:
                return tuple(entry.typed(kind) for entry in self.value)
        value = self.value
        if kind is float:
            # by float(), as YAML 1.1 reads 3e-3 as text; OverflowError comes from whole numbers above 1.8e308
            try:
                number = float(value) if isinstance(value, str | bytes | float) or type(value) is int else math.nan
            except (ValueError, OverflowError):
                number = math.nan
            if math.isfinite(number):
                return number
        # a bool is an int to Python, but `seed: true` is a mistake
        elif isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
            return value
        raise self.error(f"{self.key} is {self.plain()!r}; expected {KINDS[kind]}")

    def plain(self) -> object:
        """The value alone, without its place and the places of everything in it."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        return [node.plain() for node in self.value] if isinstance(self.value, list) else self.value

    def _mapping(self) -> dict[str, "Located"]:
        if not isinstance(self.value, dict):
            raise self.error(f"{self.key} must be a mapping of names to values")
        return self.value


KINDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


def read_text(path: Path) -> str:
    """The text of a YAML file.

    Raises:
        ZooError: if it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ZooError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None


def load_located(path: Path, kind: str = "the blueprint") -> Located:
    """Read a YAML file; messages call it what it should be.

    Raises:
        ZooError: if it cannot be read, is not YAML, or repeats a key.
    """
    return parse_located(read_text(path), path, kind)


def parse_located(text: str, path: Path, kind: str = "the blueprint") -> Located:
    """YAML from a text; messages name the path and what it should be.

    Raises:
        ZooError: if it is not YAML, or repeats a key.
    """
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise ZooError(f"{path.name} is not valid YAML: {' '.join(str(error).split())}") from None
    if node is None:
        raise ZooError(f"{path.name} is empty; expected {kind.replace('the ', 'a ')}")
    # an anchor whose value refers to itself composes to a node without end
    try:
        return _locate(node, path, kind, 1)
    except RecursionError:
        raise ZooError(f"{path.name} is not valid YAML: a value contains itself") from None


def _locate(node: yaml.Node, path: Path, key: str, line: int) -> Located:
    """`line` is that of the key: a block starts below it, after any comments."""
    if isinstance(node, yaml.MappingNode):
        mapping: dict[str, Located] = {}
        for name, value in node.value:
            where = name.start_mark.line + 1
            if not isinstance(name, yaml.ScalarNode):
                raise ZooError(f"{path.name}, line {where}: a key must be a plain name")
            # PyYAML keeps the last of two equal keys without a word
            if name.value in mapping:
                raise ZooError(f"{path.name}, line {where}: {name.value!r} is given twice")
            mapping[name.value] = _locate(value, path, name.value, where)
        return Located(mapping, path, line, key)
    if isinstance(node, yaml.SequenceNode):
        entries = [_locate(entry, path, key, entry.start_mark.line + 1) for entry in node.value]
        return Located(entries, path, line, key)
    try:
        value = yaml.SafeLoader("").construct_object(node, deep=True)
    except (yaml.YAMLError, ValueError):
        raise ZooError(f"{path.name}, line {line}: {node.value!r} is no value that YAML knows") from None
    return Located(value, path, line, key)
