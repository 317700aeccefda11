"""Train one run: supervised or contrastive pre-training, or fine-tuning from a parent's trunk.

Initial weights, data order, views and mixing each have a seed derived from the run's seed and the epoch alone, so
a run gives the same weights bit for bit on the same machine, whether it was interrupted or not.
"""

import hashlib
import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize, one_hot

from vitzoo_hf.augment import augment
from vitzoo_hf.blueprint import Blueprint, Recipe, Run
from vitzoo_hf.checkpoint import RunFolder, load_optimizer_tensors, optimizer_tensors
from vitzoo_hf.flatten import is_head
from vitzoo_hf.images import ImageSet, load_images
from vitzoo_hf.schema import VERSION, ZooError, fingerprint
from vitzoo_hf.vit import create, import_timm

EVALUATION_BATCH = 256


class DivergedError(ZooError):
    """A loss or weight stopped being finite."""


def train_run(
    blueprint: Blueprint,
    run: Run,
    folder: Path,
    *,
    device: str = "cpu",
    on_epoch: Callable[[int], None] = lambda epoch: None,
) -> None:
    """Train `run` into `folder / run.run_id`, from where an earlier call left off.

    Args:
        blueprint: the zoo the run belongs to.
        run: one of its runs; a fine-tuning run finds its parent's final weights in `folder`.
        folder: holds one folder a run.
        device: where to train.
        on_epoch: called with the number of completed epochs, also for those found done.

    Raises:
        DivergedError: if the loss stops being finite; this is recorded, and the run is not tried again.
        ZooError: if the parent is missing, the images cannot be had, or the folder holds another training.
    """
    place = RunFolder(folder / run.run_id)
    place.open(run_spec(blueprint, run))
    if place.divergence:
        raise DivergedError(f"{run.run_id} diverged in epoch {place.divergence['epoch']}")
    if set(run.keep_epochs) <= set(place.epochs()) and place.intact():
        place.drop_resume()
        on_epoch(run.epochs)
        return
    images = load_images(run.images, blueprint.images[run.images])
    trainer = Trainer(run.recipe, images, initial_model(blueprint, run, images, folder), run.epochs, device)
    done = trainer.resume(place, run.keep_epochs)
    if done is None:
        done = 0
        if 0 in run.keep_epochs:
            place.save_epoch(0, trainer.model.state_dict(), trainer.results())
    on_epoch(done)
    for epoch in range(done + 1, run.epochs + 1):
        try:
            trainer.train_epoch(epoch)
        except DivergedError as error:
            place.record_divergence(epoch, str(error))
            raise DivergedError(f"{run.run_id} diverged in epoch {epoch}: {error}") from None
        if epoch in run.keep_epochs:
            place.save_epoch(epoch, trainer.model.state_dict(), trainer.results())
            if epoch < run.epochs:
                place.save_resume(epoch, trainer.resume_tensors())
        on_epoch(epoch)
    place.drop_resume()


def is_finished(blueprint: Blueprint, run: Run, folder: Path) -> bool:
    """Whether `folder` holds all of this run.

    Raises:
        ZooError: if it holds another training under the same id.
    """
    place = RunFolder(folder / run.run_id)
    if not (place.path / "run.json").is_file():
        return False
    place.open(run_spec(blueprint, run))
    return set(run.keep_epochs) <= set(place.epochs()) and place.intact()


def run_spec(blueprint: Blueprint, run: Run) -> dict[str, Any]:
    """What determines a run's weights, and what made them; its fingerprint covers the lineage.

    Paths and anything else of this machine stay out.
    """
    spec = asdict(blueprint.images[run.images])
    del spec["path"], spec["classes"]
    parent = next((other for other in blueprint.runs if other.run_id == run.parent_run), None)
    decides = {
        "architecture": blueprint.architecture,
        "architecture_args": blueprint.architecture_args,
        "images": {"name": run.images, **spec},
        "recipe": asdict(run.recipe),
        "stage": run.stage,
        "epochs": run.epochs,
        "keep_epochs": list(run.keep_epochs),
        "parent": {"id": run.parent_id, "fingerprint": run_spec(blueprint, parent)["fingerprint"]}
        if parent
        else None,
    }
    timm = import_timm()
    versions = {"vitzoo_hf": VERSION, "torch": torch.__version__, "timm": timm.__version__}
    return {"fingerprint": fingerprint(decides), **decides, "versions": versions}


def architecture_args(blueprint: Blueprint, run: Run, num_classes: int) -> dict[str, Any]:
    """Arguments of `timm.create_model` for a run: a contrastive head projects, the others classify."""
    outputs = run.recipe.projection_dim if run.recipe.regime == "contrastive" else num_classes
    return blueprint.architecture_args | {"num_classes": outputs}


