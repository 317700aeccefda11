"""Open a zoo that lost its JSON files, as `Dataset.push_to_hub` leaves it, with what is left.

The index is read from the config `index`, or from the light columns of `weights`; layouts from the metadata of the
files of weights, or from the architectures of the rows. What cannot be made again is said in one warning.
"""

import json
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vitzoo_hf.format import schema
from vitzoo_hf.format.files import FolderFiles, HubFiles
from vitzoo_hf.format.gate.paths import PATH
from vitzoo_hf.format.hub_errors import hub_failure, retried
from vitzoo_hf.format.layout import Layout
from vitzoo_hf.format.manifest import OpenedZoo, open_files, open_zoo, parse_layouts
from vitzoo_hf.format.messages import one_line
from vitzoo_hf.format.row import Row
from vitzoo_hf.format.schema import MissingFileError, ZooError
from vitzoo_hf.format.tables import joined
from vitzoo_hf.models.architecture import Architecture

PARQUET = re.compile(r"([a-z]+)/([a-z]+)-\d{5,9}-of-\d{5,9}\.parquet", re.ASCII)
CONFIGS = (*schema.CONFIGS, "data")
"""Folders of a copy; the config `default` of `push_to_hub` lies in `data`."""
KINDS = {"string": "string", "double": "float", "int64": "int", "bool": "bool"}
"""Arrow type of a factor's column -> type of the factor."""


def open_any(path: str | Path, revision: str | None = None) -> OpenedZoo:
    """Open a zoo, or what `Dataset.push_to_hub` left of one.

    Args:
        path: a folder, or a dataset id.
        revision: branch, tag or commit of a dataset.

    Raises:
        ZooError: if there is no zoo, or its files say what no zoo says.
    """
    try:
        return open_zoo(path, revision)
    except MissingFileError as error:
        files, sizes = _listed(open_files(path, revision))
        # a zoo whose other JSON files are gone is damaged, not a copy
        if schema.MANIFEST in sizes:
            raise
        names = [name for name in sizes if (match := PARQUET.fullmatch(name)) and match[1] in CONFIGS]
        parts = {config: _in_order(name for name in names if name.startswith(f"{config}/")) for config in CONFIGS}
        # one file tells what the others hold: a footer of the Hub costs the whole file
        holds_weights = bool(parts["data"]) and "weights" in _columns(files, parts["data"][0])
        shards = parts["weights"] or (parts["data"] if holds_weights else [])
        light = parts["index"] or (parts["data"] if not holds_weights else [])
        if not (light or shards) or "model_id" not in _columns(files, (light or shards)[0]):
            raise error from None
    return _rebuilt(files, sizes, shards, light, names)


def _rebuilt(
    files: FolderFiles | HubFiles, sizes: Mapping[str, int], shards: list[str], light: list[str], names: list[str]
) -> OpenedZoo:
    rows = joined([_rows(files, name) for name in light or shards], f"the index of {files.name}")
    manifest: dict[str, Any] = {
        "format": schema.FORMAT_VERSION,
        "name": files.name.rstrip("/").split("/")[-1],
        "blueprint_fingerprint": None,
        "factors": _factors(rows, files.name),
        "images": {},
        "missing_runs": {},
        "files": {name: {"bytes": sizes[name]} for name in names if name not in shards},
    }
    # readers take the splits of a zoo from the names of its index
    manifest["files"] |= {f"index/{Path(name).name}": {"bytes": sizes[name]} for name in light or shards}
    missing = [
        "hashes of files",
        "how images are prepared (so no probes), the blueprint and its splits",
        *([] if shards else ["weights"]),
    ]
    layouts, made = _layouts(files, shards, rows)
    missing += ["layouts, which were made again from architectures"] if made else []
    entries = {name: {"bytes": sizes[name], "sha256": ""} for name in shards}
    opened = OpenedZoo(files, manifest, layouts, entries, rows)
    warnings.warn(f"{files.name} has no {schema.MANIFEST} and opens without {'; '.join(missing)}", stacklevel=4)
    return opened


