"""Figures of the package's shape.

`python tests/measure_house.py` prints them, with `--write` it stores those of `ratchet` in tests/house.json too, and
with `--names` or `--fragments` it lists the places that such a figure counts. A figure is a mirror, not a score: a
better name that a counter dislikes stays, and the file is written again.
"""

import ast
import io
import json
import re
import sys
import tokenize
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from places import REPOSITORY, TESTS

PACKAGE = REPOSITORY / "vitzoo_hf"
STORED = TESTS / "house.json"
ADVICE = "`python tests/measure_house.py --write` stores today's figures"
HIGHER_IS_BETTER = frozenset({"comments per 100 lines"})
"""All other figures of `ratchet` are better the lower they are."""

PARTICIPLES = frozenset(
    [
        "found",
        "held",
        "told",
        "chosen",
        "known",
        "own",
        "kept",
        "each",
        "taken",
        "given",
        "seen",
        "wanted",
        "made",
        "asked",
        "here",
        "there",
        "those",
        "these",
        "such",
        "others",
        "alike",
        "whole",
        "beside",
        "within",
        "across",
        "copied",
        "read",
        "written",
        "begun",
        "ended",
        "tried",
    ]
)
ENTRY = re.compile(r"\s+\w[\w, `*]*(?: \([^)]*\))?: ")
FRAGMENT = re.compile(ENTRY.pattern + r"(?:of|as|that|to|its|likewise|for them|with them)\b")
Function = ast.FunctionDef | ast.AsyncFunctionDef


def sources() -> dict[Path, str]:
    """Return the text of every module of the package."""
    return {path: path.read_text(encoding="utf-8") for path in sorted(PACKAGE.rglob("*.py"))}


def docstring_lines(tree: ast.AST) -> Iterator[tuple[ast.AST, range]]:
    """Yield every documented module, class and function with the lines of its docstring."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | Function) and ast.get_docstring(node, clean=False):
            yield node, range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1)


def lines_of_code(text: str) -> int:
    """Count lines that are neither blank nor a comment nor in a docstring."""
    documented = {number for _, lines in docstring_lines(ast.parse(text)) for number in lines}
    lines = enumerate(text.split("\n"), 1)
    return sum(bool(line.strip()) and line.strip()[0] != "#" and number not in documented for number, line in lines)


def longest_body(text: str) -> int:
    """Count the lines of a module's longest function, without its docstring."""
    tree = ast.parse(text)
    documented = {node: len(lines) for node, lines in docstring_lines(tree)}
    functions = [node for node in ast.walk(tree) if isinstance(node, Function)]
    return max(((node.end_lineno or 0) - node.lineno + 1 - documented.get(node, 0) for node in functions), default=0)


def comments(text: str) -> int:
    """Count the comments of a module."""
    return sum(token.type == tokenize.COMMENT for token in tokenize.generate_tokens(io.StringIO(text).readline))


def assigned_names(text: str) -> list[tuple[int, str]]:
    """Return the line and name of every assignment to a plain name."""
    names = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)]
    return [(name.lineno, name.id) for name in names if isinstance(name.ctx, ast.Store)]


def uses_of_any(text: str) -> int:
    """Count the annotations of a module that say `Any`, its import aside."""
    return sum(isinstance(node, ast.Name) and node.id == "Any" for node in ast.walk(ast.parse(text)))


def entries(text: str) -> list[tuple[int, str]]:
    """Return the line and text of every first line of an entry under Args or Attributes."""
    listed, in_section = [], False
    for number, line in enumerate(text.split("\n"), 1):
        if re.fullmatch(r"\s+(Args|Attributes):\s*", line):
            in_section = True
        elif not line.strip() or line.strip() == '"""':
            in_section = False
        elif in_section and ENTRY.match(line):
            listed.append((number, line))
    return listed


def places_of(kind: str) -> list[str]:
    """Return where the package has names of a participle or pronoun ("names"), or entries that are "fragments"."""
    places = []
    for path, text in sources().items():
        if kind == "names":
            lines = [(number, name) for number, name in assigned_names(text) if name in PARTICIPLES]
        else:
            lines = [(number, line.strip()) for number, line in entries(text) if FRAGMENT.match(line)]
        places += [f"{path.relative_to(REPOSITORY)}:{number} {line}" for number, line in lines]
    return places


def limited() -> dict[str, int]:
    """Return the figures that have a fixed limit."""
    texts = sources()
    with (REPOSITORY / "pyproject.toml").open("rb") as file:
        contracts = tomllib.load(file)["tool"]["importlinter"]["contracts"]
    return {
        "modules in the largest folder": max(Counter(path.parent for path in texts).values()),
        "lines of the longest module": max(text.count("\n") for text in texts.values()),
        "lines of the longest body": max(map(longest_body, texts.values())),
        "import layers": sum(len(contract.get("layers", [])) for contract in contracts),
        "contracts of independence": sum(contract["type"] == "independence" for contract in contracts),
    }


def ratchet() -> dict[str, float]:
    """Return the figures that may only get better than those stored."""
    texts = sources().values()
    lines = sum(text.count("\n") for text in texts)
    names, described = (sum(len(read(text)) for text in texts) for read in (assigned_names, entries))
    return {
        "lines of code": sum(map(lines_of_code, texts)),
        "comments per 100 lines": round(100 * sum(map(comments, texts)) / lines, 2),
        "% of assignments named by a participle": round(100 * len(places_of("names")) / names, 2),
        "% of entries that are fragments": round(100 * len(places_of("fragments")) / described, 2),
        "uses of Any": sum(uses_of_any(text) for text in texts),
        "mappings of str to Any": sum(len(re.findall(r"(?:dict|Mapping)\[str, Any\]", text)) for text in texts),
    }


def worse(figures: dict[str, float], stored: dict[str, float]) -> dict[str, str]:
    """Return the figures that are worse than those stored, with both values.

    Raises:
        KeyError: if one of them lacks a figure that the other has.
    """
    if figures.keys() != stored.keys():
        raise KeyError(f"figures {sorted(figures.keys() ^ stored.keys())} are on one side only: {ADVICE}")
    signs = {name: -1 if name in HIGHER_IS_BETTER else 1 for name in figures}
    return {
        name: f"{value}, stored {stored[name]}"
        for name, value in figures.items()
        if signs[name] * value > signs[name] * stored[name]
    }


def main(arguments: list[str]) -> None:
    """Print the figures, or store them, or list the places of one."""
    if "--write" in arguments:
        STORED.write_text(json.dumps(ratchet(), indent=2) + "\n", encoding="utf-8")
    for kind in ("names", "fragments"):
        if f"--{kind}" in arguments:
            print("\n".join(places_of(kind)))
            return
    for name, value in (limited() | ratchet()).items():
        print(f"{value:>9} {name}")


if __name__ == "__main__":
    main(sys.argv[1:])
