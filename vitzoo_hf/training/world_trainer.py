"""Models in training together, each on images of its own drawn from a world, by one learner.

All that a model draws, from images to batches, comes from its own seed and world, so that it does not matter which
models train beside it. An epoch has as many steps as the learner says, whatever the number of images.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from vitzoo_hf.blueprint.blueprint import Run
from vitzoo_hf.blueprint.images_spec import ImagesSpec
from vitzoo_hf.blueprint.world import Learner
from vitzoo_hf.format.layout import unflatten
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.images.preparation import standardize
from vitzoo_hf.images.sources import ImageSet
from vitzoo_hf.images.world_pool import Draw, WorldPool, coloured, colourless
from vitzoo_hf.training.checkpoint import Results
from vitzoo_hf.training.feed import Draws, FedBatch, Feed, Positions
from vitzoo_hf.training.seeds import derive_seed
from vitzoo_hf.training.stacked_trainer import StackedTrainer
from vitzoo_hf.training.trainer import EVALUATION_BATCH, Measured, results_of
from vitzoo_hf.training.world_losses import even_shares, group_shares, penalised_risk

MEASURED_IMAGES = 1024
"""Training loss and accuracy are measured on a model's first so many training images."""
PATCH_WEIGHT = "patch_embed.proj.weight"


class WorldFeed(Feed):
    """Views of the images that each of P models has drawn from a world; positions count through a model's own draw.

    Args:
        pixels: uint8 `[2, N, S, S]`, the grey images of the pool: plain, and in the style of group 1.
        spec: how the images were prepared.
        draws: P draws from the pool, of any lengths.
        learner: the learner, which decides what colours a model sees.
        augmentation: the policy of `vitzoo_hf.images.augment.augment`.
        device: where to train.
    """

    def __init__(
        self,
        pixels: UInt8[Tensor, "2 N S S"],
        spec: ImagesSpec,
        draws: Sequence[Draw],
        learner: Learner,
        augmentation: str,
        device: str,
    ) -> None:
        super().__init__(spec, augmentation, views=1)
        self._learner = learner.learner
        self.grey = pixels.flatten(0, 1).to(device)
        offset = pixels.shape[1]
        self.places = _padded([draw.positions + offset * draw.groups for draw in draws]).to(device)
        self.colours = _padded([draw.colours for draw in draws]).to(device)

    def _images(self, positions: Positions, draws: Draws) -> Float[Tensor, "1 PB 3 S S"]:
        colours = self.colours.gather(1, positions)
        if self._learner == "colour-randomised":
            shape, device = positions.shape[1:], positions.device
            # from the generator of views, before them: the order decides both
            colours = torch.stack([torch.randint(2, shape, generator=views, device=device) for views in draws.views])
        return self._in_colours(self.places.gather(1, positions), colours).flatten(0, 1)[None]

    def first(self, start: int, stop: int) -> Float[Tensor, "P n 3 S S"]:
        """The images `start` to `stop` of every model's draw, unaugmented and standardized."""
        images = self._in_colours(self.places[:, start:stop], self.colours[:, start:stop])
        return standardize(images.flatten(0, 1), self._spec.mean, self._spec.std).view_as(images)

    def keep(self, models: Sequence[int]) -> None:
        """Continue with the draws of these models alone."""
        self.places, self.colours = self.places[list(models)], self.colours[list(models)]

    def _in_colours(self, places: Int64[Tensor, "P n"], colours: Int64[Tensor, "P n"]) -> Float[Tensor, "P n 3 S S"]:
        grey = self.grey[places].float() / 255
        return colourless(grey) if self._learner == "causal" else coloured(grey, colours)


