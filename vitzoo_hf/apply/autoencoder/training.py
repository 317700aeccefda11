"""Train an autoencoder on the weights that a zoo streams; training resumes at any step.

All random numbers of a step come from a seed of that step, so an interrupted training ends in the same weights, bit
for bit, as an uninterrupted one.

Query images are the images on which a step compares outputs of decoded networks with those of the originals; outputs
of all training models on the pool are computed once and stay in memory. Views are weights of the same function with
units in another order, drawn anew for every model of a batch.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from vitzoo_hf.apply.autoencoder.losses import (
    Behaviour,
    Composite,
    behavioural_loss,
    contrastive_loss,
    structural_loss,
)
from vitzoo_hf.apply.autoencoder.metrics import Networks
from vitzoo_hf.apply.autoencoder.model import WeightAutoencoder
from vitzoo_hf.apply.autoencoder.recipe import AutoencoderRecipe
from vitzoo_hf.apply.autoencoder.scaling import Scaling, layer_components
from vitzoo_hf.apply.autoencoder.tokens import Tokenizer, check_finite
from vitzoo_hf.apply.autoencoder.trained import FILE, Trained, resume, save, untrained_model
from vitzoo_hf.evaluation.image_sets import statistics_of
from vitzoo_hf.format.layout import Layout, unflatten
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.images.corruptions import corrupted, parse_corruption
from vitzoo_hf.models.batched import BatchedViT
from vitzoo_hf.models.population import Population
from vitzoo_hf.models.rebuild import usable_device
from vitzoo_hf.zoo import Zoo
from vitzoo_hf.zoo.stream import Batch, Stream


@dataclass(frozen=True)
class Queries:
    """A pool of images with the outputs of the training models.

    Attributes:
        patches: images of the pool, cut into patches.
        logits: id of a training model -> its outputs on the pool.
    """

    patches: Float[Tensor, "Q t c"]
    logits: dict[str, Float[Tensor, "Q C"]]


def query_outputs(train: Zoo, trained: Trained, device: torch.device) -> Queries:
    """Make the pool of a recipe, and compute the outputs of the training models on it.

    Raises:
        ZooError: if models differ in dataset, or the zoo has no selection images.
    """
    datasets = sorted(set(train.index["dataset"]))
    if len(datasets) > 1:
        raise ZooError(
            f"these models were trained on {datasets}, so no images are queries for all: filter by dataset"
        )
    images = query_images(train, datasets[0], trained.recipe).to(device)
    population = Population.from_rows(train.rows(), device)
    logits = dict(zip(population.model_ids, population(images), strict=True))
    return Queries(trained.networks.patches(images), logits)


def query_images(zoo: Zoo, dataset: str, recipe: AutoencoderRecipe) -> Float[Tensor, "Q C H W"]:
    """Images of a recipe's pool, normalised for the models of a dataset.

    The images are selection images, corrupted selection images, or uniform noise in the range of selection images.
    """
    images, _ = zoo.probes(dataset, "selection")
    generator = torch.Generator().manual_seed(recipe.seed)
    # drawn by the recipe's seed alone, so a resumed training has the same pool
    images = images[torch.randperm(len(images), generator=generator)[: recipe.pool]]
    if recipe.query_images == "data":
        return images
    if recipe.query_images == "noise":
        generator = torch.Generator().manual_seed(recipe.seed)
        low, high = float(images.min()), float(images.max())
        return low + (high - low) * torch.rand(images.shape, generator=generator)
    mean, std = statistics_of(zoo.manifest["images"][dataset])
    kind, severity = parse_corruption(recipe.query_images)
    pixels = (images * std + mean).clamp(0, 1)
    return (corrupted(pixels, kind, severity, seed=recipe.seed) - mean) / std


def random_views(
    vectors: Float[Tensor, "B D"],
    layout: Layout,
    vit: BatchedViT,
    families: Sequence[str],
    generator: torch.Generator,
) -> Float[Tensor, "B D"]:
    """Put units of MLPs and heads of attention in random orders, which leaves the functions of models unchanged.

    Args:
        vectors: weights of plain ViTs of one layout; they are not changed.
        layout: layout of the vectors.
        vit: sizes of the ViT.
        families: `mlp`, `heads`, both or none.
        generator: source of the orders.
    """
    if not families:
        return vectors
    views = vectors.clone()
    named = unflatten(views, layout)
    B = len(vectors)
    for number in range(vit.depth):
        block = f"blocks.{number}."
        if "mlp" in families:
            order = _orders(B, vit.hidden, generator, vectors.device)
            for name, axis in (("mlp.fc1.weight", 1), ("mlp.fc1.bias", 1), ("mlp.fc2.weight", 2)):
                _reorder(named[block + name], order, axis)
        if "heads" in families:
            order = _orders(B, vit.heads, generator, vectors.device)
            for name in ("attn.qkv.weight", "attn.qkv.bias"):
                if block + name in named:
                    _reorder(named[block + name].unflatten(1, (3, vit.heads, -1)), order, 2)
            _reorder(named[block + "attn.proj.weight"].unflatten(2, (vit.heads, -1)), order, 2)
    return views


def _orders(models: int, size: int, generator: torch.Generator, device: torch.device) -> Int64[Tensor, "B size"]:
    # drawn on the CPU, so that training on a GPU draws the same orders
    return torch.rand(models, size, generator=generator).argsort(1).to(device)


def _reorder(tensor: Tensor, order: Int64[Tensor, "B size"], axis: int) -> None:
    """Bring entry `order[b, i]` of model b to place i of an axis, in place."""
    shape = [1] * tensor.ndim
    shape[0], shape[axis] = order.shape
    tensor.copy_(tensor.gather(axis, order.view(shape).expand_as(tensor)))


RISE, START, END = 0.3, 1 / 25, 1e-4 / 25
"""Share of the steps in which the learning rate rises, and its first and last factor: torch's OneCycleLR."""
SAVE_EVERY, NOTE_EVERY = 200, 20
SAVE_SECONDS = 30.0
LOST = ("dropped", "skipped")
"""Decoded networks left out of the behavioural loss, and steps without a finite gradient."""
STATISTICS_NUMBERS = 2**24
"""Weights that are read at once for the scaling and the components."""


