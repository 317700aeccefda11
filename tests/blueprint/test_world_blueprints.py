"""The cells of the package: sizes, balance, and nothing but the secret differs."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from fashion_stand_in import stand_in, use, write_idx_folder

from vitzoo_hf.blueprint.blueprint import BLUEPRINTS, Blueprint
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.images.sources import load_images
from vitzoo_hf.launch.local import default_stack
from vitzoo_hf.training.stacked import groups, stackable

FILES = sorted((BLUEPRINTS / "distribution_inference").glob("*.yaml"))
SECRETS = {
    "s1": "flip_rate",
    "s2": "group_ratio",
    "s3": "group_ratio",
    "sc": "num_images",
    "sc_unequal_steps": "epoch_steps",
    "label_ratio": "label_ratio",
    "colour_agreement": "colour_agreement",
    "dmi": "last_environment",
    "null": "nominal",
    "smoke": "label_ratio",
}
CELLS = {"s1_bis_early_stop": "stop_loss", "s3_finite_data": "num_images", "dmi_irm_weights": "penalty_weight"}
"""Files of several cells, told apart by a factor."""
UNEQUAL = ("sc_uncontrolled", "sc_unequal_steps", "sc_equal_steps")
"""Side channels left open on purpose."""


def secret_of(file: Path) -> str:
    return next(SECRETS[name] for name in sorted(SECRETS, reverse=True) if file.stem.startswith(name))


def steps(run) -> int:
    return run.epochs * run.learner.steps(run.world, run.recipe.batch_size)


def images(run) -> int:
    return run.learner.use_images or run.world.num_images


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_cells_are_balanced_and_differ_in_the_secret_alone(file):
    blueprint = Blueprint.load(f"distribution_inference/{file.stem}")
    assert stackable(blueprint)
    runs = [run for run in blueprint.runs if run.world is not None]
    secret, cell = secret_of(file), CELLS.get(file.stem)
    assert blueprint.secrets[:1] == ((secret,) if secret != "epoch_steps" else ())
    cells = {run.factors[cell] if cell else None for run in runs}
    for chosen in cells:
        members = [run for run in runs if cell is None or run.factors[cell] == chosen]
        counts = Counter((run.world.role, run.factors[secret]) for run in members)
        for role in {run.world.role for run in members}:
            sizes = {count for (of, _), count in counts.items() if of == role}
            assert len(sizes) == 1
        levels = {value for _, value in counts}
        assert len(levels) >= 2
        if file.stem != "smoke":
            roles = Counter(run.world.role for run in members)
            assert roles["target"] >= 128 or file.stem.endswith("other_architecture")
            assert roles["shadow"] >= 256
        if file.stem not in UNEQUAL:
            assert len({(steps(run), images(run)) for run in members}) == 1
    seeds = [run.recipe.seed for run in runs]
    assert len(set(seeds)) == len(seeds)


def test_uncontrolled_side_channels_are_open_and_the_equalised_is_closed():
    def seen(name: str) -> set[tuple[int, int]]:
        return {(steps(run), images(run)) for run in Blueprint.load(f"distribution_inference/{name}").runs}

    assert seen("sc_uncontrolled") == {(240, 1536), (320, 2048)}
    assert seen("sc_equal_steps") == {(320, 1536), (320, 2048)}
    assert seen("sc_unequal_steps") == {(240, 1536), (320, 1536)}
    assert seen("sc_equalised") == {(240, 1536)}


@pytest.fixture(scope="module")
def _fashion(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """As many images as Fashion-MNIST has, and as many of a class; which they are does not matter here."""
    arrays = stand_in(60_000, 10_000)
    folder = write_idx_folder(tmp_path_factory.mktemp("fashion") / "package", arrays)
    with pytest.MonkeyPatch.context() as patch:
        use(patch, arrays, folder)
        yield


@pytest.mark.usefixtures("_fashion")
def test_fresh_cells_see_no_image_twice():
    """As many images as steps take, and the pool has them; four passes over them for the capacity ladder."""
    for name, passes in (("s1_region_rule", 1), ("s2_full", 4)):
        blueprint = Blueprint.load(f"distribution_inference/{name}")
        pool = load_images("worlds", blueprint.images["worlds"]).pool
        for run in (blueprint.runs[0], blueprint.runs[-1]):
            assert steps(run) * run.recipe.batch_size == passes * run.world.num_images
            record = pool.training_draw(run.world, run.learner, run.recipe.seed).record()
            assert record["num_distinct_images"] == run.world.num_images


@pytest.mark.usefixtures("_fashion")
def test_every_learner_has_a_cell_with_the_same_queries():
    digests = set()
    learners = set()
    for file in FILES:
        if file.stem.startswith("dmi"):
            blueprint = Blueprint.load(file)
            learners |= {run.learner.learner for run in blueprint.runs}
            digests.add(load_images("worlds", blueprint.images["worlds"]).digest)
    assert len(digests) == 1
    assert learners == {
        "erm", "causal", "colour-randomised", "irm", "irm-product", "v-rex", "group-dro", "resample", "dp-sgd",
    }  # fmt: skip


def test_runs_on_a_world_train_in_stacks_on_a_cpu():
    blueprint = Blueprint.load("distribution_inference/dmi_irm")
    assert default_stack(blueprint, "cpu", 2) == 32
    assert default_stack(Blueprint.load("mini"), "cpu", 2) == 1
    assert [len(group) for group in groups(blueprint.runs, 32)] == [32] * 12
    by_environments = {len({len(run.world.agreements) for run in group}) for group in groups(blueprint.runs, 32)}
    assert by_environments == {1}


def test_cells_are_among_the_known_blueprints():
    with pytest.raises(ZooError, match="did you mean 'distribution_inference/dmi_irm"):
        Blueprint.load("distribution_inference/dmi_irn")
