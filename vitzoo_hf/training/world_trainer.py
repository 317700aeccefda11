"""Models in training together, each on images of its own drawn from a world, by one learner.

Everything a model draws, from images to batches, comes from its own seed and world, so that it does not matter which
models train beside it. An epoch has as many steps as the learner says, whatever the number of images.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from vitzoo_hf.blueprint.blueprint import Run
from vitzoo_hf.blueprint.world import Learner
from vitzoo_hf.format.layout import unflatten
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.images.augment import augment
from vitzoo_hf.images.preparation import standardize
from vitzoo_hf.images.sources import ImageSet
from vitzoo_hf.images.world_pool import Draw, WorldPool, coloured, colourless
from vitzoo_hf.training.seeds import derive_seed
from vitzoo_hf.training.stacked_trainer import Draws, StackedTrainer
from vitzoo_hf.training.trainer import EVALUATION_BATCH
from vitzoo_hf.training.world_losses import even_shares, group_shares, penalised_risk

MEASURED_IMAGES = 1024
"""Training loss and accuracy are measured on a model's first so many training images."""
PATCH_WEIGHT = "patch_embed.proj.weight"


class WorldTrainer(StackedTrainer):
    """G models in training on images of their own.

    Args:
        runs: of one world image set and of one `vitzoo_hf.training.stacked.shape_of`.
        images: the image set, whose pool they draw from.
        models: at their initial weights.
        device: where to train.

    Raises:
        ZooError: if the images are no world, the models no plain ViTs, or the pool lacks images that a run draws.
    """

    def __init__(self, runs: Sequence[Run], images: ImageSet, models: Sequence[nn.Module], device: str) -> None:
        super().__init__([run.recipe for run in runs], images, models, runs[0].epochs, device)
        pool, learner = images.pool, runs[0].learner
        if pool is None or learner is None:
            raise ZooError(f"images {images.name!r} are no world: set `world` of the images")
        self.learner = learner
        self.stop_losses = torch.tensor([run.learner.stop_loss for run in runs if run.learner]).to(device)
        worlds = [run.world for run in runs if run.world]
        self.steps = learner.steps(worlds[0], self.recipe.batch_size)
        self.blocks = learner.blocks(worlds[0])
        drawn = [_in_blocks(_draw(pool, run), learner) for run in runs]
        self.counts = [len(draw) for draw in drawn]
        self.grey = pool.pixels.flatten(0, 1).to(device)
        offset = pool.pixels.shape[1]
        self.places = _padded([draw.positions + offset * draw.groups for draw in drawn]).to(device)
        self.own_labels = _padded([draw.labels for draw in drawn]).to(device)
        self.colours = _padded([draw.colours for draw in drawn]).to(device)
        self.shares = even_shares(len(runs), self.blocks).to(device)
        self.stopped = torch.zeros(len(runs), dtype=torch.int64)
        self._forget_colour()

    def train_epoch(self, epoch: int) -> list[int]:
        """The steps of an epoch; returns the positions of models that are no longer finite."""
        draws = self.draws(epoch)
        total = torch.zeros(len(self.recipes), device=self.device)
        for number, batch in enumerate(self.batches(epoch)):
            total += self.step(batch, draws, epoch - 1 + number / self.steps)
        self._stop(total / self.steps, epoch)
        finite = total.isfinite() & self.weights.isfinite().all(1)
        return [model for model, fine in enumerate(finite.tolist()) if not fine]

    def batches(self, epoch: int) -> Int64[Tensor, "steps G B"]:
        """Entries of each model's own draw, batch by batch; with environments, in as many equal blocks."""
        own = [self._entries(model, epoch) for model in range(len(self.recipes))]
        return torch.stack(own, 1).to(self.device)

    def _entries(self, model: int, epoch: int) -> Int64[Tensor, "steps B"]:
        size, seed = self.recipe.batch_size // self.blocks, self.recipes[model].seed
        count = self.counts[model] // self.blocks
        blocks = []
        for block in range(self.blocks):
            order = _endless_order(count, seed, block, (epoch - 1) * self.steps * size, self.steps * size)
            blocks.append((block * count + order).view(self.steps, size))
        return torch.cat(blocks, 1)

    def step(self, batch: Int64[Tensor, "G B"], draws: Draws, position: float) -> Float[Tensor, " G"]:
        """One update of every model that has not stopped; returns their mean cross-entropies, detached.

        Args:
            batch: entries of each model's own draw.
            draws: of this epoch.
            position: epochs completed, with the share of this one, for the schedule.
        """
        inputs, labels = self._fed(batch, draws)
        tensors = unflatten(self.weights, self.layout)
        changing = [tensors[name].requires_grad_() for name in self.trained.names]
        logits = self.vit.logits(tensors, inputs)
        targets = self._softened(labels)
        losses = cross_entropy(logits.flatten(0, 1), targets.flatten(0, 1), reduction="none").view(labels.shape)
        ended = self.stopped > 0
        before = self.weights.detach()[ended].clone()
        self._update(self._objective(losses, logits, labels), changing, position)
        self._forget_colour()
        self.weights[ended] = before
        return losses.detach().mean(1)

    def _objective(
        self, losses: Float[Tensor, "G B"], logits: Float[Tensor, "G B K"], labels: Int64[Tensor, "G B"]
    ) -> Float[Tensor, " G"]:
        if not self.learner.by_environment:
            return losses.mean(1)
        split = (self.blocks, -1)
        by_environment = losses.unflatten(1, split)
        if self.learner.learner == "group-dro":
            risks = by_environment.mean(2)
            self.shares = group_shares(self.shares, risks, rate=self.learner.group_rate)
            return (self.shares * risks).sum(1)
        return penalised_risk(
            self.learner, by_environment, logits.unflatten(1, split), labels.unflatten(1, split), self.optimizer.steps
        )

    def _fed(self, batch: Int64[Tensor, "G B"], draws: Draws) -> tuple[Float[Tensor, "G B 3 S S"], Tensor]:
        """What the models are fed, and their labels."""
        colours = self.colours.gather(1, batch)
        if self.learner.learner == "colour-randomised":
            shape = batch.shape[1:]
            anew = [torch.randint(2, shape, generator=views, device=self.device) for views in draws.views]
            colours = torch.stack(anew)
        images = self._images(self.places.gather(1, batch), colours)
        view = augment(images.flatten(0, 1), self.recipe.augmentation, *draws.views).view_as(images)
        return self._standardized(view), self.own_labels.gather(1, batch)

    def _images(self, places: Int64[Tensor, "G B"], colours: Int64[Tensor, "G B"]) -> Float[Tensor, "G B 3 S S"]:
        grey = self.grey[places].float() / 255
        return colourless(grey) if self.learner.learner == "causal" else coloured(grey, colours)

    def _standardized(self, images: Tensor) -> Tensor:
        spec = self.images.spec
        return standardize(images.flatten(0, 1), spec.mean, spec.std).view_as(images)

    @torch.no_grad()
    def _forget_colour(self) -> None:
        """Give both colours the same weights, their mean, where the learner sees no colour: its models see none."""
        if self.learner.learner == "causal":
            weight = unflatten(self.weights, self.layout)[PATCH_WEIGHT]
            weight[:, :, :2] = weight[:, :, :2].mean(2, keepdim=True)

    def _stop(self, losses: Float[Tensor, " G"], epoch: int) -> None:
        """End the training of models whose mean loss of this epoch was low enough."""
        low = (losses < self.stop_losses).cpu()
        self.stopped = torch.where(low & (self.stopped == 0), epoch, self.stopped)

    @torch.no_grad()
    def results(self) -> list[dict[str, float | None]]:
        """Of each model: loss and accuracy on its first training images and on the test images, and its steps."""
        pixels, labels = self.images.part("test")
        tensors = unflatten(self.weights, self.layout)
        on_test = self._measured(tensors, pixels.to(self.device), labels.to(self.device))
        measured: list[dict[str, float | None]] = []
        for train, test_loss, test_accuracy, steps in zip(
            self._on_training_images(tensors), *on_test, self.steps_made(), strict=True
        ):
            train_loss, train_accuracy = train
            own: dict[str, float | None] = {"train_loss": train_loss, "train_accuracy": train_accuracy}
            own |= {"test_loss": test_loss, "test_accuracy": test_accuracy, "steps": float(steps)}
            own["generalization_gap"] = train_accuracy - (test_accuracy or 0.0)
            measured.append(own)
        return measured

    def _on_training_images(self, tensors: dict[str, Tensor]) -> list[tuple[float, float]]:
        losses, right = [], []
        for entries in torch.arange(min(MEASURED_IMAGES, max(self.counts))).split(EVALUATION_BATCH):
            each = slice(int(entries[0]), int(entries[-1]) + 1)
            images = self._standardized(self._images(self.places[:, each], self.colours[:, each]))
            logits = self.vit.logits(tensors, images).double()
            labels = self.own_labels[:, each]
            losses.append(cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape))
            right.append((logits.argmax(2) == labels).double())
        loss, hits = torch.cat(losses, 1), torch.cat(right, 1)
        return [(float(loss[g, :n].mean()), float(hits[g, :n].mean())) for g, n in enumerate(self.counts)]

    def steps_made(self) -> list[int]:
        """Optimiser steps of each model; fewer than the others where it stopped early."""
        done = self.optimizer.steps // self.steps
        return [self.steps * (stopped or done) for stopped in self.stopped.tolist()]

    def resume_tensors(self, model: int) -> dict[str, Tensor]:
        """Weights and optimizer state of one model, when it stopped, and its shares of environments."""
        own = {"world.stopped": self.stopped[model], "world.shares": self.shares[model]}
        return super().resume_tensors(model) | own

    def resume(self, resumes: Sequence[dict[str, Tensor]], epoch: int) -> None:
        """Put every model where its resume file, written after `epoch`, has it."""
        super().resume(resumes, epoch)
        self.optimizer.steps = epoch * self.steps
        self.stopped = torch.stack([tensors["world.stopped"] for tensors in resumes])
        self.shares = torch.stack([tensors["world.shares"] for tensors in resumes]).to(self.device)

    def keep(self, models: Sequence[int]) -> None:
        """Go on with these models alone."""
        super().keep(models)
        self.counts = [self.counts[model] for model in models]
        for name in ("stop_losses", "places", "own_labels", "colours", "shares", "stopped"):
            setattr(self, name, getattr(self, name)[list(models)])


def _draw(pool: WorldPool, run: Run) -> Draw:
    assert run.world is not None
    assert run.learner is not None
    return pool.training_draw(run.world, run.learner, run.recipe.seed)


def _in_blocks(draw: Draw, learner: Learner) -> Draw:
    """Ordered by environment, if batches are made of environments."""
    return draw.take(draw.environments.argsort(stable=True)) if learner.by_environment else draw


def _padded(rows: Sequence[Tensor]) -> Tensor:
    return nn.utils.rnn.pad_sequence(list(rows), batch_first=True)


def _endless_order(count: int, seed: int, block: int, start: int, length: int) -> Int64[Tensor, " length"]:
    """Part of an endless order in which all of `count` entries come once before any comes again."""
    first, last = start // count, (start + length - 1) // count
    passes = []
    for number in range(first, last + 1):
        generator = torch.Generator().manual_seed(derive_seed(seed, f"order of {block}", number))
        passes.append(torch.randperm(count, generator=generator))
    return torch.cat(passes)[start - first * count :][:length]
