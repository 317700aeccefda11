"""Cells of the replication: train targets and shadows of a synthetic world, let every attack play, keep the outcome.

A cell is one setting with one draw of the world. As published, or mended: equal numbers of examples and steps (DMI),
steps fixed while n grows (C), a student too narrow instead of one stopped early (B).
"""

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from distribution_inference.synthetic_tasks import (
    EQUAL_ROWS,
    PUBLISHED_ROWS,
    TEACHER,
    Learner,
    Samples,
    TeacherWorld,
    draw_environments,
    flipped,
)
from vitzoo_hf.apply.distribution_inference.attacks.black_box import BLACK_BOX, published_meta_classifier
from vitzoo_hf.apply.distribution_inference.attacks.features import views_of_mlps
from vitzoo_hf.apply.distribution_inference.attacks.set_encoder import SET_ATTACKS
from vitzoo_hf.apply.distribution_inference.attacks.stacked_mlps import (
    Training,
    Widths,
    diverged,
    mlp_outputs,
    squared_error,
    train_mlps,
)
from vitzoo_hf.apply.distribution_inference.attacks.white_box import WHITE_BOX
from vitzoo_hf.apply.distribution_inference.game import Outcome, Queries, Shadows, Views, check_equal, play
from vitzoo_hf.apply.distribution_inference.secrets import ClassSecret, NumberSecret, Secret

Experiment = Literal["A", "A-bis", "B", "C", "DMI"]
ROWS, ABIS_EPSILON = 2048, 0.05
QUERIES = {"A": 1024, "A-bis": 1024, "B": 1024, "C": 512, "DMI": 1024}
TEST_ROWS, QUERIED_SECRETS = 512, 10
ON_OUTPUTS = {**BLACK_BOX, "published_meta_classifier": published_meta_classifier}
ATTACKS = {
    **ON_OUTPUTS,
    **{name: WHITE_BOX[name] for name in ("flat_mlp", "sorted_mlp")},
    **SET_ATTACKS,
}
RANDOM_ATTACKS = ("meta_classifier", "published_meta_classifier", "deep_sets")
VICTIM, ADVERSARY, ASKED, TESTED = 1, 2, 3, 4


@dataclass(frozen=True)
class Cell:
    """One setting of an experiment.

    Attributes:
        experiment: of the paper.
        knob: epsilon (A), loss that training stops at (A-bis, B), n (C), hidden units (B mended), 0 (DMI).
        mended: without the defect of the published set-up.
        number: whether the secret is a number rather than a class.
        learner: of DMI.
        world: draw of the teachers, and of all data.
    """

    experiment: Experiment
    knob: float
    mended: bool = False
    number: bool = False
    learner: str = ""
    world: int = 0

    @property
    def name(self) -> str:
        """Of its file."""
        parts = [self.experiment, f"{self.knob:g}", self.learner, "mended" if self.mended else "published"]
        return "_".join([part for part in parts if part] + [f"world{self.world}"])

    @property
    def secret(self) -> Secret:
        """Its space."""
        return NumberSecret(((0.0, 1.0),)) if self.number else ClassSecret((0, 1))


class Sizes(NamedTuple):
    """How many targets, shadows, seeds of attacks with randomness, and draws of the world."""

    targets: int
    shadows: int
    seeds: int
    worlds: int


class Trained(NamedTuple):
    """Models of a cell.

    Attributes:
        vectors: weights, of those that did not diverge.
        secrets: of these.
        diverged: share of models that did, by class; empty for numbers.
        error: mean squared error of each on new data of its own distribution.
        flipped_error: the same with the sign of the effect turned; NaN but for DMI.
    """

    vectors: Float[Tensor, "P D"]
    secrets: Tensor
    diverged: tuple[float, ...]
    error: Float[Tensor, " P"]
    flipped_error: Float[Tensor, " P"]


class Setting(NamedTuple):
    """What a cell trains: the MLP, how, and the numbers of examples by class."""

    widths: Widths
    training: Training
    rows: tuple[int, int]


