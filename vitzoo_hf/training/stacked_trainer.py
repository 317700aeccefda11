"""Models of one shape in training together: what `Trainer` does for one, done once for all of them.

The weights of G models are the rows of one matrix. Every model keeps its own data order, views and mixing, drawn from
the seeds that it would have alone; operations on images run once on all batches.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn
from torch.nn.functional import one_hot

from vitzoo_hf.blueprint.blueprint import Recipe
from vitzoo_hf.format.layout import Layout, flatten, is_head, unflatten
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.images.augment import augment
from vitzoo_hf.images.preparation import standardize
from vitzoo_hf.images.sources import ImageSet
from vitzoo_hf.models.batched import BatchedViT
from vitzoo_hf.training.losses import make_erase, make_mix, stacked_cross_entropy, stacked_info_nce
from vitzoo_hf.training.seeds import GlobalDraws, derive_seed
from vitzoo_hf.training.stacked_optimizers import StackedOptimizer
from vitzoo_hf.training.trainer import (
    EVALUATION_BATCH,
    batches_of,
    full_batches,
    learning_rate_share,
    resumed_weights,
)


@dataclass
class Draws:
    """Where one epoch of every model draws from: views, and the global generators if it mixes or erases."""

    views: list[torch.Generator]
    mixing: list[GlobalDraws]


class StackedTrainer:
    """G models in training: the step, the epoch, the results, what must be kept to continue.

    Args:
        recipes: alike in all that `vitzoo_hf.training.stacked.shape_of` compares.
        images: for all of them.
        models: at their initial weights.
        epochs: of the whole training, for the schedule.
        device: where to train.

    Raises:
        ZooError: if the models are no plain ViTs, or draw random numbers themselves while they train.
    """

    def __init__(
        self, recipes: Sequence[Recipe], images: ImageSet, models: Sequence[nn.Module], epochs: int, device: str
    ) -> None:
        vit = BatchedViT.trainable(models[0])
        if vit is None:
            raise ZooError("only plain ViTs without dropout train together: train these models one by one")
        self.vit, self.images, self.epochs, self.device = vit, images, epochs, device
        self.recipes = recipes = [recipe.executed for recipe in recipes]
        self.layout = Layout.of(models[0].state_dict())
        self.weights = torch.stack([flatten(model.state_dict()) for model in models]).to(device)
        frozen = [self.recipe.freeze_trunk and not is_head(name) for name in self.layout.names]
        self.trained = Layout(self.layout.names[sum(frozen) :], self.layout.shapes[sum(frozen) :])
        self.optimizer = StackedOptimizer.of(recipes, self._trained_weights)
        pixels, labels = images.part("train")
        self.pixels, self.labels = pixels.to(device), labels.to(device)
        self.mix = [make_mix(recipe, len(images.class_names)) for recipe in recipes]
        self.smoothing = torch.tensor([recipe.label_smoothing for recipe in recipes], dtype=torch.float64).to(device)
        self.erase = make_erase(self.recipe, device)

    @property
    def recipe(self) -> Recipe:
        """Of the first model, for what all recipes have alike."""
        return self.recipes[0]

    @property
    def contrastive(self) -> bool:
        """Whether the runs learn from views rather than labels."""
        return self.recipe.regime == "contrastive"

    @property
    def _trained_weights(self) -> Float[Tensor, "G P"]:
        """The weights that change: all, or the head behind a frozen trunk."""
        return self.weights[:, self.layout.num_parameters - self.trained.num_parameters :]

    def train_epoch(self, epoch: int) -> list[int]:
        """One pass over the training images; returns the positions of models that are no longer finite."""
        draws = self.draws(epoch)
        orders = [batches_of(recipe, len(self.labels), epoch, self.device) for recipe in self.recipes]
        total = torch.zeros(len(self.recipes), device=self.device)
        for number, batches in enumerate(zip(*orders, strict=True)):
            position = epoch - 1 + number / len(orders[0])
            total += self.step(torch.stack(batches), draws, position)
        finite = total.isfinite() & self.weights.isfinite().all(1)
        return [model for model, fine in enumerate(finite.tolist()) if not fine]

    def draws(self, epoch: int) -> Draws:
        """The generators of this epoch, each as its run has it alone."""
        seeds = [recipe.seed for recipe in self.recipes]
        mixes = self.recipe.mixup or self.recipe.cutmix or self.recipe.random_erase
        return Draws(
            views=[torch.Generator(self.device).manual_seed(derive_seed(seed, "views", epoch)) for seed in seeds],
            mixing=[GlobalDraws(derive_seed(seed, "mix", epoch), self.device) for seed in seeds if mixes],
        )

    def step(self, batch: Int64[Tensor, "G B"], draws: Draws, position: float) -> Float[Tensor, " G"]:
        """One update of every model on its own training images; returns the losses, detached.

        Args:
            batch: positions of the images.
            draws: of this epoch.
            position: epochs completed, with the share of this one, for the schedule.
        """
        inputs, targets = self.inputs(batch, draws)
        tensors = unflatten(self.weights, self.layout)
        changing = [tensors[name].requires_grad_() for name in self.trained.names]
        losses = self._losses(inputs, targets, tensors)
        self._update(losses, changing, position)
        return losses.detach()

    def _update(self, losses: Float[Tensor, " G"], changing: list[Tensor], position: float) -> None:
        gradients = torch.autograd.grad(losses.sum(), changing)
        lr_scale = learning_rate_share(self.recipe, position, self.epochs)
        flat = torch.cat([gradient.flatten(1) for gradient in gradients], 1)
        self.optimizer.step(self._trained_weights, flat, lr_scale)

    def inputs(self, batch: Int64[Tensor, "G B"], draws: Draws) -> tuple[Float[Tensor, "G B2 C H W"], Tensor | None]:
        """What the models are fed, and their targets unless they learn from views: two views of B images, or B."""
        pixels = self.pixels[batch.flatten()]
        views = [self._views(pixels, *draws.views).unflatten(0, batch.shape) for _ in range(1 + self.contrastive)]
        inputs, labels = torch.cat(views, 1), self.labels[batch]
        if self.contrastive:
            return self._erased(inputs, draws), None
        if not (self.recipe.mixup or self.recipe.cutmix):
            return self._erased(inputs, draws), self._softened(labels)
        mixed = []
        for each, own, mix, mixing in zip(inputs, labels, self.mix, draws.mixing, strict=True):
            with mixing.taken():
                mixed.append(mix(each, own))
        inputs, targets = (torch.stack(parts) for parts in zip(*mixed, strict=True))
        return self._erased(inputs, draws), targets

    def _softened(self, labels: Int64[Tensor, "G B"]) -> Float[Tensor, "G B K"]:
        """`soften`, with every model's own smoothing."""
        count = len(self.images.class_names)
        smoothing = self.smoothing[:, None, None]
        return one_hot(labels, count) * (1 - smoothing).float() + (smoothing / count).float()

    def _erased(self, inputs: Tensor, draws: Draws) -> Tensor:
        if not self.recipe.random_erase:
            return inputs
        erased = []
        for each, mixing in zip(inputs, draws.mixing, strict=True):
            with mixing.taken():
                erased.append(self.erase(each))
        return torch.stack(erased)

    def _views(self, pixels: UInt8[Tensor, "n C H W"], *generators: torch.Generator) -> Float[Tensor, "n C H W"]:
        spec = self.images.spec
        view = augment(pixels.float() / 255, self.recipe.augmentation, *generators)
        return standardize(view, spec.mean, spec.std)

    def _losses(self, inputs: Tensor, targets: Tensor | None, tensors: dict[str, Tensor]) -> Float[Tensor, " G"]:
        outputs = self.vit.logits(tensors, inputs)
        if targets is None:
            return stacked_info_nce(outputs, self.recipe.temperature)
        return stacked_cross_entropy(outputs, targets)

    @torch.no_grad()
    def results(self) -> list[dict[str, float | None]]:
        """What `Trainer.results` gives for each model."""
        tensors = unflatten(self.weights, self.layout)
        measured: list[dict[str, float | None]] = [{} for _ in self.recipes]
        for role in ("train", "test"):
            pixels, labels = self.images.part(role)
            for own, loss, accuracy in zip(
                measured, *self._measured(tensors, pixels.to(self.device), labels.to(self.device)), strict=True
            ):
                own |= {f"{role}_loss": loss, f"{role}_accuracy": accuracy}
        for own in measured:
            train, test = own["train_accuracy"], own["test_accuracy"]
            own["generalization_gap"] = train - test if train is not None and test is not None else None
        return measured

    def _measured(
        self, tensors: dict[str, Tensor], pixels: Tensor, labels: Tensor
    ) -> tuple[list[float], list[float] | list[None]]:
        """Loss and accuracy of every model on the same images."""
        if self.contrastive:
            views = torch.Generator(self.device).manual_seed(derive_seed(0, "fixed views"))
            losses = []
            for part in full_batches(pixels, self.recipe.batch_size):
                both = torch.cat([self._views(part, views) for _ in range(2)])
                losses.append(stacked_info_nce(self._outputs(tensors, both), self.recipe.temperature))
            return torch.stack(losses).double().mean(0).tolist(), [None] * len(self.recipes)
        parts = pixels.split(EVALUATION_BATCH)
        logits = torch.cat([self._outputs(tensors, self.images.normalize(part)) for part in parts], 1)
        right = (logits.argmax(2) == labels).double().mean(1)
        return stacked_cross_entropy(logits.double(), labels.expand(len(logits), -1)).tolist(), right.tolist()

    def _outputs(self, tensors: dict[str, Tensor], images: Float[Tensor, "n C H W"]) -> Float[Tensor, "G n K"]:
        return self.vit(tensors, self.vit.patches(images)).logits

    def state_dict(self, model: int) -> dict[str, Tensor]:
        """The weights of one model, by timm's names."""
        return unflatten(self.weights[model], self.layout)

    def resume_tensors(self, model: int) -> dict[str, Tensor]:
        """Weights and optimizer state of one model, as `Trainer.resume_tensors` names them."""
        tensors = {f"model.{name}": tensor for name, tensor in self.state_dict(model).items()}
        remembered = {
            name: list(unflatten(value, self.trained).values())
            for name, value in self.optimizer.of_model(model).items()
        }
        for index in range(len(self.trained.names)):
            own = {f"optimizer.{index}.{name}": values[index] for name, values in remembered.items()}
            if self.recipe.optimizer == "adamw":
                own[f"optimizer.{index}.step"] = torch.tensor(float(self.optimizer.steps))
            tensors |= own
        return tensors

    def resume(self, resumes: Sequence[dict[str, Tensor]], epoch: int) -> None:
        """Put every model where its resume file, written after `epoch`, has it."""
        for model, tensors in enumerate(resumes):
            weights = resumed_weights(tensors)
            self.weights[model] = flatten({name: weights[name] for name in self.layout.names}).to(self.device)
            for name in self.optimizer.of_model(model):
                values = [tensors[f"optimizer.{index}.{name}"] for index in range(len(self.trained.names))]
                self.optimizer.state[name][model] = torch.cat([value.flatten() for value in values]).to(self.device)
        self.optimizer.steps = epoch * len(batches_of(self.recipe, len(self.labels), epoch, "cpu"))

    def keep(self, models: Sequence[int]) -> None:
        """Go on with these models alone."""
        self.recipes = [self.recipes[model] for model in models]
        self.mix = [self.mix[model] for model in models]
        self.smoothing = self.smoothing[list(models)]
        self.weights = self.weights[list(models)]
        self.optimizer.keep(models)
