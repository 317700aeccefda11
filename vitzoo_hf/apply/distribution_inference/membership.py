"""Distribution inference by membership of single images, to get round re-sampling.

A training set that is re-sampled to a public ratio hides its own ratio from a model's answers in general, but not
which images it holds: of the rarer label they are fewer, and each is learnt more often. The adversary holds images
that a model may have been trained on, scores how much better it knows each than models that were not, and learns from
shadows how these scores follow the secret.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Float64, Int64, UInt8
from torch import Tensor

from vitzoo_hf.apply.distribution_inference.attacks.meta_models import guess_by_ridge
from vitzoo_hf.apply.distribution_inference.game import Guesses, Shadows, Views, play
from vitzoo_hf.apply.distribution_inference.reliance import rows_in_parts
from vitzoo_hf.apply.distribution_inference.secrets import secret_of
from vitzoo_hf.apply.distribution_inference.zoo_attacks import cast_of, is_ratio, on_shadows, row_of
from vitzoo_hf.apply.distribution_inference.zoo_guards import guards_of, plain
from vitzoo_hf.apply.distribution_inference.zoo_views import world_of
from vitzoo_hf.blueprint.blueprint import Blueprint
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.images.sources import ImageSet, load_images
from vitzoo_hf.images.world_pool import ROLE_PARTS, WorldPool, coloured
from vitzoo_hf.models.population import Population
from vitzoo_hf.progress import progress_bar
from vitzoo_hf.zoo import Zoo

PERCENTS = (1, 5, 25, 50, 75, 95, 99)
FEWEST_REFERENCES = 8
"""An image is scored if so many shadows, one left out, were not trained on it."""
LEAST_DEVIATION = 1e-6
MOST_NUMBERS = 2**31
BATCH_NUMBERS = 2**24
"""Of pixels and channels that models are fed at once."""


@dataclass(frozen=True, eq=False)
class Candidates:
    """Images of one part of a pool that models are asked about.

    Attributes:
        positions: in the pool, all different.
        labels: the shapes; whether an image was trained on with this label is unknown where labels are noisy.
        groups: the styles it may have been trained on in.
    """

    positions: Int64[Tensor, " C"]
    labels: Int64[Tensor, " C"]
    groups: tuple[int, ...]

    @classmethod
    def of(cls, pool: WorldPool, part: str, count: int, seed: int) -> "Candidates":
        """Half as many of each shape, drawn at random from those that some world of the pool takes images from.

        Raises:
            ZooError: for fewer than two, or a part without images of a shape.
        """
        if count < 2:
            raise ZooError(f"{count} candidate images; expected at least two, one a label")
        ratios = [world.group_ratio for world in pool.spec.worlds] or [0.0]
        groups = tuple(group for group in (0, 1) if any(ratio != 1 - group for ratio in ratios))
        rng = np.random.default_rng([seed, list(pool.parts).index(part)])
        chosen = []
        for shape in (0, 1):
            members = torch.cat([pool.members(part, shape, group) for group in groups]).unique()
            if len(members) == 0:
                raise ZooError(f"no {part} image has shape {shape}: take a larger source")
            chosen.append(members[torch.from_numpy(rng.permutation(len(members))[: count // 2])].sort().values)
        positions = torch.cat(chosen)
        return cls(positions, pool.shapes[positions], (0,) if pool.spec.style == "classes" else groups)

    def __len__(self) -> int:
        return len(self.positions)

    def looks(self, pool: WorldPool, entries: Int64[Tensor, " n"]) -> Iterator[UInt8[Tensor, "n 3 S S"]]:
        """Some of the images in every style and colour that they may have been trained on in."""
        for group in self.groups:
            grey = pool.pixels[group, self.positions[entries]]
            for colour in (0, 1):
                yield coloured(grey, torch.full_like(entries, colour))

    def take(self, entries: Tensor) -> "Candidates":
        """Some of them, by place or by truth value."""
        return Candidates(self.positions[entries], self.labels[entries], self.groups)


def membership_attack(
    zoo: Zoo,
    secret: str,
    *,
    role: str = "role",
    num_candidates: int = 2000,
    held_out: bool = False,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: bool = False,
) -> pd.DataFrame:
    """Guess a secret of the targets of a zoo on a world from what they know of single images; one row.

    The adversary has the images of both parts of the pool, and knows what its own shadows were trained on. Targets
    are asked about images of the victim's part, shadows about those of their own; scores are `membership_features`.
    The columns are those of the table of `attack_zoo`. `[models, candidates]` answers are held as float32, at most
    2**31 numbers; weights and images are read in parts.

    Sources: Watson et al., "On the Importance of Difficulty Calibration in Membership Inference Attacks", 2022, and
    Carlini et al., "Membership Inference Attacks From First Principles", 2022, for scores; membership inference to
    get round re-sampling is an idea of Suri et al., "Dissecting Distribution Inference", 2023.

    Args:
        zoo: final models are used; those without a role are left out.
        secret: column of the secret, with or without `factor_`.
        role: column that says `target` or `shadow`.
        num_candidates: images of each part, at most.
        held_out: ask about query images instead, on which no model was trained: a control, which tells what the same
            features give away without membership.
        seed: that draws the candidates.
        device: where models run.
        progress: show bars.

    Raises:
        ZooError: if the zoo has no world or its training images cannot be drawn again; for an unknown column, too
            few models of a role, a guard of `attack_zoo` that fails, or more answers than are held.
    """
    cast = cast_of(zoo, None, secret, role)
    own, is_shadow = cast.zoos[0], cast.shadows
    space, secrets = secret_of([plain(value) for value in cast.index[cast.column]])
    guards_of(cast.index, cast.column, role, secrets, is_shadow, space, False)
    asked = _Asked.of(own, list(ROLE_PARTS.values()) if not held_out else ["query", "query"], num_candidates, seed)
    asked.check_size(len(own), int(is_shadow.sum()))
    views = Views(features={"membership": _features(own, is_shadow, asked, device, progress)})
    known_at, seen_at = is_shadow.nonzero()[:, 0], (~is_shadow).nonzero()[:, 0]
    known = Shadows(views.at(known_at), secrets[known_at], space)
    targets, truth = views.at(seen_at), secrets[seen_at]
    outcome = play(known, targets, truth, guess_by_membership)
    name, counted = "held_out_images" if held_out else "membership", is_ratio(cast.column)
    row = row_of(name, "probabilities", space, truth, outcome, is_ratio=counted)
    row |= {"shadow_value": on_shadows(known, guess_by_membership, targets.kind), "chosen": True}
    return pd.DataFrame([row])


def guess_by_membership(shadows: Shadows, targets: Views, seed: int) -> Guesses:
    """Ridge on summaries of membership scores; nothing is random, so the seed changes nothing."""
    return guess_by_ridge(shadows, shadows.views.features["membership"], targets.features["membership"])


def membership_features(
    answers: Float[Tensor, "M C"],
    references: Float[Tensor, "S C"],
    unseen: Bool[Tensor, "S C"],
    labels: Int64[Tensor, " C"],
    *,
    leave_one_out: bool = False,
) -> Float64[np.ndarray, "M F"]:
    """Summaries, by label, of how much better each of M models knows C images than those not trained on them.

    The score of an image is the model's answer less the mean of the n references that were not trained on it, over
    `sqrt(Q / (n - 3) * (1 + 1 / n))`, Q being the sum of their squared deviations: of a model that was not trained on
    it either it has mean 0 and variance 1, if answers are normal, whatever n. Of the scores of label 0, then of label
    1, then the second less the first: mean, standard deviation, and the percentiles 1, 5, 25, 50, 75, 95, 99.

    Args:
        answers: log-odds or log-probabilities of the label.
        references: those of S other models on the same images.
        unseen: where a reference was not trained on the image.
        labels: 0 or 1; both occur.
        leave_one_out: answers are those of the references themselves; each is scored by the others.

    Raises:
        ZooError: if an image has fewer than `FEWEST_REFERENCES` references, or a label has no image.

    Example:
        >>> answers = torch.zeros(10, 4)
        >>> labels = torch.tensor([0, 0, 1, 1])
        >>> membership_features(answers, answers, torch.ones(10, 4, dtype=torch.bool), labels).shape
        (10, 27)
    """
    counts = unseen.sum(0)
    fewest = int(counts.min()) - int(leave_one_out) if len(labels) else 0
    if fewest < FEWEST_REFERENCES or len(labels.unique()) < 2:
        raise ZooError(
            f"{fewest} shadows were not trained on some image, labels are {labels.unique().tolist()}; expected at"
            f" least {FEWEST_REFERENCES}, and both labels: give more shadows or candidates"
        )
    centre = references.double().mean(0)
    first, second = torch.zeros_like(centre), torch.zeros_like(centre)
    for reference, counted in zip(references, unseen, strict=True):
        offset = (reference.double() - centre) * counted
        first += offset
        second += offset.square()
    rows = []
    for number, answer in enumerate(answers):
        offset = answer.double() - centre
        own = unseen[number].double() if leave_one_out else torch.zeros_like(centre)
        n = counts - own
        mean = (first - own * offset) / n
        squares = (second - own * offset.square() - n * mean.square()).clamp_min(0)
        deviation = (squares / (n - 3) * (1 + 1 / n)).sqrt().clamp_min(LEAST_DEVIATION)
        rows.append(_summary((offset - mean) / deviation, labels))
    return np.stack(rows)


def _summary(scores: Float64[Tensor, " C"], labels: Int64[Tensor, " C"]) -> Float64[np.ndarray, " F"]:
    by_label = []
    for label in (0, 1):
        held = scores[labels == label].numpy()
        by_label.append(np.array([held.mean(), held.std(), *np.percentile(held, PERCENTS)]))
    return np.concatenate([*by_label, by_label[1] - by_label[0]])


@dataclass(frozen=True, eq=False)
class _Asked:
    """What targets and shadows are asked about, and what decides which shadow was trained on it."""

    images: ImageSet
    pool: WorldPool
    blueprint: Blueprint
    targets: Candidates
    shadows: Candidates

    @classmethod
    def of(cls, zoo: Zoo, parts: list[str], count: int, seed: int) -> "_Asked":
        """The candidates of the world that the models of a zoo are trained on, drawn from the parts of the roles."""
        datasets = sorted(set(zoo.index["dataset"]))
        if len(datasets) != 1:
            raise ZooError(
                f"models are trained on {', '.join(datasets)}: choose one, such as by --where dataset=NAME"
            )
        name = world_of(zoo, datasets[0])
        blueprint = Blueprint.parse(zoo.blueprint_text)
        images = load_images(name, blueprint.images[name])
        assert images.pool is not None
        candidates = [Candidates.of(images.pool, part, count, seed) for part in parts]
        return cls(images, images.pool, blueprint, *candidates)

    def check_size(self, models: int, shadows: int) -> None:
        needed = models * len(self.targets) + shadows * len(self.shadows)
        if needed > MOST_NUMBERS:
            raise ZooError(f"{needed} answers of {models} models; at most {MOST_NUMBERS} are held: ask about fewer")


def _features(
    zoo: Zoo, is_shadow: Bool[Tensor, " M"], asked: _Asked, device: str | torch.device, progress: bool
) -> Float64[np.ndarray, "M F"]:
    """Targets by the answers of all shadows, shadows by those of the other shadows not trained on the image."""
    ids = np.array(zoo.model_ids)[is_shadow.numpy()].tolist()
    shadows = zoo.filter(model_id=ids)
    options: dict[str, Any] = {"device": device, "progress": progress}
    answers = log_odds(zoo, asked.images, asked.targets, **options)
    others = answers[is_shadow]
    unseen = torch.ones_like(others, dtype=torch.bool)
    of_targets = membership_features(answers[~is_shadow], others, unseen, asked.targets.labels)
    unseen = ~trained_on(shadows, asked.pool, asked.blueprint, asked.shadows)
    scored = unseen.sum(0) > FEWEST_REFERENCES
    own, labels = log_odds(shadows, asked.images, asked.shadows, **options)[:, scored], asked.shadows.labels[scored]
    of_shadows = membership_features(own, own, unseen[:, scored], labels, leave_one_out=True)
    features = np.empty((len(is_shadow), of_shadows.shape[1]))
    features[is_shadow.numpy()], features[~is_shadow.numpy()] = of_shadows, of_targets
    return features


def trained_on(zoo: Zoo, pool: WorldPool, blueprint: Blueprint, candidates: Candidates) -> Bool[Tensor, "M C"]:
    """Which candidates each model was trained on: its training images are drawn again.

    Raises:
        ZooError: if a model is not of the blueprint, or its images are others than the zoo records.
    """
    runs = {run.run_id: run for run in blueprint.runs}
    index = zoo.to_pandas()
    found = torch.zeros(len(index), len(candidates), dtype=torch.bool)
    for number, (run_id, recorded) in enumerate(zip(index["run_id"], index["factor_trained_sha256"], strict=True)):
        run = runs.get(run_id)
        if run is None or run.world is None or run.learner is None:
            raise ZooError(f"{run_id} is no run on a world in the blueprint of {zoo.name}: take the zoo as packed")
        draw = pool.training_draw(run.world, run.learner, run.recipe.seed)
        if draw.record()["positions_sha256"] != recorded:
            raise ZooError(f"{run_id} was trained on other images than its blueprint draws here: use the same source")
        found[number] = torch.isin(candidates.positions, draw.positions)
    return found


def log_odds(
    zoo: Zoo,
    images: ImageSet,
    candidates: Candidates,
    *,
    device: str | torch.device = "cpu",
    progress: bool = False,
) -> Float[Tensor, "M C"]:
    """Log-odds of the label, `log p - log (1 - p)`, the mean over every style and colour of the image; on the CPU.

    Log-odds rather than log-probabilities, as they are nearer to normal for sure models (Carlini et al., 2022).

    Raises:
        ZooError: if the images are no world, or answers are not finite.
    """
    pool = images.pool
    if pool is None:
        raise ZooError(f"images {images.name!r} are no world: they have no candidates")
    size = max(1, BATCH_NUMBERS // (3 * pool.spec.size**2))
    found = torch.empty(len(zoo), len(candidates))
    done = 0
    with progress_bar("asking", "model", shown=progress, total=len(zoo)) as bar:
        for rows in rows_in_parts(zoo, 4 * min(size, len(candidates))):
            population = Population.from_rows(rows, device=device)
            for entries in torch.arange(len(candidates)).split(size):
                margins = []
                for look in candidates.looks(pool, entries):
                    logits = population(images.normalize(look)).cpu()
                    margins.append((logits[..., 1] - logits[..., 0]) * (2 * candidates.labels[entries] - 1))
                found[done : done + len(rows), entries] = torch.stack(margins).mean(0)
            done += len(rows)
            bar.update(len(rows))
    if not found.isfinite().all():
        raise ZooError("answers of some model are NaN or infinite: leave diverged models out by --where")
    return found