def head_hidden(recipe: Recipe) -> int | None:
    """Width of the hidden layer of an MLP head; None for a linear head."""
    return recipe.head_hidden if recipe.head == "mlp" else None


def fitting_args(blueprint: Blueprint, run: Run, images: ImageSet) -> dict[str, Any]:
    """`architecture_args`, once it is sure that the model takes these images.

    Raises:
        ZooError: if channels or size differ.
    """
    args = architecture_args(blueprint, run, len(images.class_names))
    channels, size = args.get("in_chans", 3), args.get("img_size", images.spec.size)
    height, width = size if isinstance(size, list) else (size, size)
    if (channels, height, width) != tuple(images.images.shape[1:]):
        raise ZooError(
            f"{blueprint.architecture} takes {channels} channels of {height}×{width}, images {run.images!r} have"
            f" {images.images.shape[1]} of {images.spec.size}×{images.spec.size}: set size and channels of the images"
        )
    return args


def initial_model(blueprint: Blueprint, run: Run, images: ImageSet, folder: Path) -> nn.Module:
    """The model at epoch 0: seeded, with its parent's trunk if it has a parent."""
    args = fitting_args(blueprint, run, images)
    recipe = run.recipe
    if recipe.ddp:
        raise ZooError(f"{run.run_id} asks for ddp: distributed training of a single run is not available yet")
    model = create(
        blueprint.architecture,
        args,
        head=recipe.head,
        head_hidden=head_hidden(recipe),
        init=recipe.init,
        seed=derive_seed(recipe.seed, "init"),
    )
    if run.parent_id and run.parent_run:
        parent = RunFolder(folder / run.parent_run)
        tensors, _ = parent.load_epoch(int(run.parent_id.rpartition("@")[2]))
        trunk = {name: tensor for name, tensor in tensors.items() if not is_head(name)}
        model.load_state_dict(trunk | {name: t for name, t in model.state_dict().items() if is_head(name)})
    return model


