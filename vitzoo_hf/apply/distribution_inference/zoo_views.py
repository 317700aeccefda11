"""What an adversary sees of a zoo: outputs of models on its selection images, and features of their weights.

Outputs are kept in a cache by the hashes of weights and images. Weights are read model by model, and in blocks of
columns for principal components, so that they need not fit into memory.

What the queries of a zoo on a world are: which distribution each is drawn from, and with which label.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from vitzoo_hf.models.vit import is_plain
from vitzoo_hf.progress import progress_bar
from vitzoo_hf.zoo import Zoo

BATCH_BYTES = 2**26
ROW_FEATURES = ("head", "head_bias", "statistics", "flat", "sets")


@dataclass(frozen=True)
class Group:
    """Models fine-tuned from the same checkpoint, or from none."""

    base: str | None
    model_ids: tuple[str, ...]


def zoo_queries(zoo: Zoo, column: str, secret: Secret, *, num_queries: int, seed: int) -> tuple[ImageBatch, Queries]:
    """Selection images of the data set that models were trained on, drawn at random.

    On a world whose distributions differ in the secret, a query set is drawn from each distribution that the secret
    may have, and images of others are left out.

    Args:
        zoo: models of one data set.
        column: of the secret.
        secret: that may take some values.
        num_queries: images at most, equally many of each query set as far as there are.
        seed: that draws them.

    Raises:
        ZooError: if models are of several data sets or carry no selection images; for fewer queries than sets.
    """
    datasets = sorted(set(zoo.index["dataset"]))
    if len(datasets) != 1:
        raise ZooError(f"models are trained on {', '.join(datasets)}: choose one, such as by --where dataset=NAME")
    images, labels = zoo.probes(datasets[0], "selection")
    origins, candidates = _origins(zoo.manifest["images"][datasets[0]], column, secret, len(labels))
    if candidates is not None and num_queries < len(candidates):
        raise ZooError(f"{num_queries} queries of {len(candidates)} distributions: ask at least one of each")
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(labels)))
    order = order[origins[order] >= 0]
    chosen = order[_turn(origins[order]).argsort(stable=True)[:num_queries]].sort().values
    return ImageBatch.of(images[chosen], labels[chosen]), Queries(origins[chosen], labels[chosen], candidates)


def _origins(
    record: Mapping[str, Any], column: str, secret: Secret, count: int
) -> tuple[Int64[Tensor, " Q"], Tensor | None]:
    """The query set of each selection image, -1 for none, and the secret of each set; all in one set of no world."""
    worlds, name = record.get("worlds", ()), column.removeprefix("factor_")
    known = [secret.encoded(world[name]) if name in world else None for world in worlds]
    kept = [values for values in dict.fromkeys(known) if values is not None]
    if len(kept) < 2:
        return torch.zeros(count, dtype=torch.int64), None
    sets = torch.tensor([-1 if values is None else kept.index(values) for values in known])
    return sets[probe_origins(count, len(worlds))], torch.tensor(kept, dtype=secret.dtype)


def _turn(origins: Int64[Tensor, " Q"]) -> Int64[Tensor, " Q"]:
    """The number of each entry among those of its set.

    >>> _turn(torch.tensor([0, 1, 0, 0, 1]))
    tensor([0, 0, 1, 2, 1])
    """
    turn = torch.empty_like(origins)
    for origin in origins.unique():
        here = origins == origin
        turn[here] = torch.arange(int(here.sum()))
    return turn


def zoo_outputs(
    zoo: Zoo,
    batch: ImageBatch,
    *,
    cache: Path | None = None,
    device: str | torch.device = "cpu",
    progress: bool = False,
) -> Float[Tensor, "M Q K"]:
    """Log-probabilities of every model on the same images.

    Args:
        zoo: classifiers, in the order of the outputs.
        batch: images.
        cache: folder that keeps outputs; a temporary one by default.
        device: where models run.
        progress: show a bar.

    Raises:
        ZooError: if models differ in classes or answer with NaN.
    """
    rows = records(zoo.to_pandas())
    batch.check_classes(rows)
    with OutputsCache.opened(cache, "float32") as held:
        options: dict[str, Any] = {"device": device, "precision": "float32", "progress": progress}
        run_models(zoo, rows, {row["model_id"]: {batch} for row in rows}, held, **options)
        logits = [held.read(row, batch.digest, "logits") for row in rows]
    if len({each.shape[1] for each in logits}) > 1:
        raise ZooError("models differ in the number of classes: attack those of one head")
    outputs = torch.stack(logits).log_softmax(2)
    finite = outputs.isfinite().flatten(1).all(1)
    if not finite.all():
        first = rows[int(finite.int().argmin())]["model_id"]
        raise ZooError(
            f"outputs of {int((~finite).sum())} models, {first} the first, are NaN or infinite: leave them out"
        )
    return outputs


def zoo_features(
    zoo: Zoo,
    shadows: Bool[Tensor, " M"],
    wanted: Sequence[str],
    *,
    device: str | torch.device = "cpu",
    progress: bool = False,
) -> Views:
    """Features of weights less those of the checkpoint that models were fine-tuned from, where the zoo has it.

    Heads are new at fine-tuning, so nothing is subtracted from them.

    Args:
        zoo: models of one layout, in the order of the views.
        shadows: which of them are shadows, by which components are chosen.
        wanted: of `head`, `head_bias`, `statistics`, `components`, `flat` and `sets`.
        device: where features are taken.
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
    found: dict[str, list[Tensor]] = {}
    taken = [name for name in wanted if name in ROW_FEATURES]
    heads = _heads(zoo) if "sets" in taken else 0
    with progress_bar("reading weights", "model", shown=progress and bool(taken), total=len(model_ids)) as bar:
        for group in groups if taken else ():
            base = None if group.base is None else _base(zoo, group.base, layout).to(device)
            for vectors in _batches(zoo, group, layout):
                moved = vectors.to(device) if base is None else vectors.to(device) - base
                for name, values in _row_features(moved, layout, taken, heads).items():
                    found.setdefault(name, []).append(values.cpu())
                bar.update(len(vectors))
    place = {model_id: number for number, model_id in enumerate(each for group in groups for each in group.model_ids)}
    order = torch.tensor([place[model_id] for model_id in model_ids])
    joined = {name: torch.cat(parts)[order] for name, parts in found.items()}
    sets = {name.removeprefix("sets "): values for name, values in joined.items() if name.startswith("sets ")}
    features = {name: values.double().numpy() for name, values in joined.items() if not name.startswith("sets ")}
    if "components" in wanted:
        features["components"] = _components(zoo, groups, shadows, device, progress)
    return Views(features=features, sets=sets)


