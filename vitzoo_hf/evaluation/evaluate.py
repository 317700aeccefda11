"""A zoo -> metrics of every model and of every pair of final models, recomputed from the stored weights.

The images are those the zoo carries (`probes`), prepared as training prepared them, or images given by the
caller. Metrics of a model are taken on the dataset it was trained on; metrics of pairs on one dataset for all. Every
row is read once for its outputs, which a cache keeps, and once more, in columns, for the distances between weights.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from vitzoo_hf.evaluation.outputs import run_models
from vitzoo_hf.evaluation.outputs_cache import ImageBatch, OutputsCache
from vitzoo_hf.evaluation.pairs import measure_pairs
from vitzoo_hf.evaluation.precision import precision_effect
from vitzoo_hf.format import schema
from vitzoo_hf.format.messages import did_you_mean
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.format.tables import records
from vitzoo_hf.metrics.behavior import (
    accuracy,
    brier_score,
    cross_entropy,
    expected_calibration_error,
    prediction_entropy,
)
from vitzoo_hf.metrics.cka import cka
from vitzoo_hf.models.population import Population
from vitzoo_hf.publish.folder import write_config
from vitzoo_hf.zoo import Zoo

COLUMNS = ("model_id", "run_id", "parent_id", "stage", "epoch", "is_final", "head", "dataset")
TOP = 5
COMPARED = 4
"""Models and, at most, images of which a lower precision is compared with float32."""
COMPARED_IMAGES = 512
MEASURES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "loss": cross_entropy,
    "accuracy": accuracy,
    "top5_accuracy": partial(accuracy, k=TOP),
    "ece": expected_calibration_error,
    "brier": brier_score,
    "entropy": lambda logits, labels: prediction_entropy(logits),
}


@dataclass(frozen=True)
class Report:
    """What was measured.

    Attributes:
        evaluations: one row a model, the columns of `schema.evaluation_features`.
        pairs: one row a pair of final models, the columns of `schema.pair_features`.
        dataset: images on which the pairs were compared.
        failed: model -> why it has no metrics, such as NaN among its outputs.
        is_own: whether the images were those that the zoo carries.
        precision_effect: what a lower precision than float32 changes, measured on some models; empty for float32.
    """

    evaluations: pd.DataFrame
    pairs: pd.DataFrame
    dataset: str
    failed: dict[str, str] = field(default_factory=dict)
    precision_effect: dict[str, float] = field(default_factory=dict)
    is_own: bool = True

    def matrix(self, metric: str) -> pd.DataFrame:
        """A pair metric as a symmetric model × model table; the diagonal is 1, or 0 for distances.

        Raises:
            ZooError: for an unknown metric.
        """
        if metric not in schema.PAIR_METRICS:
            raise ZooError(f"unknown pair metric {metric!r}: {did_you_mean(metric, schema.PAIR_METRICS)}")
        ids = list(dict.fromkeys([*self.pairs["model_a"], *self.pairs["model_b"]]))
        table = self.pairs.pivot(index="model_a", columns="model_b", values=metric).reindex(index=ids, columns=ids)
        table = table.combine_first(table.T).loc[ids, ids]
        for model_id in ids:
            if table.loc[model_id].notna().any():
                table.loc[model_id, model_id] = 0.0 if metric in schema.DISTANCES else 1.0
        return table

    def write(self, folder: str | Path) -> None:
        """Write the `evaluations` and `pairs` configs into the zoo in `folder`.

        Raises:
            ZooError: if it is not a zoo, has other models, or cannot be written.
        """
        if not self.is_own:
            raise ZooError("this report is of other images than the zoo carries: keep its tables elsewhere")
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
    precision: str = "float32",
    cache: str | Path | None = None,
    ray: str | None = None,
    progress: bool = True,
) -> Report:
    """Measure every model of a zoo, and every pair of its final models.

    Args:
        zoo: the models; a filtered zoo is measured as it is.
        images: test images, normalised as the models are fed them; by default those the zoo carries. Given images
            are used for every model, so filter the zoo to models that know their classes.
        labels: of `images`.
        device: where the models run.
        precision: `float32`, or `bfloat16` or `float16`, whose effect is then in the report.
        cache: folder that keeps logits and features, found by the hashes of weights and images: an interrupted
            evaluation continues there, and models that were measured before are not run again. None keeps nothing.
        ray: address of a Ray cluster whose workers run the models (`auto`, `local` to start one here); every machine
            must reach the zoo under the same path or id. The extra `vitzoo-hf[ray]` installs it.
        progress: show a bar.

    Raises:
        ZooError: if the zoo is empty, carries no images, or only one of images and labels is given.

    Example:
        >>> report = evaluate(Zoo.sample().filter(stage="finetune"), progress=False)
        >>> len(report.evaluations), len(report.pairs)
        (6, 15)
    """
    index = zoo.to_pandas()
    sets = _image_sets(zoo, index, images, labels)
    dataset = common_dataset(index)
    rows = records(index)
    compared = [row for row in rows if row["is_final"]]
    wanted = {row["model_id"]: {*sets[row["dataset"]].values(), *_shared(row, sets[dataset])} for row in rows}
    _check_classes(zoo, rows, sets)
    with OutputsCache.opened(None if cache is None else Path(cache), precision) as held:
        read = run_models(zoo, rows, wanted, held, device=device, precision=precision, ray=ray, progress=progress)
        _verify(zoo, [row["model_id"] for row in compared if row["model_id"] not in read])
        failed = _overflowing(compared, held, sets[dataset]["test"])
        measured = [_measure(row, sets[row["dataset"]], zoo.manifest, held, failed) for row in rows]
        chosen = [
            number
            for number, row in enumerate(compared)
            if row["dataset"] == dataset and is_classifier(row, zoo.manifest) and row["model_id"] not in failed
        ]
        test = sets[dataset]["test"]
        final = zoo.filter(is_final=True)
        options: dict[str, Any] = {"dataset": dataset, "device": device, "progress": progress, "left_out": failed}
        pairs = measure_pairs(final, compared, chosen, held, test.digest, test.labels, **options)
    evaluations = pd.concat([index[[*COLUMNS, *zoo.factors]], pd.DataFrame(measured)], axis=1)
    effect = _effect(zoo, [compared[number] for number in chosen], test, precision, device)
    return Report(evaluations, pairs, dataset, failed, effect, images is None)


def _verify(zoo: Zoo, model_ids: list[str]) -> None:
    """Compare rows with their hashes that were not read for their outputs: distances read weights as they lie."""
    for _ in zoo.filter(model_id=model_ids).rows() if model_ids else ():
        pass


def _check_classes(zoo: Zoo, rows: Sequence[Mapping[str, Any]], sets: Mapping[str, Mapping[str, ImageBatch]]) -> None:
    """Refuse labels that classifiers do not know, before anything runs."""
    for dataset, parts in sets.items():
        known = [row for row in rows if row["dataset"] == dataset and is_classifier(row, zoo.manifest)]
        parts["test"].check_classes(known)


def _overflowing(rows: Sequence[Mapping[str, Any]], cache: OutputsCache, batch: ImageBatch) -> dict[str, str]:
    """Models whose features on these images are not all finite -> why they have no metrics."""
    return {
        row["model_id"]: "NaN or infinite features: its training diverged"
        for row in rows
        if not cache.read(row, batch.digest, "features").isfinite().all()
    }


def _shared(row: Mapping[str, Any], sets: Mapping[str, ImageBatch]) -> list[ImageBatch]:
    """The images on which final models are compared."""
    return [sets["test"]] if row["is_final"] else []


def _image_sets(
    zoo: Zoo, index: pd.DataFrame, images: Tensor | None, labels: Tensor | None
) -> dict[str, dict[str, ImageBatch]]:
    """Dataset -> role -> images; given ones are the test images of every dataset."""
    if len(zoo) == 0:
        raise ZooError("there is no model to evaluate: the filter matches none")
    if (images is None) != (labels is None):
        raise ZooError("give images and labels, or neither")
    if images is not None and labels is not None:
        batch = ImageBatch.of(images, labels)
        return {dataset: {"test": batch} for dataset in set(index["dataset"])}
    return {
        dataset: {role: ImageBatch.of(*part) for role, part in _held_out(zoo, dataset).items()}
        for dataset in dict.fromkeys([*index["dataset"], common_dataset(index)])
    }


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


def _measure(
    row: Mapping[str, Any],
    sets: Mapping[str, ImageBatch],
    manifest: Mapping[str, Any],
    cache: OutputsCache,
    failed: dict[str, str],
) -> dict[str, Any]:
    """Metrics of one model from its outputs; None where it has none, with the reason in `failed`."""
    sizes = {f"num_{role}_images": len(sets[role].labels) if role in sets else 0 for role in ("selection", "test")}
    found: dict[str, Any] = dict.fromkeys(schema.EVALUATIONS) | sizes
    if not is_classifier(row, manifest):
        return found
    measured: dict[str, float] = {}
    try:
        for role, batch in sets.items():
            logits = cache.read(row, batch.digest, "logits")[None]
            for name in MEASURES:
                if f"{role}_{name}" in found and not (name == "top5_accuracy" and logits.shape[-1] <= TOP):
                    measured[f"{role}_{name}"] = float(MEASURES[name](logits, batch.labels))
    except ValueError as error:
        failed[row["model_id"]] = str(error)
        return found
    return found | measured


def _effect(
    zoo: Zoo, rows: Sequence[Mapping[str, Any]], batch: ImageBatch, precision: str, device: str | torch.device
) -> dict[str, float]:
    """What the precision changes for some of the models on some of the images; nothing for float32."""
    if precision == "float32":
        return {}
    some = zoo.filter(model_id=[row["model_id"] for row in rows[:COMPARED]])
    if not len(some):
        return {}
    images, labels = batch.images[:COMPARED_IMAGES], batch.labels[:COMPARED_IMAGES]
    return precision_effect(some.rows(), images, labels, precision, device)


def evaluate_on(
    zoo: Zoo,
    sets: Mapping[str, tuple[Tensor, Tensor]],
    *,
    device: str | torch.device = "cpu",
    precision: str = "float32",
    cache: str | Path | None = None,
    ray: str | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Metrics of every classifier on each of several sets of images, such as corrupted ones.

    Args:
        zoo: the models; those whose heads are no classifiers are left out.
        sets: name -> normalised images `[N, C, H, W]` and labels `[N]`, as `image_sets` gives them.
        device: where the models run.
        precision: see `evaluate`.
        cache: see `evaluate`.
        ray: see `evaluate`.
        progress: show a bar.

    Returns:
        One row a model and set, NaN for a model with NaN among its logits: `model_id`, `images`, `num_images`,
        `loss`, `accuracy`, `top5_accuracy` (NaN for up to five classes), `ece`, `brier`, `entropy`.

    Raises:
        ZooError: if no model classifies, or the images do not fit the models.

    Example:
        >>> from vitzoo_hf.evaluation.image_sets import image_sets
        >>> zoo = Zoo.sample().filter(stage="finetune", head="linear")
        >>> table = evaluate_on(zoo, image_sets(zoo, "digits", corruptions=["contrast:5"]), progress=False)
        >>> by_set = table.groupby("images")["accuracy"].mean()
        >>> bool(by_set["digits"] > by_set["digits, contrast 5"])
        True
    """
    rows = [row for row in records(zoo.to_pandas()) if is_classifier(row, zoo.manifest)]
    if not rows:
        raise ZooError("no model of this zoo classifies: filter another part of it")
    batches = {name: ImageBatch.of(*part) for name, part in sets.items()}
    for batch in batches.values():
        batch.check_classes(rows)
    wanted = {row["model_id"]: set(batches.values()) for row in rows}
    found = []
    with OutputsCache.opened(None if cache is None else Path(cache), precision) as held:
        run_models(zoo, rows, wanted, held, device=device, precision=precision, ray=ray, progress=progress)
        for row in rows:
            for name, batch in batches.items():
                logits = held.read(row, batch.digest, "logits")[None]
                shown = [name for name in MEASURES if name != "top5_accuracy" or logits.shape[-1] > TOP]
                measured = {}
                with suppress(ValueError):  # logits that are not finite: the row stays NaN
                    measured = {measure: float(MEASURES[measure](logits, batch.labels)) for measure in shown}
                about = {"model_id": row["model_id"], "images": name, "num_images": len(batch.labels)}
                found.append(about | dict.fromkeys(MEASURES, float("nan")) | measured)
    return pd.DataFrame(found)


