"""Similarity of the predictions of all pairs of models: agreement, kappa, shared errors, divergence.

Pure functions of tensors. P models, N images, C classes; results are symmetric float64 `[P, P]` on the input's
device, and inputs are never written to. Counts of images are exact integers.

Cost: P^2 N comparisons of codes of one byte, two where there are more than 256 classes; `jensen_shannon` takes
P^2 N C / 2 logarithms.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64, Integer, Num
from numkong import cdist
from torch import Tensor

from vitzoo_hf.metrics.blocks import block_bytes
from vitzoo_hf.metrics.inputs import check_logits, check_predictions, checked_labels, softmax_blocks
from vitzoo_hf.metrics.mixture_kernel import has_triton, mixture_sums

BLOCK_ELEMENTS = 2**20
EXACT_IMAGES = 2**20  # a share of so many images, kept in float32, still tells one image
COMPARISONS_AT_ONCE = 2**26  # one byte each
CACHED_ELEMENTS = 2**17  # two such buffers fit in a core's cache
MIXTURE_BYTES = 2**24
FLOAT32_SUM = 4096  # terms that are added up before float64


@torch.no_grad()
def agreement(predictions: Num[Tensor, "P N"]) -> Float64[Tensor, "P P"]:
    """Share of images on which two models predict the same class, for all pairs.

    Classes are only compared for equality, so they may be any integers.

    Returns:
        Exact counts / N: symmetric, ones on the diagonal.

    Raises:
        ValueError: on float predictions, a shape other than [P, N], or no images.

    Example:
        >>> agreement(torch.tensor([[0, 1, 2, 3], [0, 1, 0, 0]]))
        tensor([[1.0000, 0.5000],
                [0.5000, 1.0000]], dtype=torch.float64)
    """
    check_predictions(predictions)
    matches = _matches(predictions)
    return matches.double() / matches.diagonal()  # a scalar divisor is inverted on GPUs: N / N would not be 1


@torch.no_grad()
def cohen_kappa(predictions: Num[Tensor, "P N"]) -> Float64[Tensor, "P P"]:
    """Cohen's kappa of all pairs: agreement beyond what the models' class frequencies give by chance (Cohen 1960).

    `(p_o - p_e) / (1 - p_e)` with the observed agreement `p_o` and `p_e = sum_c f_c g_c`, where `f_c` is the share of
    images for which a model predicts class c. 1 for equal predictions, 0 for agreement as by chance.

    Returns:
        From exact counts (below 9e7 images): symmetric, ones on the diagonal. Two models that predict a single class,
        and the same one, always agree by chance and have no kappa: 0 / 0 gives NaN, also on the diagonal.

    Raises:
        ValueError: on float predictions, a shape other than [P, N], or no images.

    Example:
        >>> cohen_kappa(torch.tensor([[0, 0, 1, 1], [0, 0, 1, 0]]))
        tensor([[1.0000, 0.5000],
                [0.5000, 1.0000]], dtype=torch.float64)
    """
    check_predictions(predictions)
    return _beyond_chance(_matches(predictions), _chance_matches(predictions), predictions.shape[1])


@torch.no_grad()
def error_consistency(predictions: Num[Tensor, "P N"], labels: Integer[Tensor, " N"]) -> Float64[Tensor, "P P"]:
    """Error consistency: whether two models err on the same images, beyond chance (Geirhos et al. 2020).

    Cohen's kappa of right and wrong: `(c_obs - c_exp) / (1 - c_exp)`, where `c_obs` is the share of images that both
    get right or both get wrong, and `c_exp = a b + (1 - a)(1 - b)` for accuracies a and b. Which wrong class they
    predict does not count.

    Returns:
        From exact counts (below 9e7 images): symmetric, ones on the diagonal. NaN (0 / 0) between models that are
        both always right or both always wrong.

    Raises:
        ValueError: on float predictions, labels that do not fit, or no images.

    Example:
        >>> labels = torch.tensor([0, 0, 1, 1])
        >>> error_consistency(torch.tensor([[1, 1, 1, 1], [1, 0, 1, 1]]), labels)
        tensor([[1.0000, 0.5000],
                [0.5000, 1.0000]], dtype=torch.float64)
    """
    check_predictions(predictions)
    right = (predictions.long() == checked_labels(labels, predictions, None)).to(torch.uint8)
    hits = right.sum(1, dtype=torch.float64)
    misses = len(labels) - hits
    by_chance = torch.outer(hits, hits) + torch.outer(misses, misses)
    return _beyond_chance(_matches(right), by_chance, len(labels))


@torch.no_grad()
def error_overlap(
    predictions: Num[Tensor, "P N"], labels: Integer[Tensor, " N"], same_class: bool = False
) -> Float64[Tensor, "P P"]:
    """Intersection over union of two models' errors: images both get wrong, of those either gets wrong.

    Not corrected for chance: two poor models overlap whatever they do (`error_consistency` corrects). With
    `same_class` an image counts as shared only where both predict the same wrong class, over the same union; so it
    is at most the plain overlap and equal to it for two classes, and their ratio is how often two models that are
    both wrong give the same answer.

    Args:
        predictions: integer predictions.
        labels: true classes, any integer dtype.
        same_class: count equal wrong classes only.

    Returns:
        From exact counts: symmetric, ones on the diagonal; NaN (0 / 0) between models without any error.

    Raises:
        ValueError: on float predictions, labels that do not fit, or no images.

    Example:
        >>> predicted = torch.tensor([[0, 1, 2, 2], [1, 1, 2, 1]])
        >>> error_overlap(predicted, torch.tensor([0, 0, 0, 0]))[0, 1]
        tensor(0.7500, dtype=torch.float64)
        >>> error_overlap(predicted, torch.tensor([0, 0, 0, 0]), same_class=True)[0, 1]
        tensor(0.5000, dtype=torch.float64)
    """
    check_predictions(predictions)
    right = (predictions.long() == checked_labels(labels, predictions, None)).to(torch.uint8)
    wrong = len(labels) - right.sum(1)
    # both right + both wrong = matches, and (images - both right) = wrong + wrong' - both wrong
    both_wrong = (_matches(right) + wrong + wrong[:, None] - len(labels)) // 2
    either_wrong = wrong + wrong[:, None] - both_wrong
    both_right = len(labels) - either_wrong
    shared = _matches(predictions) - both_right if same_class else both_wrong
    return shared.double() / either_wrong


@torch.no_grad()
def jensen_shannon(logits: Float[Tensor, "P N C"]) -> Float64[Tensor, "P P"]:
    """Mean Jensen-Shannon divergence of the softmax outputs of all pairs, in nats (Lin 1991).

    `mean(H((p + q) / 2) - (H(p) + H(q)) / 2)`: 0 for equal outputs, log 2 for disjoint ones; its root is a metric for
    one image. With `g(p, q) = sum_c (p_c + q_c) log(p_c + q_c)` it is `(g(p, p) + g(q, q) - 2 g(p, q)) / 4`: one
    logarithm a class, and exactly 0 for equal models (on CUDA 0 to rounding). P^2 N C / 2 logarithms in all, on as
    many threads as torch has; temporaries of tens of MB.

    Args:
        logits: any floating dtype. float64 logits are computed in float64; others in float32, to about 1e-7 nats
            (an almost equal pair may come out that far below 0): pass float64 to tell closer models apart.

    Returns:
        A symmetric matrix with zeros on the diagonal.

    Raises:
        ValueError: on NaN or +inf logits, no classes, or no images.

    Example:
        >>> certain = 1000 * torch.eye(2)[:, None]  # two models, one image
        >>> jensen_shannon(certain).exp()
        tensor([[1.0000, 2.0000],
                [2.0000, 1.0000]], dtype=torch.float64)
    """
    check_logits(logits)
    sums = torch.zeros(len(logits), len(logits), dtype=torch.float64, device=logits.device)
    for _, _, exps, partition in softmax_blocks(logits):
        probabilities = (exps / partition.to(exps.dtype).unsqueeze(-1)).flatten(1)
        # 0 log 0 is 0, which the smallest normal number gives to 1e-35
        probabilities.clamp_(min=torch.finfo(exps.dtype).tiny)
        sums += _mixture_sums(probabilities)
    sums = sums.triu() + sums.triu(1).T
    self_sums = sums.diagonal()  # g(p, p)
    return (self_sums + self_sums[:, None] - 2 * sums) / (4 * logits.shape[1])


def _matches(codes: Integer[Tensor, "P N"]) -> Int64[Tensor, "P P"]:
    """Number of images on which two models have the same code."""
    return _matches_by_bytes(codes) if codes.device.type == "cpu" else _matches_by_comparison(codes)


def _matches_by_bytes(predicted: Integer[Tensor, "P N"]) -> Int64[Tensor, "P P"]:
    """Compare codes of one, two or four bytes by NumKong, which compares 64 bytes in an instruction."""
    P, N = predicted.shape
    codes = predicted.numpy()
    # one pass where codes are small, as classes are: a negative one looks large without its sign
    lowest, highest = 0, int(codes.view(codes.dtype.str.replace("i", "u")).max())
    if highest >= 2**16:
        lowest, highest = int(codes.min()), int(codes.max())
    if highest - lowest >= 2**16:
        codes = np.unique(codes, return_inverse=True)[1].reshape(P, N)
        lowest, highest = 0, int(codes.max())
    kind = np.min_scalar_type(highest - lowest)
    matches = np.zeros((P, P), np.int64)
    for start in range(0, N, EXACT_IMAGES):
        # codes of such a range differ in their lowest bits, which are all that is left of them
        block = codes[:, start : start + EXACT_IMAGES].astype(kind, order="C")
        if kind == np.uint8:  # of an array with itself, half of the pairs are compared
            differ = np.asarray(cdist(block, block, "hamming"))
        else:  # NumKong's Jaccard distance of integers is the share of places that differ
            differ = np.rint(np.asarray(cdist(block, block, "jaccard")) * block.shape[1])
        matches += block.shape[1] - differ.astype(np.int64)
    return torch.from_numpy(matches)


def _matches_by_comparison(predicted: Integer[Tensor, "P N"]) -> Int64[Tensor, "P P"]:
    P = len(predicted)
    matches = torch.zeros(P, P, dtype=torch.int64, device=predicted.device)
    for block in predicted.split(max(1, COMPARISONS_AT_ONCE // P**2), dim=1):
        rows = max(1, COMPARISONS_AT_ONCE // block.numel())
        for start in range(0, P, rows):
            same = block[start : start + rows, None] == block[None]
            matches[start : start + rows] += same.sum(-1)
    return matches


def _chance_matches(codes: Integer[Tensor, "P N"]) -> Float64[Tensor, "P P"]:
    """N times the matches that two models would have by chance: `sum_c n_c m_c`, exact below 2^53."""
    codes = codes.long()
    lowest, highest = int(codes.min()), int(codes.max())
    if highest - lowest >= 2**16:
        codes = codes.unique(return_inverse=True)[1]
        lowest, highest = 0, int(codes.max())
    P, N = codes.shape
    expected = torch.zeros(P, P, dtype=torch.float64, device=codes.device)
    classes = max(N, BLOCK_ELEMENTS // P)  # at once, in counts no larger than the codes
    for start in range(0, highest - lowest + 1, classes):
        width = min(classes, highest - lowest + 1 - start)
        # the first and the last bin hold all other classes
        bins = (codes - (lowest + start - 1)).clamp_(0, width + 1)
        counts = torch.zeros(P, width + 2, dtype=torch.float64, device=codes.device)
        counts.scatter_add_(1, bins, torch.ones_like(bins, dtype=torch.float64))
        expected += counts[:, 1:-1] @ counts[:, 1:-1].T
    return expected


def _beyond_chance(
    matches: Int64[Tensor, "P P"], expected: Float64[Tensor, "P P"], images: int
) -> Float64[Tensor, "P P"]:
    """Kappa, from N^2 times each of its parts."""
    return (matches.double() * images - expected) / (images**2 - expected)


def _mixture_sums(probabilities: Float[Tensor, "P NC"]) -> Float64[Tensor, "P P"]:
    """The upper triangle of `sum_k s log s` with `s = p_k + q_k`."""
    if probabilities.device.type == "cuda" and has_triton():
        return mixture_sums(probabilities)
    if probabilities.device.type != "cpu":
        return _mixture_sums_by_torch(probabilities)
    pieces = probabilities.split(max(1, CACHED_ELEMENTS // len(probabilities)), dim=1)
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        return torch.from_numpy(sum(threads.map(_mixture_sums_by_numpy, pieces)))


def _mixture_sums_by_numpy(probabilities: Float[Tensor, "P NC"]) -> Float64[np.ndarray, "P P"]:
    P, size = probabilities.shape
    sums = np.zeros((P, P))
    for start in range(0, size, FLOAT32_SUM):
        p = np.ascontiguousarray(probabilities[:, start : start + FLOAT32_SUM].numpy())
        mixture, logarithm = np.empty_like(p), np.empty_like(p)
        for row in range(P):
            s, log_s = mixture[row:], logarithm[row:]
            np.add(p[row:], p[row], out=s)
            np.log(s, out=log_s)
            sums[row, row:] += np.vecdot(s, log_s)
    return sums


def _mixture_sums_by_torch(probabilities: Float[Tensor, "P NC"]) -> Float64[Tensor, "P P"]:
    P, size = probabilities.shape
    sums = torch.zeros(P, P, dtype=torch.float64, device=probabilities.device)
    most = block_bytes(probabilities.device, MIXTURE_BYTES) // probabilities.itemsize
    rows = max(1, most // (P * size))
    for piece in probabilities.split(max(1, most // P), dim=1):
        for row in range(0, P, rows):
            s = piece[row : row + rows, None] + piece[row:]
            sums[row : row + rows, row:] += torch.xlogy(s, s, out=s).sum(-1, dtype=torch.float64)
    return sums
