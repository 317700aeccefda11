"""Sample new models from a kernel density over the latents of anchors; all numbers come from one generator."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from vitzoo_hf.apply.autoencoder.trained import Trained
from vitzoo_hf.format.messages import did_you_mean
from vitzoo_hf.format.schema import ZooError

MODES = ("joint", "token", "number")
BATCH = 64
"""Models that are encoded or decoded at once."""

Score = Callable[[Float[Tensor, "P D"]], Float64[Tensor, " P"]]
"""Weights -> accuracy of the models on selection images."""


class Samples(NamedTuple):
    """Generated models.

    Attributes:
        weights: weights of S models.
        anchors: position of the anchor that a model was drawn around; -1 where its numbers come from several.
    """

    weights: Float[Tensor, "S D"]
    anchors: list[int]


def sample(
    trained: Trained,
    anchors: Float[Tensor, "A D"],
    count: int,
    *,
    mode: str = "joint",
    bandwidth: float = 0.2,
    seed: int = 0,
) -> Samples:
    """Decode latents drawn from a Gaussian kernel density around those of anchors.

    Args:
        trained: the autoencoder.
        anchors: weights of the models to sample around ("prompts").
        count: number of new models.
        mode: `joint` draws all tokens of a model around one anchor; `token` draws an anchor for each token; `number`
            draws an anchor for each latent number.
        bandwidth: standard deviation of the kernel, in deviations of each latent number over the anchors.
        seed: seed of the draw; equal seeds give equal models.

    Raises:
        ZooError: for an unknown mode, fewer than two anchors, no samples, or a negative bandwidth.
    """
    if mode not in MODES:
        raise ZooError(f"unknown mode {mode!r}: {did_you_mean(mode, MODES)}")
    if len(anchors) < 2:
        raise ZooError(f"{len(anchors)} anchors; a density over latents needs at least two")
    if count < 1 or not 0 <= bandwidth < float("inf"):
        raise ZooError(f"{count} samples of bandwidth {bandwidth}: expected at least one, and no negative bandwidth")
    latents = encoded(trained, anchors)
    # per number of the latents, because their scales differ by token
    spread = latents.std(0)
    generator = torch.Generator().manual_seed(seed)
    A, T, Z = latents.shape
    shape = {"joint": (count, 1, 1), "token": (count, T, 1), "number": (count, T, Z)}[mode]
    anchor = torch.randint(A, shape, generator=generator)
    centres = latents.gather(0, anchor.expand(count, T, Z))
    # one anchor for all, a token or a number: `gather` expands the draw over the rest
    draws = centres + bandwidth * spread * torch.randn(count, T, Z, generator=generator)
    positions = anchor.flatten().tolist() if mode == "joint" else [-1] * count
    return Samples(decoded(trained, draws), positions)


def bootstrapped(
    trained: Trained,
    anchors: Float[Tensor, "A D"],
    count: int,
    score: Score,
    *,
    rounds: int = 3,
    keep: int = 10,
    mode: str = "joint",
    bandwidth: float = 0.2,
    seed: int = 0,
) -> Samples:
    """Sample in rounds; the best models of a round are the anchors of the next.

    Args:
        trained: the autoencoder.
        anchors: weights of the anchors of the first round.
        count: number of models in a round.
        score: accuracy on selection images; never on the images that are reported.
        rounds: number of rounds, at least one.
        keep: number of models that become anchors.
        mode: `joint`, `token` or `number`, see `sample`.
        bandwidth: standard deviation of the kernel, see `sample`.
        seed: seed of the first round; later rounds count up from it.

    Returns:
        Models of the last round, the best first; `anchors` are positions among the anchors of that round.

    Raises:
        ZooError: for no round, fewer than two models to keep, or impossible settings of `sample`.
    """
    if rounds < 1 or keep < 2:
        raise ZooError(f"{rounds} rounds that keep {keep} models: expected at least one round and two models")
    for number in range(rounds):
        # another seed each round, or equal anchors would give equal draws
        samples = sample(trained, anchors, count, mode=mode, bandwidth=bandwidth, seed=seed + number)
        order = score(samples.weights).argsort(descending=True)
        samples = Samples(samples.weights[order], [samples.anchors[position] for position in order.tolist()])
        anchors = samples.weights[:keep]
    return samples


@torch.no_grad()
def encoded(trained: Trained, vectors: Float[Tensor, "P D"]) -> Float[Tensor, "P T latent"]:
    """Encode the weights of models in batches; latents are on the CPU."""
    device = trained.model.index_table.device
    trained.model.eval()
    return torch.cat([trained.encode(part.to(device)).cpu() for part in vectors.split(BATCH)])


@torch.no_grad()
def decoded(trained: Trained, latents: Float[Tensor, "P T latent"]) -> Float[Tensor, "P D"]:
    """Decode latents in batches; weights are on the CPU."""
    device = trained.model.index_table.device
    trained.model.eval()
    return torch.cat([trained.decode(part.to(device)).cpu() for part in latents.split(BATCH)])
