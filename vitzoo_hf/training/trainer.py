"""One model in training, of any architecture and in any precision; and what all trainers share."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from vitzoo_hf.blueprint.blueprint import Recipe
from vitzoo_hf.format.layout import is_head
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.images.sources import ImageSet
from vitzoo_hf.training.checkpoint import Results, RunFolder, load_optimizer_tensors, optimizer_tensors
from vitzoo_hf.training.feed import Draws, FedBatch, Feed, Positions, make_feed
from vitzoo_hf.training.losses import info_nce, make_erase, make_mix
from vitzoo_hf.training.seeds import derive_seed

EVALUATION_BATCH = 256


class DivergedError(ZooError):
    """A loss or weight stopped being finite."""


@dataclass
class SingleTrainer:
    """The trainer of one model; see `vitzoo_hf.training.loop.Trainer` for its methods.

    Attributes:
        recipe: the recipe, in its executed reading.
        images: the image set to train on.
        model: the model, at its initial weights.
        epochs: length of the whole training, for the schedule.
        device: where to train.
    """

    recipe: Recipe
    images: ImageSet
    model: nn.Module
    epochs: int
    device: str

    def __post_init__(self) -> None:
        self.recipe = self.recipe.executed
        self.model.to(self.device).train()
        if self.recipe.freeze_trunk:
            for name, parameter in self.model.named_parameters():
                parameter.requires_grad_(is_head(name))
        self.optimizer = make_optimizer(self.recipe, self.model)
        # small gradients vanish in float16 unless they are scaled; bfloat16 has float32's range
        self.scaler = torch.amp.GradScaler(self.device, enabled=self.recipe.precision == "float16")
        self.feed = feed_of(self.images, self.recipe, self.device)
        self.labels = self.images.labels[self.images.positions("train")].to(self.device)
        self.mix = make_mix(self.recipe, len(self.images.class_names))
        self.erase = make_erase(self.recipe, self.device)

    @property
    def num_models(self) -> int:
        """One."""
        return 1

    def batches(self, epoch: int) -> list[Positions]:
        """Positions `[1, B]` of the training images of an epoch, batch by batch."""
        return [batch[None] for batch in batches_of(self.recipe, len(self.labels), epoch, self.device)]

    def draws(self, epoch: int) -> Draws:
        """The random generators of an epoch; mixing draws from the global ones, which the loop has seeded."""
        return Draws.of([self.recipe.seed], epoch, self.device)

    def step(self, batches: Iterator[FedBatch], draws: Draws, position: float, count: int = 1) -> Float[Tensor, " 1"]:
        """Update the model once by the mean gradient of `count` batches; returns their mean loss, detached."""
        share = learning_rate_share(self.recipe, position, self.epochs)
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.lr * share
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros(1, device=self.device)
        for batch in batches:
            loss = self._loss(batch) / count
            self.scaler.scale(loss).backward()
            total += loss.detach()
        self.scaler.step(self.optimizer)
        # halves the scale after a step that was skipped for infinite gradients
        self.scaler.update()
        return total

    def _outputs(self, inputs: Float[Tensor, "B C S S"]) -> Float[Tensor, "B K"]:
        dtype = getattr(torch, self.recipe.precision)
        kind = torch.device(self.device).type
        with torch.autocast(kind, dtype, enabled=dtype != torch.float32):
            outputs: Tensor = self.model(self.erase(inputs))
        # losses in float32: half a precision would round their logarithms
        return outputs.float()

    def _loss(self, batch: FedBatch) -> Float[Tensor, ""]:
        inputs = batch.inputs[0]
        if is_contrastive(self.recipe):
            return info_nce(self._outputs(inputs), self.recipe.temperature)
        inputs, targets = self.mix(inputs, self.labels[batch.positions[0]])
        return cross_entropy(self._outputs(inputs), targets)

    def end_epoch(self, losses: Float[Tensor, " 1"], epoch: int) -> Bool[Tensor, " 1"]:
        """Whether the mean loss of the epoch and the weights are finite."""
        finite = all(bool(parameter.isfinite().all()) for parameter in self.model.parameters())
        return losses.isfinite() & finite

    @torch.inference_mode()
    def results(self) -> list[Results]:
        """Loss and accuracy on all training and all test images, unaugmented and in eval mode, batch by batch.

        A contrastive run has no accuracy; its losses are InfoNCE over fixed views, so that epochs compare.
        """
        self.model.eval()
        measure = self._contrastive if is_contrastive(self.recipe) else self._classification
        results = results_of(measure("train"), measure("test"))
        self.model.train()
        return [results]

    def _classification(self, role: str) -> "Measured":
        losses, correct = [], []
        for pixels, labels in self.images.batches(role, EVALUATION_BATCH):
            targets = labels.to(self.device)
            logits = self.model(self.images.normalize(pixels.to(self.device)))
            # float64 and one mean at the end: the last batch may be smaller
            losses.append(cross_entropy(logits.double(), targets, reduction="none"))
            correct.append(logits.argmax(1) == targets)
        return Measured(float(torch.cat(losses).mean()), float(torch.cat(correct).double().mean()))

    def _contrastive(self, role: str) -> "Measured":
        losses = [
            info_nce(self.model(views), self.recipe.temperature)
            for views in fixed_views(self.feed, self.images, self.recipe, role, self.device)
        ]
        return Measured(float(torch.stack(losses).double().mean()), None)

    def state_dict(self, model: int) -> Mapping[str, Tensor]:
        """The weights of the model."""
        return self.model.state_dict()

    def resume_tensors(self, model: int) -> dict[str, Tensor]:
        """Weights, optimizer state and the scale of float16 gradients."""
        weights = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        scale = {f"scaler.{name}": torch.tensor(value) for name, value in self.scaler.state_dict().items()}
        return weights | optimizer_tensors(self.optimizer) | scale

    def resume(self, resumes: Sequence[Mapping[str, Tensor]], epoch: int) -> None:
        """Put the model where its resume file has it."""
        (tensors,) = resumes
        self.model.load_state_dict(resumed_weights(tensors))
        load_optimizer_tensors(self.optimizer, tensors)
        scale = {name: tensors[f"scaler.{name}"].item() for name in self.scaler.state_dict()}
        if scale:
            self.scaler.load_state_dict(scale)

    def keep(self, models: Sequence[int]) -> None:
        """Do nothing: the only model is kept, or training ends."""


class Measured(NamedTuple):
    """Loss and accuracy of one model on the images of one role; a contrastive run has no accuracy."""

    loss: float
    accuracy: float | None


def results_of(train: Measured, test: Measured, **more: float | None) -> Results:
    """The results of a kept epoch, in the order in which they are stored.

    >>> results_of(Measured(0.5, 0.75), Measured(1.0, 0.5))["generalization_gap"]
    0.25
    """
    results = {"train_loss": train.loss, "train_accuracy": train.accuracy}
    results |= {"test_loss": test.loss, "test_accuracy": test.accuracy} | more
    if train.accuracy is None or test.accuracy is None:
        return results | {"generalization_gap": None}
    return results | {"generalization_gap": train.accuracy - test.accuracy}


def is_contrastive(recipe: Recipe) -> bool:
    """Whether a run learns from two views of each image rather than from labels."""
    return recipe.regime == "contrastive"


def feed_of(images: ImageSet, recipe: Recipe, device: str, role: str = "train") -> Feed:
    """The feed of one role of an image set by a recipe: two views of each image for a contrastive run, else one."""
    return make_feed(images, recipe.augmentation, device, role=role, views=1 + is_contrastive(recipe))


def fixed_views(
    train_feed: Feed, images: ImageSet, recipe: Recipe, role: str, device: str
) -> Iterator[Float[Tensor, "B2 C S S"]]:
    """Two views of the images of a role, batch by batch; equal in every epoch and run, so that losses compare."""
    # the training images lie on the device already: another feed would hold them twice
    feed = train_feed if role == "train" else feed_of(images, recipe, device, role)
    positions = torch.arange(len(images.positions(role)), device=device)
    batches = [batch[None] for batch in full_batches(positions, recipe.batch_size)]
    for batch in feed.batches(batches, Draws.fixed(device)):
        yield batch.inputs[0]


def learning_rate_share(recipe: Recipe, position: float, epochs: int) -> float:
    """The factor by which warm-up and schedule reduce the learning rate after `position` of `epochs` epochs.

    >>> recipe = Recipe(schedule="cosine", warmup_epochs=1.0)
    >>> [round(learning_rate_share(recipe, at, 3), 6) for at in (0.5, 1.0, 2.0, 3.0)]
    [0.5, 1.0, 0.5, 0.0]
    """
    warmup = recipe.warmup_epochs
    # the first step has rate 0: it fills only what the optimizer remembers
    if position < warmup:
        return position / warmup
    if recipe.schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (position - warmup) / (epochs - warmup)))


def usable_resume(folder: RunFolder, keep_epochs: tuple[int, ...]) -> tuple[int, dict[str, Tensor]] | None:
    """Epoch and tensors of the resume file of `folder`; None if there is none, or a kept epoch before it is lost."""
    resume = folder.load_resume()
    if resume is None:
        return None
    due = {epoch for epoch in keep_epochs if epoch <= resume[0]}
    return resume if due <= set(folder.epochs()) and folder.intact() else None


def resumed_weights(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict in a resume file."""
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name.startswith("model.")}


def batches_of(recipe: Recipe, count: int, epoch: int, device: str) -> tuple[Int64[Tensor, " _"], ...]:
    """Positions of `count` training images, batch by batch, in the order of this epoch."""
    # drawn on the CPU, so that the order is the same on every device
    generator = torch.Generator().manual_seed(derive_seed(recipe.seed, "order", epoch))
    order = torch.randperm(count, generator=generator).to(device)
    return full_batches(order, recipe.batch_size) if is_contrastive(recipe) else order.split(recipe.batch_size)


def full_batches(items: Tensor, size: int) -> tuple[Tensor, ...]:
    """Batches of exactly `size`, so that each has equally many negatives; all items at once if they are fewer."""
    return items[: max(len(items) // size, 1) * size].split(size)


def make_optimizer(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    """AdamW or SGD over every trainable parameter."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # fused: one kernel for all tensors of a small model
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=recipe.lr, weight_decay=recipe.weight_decay, fused=True)
    return torch.optim.SGD(
        parameters, lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay, fused=True
    )