class WorldTrainer(StackedTrainer):
    """The trainer of P models on images of their own; see `vitzoo_hf.training.loop.Trainer` for its methods.

    Args:
        runs: P runs on one world image set, equal in all that `vitzoo_hf.training.stacked.shape_of` compares.
        images: the image set, whose pool the runs draw from.
        models: P models at their initial weights.
        device: where to train.

    Raises:
        ZooError: if the images are no world, the models no plain ViTs, or the pool lacks images that a run draws.
    """

    feed: WorldFeed

    def __init__(self, runs: Sequence[Run], images: ImageSet, models: Sequence[nn.Module], device: str) -> None:
        pool, learner, recipe = images.pool, runs[0].learner, runs[0].recipe
        if pool is None or learner is None:
            raise ZooError(f"images {images.name!r} are no world: set `world` of the images")
        draws = [_in_blocks(_draw(pool, run), learner) for run in runs]
        feed = WorldFeed(pool.pixels, images.spec, draws, learner, recipe.augmentation, device)
        super().__init__([run.recipe for run in runs], images, models, runs[0].epochs, device, feed)
        self.learner = learner
        self.stop_losses = torch.tensor([run.learner.stop_loss for run in runs if run.learner]).to(device)
        worlds = [run.world for run in runs if run.world]
        self.steps = learner.steps(worlds[0], recipe.batch_size)
        self.blocks = learner.blocks(worlds[0])
        self.counts = [len(draw) for draw in draws]
        self.drawn_labels = _padded([draw.labels for draw in draws]).to(device)
        self.shares = even_shares(len(runs), self.blocks).to(device)
        self._set_stopped(torch.zeros(len(runs), dtype=torch.int64))
        self._forget_colour()

    def batches(self, epoch: int) -> Sequence[Positions]:
        """Positions `[P, B]` in each model's own draw, batch by batch; with environments, in as many equal blocks."""
        entries = [self._entries(model, epoch) for model in range(self.num_models)]
        return list(torch.stack(entries, 1).to(self.device))

    def _entries(self, model: int, epoch: int) -> Int64[Tensor, "steps B"]:
        # a blueprint is refused unless batches and images divide into environments
        size, seed = self.recipe.batch_size // self.blocks, self.recipes[model].seed
        count = self.counts[model] // self.blocks
        blocks = []
        for block in range(self.blocks):
            order = _endless_order(count, seed, block, (epoch - 1) * self.steps * size, self.steps * size)
            blocks.append((block * count + order).view(self.steps, size))
        return torch.cat(blocks, 1)

    def step(self, batches: Iterator[FedBatch], draws: Draws, position: float, count: int = 1) -> Float[Tensor, " P"]:
        """Update every model that has not stopped; returns their mean cross-entropies, detached."""
        (batch,) = batches  # groups do not accumulate
        labels = self.drawn_labels.gather(1, batch.positions)
        tensors, changing = self._tensors(self.weights)
        logits = self.vit.logits(tensors, batch.inputs)
        targets = self._softened(labels)
        losses = cross_entropy(logits.flatten(0, 1), targets.flatten(0, 1), reduction="none").view(labels.shape)
        # the optimizer moves all rows at once, also of models that have stopped: put them back
        before = None if self.is_stopped is None else self.weights.detach().clone()
        self._update(self._objective(losses, logits, labels), changing, position)
        self._forget_colour()
        if before is not None and self.is_stopped is not None:
            with torch.no_grad():
                torch.where(self.is_stopped[:, None], before, self.weights, out=self.weights)
        return losses.detach().mean(1)

    def _objective(
        self, losses: Float[Tensor, "P B"], logits: Float[Tensor, "P B C"], labels: Int64[Tensor, "P B"]
    ) -> Float[Tensor, " P"]:
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

    def _set_stopped(self, stopped: Int64[Tensor, " P"]) -> None:
        """Note the epochs after which models stopped, 0 for models that train, and which these are on the device."""
        self.stopped = stopped
        # a mask with as many rows as models: picking the stopped ones would make shapes of a step depend on values
        self.is_stopped = (stopped > 0).to(self.device) if bool((stopped > 0).any()) else None

    @torch.no_grad()
    def _forget_colour(self) -> None:
        """Give both colours their mean weights where the learner sees no colour, so that its models see none."""
        if self.learner.learner == "causal":
            weight = unflatten(self.weights, self.layout)[PATCH_WEIGHT]
            # the two colours are channels 0 and 1; the third is black
            weight[:, :, :2] = weight[:, :, :2].mean(2, keepdim=True)

    def end_epoch(self, losses: Float[Tensor, " P"], epoch: int) -> Bool[Tensor, " P"]:
        """Stop models whose mean loss of this epoch was low enough; returns which models are finite."""
        is_low = (losses < self.stop_losses).cpu()
        self._set_stopped(torch.where(is_low & (self.stopped == 0), epoch, self.stopped))
        return super().end_epoch(losses, epoch)

    @torch.no_grad()
    def results(self) -> list[Results]:
        """For each model: loss and accuracy on its first training images and on the test images, and its steps."""
        tensors = unflatten(self.weights, self.layout)
        measured = zip(
            self._on_training_images(tensors), self._measured(tensors, "test"), self.steps_made(), strict=True
        )
        return [results_of(train, test, steps=float(steps)) for train, test, steps in measured]

    def _on_training_images(self, tensors: dict[str, Tensor]) -> list[Measured]:
        losses, hits = [], []
        most = min(MEASURED_IMAGES, max(self.counts))
        for start in range(0, most, EVALUATION_BATCH):
            stop = min(start + EVALUATION_BATCH, most)
            images, labels = self.feed.first(start, stop), self.drawn_labels[:, start:stop]
            logits = self.vit.logits(tensors, images).double()
            losses.append(cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape))
            hits.append((logits.argmax(2) == labels).double())
        # draws may differ in length: padding counts for nothing
        rows = zip(torch.cat(losses, 1), torch.cat(hits, 1), self.counts, strict=True)
        return [Measured(float(loss[:count].mean()), float(hit[:count].mean())) for loss, hit, count in rows]

    def steps_made(self) -> list[int]:
        """Optimiser steps of each model; fewer for a model that stopped early."""
        epochs = self.optimizer.steps // self.steps
        return [self.steps * (stopped or epochs) for stopped in self.stopped.tolist()]

    def resume_tensors(self, model: int) -> dict[str, Tensor]:
        """Weights and optimizer state of one model, the epoch it stopped after, and its shares of environments."""
        state = {"world.stopped": self.stopped[model], "world.shares": self.shares[model]}
        return super().resume_tensors(model) | state

    def resume(self, resumes: Sequence[Mapping[str, Tensor]], epoch: int) -> None:
        """Put every model where its resume file, written after `epoch`, has it."""
        super().resume(resumes, epoch)
        self._set_stopped(torch.stack([tensors["world.stopped"] for tensors in resumes]))
        self.shares = torch.stack([tensors["world.shares"] for tensors in resumes]).to(self.device)

    def keep(self, models: Sequence[int]) -> None:
        """Continue with these models alone."""
        super().keep(models)
        self.feed.keep(models)
        self.counts = [self.counts[model] for model in models]
        for name in ("stop_losses", "drawn_labels", "shares"):
            setattr(self, name, getattr(self, name)[list(models)])
        self._set_stopped(self.stopped[list(models)])


def _draw(pool: WorldPool, run: Run) -> Draw:
    assert run.world is not None
    assert run.learner is not None
    return pool.training_draw(run.world, run.learner, run.recipe.seed)


def _in_blocks(draw: Draw, learner: Learner) -> Draw:
    """Ordered by environment, if batches are made of environments."""
    # stable: within an environment the draw keeps its order on every machine
    return draw.take(draw.environments.argsort(stable=True)) if learner.by_environment else draw


def _padded(rows: Sequence[Tensor]) -> Tensor:
    return nn.utils.rnn.pad_sequence(list(rows), batch_first=True)


def _endless_order(count: int, seed: int, block: int, start: int, length: int) -> Int64[Tensor, " length"]:
    """Part of an endless order in which all of `count` entries come once before any comes again."""
    first, last = start // count, (start + length - 1) // count
    passes = []
    for number in range(first, last + 1):
        # a seed for every pass, so that a resumed run starts in the middle of one
        generator = torch.Generator().manual_seed(derive_seed(seed, f"order of {block}", number))
        passes.append(torch.randperm(count, generator=generator))
    return torch.cat(passes)[start - first * count :][:length]
