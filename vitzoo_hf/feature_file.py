"""Features of one model in an .npy file, read by ranges of images, so that they need not fit in memory."""

import os
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor


class FeatureFile:
    """Float16, 32 or 64 features `[N, F]` in a file that `numpy.save` wrote; `file[10:20]` reads ten images of it.

    Nothing is mapped: pages of a mapped file count as memory of the process until they are unmapped.

    Args:
        path: the .npy file. It is opened anew by each read, so any number of files can be in use.

    Raises:
        ValueError: if the file is no .npy file of floating `[N, F]`, row-major in this machine's byte order, or if
            it has been cut short since.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     np.save(f"{folder}/model.npy", np.eye(3, dtype=np.float32))
        ...     file = FeatureFile(f"{folder}/model.npy")
        ...     tuple(file.shape), file[1:]
        ((3, 3), tensor([[0., 1., 0.],
            [0., 0., 1.]]))
    """

    device = torch.device("cpu")

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        try:
            header = np.load(self.path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise ValueError(f"{path} is no .npy file ({error}): write it with numpy.save") from None
        if not (
            isinstance(header, np.memmap)
            and header.ndim == 2
            and header.flags.c_contiguous
            and header.dtype in (np.float16, np.float32, np.float64)
        ):
            about = f"{header.dtype} {list(header.shape)}" if isinstance(header, np.memmap) else "an archive"
            raise ValueError(
                f"{path} holds {about}; expected row-major float16, float32 or float64 [N, F] from numpy.save"
            )
        self._offset, self._numpy_dtype = header.offset, header.dtype
        self.shape = torch.Size(header.shape)
        self.dtype = torch.from_numpy(np.empty(0, header.dtype)).dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, images: slice) -> Float[Tensor, "n F"]:
        """Features of consecutive images, in new memory."""
        start, stop, _ = slice(images.start, images.stop).indices(len(self))
        read = np.empty((max(0, stop - start), self.shape[1]), self._numpy_dtype)
        row = self.shape[1] * read.itemsize
        file = os.open(self.path, os.O_RDONLY)
        try:
            received, left = 0, read.reshape(-1).view(np.uint8).data
            while received < len(left):
                got = os.preadv(file, [left[received:]], self._offset + start * row + received)
                if got == 0:
                    raise ValueError(f"{self.path} ends within its features: it was cut short, write it again")
                received += got
        finally:
            os.close(file)
        return torch.from_numpy(read)