def groups_of(zoo: Zoo) -> list[Group]:
    """Models by the checkpoint they were fine-tuned from, None where the zoo does not have it."""
    there = set(zoo.unfiltered.model_ids)
    members: dict[str | None, list[str]] = {}
    for row in records(zoo.to_pandas()):
        members.setdefault(row["parent_id"] if row["parent_id"] in there else None, []).append(row["model_id"])
    return [Group(base, tuple(model_ids)) for base, model_ids in members.items()]


def _row_features(
    vectors: Float[Tensor, "B D"], layout: Layout, wanted: Sequence[str], heads: int
) -> dict[str, Tensor]:
    if not vectors.isfinite().all():
        raise ZooError("weights of some model are NaN or infinite: leave diverged models out by --where")
    found: dict[str, Tensor] = {}
    for name in wanted:
        if name == "head":
            found[name] = head_features(vectors, layout)
        elif name == "head_bias":
            found[name] = last_layer(vectors, layout)[1]
        elif name == "statistics":
            found[name] = tensor_features(vectors, layout)
        elif name == "flat":
            found[name] = vectors
        else:
            found |= {f"sets {part}": values for part, values in vit_sets(vectors, layout, heads).items()}
    return found


def _components(
    zoo: Zoo, groups: Sequence[Group], shadows: Bool[Tensor, " M"], device: str | torch.device, progress: bool
) -> np.ndarray:
    """Of differences, from blocks of columns of models and their checkpoints together."""
    bases = [group.base for group in groups if group.base is not None]
    own = zoo.model_ids
    with_bases = zoo.unfiltered.filter(model_id=list(dict.fromkeys([*own, *bases])))
    columns = with_bases.weight_columns(device=device).verified()
    place = {model_id: number for number, model_id in enumerate(columns.model_ids)}
    of_base = torch.arange(len(place))
    for group in groups:
        if group.base is not None:
            for model_id in group.model_ids:
                of_base[place[model_id]] = place[group.base]
    wanted = torch.tensor([place[model_id] for model_id in own])
    known = torch.zeros(len(place), dtype=torch.bool)
    known[wanted[shadows]] = True

    def blocks() -> Iterator[Tensor]:
        with progress_bar("multiplying weights", "block", shown=progress, total=len(columns.blocks())) as bar:
            for _, block in columns:
                yield block
                bar.update()

    return difference_components(blocks(), known, wanted, of_base)


