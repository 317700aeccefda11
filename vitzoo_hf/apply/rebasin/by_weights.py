"""Alignment by weights: the symmetry that brings the weights of one ViT closest to those of another.

Coordinate descent on the squared distance of all weights: one part of a `Symmetry` at a time goes to its optimum, the
other parts fixed. This generalises the weight matching of Ainsworth et al. 2023 (Git Re-Basin). Permutations are
linear assignments; maps inside heads and rotations of the residual stream are orthogonal Procrustes problems. Heads
and their maps are optimised together, with the best map of every pair of heads as the gain of pairing them. The
distance never rises. It has many local optima where the residual stream is free; `restarts` adds random starts.

Invertible maps and rotations are aligned in the canonical form of both models: see
`vitzoo_hf.apply.rebasin.canonical`.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Float64, Int64
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from vitzoo_hf.apply.rebasin.symmetries import (
    HeadParts,
    Sizes,
    Symmetry,
    Tensors,
    channel_axes,
    check_families,
    head_parts,
    permute_hidden,
    rotation_from_inner,
    transform,
    transform_classifier,
    transform_heads,
    transform_residual,
    zero_mean_basis,
)

LEAST_DECREASE = 1e-7
"""Least decrease of the squared distance in a sweep, relative to the start; descent ends below it."""


class Alignment(NamedTuple):
    """The symmetry to apply to the source, and the squared distance of weights before and after every sweep."""

    symmetry: Symmetry
    squared_distances: list[float]


def align_by_weights(
    target: Tensors,
    source: Tensors,
    sizes: Sizes,
    families: Sequence[str],
    *,
    seed: int = 0,
    restarts: int = 0,
    sweeps: int = 50,
    start: Symmetry | None = None,
) -> Alignment:
    """The symmetry of some families that brings `source` close to `target`.

    Args:
        target: float64 tensors, on any device, prepared for these families by `canonical.prepare`.
        source: float64 tensors of the model to align, prepared like those of `target`; not changed.
        sizes: sizes of the models.
        families: families of symmetries to use.
        seed: seed of the order of parts in each sweep and of random starts.
        restarts: number of descents from random elements, beside the one from `start`; the closest is returned.
        sweeps: largest number of sweeps.
        start: the element to descend from, the identity by default.

    Raises:
        ZooError: for families that `check_families` refuses.

    Example:
        >>> from vitzoo_hf.apply.rebasin.symmetries import sizes_of, to_tensors
        >>> from vitzoo_hf.zoo import Zoo
        >>> row = next(Zoo.sample().rows())
        >>> sizes, layout = sizes_of(row)
        >>> target = to_tensors(torch.from_numpy(row["weights"]), layout)
        >>> source = dict(target)
        >>> transform(source, Symmetry.random(sizes, seed=0, families=("mlp", "heads", "maps")))
        >>> align_by_weights(target, source, sizes, ("mlp", "heads", "maps")).squared_distances[-1] < 1e-9
        True
    """
    families = check_families(families)
    generator = torch.Generator().manual_seed(seed)
    starts = [start if start is not None else Symmetry.identity(sizes)]
    # in the canonical form, what is left of invertible maps is orthogonal
    plain = [name for name in families if name != "invertible"]
    starts += [
        Symmetry.random(sizes, seed=int(torch.randint(2**31, (1,), generator=generator)), families=plain)
        for _ in range(restarts)
    ]
    descents = [_descend(target, source, families, first, generator, sweeps) for first in starts]
    # of equal distances `min` takes the first: the descent from `start` goes before random ones
    return min(descents, key=lambda alignment: alignment.squared_distances[-1])


def squared_distance(first: Tensors, second: Tensors) -> float:
    """‖first − second‖² over all tensors."""
    return float(sum((first[name] - second[name]).square().sum() for name in first))


def _descend(
    target: Tensors,
    source: Tensors,
    families: tuple[str, ...],
    start: Symmetry,
    generator: torch.Generator,
    sweeps: int,
) -> Alignment:
    sizes = start.sizes
    # a shallow copy suffices: `transform` replaces tensors of the dictionary, never their values
    current, symmetry = dict(source), start
    transform(current, start)
    parts = _parts(sizes, families)
    distances = [squared_distance(target, current)]
    for _ in range(sweeps if parts else 0):
        # a new random order every sweep, as in Ainsworth et al. 2023
        for position in torch.randperm(len(parts), generator=generator).tolist():
            symmetry = improve(target, current, symmetry, parts[position], families)
        distances.append(squared_distance(target, current))
        alone = "residual" not in families  # then no part depends on another, and one sweep is the optimum
        if alone or distances[-2] - distances[-1] <= LEAST_DECREASE * distances[0]:
            break
    return Alignment(symmetry, distances)


def _parts(sizes: Sizes, families: Sequence[str]) -> list[tuple[str, int]]:
    """Parts of a symmetry that some families make variable: name and block of each."""
    blocks = range(sizes.depth)
    parts = [("hidden", block) for block in blocks] if "mlp" in families else []
    parts += [("attention", block) for block in blocks] if {"heads", "maps"} & set(families) else []
    parts += [("residual", 0)] if "residual" in families else []
    free = {"mlp", "maps"} & set(families)
    return parts + ([("classifier", 0)] if sizes.classifier and free else [])


def improve(
    target: Tensors, current: Tensors, symmetry: Symmetry, part: tuple[str, int], families: Sequence[str]
) -> Symmetry:
    """Bring one part to its optimum: change `current` in place, and return the symmetry with the new part."""
    kind, block = part
    step = Symmetry.identity(symmetry.sizes)
    if kind == "hidden":
        step.hidden[block] = order = match_hidden(target, current, block)
        permute_hidden(current, block, order)
    elif kind == "attention":
        heads = match_heads(target, current, block, symmetry.sizes.heads, families)
        step.heads[block], step.query_key[block], step.value[block] = heads
        transform_heads(current, block, *heads)
    elif kind == "residual":
        gain = residual_gain(target, current)
        residual = best_rotation(gain) if "rotation" in families else step.residual[best_order(gain)]
        step = replace(step, residual=residual)
        transform_residual(current, residual)
    else:
        order, scale = match_classifier(target, current, families)
        step = replace(step, classifier=order, classifier_scale=scale)
        transform_classifier(current, order, scale)
    # `current` already holds the earlier symmetry, so the step composes from the left
    return step.after(symmetry)


def best_order(gain: Float64[Tensor, "n n"]) -> Int64[Tensor, " n"]:
    """The order, place i taking `order[i]`, with the largest sum of gains: a linear assignment."""
    return torch.from_numpy(linear_sum_assignment(gain.cpu().numpy(), maximize=True)[1])


def best_rotation(gain: Float64[Tensor, "d d"]) -> Float64[Tensor, "d d"]:
    """The orthogonal R with R1 = 1 and the largest trace of Rᵀ gain: Procrustes on the vectors of mean zero."""
    basis = zero_mean_basis(len(gain))
    # the rotation must keep the vector of ones, so it is sought in the space orthogonal to it
    return rotation_from_inner(procrustes(basis.T @ gain.cpu() @ basis)[0])


def procrustes(
    gain: Float64[Tensor, "*L k k"],
) -> tuple[Float64[Tensor, "*L k k"], Float64[Tensor, "*L"]]:
    """The orthogonal M with the largest trace of Mᵀ gain, and that trace: the sum of the singular values of gain."""
    left, values, right = torch.linalg.svd(gain)
    return left @ right, values.sum(-1)


def match_hidden(target: Tensors, source: Tensors, block: int) -> Int64[Tensor, " H"]:
    """The order of the source's hidden units in a block's MLP that is closest to the target's."""
    prefix = f"blocks.{block}.mlp."
    gain = target[f"{prefix}fc1.weight"] @ source[f"{prefix}fc1.weight"].T
    # the squared distance is constant minus twice this inner product, biases included
    gain += torch.outer(target[f"{prefix}fc1.bias"], source[f"{prefix}fc1.bias"])
    gain += target[f"{prefix}fc2.weight"].T @ source[f"{prefix}fc2.weight"]
    return best_order(gain)


