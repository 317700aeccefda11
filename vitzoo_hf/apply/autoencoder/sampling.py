"""New models from the latents of known ones: kernel densities, all numbers drawn from one generator."""

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

Score = Callable[[Float[Tensor, "P D"]], Float64[Tensor, " P"]]
"""Weights -> how good the models are on selection images."""


class Samples(NamedTuple):
    """Generated models.

    Attributes:
        weights: of each model.
        anchors: position of the anchor a model was drawn around, -1 where its tokens come from several.
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
        anchors: weights of known models ("prompts").
        count: of new models.
        mode: `joint` draws all tokens of a model around one anchor, `token` each token around an anchor of its own,
            `number` each latent number.
        bandwidth: standard deviation of the kernel, in deviations of each latent number over the anchors.
        seed: of the draw; equal seeds give equal models.

    Raises:
        ZooError: for an unknown mode, no anchors, or a count or bandwidth that cannot be.
    """
    if mode not in MODES:
        raise ZooError(f"unknown mode {mode!r}: {did_you_mean(mode, MODES)}")
    if len(anchors) < 2:
        raise ZooError(f"{len(anchors)} anchors; a density over latents needs at least two")
    if count < 1 or not 0 <= bandwidth < float("inf"):
        raise ZooError(f"{count} samples of bandwidth {bandwidth}: expected at least one, and no negative bandwidth")
    latents = encoded(trained, anchors)
    spread = latents.std(0)
    generator = torch.Generator().manual_seed(seed)
    A, N, L = latents.shape
    shape = {"joint": (count, 1, 1), "token": (count, N, 1), "number": (count, N, L)}[mode]
    chosen = torch.randint(A, shape, generator=generator)
    centres = latents.gather(0, chosen.expand(count, N, L))
    drawn = centres + bandwidth * spread * torch.randn(count, N, L, generator=generator)
    held = chosen.flatten().tolist() if mode == "joint" else [-1] * count
    return Samples(decoded(trained, drawn), held)


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
    """Sample, keep the best as the anchors of the next round, and so on.

    Args:
        trained: the autoencoder.
        anchors: of the first round.
        count: of models a round.
        score: on selection images; never on those that are reported on.
        rounds: at least one.
        keep: models that become anchors.
        mode: as for `sample`.
        bandwidth: as for `sample`.
        seed: of the draw.

    Returns:
        The last round's models, the best first; `anchors` counts those of that round.

    Raises:
        ZooError: as `sample`; or for no round, or fewer than two models to keep.
    """
    if rounds < 1 or keep < 2:
        raise ZooError(f"{rounds} rounds that keep {keep} models: expected at least one round and two models")
    for number in range(rounds):
        drawn = sample(trained, anchors, count, mode=mode, bandwidth=bandwidth, seed=seed + number)
        order = score(drawn.weights).argsort(descending=True)
        drawn = Samples(drawn.weights[order], [drawn.anchors[position] for position in order.tolist()])
        anchors = drawn.weights[:keep]
    return drawn


@torch.no_grad()
def encoded(trained: Trained, vectors: Float[Tensor, "P D"]) -> Float[Tensor, "P N latent"]:
    """Latents of models, on the CPU."""
    device = trained.model.index_table.device
    trained.model.eval()
    return torch.cat([trained.encode(part.to(device)).cpu() for part in vectors.split(BATCH)])


@torch.no_grad()
def decoded(trained: Trained, latents: Float[Tensor, "P N latent"]) -> Float[Tensor, "P D"]:
    """Weights of latents, on the CPU."""
    device = trained.model.index_table.device
    trained.model.eval()
    return torch.cat([trained.decode(part.to(device)).cpu() for part in latents.split(BATCH)])
