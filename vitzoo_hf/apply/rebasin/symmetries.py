"""The symmetries of a plain pre-norm ViT: changes of its weights that do not change its function.

A `Symmetry` is one element of the group. Its parts act independently:

- hidden units of each MLP are permuted (rows of fc1, columns of fc2);
- heads of each block are permuted (rows of qkv, columns of proj);
- inside a head, queries are multiplied by an invertible M and keys by its inverse transposed, which preserves every
  product q·k; values are multiplied by an invertible N, and the columns of proj that read them by its inverse;
- channels of the residual stream are permuted, or rotated by an orthogonal R with R1 = 1, consistently in everything
  that writes into the stream or reads from it. LayerNorm without its scale commutes with such an R, with its scale
  only with permutations: rotations need norms of constant scale, see `vitzoo_hf.apply.rebasin.canonical.fold_norms`;
- hidden units of an MLP head are permuted and multiplied by positive numbers, with which ReLU commutes.

Signs of single channels are no symmetry, because LayerNorm subtracts the mean. GELU does not commute with scales.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from vitzoo_hf.format.layout import Layout, unflatten
from vitzoo_hf.format.messages import did_you_mean
from vitzoo_hf.format.row import Row, RowLike
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.models.architecture import Architecture
from vitzoo_hf.models.vit import is_plain

Tensors = dict[str, Tensor]
FAMILIES = ("mlp", "heads", "maps", "residual", "invertible", "rotation")
"""Families of symmetries; a family comes after the one it requires: see `check_families`."""


class Sizes(NamedTuple):
    """Sizes that determine the symmetries of a plain ViT; `classifier` is the hidden width of an MLP head, else 0."""

    depth: int
    width: int
    heads: int
    hidden: int
    classifier: int


def sizes_of(row: RowLike) -> tuple[Sizes, Layout]:
    """Sizes and layout of a row's architecture.

    Raises:
        ZooError: if the architecture is not a plain pre-norm ViT, whose symmetries are known.
    """
    architecture = Architecture.of(row)
    model: Any = architecture.skeleton
    if not is_plain(model):
        raise ZooError(
            f"{Row.of(row).name} is a {architecture.name} with parts whose symmetries are not known:"
            " re-basin takes plain pre-norm ViTs (learned positions, class token, GELU, no layer scale, no q/k norm)"
        )
    block = model.blocks[0]
    width, hidden = model.embed_dim, block.mlp.fc1.out_features
    sizes = Sizes(len(model.blocks), width, block.attn.num_heads, hidden, architecture.head_hidden or 0)
    return sizes, architecture.layout


def check_families(families: Sequence[str]) -> tuple[str, ...]:
    """Families in the order of `FAMILIES`.

    Raises:
        ZooError: for an unknown family, or `invertible` without `maps`, or `rotation` without `residual`.
    """
    for name in families:
        if name not in FAMILIES:
            raise ZooError(f"unknown family of symmetries {name!r}: {did_you_mean(name, FAMILIES)}")
    # both widen a part of a symmetry that only the other family sets free
    for name, needed in (("invertible", "maps"), ("rotation", "residual")):
        if name in families and needed not in families:
            raise ZooError(f"family {name!r} widens {needed!r}: give both")
    return tuple(name for name in FAMILIES if name in families)


@dataclass(frozen=True)
class Symmetry:
    """An element of the group of symmetries; all parts are on the CPU.

    Attributes:
        hidden: for every block and place, the hidden unit that moves there.
        heads: for every block and place, the head that moves there.
        query_key: M of the head at each new place: W_q becomes M W_q, W_k becomes M^-T W_k, and so do the biases.
        value: N of the head at each new place: W_v becomes N W_v, its columns of proj are multiplied by N^-1.
        residual: R, orthogonal with R1 = 1: the stream x becomes R x.
        classifier: for every place of an MLP head, the hidden unit that moves there; empty for a linear head.
        classifier_scale: positive factor of the unit at each new place.

    Example:
        >>> sizes = Sizes(depth=1, width=4, heads=2, hidden=8, classifier=0)
        >>> g = Symmetry.random(sizes, seed=1)
        >>> bool((g.inverse().after(g).residual - torch.eye(4)).abs().max() < 1e-12)
        True
    """

    hidden: Int64[Tensor, "L H"]
    heads: Int64[Tensor, "L h"]
    query_key: Float64[Tensor, "L h k k"]
    value: Float64[Tensor, "L h k k"]
    residual: Float64[Tensor, "d d"]
    classifier: Int64[Tensor, " m"]
    classifier_scale: Float64[Tensor, " m"]

    @classmethod
    def identity(cls, sizes: Sizes) -> "Symmetry":
        """The element that changes nothing."""
        # float64, because products of many maps are inverted and must return to the identity
        eye = torch.eye(sizes.width // sizes.heads, dtype=torch.float64).expand(sizes.depth, sizes.heads, -1, -1)
        return cls(
            hidden=torch.arange(sizes.hidden).repeat(sizes.depth, 1),
            heads=torch.arange(sizes.heads).repeat(sizes.depth, 1),
            # clones: an expanded tensor shares one memory, and `improve` writes single blocks in place
            query_key=eye.clone(),
            value=eye.clone(),
            residual=torch.eye(sizes.width, dtype=torch.float64),
            classifier=torch.arange(sizes.classifier),
            classifier_scale=torch.ones(sizes.classifier, dtype=torch.float64),
        )

    @classmethod
    def random(cls, sizes: Sizes, *, seed: int, families: Sequence[str] = FAMILIES[:4]) -> "Symmetry":
        """A random element of some families; equal seeds give equal elements.

        Permutations are uniform, `maps` and `rotation` are uniform orthogonal matrices. `invertible` multiplies their
        singular values by exp(0.3 z) with standard normal z.

        Raises:
            ZooError: for families that `check_families` refuses.
        """
        families = check_families(families)
        generator = torch.Generator().manual_seed(seed)
        g = cls.identity(sizes)
        if "mlp" in families:
            g = replace(g, hidden=_random_orders(g.hidden, generator))
            g = replace(g, classifier=_random_orders(g.classifier[None], generator)[0])
        if "heads" in families:
            g = replace(g, heads=_random_orders(g.heads, generator))
        if "maps" in families:
            spread = 0.3 if "invertible" in families else 0.0  # 0.3: maps stay well conditioned
            query_key, value = (_random_maps(part, spread, generator) for part in (g.query_key, g.value))
            scale = torch.exp(0.3 * torch.randn(sizes.classifier, dtype=torch.float64, generator=generator))
            g = replace(g, query_key=query_key, value=value, classifier_scale=scale)
        if "residual" in families:
            order = torch.randperm(sizes.width, generator=generator)
            g = replace(g, residual=g.residual[order])
        if "rotation" in families:
            # LayerNorm removes the direction of ones, so only the other d - 1 directions may rotate
            inner = _random_maps(torch.eye(sizes.width - 1, dtype=torch.float64), 0.0, generator)
            g = replace(g, residual=rotation_from_inner(inner))
        return g

    def after(self, first: "Symmetry") -> "Symmetry":
        """The composition: `first`, then this element."""
        heads = first.heads.gather(1, self.heads)  # maps belong to new places, so those of `first` move with heads
        blocks = torch.arange(len(heads))[:, None]
        return Symmetry(
            hidden=first.hidden.gather(1, self.hidden),
            heads=heads,
            query_key=self.query_key @ first.query_key[blocks, self.heads],
            value=self.value @ first.value[blocks, self.heads],
            residual=self.residual @ first.residual,
            classifier=first.classifier[self.classifier],
            classifier_scale=self.classifier_scale * first.classifier_scale[self.classifier],
        )

    def inverse(self) -> "Symmetry":
        """The inverse element."""
        back, units = self.heads.argsort(1), self.classifier.argsort()
        blocks = torch.arange(len(back))[:, None]
        return Symmetry(
            hidden=self.hidden.argsort(1),
            heads=back,
            query_key=torch.linalg.inv(self.query_key)[blocks, back],
            value=torch.linalg.inv(self.value)[blocks, back],
            # the residual part is orthogonal, so its transpose is its inverse without rounding
            residual=self.residual.mT.contiguous(),
            classifier=units,
            classifier_scale=1 / self.classifier_scale[units],
        )

    @property
    def sizes(self) -> Sizes:
        """Sizes of the ViTs that this element acts on."""
        (depth, hidden), heads = self.hidden.shape, self.heads.shape[1]
        return Sizes(depth, len(self.residual), heads, hidden, len(self.classifier))


def apply(vector: Float[Tensor, " D"], layout: Layout, symmetry: Symmetry) -> Float[Tensor, " D"]:
    """Apply a symmetry to weights: other weights of the same function, computed in float64.

    Args:
        vector: weights of a plain ViT, of any float type, which the result has too.
        layout: layout of the vector.
        symmetry: element to apply, of the sizes of the ViT.

    Raises:
        ZooError: if sizes differ, or the symmetry rotates a residual stream with norms of varying scale.

    Example:
        >>> from vitzoo_hf.zoo import Zoo
        >>> from vitzoo_hf.apply.candidates import candidate_logits
        >>> row = next(Zoo.sample().filter(head="mlp").rows())
        >>> (sizes, layout), vector = sizes_of(row), torch.from_numpy(row["weights"])
        >>> changed = apply(vector, layout, Symmetry.random(sizes, seed=0))
        >>> logits = candidate_logits(torch.stack([vector, changed]), row, torch.randn(4, 1, 16, 16))
        >>> bool((vector - changed).norm() > 1), bool((logits[0] - logits[1]).abs().max() < 1e-5)
        (True, True)
    """
    tensors = to_tensors(vector, layout)
    transform(tensors, symmetry)
    return to_vector(tensors, vector)


def to_tensors(vector: Float[Tensor, " D"], layout: Layout) -> Tensors:
    """A float64 copy of the tensors of a vector, which may be changed in place."""
    return unflatten(vector.detach().double().clone(), layout)


def to_vector(tensors: Mapping[str, Tensor], like: Float[Tensor, " D"]) -> Float[Tensor, " D"]:
    """Tensors in the order of the layout as one vector, with the type and device of `like`."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors.values()]).to(like)


