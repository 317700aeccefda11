"""A zoo -> metrics of every model and of every pair of final models, recomputed from the stored weights.

The images are those the zoo carries (`probes`), prepared as training prepared them, or images given by the
caller. Metrics of a model are taken on the dataset it was trained on; metrics of pairs on one dataset for all.
"""

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from vitzoo_hf import schema
from vitzoo_hf.behavior import accuracy, cross_entropy, expected_calibration_error, predictions
from vitzoo_hf.behavior_pairs import agreement
from vitzoo_hf.cka import cka
from vitzoo_hf.population import Population
from vitzoo_hf.progress import progress_bar
from vitzoo_hf.row_tables import records
from vitzoo_hf.schema import ZooError
from vitzoo_hf.weightspace import cosine_similarity, weight_distances
from vitzoo_hf.zoo import Zoo
from vitzoo_hf.zoo_folder import write_config

CHUNK = 64


@dataclass(frozen=True)
class Report:
    """What was measured.

    Attributes:
        evaluations: one row a model, the columns of `schema.evaluation_features`.
        pairs: one row a pair of final models, the columns of `schema.pair_features`.
        dataset: images on which the pairs were compared.
    """

    evaluations: pd.DataFrame
    pairs: pd.DataFrame
    dataset: str

    def matrix(self, metric: str) -> pd.DataFrame:
        """A pair metric as a symmetric model × model table; the diagonal is 1, or 0 for the distance.

        Raises:
            ZooError: for an unknown metric.
        """
        if metric not in schema.PAIR_METRICS:
            raise ZooError(f"unknown pair metric {metric!r}: {schema.did_you_mean(metric, schema.PAIR_METRICS)}")
        ids = list(dict.fromkeys([*self.pairs["model_a"], *self.pairs["model_b"]]))
        table = self.pairs.pivot(index="model_a", columns="model_b", values=metric).reindex(index=ids, columns=ids)
        table = table.combine_first(table.T).loc[ids, ids]
        for model_id in ids:
            table.loc[model_id, model_id] = 0.0 if metric == "weight_l2" else 1.0
        return table

    def write(self, folder: str | Path) -> None:
        """Write the `evaluations` and `pairs` configs into the zoo in `folder`.

        Raises:
            ZooError: if it is not a zoo, has other models, or cannot be written.
        """
        zoo = Zoo(folder)
        index = zoo.to_pandas().set_index("model_id")
        if list(self.evaluations["model_id"]) != list(index.index):
            raise ZooError(f"{folder} does not hold the models of this report: evaluate that zoo, without a filter")
        features = schema.evaluation_features(zoo.manifest["factors"])
        splits = zoo.splits_of(list(self.evaluations["model_id"]))
        rows = records(self.evaluations)
        tables = {
            split: [record for record, place in zip(rows, splits, strict=True) if place == split]
            for split in dict.fromkeys(splits)
        }
        write_config(Path(folder), "evaluations", tables, features)
        write_config(Path(folder), "pairs", {"full": records(self.pairs)}, schema.pair_features())


