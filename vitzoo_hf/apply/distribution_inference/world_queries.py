"""What the queries of a zoo on a world are: which distribution each is drawn from, and with which label."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from vitzoo_hf.schema import ZooError
from vitzoo_hf.world_pool import probe_origins
from vitzoo_hf.zoo import Zoo


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
