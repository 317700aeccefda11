"""Train thousands of small MLPs at once: inputs, one layer of hidden ReLU units, one output.

A model is a row of a matrix. Models run in groups that fit a processor's cache. Examples lie on the last axis: P
models with N examples each have inputs `[P, I, N]` and outputs `[P, N]`.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from vitzoo_hf.format.layout import Layout, unflatten
from vitzoo_hf.progress import progress_bar

GROUP_ACTIVATIONS = {"cpu": 2**16, "cuda": 2**26}
"""Activations of a group: 256 KiB fit the cache of a core; a GPU wants many models at once."""
SMALLEST_GROUP = 64
DIVERGED = 1e6
"""A weight beyond this, or one that is not finite, marks a model as diverged."""
BETAS = (0.9, 0.999)

Loss = Callable[[Float[Tensor, "P N"], Float[Tensor, "P N"], int], Float[Tensor, " P"]]
"""Outputs, targets and the number of the step -> loss of each model."""


@dataclass(frozen=True)
class Widths:
    """Sizes of an MLP with one output.

    >>> Widths(4, 32).layout.num_parameters
    193
    """

    inputs: int
    hidden: int

    @property
    def layout(self) -> Layout:
        """Layout of the flat vector of a model."""
        names = ("hidden.weight", "hidden.bias", "output.weight", "output.bias")
        return Layout(names, ((self.hidden, self.inputs), (self.hidden,), (1, self.hidden), (1,)))


@dataclass(frozen=True)
class Training:
    """Settings of the training of MLPs.

    Attributes:
        lr: learning rate.
        weight_decay: factor of the weights that is added to gradients (L2, not decoupled).
        epochs: passes over the data; ignored if `steps` is set.
        steps: number of updates; None follows `epochs`.
        batch_size: number of examples in an update; None takes all.
        optimizer: `adam` or `sgd`.
        stop_below: a model stops after the first epoch whose running training loss is below this.
    """

    lr: float = 1e-3
    weight_decay: float = 1e-4
    epochs: int = 20
    steps: int | None = None
    batch_size: int | None = 32
    optimizer: str = "adam"
    stop_below: float | None = None

    def __post_init__(self) -> None:
        if self.optimizer not in ("adam", "sgd"):
            raise ValueError(f"optimizer={self.optimizer!r}; expected 'adam' or 'sgd'")

    def steps_for(self, n: int) -> int:
        """Number of updates of a model on n examples if it does not stop early.

        >>> Training().steps_for(2048), Training(steps=100).steps_for(2048)
        (1280, 100)
        """
        return self.steps if self.steps is not None else self.epochs * math.ceil(n / (self.batch_size or n))


def initial_mlps(widths: Widths, count: int, generator: torch.Generator) -> Float[Tensor, "P D"]:
    """Draw weights like PyTorch's linear layers: uniform, bounded by one over the root of a layer's inputs."""
    # PyTorch's Linear bounds weights and biases alike, by the inputs of the layer
    bounds = [
        torch.full((math.prod(shape),), 1 / math.sqrt(widths.inputs if name.startswith("hidden") else widths.hidden))
        for name, shape in zip(widths.layout.names, widths.layout.shapes, strict=True)
    ]
    uniform = torch.rand(count, widths.layout.num_parameters, generator=generator)
    return (2 * uniform - 1) * torch.cat(bounds)


def mlp_outputs(
    vectors: Float[Tensor, "P D"], widths: Widths, inputs: Float[Tensor, "P I N"] | Float[Tensor, "1 I N"]
) -> Float[Tensor, "P N"]:
    """Outputs of each model on its inputs, or of all models on shared inputs.

    Example:
        >>> mlp_outputs(torch.ones(1, 4), Widths(1, 1), torch.tensor([[[-3.0, 2.0]]]))
        tensor([[1., 4.]])
    """
    parts = unflatten(vectors, widths.layout)
    shared = inputs.expand(len(vectors), -1, -1)
    hidden = torch.baddbmm(parts["hidden.bias"][:, :, None], parts["hidden.weight"], shared).relu()
    return torch.baddbmm(parts["output.bias"][:, :, None], parts["output.weight"], hidden)[:, 0]


def squared_error(outputs: Float[Tensor, "P N"], targets: Float[Tensor, "P N"], step: int) -> Float[Tensor, " P"]:
    """Mean squared error of each model; the number of the step is ignored."""
    return (outputs - targets).square().mean(1)


def diverged(vectors: Float[Tensor, "P D"]) -> Bool[Tensor, " P"]:
    """Mark models with a weight that is not finite or beyond a million.

    >>> diverged(torch.tensor([[0.0], [2e6], [float("nan")]]))
    tensor([False,  True,  True])
    """
    # negated "at most" rather than "above": every comparison with NaN is false
    return ~(vectors.abs() <= DIVERGED).all(1)


def train_mlps(
    widths: Widths,
    inputs: Float[Tensor, "P I N"],
    targets: Float[Tensor, "P N"],
    training: Training,
    *,
    loss: Loss = squared_error,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: bool = False,
) -> Float[Tensor, "P D"]:
    """Train one model on each data set; every model has its initialisation.

    Args:
        widths: sizes of every model.
        inputs: inputs of the examples of each model.
        targets: targets of the examples.
        training: settings of the training.
        loss: loss of each model, differentiable in the outputs.
        seed: seed of initial weights and of the order of examples; models of a group share the order.
        device: device that trains.
        progress: show a bar.

    Returns:
        Weights on the CPU, diverged ones included: see `diverged`.

    Example:
        >>> x = torch.linspace(-1, 1, 64).expand(2, 1, -1)
        >>> vectors = train_mlps(Widths(1, 8), x, 3 * x[:, 0], Training(lr=0.01, epochs=150))
        >>> bool((squared_error(mlp_outputs(vectors, Widths(1, 8), x), 3 * x[:, 0], 0) < 0.01).all())
        True
    """
    generator = torch.Generator().manual_seed(seed)
    count, n = targets.shape
    batch = min(training.batch_size or n, n)
    size = max(SMALLEST_GROUP, GROUP_ACTIVATIONS[torch.device(device).type] // (widths.hidden * batch))
    vectors = initial_mlps(widths, count, generator)
    with progress_bar("training MLPs", "model", shown=progress, total=count) as bar:
        for first in range(0, count, size):
            group = slice(first, min(first + size, count))
            tensors = (vectors[group].to(device), inputs[group].to(device), targets[group].to(device))
            vectors[group] = _train_group(widths, *tensors, training, loss, generator).cpu()
            bar.update(group.stop - group.start)
    return vectors


def _train_group(
    widths: Widths,
    vectors: Float[Tensor, "P D"],
    inputs: Float[Tensor, "P I N"],
    targets: Float[Tensor, "P N"],
    training: Training,
    loss: Loss,
    generator: torch.Generator,
) -> Float[Tensor, "P D"]:
    """Train a group; a model that reaches the loss at which it stops leaves the group."""
    n = targets.shape[1]
    # a clone, because rows of models that stop early are written one by one
    final = vectors.clone()
    alive = torch.arange(len(vectors), device=vectors.device)
    optimizer = _Optimizer(training, vectors)
    for order, steps in _epochs(n, training, generator):
        running = torch.zeros(len(alive), device=vectors.device)
        for x, y in _batches(inputs, targets, order, training.batch_size or n)[:steps]:
            # a new leaf each step, because models leave the group and its shape changes
            weights = optimizer.vectors.detach().requires_grad_()
            losses = loss(mlp_outputs(weights, widths, x), y, optimizer.steps)
            # the sum of independent losses: each row of the gradient belongs to one model alone
            (gradient,) = torch.autograd.grad(losses.sum(), weights)
            optimizer.step(gradient)
            # weighted by the size of the batch, as the last one may be smaller
            running += losses.detach() * (y.shape[1] / n)
        if training.stop_below is None:
            continue
        stopped = running < training.stop_below
        if stopped.any():
            final[alive[stopped]] = optimizer.vectors[stopped]
            remaining = ~stopped
            alive, inputs, targets = alive[remaining], inputs[remaining], targets[remaining]
            optimizer.keep(remaining)
        if not len(alive):
            return final
    final[alive] = optimizer.vectors
    return final


def _epochs(
    n: int, training: Training, generator: torch.Generator
) -> Iterator[tuple[Int64[Tensor, " N"] | None, int]]:
    """Yield the order of examples of each epoch (None if one batch has all examples) and the remaining steps."""
    remaining = training.steps_for(n)
    batches = math.ceil(n / (training.batch_size or n))
    while remaining > 0:
        yield (None if batches == 1 else torch.randperm(n, generator=generator)), remaining
        remaining -= batches


def _batches(
    inputs: Float[Tensor, "P I N"], targets: Float[Tensor, "P N"], order: Int64[Tensor, " N"] | None, size: int
) -> list[tuple[Tensor, Tensor]]:
    """Inputs `[P, I, b]` and targets `[P, b]` of each batch."""
    if order is None:
        return [(inputs, targets)]
    # drawn on the CPU, so that every device trains on equal batches
    index = order.to(inputs.device)
    return list(zip(inputs[..., index].split(size, 2), targets[:, index].split(size, 1), strict=True))


class _Optimizer:
    """Adam or gradient descent with L2; models are rows, so that a stopped model can leave."""

    def __init__(self, training: Training, vectors: Float[Tensor, "P D"]) -> None:
        self.training, self.vectors, self.steps = training, vectors.clone(), 0
        self.mean, self.square = torch.zeros_like(vectors), torch.zeros_like(vectors)

    def keep(self, models: Bool[Tensor, " P"]) -> None:
        self.vectors, self.mean, self.square = self.vectors[models], self.mean[models], self.square[models]

    @torch.no_grad()
    def step(self, gradient: Float[Tensor, "P D"]) -> None:
        self.steps += 1
        gradient = gradient.add(self.vectors, alpha=self.training.weight_decay)
        if self.training.optimizer == "sgd":
            self.vectors.sub_(gradient, alpha=self.training.lr)
            return
        first, second = BETAS
        self.mean.lerp_(gradient, 1 - first)
        self.square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
        # Adam's bias correction and epsilon as in torch.optim.Adam
        size = (self.square / (1 - second**self.steps)).sqrt_().add_(1e-8)
        self.vectors.addcdiv_(self.mean, size, value=-self.training.lr / (1 - first**self.steps))
