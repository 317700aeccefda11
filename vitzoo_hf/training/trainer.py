"""A model in training: the step, the epoch, the results, and what must be kept to continue."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from jaxtyping import Int64
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from vitzoo_hf.blueprint.blueprint import Recipe
from vitzoo_hf.format.layout import is_head
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.images.preparation import standardize
from vitzoo_hf.images.sources import ImageSet
from vitzoo_hf.training.checkpoint import RunFolder, load_optimizer_tensors, optimizer_tensors
from vitzoo_hf.training.feed import CroppingFeed, PreparedFeed, make_feed
from vitzoo_hf.training.losses import info_nce, make_erase, make_mix
from vitzoo_hf.training.seeds import derive_seed, seeded_globals

EVALUATION_BATCH = 256
NOT_FINITE = "the loss or a weight is no longer finite; lower the learning rate"


class DivergedError(ZooError):
    """A loss or weight stopped being finite."""


@dataclass
class Trainer:
    """A model in training: the step, the epoch, the results, what must be kept to continue."""

    recipe: Recipe
    images: ImageSet
    model: nn.Module
    epochs: int
    device: str

    def __post_init__(self) -> None:
        self.recipe = self.recipe.executed
        self.model.to(self.device)
        if self.recipe.freeze_trunk:
            for name, parameter in self.model.named_parameters():
                parameter.requires_grad_(is_head(name))
        self.optimizer = make_optimizer(self.recipe, self.model)
        self.scaler = torch.amp.GradScaler(self.device, enabled=self.recipe.precision == "float16")
        self.feed = self._feed("train")
        self.labels = self.images.labels[self.images.positions("train")].to(self.device)
        self.mix = make_mix(self.recipe, len(self.images.class_names))
        self.erase = make_erase(self.recipe, self.device)

    @property
    def contrastive(self) -> bool:
        """Whether the run learns from views rather than labels."""
        return self.recipe.regime == "contrastive"

    def train_epoch(self, epoch: int) -> None:
        """One pass over the training images.

        Raises:
            DivergedError: if the mean loss or a weight is not finite afterwards.
        """
        seed = self.recipe.seed
        views = torch.Generator(self.device).manual_seed(derive_seed(seed, "views", epoch))
        crops = torch.Generator().manual_seed(derive_seed(seed, "crops", epoch))
        batches = batches_of(self.recipe, len(self.labels), epoch, self.device)
        self.model.train()
        total = torch.zeros((), device=self.device)
        together = self.recipe.accumulate
        steps = [batches[start : start + together] for start in range(0, len(batches), together)]
        fed = self.feed.batches(batches, crops)
        with seeded_globals(derive_seed(seed, "mix", epoch)):
            for number, step in enumerate(steps):
                self._set_lr(epoch - 1 + number / len(steps))
                total += self.step(islice(fed, len(step)), views, count=len(step))
        finite = all(bool(parameter.isfinite().all()) for parameter in self.model.parameters())
        if not (math.isfinite(float(total)) and finite):
            raise DivergedError(NOT_FINITE)

    def step(self, batches: Iterator[Tensor], views: torch.Generator, count: int = 1) -> Tensor:
        """One update with the mean gradient of `count` batches, as the feed gives them.

        Returns their mean loss, detached.
        """
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        for batch in batches:
            loss = self._loss(batch, views) / count
            self.scaler.scale(loss).backward()
            total += loss.detach()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return total

    def _set_lr(self, position: float) -> None:
        share = learning_rate_share(self.recipe, position, self.epochs)
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.lr * share

    def _outputs(self, inputs: Tensor) -> Tensor:
        dtype = getattr(torch, self.recipe.precision)
        kind = torch.device(self.device).type
        with torch.autocast(kind, dtype, enabled=dtype != torch.float32):
            outputs: Tensor = self.model(self.erase(inputs))
        return outputs.float()

    def _feed(self, role: str) -> PreparedFeed | CroppingFeed:
        return make_feed(
            self.images, self.recipe.augmentation, self.device, role=role, views=2 if self.contrastive else 1
        )

    def _view(self, feed: PreparedFeed | CroppingFeed, batch: Tensor, generator: torch.Generator) -> Tensor:
        return standardize(feed.view(batch, generator), self.images.spec.mean, self.images.spec.std)

    def _loss(self, batch: Tensor, views: torch.Generator) -> Tensor:
        if self.contrastive:
            both = torch.cat([self._view(self.feed, batch, views) for _ in range(2)])
            return info_nce(self._outputs(both), self.recipe.temperature)
        inputs, targets = self.mix(self._view(self.feed, batch, views), self.labels[batch])
        return cross_entropy(self._outputs(inputs), targets)

    @torch.inference_mode()
    def results(self) -> dict[str, float | None]:
        """Loss and accuracy on all training and all test images, unaugmented and in eval mode, batch by batch.

        A contrastive run has no accuracy; its losses are InfoNCE over fixed views, so that epochs compare.
        """
        self.model.eval()
        measured: dict[str, float | None] = {}
        for role in ("train", "test"):
            if self.contrastive:
                measured |= {f"{role}_loss": self._contrastive_loss(role), f"{role}_accuracy": None}
            else:
                measured[f"{role}_loss"], measured[f"{role}_accuracy"] = self._classification(role)
        train, test = measured["train_accuracy"], measured["test_accuracy"]
        measured["generalization_gap"] = train - test if train is not None and test is not None else None
        return measured

    def _classification(self, role: str) -> tuple[float, float]:
        """Mean loss and accuracy."""
        losses, correct = [], []
        for pixels, labels in self.images.batches(role, EVALUATION_BATCH):
            targets = labels.to(self.device)
            logits = self.model(self.images.normalize(pixels.to(self.device)))
            losses.append(cross_entropy(logits.double(), targets, reduction="none"))
            correct.append(logits.argmax(1) == targets)
        return float(torch.cat(losses).mean()), float(torch.cat(correct).double().mean())

    def _contrastive_loss(self, role: str) -> float:
        feed = self.feed if role == "train" else self._feed(role)
        positions = torch.arange(len(self.images.positions(role)), device=self.device)
        seed = derive_seed(0, "fixed views")
        views, crops = torch.Generator(self.device).manual_seed(seed), torch.Generator().manual_seed(seed)
        losses = []
        for batch in feed.batches(full_batches(positions, self.recipe.batch_size), crops):
            both = torch.cat([self._view(feed, batch, views) for _ in range(2)])
            losses.append(info_nce(self.model(both), self.recipe.temperature))
        return float(torch.stack(losses).double().mean())

    def resume_tensors(self) -> dict[str, Tensor]:
        """Weights and optimizer state."""
        weights = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        scale = {f"scaler.{name}": torch.tensor(value) for name, value in self.scaler.state_dict().items()}
        return weights | optimizer_tensors(self.optimizer) | scale

    def resume(self, place: RunFolder, keep_epochs: tuple[int, ...]) -> int | None:
        """Load the resume file of `place`, if there is one and no kept epoch before it is lost; returns its epoch."""
        found = usable_resume(place, keep_epochs)
        if found is None:
            return None
        epoch, tensors = found
        self.model.load_state_dict(resumed_weights(tensors))
        load_optimizer_tensors(self.optimizer, tensors)
        scale = {name: tensors[f"scaler.{name}"].item() for name in self.scaler.state_dict()}
        if scale:
            self.scaler.load_state_dict(scale)
        return epoch


def learning_rate_share(recipe: Recipe, position: float, epochs: int) -> float:
    """What warm-up and schedule leave of the learning rate after `position` of so many epochs.

    >>> recipe = Recipe(schedule="cosine", warmup_epochs=1.0)
    >>> [round(learning_rate_share(recipe, at, 3), 6) for at in (0.5, 1.0, 2.0, 3.0)]
    [0.5, 1.0, 0.5, 0.0]
    """
    warmup = recipe.warmup_epochs
    if position < warmup:
        return position / warmup
    if recipe.schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (position - warmup) / (epochs - warmup)))


def usable_resume(place: RunFolder, keep_epochs: tuple[int, ...]) -> tuple[int, dict[str, Tensor]] | None:
    """Epoch and tensors of the resume file of `place`, if there is one and no kept epoch before it is lost."""
    found = place.load_resume()
    if found is None or not {kept for kept in keep_epochs if kept <= found[0]} <= set(place.epochs()):
        return None
    return found if place.intact() else None


def resumed_weights(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict in a resume file."""
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name.startswith("model.")}


def batches_of(recipe: Recipe, count: int, epoch: int, device: str) -> tuple[Int64[Tensor, " _"], ...]:
    """Positions of the training images, batch by batch, in the order of this epoch."""
    generator = torch.Generator().manual_seed(derive_seed(recipe.seed, "order", epoch))
    order = torch.randperm(count, generator=generator).to(device)
    if recipe.regime == "contrastive":
        return full_batches(order, recipe.batch_size)
    return order.split(recipe.batch_size)


def full_batches(items: Tensor, size: int) -> tuple[Tensor, ...]:
    """Batches of exactly `size`, so that each has equally many negatives; all items at once if they are fewer."""
    return items[: max(len(items) // size, 1) * size].split(size)


def make_optimizer(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    """AdamW or SGD over every trainable parameter."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=recipe.lr, weight_decay=recipe.weight_decay, fused=True)
    return torch.optim.SGD(
        parameters, lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay, fused=True
    )
