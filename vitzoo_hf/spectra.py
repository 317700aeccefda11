"""Singular values of the matrices in the weights: spectral norms, stable ranks.

Pure functions of tensors. A matrix is a tensor of two axes, or of four (the patch embedding, a linear map of patches:
`[out, in * height * width]`), with timm's `qkv` taken apart into the maps of queries, keys and values.
"""

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from vitzoo_hf.flatten import Layout
from vitzoo_hf.gram import check_weights

GRAM_SHARE = 1e-6  # of the largest eigenvalue: smaller ones have lost digits to its rounding


@torch.no_grad()
def singular_values(matrices: Float[Tensor, "*B m n"], top: int | None = None) -> Float64[Tensor, "*B k"]:
    """Singular values, largest first, computed in float64.

    Roots of the eigenvalues of the smaller product of a matrix with itself while all of them are at least 1e-3 of the
    largest, which keeps seven digits; else a singular value decomposition, which is several times slower.

    Args:
        matrices: any floating dtype; one matrix or a stack of them.
        top: how many; all `min(m, n)` by default.

    Raises:
        ValueError: on a matrix that is empty or not floating, has NaN or infinite values, or fewer than `top`
            singular values.

    Example:
        >>> singular_values(torch.tensor([[3.0, 0.0], [0.0, -5.0]]))
        tensor([5., 3.], dtype=torch.float64)
    """
    if matrices.ndim < 2 or not matrices.is_floating_point() or 0 in matrices.shape:
        raise ValueError(
            f"matrices are {str(matrices.dtype).removeprefix('torch.')} {list(matrices.shape)}; expected non-empty "
            "floating [..., m, n]"
        )
    rank = min(matrices.shape[-2:])
    if top is not None and not 1 <= top <= rank:
        raise ValueError(f"top={top} of matrices {list(matrices.shape)}; expected 1 to {rank}")
    if not matrices.isfinite().all():
        raise ValueError("NaN or infinite values in a matrix: drop this model, or look for a diverged run")
    found = matrices.double()
    gram = found.mT @ found if found.shape[-2] > found.shape[-1] else found @ found.mT
    squares = torch.linalg.eigvalsh(gram).flip(-1)[..., :top]
    if (squares >= GRAM_SHARE * squares[..., :1]).all():
        return squares.sqrt()
    return torch.linalg.svdvals(found)[..., :top]


def spectral_norm(matrices: Float[Tensor, "*B m n"]) -> Float64[Tensor, "*B"]:
    """Largest singular value.

    Raises:
        ValueError: as `singular_values`.
    """
    return singular_values(matrices, 1)[..., 0]


@torch.no_grad()
def stable_rank(matrices: Float[Tensor, "*B m n"]) -> Float64[Tensor, "*B"]:
    """Squared Frobenius over squared spectral norm, between 1 and the rank; NaN for a zero matrix.

    Source: Rudelson and Vershynin, "Sampling from large matrices", 2007.

    Raises:
        ValueError: as `singular_values`.

    Example:
        >>> stable_rank(torch.eye(3))
        tensor(3., dtype=torch.float64)
    """
    return matrices.double().square().sum((-2, -1)) / spectral_norm(matrices).square()


def matrices_of(weights: Float[Tensor, "P D"], layout: Layout) -> dict[str, Float[Tensor, "P m n"]]:
    """The matrices in the vectors of models of one layout, as views: name -> `[P, m, n]`.

    `blocks.0.attn.qkv.weight` is there as `blocks.0.attn.q.weight`, `….k.weight` and `….v.weight`.

    Raises:
        ValueError: on weights that are empty, not floating, or of another length than the layout.

    Example:
        >>> layout = Layout.of({"attn.qkv.weight": torch.zeros(6, 2), "attn.qkv.bias": torch.zeros(6)})
        >>> [(name, list(matrix.shape)) for name, matrix in matrices_of(torch.zeros(1, 18), layout).items()]
        [('attn.q.weight', [1, 2, 2]), ('attn.k.weight', [1, 2, 2]), ('attn.v.weight', [1, 2, 2])]
    """
    check_weights(weights, layout)
    found: dict[str, Tensor] = {}
    for (name, place), shape in zip(layout.items(), layout.shapes, strict=True):
        if len(shape) not in (2, 4):
            continue
        matrix = weights[:, place].unflatten(1, (shape[0], -1))
        if name.endswith("attn.qkv.weight"):
            stem = name.removesuffix("qkv.weight")
            found |= {f"{stem}{kind}.weight": part for kind, part in zip("qkv", matrix.chunk(3, 1), strict=True)}
        else:
            found[name] = matrix
    return found
