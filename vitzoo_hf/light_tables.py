"""Tables of a zoo without weights: index, evaluations, pairs, probes; each compared with its hash when it is read."""

import hashlib
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vitzoo_hf import schema
from vitzoo_hf.hub_files import REPAIR, FolderFiles, HubFiles, one_line
from vitzoo_hf.schema import ZooError


class LightTables:
    """Reads light configs of a zoo.

    Args:
        files: of the zoo.
        manifest: what `zoo.json` says.
    """

    def __init__(self, files: FolderFiles | HubFiles, manifest: Mapping[str, Any]) -> None:
        self.files, self.manifest = files, manifest

    def names(self, config: str, split: str | None = None) -> list[str]:
        """The files of a config, or of one split of it."""
        start = f"{config}/{split}-" if split else f"{config}/"
        return sorted(name for name in self.manifest["files"] if name.startswith(start))

    def read(self, config: str, split: str | None = None) -> pa.Table | None:
        """A config, or one split of it; None where the zoo has no such files.

        Raises:
            ZooError: if a file cannot be read or does not match its hash.
        """
        tables = [self._read(name) for name in self.names(config, split)]
        return pa.concat_tables(tables) if tables else None

    def index(self) -> pa.Table:
        """The index of all splits, one behind the other, with a column `split`.

        Raises:
            ZooError: if there is none, or it is damaged.
        """
        tables = []
        for split in schema.SPLITS:
            table = self.read("index", split)
            if table is not None:
                tables.append(table.append_column("split", pa.array([split] * table.num_rows)))
        if not tables:
            raise ZooError(f"{self.files.name} has no rows: its index is missing; {REPAIR}")
        return pa.concat_tables(tables)

    def _read(self, name: str) -> pa.Table:
        try:
            data = self.files.path(name).read_bytes()
        except OSError as error:
            raise ZooError(f"{name} of {self.files.name} cannot be read ({one_line(error)}); {REPAIR}") from None
        if hashlib.sha256(data).hexdigest() != self.manifest["files"][name].get("sha256"):
            raise ZooError(f"{name} of {self.files.name} does not match its hash: it is damaged; {REPAIR}")
        return pq.ParquetFile(pa.BufferReader(data)).read(use_threads=False)
