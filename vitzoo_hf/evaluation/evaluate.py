"""A zoo to metrics of every model and of every pair of final models, recomputed from the stored weights.

The images are the probe images of the zoo, prepared as in training, or images given by the caller. A model is
measured on the dataset it was trained on; pairs are measured on one dataset for all.

Cost: every row is read once for its outputs, which a cache keeps, and once more, in columns, for the distances
between weights.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from vitzoo_hf.evaluation.outputs import run_models
from vitzoo_hf.evaluation.outputs_cache import ImageBatch, OutputsCache
from vitzoo_hf.evaluation.pairs import measure_pairs
from vitzoo_hf.evaluation.precision import precision_effect
from vitzoo_hf.format import schema
from vitzoo_hf.format.gate.values import parse_provenance
from vitzoo_hf.format.manifest import Manifest
from vitzoo_hf.format.messages import did_you_mean
from vitzoo_hf.format.row import Row, RowLike
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
from vitzoo_hf.models.architecture import Architecture
from vitzoo_hf.models.population import Population
from vitzoo_hf.models.rebuild import usable_device
from vitzoo_hf.publish.folder import write_config
from vitzoo_hf.zoo import Zoo

COLUMNS = ("model_id", "run_id", "parent_id", "stage", "epoch", "is_final", "head", "dataset")
TOP = 5
COMPARED, COMPARED_IMAGES = 4, 512
"""Models and, at most, images on which a lower precision is compared with float32."""
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
    """Metrics of the models of a zoo, and of the pairs of its final models.

    Attributes:
        evaluations: one row a model, the columns of `schema.evaluation_features`.
        pairs: one row a pair of final models, the columns of `schema.pair_features`.
        dataset: images on which the pairs were compared.
        failed: model -> why it has no metrics, such as NaN among its outputs.
        is_own: whether the models were measured on the probe images of the zoo.
        precision: precision that the models ran in.
        precision_effect: effect of a lower precision than float32, measured on some models; empty for float32.
    """

    evaluations: pd.DataFrame
    pairs: pd.DataFrame
    dataset: str
    failed: dict[str, str] = field(default_factory=dict)
    precision_effect: dict[str, float] = field(default_factory=dict)
    is_own: bool = True
    precision: str = "float32"

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
            raise ZooError(
                "this report is not of the probe images of the zoo, so it cannot be written into the zoo: save"
                " `report.evaluations` and `report.pairs` elsewhere"
            )
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
        # a table of float32 says nothing: so did all tables before there was a choice
        about = {"precision": self.precision, "effect": self.precision_effect}
        rounded = None if self.precision == "float32" else about
        write_config(Path(folder), "evaluations", tables, features, measured=rounded)
        pairs = {"full": records(self.pairs)}
        write_config(Path(folder), "pairs", pairs, schema.pair_features(), measured=rounded)


def evaluate(
    zoo: Zoo,
    images: Float[Tensor, "N channels H W"] | None = None,
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
        images: test images, normalised as in training, on which every model is measured, so filter the zoo to models
            that know their classes; None for the probe images of the zoo.
        labels: class numbers of `images`.
        device: where the models run and are compared; on a Ray cluster, where the workers run them.
        precision: `float32`, or `tf32`, `bfloat16` or `float16`, whose effect is then in the report and the zoo.
        cache: folder that keeps logits and features under the hashes of weights and images: an interrupted
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
    place = _place(device, ray)
    index = zoo.to_pandas()
    sets = _image_sets(zoo, index, images, labels)
    dataset = common_dataset(index)
    test = sets[dataset]["test"]
    rows = [Row(record) for record in records(index)]
    final_rows = [row for row in rows if row.is_final]
    # pairs are compared on one dataset, which a final model of another stage may not have been trained on
    batches = {row.model_id: {*sets[row["dataset"]].values(), *([test] if row.is_final else [])} for row in rows}
    _check_classes(zoo, rows, sets)
    with OutputsCache.opened(None if cache is None else Path(cache), precision) as outputs:
        verified = run_models(
            zoo, rows, batches, outputs, device=device, precision=precision, ray=ray, progress=progress
        )
        _verify(zoo, [row.model_id for row in final_rows if row.model_id not in verified])
        failed = _overflowing(final_rows, outputs, test)
        metrics = [_measure(row, sets[row["dataset"]], zoo.manifest, outputs, failed, place) for row in rows]
        classifier_ids = {row.model_id for row in _classifiers(zoo, final_rows, dataset)} - failed.keys()
        classifiers = [number for number, row in enumerate(final_rows) if row.model_id in classifier_ids]
        measure = partial(measure_pairs, dataset=dataset, left_out=failed, device=place, progress=progress)
        pairs = measure(zoo.filter(is_final=True), final_rows, classifiers, outputs, test)
    evaluations = pd.concat([index[[*COLUMNS, *zoo.factors]], pd.DataFrame(metrics)], axis=1)
    effect = _effect(zoo, [final_rows[number].model_id for number in classifiers], test, precision, place)
    return Report(evaluations, pairs, dataset, failed, effect, images is None, precision)


def _place(device: str | torch.device, ray: str | None) -> torch.device:
    """Where outputs are compared: with the models, or on this machine's CPU where a cluster has run them.

    Raises:
        ZooError: for a device that this machine lacks, without a cluster.
    """
    return usable_device(device) if ray is None else torch.device("cpu")


def _verify(zoo: Zoo, model_ids: list[str]) -> None:
    """Compare rows with their hashes: distances between weights read columns without hashing the rows."""
    for row in zoo.filter(model_id=model_ids).rows() if model_ids else ():
        row.required("weights")  # asking for the weights reads and verifies them


def _check_classes(zoo: Zoo, rows: Sequence[Row], sets: Mapping[str, Mapping[str, ImageBatch]]) -> None:
    """Refuse labels that classifiers do not know, before anything runs."""
    for dataset, parts in sets.items():
        parts["test"].check_classes(_classifiers(zoo, rows, dataset))


def _classifiers(zoo: Zoo, rows: Sequence[Row], dataset: str) -> list[Row]:
    """Rows of the models that classify the images of a dataset."""
    return [row for row in rows if row.dataset == dataset and is_classifier(row, zoo.manifest)]


def _overflowing(rows: Sequence[Row], cache: OutputsCache, batch: ImageBatch) -> dict[str, str]:
    """Models whose features on these images are not all finite -> why they have no metrics."""
    return {
        row.model_id: "NaN or infinite features: its training diverged"
        for row in rows
        if not cache.read(row, batch.digest, "features").isfinite().all()
    }


def _image_sets(
    zoo: Zoo, index: pd.DataFrame, images: Tensor | None, labels: Tensor | None
) -> dict[str, dict[str, ImageBatch]]:
    """Dataset -> role -> images; `images` are the test images of every dataset."""
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
    """Test images, which a zoo must carry, and selection images where it carries them."""
    images = {"test": zoo.probes(dataset, "test")}
    if any(row["dataset"] == dataset for row in zoo.probe_rows("selection")):
        images["selection"] = zoo.probes(dataset, "selection")
    return images


def is_classifier(row: RowLike, manifest: Manifest) -> bool:
    """Whether the outputs of a row's head are classes; the head of a contrastive model is a projection."""
    row = Row.of(row)
    recipe = parse_provenance(row.get("provenance"), row.name).get("recipe")
    recipe = recipe if isinstance(recipe, dict) else {}
    record = manifest["images"].get(row["dataset"], {})
    outputs = Architecture.of(row).args.get("num_classes")
    classes = len(record.get("class_names", [])) or outputs
    return recipe.get("regime", "supervised") == "supervised" and outputs == classes


