"""Alignment by activations: the symmetry that makes two ViTs' activations on the same images most alike.

Activation matching of Git Re-Basin (Ainsworth et al. 2023; Li et al. 2016), generalised to all symmetries of a ViT.
Hidden units are paired by the correlation of what they give, channels of the residual stream by theirs after every
block; heads by the Procrustes similarity of queries, keys and values; the residual stream is rotated by Procrustes.
Every part is chosen on its own from the activations alone, so there is nothing to iterate. Activations of all tokens
of all images count; only their products of second order are kept, image batch by image batch.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from vitzoo_hf.apply.rebasin.by_weights import best_order, best_rotation, pair_heads
from vitzoo_hf.apply.rebasin.symmetries import Sizes, Symmetry, Tensors, check_families
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.models.architecture import Architecture

BATCH = 128


@dataclass
class Moments:
    """Sums over samples of the activations of two models, and of their products."""

    samples: int = 0
    sums: list[Any] = field(default_factory=lambda: [0.0, 0.0])
    squares: list[Any] = field(default_factory=lambda: [0.0, 0.0])
    products: Any = 0.0

    def update(self, one: Float[Tensor, "n a"], other: Float[Tensor, "n b"]) -> None:
        """Add samples."""
        first, second = one.double(), other.double()
        self.samples += len(first)
        for position, values in enumerate((first, second)):
            self.sums[position] = self.sums[position] + values.sum(0)
            self.squares[position] = self.squares[position] + values.square().sum(0)
        self.products = self.products + first.T @ second

    def covariance(self) -> Float64[Tensor, "a b"]:
        """Of every unit of the one model with every unit of the other."""
        return (self.products - torch.outer(*self.sums) / self.samples).cpu() / self.samples

    def deviations(self) -> tuple[Float64[Tensor, " a"], Float64[Tensor, " b"]]:
        """Standard deviation of every unit of each model."""
        one, other = (
            (square / self.samples - (total / self.samples).square()).clamp_min(0).sqrt().cpu()
            for total, square in zip(self.sums, self.squares, strict=True)
        )
        return one, other

    def correlation(self) -> Float64[Tensor, "a b"]:
        """Of every pair of units; 0 where one is constant."""
        one, other = self.deviations()
        scale = torch.outer(one, other)
        return torch.where(scale > 1e-12, self.covariance() / scale.clamp_min(1e-12), 0.0)

    def similarity(self) -> Float64[Tensor, "a b"]:
        """Products without centring, over the norms of all activations of each model."""
        norms = [square.sum().sqrt() for square in self.squares]
        return (self.products / (norms[0] * norms[1]).clamp_min(1e-12)).cpu()


def align_by_activations(
    target: Tensors,
    source: Tensors,
    like: Mapping[str, Any],
    sizes: Sizes,
    families: Sequence[str],
    images: Float[Tensor, "N C H W"],
    *,
    device: str | torch.device = "cpu",
) -> Symmetry:
    """The symmetry of some families that makes the activations of `source` most like those of `target`.

    Args:
        target: float64 tensors prepared for these families by `canonical.prepare`.
        source: the same of the model to be changed.
        like: a row of their architecture and head.
        sizes: of both.
        families: that may be used.
        images: prepared as the models are fed them, not those that results are reported on.
        device: where the models run.

    Raises:
        ZooError: if there is no image, or for families that `check_families` refuses.
    """
    chosen = check_families(families)
    if not len(images):
        raise ZooError("alignment by activations needs images; none were given")
    moments: dict[str, Moments] = {}
    models = [_watched(tensors, like, sizes, device) for tensors in (target, source)]
    with torch.inference_mode():
        for batch in images.split(BATCH):
            for name, one, other in _activations(models, batch.to(device)):
                moments.setdefault(name, Moments()).update(one, other)
    return _symmetry(moments, sizes, chosen)


def _symmetry(moments: Mapping[str, Moments], sizes: Sizes, families: Sequence[str]) -> Symmetry:
    found = Symmetry.identity(sizes)
    for block in range(sizes.depth):
        if "mlp" in families:
            found.hidden[block] = best_order(moments[f"hidden {block}"].correlation())
        if {"heads", "maps"} & set(families):
            query, key, value = (
                _by_head(moments[f"{part} {block}"].similarity(), sizes.heads) for part in ("query", "key", "value")
            )
            heads = pair_heads((query + key) / 2, value, families)
            found.heads[block], found.query_key[block], found.value[block] = heads
    if sizes.classifier and "mlp" in families:
        found = replace(found, classifier=best_order(moments["classifier"].correlation()))
    if sizes.classifier and "maps" in families:
        one, other = moments["classifier"].deviations()
        other = other[found.classifier]
        alive = (one > 1e-6) & (other > 1e-6)
        found = replace(found, classifier_scale=torch.where(alive, one / other.clamp_min(1e-6), 1.0))
    if "rotation" in families:
        covariances = [moments[f"stream {block}"] for block in range(sizes.depth + 1)]
        found = replace(found, residual=best_rotation(sum(_relative(part) for part in covariances)))  # type: ignore[arg-type]
    elif "residual" in families:
        gain = sum(moments[f"stream {block}"].correlation() for block in range(sizes.depth + 1))
        found = replace(found, residual=found.residual[best_order(gain)])  # type: ignore[arg-type]
    return found


def _relative(moments: Moments) -> Tensor:
    """Covariances of channels over the spread of each model, so that every block counts alike."""
    one, other = moments.deviations()
    return moments.covariance() / (one.norm() * other.norm()).clamp_min(1e-12)


def _by_head(similarity: Float64[Tensor, "d d"], heads: int) -> Float64[Tensor, "h h k k"]:
    return similarity.view(heads, len(similarity) // heads, heads, -1).transpose(1, 2)


def _watched(
    tensors: Tensors, like: Mapping[str, Any], sizes: Sizes, device: str | torch.device
) -> tuple[Any, dict[str, Tensor]]:
    """A model, and the dictionary into which each forward puts its activations, `[samples, units]`."""
    there = {name: tensor.to(device, torch.float32) for name, tensor in tensors.items()}
    model: Any = Architecture.of(like).module(there)
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda module, given, result: seen.__setitem__(name, result.flatten(0, -2))

    def keep_qkv(block: int) -> Any:
        def hook(module: Any, given: Any, result: Tensor) -> None:
            for part, values in zip(("query", "key", "value"), result.flatten(0, -2).chunk(3, dim=1), strict=True):
                seen[f"{part} {block}"] = values

        return hook

    model.norm_pre.register_forward_hook(keep("stream 0"))
    for number, block in enumerate(model.blocks):
        block.register_forward_hook(keep(f"stream {number + 1}"))
        block.attn.qkv.register_forward_hook(keep_qkv(number))
        block.mlp.act.register_forward_hook(keep(f"hidden {number}"))
    if sizes.classifier:
        model.head[1].register_forward_hook(keep("classifier"))
    return model, seen


def _activations(
    models: Sequence[tuple[Any, dict[str, Tensor]]], images: Tensor
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, activations of the one model, those of the other."""
    for model, _ in models:
        model(images)
    (_, one), (_, other) = models
    for name in one:
        yield name, one[name], other[name]
