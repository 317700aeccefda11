"""Attacks by networks that read weights as sets, so that the order of neurons and heads does not change a guess.

`set_encoder` takes ViTs and small MLPs; `deep_sets` is the published network, for MLPs with one hidden layer. Both
are trained on nine tenths of the shadows until the loss on the last tenth stops falling.
"""

import copy
import math
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitzoo_hf.apply.distribution_inference.attacks.meta_models import FEWEST_SHADOWS, clamped
from vitzoo_hf.apply.distribution_inference.game import Attack, Guesses, Shadows, Views
from vitzoo_hf.apply.distribution_inference.secrets import ClassSecret
from vitzoo_hf.format.schema import ZooError

INSIDE, CODE = 64, 16
PUBLISHED_CODE = 8
DROPOUT = 0.2
LR, WEIGHT_DECAY = 1e-3, 1e-4
BATCHES, SMALLEST_BATCH, LARGEST_BATCH = 16, 8, 64
MOST_EPOCHS, PATIENCE = 200, 12
HELD_OUT = 0.1

Sets = Mapping[str, Tensor]


class _Rows(nn.Module):
    """Rows of a set -> the mean of their codes; a block has its bias, and gets the code of the block before."""

    def __init__(self, width: int, depth: int, context: int) -> None:
        super().__init__()
        self.inside = nn.Linear(width, INSIDE)
        self.of_block = nn.Parameter(torch.zeros(depth, INSIDE))
        self.heard = nn.Linear(context, INSIDE, bias=False) if context else None
        self.code = nn.Linear(INSIDE, CODE)

    def forward(self, rows: Float[Tensor, "P *h n r"], block: int, context: Tensor | None) -> Float[Tensor, "P *h c"]:
        hidden = self.inside(rows) + self.of_block[block]
        if self.heard is not None and context is not None:
            hidden = hidden + self.heard(context).view(len(rows), *[1] * (rows.ndim - 2), -1)
        return self.code(hidden.relu()).relu().mean(-2)


class SetEncoder(nn.Module):
    """Sets of weights -> values: neurons and heads of every block as sets, all other tensors as plain vectors.

    Args:
        sets: sets of any models, for the shapes.
        outputs: number of values.

    Example:
        >>> sets = {"neurons": torch.randn(3, 1, 5, 4), "plain": torch.randn(3, 2)}
        >>> encoder = SetEncoder(sets, 2).eval()
        >>> turned = {"neurons": sets["neurons"][:, :, [4, 2, 0, 1, 3]], "plain": sets["plain"]}
        >>> encoder(sets).shape, torch.allclose(encoder(sets), encoder(turned), atol=1e-6)
        (torch.Size([3, 2]), True)
    """

    def __init__(self, sets: Sets, outputs: int) -> None:
        super().__init__()
        self.depth = sets["neurons"].shape[1]
        self.has_heads = "query_key" in sets
        code = CODE * (2 if self.has_heads else 1)
        context = code if self.depth > 1 else 0
        self.neurons = _Rows(sets["neurons"].shape[-1], self.depth, context)
        if self.has_heads:
            self.query_key = _Rows(sets["query_key"].shape[-1], self.depth, context)
            self.value_output = _Rows(sets["value_output"].shape[-1], self.depth, context)
            self.heads = _Rows(2 * CODE, self.depth, context)
        self.plain = nn.Sequential(nn.Linear(sets["plain"].shape[1], INSIDE), nn.ReLU(), nn.Linear(INSIDE, CODE))
        self.read = nn.Sequential(nn.Dropout(DROPOUT), nn.Linear(self.depth * code + CODE, outputs))

    def forward(self, sets: Sets) -> Float[Tensor, "P V"]:
        """Predict the values of each model."""
        codes: list[Tensor] = []
        for block in range(self.depth):
            before = codes[-1] if codes else None
            parts = [self.neurons(sets["neurons"][:, block], block, before)]
            if self.has_heads:
                inner = [self.query_key(sets["query_key"][:, block], block, before)]
                inner.append(self.value_output(sets["value_output"][:, block], block, before))
                parts.append(self.heads(torch.cat(inner, -1), block, before))
            codes.append(torch.cat(parts, -1))
        return self.read(torch.cat([*codes, self.plain(sets["plain"])], 1))


