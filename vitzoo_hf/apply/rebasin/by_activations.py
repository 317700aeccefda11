"""Alignment by activations: the symmetry that makes two ViTs' activations on some images most similar.

Activation matching of Git Re-Basin (Ainsworth et al. 2023; Li et al. 2016), generalised to all symmetries of a ViT.
Hidden units are paired by the correlation of their outputs, channels of the residual stream by their correlation
after every block, heads by the Procrustes similarity of queries, keys and values. Rotations of the stream are
Procrustes solutions. Every part follows from the activations alone, so there is nothing to iterate. All tokens of all
images count; memory is their second moments, which are summed batch by batch. The cost is one run of both models on
all images.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn

from vitzoo_hf.apply.rebasin.by_weights import best_order, best_rotation, pair_heads
from vitzoo_hf.apply.rebasin.symmetries import Sizes, Symmetry, Tensors, check_families
from vitzoo_hf.format.row import RowLike
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.models.architecture import Architecture

# not a setting of the result: the moments are sums over all batches
BATCH = 128
ZERO = torch.zeros((), dtype=torch.float64)
Hook = Callable[[nn.Module, object, Tensor], None]


@dataclass
class Moments:
    """Sums over samples of the activations of two models, and of products of activations."""

    samples: int = 0
    sums: list[Tensor] = field(default_factory=lambda: [ZERO, ZERO])
    squares: list[Tensor] = field(default_factory=lambda: [ZERO, ZERO])
    products: Tensor = ZERO

    def update(self, one: Float[Tensor, "n a"], other: Float[Tensor, "n b"]) -> None:
        """Add samples."""
        first, second = one.double(), other.double()  # covariances are differences of large sums
        self.samples += len(first)
        for position, values in enumerate((first, second)):
            self.sums[position] = self.sums[position] + values.sum(0)
            self.squares[position] = self.squares[position] + values.square().sum(0)
        self.products = self.products + first.T @ second

    def covariance(self) -> Float64[Tensor, "a b"]:
        """Covariance of every unit of the first model with every unit of the second."""
        return (self.products - torch.outer(*self.sums) / self.samples).cpu() / self.samples

    def deviations(self) -> tuple[Float64[Tensor, " a"], Float64[Tensor, " b"]]:
        """Standard deviation of every unit of each model."""
        one, other = (
            (square / self.samples - (total / self.samples).square()).clamp_min(0).sqrt().cpu()
            for total, square in zip(self.sums, self.squares, strict=True)
        )
        return one, other

    def correlation(self) -> Float64[Tensor, "a b"]:
        """Correlation of every unit of the first model with every unit of the second; 0 where one is constant."""
        one, other = self.deviations()
        scale = torch.outer(one, other)
        return torch.where(scale > 1e-12, self.covariance() / scale.clamp_min(1e-12), 0.0)

    def similarity(self) -> Float64[Tensor, "a b"]:
        """Products without centring, divided by the norms of all activations of each model."""
        norms = [square.sum().sqrt() for square in self.squares]
        return (self.products / (norms[0] * norms[1]).clamp_min(1e-12)).cpu()


def align_by_activations(
    target: Tensors,
    source: Tensors,
    like: RowLike,
    sizes: Sizes,
    families: Sequence[str],
    images: Float[Tensor, "N C H W"],
    *,
    device: str | torch.device = "cpu",
) -> Symmetry:
    """The symmetry of some families that makes the activations of `source` most similar to those of `target`.

    Args:
        target: float64 tensors prepared for these families by `canonical.prepare`.
        source: float64 tensors of the model to be changed, prepared like those of `target`.
        like: a row with the architecture and head of the models.
        sizes: sizes of the models.
        families: families of symmetries to use.
        images: normalised images, ready for the models, which no result is reported on.
        device: where the models run.

    Raises:
        ZooError: if there is no image, or for families that `check_families` refuses.
    """
    families = check_families(families)
    if not len(images):
        raise ZooError("no images were given for alignment by activations: give selection images")
    moments: dict[str, Moments] = {}
    models = [_watched(tensors, like, sizes, device) for tensors in (target, source)]
    with torch.inference_mode():
        for batch in images.split(BATCH):
            for name, one, other in _activations(models, batch.to(device)):
                moments.setdefault(name, Moments()).update(one, other)
    return _symmetry(moments, sizes, families)


def _symmetry(moments: Mapping[str, Moments], sizes: Sizes, families: Sequence[str]) -> Symmetry:
    symmetry = Symmetry.identity(sizes)
    for block in range(sizes.depth):
        if "mlp" in families:
            symmetry.hidden[block] = best_order(moments[f"hidden {block}"].correlation())
        if {"heads", "maps"} & set(families):
            query, key, value = (
                _by_head(moments[f"{part} {block}"].similarity(), sizes.heads) for part in ("query", "key", "value")
            )
            heads = pair_heads((query + key) / 2, value, families)
            symmetry.heads[block], symmetry.query_key[block], symmetry.value[block] = heads
    if sizes.classifier and "mlp" in families:
        symmetry = replace(symmetry, classifier=best_order(moments["classifier"].correlation()))
    if sizes.classifier and "maps" in families:
        one, other = moments["classifier"].deviations()
        other = other[symmetry.classifier]
        alive = (one > 1e-6) & (other > 1e-6)  # units that ReLU never passes have no scale to compare
        symmetry = replace(symmetry, classifier_scale=torch.where(alive, one / other.clamp_min(1e-6), 1.0))
    if "rotation" in families:
        gain = reduce(torch.add, [_relative(moments[f"stream {block}"]) for block in range(sizes.depth + 1)])
        symmetry = replace(symmetry, residual=best_rotation(gain))
    elif "residual" in families:
        gain = reduce(torch.add, [moments[f"stream {block}"].correlation() for block in range(sizes.depth + 1)])
        symmetry = replace(symmetry, residual=symmetry.residual[best_order(gain)])
    return symmetry


def _relative(moments: Moments) -> Tensor:
    """Covariances of channels divided by the spread of both models, so that every block has equal weight."""
    one, other = moments.deviations()
    # the bound guards channels that are constant on all images: they then gain 0, not NaN
    return moments.covariance() / (one.norm() * other.norm()).clamp_min(1e-12)


def _by_head(similarity: Float64[Tensor, "d d"], heads: int) -> Float64[Tensor, "h h k k"]:
    return similarity.view(heads, len(similarity) // heads, heads, -1).transpose(1, 2)


def _watched(
    tensors: Tensors, like: RowLike, sizes: Sizes, device: str | torch.device
) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model, and the dictionary into which every forward writes its activations, `[samples, units]`."""
    # float32, the type in which models run; only the sums of `Moments` are float64
    placed = {name: tensor.to(device, torch.float32) for name, tensor in tensors.items()}
    model: Any = Architecture.of(like).module(placed)
    activations: dict[str, Tensor] = {}

    def keep(name: str) -> Hook:
        # tokens of all images count as samples, so all axes but the last are joined
        return lambda module, inputs, result: activations.__setitem__(name, result.flatten(0, -2))

    def keep_qkv(block: int) -> Hook:
        def hook(module: nn.Module, inputs: object, result: Tensor) -> None:
            for part, values in zip(("query", "key", "value"), result.flatten(0, -2).chunk(3, dim=1), strict=True):
                activations[f"{part} {block}"] = values

        return hook

    model.norm_pre.register_forward_hook(keep("stream 0"))
    for number, block in enumerate(model.blocks):
        block.register_forward_hook(keep(f"stream {number + 1}"))
        block.attn.qkv.register_forward_hook(keep_qkv(number))
        block.mlp.act.register_forward_hook(keep(f"hidden {number}"))
    if sizes.classifier:
        model.head[1].register_forward_hook(keep("classifier"))
    return model, activations


def _activations(
    models: Sequence[tuple[nn.Module, dict[str, Tensor]]], images: Tensor
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, activations of the first model, activations of the second."""
    for model, _ in models:
        model(images)
    (_, one), (_, other) = models
    for name in one:
        yield name, one[name], other[name]