def transform(tensors: Tensors, symmetry: Symmetry) -> None:
    """Apply a symmetry to float64 tensors of a plain ViT in place."""
    _check_sizes(tensors, symmetry.sizes)
    for block in range(len(symmetry.heads)):
        permute_hidden(tensors, block, symmetry.hidden[block])
        transform_heads(tensors, block, symmetry.heads[block], symmetry.query_key[block], symmetry.value[block])
    transform_residual(tensors, symmetry.residual)
    if len(symmetry.classifier):
        transform_classifier(tensors, symmetry.classifier, symmetry.classifier_scale)


def permute_hidden(tensors: Tensors, block: int, order: Int64[Tensor, " H"]) -> None:
    """Move hidden unit `order[i]` of a block's MLP to place i."""
    prefix = f"blocks.{block}.mlp."
    place = order.to(tensors[f"{prefix}fc1.bias"].device)
    for name, axis in (("fc1.weight", 0), ("fc1.bias", 0), ("fc2.weight", 1)):
        tensors[prefix + name] = tensors[prefix + name].index_select(axis, place)


def transform_heads(
    tensors: Tensors,
    block: int,
    order: Int64[Tensor, " h"],
    query_key: Float64[Tensor, "h k k"],
    value: Float64[Tensor, "h k k"],
) -> None:
    """Move head `order[i]` of a block to place i, and multiply its queries, keys, values and outputs by its maps."""
    parts = head_parts(tensors, block, len(order))
    device = parts.query.device
    place, M, N = order.to(device), query_key.to(device), value.to(device)
    query, key, values, output = (part[place] for part in parts)
    # solve rather than multiply by an inverse: exact to rounding for maps that are not orthogonal
    changed = HeadParts(
        M @ query, torch.linalg.solve(M.mT, key), N @ values, torch.linalg.solve(N, output, left=False)
    )
    set_head_parts(tensors, block, changed)


