"""The forward of 16 ViT-S/16 at 224 px on the GPU in float32, TF32 and bfloat16: eager, compiled block, CUDA graphs.

python benchmarks/gpu_forward.py --out FOLDER [--simulate]

`projected_s` is the time of 250 models on 10,000 images at the same speed. Differences are from float32, one tile.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import gpu_shared
import side_by_side
import torch
from population_forward import row_of
from torch import Tensor

from vitzoo_hf.format.layout import unflatten
from vitzoo_hf.models.architecture import Architecture
from vitzoo_hf.models.batched import BatchedViT
from vitzoo_hf.models.population import PRECISIONS, Group, Population
from vitzoo_hf.models.vit import create

MODELS, IMAGES = 16, 256
PAPER = 250, 10_000
ARCHITECTURE = side_by_side.VIT_S
SMALL = {"MODELS": 2, "IMAGES": 3, "ARCHITECTURE": side_by_side.NANO}
WAYS = {"bfloat16": ("bfloat16", "highest"), "TF32": ("float32", "high"), "float32": ("float32", "highest")}
"""Precision of the population, and torch's precision of float32 products; what the paper's size needs comes first."""
LOOP = "torch.stack([model(images) for model in models])"


def main(figures: gpu_shared.Figures) -> None:
    if figures.simulated:
        globals().update(SMALL)
    models = [create(ARCHITECTURE[0], ARCHITECTURE[1], seed=seed).eval() for seed in range(MODELS)]
    rows = [row_of(model, ARCHITECTURE[1]) | {"architecture": ARCHITECTURE[0]} for model in models]
    channels, *size = Architecture(*ARCHITECTURE).batched.image  # type: ignore[union-attr]
    images = torch.randn(IMAGES, channels, *size, generator=torch.Generator().manual_seed(0)).to("cuda")
    models = [model.to("cuda") for model in models]
    with torch.inference_mode():
        expected = Tiles(Population.from_rows(rows, "cuda").groups[0], images, "float32").logits().cpu()
        for name, (precision, products) in WAYS.items():
            with float32_products(products):
                measure(figures, name, Population.from_rows(rows, "cuda", precision=precision), images, expected)
                loop(figures, name, models, images, expected)


@contextmanager
def float32_products(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def measure(figures: gpu_shared.Figures, name: str, population: Population, images: Tensor, expected: Tensor) -> None:
    """The population's plan, and the forward of one model at a time on all images at once."""
    tiles = Tiles(population.groups[0], images, population.precision)
    plan = population.describe(len(images))[0]
    ways: dict[str, tuple[Callable[[], Callable[[], Tensor]], str]] = {
        "Population(images)": (lambda: lambda: population(images), plan),
        "eager, one tile": (lambda: tiles.logits, ""),
        "eager, one tile, CUDA graph": (lambda: tiles.graphed(figures.simulated), ""),
        "compiled block, one tile": (lambda: tiles.compiled().logits, ""),
        "compiled block, one tile, CUDA graph": (lambda: tiles.compiled().graphed(figures.simulated), ""),
    }
    for way, (prepare, note) in ways.items():
        with figures.row(precision=name, way=way, models=len(population), images=len(images), note=note) as row:
            row |= figure(prepare(), expected)


def loop(
    figures: gpu_shared.Figures, name: str, models: list[torch.nn.Module], images: Tensor, expected: Tensor
) -> None:
    """The baseline: modules in turn."""
    dtype = PRECISIONS[WAYS[name][0]]
    names = {"models": [copy.deepcopy(model).to(dtype) for model in models], "images": images.to(dtype)}
    with figures.row(precision=name, way=f"loop: {LOOP}", models=len(models), images=len(images), note="") as row:
        row |= figure(gpu_shared.code(LOOP, names), expected)


def figure(way: Callable[[], Tensor], expected: Tensor) -> dict[str, object]:
    timing = gpu_shared.timed(way)
    logits = timing.result.float().cpu()
    models, images = expected.shape[:2]
    each = timing.seconds / models / images
    return {
        "ms": timing.seconds * 1e3,
        "us_a_model_and_image": each * 1e6,
        "projected_s": each * PAPER[0] * PAPER[1],
        "first_s": timing.first_s,
        "peak_gb": timing.peak_gb,
        "largest_difference": (logits - expected).abs().max().item(),
        "equal_predictions": (logits.argmax(-1) == expected.argmax(-1)).double().mean().item(),
    }


class Tiles:
    """The forward of the models of a group, one model on all images at a time.

    Attributes:
        vectors: weights of all models, in the precision of the forward.
        forward: named tensors of one model and patches -> logits.
    """

    def __init__(self, group: Group, images: Tensor, precision: str) -> None:
        assert group.batched is not None
        self.layout, self.batched = group.layout, group.batched
        self.vectors = [vector.to(PRECISIONS[precision]) for vector in group.vectors]
        self.patches = self.batched.patches(images.to(PRECISIONS[precision]))
        self.forward: Callable[[dict[str, Tensor], Tensor], Any] = self.batched.__call__

    def logits(self) -> Tensor:
        return torch.cat([self._of(vector) for vector in self.vectors])

    def _of(self, vector: Tensor) -> Tensor:
        return self.forward(unflatten(vector[None], self.layout), self.patches).logits

    def compiled(self) -> "Tiles":
        """Put a compiled block in; every block of every model is one graph, since names lose their number."""
        block = torch.compile(BatchedViT._block, dynamic=False)
        vit = BatchedViT(**vars(self.batched))

        def run(tensors: dict[str, Tensor], prefix: str, stream: Tensor, in_place: bool) -> Tensor:
            part = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
            return block(self.batched, part, "", stream, in_place)

        object.__setattr__(vit, "_block", run)  # the sizes are frozen
        self.forward = vit.__call__
        return self

    def graphed(self, simulated: bool) -> Callable[[], Tensor]:
        """Capture the forward of one model; a replay reads the weights that were copied to the captured place."""
        weights = self.vectors[0].clone()
        if simulated:  # which has no graphs: the same copies and the same forward

            def replay() -> object:
                return place.copy_(self._of(weights))

            place = self._of(weights)
        else:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # what is compiled or set up at a first call cannot be captured
                for _ in range(3):
                    self._of(weights)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                place = self._of(weights)
            replay = graph.replay

        def run() -> Tensor:
            logits = place.new_empty(len(self.vectors), *place.shape[1:])
            for number, vector in enumerate(self.vectors):
                weights.copy_(vector)
                replay()
                logits[number] = place[0]  # the next replay writes there
            return logits

        return run


if __name__ == "__main__":
    gpu_shared.main("forward", __doc__, main)