def layer_similarity(
    zoo: Zoo, images: Float[Tensor, "N C H W"], *, device: str | torch.device = "cpu"
) -> pd.DataFrame:
    """Debiased CKA of every block of every model with every block of every other: one row a pair of blocks.

    Args:
        zoo: a few models.
        images: normalised as the models are fed them.
        device: where models run.

    Example:
        >>> zoo = Zoo.sample().filter(stage="pretrain")
        >>> table = layer_similarity(zoo, zoo.probes("digits")[0])
        >>> list(table.columns), len(table)
        (['model_a', 'block_a', 'model_b', 'block_b', 'cka'], 16)
    """
    population = Population.from_rows(zoo.rows(), device=device)
    blocks: list[Float64[Tensor, "N F"]] = []
    names: list[tuple[str, int]] = []
    for model_id, outputs in zip(population.model_ids, population.each(images, readout="token"), strict=True):
        assert outputs.blocks is not None
        blocks += list(outputs.blocks[0])
        names += [(model_id, number) for number in range(outputs.blocks.shape[1])]
    values = cka(blocks).cpu().tolist()
    return pd.DataFrame(
        [
            {"model_a": a[0], "block_a": a[1], "model_b": b[0], "block_b": b[1], "cka": values[i][j]}
            for i, a in enumerate(names)
            for j, b in enumerate(names)
        ]
    )


def common_dataset(index: pd.DataFrame) -> str:
    """The dataset of most final models: the fine-tuning dataset of a zoo that has one."""
    final = index[index["is_final"]] if index["is_final"].any() else index
    return str(final["dataset"].value_counts().index[0])
