"""Features of all models, centred and scaled, by blocks of images that fit in memory; features of a model in a file.

Each column is centred twice in float32 (float64 for float64), which removes any offset, and each model is divided by
its largest entry, which does not change a kernel alignment.

Cost: all features where they take at most two blocks of `BLOCK_BYTES`. Larger ones are read and centred again block
by block, so memory stays bounded however many models and images there are.
"""

import os
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from vitzoo_hf.format.messages import describe
from vitzoo_hf.metrics.blocks import block_bytes, fits


class FeatureFile:
    """Float16, 32 or 64 features `[N, F]` in a file that `numpy.save` wrote; `file[10:20]` reads ten images.

    The file is read, not mapped: pages of a mapped file count as memory of the process until they are unmapped.

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
        features = np.empty((max(0, stop - start), self.shape[1]), self._numpy_dtype)
        row = self.shape[1] * features.itemsize
        file = os.open(self.path, os.O_RDONLY)
        try:
            received, buffer = 0, features.reshape(-1).view(np.uint8).data
            while received < len(buffer):  # one call reads at most 2 GiB
                size = os.preadv(file, [buffer[received:]], self._offset + start * row + received)
                if size == 0:
                    raise ValueError(f"{self.path} ends within its features: it was cut short, write it again")
                received += size
        finally:
            os.close(file)
        return torch.from_numpy(features)


BLOCK_BYTES = 2**29
Features = Float[Tensor, "P N F"] | Sequence[Float[Tensor, "N _"] | FeatureFile]


class CentredFeatures:
    """Models of the same images; neighbours of one width form a run, which is one `[models, images, F]` tensor.

    Args:
        features: features of all models; `cka` lists the forms.
        minimum: the fewest images that are accepted.
        device: where they are held and centred; where they lie, by default. Files lie on the CPU.
        dtype: the precision; float64 for float64 features and float32 for others, by default.

    Raises:
        ValueError: on too few images, or features that are not finite or do not fit together.
    """

    def __init__(
        self,
        features: Features,
        minimum: int,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _check(features, minimum)
        double = any(model.dtype == torch.float64 for model in features)
        self.dtype = dtype or (torch.float64 if double else torch.float32)
        self._ulp = torch.finfo(torch.float64 if double else torch.float32).eps  # of the values, not of the sums
        self.device = device or features[0].device
        self.widths = [model.shape[1] for model in features]
        self.num_images = len(features[0])
        self.runs = [
            slice(run[0], run[-1] + 1)
            for _, group in groupby(range(len(self)), self.widths.__getitem__)
            if (run := list(group))
        ]
        self._features = features
        self._block_bytes = block_bytes(self.device, BLOCK_BYTES)
        size = self.num_images * sum(self.widths) * self.dtype.itemsize
        in_memory = fits(self.device, size, 2 * BLOCK_BYTES)
        self._in_memory = self._storage(self.num_images) if in_memory else None
        self._measure()

    def __len__(self) -> int:
        return len(self.widths)

    def in_float64(self) -> "CentredFeatures":
        """The same features, centred anew in float64."""
        return CentredFeatures(self._features, 1, device=self.device, dtype=torch.float64)

    def blocks(self) -> list[slice]:
        """Ranges of images that are in memory together."""
        row = sum(self.widths) * self.dtype.itemsize
        step = self.num_images if self._in_memory is not None else max(1, self._block_bytes // row)
        return [slice(start, min(start + step, self.num_images)) for start in range(0, self.num_images, step)]

    def block_pairs(self) -> Iterator[tuple[slice, slice, list[Tensor], list[Tensor]]]:
        """Pairs of ranges on and above the diagonal, with the features of each run in both ranges.

        The memory of a pair is used again for the next one.
        """
        blocks = self.blocks()
        memory = [self._storage(blocks[0].stop) if self._in_memory is None else [] for _ in blocks[:2]]
        for position, first in enumerate(blocks):
            left = self._load(first, memory[0])
            yield first, first, left, left
            for second in blocks[position + 1 :]:
                yield first, second, left, self._load(second, memory[1])

    def read(self, models: slice, images: slice) -> Float[Tensor, "models images F"]:
        """Some models of one run."""
        run = next(index for index, run in enumerate(self.runs) if run.start <= models.start < run.stop)
        if self._in_memory is not None:
            start = self.runs[run].start
            return self._in_memory[run][models.start - start : models.stop - start, images]
        shape = (models.stop - models.start, images.stop - images.start, self.widths[models.start])
        return self._fill(models, images, self._empty(*shape))

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def _storage(self, num_images: int) -> list[Tensor]:
        shapes = [(run.stop - run.start, num_images, self.widths[run.start]) for run in self.runs]
        return [self._empty(*shape) for shape in shapes]

    def _load(self, images: slice, memory: list[Tensor]) -> list[Tensor]:
        if self._in_memory is not None:
            return [run[:, images] for run in self._in_memory]
        size = images.stop - images.start
        return [self._fill(run, images, out[:, :size]) for run, out in zip(self.runs, memory, strict=True)]

    def _fill(self, models: slice, images: slice, out: Tensor) -> Tensor:
        for model, centred in zip(range(models.start, models.stop), out, strict=True):
            mean, rest, divisor = self._columns[model]
            torch.sub(self._features[model][images].to(self.device, self.dtype), mean, out=centred)
            centred.sub_(rest).div_(divisor)
        return out

    def _measure(self) -> None:
        """Columns, scales and squared norms of all models; only some whole models come by at a time."""
        self._columns: list[tuple[Tensor, Tensor, Tensor]] = []
        squares, peaks, magnitudes, finite = [], [], [], []
        for index, run in enumerate(self.runs):
            width = self.widths[run.start]
            # one model at a time on the CPU, where a second would push the first out of the cache
            step = max(1, block_bytes(self.device, 1) // (self.num_images * width * self.dtype.itemsize))
            scratch = self._empty(0 if self._in_memory else step, self.num_images, width)
            for first in range(run.start, run.stop, step):
                models = slice(first, min(first + step, run.stop))
                start, count = first - run.start, models.stop - first
                centred = self._in_memory[index][start : start + count] if self._in_memory else scratch[:count]
                columns, peak, magnitude, is_finite = _centre(self._whole(models), centred, self._ulp)
                self._columns += zip(*columns, strict=True)
                squares.append(torch.linalg.vector_norm(centred, dim=2).double().square())
                peaks.append(peak)
                magnitudes.append(magnitude)
                finite.append(is_finite)
        bad = (~torch.cat(finite)).nonzero().flatten().tolist()
        if bad:
            raise ValueError(
                f"NaN or infinite features in {len(bad)} of {len(self)} models (positions {str(bad[:8])[1:-1]}): "
                "drop these models, or look for a diverged run"
            )
        self.squares: Float64[Tensor, "P N"] = torch.cat(squares)
        self.ulps: Float64[Tensor, " P"] = self._ulp * torch.cat(magnitudes).double()
        self.scales: Float64[Tensor, " P"] = torch.cat(peaks).double()

    def _whole(self, models: slice) -> Float[Tensor, "models N F"]:
        """All features of some models of one run, as they are given."""
        if isinstance(self._features, Tensor):
            return self._features[models].to(self.device, self.dtype)
        parts = [self._features[model][:].to(self.device, self.dtype) for model in range(models.start, models.stop)]
        return parts[0][None] if len(parts) == 1 else torch.stack(parts)


def _centre(
    models: Float[Tensor, "P N F"], centred: Float[Tensor, "P N F"], ulp: float
) -> tuple[tuple[Tensor, Tensor, Tensor], Float[Tensor, " P"], Float[Tensor, " P"], Bool[Tensor, " P"]]:
    """Write centred and scaled models.

    Returns:
        Means and divisors of columns, each `[P, F]`; scales; largest values in units of the scale; finiteness.
    """
    lowest, highest, mean = models.amin(1), models.amax(1), models.mean(1)
    torch.sub(models, mean[:, None], out=centred)
    rest = centred.mean(1)  # the mean of float32 columns with a large offset is off by some ulp of the offset
    varies = highest - lowest > 4 * ulp * torch.maximum(-lowest, highest)
    peak = torch.where(varies, torch.maximum(highest - mean, mean - lowest), 0).amax(1)
    divisor = torch.where(varies, peak[:, None], torch.inf)
    centred.sub_(rest[:, None]).div_(divisor[:, None])
    finite = torch.cat([lowest, highest, mean, peak[:, None]], dim=1).isfinite().all(1)
    magnitude = torch.where(varies, torch.maximum(-lowest, highest), 0).amax(1) / peak.where(peak > 0, 1)
    return (mean, rest, divisor), peak, magnitude, finite


def _check(features: Features, minimum: int) -> None:
    for model in features:
        if not isinstance(model, Tensor | FeatureFile):
            raise ValueError(f"features of a model are {describe(model)}; expected a tensor [N, F] or a FeatureFile")
    shapes = [tuple(model.shape) for model in features]
    floating = all(model.dtype.is_floating_point for model in features)
    if not shapes or not floating or any(len(shape) != 2 or 0 in shape for shape in shapes):
        shown = list(features.shape) if isinstance(features, Tensor) else shapes[:4]
        raise ValueError(
            f"features are {'floating' if floating else 'not floating'} {shown}; expected non-empty floating "
            "[P, N, F], or a sequence of [N, F] (tokens: flatten or pool them to one row an image)"
        )
    sizes = sorted({shape[0] for shape in shapes})
    if len(sizes) > 1:
        raise ValueError(f"models have features of {sizes} images; expected the same images for every model")
    devices = sorted({str(model.device) for model in features})
    if len(devices) > 1:
        raise ValueError(f"features are on {', '.join(devices)}; expected one device: move them with .to()")
    if sizes[0] < minimum:
        raise ValueError(
            f"features of {sizes[0]} images; expected at least {minimum} for "
            f"{'debiased' if minimum == 4 else 'biased'} HSIC: pass more images"
        )
