"""A zoo as a stranger could write it: one field changed, and every hash made to agree, as a stranger would."""

import hashlib
import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vitzoo_hf.convert.export import export_subset, export_zoo
from vitzoo_hf.evaluation.evaluate import is_classifier
from vitzoo_hf.format import schema
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.publish.folder import write_config
from vitzoo_hf.publish.push_contents import read_contents
from vitzoo_hf.zoo import Zoo
from vitzoo_hf.zoo.verify import verify

RAW = {
    "deep": "[" * 100_000 + "]" * 100_000,
    "nan": "NaN",
    "inf": "1e999",
    "digits": "9" * 5_000,
    "huge": str(2**70),
    "twice": '{"a": 1, "a": 2}',
    "half": '"\\ud800"',
    "nothing": "",
}
"""Texts that `json.dumps` does not write."""
VALUES: list[Any] = [
    *(None, True, False, -1, 0, 1, 1.5, -1e308, 2**31, 2**40, 2**53, 2**63),
    *("", "x", "1", "../victim", "/etc/passwd", "a\nb", "C:\\x", ".git/config", "a" * 10_000, "\u2028", "\x00"),
    *([], {}, [1], [[1, 2]], [None], ["../x"], {"": 1}, {"a": {"b": []}}, [2**40, 2**40], [0] * 10_000),
    *(f"@@{name}@@" for name in RAW),
]


def places(value: Any, place: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Every field of a JSON value, the whole first."""
    yield place
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, entry in inner:
        yield from places(entry, (*place, name))


def changed(value: Any, place: tuple[str | int, ...], change: Callable[[Any, str | int], None], new: Any) -> Any:
    """A copy of a JSON value with one field changed."""
    if not place:
        return new
    value = json.loads(json.dumps(value))
    parent = value
    for name in place[:-1]:
        parent = parent[name]
    change(parent, place[-1])
    return value


def json_with(value: Any) -> str:
    """JSON in which the names of `RAW` stand for its texts."""
    text = json.dumps(value)
    for name, raw in RAW.items():
        text = text.replace(f'"@@{name}@@"', raw)
    return text


def agree(folder: Path) -> None:
    """Make size and hash of every listed file those of the files, and the card's hash that of `zoo.json`."""
    manifest = json.loads((folder / "zoo.json").read_text())
    for name, entry in manifest["files"].items():
        data = (folder / name).read_bytes()
        entry |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "zoo.json").write_text(json.dumps(manifest))
    agree_root(folder)


def agree_root(folder: Path) -> None:
    """Make the hash in the card's header that of `zoo.json`."""
    card = (folder / "README.md").read_text()
    root = hashlib.sha256((folder / "zoo.json").read_bytes()).hexdigest()
    lines = [f"zoo_json_sha256: {root}" if line.startswith("zoo_json") else line for line in card.split("\n")]
    (folder / "README.md").write_text("\n".join(lines))


def change_column(file: Path, column: str, values: Callable[[pa.ChunkedArray], pa.Array | None]) -> None:
    """Replace a column of a Parquet file, or drop it."""
    table = pq.read_table(file)
    number, array = table.column_names.index(column), values(table[column])
    if array is None:
        changed_table = table.drop_columns([column])
    else:
        changed_table = table.set_column(number, pa.field(column, array.type), array)
    pq.write_table(changed_table, file)


def use(folder: Path, out: Path) -> None:
    """All that readers and writers do with a zoo."""
    verify(folder, progress=False)
    read_contents(folder, "ORG/NAME")
    zoo = Zoo(folder)
    for row in zoo.rows():
        assert row.weights.dtype == "float32"
        is_classifier(row, zoo.manifest)
    zoo.model(zoo.model_ids[0])
    next(iter(zoo.stream(batch_size=2)))
    repr(zoo)
    for config in zoo.configs[1:]:
        zoo.to_pandas(config)
    for dataset in sorted(set(zoo.index["dataset"])):
        zoo.probes(dataset)
    export_zoo(zoo.filter(model_id=zoo.model_ids[:2]), out / "exports", progress=False)
    export_subset(zoo.filter(model_id=zoo.model_ids[:1]), out / "subset")
    features = schema.evaluation_features(zoo.manifest["factors"])
    write_config(folder, "evaluations", {"train": []}, features)


@contextmanager
def at_most(more_bytes: int) -> Iterator[None]:
    """Let this process take no more than so many bytes of address space above what it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGE_SIZE") + more_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def tree(folder: Path) -> dict[str, bytes]:
    """Path -> content of every file."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def refusal_of(work: Path) -> str | None:
    """Use the zoo `work / "zoo"`: the one line by which it is refused, or None. Nothing outside may change."""
    victim = {"victim": b"mine", "victim.safetensors": b"mine"}
    outside = work / "outside"
    shutil.rmtree(outside, ignore_errors=True)
    outside.mkdir()
    for name, content in victim.items():
        (outside / name).write_bytes(content)
    out = outside / "out"
    message = None
    try:
        with at_most(1_000_000_000):
            use(work / "zoo", out)
    except ZooError as error:
        message = str(error)
    written = {name for name in tree(outside) if not name.startswith(("out/exports/", "out/subset/"))}
    # the lock of the writer of `subset` stays beside it
    assert written - {"out/.subset.lock"} == victim.keys()
    assert {name: tree(outside)[name] for name in victim} == victim
    return message
