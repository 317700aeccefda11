"""Arms of the composite loss against each other: equal steps, one grid of learning rates, the same seeds.

The learning rate of an arm is the one whose reconstructions agree most with their originals on the validation split,
in the mean over seeds; what is reported is the test split.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from vitzoo_hf.apply.autoencoder.evaluation import Reconstruction, evaluate_autoencoder
from vitzoo_hf.apply.autoencoder.recipe import AutoencoderRecipe
from vitzoo_hf.apply.autoencoder.trained import load_autoencoder
from vitzoo_hf.apply.autoencoder.training import train_autoencoder
from vitzoo_hf.schema import ZooError
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
    """

    arm: str
    recipe: AutoencoderRecipe

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.arm}-lr{self.recipe.lr:g}-s{self.recipe.seed}"


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


def measure_cell(
    zoo: Zoo,
    cell: Cell,
    folder: Path,
    *,
    device: str = "cpu",
    on_step: Callable[[int, dict[str, float]], None] = lambda step, losses: None,
) -> pd.DataFrame:
    """Train a cell and judge it, beside its baselines, on validation and test models; what is there is read.

    Args:
        zoo: one population with train, validation and test models.
        cell: what to train.
        folder: of the grid; the cell gets a folder of its own there, with the autoencoder and four tables.
        device: where.
        on_step: as for `train_autoencoder`.

    Returns:
        A row a split and way to decode: `arm`, `lr`, `seed`, `steps`, `split`, `method`, all measures, and
        `failures`, the signs of a prototype.

    Raises:
        ZooError: as `train_autoencoder` and `evaluate_autoencoder`; or if the folder holds a cell of another recipe.
    """
    place = folder / cell.name
    if (place / MEASURES).is_file() and load_autoencoder(place).recipe == cell.recipe:
        return pd.read_csv(place / MEASURES)
    trained = train_autoencoder(zoo, cell.recipe, place, device=device, on_step=on_step)
    key = {"arm": cell.arm, "lr": cell.recipe.lr, "seed": cell.recipe.seed, "steps": cell.recipe.steps}
    measures: list[dict[str, Any]] = []
    models, layers = [], []
    for split in SPLITS:
        found = evaluate_autoencoder(zoo, trained, split=split, device=device)
        measures += [key | {"split": split} | row for row in _rows(found)]
        for each in found:
            labels = key | {"split": split, "method": each.name}
            layers += [labels | {"layer": layer, "r2": value} for layer, value in each.layers.items()]
            models.append(pd.DataFrame(each.models).assign(**labels))
    pd.DataFrame(trained.history).assign(**key).to_csv(place / HISTORY, index=False)
    pd.concat(models).to_csv(place / MODELS, index=False)
    pd.DataFrame(layers).to_csv(place / LAYERS, index=False)
    table = pd.DataFrame(measures)
    table.to_csv(place / MEASURES, index=False)
    return table


def _rows(found: Sequence[Reconstruction]) -> Iterator[dict[str, Any]]:
    constant = next(each for each in found if each.name == CONSTANT)
    for each in found:
        failures = "; ".join(each.failures(constant)) if each.name == AUTOENCODER else ""
        yield {"method": each.name} | each.values | {"failures": failures}


def chosen_rates(table: pd.DataFrame) -> dict[str, float]:
    """The learning rate of each arm, by the agreement of reconstructions of validation models, mean over seeds.

    Args:
        table: of all cells, as `measure_cell` gives it.

    Raises:
        ZooError: if the table holds no autoencoder on validation models.

    Example:
        >>> rows = [("S", 0.001, 0.8), ("S", 0.002, 0.9), ("B", 0.001, 0.2)]
        >>> table = pd.DataFrame(rows, columns=["arm", "lr", "agreement"])
        >>> chosen_rates(table.assign(seed=0, split="validation", method="autoencoder"))
        {'B': 0.001, 'S': 0.002}
    """
    judged = table[(table["split"] == "validation") & (table["method"] == AUTOENCODER)]
    if judged.empty:
        raise ZooError("no learning rate can be chosen: the table has no autoencoder on validation models")
    means = judged.groupby(["arm", "lr"], as_index=False)["agreement"].mean()
    best = means.loc[means.groupby("arm")["agreement"].idxmax()]
    return dict(zip(best["arm"], best["lr"].astype(float), strict=True))
