"""Distribution inference by membership of single images, an attack on models with a re-sampled training set.

Re-sampling to a public ratio hides the original ratio from a model's general behaviour, but not the images that were
used: the rarer label has fewer images, and each is learnt more often. The adversary has images that a model may have
been trained on, scores how much better the model fits each image than models that were not trained on it, and learns
from shadows how these scores follow the secret.
"""

from collections.abc import Iterator
from dataclasses import dataclass

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
"""Least number of other shadows that were not trained on an image, for the image to be scored."""
LEAST_DEVIATION = 1e-6
MOST_NUMBERS = 2**31
"""Answers in memory: 8 GiB of float32."""
BATCH_NUMBERS = 2**24
"""Numbers of pixels and channels in a batch of images."""


@dataclass(frozen=True, eq=False)
class Candidates:
    """Images of one part of a pool on which membership is scored.

    Attributes:
        positions: positions in the pool, all different.
        labels: shapes of the images; with label noise, an image may have been trained on with the other label.
        groups: styles in which an image may have been trained on.
    """

    positions: Int64[Tensor, " N"]
    labels: Int64[Tensor, " N"]
    groups: tuple[int, ...]

    @classmethod
    def of(cls, pool: WorldPool, part: str, count: int, seed: int) -> "Candidates":
        """Draw `count / 2` images of each shape, in styles that occur in some world of the pool.

        Raises:
            ZooError: for fewer than two images, or a part without images of a shape.
        """
        if count < 2:
            raise ZooError(f"{count} candidate images; expected at least two, one a label")
        ratios = [world.group_ratio for world in pool.spec.worlds] or [0.0]
        # a style that no world draws shows images no model can have been trained on
        groups = tuple(group for group in (0, 1) if any(ratio != 1 - group for ratio in ratios))
        # one stream a part, so candidates of the victim do not depend on those of the adversary
        rng = np.random.default_rng([seed, list(pool.parts).index(part)])
        drawn = []
        for shape in (0, 1):
            members = torch.cat([pool.members(part, shape, group) for group in groups]).unique()
            if len(members) == 0:
                raise ZooError(f"no {part} image has shape {shape}: take a larger source")
            drawn.append(members[torch.from_numpy(rng.permutation(len(members))[: count // 2])].sort().values)
        positions = torch.cat(drawn)
        return cls(positions, pool.shapes[positions], (0,) if pool.spec.style == "classes" else groups)

    def __len__(self) -> int:
        return len(self.positions)

    def looks(self, pool: WorldPool, entries: Int64[Tensor, " n"]) -> Iterator[UInt8[Tensor, "n 3 S S"]]:
        """Yield some of the images in every style and colour in which they may have been trained on."""
        for group in self.groups:
            grey = pool.pixels[group, self.positions[entries]]
            for colour in (0, 1):
                yield coloured(grey, torch.full_like(entries, colour))

    def take(self, entries: Tensor) -> "Candidates":
        """Select images by place or by truth value."""
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
    """Guess a secret of the targets of a zoo on a world by membership of single images; one row.

    The adversary has the images of both parts of the pool, and knows the training images of its shadows. Targets
    answer images of the victim's part, shadows images of the adversary's part; scores are `membership_features`. The
    columns are the columns of `Report.table` of `attack_zoo`. Answers `[P, N]` are in memory as float32, at most
    2**31 numbers; weights and images are read in parts.

    Sources: Watson et al., "On the Importance of Difficulty Calibration in Membership Inference Attacks", 2022, and
    Carlini et al., "Membership Inference Attacks From First Principles", 2022, for scores; membership inference to
    get round re-sampling is an idea of Suri et al., "Dissecting Distribution Inference", 2023.

    Args:
        zoo: zoo of the models; final models with a role are used.
        secret: column of the secret, with or without `factor_`.
        role: column with the values `target` and `shadow`.
        num_candidates: largest number of images of each part.
        held_out: run a control: use query images, on which no model was trained, to measure what the features reveal
            without membership.
        seed: seed of the candidates.
        device: device that runs the models.
        progress: show bars.

    Raises:
        ZooError: if the zoo has no world or its training images cannot be drawn again; for an unknown column, too
            few models of a role, a guard of `attack_zoo` that fails, or more answers than are held.
    """
    cast = cast_of(zoo, None, secret, role)
    players, is_shadow = cast.zoos[0], cast.shadows
    space, secrets = secret_of([plain(value) for value in cast.index[cast.column]])
    guards_of(cast.index, cast.column, role, secrets, is_shadow, space, False)
    parts = list(ROLE_PARTS.values()) if not held_out else ["query", "query"]
    questions = _Questions.of(players, parts, num_candidates, seed)
    questions.check_size(len(players), int(is_shadow.sum()))
    views = Views(features={"membership": _features(players, is_shadow, questions, device, progress)})
    shadow_places, target_places = is_shadow.nonzero()[:, 0], (~is_shadow).nonzero()[:, 0]
    shadows = Shadows(views.at(shadow_places), secrets[shadow_places], space)
    targets, truth = views.at(target_places), secrets[target_places]
    outcome = play(shadows, targets, truth, guess_by_membership)
    name, counted = "held_out_images" if held_out else "membership", is_ratio(cast.column)
    row = row_of(name, "probabilities", space, truth, outcome, is_ratio=counted)
    row |= {"shadow_value": on_shadows(shadows, guess_by_membership, targets.kind), "chosen": True}
    return pd.DataFrame([row])


def guess_by_membership(shadows: Shadows, targets: Views, seed: int) -> Guesses:
    """Guess by ridge regression on summaries of membership scores; the seed is unused."""
    return guess_by_ridge(shadows, shadows.views.features["membership"], targets.features["membership"])


def membership_features(
    answers: Float[Tensor, "P N"],
    references: Float[Tensor, "S N"],
    unseen: Bool[Tensor, "S N"],
    labels: Int64[Tensor, " N"],
    *,
    leave_one_out: bool = False,
) -> Float64[np.ndarray, "P F"]:
    """Summaries, by label, of how much better P models fit N images than models that were not trained on them.

    The score of an image is the model's answer minus the mean of the n references that were not trained on the image,
    divided by `sqrt(Q / (n - 3) * (1 + 1 / n))`, where Q is the sum of squared deviations of the references. If
    answers are normal, the score of a model that was not trained on the image has mean 0 and variance 1 for every n.

    A summary is mean, standard deviation, and the percentiles 1, 5, 25, 50, 75, 95, 99. Features are the summary of
    label 0, the summary of label 1, and the second minus the first.

    Args:
        answers: log-odds or log-probabilities of the label.
        references: answers of S other models on the N images.
        unseen: true where a reference was not trained on the image.
        labels: labels 0 and 1; both occur.
        leave_one_out: answers are the references; each is scored by the other references.

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
    # sums about the mean of all references, so that squares do not cancel
    first, second = torch.zeros_like(centre), torch.zeros_like(centre)
    for reference, counted in zip(references, unseen, strict=True):
        offset = (reference.double() - centre) * counted
        first += offset
        second += offset.square()
    rows = []
    for number, answer in enumerate(answers):
        offset = answer.double() - centre
        itself = unseen[number].double() if leave_one_out else torch.zeros_like(centre)
        # the sums hold the model's own answer, which is taken out again rather than summed anew
        n = counts - itself
        mean = (first - itself * offset) / n
        # clamped, because rounding may leave a sum of squares just below 0
        squares = (second - itself * offset.square() - n * mean.square()).clamp_min(0)
        # n - 3: the variance of a t-distributed score of n references is then 1 for every n
        deviation = (squares / (n - 3) * (1 + 1 / n)).sqrt().clamp_min(LEAST_DEVIATION)
        rows.append(_summary((offset - mean) / deviation, labels))
    return np.stack(rows)


def _summary(scores: Float64[Tensor, " N"], labels: Int64[Tensor, " N"]) -> Float64[np.ndarray, " F"]:
    by_label = []
    for label in (0, 1):
        values = scores[labels == label].numpy()
        by_label.append(np.array([values.mean(), values.std(), *np.percentile(values, PERCENTS)]))
    return np.concatenate([*by_label, by_label[1] - by_label[0]])


@dataclass(frozen=True, eq=False)
class _Questions:
    """Images for targets and shadows, with the pool and blueprint that determine the training images of shadows."""

    images: ImageSet
    pool: WorldPool
    blueprint: Blueprint
    targets: Candidates
    shadows: Candidates

    @classmethod
    def of(cls, zoo: Zoo, parts: list[str], count: int, seed: int) -> "_Questions":
        """Draw candidates of the world of a zoo, from the part of the targets and the part of the shadows."""
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
    zoo: Zoo, is_shadow: Bool[Tensor, " P"], questions: _Questions, device: str | torch.device, progress: bool
) -> Float64[np.ndarray, "P F"]:
    """Score targets by the answers of all shadows, shadows by other shadows that were not trained on the image."""
    shadows = zoo.filter(model_id=np.array(zoo.model_ids)[is_shadow.numpy()].tolist())
    answers = log_odds(zoo, questions.images, questions.targets, device=device, progress=progress)
    references = answers[is_shadow]
    # shadows learnt from the adversary's part, so none has seen images of the victim
    unseen = torch.ones_like(references, dtype=torch.bool)
    of_targets = membership_features(answers[~is_shadow], references, unseen, questions.targets.labels)
    unseen = ~trained_on(shadows, questions.pool, questions.blueprint, questions.shadows)
    # above, not at least: each shadow is scored by the others, which are one fewer
    scored = unseen.sum(0) > FEWEST_REFERENCES
    answers = log_odds(shadows, questions.images, questions.shadows, device=device, progress=progress)[:, scored]
    labels = questions.shadows.labels[scored]
    of_shadows = membership_features(answers, answers, unseen[:, scored], labels, leave_one_out=True)
    features = np.empty((len(is_shadow), of_shadows.shape[1]))
    features[is_shadow.numpy()], features[~is_shadow.numpy()] = of_shadows, of_targets
    return features


def trained_on(zoo: Zoo, pool: WorldPool, blueprint: Blueprint, candidates: Candidates) -> Bool[Tensor, "P N"]:
    """Mark the candidates that each model was trained on, by drawing its training images again.

    Raises:
        ZooError: if a model is not in the blueprint, or its images are not the images that the zoo records.
    """
    runs = {run.run_id: run for run in blueprint.runs}
    index = zoo.to_pandas()
    is_member = torch.zeros(len(index), len(candidates), dtype=torch.bool)
    for number, (run_id, recorded) in enumerate(zip(index["run_id"], index["factor_trained_sha256"], strict=True)):
        run = runs.get(run_id)
        if run is None or run.world is None or run.learner is None:
            raise ZooError(f"{run_id} is no run on a world in the blueprint of {zoo.name}: take the zoo as packed")
        draw = pool.training_draw(run.world, run.learner, run.recipe.seed)
        # another source or version would draw other images without any error
        if draw.record()["positions_sha256"] != recorded:
            raise ZooError(f"{run_id} was trained on other images than its blueprint draws here: use the same source")
        is_member[number] = torch.isin(candidates.positions, draw.positions)
    return is_member


def log_odds(
    zoo: Zoo,
    images: ImageSet,
    candidates: Candidates,
    *,
    device: str | torch.device = "cpu",
    progress: bool = False,
) -> Float[Tensor, "P N"]:
    """Log-odds of the label, `log p - log (1 - p)`, the mean over all styles and colours of the image; on the CPU.

    Log-odds of confident models are closer to normal than their log-probabilities (Carlini et al., 2022).

    Raises:
        ZooError: if the images are no world, or answers are not finite.
    """
    pool = images.pool
    if pool is None:
        raise ZooError(f"images {images.name!r} are no world: they have no candidates")
    size = max(1, BATCH_NUMBERS // (3 * pool.spec.size**2))
    answers = torch.empty(len(zoo), len(candidates))
    first = 0
    with progress_bar("asking", "model", shown=progress, total=len(zoo)) as bar:
        for rows in rows_in_parts(zoo, 4 * min(size, len(candidates))):
            population = Population.from_rows(rows, device=device)
            for entries in torch.arange(len(candidates)).split(size):
                margins = []
                for look in candidates.looks(pool, entries):
                    logits = population(images.normalize(look)).cpu()
                    # of two classes, the difference of logits is the log-odds; the sign turns it to the label
                    margins.append((logits[..., 1] - logits[..., 0]) * (2 * candidates.labels[entries] - 1))
                answers[first : first + len(rows), entries] = torch.stack(margins).mean(0)
            first += len(rows)
            bar.update(len(rows))
    if not answers.isfinite().all():
        raise ZooError("answers of some model are NaN or infinite: leave diverged models out by --where")
    return answers