def _listed(files: FolderFiles | HubFiles) -> tuple[FolderFiles | HubFiles, dict[str, int]]:
    """The files pinned to a commit, and the path and size of each."""
    if isinstance(files, FolderFiles):
        paths = [file for file in files.folder.glob("*/*.parquet") if file.is_file()]
        paths += [file for file in [files.folder / schema.MANIFEST] if file.is_file()]
        sizes = {file.relative_to(files.folder).as_posix(): file.stat().st_size for file in paths}
        return files, {name: size for name, size in sizes.items() if PATH.fullmatch(name)}
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    try:
        api = HfApi()
        commit = retried(lambda: api.dataset_info(files.repository, revision=files.revision)).sha
        entries = retried(
            lambda: list(api.list_repo_tree(files.repository, repo_type="dataset", recursive=True, revision=commit))
        )
    except Exception as error:
        raise hub_failure(error, f"cannot list {files.repository!r}", files.revision) from None
    held = {entry.path: entry.size for entry in entries if isinstance(entry, RepoFile)}
    return HubFiles(files.repository, commit, pinned=True), {
        name: size for name, size in held.items() if PATH.fullmatch(name)
    }


def _columns(files: FolderFiles | HubFiles, name: str) -> list[str]:
    return list(_metadata(files, name).schema.to_arrow_schema().names)


def _metadata(files: FolderFiles | HubFiles, name: str) -> pq.FileMetaData:
    try:
        return pq.read_metadata(files.path(name))
    except (OSError, pa.ArrowException) as error:
        raise ZooError(f"{name} of {files.name} cannot be read ({one_line(error)})") from None


def _in_order(names: Iterable[str]) -> list[str]:
    """Files of the splits of a zoo, split by split, in the order of their numbers."""
    split = {name: name.split("/")[1].split("-")[0] for name in names}
    return sorted(
        (name for name in split if split[name] in schema.SPLITS),
        key=lambda name: (schema.SPLITS.index(split[name]), name),
    )


def _rows(files: FolderFiles | HubFiles, name: str) -> pa.Table:
    try:
        columns = [column for column in _columns(files, name) if column not in ("weights", "split")]
        table = pq.read_table(files.path(name), columns=columns)
    except (OSError, pa.ArrowException) as error:
        raise ZooError(f"{name} of {files.name} cannot be read ({one_line(error)})") from None
    split = name.split("/")[1].split("-")[0]
    return table.append_column("split", pa.array([split] * table.num_rows))


def _factors(rows: pa.Table, name: str) -> dict[str, str]:
    factors = {}
    for field in rows.schema:
        if field.name.startswith("factor_"):
            if str(field.type) not in KINDS:
                raise ZooError(
                    f"{name}: column {field.name!r} is of type {one_line(ValueError(field.type))}, no factor"
                )
            factors[field.name.removeprefix("factor_")] = KINDS[str(field.type)]
    return factors


def _layouts(files: FolderFiles | HubFiles, shards: list[str], rows: pa.Table) -> tuple[dict[str, Layout], bool]:
    """Layouts of all rows, and whether some were made from architectures."""
    layouts: dict[str, Layout] = {}
    # on the Hub, a footer would cost a download of its whole file
    for name in shards if not files.is_remote else ():
        stored = (_metadata(files, name).metadata or {}).get(b"vitzoo.layouts")
        if stored is not None:
            layouts |= parse_layouts(stored, f"vitzoo.layouts of {name} of {files.name}")
    columns = ["layout", "architecture", "architecture_args", "head", "head_hidden", "num_parameters"]
    if lacking := [name for name in columns if name not in rows.column_names]:
        raise ZooError(f"{files.name} has no zoo.json, and its rows have no column {lacking[0]!r}: it is no zoo")
    made = False
    for row in rows.select(columns).group_by(columns, use_threads=False).aggregate([]).to_pylist():
        if row["layout"] in layouts:
            continue
        layout, made = Architecture.of(Row(row)).layout, True
        if layout.fingerprint != row["layout"]:
            raise ZooError(
                f"{files.name}: the architecture of rows of layout {json.dumps(row['layout'])[:80]} gives layout"
                f" {layout.fingerprint}: one of the two columns is not of these rows"
            )
        layouts[layout.fingerprint] = layout
    return layouts, made