def derive_seed(seed: int, purpose: str, epoch: int = 0) -> int:
    """A seed for one purpose and epoch, unrelated to those of the others.

    >>> derive_seed(42, "order", 1) != derive_seed(42, "views", 1)
    True
    """
    digest = hashlib.sha256(f"{seed}:{purpose}:{epoch}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@dataclass
class Trainer:
    """A model in training: the step, the epoch, the results, what must be kept to continue."""

    recipe: Recipe
    images: ImageSet
    model: nn.Module
    epochs: int
    device: str

    def __post_init__(self) -> None:
        self.model.to(self.device)
        if self.recipe.freeze_trunk:
            for name, parameter in self.model.named_parameters():
                parameter.requires_grad_(is_head(name))
        self.optimizer = make_optimizer(self.recipe, self.model)
        pixels, labels = self.images.part("train")
        self.pixels, self.labels = pixels.to(self.device), labels.to(self.device)
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
        order = torch.randperm(
            len(self.labels), generator=torch.Generator().manual_seed(derive_seed(seed, "order", epoch))
        )
        views = torch.Generator(self.device).manual_seed(derive_seed(seed, "views", epoch))
        order = order.to(self.device)
        size = self.recipe.batch_size
        batches = full_batches(order, size) if self.contrastive else order.split(size)
        self.model.train()
        total = torch.zeros((), device=self.device)
        with seeded_globals(derive_seed(seed, "mix", epoch)):
            for number, batch in enumerate(batches):
                self._set_lr(epoch - 1 + number / len(batches))
                total += self.step(batch, views)
        finite = all(bool(parameter.isfinite().all()) for parameter in self.model.parameters())
        if not (math.isfinite(float(total)) and finite):
            raise DivergedError("the loss or a weight is no longer finite; lower the learning rate")

    def step(self, batch: Int64[Tensor, " B"], views: torch.Generator) -> Tensor:
        """One update on the training images at these positions; returns the loss, detached."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._loss(batch, views)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def _set_lr(self, position: float) -> None:
        if self.recipe.schedule == "cosine":
            for group in self.optimizer.param_groups:
                group["lr"] = self.recipe.lr * 0.5 * (1 + math.cos(math.pi * position / self.epochs))

    def _views(self, pixels: Tensor, generator: torch.Generator) -> Tensor:
        spec = self.images.spec
        view = augment(pixels.float() / 255, self.recipe.augmentation, generator)
        return (view - spec.mean) / spec.std

    def _loss(self, batch: Tensor, views: torch.Generator) -> Tensor:
        pixels = self.pixels[batch]
        if self.contrastive:
            both = torch.cat([self._views(pixels, views), self._views(pixels, views)])
            return info_nce(self.model(self.erase(both)), self.recipe.temperature)
        inputs, targets = self.mix(self._views(pixels, views), self.labels[batch])
        return cross_entropy(self.model(self.erase(inputs)), targets)

    @torch.inference_mode()
    def results(self) -> dict[str, float | None]:
        """Loss and accuracy on all training and all test images, unaugmented and in eval mode.

        A contrastive run has no accuracy; its losses are InfoNCE over fixed views, so that epochs compare.
        """
        self.model.eval()
        measured: dict[str, float | None] = {}
        for role in ("train", "test"):
            pixels, labels = self.images.part(role)
            pixels, labels = pixels.to(self.device), labels.to(self.device)
            if self.contrastive:
                measured |= {f"{role}_loss": self._contrastive_loss(pixels), f"{role}_accuracy": None}
                continue
            logits = torch.cat([self.model(self.images.normalize(part)) for part in pixels.split(EVALUATION_BATCH)])
            measured[f"{role}_loss"] = float(cross_entropy(logits.double(), labels))
            measured[f"{role}_accuracy"] = float((logits.argmax(1) == labels).double().mean())
        train, test = measured["train_accuracy"], measured["test_accuracy"]
        measured["generalization_gap"] = train - test if train is not None and test is not None else None
        return measured

    def _contrastive_loss(self, pixels: Tensor) -> float:
        views = torch.Generator(self.device).manual_seed(derive_seed(0, "fixed views"))
        losses = [
            info_nce(self.model(torch.cat([self._views(part, views) for _ in range(2)])), self.recipe.temperature)
            for part in full_batches(pixels, self.recipe.batch_size)
        ]
        return float(torch.stack(losses).double().mean())

    def resume_tensors(self) -> dict[str, Tensor]:
        """Weights and optimizer state."""
        weights = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        return weights | optimizer_tensors(self.optimizer)

    def resume(self, place: RunFolder, keep_epochs: tuple[int, ...]) -> int | None:
        """Load the resume file of `place`, if there is one and no kept epoch before it is lost; returns its epoch."""
        found = place.load_resume()
        if found is None:
            return None
        epoch, tensors = found
        if not {kept for kept in keep_epochs if kept <= epoch} <= set(place.epochs()) or not place.intact():
            return None
        weights = {
            name.removeprefix("model."): tensor for name, tensor in tensors.items() if name.startswith("model.")
        }
        self.model.load_state_dict(weights)
        load_optimizer_tensors(self.optimizer, tensors)
        return epoch


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


def make_mix(recipe: Recipe, num_classes: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """`(inputs, labels) -> (inputs, soft targets)`: label smoothing always, Mixup and CutMix as the recipe says."""
    if recipe.mixup or recipe.cutmix:
        mixup = import_timm().data.Mixup(
            mixup_alpha=recipe.mixup,
            cutmix_alpha=recipe.cutmix,
            label_smoothing=recipe.label_smoothing,
            num_classes=num_classes,
        )

        def mix(inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            even = len(labels) // 2 * 2
            if even == 0:
                return inputs, soften(labels, num_classes, recipe.label_smoothing)
            return mixup(inputs[:even], labels[:even])

        return mix
    return lambda inputs, labels: (inputs, soften(labels, num_classes, recipe.label_smoothing))


def soften(labels: Tensor, num_classes: int, smoothing: float) -> Float[Tensor, "B C"]:
    """One-hot targets with `smoothing` spread evenly over all classes.

    >>> soften(torch.tensor([1]), 2, 0.2)
    tensor([[0.1000, 0.9000]])
    """
    return one_hot(labels, num_classes).float() * (1 - smoothing) + smoothing / num_classes


def make_erase(recipe: Recipe, device: str) -> Callable[[Tensor], Tensor]:
    """Timm's RandomErasing ('pixel' mode), or nothing."""
    if not recipe.random_erase:
        return lambda inputs: inputs
    return import_timm().data.random_erasing.RandomErasing(recipe.random_erase, mode="pixel", device=device)


def info_nce(outputs: Float[Tensor, "B2 K"], temperature: float) -> Tensor:
    """InfoNCE over a batch of two views each: rows i and i + B are the views of image i (Chen et al. 2020).

    >>> info_nce(torch.eye(2).repeat(2, 1), temperature=0.01).item() < 1e-3
    True
    """
    embedded = normalize(outputs, dim=1)
    similarity = embedded @ embedded.T / temperature
    similarity.fill_diagonal_(-math.inf)
    half = len(outputs) // 2
    positives = torch.arange(2 * half, device=outputs.device).roll(half)
    return cross_entropy(similarity, positives)


@contextmanager
def seeded_globals(seed: int) -> Iterator[None]:
    """Seed the global generators that timm's Mixup and RandomErasing draw from; put them back afterwards."""
    before = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])
