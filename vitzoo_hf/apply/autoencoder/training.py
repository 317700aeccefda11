"""Train an autoencoder on the weights that a zoo streams, resumable at any step.

Everything random in a step is drawn from a seed of that step, so that a training which was interrupted ends in the
same weights, bit for bit, as one that was not.
"""

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from vitzoo_hf.apply.autoencoder.behaviour import Networks
from vitzoo_hf.apply.autoencoder.components import layer_components
from vitzoo_hf.apply.autoencoder.losses import Composite, behavioural_loss, contrastive_loss, structural_loss
from vitzoo_hf.apply.autoencoder.model import WeightAutoencoder
from vitzoo_hf.apply.autoencoder.queries import Queries, query_outputs
from vitzoo_hf.apply.autoencoder.recipe import AutoencoderRecipe
from vitzoo_hf.apply.autoencoder.scaling import Scaling
from vitzoo_hf.apply.autoencoder.tokens import Tokenizer
from vitzoo_hf.apply.autoencoder.trained import FILE, Trained, resume, save, untrained_model
from vitzoo_hf.apply.autoencoder.vectors import check_finite
from vitzoo_hf.apply.autoencoder.views import random_views
from vitzoo_hf.rebuild import usable_device
from vitzoo_hf.schema import ZooError
from vitzoo_hf.zoo import Zoo

RISE, START, END = 0.3, 1 / 25, 1e-4 / 25
SAVE_EVERY, NOTE_EVERY = 200, 20
SAVE_SECONDS = 30.0
LOST = ("dropped", "skipped")
"""Decoded networks left out of the behavioural loss, and steps without a finite gradient."""
STATISTICS_NUMBERS = 2**24


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
        zoo: filtered to the models wanted; their `selection` images are the queries.
        recipe: how.
        folder: for the checkpoint; what is there is continued.
        device: where.
        on_step: called after each step with its losses.

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
        trained.model.compile()
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
        due = trained.step % SAVE_EVERY == 0 or time.monotonic() - saved > SAVE_SECONDS
        if folder is not None and (due or last):
            save(folder / FILE, trained, optimizer, stream)
            saved = time.monotonic()
    trained.model.eval()
    return trained


def _fresh(train: Zoo, recipe: AutoencoderRecipe, device: torch.device) -> Trained:
    layouts = sorted(set(train.index["layout"]))
    if len(layouts) > 1:
        raise ZooError(f"these models have {len(layouts)} layouts; an autoencoder takes one: filter by `head`")
    networks = Networks.like(next(train.rows()))
    tokenizer = Tokenizer.of(networks.layout, width=recipe.token_width or None, dense=recipe.dense)
    together = max(1, min(256, STATISTICS_NUMBERS // networks.layout.num_parameters))

    def batches() -> Iterator[Tensor]:
        for batch in train.stream(batch_size=together):
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
    others = [value for value in model.parameters() if value.ndim < 2]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.lr)


def _endless(stream: Any, least: int) -> Iterator[dict[str, Any]]:
    """Batches of at least so many models, epoch after epoch."""
    while True:
        yield from (batch for batch in stream if len(batch["model_id"]) >= least)


def _step(
    trained: Trained,
    optimizer: torch.optim.Optimizer,
    vectors: Float[Tensor, "B D"],
    model_ids: list[str],
    queries: Queries | None,
) -> dict[str, float]:
    """One step, which changes nothing where the gradient is not finite; returns the losses and what was lost."""
    recipe, model, tokenizer = trained.recipe, trained.model, trained.tokenizer
    entropy = np.random.SeedSequence([recipe.seed, trained.step]).generate_state(1, np.uint64)
    generator = torch.Generator().manual_seed(int(entropy[0] >> np.uint64(1)))
    count = 2 if trained.loss.contrast else 1
    inputs, latents, decoded = [], [], []
    for _ in range(count):
        view = random_views(vectors, tokenizer.layout, trained.networks.vit, recipe.views, generator)
        scaled = trained.scaling.normalised(view)
        noise = torch.randn(scaled.shape, generator=generator).to(scaled.device) if recipe.noise else 0.0
        inputs.append(tokenizer.tokens(scaled + recipe.noise * noise))
        with torch.autocast(scaled.device.type, torch.bfloat16, enabled=recipe.precision == "bfloat16"):
            encoded, reconstructed = model(inputs[-1])
        latents.append(encoded)
        decoded.append(reconstructed.float())
    mask = tokenizer.mask.to(vectors.device)
    parts = {"structure": structural_loss(torch.cat(decoded), torch.cat(inputs), mask, normalise=recipe.normalise)}
    dropped = 0
    if queries is not None:
        parts["behaviour"], dropped = _behaviour(trained, torch.cat(decoded), model_ids * count, queries, generator)
    if trained.loss.contrast:
        seen = _window(trained, generator)
        first, second = (model.project(values[:, seen]).float() for values in latents)
        parts["contrast"] = contrastive_loss(first, second)
    loss = trained.loss(parts)
    if queries is not None and trained.step < recipe.warmup * recipe.steps:
        loss = parts["structure"] / trained.loss.scales.setdefault("structure", float(parts["structure"].detach()))
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
    if norm.isfinite():
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * one_cycle(trained.step / recipe.steps)
        optimizer.step()
    values = {name: float(value.detach()) for name, value in parts.items()}
    values |= {"loss": float(loss.detach()), "gradient": float(norm)}
    return values | {"dropped": float(dropped), "skipped": float(not norm.isfinite())}


def _window(trained: Trained, generator: torch.Generator) -> slice:
    """The tokens that contrast compares: all, or as many as a window holds, from a place drawn for the step."""
    seen, N = trained.model.seen, trained.tokenizer.num_tokens
    start = int(torch.randint(N - seen + 1, (1,), generator=generator)) if seen < N else 0
    return slice(start, start + seen)


def _behaviour(
    trained: Trained,
    decoded: Float[Tensor, "M N T"],
    model_ids: list[str],
    queries: Queries,
    generator: torch.Generator,
) -> tuple[Tensor, int]:
    chosen = torch.randperm(len(queries.patches), generator=generator)[: trained.recipe.queries]
    chosen = chosen.to(decoded.device)
    vectors = trained.scaling.restored(trained.tokenizer.vectors(decoded))
    ours = trained.networks.logits(vectors, queries.patches[chosen])
    theirs = torch.stack([queries.logits[model_id][chosen] for model_id in model_ids])
    return behavioural_loss(ours, theirs, trained.recipe.behaviour)


def one_cycle(done: float) -> float:
    """The learning rate's factor once a share of the steps is done: a rise and a fall, each half a cosine.

    >>> [round(one_cycle(done), 3) for done in (0.0, 0.3, 1.0)]
    [0.04, 1.0, 0.0]
    """
    if done < RISE:
        return START + (1 - START) * (1 - math.cos(math.pi * done / RISE)) / 2
    return END + (1 - END) * (1 + math.cos(math.pi * (done - RISE) / (1 - RISE))) / 2
