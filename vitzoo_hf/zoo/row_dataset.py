"""The rows of a zoo as a map-style dataset of torch: a length, and a row by its number."""

from collections.abc import Sequence
from operator import index
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from vitzoo_hf.format.layout import unflatten
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.zoo.row_source import RowSource, handed_out


class RowDataset(Dataset[dict[str, Any]]):
    """Rows by number, `weights` float32 `[D]` first; made by `Zoo.torch_dataset`."""

    def __init__(
        self,
        source: RowSource,
        *,
        tensors: str | Sequence[str] | None = None,
        pad: bool = False,
        verify: bool = True,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.source, self.verify, self.dtype = source, verify, dtype
        self.pad, self.named = pad, tensors is not None and not pad
        self._parts = handed_out(source, tensors)
        sizes = {part.layout.num_parameters for part in self._parts}
        self._width = max(sizes, default=0)
        if len({part.layout.fingerprint for part in self._parts}) > 1 and not pad:
            raise ZooError(
                f"these rows have {len(self._parts)} layouts (architectures or heads), so their weights do not stack:"
                ' give tensors="trunk", pad=True, or filter by `layout`'
            )

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, number: Any) -> dict[str, Any]:
        try:
            number = index(number)
        except TypeError:
            raise ZooError(f"row {number!r}: expected a number; `torch.utils.data.Subset` takes several") from None
        if not -len(self) <= number < len(self):
            raise IndexError(f"row {number} of {len(self)}")
        return self.__getitems__([number % len(self)])[0]

    def __getitems__(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        """Rows by their numbers, as a `DataLoader` asks for those of a batch."""
        rows = np.asarray(numbers, np.int64)
        tensors, texts = self.source.light(rows, self.dtype)
        codes = self.source.layout_codes[rows].tolist()
        items = []
        for place, (position, code) in enumerate(zip(self.source.positions[rows].tolist(), codes, strict=True)):
            part = self._parts[code]
            size = part.layout.num_parameters
            vector = np.empty(self._width, np.float32)
            vector[size:] = 0
            if part.parts is None:
                self.source.reader.read_into(position, vector[:size], verify=self.verify)
            else:
                self.source.reader.read_parts(position, part.parts, vector[:size], verify=self.verify)
            item: dict[str, Any] = {"weights": torch.from_numpy(vector)}
            item |= {name: values[place] for name, values in tensors.items()}
            # collate functions of torch refuse None
            item |= {name: "" if values[place] is None else values[place] for name, values in texts.items()}
            if self.pad:
                item["lengths"] = torch.tensor(size)
            if self.named:
                item["tensors"] = unflatten(item["weights"], part.layout)
            items.append(item)
        return items