def setting_of(cell: Cell) -> Setting:
    """As published, or mended."""
    if cell.experiment == "DMI":
        learner = Learner(cell.learner)
        return Setting(learner.widths, learner.training, EQUAL_ROWS if cell.mended else PUBLISHED_ROWS)
    training = Training()
    if cell.experiment == "C":
        rows = int(cell.knob)
        # 1280 steps are the published 20 epochs at n 2048, in batches of 32.
        return Setting(TEACHER, replace(training, steps=1280) if cell.mended else training, (rows, rows))
    if cell.experiment == "B" and cell.mended:
        return Setting(Widths(TEACHER.inputs, int(cell.knob)), training, (ROWS, ROWS))
    if cell.experiment in ("A-bis", "B"):
        training = replace(training, stop_below=float(cell.knob))
    return Setting(TEACHER, training, (ROWS, ROWS))


def run_cell(
    cell: Cell, sizes: Sizes, *, device: str | torch.device = "cpu"
) -> Iterator[tuple[dict[str, Any], Outcome]]:
    """Train and attack.

    Args:
        cell: the setting.
        sizes: how many models and seeds.
        device: where models are trained.

    Yields:
        What is known of each attack, for a table, and its outcome.

    Raises:
        ZooError: if examples or steps differ between secrets in a mended cell.
    """
    start = time.perf_counter()
    setting = setting_of(cell)
    shadows = _train(cell, setting, sizes.shadows, ADVERSARY, device)
    targets = _train(cell, setting, sizes.targets, VICTIM, device)
    inputs, queries = ask(cell, setting)
    known = Shadows(_views(shadows, setting.widths, inputs), shadows.secrets, cell.secret, queries)
    seen = _views(targets, setting.widths, inputs)
    about = {
        "cell": cell.name,
        **asdict(cell),
        "targets": len(targets.secrets),
        "shadows": len(shadows.secrets),
        "rows": "/".join(map(str, setting.rows)),
        "steps": "/".join(str(setting.training.steps_for(rows)) for rows in setting.rows),
        "training_seconds": round(time.perf_counter() - start, 1),
        "error": targets.error.mean().item(),
        "flipped_error": targets.flipped_error.mean().item(),
        "diverged": "/".join(f"{share:.4f}" for share in targets.diverged),
    }
    for name, attack in ATTACKS.items():
        start = time.perf_counter()
        seeds = range(sizes.seeds) if name in RANDOM_ATTACKS else range(1)
        outcome = play(known, seen, targets.secrets, attack, seeds=seeds)
        risk = outcome.risk if cell.number else outcome.accuracy
        yield (
            about
            | {
                "attack": name,
                "access": "outputs" if name in ON_OUTPUTS else "weights",
                "metric": "mae" if cell.number else "accuracy",
                "value": risk.mean,
                "low": risk.low,
                "high": risk.high,
                "auc": sum(outcome.auc) / len(outcome.auc) if outcome.auc else float("nan"),
                "advantage": outcome.advantage,
                "attack_seeds": len(seeds),
                "attack_seconds": round(time.perf_counter() - start, 1),
            },
            outcome,
        )


def _train(cell: Cell, setting: Setting, count: int, role: int, device: str | torch.device) -> Trained:
    """Models of one role, on data that no other role sees."""
    secrets = cell.secret.even(count)
    _check(cell, setting, secrets)
    if cell.experiment == "DMI":
        parts = [_train_environments(cell, setting, count, role, label, device) for label in (0, 1)]
        # In turn, as `even` repeats the classes: row and secret must be of one model.
        vectors = torch.stack([part[0] for part in parts], 1).flatten(0, 1)
        errors = torch.stack([part[1] for part in parts], 1).flatten(0, 1)
    else:
        generator = _generator(cell, role)
        world, scalar = _world(cell), _scalars(secrets)
        data = world.draw(scalar, setting.rows[0], generator)
        options: dict[str, Any] = {"seed": _seed(cell, role), "device": device}
        vectors = train_mlps(setting.widths, data.inputs, data.targets, setting.training, **options)
        # Later draws of the generator that made the training data, and so none of these.
        test = world.draw(scalar, TEST_ROWS, generator)
        errors = torch.stack([_error(vectors, setting.widths, test), torch.full((count,), torch.nan)], 1)
    bad = diverged(vectors)
    shares = () if cell.number else tuple(bad[secrets == label].double().mean().item() for label in (0, 1))
    # Left out and counted: set to zero, a diverged model would be told by its zeros.
    good = ~bad
    return Trained(vectors[good], secrets[good], shares, errors[good, 0], errors[good, 1])