def _base(zoo: Zoo, model_id: str, layout: Layout) -> Float[Tensor, " D"]:
    """The trunk of a checkpoint in the layout of its children, zeros in place of their head."""
    row = zoo.unfiltered.row(model_id)
    held = dict(zip(zoo.layouts[row["layout"]].names, zoo.layouts[row["layout"]].shapes, strict=True))
    places = dict(zoo.layouts[row["layout"]].items())
    weights = torch.as_tensor(np.asarray(row["weights"]), dtype=torch.float32)
    vector = torch.zeros(layout.num_parameters)
    for (name, place), shape in zip(layout.items(), layout.shapes, strict=True):
        if not is_head(name) and held.get(name) == shape:
            vector[place] = weights[places[name]]
        elif not is_head(name):
            raise ZooError(f"{model_id} and its children differ in {name}: their trunks must be alike")
    return vector


def _batches(zoo: Zoo, group: Group, layout: Layout) -> Iterator[Float[Tensor, "B D"]]:
    """Vectors of a group in its order, some at a time, each compared with its hash."""
    size = max(1, BATCH_BYTES // (4 * layout.num_parameters))
    batch: list[Tensor] = []
    for row in zoo.filter(model_id=list(group.model_ids)).rows():
        batch.append(torch.as_tensor(np.asarray(row["weights"]), dtype=torch.float32))
        if len(batch) == size:
            yield torch.stack(batch)
            batch = []
    if batch:
        yield torch.stack(batch)


def _heads(zoo: Zoo) -> int:
    row: Mapping[str, Any] = next(zoo.filter(model_id=zoo.model_ids[:1]).rows())
    model: Any = Architecture.of(row).skeleton
    if not is_plain(model):
        raise ZooError(f"{row['model_id']} is no plain ViT, whose neurons and heads are known: leave set_encoder out")
    return int(model.blocks[0].attn.num_heads)


def joined_views(outputs: Views | None, weights: Views | None, places: Int64[Tensor, " m"]) -> Views:
    """Outputs and features of some models as one view."""
    seen, read = outputs or Views(), weights or Views()
    return Views(seen.outputs, seen.kind, read.features, read.sets).at(places)


@dataclass(frozen=True, eq=False)
class WorldQueries:
    """Images of the adversary that no model of the zoo was trained on.

    Attributes:
        images: as models are fed them.
        labels: noise and flips included.
        origins: the world each is drawn from, by its place in `worlds`.
        worlds: settings of the distributions, by name, in the order of the blueprint.
    """

    images: Float[Tensor, "Q 3 H W"]
    labels: Int64[Tensor, " Q"]
    origins: Int64[Tensor, " Q"]
    worlds: tuple[Mapping[str, Any], ...]

    def of(self, **settings: Any) -> "WorldQueries":
        """Those of the worlds with one of the values given, numbered anew in the order of the blueprint.

        Raises:
            ZooError: for a setting that worlds do not have, or values that none has.
        """
        kept = list(range(len(self.worlds)))
        for name, value in settings.items():
            values = list(value) if isinstance(value, list | tuple) else [value]
            if name not in self.worlds[0]:
                raise ZooError(f"worlds have no setting {name!r}: they have {', '.join(self.worlds[0])}")
            kept = [number for number in kept if self.worlds[number][name] in values]
        if not kept:
            raise ZooError(f"no world of the queries has {settings}")
        chosen = torch.isin(self.origins, torch.tensor(kept))
        renamed = torch.tensor([kept.index(origin) for origin in self.origins[chosen].tolist()], dtype=torch.int64)
        return WorldQueries(
            self.images[chosen], self.labels[chosen], renamed, tuple(self.worlds[number] for number in kept)
        )


def world_queries(zoo: Zoo, dataset: str | None = None) -> WorldQueries:
    """The query images of a zoo on a world, equally many of each of its distributions.

    Raises:
        ZooError: if the zoo has no world, or several and none is named.
    """
    name = world_of(zoo, dataset)
    worlds = tuple(zoo.manifest["images"][name]["worlds"])
    images, labels = zoo.probes(name, "selection")
    return WorldQueries(images, labels, probe_origins(len(labels), len(worlds)), worlds)


def world_of(zoo: Zoo, dataset: str | None = None) -> str:
    """The name of a zoo's only world, or `dataset` if it is one.

    Raises:
        ZooError: if the zoo has no world, or several and none is named.
    """
    records: Mapping[str, Any] = zoo.manifest["images"]
    known = [name for name, record in records.items() if "worlds" in record and not name.endswith("-flipped")]
    if dataset is None and len(known) == 1:
        return known[0]
    if dataset not in known:
        raise ZooError(f"{zoo.name} has these worlds: {known or 'none'}; given {dataset!r}: name one of them")
    return str(dataset)