class HeadParts(NamedTuple):
    """The weights of every head: queries, keys and values with their bias as last column, and its columns of proj."""

    query: Float64[Tensor, "h k d1"]
    key: Float64[Tensor, "h k d1"]
    value: Float64[Tensor, "h k d1"]
    output: Float64[Tensor, "h d k"]


def head_parts(tensors: Tensors, block: int, heads: int) -> HeadParts:
    """The parts of every head of a block."""
    prefix = f"blocks.{block}.attn."
    weight, bias = tensors[f"{prefix}qkv.weight"], tensors[f"{prefix}qkv.bias"]
    query, key, value = torch.cat([weight, bias[:, None]], 1).view(3, heads, -1, weight.shape[1] + 1)
    projection = tensors[f"{prefix}proj.weight"]
    return HeadParts(query, key, value, projection.view(len(projection), heads, -1).transpose(0, 1))


def set_head_parts(tensors: Tensors, block: int, parts: HeadParts) -> None:
    """Write the parts of every head of a block into its tensors."""
    prefix = f"blocks.{block}.attn."
    joined = torch.stack(parts[:3]).flatten(0, 2)
    # copies, so that weight and bias do not share the memory of `joined`
    tensors[f"{prefix}qkv.weight"], tensors[f"{prefix}qkv.bias"] = joined[:, :-1].contiguous(), joined[:, -1].clone()
    tensors[f"{prefix}proj.weight"] = parts.output.transpose(0, 1).flatten(1)