def _train_environments(
    cell: Cell, setting: Setting, count: int, role: int, label: int, device: str | torch.device
) -> tuple[Tensor, Tensor]:
    """Half of the models, of one class: their weights, and errors `[P, 2]` on new and on flipped data."""
    learner, environments = Learner(cell.learner), 3 + label
    generator = _generator(cell, role, label)
    features = setting.widths.inputs
    data = draw_environments(count // 2, environments, setting.rows[label], generator).select(features)
    seed = _seed(cell, role, label)
    loss = learner.loss(environments, seed)
    vectors = train_mlps(
        setting.widths, data.inputs, data.targets, setting.training, loss=loss, seed=seed, device=device
    )
    # A multiple of 12 parts equally among three and among four environments.
    test = draw_environments(count // 2, environments, TEST_ROWS // 12 * 12, generator)
    return vectors, torch.stack([_error(vectors, setting.widths, each) for each in (test, flipped(test))], 1)


def ask(cell: Cell, setting: Setting) -> tuple[Float[Tensor, "1 I Q"], Queries]:
    """Queries: as many from each candidate distribution; of a number, from ten evenly spaced ones."""
    generator = torch.Generator().manual_seed(_seed(cell, ASKED))
    candidates = cell.secret.even(QUERIED_SECRETS if cell.number else 2)
    each = QUERIES[cell.experiment] // len(candidates)
    if cell.experiment == "DMI":
        sets = [draw_environments(1, 3 + label, each // 12 * 12, generator) for label in (0, 1)]
    else:
        sets = [_world(cell).draw(_scalars(candidates[[place]]), each, generator) for place in range(len(candidates))]
    inputs = torch.cat([part.inputs for part in sets], 2)[:, : setting.widths.inputs]
    origins = torch.arange(len(sets)).repeat_interleave(sets[0].targets.shape[1])
    return inputs, Queries(origins, torch.cat([part.targets[0] for part in sets]), candidates)


def _check(cell: Cell, setting: Setting, secrets: Tensor) -> None:
    """Equal examples and steps, but where the published set-up has them differ."""
    if cell.experiment == "DMI" and not cell.mended:
        return
    labels = [0] * len(secrets) if cell.number else secrets.tolist()
    known = secrets.tolist()
    check_equal("training examples", [setting.rows[label] for label in labels], known)
    check_equal("optimiser steps", [setting.training.steps_for(setting.rows[label]) for label in labels], known)


def _views(trained: Trained, widths: Widths, inputs: Float[Tensor, "1 I Q"]) -> Views:
    features, sets = views_of_mlps(trained.vectors, widths.layout)
    return Views(mlp_outputs(trained.vectors, widths, inputs)[..., None], "real", features, sets)


def _error(vectors: Tensor, widths: Widths, samples: Samples) -> Float[Tensor, " P"]:
    held = samples.select(widths.inputs)
    return squared_error(mlp_outputs(vectors, widths, held.inputs), held.targets, 0)


def _world(cell: Cell) -> TeacherWorld:
    if cell.experiment in ("B", "C"):
        return TeacherWorld.covariate(cell.world)
    return TeacherWorld.conditional(ABIS_EPSILON if cell.experiment == "A-bis" else float(cell.knob), cell.world)


def _scalars(secrets: Tensor) -> Float[Tensor, " P"]:
    return (secrets if secrets.ndim == 1 else secrets[:, 0]).float()


def _seed(cell: Cell, role: int, label: int = 0) -> int:
    # Roles are below 100 and classes below 10, so that no two draws share a seed.
    return 1000 * (cell.world + 1) + 10 * role + label


def _generator(cell: Cell, role: int, label: int = 0) -> torch.Generator:
    # Data must not repeat the stream of initial weights, which starts at the seed itself.
    return torch.Generator().manual_seed(_seed(cell, role, label) + 5)