def match_heads(
    target: Tensors, source: Tensors, block: int, heads: int, families: Sequence[str]
) -> tuple[Int64[Tensor, " h"], Float64[Tensor, "h k k"], Float64[Tensor, "h k k"]]:
    """Order of the source's heads in a block, and the orthogonal maps of every head: query_key and value."""
    one, other = head_parts(target, block, heads), head_parts(source, block, heads)
    return pair_heads(*head_gains(one, other), families)


def head_gains(one: HeadParts, other: HeadParts) -> tuple[Float64[Tensor, "h h k k"], Float64[Tensor, "h h k k"]]:
    """Inner products over inputs for every pair of heads: of queries and keys, then of values and outputs."""

    def products(a: Tensor, b: Tensor) -> Tensor:
        return torch.einsum("ikn,jln->ijkl", a, b)

    query_key = products(one.query, other.query) + products(one.key, other.key)
    return query_key.cpu(), (products(one.value, other.value) + products(one.output.mT, other.output.mT)).cpu()


def pair_heads(
    query_key: Float64[Tensor, "h h k k"], value: Float64[Tensor, "h h k k"], families: Sequence[str]
) -> tuple[Int64[Tensor, " h"], Float64[Tensor, "h k k"], Float64[Tensor, "h k k"]]:
    """Order of heads and maps with the largest gain, from the inner products of every pair of heads."""
    h, k = query_key.shape[1:3]
    rows = torch.arange(h)
    if "maps" in families:
        (query_key_maps, query_key_gain), (value_maps, value_gain) = procrustes(query_key), procrustes(value)
        gain = query_key_gain + value_gain
    else:
        query_key_maps = value_maps = torch.eye(k, dtype=torch.float64).expand(h, h, k, k)
        gain = (query_key + value).diagonal(dim1=2, dim2=3).sum(-1)
    order = best_order(gain) if "heads" in families else rows
    return order, query_key_maps[rows, order].clone(), value_maps[rows, order].clone()