def train_autoencoder(
    zoo: Zoo,
    recipe: AutoencoderRecipe,
    folder: Path | None = None,
    *,
    device: str = "cpu",
    on_step: Callable[[int, dict[str, float]], None] = lambda step, losses: None,
) -> Trained:
    """Train on the models of a zoo's train split, all of one layout.

    Args:
        zoo: zoo filtered to the models to train on; its `selection` images are the queries.
        recipe: settings of the training.
        folder: folder of the checkpoint; an earlier checkpoint of the recipe in it is continued.
        device: device that trains.
        on_step: called after each step with its number and losses.

    Raises:
        ZooError: if the models differ in layout or outputs, the zoo carries no selection images, or the folder holds
            another training.
    """
    place = usable_device(device)
    train = zoo.filter(split="train")
    if len(train) == 0:
        raise ZooError(f"{zoo.name} has no training models among those chosen: loosen the filter, or give it splits")
    if recipe.contrast and len(train) < 2:
        raise ZooError(
            "contrast compares models, and one training model is chosen: loosen the filter, or leave it out"
        )
    trained = _fresh(train, recipe, place)
    optimizer = _optimizer(trained.model, recipe)
    stream = train.stream(batch_size=recipe.batch_size, shuffle=True, seed=recipe.seed, device=device)
    if folder is not None:
        resume(folder / FILE, trained, optimizer, stream)
    if folder is not None and trained.step == 0:
        save(folder / FILE, trained, optimizer, stream)
    queries = query_outputs(train, trained, place) if trained.loss.shares["behaviour"] else None
    trained.model.train()
    if recipe.compile:
        trained.model.compile()  # in place, so that names in the state dict stay those of the file
    lost = dict.fromkeys(LOST, 0.0)
    saved = time.monotonic()
    for batch in _endless(stream, least=2 if recipe.contrast else 1):
        if trained.step >= recipe.steps:
            break
        check_finite(batch["weights"], batch["model_id"])
        losses = _step(trained, optimizer, batch["weights"], batch["model_id"], queries)
        trained.step += 1
        on_step(trained.step, losses)
        lost = {name: number + losses[name] for name, number in lost.items()}
        last = trained.step == recipe.steps
        if trained.step % NOTE_EVERY == 0 or trained.step == 1 or last:
            trained.history.append({"step": float(trained.step)} | losses | lost)
            lost = dict.fromkeys(LOST, 0.0)
        # also by time: on slow machines 200 steps would be long to lose
        due = trained.step % SAVE_EVERY == 0 or time.monotonic() - saved > SAVE_SECONDS
        if folder is not None and (due or last):
            save(folder / FILE, trained, optimizer, stream)
            saved = time.monotonic()
    trained.model.eval()
    return trained


