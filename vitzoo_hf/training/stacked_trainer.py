"""P models of one shape in training together: the work of `SingleTrainer`, done once for all of them.

The weights of the models are the rows of one matrix `[P, D]`. Every model has its own data order, views and mixing,
drawn from the seeds that it would have alone; operations on images run once on the batches of all models.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn.functional import one_hot

from vitzoo_hf.blueprint.blueprint import Recipe
from vitzoo_hf.format.layout import Layout, flatten, is_head, unflatten
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.images.sources import ImageSet
from vitzoo_hf.models.batched import BatchedViT
from vitzoo_hf.training.checkpoint import Results
from vitzoo_hf.training.feed import Draws, FedBatch, Feed, Positions
from vitzoo_hf.training.losses import make_erase, make_mix, stacked_cross_entropy, stacked_info_nce
from vitzoo_hf.training.stacked_optimizers import StackedOptimizer
from vitzoo_hf.training.trainer import (
    EVALUATION_BATCH,
    Measured,
    batches_of,
    feed_of,
    fixed_views,
    is_contrastive,
    learning_rate_share,
    results_of,
    resumed_weights,
)


class StackedTrainer:
    """The trainer of P models of one shape; see `vitzoo_hf.training.loop.Trainer` for its methods.

    Args:
        recipes: P recipes, equal in all that `vitzoo_hf.training.stacked.shape_of` compares.
        images: the image set that all models train on.
        models: P models at their initial weights.
        epochs: length of the whole training, for the schedule.
        device: where to train.
        feed: gives the training images; by default the feed of `images`.

    Raises:
        ZooError: if the models are no plain ViTs, or draw random numbers themselves while they train.
    """

    def __init__(
        self,
        recipes: Sequence[Recipe],
        images: ImageSet,
        models: Sequence[nn.Module],
        epochs: int,
        device: str,
        feed: Feed | None = None,
    ) -> None:
        vit = BatchedViT.trainable(models[0])
        if vit is None:
            raise ZooError("only plain ViTs without dropout train together: train these models one by one")
        self.vit, self.images, self.epochs, self.device = vit, images, epochs, device
        self.recipes = recipes = [recipe.executed for recipe in recipes]
        self.layout = Layout.of(models[0].state_dict())
        self.weights = torch.stack([flatten(model.state_dict()) for model in models]).to(device)
        is_frozen = [self.recipe.freeze_trunk and not is_head(name) for name in self.layout.names]
        # the head comes last in timm's ViTs, so that the weights that change are one slice of the matrix
        self.trained = Layout(self.layout.names[sum(is_frozen) :], self.layout.shapes[sum(is_frozen) :])
        self.optimizer = StackedOptimizer.of(recipes, self._trained_weights)
        self.feed = feed or feed_of(images, self.recipe, device)
        self.labels = images.labels[images.positions("train")].to(device)
        self.steps = len(batches_of(self.recipe, len(self.labels), 1, "cpu"))
        self.mix = [make_mix(recipe, len(images.class_names)) for recipe in recipes]
        # float64, as Python's floats that smooth the labels of a run alone
        self.smoothing = torch.tensor([recipe.label_smoothing for recipe in recipes], dtype=torch.float64).to(device)
        self.erase = make_erase(self.recipe, device)

    @property
    def num_models(self) -> int:
        """P, the number of models that are still in training."""
        return len(self.recipes)

    @property
    def recipe(self) -> Recipe:
        """The recipe of the first model, for what all recipes share."""
        return self.recipes[0]

    @property
    def _trained_weights(self) -> Float[Tensor, "P D"]:
        """The weights that change: all, or the head behind a frozen trunk."""
        return self.weights[:, self.layout.num_parameters - self.trained.num_parameters :]

    def batches(self, epoch: int) -> Sequence[Positions]:
        """Positions `[P, B]` of the training images of an epoch, batch by batch."""
        orders = [batches_of(recipe, len(self.labels), epoch, self.device) for recipe in self.recipes]
        return [torch.stack(batches) for batches in zip(*orders, strict=True)]

    def draws(self, epoch: int) -> Draws:
        """The generators of this epoch, each as its run has it alone."""
        mixes = bool(self.recipe.mixup or self.recipe.cutmix or self.recipe.random_erase)
        return Draws.of([recipe.seed for recipe in self.recipes], epoch, self.device, mixes=mixes)

    def step(self, batches: Iterator[FedBatch], draws: Draws, position: float, count: int = 1) -> Float[Tensor, " P"]:
        """Update every model once on its own batch; returns the losses, detached."""
        (batch,) = batches  # groups do not accumulate
        inputs, targets = self.inputs(batch, draws)
        tensors, changing = self._tensors(self.weights)
        outputs = self.vit.logits(tensors, inputs)
        if targets is None:
            losses = stacked_info_nce(outputs, self.recipe.temperature)
        else:
            losses = stacked_cross_entropy(outputs, targets)
        self._update(losses, changing, position)
        return losses.detach()

    def _tensors(self, weights: Float[Tensor, "P D"]) -> tuple[dict[str, Tensor], list[Tensor]]:
        """The tensors of the models, and those among them that gradients are taken of."""
        tensors = unflatten(weights, self.layout)
        return tensors, [tensors[name].requires_grad_() for name in self.trained.names]

    def _update(self, losses: Float[Tensor, " P"], changing: list[Tensor], position: float) -> None:
        # no two models share a parameter, so the gradient of the sum is the gradient of every model's own loss
        gradients = torch.autograd.grad(losses.sum(), changing)
        lr_scale = learning_rate_share(self.recipe, position, self.epochs)
        flat = torch.cat([gradient.flatten(1) for gradient in gradients], 1)
        self.optimizer.step(self._trained_weights, flat, lr_scale)

    def inputs(self, batch: FedBatch, draws: Draws) -> tuple[Float[Tensor, "P VB C S S"], Tensor | None]:
        """The images of a batch, mixed and erased by every model's own draws; and targets, unless contrastive."""
        if is_contrastive(self.recipe):
            return self._erased(batch.inputs, draws), None
        labels = self.labels[batch.positions]
        if not (self.recipe.mixup or self.recipe.cutmix):
            return self._erased(batch.inputs, draws), self._softened(labels)
        mixed = []
        for images, classes, mix, mixing in zip(batch.inputs, labels, self.mix, draws.mixing, strict=True):
            with mixing.taken():
                mixed.append(mix(images, classes))
        inputs, targets = (torch.stack(parts) for parts in zip(*mixed, strict=True))
        return self._erased(inputs, draws), targets

    def _softened(self, labels: Int64[Tensor, "P B"]) -> Float[Tensor, "P B C"]:
        """`losses.soften`, with every model's own smoothing."""
        count = len(self.images.class_names)
        smoothing = self.smoothing[:, None, None]
        return one_hot(labels, count) * (1 - smoothing).float() + (smoothing / count).float()

    def _erased(self, inputs: Float[Tensor, "P B C S S"], draws: Draws) -> Float[Tensor, "P B C S S"]:
        if not self.recipe.random_erase:
            return inputs
        erased = []
        for images, mixing in zip(inputs, draws.mixing, strict=True):
            with mixing.taken():
                erased.append(self.erase(images))
        return torch.stack(erased)

    def end_epoch(self, losses: Float[Tensor, " P"], epoch: int) -> Bool[Tensor, " P"]:
        """Which models have a finite mean loss in this epoch, and finite weights."""
        return losses.isfinite() & self.weights.isfinite().all(1)

    @torch.no_grad()
    def results(self) -> list[Results]:
        """The results that `SingleTrainer.results` gives for each model."""
        tensors = unflatten(self.weights, self.layout)
        roles = (self._measured(tensors, role) for role in ("train", "test"))
        return [results_of(train, test) for train, test in zip(*roles, strict=True)]

    def _measured(self, tensors: dict[str, Tensor], role: str) -> list[Measured]:
        """Loss and accuracy of every model on the images of a role, which all models share."""
        if is_contrastive(self.recipe):
            losses = [
                stacked_info_nce(self._outputs(tensors, views), self.recipe.temperature)
                for views in fixed_views(self.feed, self.images, self.recipe, role, self.device)
            ]
            return [Measured(loss, None) for loss in torch.stack(losses).double().mean(0).tolist()]
        batches, labels = [], []
        for pixels, classes in self.images.batches(role, EVALUATION_BATCH):
            batches.append(self._outputs(tensors, self.images.normalize(pixels.to(self.device))))
            labels.append(classes.to(self.device))
        logits, targets = torch.cat(batches, 1), torch.cat(labels)
        accuracies = (logits.argmax(2) == targets).double().mean(1).tolist()
        # float64: a mean over tens of thousands of images loses digits in float32
        mean_losses = stacked_cross_entropy(logits.double(), targets.expand(len(logits), -1)).tolist()
        return [Measured(loss, accuracy) for loss, accuracy in zip(mean_losses, accuracies, strict=True)]

    def _outputs(self, tensors: dict[str, Tensor], images: Float[Tensor, "N C S S"]) -> Float[Tensor, "P N K"]:
        return self.vit(tensors, self.vit.patches(images)).logits

    def state_dict(self, model: int) -> dict[str, Tensor]:
        """The weights of one model, by timm's names."""
        return unflatten(self.weights[model], self.layout)

    def resume_tensors(self, model: int) -> dict[str, Tensor]:
        """Weights and optimizer state of one model, as `SingleTrainer.resume_tensors` names them."""
        tensors = {f"model.{name}": tensor for name, tensor in self.state_dict(model).items()}
        state = {
            name: list(unflatten(value, self.trained).values())
            for name, value in self.optimizer.of_model(model).items()
        }
        for index in range(len(self.trained.names)):
            # torch's names and shapes: a run begun in a group can continue alone
            tensors |= {f"optimizer.{index}.{name}": values[index] for name, values in state.items()}
            if self.recipe.optimizer == "adamw":
                # torch's fused AdamW counts in a float32 tensor
                tensors[f"optimizer.{index}.step"] = torch.tensor(float(self.optimizer.steps))
        return tensors

    def resume(self, resumes: Sequence[Mapping[str, Tensor]], epoch: int) -> None:
        """Put every model where its resume file, written after `epoch`, has it."""
        for model, tensors in enumerate(resumes):
            weights = resumed_weights(tensors)
            self.weights[model] = flatten({name: weights[name] for name in self.layout.names}).to(self.device)
            for name in self.optimizer.of_model(model):
                values = [tensors[f"optimizer.{index}.{name}"] for index in range(len(self.trained.names))]
                self.optimizer.state[name][model] = torch.cat([value.flatten() for value in values]).to(self.device)
        # a resume file is written between epochs, and a step is never skipped
        self.optimizer.steps = epoch * self.steps

    def keep(self, models: Sequence[int]) -> None:
        """Continue with these models alone."""
        self.recipes = [self.recipes[model] for model in models]
        self.mix = [self.mix[model] for model in models]
        self.smoothing = self.smoothing[list(models)]
        self.weights = self.weights[list(models)]
        self.optimizer.keep(models)
