"""Groups of models of one architecture: sizes of tiles, weights of the next tile, compiled forwards.

Sizes of tiles follow from sizes of models and the device alone, so that the same call gives the same bits.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from vitzoo_hf.format.layout import Layout, unflatten
from vitzoo_hf.models.architecture import Architecture
from vitzoo_hf.models.batched import BatchedViT, Outputs, outputs_of_module

TILE_BYTES = {"cpu": 2**22, "cuda": 2**29}
"""Size of the widest activation of a tile: in a processor's cache beside weights, or hundreds of images on CUDA."""
# on a CPU 16 model-images were up to 1.4 times slower, 128 faster for the smallest models alone
LEAST_IMAGES, MOST_MODEL_IMAGES = 8, {"cpu": 64, "cuda": 8192}
"""Bounds of the images, and of the models times images, of a tile."""
MODULE_IMAGES = 256
ACTIVATIONS = 16  # bound on the memory of a forward at its peak, in units of the widest activation
STACKED_PARAMETERS = 2_000_000
"""Smaller models are copied into one matrix, so that tiles are views of it; larger models are not copied."""
PRECISIONS = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
"""Precision -> dtype of weights and activations; `tf32` rounds factors of products alone, to ten bits, on CUDA."""
SHARE_OF_TILE = 0.25


@dataclass(frozen=True)
class Group:
    """The models of one architecture: their positions in the population and their weights.

    Attributes:
        positions: positions of the models in the population.
        places: the positions on the device, int64 `[P]`: an index from the host would be copied with every tile.
        layout: the layout of every vector.
        vectors: flat weights, `[P, D]` of small models or one `[D]` a model; on the device, or on the CPU where
            they would fill half of it.
        model: the module, without weights.
        batched: the batched forward; None for an architecture that it does not know.
        forward: the batched forward, compiled on request.
        num_outputs: number of outputs of the head.
        views: named views of `vectors`, cached: making the views takes as long as a small forward.
    """

    positions: list[int]
    places: Int64[Tensor, " P"]
    layout: Layout
    vectors: Float[Tensor, "P D"] | list[Float[Tensor, " D"]]
    model: nn.Module
    batched: BatchedViT | None
    forward: Callable[..., Outputs] | None
    num_outputs: int
    views: dict[tuple[int, int], dict[str, Tensor]] = field(default_factory=dict, repr=False)

    def named(self, first: int, vectors: Float[Tensor, "P D"]) -> dict[str, Tensor]:
        """The tensors of the models from `first` on; `vectors` are their weights, stored or copied."""
        key, rows = (first, len(vectors)), self.vectors
        if (
            not isinstance(rows, Tensor)
            or rows.dtype != vectors.dtype
            or rows[first].data_ptr() != vectors.data_ptr()
        ):
            return unflatten(vectors, self.layout)  # cached views of a copy would keep the copy alive
        # small models on few images: 1.08 of the best other way with new views a tile, 1.01 with these
        if key not in self.views:
            self.views[key] = unflatten(vectors, self.layout)
        return self.views[key]

    def tile(self, device: torch.device, num_images: int, precision: str, scale: float = 1.0) -> tuple[int, int]:
        """Models and images that run together; `scale` below 1 for a smaller tile."""
        if self.batched is None:
            return 1, max(1, int(min(num_images, MODULE_IMAGES) * scale))
        kind = device.type if device.type in TILE_BYTES else "cuda"
        # not what is free at the moment: tiles of another size would compile anew, and round otherwise
        fitting = int(_memory(device) * SHARE_OF_TILE) // ACTIVATIONS
        # activations are what a tile adds: weights are there whatever its size
        image = self.batched.widest * PRECISIONS[precision].itemsize
        tiled = max(min(TILE_BYTES[kind], fitting) // image, LEAST_IMAGES)
        most = max(1, int(min(tiled, MOST_MODEL_IMAGES[kind]) * scale))
        images = min(num_images, most)
        return max(1, min(len(self.positions), most // images)), images


def group_of(
    architecture: Architecture,
    entries: list[tuple[int, Tensor]],
    home: torch.device,
    compiled: bool,
    place: torch.device,
) -> Group:
    """The group of models of one architecture.

    Args:
        architecture: the architecture of all of them.
        entries: position in the population and flat weights `[D]` of each.
        home: where the weights are kept.
        compiled: whether the forward is compiled.
        place: where the models run.
    """
    positions, vectors = [position for position, _ in entries], [vector.to(home) for _, vector in entries]
    layout, batched = architecture.layout, architecture.batched
    return Group(
        positions=positions,
        places=torch.tensor(positions, device=place),
        layout=layout,
        vectors=torch.stack(vectors) if layout.num_parameters <= STACKED_PARAMETERS else vectors,
        model=architecture.skeleton,
        batched=batched,
        forward=_compiled(batched, place) if compiled and batched is not None else batched,
        num_outputs=architecture.num_outputs,
    )


def _compiled(batched: BatchedViT, place: torch.device) -> Callable[..., Outputs]:
    """The forward compiled for each shape; more shapes than fit are an error, never a silent return to eager."""
    from torch._dynamo import config as dynamo_config

    mode = "reduce-overhead" if place.type == "cuda" else "default"
    forward = torch.compile(batched.__call__, dynamic=False, mode=mode)

    def run(tensors: dict[str, Tensor], patches: Tensor, readout: str | None = None) -> Outputs:
        # around calls, as the first call of a shape compiles; torch's limit is 8, after which it runs eagerly
        with dynamo_config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True):
            return forward(tensors, patches, readout)

    return run


def weights_of_tiles(
    group: Group, models: int, device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Tensors of tiles of models on the device; those of the next tile are copied while one is in use."""
    starts = range(0, len(group.positions), models)
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    ahead = _copied(group, 0, models, device, dtype, stream)
    for first in starts:
        vectors, copy_event = ahead
        if first + models < len(group.positions):
            ahead = _copied(group, first + models, models, device, dtype, stream)
        if copy_event is not None:
            torch.cuda.current_stream(device).wait_event(copy_event)
            # without this the allocator may hand the memory out while the forward still reads it
            vectors.record_stream(torch.cuda.current_stream(device))
        yield first, group.named(first, vectors)


def _copied(
    group: Group, first: int, models: int, device: torch.device, dtype: torch.dtype, stream: torch.cuda.Stream | None
) -> tuple[Tensor, torch.cuda.Event | None]:
    """Vectors of a tile of models in `dtype`, and the event that marks the end of their copy."""
    part = group.vectors[first : first + models]
    # a tile of one large model is a view: stacking would copy it
    vectors = part if isinstance(part, Tensor) else part[0][None] if len(part) == 1 else torch.stack(part)
    if stream is None or vectors.is_cuda:
        return vectors.to(device, dtype), None
    # only a copy from pinned memory runs beside a forward
    pinned = vectors.to(dtype).pin_memory()
    with torch.cuda.stream(stream):
        return pinned.to(device, non_blocking=True), stream.record_event()


@contextmanager
def products_in(precision: str) -> Iterator[None]:
    """Take float32 products as the precision says, whatever the process has set, and put its setting back."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def forward(group: Group, tensors: dict[str, Tensor], inputs: Tensor, readout: str | None) -> Outputs:
    """Outputs of a tile."""
    if group.forward is not None:
        return group.forward(tensors, inputs, readout)
    return outputs_of_module(group.model, {name: value[0] for name, value in tensors.items()}, inputs, readout)


def _memory(device: torch.device) -> int:
    """Bytes of the device; no bound on the CPU, where tiles are small and the weights already are."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else sys.maxsize