class DeepSets(nn.Module):
    """The published network: units of a layer are a set; every unit of the next layer reads their codes in order.

    Source: Ganju et al., CCS 2018, with the sizes of Hartmann et al., 2023. The order of codes makes the network
    depend on the order of units, as published.
    """

    def __init__(self, sets: Sets, outputs: int) -> None:
        super().__init__()
        units, width = sets["neurons"].shape[2:]
        self.first = self._code(width - 1)
        self.second = self._code(units + 1 + units * PUBLISHED_CODE)
        self.read = nn.Linear(2 * PUBLISHED_CODE, outputs)

    @staticmethod
    def _code(width: int) -> nn.Sequential:
        # layers and their order are those of the published network
        layers = [nn.Linear(width, INSIDE), nn.ReLU(), nn.Linear(INSIDE, PUBLISHED_CODE), nn.Dropout(0.5), nn.ReLU()]
        return nn.Sequential(*layers)

    def forward(self, sets: Sets) -> Float[Tensor, "P V"]:
        """Predict the values of each model."""
        rows = sets["neurons"][:, 0]
        # the last number of a row is the outgoing weight, which belongs to the output unit
        codes = self.first(rows[..., :-1])
        output = torch.cat([rows[..., -1], sets["plain"], codes.flatten(1)], 1)
        return self.read(torch.cat([codes.sum(1), self.second(output)], 1))


def set_encoder(shadows: Shadows, targets: Views, seed: int = 0, *, device: str | torch.device = "cpu") -> Guesses:
    """A permutation-invariant encoder of all weights, trained on shadows.

    Args:
        shadows: shadows with `views.sets`.
        targets: targets with sets of the shapes of the shadows.
        seed: seed of initial weights, the held-out tenth, and batches.
        device: device that trains.

    Raises:
        ZooError: if sets were not taken, there are too few shadows, or weights are not finite.
    """
    return _fitted(SetEncoder, shadows, targets, seed, torch.device(device))


def deep_sets(shadows: Shadows, targets: Views, seed: int = 0, *, device: str | torch.device = "cpu") -> Guesses:
    """The published DeepSets attack on MLPs with one hidden layer, standardised and trained to convergence.

    Args and errors are those of `set_encoder`.
    """
    if "neurons" in shadows.views.sets and "query_key" in shadows.views.sets:
        raise ZooError("the published DeepSets takes MLPs with one hidden layer: use set_encoder for ViTs")
    return _fitted(DeepSets, shadows, targets, seed, torch.device(device))


SET_ATTACKS: dict[str, Attack] = {"set_encoder": set_encoder, "deep_sets": deep_sets}


def _fitted(
    kind: type[SetEncoder] | type[DeepSets], shadows: Shadows, targets: Views, seed: int, device: torch.device
) -> Guesses:
    if not shadows.views.sets or not targets.sets:
        raise ZooError("this attack reads weights as sets, which were not taken: give access to weights")
    if len(shadows.secrets) < FEWEST_SHADOWS:
        raise ZooError(
            f"{len(shadows.secrets)} shadows are too few to learn from: expected at least {FEWEST_SHADOWS}"
        )
    of_shadows, of_targets = (
        {name: values.to(device) for name, values in sets.items()}
        for sets in standardised_sets(shadows.views.sets, targets.sets)
    )
    truth, centre, spread = _truth(shadows)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        network = kind(of_shadows, _outputs(shadows)).to(device)
        _train(network, of_shadows, truth.to(device), seed)
    with torch.no_grad():
        batches = torch.arange(len(of_targets["neurons"])).split(LARGEST_BATCH)
        values = torch.cat([network(_at(of_targets, batch)) for batch in batches]).double().cpu()
    if isinstance(shadows.secret, ClassSecret):
        return Guesses(values.argmax(1), values[:, 1] - values[:, 0] if values.shape[1] == 2 else None)
    return Guesses(clamped(shadows, values * spread + centre))


