"""Write networks that were made from rows of a zoo, such as averages or reconstructions, as a zoo of their own.

A zoo that is made from another replaces only an earlier zoo of its kind.
"""

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from vitzoo_hf.format import schema
from vitzoo_hf.format.row import Row
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.publish.folder import Rows, refuse_to_replace, write_zoo
from vitzoo_hf.zoo import Zoo

KINDS = {
    "soups_of": "soups",
    "rebasin_of": "models aligned by re-basin",
    "reconstructions_of": "reconstructions",
    "samples_of": "samples",
}
"""Key in the manifest of a made zoo -> its content in words."""


def made_manifest(zoo: Zoo, kind: str) -> dict[str, object]:
    """The manifest of a zoo made from another: without files, and with the fingerprint of its source under `kind`."""
    # these describe the files of the source, which the new zoo does not have
    outdated = {"files", "subset_of", *KINDS}
    manifest = {name: value for name, value in zoo.manifest.items() if name not in outdated}
    return manifest | {kind: zoo.manifest["blueprint_fingerprint"], "blueprint_fingerprint": None}


def check_folder(folder: Path, zoo: Zoo, kind: str) -> None:
    """Refuse a folder for a made zoo before anything is computed.

    Args:
        folder: the folder to be written.
        zoo: the source of the made zoo.
        kind: one of `KINDS`.

    Raises:
        ZooError: if `folder` is that of `zoo`, holds something else than a zoo of this kind, or cannot be written.
    """
    # resolved, because a link or a relative path may name the folder of the source
    if folder.resolve() == Path(zoo.name).resolve():
        raise ZooError(f"{folder} is the zoo that is read, and would be replaced: give another folder for the output")
    refuse_to_replace(folder)
    manifest = folder / schema.MANIFEST
    if manifest.is_file() and kind not in _keys(manifest):
        raise ZooError(
            f"{folder} holds a zoo that is not of {KINDS[kind]}, and would be replaced: give another folder, or"
            " remove it yourself"
        )
    check_writable(folder)


def check_writable(path: Path) -> None:
    """Refuse a file or folder that could not be created.

    Raises:
        ZooError: if its closest existing parent is not a folder, or is not writable.
    """
    # A temporary file is tried, because permission bits say nothing of read-only mounts or network shares.
    above = next(parent for parent in path.absolute().parents if parent.exists())
    try:
        tempfile.TemporaryFile(dir=above).close()
    except OSError as error:
        raise ZooError(f"cannot write {path}: {above}: {error.strerror}; give another place") from None


def check_file(path: Path) -> None:
    """Refuse a file that could not be written.

    Raises:
        ZooError: if it is a folder, or its closest existing parent is not writable.
    """
    if path.is_dir():
        raise ZooError(f"cannot write {path}: it is a folder; give the name of a file")
    check_writable(path)


def _keys(manifest: Path) -> set[str]:
    try:
        return set(json.loads(manifest.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        # a manifest that cannot be read has no kind, so the folder is refused, never replaced
        return set()


# Columns beside the factors that a made row takes over where all of its sources agree.
SHARED = ("parent_id", "stage", "dataset", "architecture", "architecture_args", "head", "head_hidden", "layout")


def derived_row(
    zoo: Zoo,
    sources: Sequence[Mapping[str, object]],
    run_id: str,
    weights: Float[Tensor, " D"],
    provenance: Mapping[str, object],
    *,
    is_final: bool = True,
    test_loss: float | None = None,
    test_accuracy: float | None = None,
) -> Row:
    """A network as a row with the columns of the zoo that its sources are from, and its split.

    Columns in which all sources agree, such as the parent or a factor, keep their value. Other columns are null, and
    so are results on training images. `epoch` is the latest among the sources.

    Args:
        zoo: the zoo of the sources.
        sources: records of the index, with `split`.
        run_id: id of the new row; other characters than letters, digits and `._=+-` are replaced.
        weights: weights of the network.
        provenance: how the network was made; the zoo and the versions are added.
        is_final: value of the column `is_final`.
        test_loss: cross-entropy on test images, measured by the caller.
        test_accuracy: accuracy on test images, measured by the caller.
    """
    run_id = schema.safe_id(run_id, ".")
    epoch = max(Row(source).epoch for source in sources)
    vector = weights.cpu().numpy()
    results = dict.fromkeys(schema.RESULTS) | {"test_loss": test_loss, "test_accuracy": test_accuracy}
    record = dict(provenance) | {
        "zoo": {"name": zoo.manifest["name"], "blueprint_fingerprint": zoo.manifest["blueprint_fingerprint"]},
        "versions": {"vitzoo_hf": schema.VERSION, "torch": torch.__version__},
    }
    row = {"model_id": schema.model_id(run_id, epoch), "run_id": run_id, "epoch": epoch, "is_final": is_final}
    row |= {column: _shared(sources, column) for column in (*SHARED, *zoo.factors)}
    row |= results | {"num_parameters": len(vector), "weights_sha256": schema.weights_sha256(vector)}
    row |= {"dtype": "float32", "provenance": schema.canonical_json(record), "weights": vector}
    # the order of columns is part of the schema of the written files
    order = [*schema.row_features(zoo.manifest["factors"])]
    # The strictest split of the sources: a network with a test model in it must never be trained on.
    split = max((source["split"] for source in sources), key=schema.SPLITS.index)
    return Row({column: row[column] for column in order} | {"split": split}, verified=True)


def write_derived(zoo: Zoo, rows: Sequence[Row], folder: str | Path, kind: str) -> Path:
    """Write derived rows as a zoo, with the held-out images of the zoo that they come from.

    Args:
        zoo: the zoo of the sources.
        rows: results of `derived_row`.
        folder: the new zoo; an earlier zoo of this kind is replaced.
        kind: name of what the rows are, such as `soups`: ends the new zoo's name.

    Raises:
        ZooError: if `check_folder` refuses the folder.
    """
    members = {split: [row for row in rows if row["split"] == split] for split in schema.SPLITS}
    splits = {
        split: Rows(len(part), max((row["num_parameters"] for row in part), default=0), map(_stored, part))
        for split, part in members.items()
    }
    return write_streamed(zoo, splits, {row["dataset"] for row in rows}, folder, kind)


def write_streamed(zoo: Zoo, splits: Mapping[str, Rows], datasets: set[str], folder: str | Path, kind: str) -> Path:
    """Like `write_derived`, for rows that are made while they are written; the keys of `splits` give the split.

    Args:
        zoo: the zoo of the sources.
        splits: split -> its rows, without a column `split`.
        datasets: names of the datasets whose held-out images the new zoo holds.
        folder: the new zoo; an earlier zoo of this kind is replaced.
        kind: name of what the rows are, such as `soups`: ends the new zoo's name.
    """
    probes = {
        role: [row for row in zoo.probe_rows(role) if row["dataset"] in datasets] for role in ("selection", "test")
    }
    check_folder(Path(folder), zoo, f"{kind}_of")
    manifest = made_manifest(zoo, f"{kind}_of")
    manifest |= {"name": f"{manifest['name']}-{kind}", "missing_runs": {}}
    write_zoo(Path(folder), manifest, splits, probes, zoo.blueprint_text)
    return Path(folder)


def _stored(row: Row) -> dict[str, object]:
    return {name: value for name, value in row.items() if name != "split"}


def _shared(rows: Sequence[Mapping[str, object]], column: str) -> object:
    """The value that all rows have in a column, or None where they differ."""
    values = {row[column] for row in rows}
    return values.pop() if len(values) == 1 else None