def evaluate(
    zoo: Zoo,
    images: Float[Tensor, "N C H W"] | None = None,
    labels: Int64[Tensor, " N"] | None = None,
    *,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> Report:
    """Measure every model of a zoo, and every pair of its final models.

    Args:
        zoo: the models; a filtered zoo is measured as it is.
        images: test images, normalised as the models are fed them; by default those the zoo carries. Given images
            are used for every model, so filter the zoo to models that know their classes.
        labels: of `images`.
        device: where the models run.
        progress: show a bar.

    Raises:
        ZooError: if the zoo is empty, carries no images, or only one of images and labels is given.

    Example:
        >>> report = evaluate(Zoo.sample().filter(stage="finetune"), progress=False)
        >>> len(report.evaluations), len(report.pairs)
        (6, 15)
    """
    if len(zoo) == 0:
        raise ZooError("there is no model to evaluate: the filter matches none")
    if (images is None) != (labels is None):
        raise ZooError("give images and labels, or neither")
    index = zoo.to_pandas()
    held = {} if images is None or labels is None else {"test": (images, labels)}
    rows: dict[str, dict[str, Any]] = {}
    with progress_bar("evaluating", "model", shown=progress, total=len(zoo)) as bar:
        for dataset, members in index.groupby("dataset", sort=False):
            probes = held or _held_out(zoo, str(dataset))
            ids = list(members["model_id"])
            for chunk in _chunks(ids, CHUNK):
                rows |= _measure_models(zoo.filter(model_id=chunk), probes, zoo.manifest, device)
                bar.update(len(chunk))
    columns = [
        "model_id",
        "run_id",
        "parent_id",
        "stage",
        "epoch",
        "is_final",
        "head",
        "dataset",
        *zoo.factors,
    ]
    measured = pd.DataFrame([rows[model_id] for model_id in index["model_id"]])
    evaluations = pd.concat([index[columns], measured], axis=1)
    dataset = _common_dataset(index)
    pair_images = held.get("test") or zoo.probes(dataset, "test")
    return Report(evaluations, _measure_pairs(zoo, pair_images[0], dataset, device), dataset)


def _held_out(zoo: Zoo, dataset: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Test images, which a zoo must carry, and selection images if it does; the counts go into the evaluations."""
    held = {"test": zoo.probes(dataset, "test")}
    if any(row["dataset"] == dataset for row in zoo.probe_rows("selection")):
        held["selection"] = zoo.probes(dataset, "selection")
    return held


def is_classifier(row: Mapping[str, Any], manifest: Mapping[str, Any]) -> bool:
    """Whether a row's head answers with classes; a contrastive model's head is a projection."""
    recipe = json.loads(row["provenance"] or "{}").get("recipe", {})
    record = manifest["images"].get(row["dataset"], {})
    outputs = json.loads(row["architecture_args"]).get("num_classes")
    known = len(record.get("class_names", [])) or outputs
    return recipe.get("regime", "supervised") == "supervised" and outputs == known


def _measure_models(
    zoo: Zoo,
    probes: Mapping[str, tuple[Tensor, Tensor]],
    manifest: Mapping[str, Any],
    device: str | torch.device,
) -> dict[str, dict[str, Any]]:
    rows = list(zoo.rows())
    sizes = {f"num_{role}_images": len(probes[role][1]) if role in probes else 0 for role in ("selection", "test")}
    found: dict[str, dict[str, Any]] = {row["model_id"]: dict.fromkeys(schema.EVALUATIONS) | sizes for row in rows}
    classifiers = [row for row in rows if is_classifier(row, manifest)]
    if not classifiers:
        return found
    population = Population.from_rows(classifiers, device=device)
    for role, (images, labels) in probes.items():
        logits, labels = population(images), labels.to(device)
        measured = {
            f"{role}_loss": cross_entropy(logits, labels),
            f"{role}_accuracy": accuracy(logits, labels),
        }
        if role == "test":
            measured["test_ece"] = expected_calibration_error(logits, labels)
        for name, values in measured.items():
            for model_id, value in zip(population.model_ids, values.tolist(), strict=True):
                found[model_id][name] = value
    return found


def _measure_pairs(zoo: Zoo, images: Tensor, dataset: str, device: str | torch.device) -> pd.DataFrame:
    final = zoo.filter(is_final=True)
    rows = list(final.rows())
    if len(images) < 4:
        raise ZooError(f"there are {len(images)} test images of {dataset!r}; comparing models takes at least 4")
    if len(rows) < 2:
        return pd.DataFrame({name: [] for name in schema.pair_features()})
    population = Population.from_rows(rows, device=device)
    features = population.features(images)
    trunks = population.trunks()
    matrices = {
        "cka": cka(features),
        "cka_biased": cka(features, debiased=False),
        "weight_l2": weight_distances(trunks),
        "weight_cosine": cosine_similarity(trunks),
        "agreement": _agreement(rows, zoo.manifest, images, dataset, device),
    }
    tables = {name: matrix.cpu().tolist() for name, matrix in matrices.items()}
    records = [
        {
            "model_a": rows[i]["model_id"],
            "model_b": rows[j]["model_id"],
            "same_parent": rows[i]["parent_id"] is not None and rows[i]["parent_id"] == rows[j]["parent_id"],
            "same_head": rows[i]["head"] == rows[j]["head"],
            "dataset": dataset,
            **{name: tables[name][i][j] for name in schema.PAIR_METRICS},
        }
        for i, j in itertools.combinations(range(len(rows)), 2)
    ]
    return pd.DataFrame(records)


def _agreement(
    rows: list[dict[str, Any]],
    manifest: Mapping[str, Any],
    images: Tensor,
    dataset: str,
    device: str | torch.device,
) -> Float[Tensor, "P P"]:
    """Agreement between the models that classify this dataset; NaN for every other pair."""
    matrix = torch.full((len(rows), len(rows)), torch.nan, dtype=torch.float64)
    chosen = [i for i, row in enumerate(rows) if row["dataset"] == dataset and is_classifier(row, manifest)]
    if chosen:
        population = Population.from_rows([rows[i] for i in chosen], device=device)
        positions = torch.tensor(chosen)
        matrix[positions[:, None], positions] = agreement(predictions(population(images))).cpu()
    return matrix


def _common_dataset(index: pd.DataFrame) -> str:
    """The dataset of most final models: the fine-tuning dataset of a zoo that has one."""
    final = index[index["is_final"]] if index["is_final"].any() else index
    return str(final["dataset"].value_counts().index[0])


def _chunks(items: list[str], size: int) -> list[list[str]]:
    return [items[start : start + size] for start in range(0, len(items), size)]