def residual_gain(target: Tensors, source: Tensors) -> Float64[Tensor, "d d"]:
    """Inner products of every channel of the target with every channel of the source, over all tensors."""
    gain: Tensor | float = 0.0
    for name, axis in channel_axes(target).items():
        one, other = (
            tensors[name].movedim(axis, 0).reshape(tensors[name].shape[axis], -1) for tensors in (target, source)
        )
        gain = gain + one @ other.T
    assert isinstance(gain, Tensor)
    return gain.cpu()


def match_classifier(
    target: Tensors, source: Tensors, families: Sequence[str]
) -> tuple[Int64[Tensor, " m"], Float64[Tensor, " m"]]:
    """Order (with `mlp`) and positive scale (with `maps`) of the hidden units of an MLP head.

    The best scale s of a pair of units minimises ‖a − s b‖² + ‖c − d / s‖², with input weights a and b and output
    weights c and d. It is a positive root of |b|² s⁴ − ab s³ + cd s − |d|², or 1 where there is none.
    """
    entering, leaving = _classifier_products(target, source)
    entered, left = (products.diagonal().expand_as(entering) for products in _classifier_products(source, source))
    scales = torch.ones_like(entering)[..., None]
    if "maps" in families:
        # scale 1 is always a candidate, so a unit without a root is no worse than before
        scales = torch.cat([_positive_roots(entering, leaving, entered, left), scales], -1)
    squared, ab, cd = scales.square(), entering[..., None], leaving[..., None]
    costs = squared * entered[..., None] - 2 * scales * ab - 2 * cd / scales + left[..., None] / squared
    cost, which = costs.min(-1)
    rows = torch.arange(len(cost))
    order = best_order(-cost) if "mlp" in families else rows
    return order, scales[rows, order, which[rows, order]]


def _classifier_products(target: Tensors, source: Tensors) -> tuple[Float64[Tensor, "m m"], Float64[Tensor, "m m"]]:
    """Inner products of the units of two MLP heads: of their input weights, then of their output weights."""
    entering = target["head.0.weight"] @ source["head.0.weight"].T
    entering += torch.outer(target["head.0.bias"], source["head.0.bias"])
    return entering.cpu(), (target["head.2.weight"].T @ source["head.2.weight"]).cpu()


def _positive_roots(ab: Tensor, cd: Tensor, bb: Tensor, dd: Tensor) -> Float64[Tensor, "m m 4"]:
    """Positive roots s of bb s⁴ − ab s³ + cd s − dd, eigenvalues of its companion matrix; 1 where there is none."""
    # units without inputs or outputs have no best scale
    usable = (bb > 1e-12) & (dd > 1e-12)
    companion = torch.zeros(*ab.shape, 4, 4, dtype=torch.float64)
    companion[..., 1:, :-1] = torch.eye(3, dtype=torch.float64)
    companion[..., -1] = torch.stack([dd, -cd, torch.zeros_like(ab), ab], -1) / bb.clamp_min(1e-12)[..., None]
    roots = torch.linalg.eigvals(torch.where(usable[..., None, None], companion, 0.0))
    # rounding gives real roots a small imaginary part
    valid = (roots.imag.abs() < 1e-8 * roots.abs()) | (roots.imag == 0)
    return torch.where(valid & (roots.real > 0), roots.real, 1.0)
