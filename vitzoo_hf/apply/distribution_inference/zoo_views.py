"""Views of the models of a zoo: outputs on selection images, and features of weights; queries with distributions.

Outputs are cached by the hashes of weights and images. Weights are read model by model, and in blocks of columns for
principal components, so that a zoo may be larger than memory. Features, sets and outputs of all models are in memory.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from vitzoo_hf.apply.distribution_inference.attacks.features import (
    difference_components,
    head_features,
    last_layer,
    tensor_features,
    vit_sets,
)
from vitzoo_hf.apply.distribution_inference.game import Queries, Views
from vitzoo_hf.apply.distribution_inference.secrets import Secret
from vitzoo_hf.evaluation.outputs import run_models
from vitzoo_hf.evaluation.outputs_cache import ImageBatch, OutputsCache
from vitzoo_hf.format.layout import Layout, is_head
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.format.tables import records
from vitzoo_hf.images.world_pool import probe_origins
from vitzoo_hf.models.architecture import Architecture
from vitzoo_hf.progress import progress_bar
from vitzoo_hf.zoo import Zoo

BATCH_BYTES = 2**26
"""Weights of a batch from which features are computed."""
ROW_FEATURES = ("head", "head_bias", "statistics", "flat", "sets")


@dataclass(frozen=True)
class Group:
    """Models that were fine-tuned from one checkpoint, or that have no checkpoint in the zoo (`base` is None)."""

    base: str | None
    model_ids: tuple[str, ...]


def zoo_queries(zoo: Zoo, column: str, secret: Secret, *, num_queries: int, seed: int) -> tuple[ImageBatch, Queries]:
    """Draw selection images of the data set of the models.

    On a world whose distributions differ in the secret, there is a query set for each distribution with a possible
    value of the secret; images of other distributions are left out.

    Args:
        zoo: models of one data set.
        column: column of the secret.
        secret: space of the secret, which selects the distributions.
        num_queries: largest number of images, balanced over query sets as far as they have enough images.
        seed: seed of the draw.

    Raises:
        ZooError: if models are of several data sets or carry no selection images; for fewer queries than sets.
    """
    datasets = sorted(set(zoo.index["dataset"]))
    if len(datasets) != 1:
        raise ZooError(f"models are trained on {', '.join(datasets)}: choose one, such as by --where dataset=NAME")
    images, labels = zoo.probes(datasets[0], "selection")
    worlds = zoo.manifest["images"][datasets[0]].get("worlds", ())
    origins, candidates = _origins(worlds, column, secret, len(labels))
    if candidates is not None and num_queries < len(candidates):
        raise ZooError(f"{num_queries} queries of {len(candidates)} distributions: ask at least one of each")
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(labels)))
    order = order[origins[order] >= 0]
    # in turn over query sets, so that a smaller number of queries stays balanced
    places = order[_turn(origins[order]).argsort(stable=True)[:num_queries]].sort().values
    return ImageBatch.of(images[places], labels[places]), Queries(origins[places], labels[places], candidates)


def _origins(
    worlds: Sequence[Mapping[str, object]], column: str, secret: Secret, count: int
) -> tuple[Int64[Tensor, " Q"], Tensor | None]:
    """Query set of each selection image, -1 for none, and secret of each set; without a world one set, no secret."""
    name = column.removeprefix("factor_")
    by_world = [secret.encoded(world[name]) if name in world else None for world in worlds]
    distinct = [values for values in dict.fromkeys(by_world) if values is not None]
    if len(distinct) < 2:
        return torch.zeros(count, dtype=torch.int64), None
    sets = torch.tensor([-1 if values is None else distinct.index(values) for values in by_world])
    return sets[probe_origins(count, len(worlds))], torch.tensor(distinct, dtype=secret.dtype)


def _turn(origins: Int64[Tensor, " Q"]) -> Int64[Tensor, " Q"]:
    """Number the entries of each set.

    >>> _turn(torch.tensor([0, 1, 0, 0, 1]))
    tensor([0, 0, 1, 2, 1])
    """
    turn = torch.empty_like(origins)
    for origin in origins.unique():
        members = origins == origin
        turn[members] = torch.arange(int(members.sum()))
    return turn


def zoo_outputs(
    zoo: Zoo,
    batch: ImageBatch,
    *,
    cache: Path | None = None,
    device: str | torch.device = "cpu",
    progress: bool = False,
) -> Float[Tensor, "P Q C"]:
    """Log-probabilities of every model on the images of a batch.

    Args:
        zoo: classifiers, in the order of the outputs.
        batch: images.
        cache: folder that caches outputs; a temporary folder by default.
        device: device that runs the models.
        progress: show a bar.

    Raises:
        ZooError: if models differ in classes or answer with NaN.
    """
    rows = records(zoo.to_pandas())
    batch.check_classes(rows)
    with OutputsCache.opened(cache, "float32") as outputs_cache:
        batches = {row["model_id"]: {batch} for row in rows}
        run_models(zoo, rows, batches, outputs_cache, device=device, precision="float32", progress=progress)
        logits = [outputs_cache.read(row, batch.digest, "logits") for row in rows]
    if len({part.shape[1] for part in logits}) > 1:
        raise ZooError("models differ in the number of classes: attack those of one head")
    # logits have a free constant, which differs between models and tells nothing
    outputs = torch.stack(logits).log_softmax(2)
    # NaN of one diverged model would spread to every standardised feature
    finite = outputs.isfinite().flatten(1).all(1)
    if not finite.all():
        first = rows[int(finite.int().argmin())]["model_id"]
        raise ZooError(
            f"outputs of {int((~finite).sum())} models, {first} the first, are NaN or infinite: leave them out"
        )
    return outputs


def zoo_features(
    zoo: Zoo,
    shadows: Bool[Tensor, " P"],
    names: Sequence[str],
    *,
    device: str | torch.device = "cpu",
    progress: bool = False,
) -> Views:
    """Features of weights minus the weights of the checkpoint that was fine-tuned, where the zoo has the checkpoint.

    Heads are new at fine-tuning, so nothing is subtracted from them.

    Args:
        zoo: models of one layout, in the order of the views.
        shadows: true for shadows, from which the components are computed.
        names: any of `head`, `head_bias`, `statistics`, `components`, `flat` and `sets`.
        device: device that computes features.
        progress: show a bar.

    Raises:
        ZooError: if layouts differ, a row is damaged, weights are not finite, or models are no plain ViTs (`sets`).
    """
    layouts = sorted(set(zoo.index["layout"]))
    if len(layouts) != 1:
        raise ZooError(
            f"models have {len(layouts)} layouts; attacks on weights take one: choose by --where head=linear"
        )
    layout, model_ids = zoo.layouts[layouts[0]], zoo.model_ids
    groups = groups_of(zoo)
    parts_of: dict[str, list[Tensor]] = {}
    of_rows = [name for name in names if name in ROW_FEATURES]
    heads = _heads(zoo) if "sets" in of_rows else 0
    with progress_bar("reading weights", "model", shown=progress and bool(of_rows), total=len(model_ids)) as bar:
        for group in groups if of_rows else ():
            # one checkpoint at a time, however many the zoo has
            base = None if group.base is None else _base(zoo, group.base, layout).to(device)
            for vectors in _batches(zoo, group, layout):
                # differences: the weights of the checkpoint are in all of its children, whatever the secret
                differences = vectors.to(device) if base is None else vectors.to(device) - base
                for name, values in _row_features(differences, layout, of_rows, heads).items():
                    parts_of.setdefault(name, []).append(values.cpu())
                bar.update(len(vectors))
    ids = [model_id for group in groups for model_id in group.model_ids]
    place = {model_id: number for number, model_id in enumerate(ids)}
    # groups were read one after another; the views have the order of the zoo
    order = torch.tensor([place[model_id] for model_id in model_ids])
    joined = {name: torch.cat(parts)[order] for name, parts in parts_of.items()}
    sets = {name.removeprefix("sets "): values for name, values in joined.items() if name.startswith("sets ")}
    features = {name: values.double().numpy() for name, values in joined.items() if not name.startswith("sets ")}
    if "components" in names:
        features["components"] = _components(zoo, groups, shadows, device, progress)
    return Views(features=features, sets=sets)


def groups_of(zoo: Zoo) -> list[Group]:
    """Group models by the checkpoint that was fine-tuned; None if the zoo does not have the checkpoint."""
    ids = set(zoo.unfiltered.model_ids)
    members: dict[str | None, list[str]] = {}
    for row in records(zoo.to_pandas()):
        members.setdefault(row["parent_id"] if row["parent_id"] in ids else None, []).append(row["model_id"])
    return [Group(base, tuple(model_ids)) for base, model_ids in members.items()]


def _row_features(
    vectors: Float[Tensor, "B D"], layout: Layout, names: Sequence[str], heads: int
) -> dict[str, Tensor]:
    if not vectors.isfinite().all():
        raise ZooError("weights of some model are NaN or infinite: leave diverged models out by --where")
    features: dict[str, Tensor] = {}
    for name in names:
        if name == "head":
            features[name] = head_features(vectors, layout)
        elif name == "head_bias":
            features[name] = last_layer(vectors, layout)[1]
        elif name == "statistics":
            features[name] = tensor_features(vectors, layout)
        elif name == "flat":
            features[name] = vectors
        else:
            features |= {f"sets {part}": values for part, values in vit_sets(vectors, layout, heads).items()}
    return features


def _components(
    zoo: Zoo, groups: Sequence[Group], shadows: Bool[Tensor, " P"], device: str | torch.device, progress: bool
) -> np.ndarray:
    """Components of differences, from blocks of columns of models and their checkpoints together."""
    bases = [group.base for group in groups if group.base is not None]
    model_ids = zoo.model_ids
    # unfiltered, because the checkpoint is mostly outside of the filter for final models
    with_bases = zoo.unfiltered.filter(model_id=list(dict.fromkeys([*model_ids, *bases])))
    columns = with_bases.weight_columns(device=device).verified()
    place = {model_id: number for number, model_id in enumerate(columns.model_ids)}
    of_base = torch.arange(len(place))
    for group in groups:
        if group.base is not None:
            for model_id in group.model_ids:
                of_base[place[model_id]] = place[group.base]
    members = torch.tensor([place[model_id] for model_id in model_ids])
    is_shadow = torch.zeros(len(place), dtype=torch.bool)
    is_shadow[members[shadows]] = True

    def blocks() -> Iterator[Tensor]:
        with progress_bar("multiplying weights", "block", shown=progress, total=len(columns.blocks())) as bar:
            for _, block in columns:
                yield block
                bar.update()

    return difference_components(blocks(), is_shadow, members, of_base)


def _base(zoo: Zoo, model_id: str, layout: Layout) -> Float[Tensor, " D"]:
    """Trunk of a checkpoint in the layout of its children, with zeros in place of their head."""
    row = zoo.unfiltered.row(model_id)
    shapes = dict(zip(zoo.layouts[row["layout"]].names, zoo.layouts[row["layout"]].shapes, strict=True))
    places = dict(zoo.layouts[row["layout"]].items())
    weights = torch.as_tensor(row.weights)
    # zeros where nothing is subtracted: heads are new at fine-tuning
    vector = torch.zeros(layout.num_parameters)
    for (name, place), shape in zip(layout.items(), layout.shapes, strict=True):
        if not is_head(name) and shapes.get(name) == shape:
            vector[place] = weights[places[name]]
        elif not is_head(name):
            raise ZooError(f"{model_id} and its children differ in {name}: their trunks must be alike")
    return vector


def _batches(zoo: Zoo, group: Group, layout: Layout) -> Iterator[Float[Tensor, "B D"]]:
    """Yield batches of vectors of a group in its order; every vector is compared with its hash."""
    # 4 bytes a float32 weight; a model larger than the bound goes alone
    size = max(1, BATCH_BYTES // (4 * layout.num_parameters))
    batch: list[Tensor] = []
    for row in zoo.filter(model_id=list(group.model_ids)).rows():
        batch.append(torch.as_tensor(row.weights))
        if len(batch) == size:
            yield torch.stack(batch)
            batch = []
    if batch:
        yield torch.stack(batch)


def _heads(zoo: Zoo) -> int:
    row = next(zoo.filter(model_id=zoo.model_ids[:1]).rows())
    vit = Architecture.of(row).batched
    if vit is None:
        raise ZooError(f"{row.model_id} is no plain ViT, whose neurons and heads are known: leave set_encoder out")
    return vit.heads


def joined_views(outputs: Views | None, weights: Views | None, places: Int64[Tensor, " p"]) -> Views:
    """Join outputs and features of some models in one view."""
    outputs, weights = outputs or Views(), weights or Views()
    return Views(outputs.outputs, outputs.kind, weights.features, weights.sets).at(places)


@dataclass(frozen=True, eq=False)
class WorldQueries:
    """Images of the adversary on which no model of the zoo was trained.

    Attributes:
        images: normalised images.
        labels: labels with noise and flips.
        origins: world of each image, by its place in `worlds`.
        worlds: settings of the worlds by name, in the order of the blueprint.
    """

    images: Float[Tensor, "Q 3 H W"]
    labels: Int64[Tensor, " Q"]
    origins: Int64[Tensor, " Q"]
    worlds: tuple[Mapping[str, object], ...]

    def of(self, **settings: object) -> "WorldQueries":
        """Select the images of worlds by values of settings; worlds are numbered anew in the order of the blueprint.

        Args:
            settings: name of a setting -> a value, or a list of values.

        Raises:
            ZooError: for a setting that worlds do not have, or values that no world has.
        """
        numbers = list(range(len(self.worlds)))
        for name, value in settings.items():
            values = list(value) if isinstance(value, list | tuple) else [value]
            if name not in self.worlds[0]:
                raise ZooError(f"worlds have no setting {name!r}: they have {', '.join(self.worlds[0])}")
            numbers = [number for number in numbers if self.worlds[number][name] in values]
        if not numbers:
            raise ZooError(f"no world of the queries has {settings}")
        members = torch.isin(self.origins, torch.tensor(numbers))
        renamed = torch.tensor(
            [numbers.index(origin) for origin in self.origins[members].tolist()], dtype=torch.int64
        )
        return WorldQueries(
            self.images[members], self.labels[members], renamed, tuple(self.worlds[number] for number in numbers)
        )


def world_queries(zoo: Zoo, dataset: str | None = None) -> WorldQueries:
    """Select the query images of a zoo on a world, equally many of each of its distributions.

    Raises:
        ZooError: if the zoo has no world, or has several and `dataset` is not given.
    """
    name = world_of(zoo, dataset)
    worlds = tuple(zoo.manifest["images"][name]["worlds"])
    images, labels = zoo.probes(name, "selection")
    return WorldQueries(images, labels, probe_origins(len(labels), len(worlds)), worlds)


def world_of(zoo: Zoo, dataset: str | None = None) -> str:
    """Name the only world of a zoo, or `dataset` if it is a world.

    Raises:
        ZooError: if the zoo has no world, or has several and `dataset` is not given.
    """
    records: Mapping[str, Mapping[str, object]] = zoo.manifest["images"]
    names = [name for name, record in records.items() if "worlds" in record and not name.endswith("-flipped")]
    if dataset is None and len(names) == 1:
        return names[0]
    if dataset not in names:
        raise ZooError(f"{zoo.name} has these worlds: {names or 'none'}; given {dataset!r}: name one of them")
    return str(dataset)
