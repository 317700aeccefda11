"""Arms of the composite loss against each other: equal steps, one grid of learning rates, the same seeds.

The learning rate of an arm is the one whose reconstructions agree most with their originals on the validation split,
in the mean over seeds; what is reported is the test split.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
from harness import write_cell

from vitzoo_hf.apply.autoencoder.evaluation import HeldOut, Reconstruction, baselines, reconstructed
from vitzoo_hf.apply.autoencoder.recipe import AutoencoderRecipe
from vitzoo_hf.apply.autoencoder.trained import Trained, load_autoencoder
from vitzoo_hf.apply.autoencoder.training import train_autoencoder
from vitzoo_hf.format.messages import did_you_mean
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.zoo import Zoo

SPLITS = ("validation", "test")
AUTOENCODER, CONSTANT = "autoencoder", "constant best"
CONTRAST_NOISE = 0.1
MEASURES, MODELS, LAYERS, HISTORY = "measures.csv", "models.csv", "layers.csv", "history.csv"


@dataclass(frozen=True)
class Cell:
    """One training of a grid.

    Attributes:
        arm: a name of `recipe.ARMS`.
        recipe: with the shares of the arm, its learning rate and its seed.
        variant: what is otherwise than in the grid, such as `queries 16`; empty for the grid itself.
    """

    arm: str
    recipe: AutoencoderRecipe
    variant: str = ""

    @property
    def name(self) -> str:
        """Of its folder."""
        variant = "-" + self.variant.replace(" ", "_") if self.variant else ""
        return f"{self.arm}-lr{self.recipe.lr:g}-s{self.recipe.seed}{variant}"

    @property
    def labels(self) -> dict[str, Any]:
        """Columns that tell its rows from those of other cells."""
        recipe = self.recipe
        return {"arm": self.arm, "variant": self.variant, "lr": recipe.lr, "seed": recipe.seed, "steps": recipe.steps}


def cells(
    recipe: AutoencoderRecipe, arms: Sequence[str], rates: Sequence[float], seeds: Sequence[int]
) -> Iterator[Cell]:
    """Every arm at every learning rate and seed, one seed after the other.

    Contrast compares two views: where the recipe draws none, those arms add noise of deviation 0.1 to scaled weights.

    Raises:
        ZooError: for an unknown arm.

    Example:
        >>> [cell.name for cell in cells(AutoencoderRecipe(), ["S", "S+B"], [0.002], [0, 1])]
        ['S-lr0.002-s0', 'S+B-lr0.002-s0', 'S-lr0.002-s1', 'S+B-lr0.002-s1']
    """
    for seed in seeds:
        for rate in rates:
            for arm in arms:
                noise = recipe.noise
                if arm.startswith("C") and not recipe.views and not noise:
                    noise = CONTRAST_NOISE
                yield Cell(arm, replace(recipe, lr=rate, seed=seed, noise=noise).arm(arm))


@dataclass
class Judge:
    """Judges the cells of a grid; what does not depend on the cell is measured once.

    Attributes:
        zoo: one population with train, validation and test models.
        device: where.
    """

    zoo: Zoo
    device: str = "cpu"
    _held: dict[str, HeldOut] = field(default_factory=dict)
    _baselines: dict[tuple[Any, ...], list[Reconstruction]] = field(default_factory=dict)

    def __call__(self, trained: Trained, split: str) -> list[Reconstruction]:
        """The autoencoder, then its baselines, on the models of a split."""
        if split not in self._held:
            self._held[split] = HeldOut.of(self.zoo, split, self.device)
        held, recipe = self._held[split], trained.recipe
        # All that baselines depend on: PCA has as many components as there are latent numbers.
        key = (split, recipe.seed, recipe.sizes, recipe.scaling, recipe.token_width, recipe.dense)
        if key not in self._baselines:
            self._baselines[key] = baselines(held, trained, self.device)
        return [reconstructed(held, trained, self.device), *self._baselines[key]]


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "structure 0.02": ("S+B", {"structure": 0.02}),
    "structure 0.3": ("S+B", {"structure": 0.3}),
    "structure 0.5": ("S+B", {"structure": 0.5}),
    "structure 0.8": ("S+B", {"structure": 0.8}),
    "queries 16": ("S+B", {"queries": 16}),
    "queries 256": ("S+B", {"queries": 256}),
    "noise queries": ("S+B", {"query_images": "noise"}),
    "queries of low contrast": ("S+B", {"query_images": "contrast:5"}),
    "blurred queries": ("S+B", {"query_images": "gaussian_blur:5"}),
    "distillation": ("S+B", {"behaviour": "distillation"}),
    "logits": ("S+B", {"behaviour": "logits"}),
    "warm-up 0.5": ("S+B", {"warmup": 0.5}),
    "latent 5": ("S+B", {"sizes": {"latent": 5}}),
    "latent 15": ("S+B", {"sizes": {"latent": 15}}),
    "scaling layer": ("S+B", {"scaling": "layer"}),
    "no linear map": ("S+B", {"sizes": {"linear": False}}),
    "S, no linear map": ("S", {"sizes": {"linear": False}}),
    "B, no linear map": ("B", {"sizes": {"linear": False}}),
}
"""Ablations: what each changes in the recipe of an arm."""


def variants(recipe: AutoencoderRecipe, names: Sequence[str], seeds: Sequence[int]) -> Iterator[Cell]:
    """Cells that differ from those of an arm in one thing.

    Raises:
        ZooError: for an unknown variant.

    Example:
        >>> [cell.name for cell in variants(AutoencoderRecipe(), ["queries 16"], [0])]
        ['S+B-lr0.002-s0-queries_16']
    """
    for seed in seeds:
        for name in names:
            if name not in VARIANTS:
                raise ZooError(f"unknown variant {name!r}: {did_you_mean(name, VARIANTS)}")
            arm, changes = VARIANTS[name]
            sizes = replace(recipe.sizes, **changes.get("sizes", {}))
            yield Cell(arm, replace(recipe.arm(arm), **changes | {"sizes": sizes, "seed": seed}), name)


def measure_cell(
    judge: Judge,
    cell: Cell,
    folder: Path,
    *,
    on_step: Callable[[int, dict[str, float]], None] = lambda step, losses: None,
) -> pd.DataFrame:
    """Train a cell and judge it, beside its baselines, on validation and test models; what is there is read.

    Args:
        judge: of the population.
        cell: what to train.
        folder: of the grid; the cell gets a folder of its own there, with the autoencoder and four tables.
        on_step: as for `train_autoencoder`.

    Returns:
        A row a split and way to decode: `arm`, `variant`, `lr`, `seed`, `steps`, `split`, `method`, all measures, and
        `failures`, the signs of a prototype.

    Raises:
        ZooError: as `train_autoencoder` and `HeldOut.of`; or if the folder holds a cell of another recipe.
    """
    place = folder / cell.name
    # The folder's name holds neither steps nor scaling: only the recipe tells that it is this very cell.
    if (place / MEASURES).is_file() and load_autoencoder(place).recipe == cell.recipe:
        return read_table(place / MEASURES)
    trained = train_autoencoder(judge.zoo, cell.recipe, place, device=judge.device, on_step=on_step)
    measures: list[dict[str, Any]] = []
    models, layers = [], []
    for split in SPLITS:
        found = judge(trained, split)
        measures += [cell.labels | {"split": split} | row for row in _rows(found)]
        for each in found:
            labels = cell.labels | {"split": split, "method": each.name}
            layers += [labels | {"layer": layer, "r2": value} for layer, value in each.layers.items()]
            models.append(pd.DataFrame(each.models).assign(**labels))
    write_cell(pd.DataFrame(trained.history).assign(**cell.labels), place / HISTORY)
    write_cell(pd.concat(models), place / MODELS)
    write_cell(pd.DataFrame(layers), place / LAYERS)
    table = pd.DataFrame(measures)
    write_cell(table, place / MEASURES)  # last: its being there is what says that the cell is finished
    return table


def read_table(file: Path) -> pd.DataFrame:
    """A table of a cell; no variant and no failure are empty text."""
    return pd.read_csv(file, keep_default_na=False, na_values=["nan"])


def _rows(found: Sequence[Reconstruction]) -> Iterator[dict[str, Any]]:
    constant = next(each for each in found if each.name == CONSTANT)
    for each in found:
        # Signs of a prototype are judged against the constant baseline, and say nothing about baselines.
        failures = "; ".join(each.failures(constant)) if each.name == AUTOENCODER else ""
        yield {"method": each.name} | each.values | {"failures": failures}


def chosen_rates(table: pd.DataFrame) -> dict[str, float]:
    """The learning rate of each arm, by the agreement of reconstructions of validation models.

    The mean over seeds that all rates of the arm have.

    Args:
        table: of all cells, as `measure_cell` gives it.

    Raises:
        ZooError: if the table holds no autoencoder on validation models, or no seed has all rates of an arm.

    Example:
        >>> rows = [("S", 0.001, 0.8), ("S", 0.002, 0.9), ("B", 0.001, 0.2)]
        >>> table = pd.DataFrame(rows, columns=["arm", "lr", "agreement"])
        >>> chosen_rates(table.assign(variant="", seed=0, split="validation", method="autoencoder"))
        {'B': 0.001, 'S': 0.002}
    """
    judged = table[(table["split"] == "validation") & (table["method"] == AUTOENCODER) & (table["variant"] == "")]
    if judged.empty:
        raise ZooError("no learning rate can be chosen: the table has no autoencoder on validation models")
    chosen: dict[str, float] = {}
    for arm, part in judged.groupby("arm"):
        # A rate tried on one lucky seed must not win over the mean of several, so such seeds are dropped.
        agreements = part.pivot_table(index="seed", columns="lr", values="agreement").dropna()
        if agreements.empty:
            raise ZooError(f"no learning rate can be chosen for {arm}: no seed was trained at all of its rates")
        chosen[str(arm)] = float(agreements.mean().idxmax())
    return chosen