def standardised_sets(of_shadows: Sets, of_targets: Sets) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Standardise sets by mean and deviation over the rows of shadows, for each block and each number of a row.

    Raises:
        ZooError: for weights that are not finite.
    """
    first: dict[str, Tensor] = {}
    second: dict[str, Tensor] = {}
    for name, values in of_shadows.items():
        if not values.isfinite().all() or not of_targets[name].isfinite().all():
            raise ZooError("weights of some model are NaN or infinite: leave diverged models out, and count them")
        axes = [0] if values.ndim == 2 else [0, *range(2, values.ndim - 1)]
        mean, spread = values.mean(axes, keepdim=True), values.std(axes, keepdim=True, correction=0)
        # wider than for float64 features: sets are float32, and their rounding must not be scaled up
        scale = torch.where(spread > 1e-6 * mean.abs().clamp(min=1e-30), 1 / spread, 0)
        first[name], second[name] = (values - mean) * scale, (of_targets[name] - mean) * scale
    return first, second


def _train(network: nn.Module, sets: Sets, truth: Tensor, seed: int) -> None:
    """Train by Adam until the held-out loss stops falling; load the best weights, in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(truth), generator=generator)
    # rounded up, so that few shadows still leave one to stop by
    held_out, training = order[: math.ceil(HELD_OUT * len(order))], order[math.ceil(HELD_OUT * len(order)) :]
    # 16 steps an epoch, as far as the bounds of the batch allow
    size = min(max(len(training) // BATCHES, SMALLEST_BATCH), LARGEST_BATCH)
    # secrets that are numbers are floats, classes are integers
    loss_of = nn.functional.mse_loss if truth.is_floating_point() else nn.functional.cross_entropy
    optimizer = torch.optim.Adam(network.parameters(), lr=LR, weight_decay=WEIGHT_DECAY, foreach=True)
    # a deep copy, because the optimiser changes the tensors of the state in place
    best, weights, waited = math.inf, copy.deepcopy(network.state_dict()), 0
    for _ in range(MOST_EPOCHS):
        network.train()
        for batch in training[torch.randperm(len(training), generator=generator)].split(size):
            optimizer.zero_grad()
            loss_of(network(_at(sets, batch)), truth[batch.to(truth.device)]).backward()
            optimizer.step()
        network.eval()
        with torch.no_grad():
            loss = loss_of(network(_at(sets, held_out)), truth[held_out.to(truth.device)]).item()
        waited = 0 if loss < best else waited + 1
        if loss < best:
            best, weights = loss, copy.deepcopy(network.state_dict())
        if waited == PATIENCE:
            break
    network.load_state_dict(weights)
    network.eval()


def _truth(shadows: Shadows) -> tuple[Tensor, Tensor, Tensor]:
    """Secrets to learn: classes, or standardised numbers with their mean and deviation."""
    if isinstance(shadows.secret, ClassSecret):
        return shadows.secrets, torch.tensor(0.0), torch.tensor(1.0)
    centre, spread = shadows.secrets.mean(0), shadows.secrets.std(0, correction=0).clamp(min=1e-12)
    # float32 like the network; standardised first, in float64
    return ((shadows.secrets - centre) / spread).float(), centre, spread


def _outputs(shadows: Shadows) -> int:
    secret = shadows.secret
    return len(secret.values) if isinstance(secret, ClassSecret) else len(secret.bounds)


def _at(sets: Sets, places: Tensor) -> dict[str, Tensor]:
    return {name: values[places.to(values.device)] for name, values in sets.items()}
