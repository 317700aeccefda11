"""Read the tensors of one foreign checkpoint file without ever running anything in it.

safetensors files are read by their library, pickles by `torch.load(weights_only=True)` alone, after a check of the
archive's directory. Damaged and hostile files are refused by name. A file is read into memory once.
"""

import io
import pickle
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import Tensor

from vitzoo_hf.format.messages import one_line
from vitzoo_hf.format.schema import ZooError

# the whole file is read into memory
MAX_FILE_BYTES = 16_000_000_000
ARCHIVE_SLACK = 16_000_000
"""Bytes that names and pickled structure of an archive may take besides its tensors."""

WRAPPINGS = ("state_dict", "model_state_dict", "model", "module")


def read_state_dict(file: Path | io.BufferedIOBase, name: str) -> dict[str, Tensor]:
    """Read all tensors of a checkpoint, on the CPU, under the names in the file.

    Args:
        file: a path, or an open binary file that can seek.
        name: name of the checkpoint in messages.

    Returns:
        Name -> tensor, of any dtype; wrappings such as `{"state_dict": …}` of training frameworks are removed.

    Raises:
        ZooError: if the file is empty, cut, no checkpoint, holds code, or is no dictionary of tensors.
    """
    try:
        opened = file.open("rb") if isinstance(file, Path) else file
    except OSError as error:
        raise ZooError(f"{name} cannot be read: {error.strerror}") from None
    try:
        size = opened.seek(0, io.SEEK_END)
        content = _read(opened, name, size)
    finally:
        if isinstance(file, Path):
            opened.close()
    tensors = _tensors(content, name)
    _check_plain(tensors, name, size)
    return tensors


def _read(opened: io.BufferedIOBase, name: str, size: int) -> object:
    opened.seek(0)
    if size == 0:
        raise ZooError(f"{name} is empty: it has 0 bytes")
    if size > MAX_FILE_BYTES:
        raise ZooError(f"{name} has {size / 1e9:.3g} GB; files of up to {MAX_FILE_BYTES / 1e9:.0f} GB are read")
    if _is_safetensors(opened, size):
        try:
            return load_safetensors(opened.read())
        except (SafetensorError, ValueError, KeyError) as error:
            raise ZooError(f"{name} is a damaged safetensors file ({one_line(error)})") from None
    if zipfile.is_zipfile(opened):
        _check_archive(opened, name, size)
    opened.seek(0)
    try:
        # `weights_only` unpickles tensors and plain containers, and runs no code
        return torch.load(opened, map_location="cpu", weights_only=True)  # type: ignore[arg-type]
    except pickle.UnpicklingError as error:
        reason = "it holds more than tensors" if "weights_only" in str(error).lower() else one_line(error)
        raise ZooError(f"{name} is not read: {reason}; only checkpoints of plain tensors are") from None
    # a hostile or cut pickle can raise anything from within the unpickler
    except Exception as error:
        raise ZooError(f"{name} is damaged, or no checkpoint ({type(error).__name__}: {one_line(error)})") from None


def _is_safetensors(opened: io.BufferedIOBase, size: int) -> bool:
    head = opened.read(9)
    opened.seek(0)
    # eight bytes of header length, then a JSON object: the suffix of a name proves nothing
    return len(head) == 9 and head[8:] == b"{" and struct.unpack("<Q", head[:8])[0] <= size - 8


def _check_archive(opened: io.BufferedIOBase, name: str, size: int) -> None:
    """Refuse an archive that would unpack to more than its own size: torch stores tensors uncompressed."""
    opened.seek(0)
    try:
        with zipfile.ZipFile(opened) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise ZooError(f"{name} is a damaged archive ({one_line(error)})") from None
    # a small archive of compressed zeros could unpack to fill the memory
    unpacked = sum(entry.file_size for entry in entries)
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries) or unpacked > size + ARCHIVE_SLACK:
        raise ZooError(f"{name} is refused: {size} bytes that unpack to {unpacked}; torch writes archives unpacked")


def _tensors(content: object, name: str) -> dict[str, Tensor]:
    """Remove wrappings from the content of a checkpoint, which must then be a dictionary of tensors."""
    # a bounded loop: a pickled dictionary can contain itself
    for _ in WRAPPINGS:
        if not isinstance(content, Mapping):
            break
        inner = [content[key] for key in WRAPPINGS if isinstance(content.get(key), Mapping)]
        if not inner:
            break
        content = inner[0]
    if not isinstance(content, Mapping):
        raise ZooError(f"{name} holds a {type(content).__name__}, not a dictionary of tensors")
    strays = [key for key, value in content.items() if not (isinstance(key, str) and isinstance(value, Tensor))]
    if strays or not content:
        what = f"{strays[0]!r} is no named tensor" if strays else "it is empty"
        raise ZooError(f"{name} is no dictionary of tensors: {what}")
    return dict(content)


def _check_plain(tensors: Mapping[str, Tensor], name: str, size: int) -> None:
    """Refuse tensors without plain memory, and tensors that claim far more values than the file holds."""
    for key, tensor in tensors.items():
        if tensor.is_nested or tensor.is_quantized or tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise ZooError(f"{name}: {key} is no plain tensor: save it dense, unquantized and from the CPU")
    # a stride of 0 lets a file of a kilobyte claim terabytes; shared tensors may be counted twice
    claimed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if claimed > 2 * size + ARCHIVE_SLACK:
        raise ZooError(f"{name} is refused: {size} bytes that claim to be {claimed} bytes of tensors")