def _fresh(train: Zoo, recipe: AutoencoderRecipe, device: torch.device) -> Trained:
    """Make the autoencoder of a recipe before its first step, with the statistics of the training models."""
    layouts = sorted(set(train.index["layout"]))
    if len(layouts) > 1:
        raise ZooError(f"these models have {len(layouts)} layouts; an autoencoder takes one: filter by `head`")
    networks = Networks.like(next(train.rows()))
    tokenizer = Tokenizer.of(networks.layout, width=recipe.token_width or None, dense=recipe.dense)
    size = max(1, min(256, STATISTICS_NUMBERS // networks.layout.num_parameters))

    def batches() -> Iterator[Tensor]:
        for batch in train.stream(batch_size=size):
            check_finite(batch["weights"], batch["model_id"])
            yield batch["weights"]

    if recipe.sizes.linear and recipe.sizes.latent >= tokenizer.width:
        raise ZooError(
            f"{recipe.sizes.latent} latent numbers for tokens of {tokenizer.width}: linear maps would copy them, and"
            " there is nothing to learn; take fewer, or set linear: false"
        )

    scaling, components = Scaling.fit(batches(), tokenizer, recipe.scaling), None
    if recipe.sizes.linear:
        components = layer_components(batches(), tokenizer, scaling, recipe.sizes.latent)
    model = untrained_model(tokenizer, recipe, components).to(device)
    loss = Composite(recipe.contrast, recipe.structure)
    return Trained(recipe, networks, tokenizer, scaling, model, loss, components)


def _optimizer(model: WeightAutoencoder, recipe: AutoencoderRecipe) -> torch.optim.AdamW:
    matrices = [value for value in model.parameters() if value.ndim >= 2]
    # biases and norms keep their scale: decay would shift them towards zero
    vectors = [value for value in model.parameters() if value.ndim < 2]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.lr)


def _endless(stream: Stream, least: int) -> Iterator[Batch]:
    """Yield batches with at least `least` models, epoch after epoch."""
    while True:
        yield from (batch for batch in stream if len(batch["model_id"]) >= least)


def _step(
    trained: Trained,
    optimizer: torch.optim.Optimizer,
    vectors: Float[Tensor, "B D"],
    model_ids: list[str],
    queries: Queries | None,
) -> dict[str, float]:
    """Make one step; return its losses, its `dropped` networks, and 1 for `skipped` if the gradient is not finite.

    A step with a gradient that is not finite changes no weight.
    """
    recipe, model, tokenizer = trained.recipe, trained.model, trained.tokenizer
    # seed and step as one entropy: their sum would give seed 0 step 1 the numbers of seed 1 step 0
    entropy = np.random.SeedSequence([recipe.seed, trained.step]).generate_state(1, np.uint64)
    # shifted by one bit, to at most `LARGEST_SEED`
    generator = torch.Generator().manual_seed(int(entropy[0] >> np.uint64(1)))
    count = 2 if trained.loss.contrast else 1
    inputs: list[Tensor] = []
    latents: list[Tensor] = []
    decoded: list[Tensor] = []
    for _ in range(count):
        view = random_views(vectors, tokenizer.layout, trained.networks.vit, recipe.views, generator)
        scaled = trained.scaling.normalised(view)
        noise = torch.randn(scaled.shape, generator=generator).to(scaled.device) if recipe.noise else 0.0
        inputs.append(tokenizer.tokens(scaled + recipe.noise * noise))
        with torch.autocast(scaled.device.type, torch.bfloat16, enabled=recipe.precision == "bfloat16"):
            encoded, reconstructed = model(inputs[-1])
        latents.append(encoded)
        # float32 again, because losses are sums of many small squares
        decoded.append(reconstructed.float())
    mask = tokenizer.mask.to(vectors.device)
    parts = {"structure": structural_loss(torch.cat(decoded), torch.cat(inputs), mask, normalise=recipe.normalise)}
    dropped = 0
    if queries is not None:
        parts["behaviour"], dropped = _behaviour(trained, torch.cat(decoded), model_ids * count, queries, generator)
    if trained.loss.contrast:
        window = _window(trained, generator)
        # float32 first: under autocast latents are bfloat16, and the projection runs outside it
        first, second = (model.project(values[:, window].float()) for values in latents)
        parts["contrast"] = contrastive_loss(first, second)
    loss = trained.loss(parts)
    # in the warm-up the other parts are computed too, so that they set their scales on the first batch
    if queries is not None and trained.step < recipe.warmup * recipe.steps:
        loss = parts["structure"] / trained.loss.scales.setdefault("structure", float(parts["structure"].detach()))
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
    # a step with NaN or infinite gradients would spoil all weights, so it is skipped and counted
    if norm.isfinite():
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * one_cycle(trained.step / recipe.steps)
        optimizer.step()
    values = {name: float(value.detach()) for name, value in parts.items()}
    values |= {"loss": float(loss.detach()), "gradient": float(norm)}
    return values | {"dropped": float(dropped), "skipped": float(not norm.isfinite())}


def _window(trained: Trained, generator: torch.Generator) -> slice:
    """Tokens that the contrastive loss compares: all, or one window at a random place."""
    size, T = trained.model.window_tokens, trained.tokenizer.num_tokens
    start = int(torch.randint(T - size + 1, (1,), generator=generator)) if size < T else 0
    return slice(start, start + size)


def _behaviour(
    trained: Trained,
    decoded: Float[Tensor, "P T W"],
    model_ids: list[str],
    queries: Queries,
    generator: torch.Generator,
) -> Behaviour:
    drawn = torch.randperm(len(queries.patches), generator=generator)[: trained.recipe.queries].to(decoded.device)
    vectors = trained.scaling.restored(trained.tokenizer.vectors(decoded))
    ours = trained.networks.logits(vectors, queries.patches[drawn])
    theirs = torch.stack([queries.logits[model_id][drawn] for model_id in model_ids])
    return behavioural_loss(ours, theirs, trained.recipe.behaviour)


def one_cycle(share: float) -> float:
    """Factor of the learning rate after a share of the steps: a rise and a fall, both half a cosine.

    >>> [round(one_cycle(share), 3) for share in (0.0, 0.3, 1.0)]
    [0.04, 1.0, 0.0]
    """
    if share < RISE:
        return START + (1 - START) * (1 - math.cos(math.pi * share / RISE)) / 2
    return END + (1 - END) * (1 + math.cos(math.pi * (share - RISE) / (1 - RISE))) / 2
