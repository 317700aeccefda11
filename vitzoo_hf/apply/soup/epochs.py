"""Average the epochs of one run, uniformly over the last k or exponentially, and compare with the last epoch.

Izmailov et al. 2018 ("Averaging Weights Leads to Wider Optima") average epochs of a run. Selection images select the
average, and every gain is reported on test images. All averages of a run take one pass over its epochs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pandas as pd
import torch
from jaxtyping import Int64
from torch import Tensor

from vitzoo_hf.apply.candidates import Scores, candidate_scores
from vitzoo_hf.apply.intervals import gains
from vitzoo_hf.apply.soup.averaging import Soup, weighted_sums
from vitzoo_hf.evaluation.evaluate import is_classifier
from vitzoo_hf.format.row import Row
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.format.tables import records
from vitzoo_hf.progress import progress_bar
from vitzoo_hf.zoo import Zoo

LAST, DECAYS = (2, 3, 5), (0.5,)
ALONE = "last epoch"
CHOSEN = "chosen on selection"


@dataclass(frozen=True, eq=False)
class EpochAverages:
    """The averages of every run.

    Attributes:
        table: one row a run and average; see `average_epochs`.
        soups: run -> the average that selection images select, which may be the last epoch alone.
        left_out: run -> why it has no average.
    """

    table: pd.DataFrame
    soups: dict[str, Soup]
    left_out: dict[str, str] = field(default_factory=dict)

    def gains(self, by: Sequence[str] = (), *, seed: int = 0) -> pd.DataFrame:
        """Summarise the gains of each average over the last epoch, over all runs or by columns of the table.

        One row an average, and one for the average that selection images select in each run: the fields of `Gains`,
        with the interval over resampled runs.
        """
        selected = self.table[self.table["is_chosen"]].assign(average=CHOSEN)
        every = pd.concat([self.table[self.table["average"] != ALONE], selected])
        lines = []
        for key, runs in every.groupby([*by, "average"], sort=False, dropna=False):
            lines.append(
                dict(zip([*by, "average"], key, strict=True)) | gains(list(runs["gain"]), seed=seed)._asdict()
            )
        return pd.DataFrame(lines)


def coefficients_of_last(epochs: Sequence[int], k: int) -> dict[int, float]:
    """Equal shares of the last k of some epochs.

    Raises:
        ZooError: if k is below 1 or above the number of epochs.

    Example:
        >>> coefficients_of_last([1, 3, 10, 20], 2)
        {10: 0.5, 20: 0.5}
    """
    if not 1 <= k <= len(epochs):
        raise ZooError(f"the last {k} of {len(epochs)} kept epochs: give 1 to {len(epochs)}")
    # sorted, because rows of a zoo may lie in any order of epochs
    return dict.fromkeys(sorted(epochs)[-k:], 1 / k)


def exponential_coefficients(epochs: Sequence[int], decay: float) -> dict[int, float]:
    """Shares of an exponential moving average over kept epochs, `a = decay * a + (1 - decay) * theta`.

    The average starts at the first epoch. A step is one kept epoch, however many epochs lie between two.

    Raises:
        ZooError: for a decay outside [0, 1), or no epoch.

    Example:
        >>> exponential_coefficients([1, 2, 3], 0.5)
        {1: 0.25, 2: 0.25, 3: 0.5}
    """
    if not 0 <= decay < 1 or not epochs:
        raise ZooError(f"decay {decay} over {len(epochs)} epochs; expected a decay from 0 to below 1, and an epoch")
    first, *later = sorted(epochs)
    shares = {first: 1.0}
    for epoch in later:
        shares = {earlier: decay * share for earlier, share in shares.items()} | {epoch: 1 - decay}
    return shares


def average_epochs(
    zoo: Zoo,
    *,
    last: Sequence[int] = LAST,
    decays: Sequence[float] = DECAYS,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> EpochAverages:
    """Average the kept epochs of every run, and compare each average with the last epoch.

    Epoch 0, the state before training, is never averaged. A run that keeps fewer than k trained epochs has no average
    of the last k.

    Args:
        zoo: rows of one or more epochs of runs with a classifier; runs without one are left out and named.
        last: values of k.
        decays: decays of exponential averages.
        device: where models run.
        progress: show a bar.

    Returns:
        The table has `run_id`, `parent_id`, `stage`, `dataset`, `head`, the factors, `average` (`last epoch`,
        `last 2`, `exponential 0.5`, …), `epochs` averaged, `selection_loss`, `selection_accuracy`, `test_loss`,
        `test_accuracy`, `gain` (test accuracy less that of the last epoch), `is_chosen`: the average of this run with
        the highest selection accuracy; ties go to the lowest selection loss.

    Raises:
        ZooError: if no run has two trained epochs and a classifier, or images are missing.

    Example:
        >>> average_epochs(Zoo.sample(), progress=False)
        Traceback (most recent call last):
        vitzoo_hf.format.schema.ZooError: no run can be averaged over epochs: 8 keep no two trained epochs, ...
    """
    runs, left_out = _runs(zoo)
    images = {
        dataset: {role: zoo.probes(dataset, role) for role in ("selection", "test")}
        for dataset in dict.fromkeys(rows[-1]["dataset"] for rows in runs.values())
    }
    lines: list[dict[str, object]] = []
    soups: dict[str, Soup] = {}
    with progress_bar("averaging epochs", "run", shown=progress, total=len(runs)) as bar:
        for run_id, rows in runs.items():
            averages, soups[run_id] = _averages_of_run(zoo, rows, images[rows[-1]["dataset"]], last, decays, device)
            lines += averages
            bar.update(1)
    return EpochAverages(pd.DataFrame(lines), soups, left_out)


def _runs(zoo: Zoo) -> tuple[dict[str, list[Row]], dict[str, str]]:
    """Run -> its trained rows, epochs ascending; and the runs left out, with the reason."""
    by_run: dict[str, list[Row]] = {}
    for row in map(Row, records(zoo.to_pandas())):
        by_run.setdefault(row.run_id, []).append(row)
    runs: dict[str, list[Row]] = {}
    left_out: dict[str, str] = {}
    for run_id, rows in by_run.items():
        # epoch 0 is the state before training, or the parent: an average with it mixes two models
        trained = sorted((row for row in rows if row.epoch > 0), key=lambda row: row.epoch)
        if len(trained) < 2:
            left_out[run_id] = "keeps no two trained epochs"
        elif not is_classifier(trained[-1], zoo.manifest):
            left_out[run_id] = "has no classifier, so no accuracy"
        else:
            runs[run_id] = trained
    if not runs:
        few = sum("epochs" in reason for reason in left_out.values())
        raise ZooError(
            f"no run can be averaged over epochs: {few} keep no two trained epochs, {len(left_out) - few} have no"
            " classifier; train with `keep_epochs: all`, or widen --where"
        )
    return runs, left_out


def _averages_of_run(
    zoo: Zoo,
    rows: Sequence[Row],
    images: Mapping[str, tuple[Tensor, Int64[Tensor, " N"]]],
    last: Sequence[int],
    decays: Sequence[float],
    device: str | torch.device,
) -> tuple[list[dict[str, object]], Soup]:
    """The rows of the table of a run, and the average that its selection images select."""
    epochs = {row.epoch: row.model_id for row in rows}
    # the last epoch comes first, as row 0, from which gains are measured
    shares = {ALONE: coefficients_of_last(list(epochs), 1)}
    shares |= {f"last {k}": coefficients_of_last(list(epochs), k) for k in last if 1 < k <= len(epochs)}
    shares |= {f"exponential {decay:g}": exponential_coefficients(list(epochs), decay) for decay in decays}
    coefficients = {
        model_id: [share.get(epoch, 0.0) for share in shares.values()] for epoch, model_id in epochs.items()
    }
    vectors = weighted_sums(zoo, coefficients, device=device)  # all averages in one pass over the epochs
    if not vectors.isfinite().all():
        raise ZooError(f"an average of {rows[-1].run_id} is not finite: leave the run out with --where")
    scores: dict[str, Scores] = {
        role: candidate_scores(vectors, rows[-1], *part, device=device) for role, part in images.items()
    }
    # by accuracy, then by loss: on few selection images many averages tie in accuracy
    ranked = list(zip(scores["selection"].accuracy.tolist(), (-scores["selection"].loss).tolist(), strict=True))
    selected = max(range(len(ranked)), key=ranked.__getitem__)
    about = {name: rows[-1][name] for name in ("run_id", "parent_id", "stage", "dataset", "head", *zoo.factors)}
    lines: list[dict[str, object]] = [
        about
        | {"average": name, "epochs": len(shares[name])}
        | {f"{role}_{part}": float(getattr(scores[role], part)[m]) for role in images for part in Scores._fields}
        | {"gain": float(scores["test"].accuracy[m] - scores["test"].accuracy[0]), "is_chosen": m == selected}
        for m, name in enumerate(shares)
    ]
    name, share = list(shares.items())[selected]
    ingredients = {epochs[epoch]: value for epoch, value in share.items()}
    soup = Soup(
        # a clone, or the soup would keep the vectors of all averages in memory
        vectors[selected].clone(),
        ingredients,
        name.replace(" ", "-"),
        float(scores["selection"].accuracy[selected]),
        len(images["selection"][1]),
        {"candidates": list(shares)},
    )
    return lines, soup