def channel_axes(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Tensors that write into the residual stream, read from it or scale it -> their axis of channels."""
    axes = dict.fromkeys(("cls_token", "pos_embed"), 2)
    for name in tensors:
        if name.endswith(("attn.qkv.weight", "mlp.fc1.weight")) or name in ("head.weight", "head.0.weight"):
            axes[name] = 1
        elif name.startswith(("patch_embed.", "norm.")) or ".norm" in name or ".proj." in name or ".fc2." in name:
            axes[name] = 0
    return axes


def transform_residual(tensors: Tensors, residual: Float64[Tensor, "d d"]) -> None:
    """Multiply the residual stream by an orthogonal matrix that preserves the vector of ones."""
    order = order_of(residual)  # permutations move numbers, and so change no bit
    if order is None:
        _check_constant_norms(tensors)
    elif torch.equal(order, torch.arange(len(order))):
        return
    for name, axis in channel_axes(tensors).items():
        tensor = tensors[name]
        if order is not None:
            tensors[name] = tensor.index_select(axis, order.to(tensor.device))
        elif not _is_norm_scale(name):
            changed = torch.tensordot(residual.to(tensor.device), tensor, dims=([1], [axis]))
            tensors[name] = changed.movedim(0, axis).contiguous()


def transform_classifier(tensors: Tensors, order: Int64[Tensor, " m"], scale: Float64[Tensor, " m"]) -> None:
    """Move hidden unit `order[i]` of an MLP head to place i, and multiply it by `scale[i]`."""
    place, factor = order.to(tensors["head.0.bias"].device), scale.to(tensors["head.0.bias"].device)
    tensors["head.0.weight"] = tensors["head.0.weight"][place] * factor[:, None]
    tensors["head.0.bias"] = tensors["head.0.bias"][place] * factor
    tensors["head.2.weight"] = tensors["head.2.weight"][:, place] / factor


def order_of(matrix: Float64[Tensor, "d d"]) -> Int64[Tensor, " d"] | None:
    """The order of rows that a permutation matrix produces; None for any other matrix."""
    # compared exactly: a rotation close to a permutation must still act as a rotation
    order = matrix.argmax(1)
    return order if torch.equal(matrix, torch.eye(len(matrix), dtype=matrix.dtype)[order]) else None


def rotation_from_inner(inner: Float64[Tensor, "e e"]) -> Float64[Tensor, "d d"]:
    """The matrix R with R1 = 1 that acts as `inner` on vectors of mean zero, in the basis of `zero_mean_basis`."""
    d = len(inner) + 1
    basis = zero_mean_basis(d)
    # 1/d everywhere is the projection on the vector of ones, which R must leave in place
    return basis @ inner @ basis.T + torch.full((d, d), 1 / d, dtype=torch.float64)


def zero_mean_basis(width: int) -> Float64[Tensor, "d e"]:
    """An orthonormal basis of the vectors of mean zero (Helmert's), as columns; e = d - 1."""
    basis = torch.zeros(width, width - 1, dtype=torch.float64)
    for column in range(1, width):
        basis[:column, column - 1], basis[column, column - 1] = 1.0, -column
    return basis / basis.norm(dim=0)


def _random_orders(like: Int64[Tensor, "L n"], generator: torch.Generator) -> Int64[Tensor, "L n"]:
    return torch.stack([torch.randperm(like.shape[1], generator=generator) for _ in like])


def _random_maps(like: Float64[Tensor, "*L k k"], spread: float, generator: torch.Generator) -> Tensor:
    def orthogonal() -> Tensor:
        q, r = torch.linalg.qr(torch.randn(like.shape, dtype=torch.float64, generator=generator))
        # positive diagonals of r make q uniform over orthogonal matrices (Mezzadri 2007)
        return q * r.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]

    left = orthogonal()
    if not spread:
        return left
    values = torch.exp(spread * torch.randn(like.shape[:-1], dtype=torch.float64, generator=generator))
    return (left * values[..., None, :]) @ orthogonal()


def _check_sizes(tensors: Mapping[str, Tensor], sizes: Sizes) -> None:
    depth = sum(name.endswith("mlp.fc1.weight") for name in tensors)
    hidden, width = tensors["blocks.0.mlp.fc1.weight"].shape
    classifier = len(tensors["head.0.bias"]) if "head.0.bias" in tensors else 0
    actual = Sizes(depth, width, sizes.heads, hidden, classifier)
    if actual != sizes:
        raise ZooError(f"a symmetry of ViTs with {sizes} does not act on one with {actual}: take one of its sizes")


def _is_norm_scale(name: str) -> bool:
    return "norm" in name and name.endswith(".weight")


def _check_constant_norms(tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if _is_norm_scale(name) and not torch.equal(tensor, tensor[:1].expand_as(tensor)):
            raise ZooError(
                f"the scale of {name} is not constant, so the residual stream cannot be rotated, only permuted:"
                " fold the norms first (vitzoo_hf.apply.rebasin.canonical.fold_norms)"
            )