def _values(logits: Float[Tensor, "N C"], labels: Int64[Tensor, " N"], device: torch.device) -> dict[str, float]:
    """The measures that are defined for so many classes, on the device and read in one go.

    Raises:
        ValueError: for logits that are not finite.
    """
    # among five classes or fewer, every class is in the top 5
    names = [name for name in MEASURES if name != "top5_accuracy" or logits.shape[-1] > TOP]
    logits, labels = logits[None].to(device), labels.to(device)
    return dict(zip(names, torch.cat([MEASURES[name](logits, labels) for name in names]).tolist(), strict=True))


def _measure(
    row: Row,
    sets: Mapping[str, ImageBatch],
    manifest: Manifest,
    cache: OutputsCache,
    failed: dict[str, str],
    device: torch.device,
) -> dict[str, float | None]:
    """Metrics of one model from its outputs; None for a model without metrics, with the reason in `failed`."""
    sizes = {f"num_{role}_images": len(sets[role].labels) if role in sets else 0 for role in ("selection", "test")}
    empty: dict[str, float | None] = dict.fromkeys(schema.EVALUATIONS) | sizes
    if not is_classifier(row, manifest):
        return empty
    metrics: dict[str, float | None] = {}
    try:
        for role, batch in sets.items():
            values = _values(cache.read(row, batch.digest, "logits"), batch.labels, device)
            metrics |= {f"{role}_{name}": value for name, value in values.items() if f"{role}_{name}" in empty}
    except ValueError as error:  # logits that are not finite
        failed[row.model_id] = str(error)
        return empty
    return empty | metrics


def _effect(
    zoo: Zoo, model_ids: Sequence[str], batch: ImageBatch, precision: str, device: str | torch.device
) -> dict[str, float]:
    """Effect of the precision on some of the models and some of the images; empty for float32."""
    if precision == "float32" or not model_ids:
        return {}
    models = zoo.filter(model_id=list(model_ids[:COMPARED]))
    images, labels = batch.images[:COMPARED_IMAGES], batch.labels[:COMPARED_IMAGES]
    return precision_effect(models.rows(), images, labels, precision, device)


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
        zoo: the models; models whose heads are not classifiers are left out.
        sets: name -> normalised images `[N, C, H, W]` and labels `[N]`; `image_sets` makes them.
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
    place = _place(device, ray)
    rows = [row for row in map(Row, records(zoo.to_pandas())) if is_classifier(row, zoo.manifest)]
    if not rows:
        raise ZooError("no model of this zoo classifies: filter another part of it")
    batches = {name: ImageBatch.of(*part) for name, part in sets.items()}
    for batch in batches.values():
        batch.check_classes(rows)
    every_batch = {row.model_id: set(batches.values()) for row in rows}
    lines = []
    with OutputsCache.opened(None if cache is None else Path(cache), precision) as outputs:
        run_models(zoo, rows, every_batch, outputs, device=device, precision=precision, ray=ray, progress=progress)
        for row in rows:
            for name, batch in batches.items():
                metrics = {}
                with suppress(ValueError):  # logits that are not finite: the line stays NaN
                    metrics = _values(outputs.read(row, batch.digest, "logits"), batch.labels, place)
                about = {"model_id": row.model_id, "images": name, "num_images": len(batch.labels)}
                lines.append(about | dict.fromkeys(MEASURES, float("nan")) | metrics)
    return pd.DataFrame(lines)


def layer_similarity(
    zoo: Zoo, images: Float[Tensor, "N channels H W"], *, device: str | torch.device = "cpu"
) -> pd.DataFrame:
    """Debiased CKA of every block of every model with every block of every other: one row a pair of blocks.

    Args:
        zoo: a few models.
        images: normalised images.
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
