"""The YAML header of a card, and the root hash in it, which covers `zoo.json` and with it every other file."""

import re
from typing import Any

import yaml

from vitzoo_hf.format.gate.values import damaged

ROOT_HASH = "zoo_json_sha256"
"""Entry of the card's header: the SHA-256 of `zoo.json`, which lists the hashes of all other files."""
HEADER = re.compile(rb"---[ \t]*\r?\n(.*?)\r?\n---", re.DOTALL)
LARGEST_HEADER = 1_000_000
DEEPEST = 32
NESTED_BLOCKS = re.compile(rb"(?:[-?:][ \t]+){%d}" % DEEPEST)
"""Marks of blocks inside blocks on one line."""


def card_header(card: bytes, file: str) -> dict[str, Any]:
    """Parse the header of a card; empty where the card has none.

    Args:
        card: content of the file.
        file: name of the card, for messages.

    Raises:
        ZooError: if the header is no YAML object, is too large, or uses aliases.
    """
    match = HEADER.match(card)
    if match is None:
        return {}
    if len(match[1]) > LARGEST_HEADER:
        raise damaged(file, f"its header has {len(match[1])} bytes; expected at most {LARGEST_HEADER}")
    # the parser takes time in the square of the depth: 50,000 brackets took minutes
    if _depth(match[1]) > DEEPEST or NESTED_BLOCKS.search(match[1]):
        raise damaged(file, f"its header has more than {DEEPEST} lists and objects inside each other")
    try:
        has_alias = any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(match[1], yaml.SafeLoader))
        header = None if has_alias else yaml.safe_load(match[1])
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise damaged(file, f"its header is no YAML ({' '.join(str(error).split())[:120]})") from None
    # an alias repeats what it names: a few lines can stand for gigabytes
    if has_alias:
        raise damaged(file, "its header uses a YAML alias; expected plain values")
    if not isinstance(header, dict):
        raise damaged(file, "its header is no YAML object")
    return header


def _depth(header: bytes) -> int:
    """Largest number of brackets that are open at once."""
    opened = deepest = 0
    for bracket in re.findall(rb"[\[\]{}]", header):
        opened += 1 if bracket in b"[{" else -1
        deepest = max(deepest, opened)
    return deepest


def with_root_hash(card: str, sha256: str) -> str:
    """The card with another root hash in its header; a card without one stays as it is.

    >>> with_root_hash("---\\nzoo_json_sha256: 12\\n---\\n", "34")
    '---\\nzoo_json_sha256: 34\\n---\\n'
    """
    return re.sub(rf"^{ROOT_HASH}: .*$", f"{ROOT_HASH}: {sha256}", card, count=1, flags=re.MULTILINE)
