"""Rows to a population: the weights of many models, and the forward pass of all models on the same images.

Models of one architecture form a group. A group of plain ViTs runs in tiles of some models by some images, a few
dozen model-images each, whose activations stay in the processor's cache: all models at once on few images, one model
at a time on many. Other architectures run as modules, one model at a time. The choice depends on sizes and device
alone, so that the same call gives the same numbers; `Population.describe` says which way is taken.

Cost: float32 weights on the device, or on the CPU where they would fill half of it, and a tile of activations.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from vitzoo_hf.format.messages import describe, did_you_mean
from vitzoo_hf.format.row import Row, RowLike
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.models.architecture import Architecture
from vitzoo_hf.models.batched import READOUTS, Outputs
from vitzoo_hf.models.rebuild import usable_device
from vitzoo_hf.models.tiles import PRECISIONS, Group, forward, group_of, products_in, weights_of_tiles

SHARE_OF_MEMORY = 0.5
"""Share of the memory that is free beyond which weights stay on the CPU."""


@dataclass(frozen=True)
class Population:
    """Models held together on a device.

    Attributes:
        model_ids: ids of the models in the order of the rows, along the first axis of all results.
        precision: precision of the forward; results are float32 in any case.

    Example:
        >>> from vitzoo_hf.zoo import Zoo
        >>> population = Population.from_rows(Zoo.sample().filter(stage="finetune").rows())
        >>> population(torch.zeros(5, 1, 16, 16)).shape
        torch.Size([6, 5, 10])
    """

    model_ids: list[str]
    groups: list[Group]
    device: torch.device
    precision: str = "float32"
    _scale: list[float] = field(default_factory=lambda: [1.0], repr=False)

    @classmethod
    def from_rows(
        cls,
        rows: Iterable[RowLike],
        device: str | torch.device = "cpu",
        *,
        precision: str = "float32",
        compiled: bool = False,
    ) -> "Population":
        """Models of any rows of a zoo.

        Args:
            rows: rows of `zoo.rows()` or `load_dataset(...)`; weights that are not verified yet are compared with
                their hash.
            device: where the models run. Weights that would fill more than half of its free memory stay on the
                CPU, and the weights of the next model are copied while a model runs.
            compiled: compile the forward of plain ViTs once for each architecture and tile, half a minute each; on
                CUDA as graphs that are replayed. On a CPU it gained nothing in `benchmarks/LOG.md`.
            precision: `bfloat16` and `float16` round weights and activations, `tf32` the factors of products on
                CUDA; `float32` rounds nothing, whatever `torch.set_float32_matmul_precision` says.
                `precision_effect` of `vitzoo_hf.evaluation.precision` says what it costs.

        Raises:
            ZooError: if there is no row, one cannot be rebuilt, or the precision is unknown.
        """
        if precision not in PRECISIONS:
            raise ZooError(f"unknown precision {precision!r}: {did_you_mean(precision, PRECISIONS)}")
        place = usable_device(device)
        model_ids: list[str] = []
        members: dict[Architecture, list[tuple[int, Tensor]]] = {}
        for position, row in enumerate(map(Row.of, rows)):
            architecture = Architecture.of(row)
            members.setdefault(architecture, []).append((position, architecture.vector_of(row)))
            model_ids.append(row.get("model_id", str(position)))
        if not model_ids:
            raise ZooError("a population needs at least one row; the filter or dataset gave none")
        total = sum(vector.numel() for entries in members.values() for _, vector in entries)
        # weights are float32, 4 bytes each, whatever the precision of the forward
        stays = place.type == "cuda" and total * 4 > SHARE_OF_MEMORY * torch.cuda.mem_get_info(place)[0]
        home = torch.device("cpu") if stays else place
        groups = [group_of(architecture, entries, home, compiled, place) for architecture, entries in members.items()]
        return cls(model_ids, groups, place, precision)

    def __len__(self) -> int:
        return len(self.model_ids)

    def __call__(self, images: Float[Tensor, "N channels H W"]) -> Float[Tensor, "P N C"]:
        """Logits of every model on the same images.

        Raises:
            ZooError: if the models differ in the number of outputs.
        """
        self._check_outputs()
        return self._gathered(self._tiles(images, None), "logits")

    def outputs(
        self, images: Float[Tensor, "N channels H W"]
    ) -> tuple[Float[Tensor, "P N C"], Float[Tensor, "P N F"]]:
        """Logits and features in one pass.

        Raises:
            ZooError: if the models differ in the number of outputs or the width of features.
        """
        self._check_outputs()
        tiles = list(self._tiles(images, None))
        return self._gathered(tiles, "logits"), self._gathered(tiles, "features")

    def _check_outputs(self) -> None:
        outputs = sorted({group.num_outputs for group in self.groups})
        if len(outputs) > 1:
            raise ZooError(
                f"these models have {outputs} outputs, so their logits do not stack: filter by `dataset` or `stage`,"
                " or take `.features(images)`"
            )

    def features(self, images: Float[Tensor, "N channels H W"]) -> Float[Tensor, "P N F"]:
        """Features of every model before its head (the class token after the last norm)."""
        return self._gathered(self._tiles(images, None), "features")

    def block_features(
        self, images: Float[Tensor, "N channels H W"], readout: str = "token"
    ) -> Float[Tensor, "P L N F"]:
        """The output of every block of every model; `cka(….flatten(0, 1))` compares every layer with every other.

        Args:
            images: normalised images.
            readout: `token`, the class token, or `mean`, the mean of all other tokens.

        Raises:
            ZooError: if the models differ in depth or width, or for another readout.
        """
        return self._gathered(self._tiles(images, readout), "blocks")

    def each(self, images: Float[Tensor, "N channels H W"], *, readout: str | None = None) -> list[Outputs]:
        """Outputs of every model separately, `[1, N, …]`, so that architectures and heads may differ.

        Raises:
            ZooError: for images that a model cannot take, or another readout.
        """
        by_position: dict[int, Outputs] = {}
        for positions, _, outputs in self._tiles(images, readout):
            for number, position in enumerate(positions):
                by_position[position] = outputs.of(number)
        return [by_position[position] for position in range(len(self))]

    def _gathered(self, outputs: Iterable[tuple[list[int], Tensor, Outputs]], part: str) -> Tensor:
        """One part of the outputs of all models, as one tensor."""
        tiles = [(places, getattr(tile, part)) for _, places, tile in outputs]
        if len({values.shape[1:] for _, values in tiles}) > 1:
            raise ZooError("these models differ in feature width or depth: filter by `architecture`")
        if len(tiles) == 1:
            return tiles[0][1]
        gathered = torch.empty(len(self), *tiles[0][1].shape[1:], device=tiles[0][1].device)
        for places, values in tiles:
            gathered[places] = values
        return gathered

    def _tiles(self, images: Tensor, readout: str | None) -> Iterator[tuple[list[int], Tensor, Outputs]]:
        """Positions, on the host and on the device, and outputs of some models at a time."""
        if not isinstance(images, Tensor):
            raise ZooError(f"images are {describe(images)}: give torch.from_numpy(images)")
        if images.ndim != 4 or len(images) == 0:
            raise ZooError(f"images have shape {tuple(images.shape)}; expected [N, C, H, W] with N of at least 1")
        if images.dtype != torch.float32:
            raise ZooError(f"images are {images.dtype}; expected float32, normalised as `zoo.probes` gives them")
        if readout is not None and readout not in READOUTS:
            raise ZooError(f"unknown readout {readout!r}: {did_you_mean(readout, READOUTS)}")
        with torch.inference_mode():
            images = images.to(self.device, PRECISIONS[self.precision])
            for group in self.groups:
                self._check_images(group, images)
                if readout == "token" and group.model.cls_token is None:
                    name = self.model_ids[group.positions[0]]
                    raise ZooError(f"{name} has no class token: take readout='mean'")
                for first, outputs in self._run(group, images, readout):
                    part = slice(first, first + len(outputs.features))
                    yield group.positions[part], group.places[part], outputs

    def trunks(self) -> Float[Tensor, "P D"]:
        """Weights of every model without its head.

        Raises:
            ZooError: if the trunks differ in layout.
        """
        trunks: list[Tensor] = [torch.empty(0)] * len(self)
        for group in self.groups:
            trunk = group.layout.trunk()
            for position, vector in zip(group.positions, group.vectors, strict=True):
                trunks[position] = vector[trunk]
        if len({len(trunk) for trunk in trunks}) > 1:
            raise ZooError(
                "these models differ in trunk, so their weights have no distance: filter by `architecture`"
            )
        return torch.stack(trunks)

    def describe(self, num_images: int) -> list[str]:
        """One line a group: how its forward runs on this number of images.

        Raises:
            ZooError: for less than one image.
        """
        if num_images < 1:
            raise ZooError(f"num_images is {num_images}; expected at least 1")
        lines = []
        for group in self.groups:
            models, images = group.tile(self.device, num_images, self.precision, self._scale[0])
            way = "batched products" if models > 1 else "one model at a time"
            way = way if group.batched is not None else "the module itself, one model at a time"
            lines.append(
                f"{len(group.positions)} models of {group.layout.num_parameters:,} parameters: {way},"
                f" tiles of {models} models x {images} images, {self.precision} on {self.device}"
            )
        return lines

    def _check_images(self, group: Group, images: Tensor) -> None:
        if group.batched is not None and tuple(images.shape[1:]) != group.batched.image:
            raise ZooError(
                f"{self.model_ids[group.positions[0]]} cannot take images of shape {tuple(images.shape)}:"
                f" it takes [N, {', '.join(map(str, group.batched.image))}]"
            )

    def _run(self, group: Group, images: Tensor, readout: str | None) -> Iterator[tuple[int, Outputs]]:
        """Outputs of tiles of models on all images: number of the first model, and the outputs of the tile."""
        dtype = PRECISIONS[self.precision]
        inputs = group.batched.patches(images) if group.batched is not None else images
        models, _ = group.tile(self.device, len(images), self.precision, self._scale[0])
        for first, tensors in weights_of_tiles(group, models, self.device, dtype):
            names = [self.model_ids[position] for position in group.positions[first : first + models]]
            outputs: Outputs | None = None
            start = 0
            while start < len(inputs):
                # again for each part: tiles may have been halved since the last one
                _, step = group.tile(self.device, len(images), self.precision, self._scale[0])
                try:
                    with products_in(self.precision):
                        part = forward(group, tensors, inputs[start : start + step], readout)
                except torch.OutOfMemoryError:
                    self._smaller(step)
                    continue
                # the CPU's allocator raises no error of its own class; timm asserts the size of images
                except (RuntimeError, AssertionError) as error:
                    if _is_out_of_memory(error):
                        self._smaller(step)
                        continue
                    if group.batched is not None:
                        raise  # its images were checked before: the fault is not in them
                    raise ZooError(f"{names[0]} cannot take images of shape {tuple(images.shape)}: {error}") from None
                # the next replay of a compiled graph overwrites its outputs: they are copied
                if step >= len(inputs) and self.precision == "float32" and group.forward is group.batched:
                    outputs = part  # nothing to join or to widen
                    break
                outputs = part.room_for(len(inputs)) if outputs is None else outputs
                outputs.fill(part, start)
                start += step
            assert outputs is not None
            yield first, outputs

    def _smaller(self, step: int) -> None:
        """Halve all further tiles after memory ran out."""
        if step == 1:
            raise ZooError(f"a single image does not fit into the memory of {self.device} beside the weights")
        self._scale[0] /= 2
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def _is_out_of_memory(error: BaseException) -> bool:
    # torch's CPU allocator says so on Linux, and on Windows
    return "can't allocate memory" in str(error) or "not enough memory" in str(error)
