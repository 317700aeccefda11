"""Rows -> a population: the weights of many models on one device, and the forward pass of them all.

Models of one layout lie together as `[P, D]`; a forward takes views of each vector, so no module is rebuilt and no
weight copied. Mixed heads and architectures are kept in groups and answered in the order of the rows.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from vitzoo_hf.flatten import Layout, unflatten
from vitzoo_hf.rebuild import architecture_of, checked_vector, usable_device
from vitzoo_hf.schema import ZooError, canonical_json
from vitzoo_hf.vit import layout_of, skeleton

BATCH = 256


class _Outputs(nn.Module):
    """Logits and the class-token features they are read from, of one timm ViT."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.model.forward_head(self.model.forward_features(images), pre_logits=True)
        return self.model.head(features), features


@dataclass(frozen=True)
class Group:
    """The models of one layout: their positions in the population and their weights."""

    positions: list[int]
    layout: Layout
    weights: Float[Tensor, "P D"]
    module: nn.Module
    num_outputs: int


@dataclass(frozen=True)
class Population:
    """Models held together on a device.

    Attributes:
        model_ids: in the order of the rows; the first axis of everything returned.

    Example:
        >>> from vitzoo_hf.zoo import Zoo
        >>> population = Population.from_rows(Zoo.sample().filter(stage="finetune").rows())
        >>> population(torch.zeros(5, 1, 16, 16)).shape
        torch.Size([6, 5, 10])
    """

    model_ids: list[str]
    groups: list[Group]
    device: torch.device

    @classmethod
    def from_rows(cls, rows: Iterable[Mapping[str, Any]], *, device: str | torch.device = "cpu") -> "Population":
        """Stack rows of `load_dataset(…)` or `Zoo.rows()` on a device.

        Raises:
            ZooError: if there is no row, or one cannot be rebuilt.
        """
        place = usable_device(device)
        model_ids: list[str] = []
        members: dict[str, list[tuple[int, Tensor]]] = {}
        kinds: dict[str, tuple[str, dict[str, Any], str, int | None]] = {}
        for position, row in enumerate(rows):
            vector, layout = checked_vector(row)
            kind = architecture_of(row)
            key = f"{layout.fingerprint} {canonical_json(kind)}"
            kinds[key] = kind
            members.setdefault(key, []).append((position, vector))
            model_ids.append(row.get("model_id", str(position)))
        if not model_ids:
            raise ZooError("a population needs at least one row; the filter or dataset gave none")
        groups = [
            Group(
                positions=[position for position, _ in entries],
                layout=layout_of(*kinds[key]),
                weights=torch.stack([vector for _, vector in entries]).to(place),
                module=_Outputs(skeleton(*kinds[key])).eval(),
                num_outputs=int(kinds[key][1]["num_classes"]),
            )
            for key, entries in members.items()
        ]
        return cls(model_ids, groups, place)

    def __len__(self) -> int:
        return len(self.model_ids)

    def __call__(self, images: Float[Tensor, "N C H W"]) -> Float[Tensor, "P N K"]:
        """Logits of every model on the same images.

        Raises:
            ZooError: if the models differ in the number of outputs.
        """
        return self.outputs(images)[0]

    def features(self, images: Float[Tensor, "N C H W"]) -> Float[Tensor, "P N F"]:
        """Features of every model before its head (the class token after the last norm)."""
        return self._run(images, want_logits=False)[1]

    def outputs(self, images: Float[Tensor, "N C H W"]) -> tuple[Float[Tensor, "P N K"], Float[Tensor, "P N F"]]:
        """Logits and features in one pass."""
        outputs = sorted({group.num_outputs for group in self.groups})
        if len(outputs) > 1:
            raise ZooError(
                f"these models have {outputs} outputs, so their logits do not stack: filter by `dataset` or `stage`,"
                " or take `.features(images)`"
            )
        logits, features = self._run(images, want_logits=True)
        assert logits is not None
        return logits, features

    @torch.inference_mode()
    def _run(self, images: Tensor, *, want_logits: bool) -> tuple[Tensor | None, Tensor]:
        if images.ndim != 4 or len(images) == 0:
            raise ZooError(f"images have shape {tuple(images.shape)}; expected [N, C, H, W] with N of at least 1")
        if images.dtype != torch.float32:
            raise ZooError(f"images are {images.dtype}; expected float32, normalised as `zoo.probes` gives them")
        logits: list[Tensor] = [torch.empty(0)] * len(self)
        features: list[Tensor] = [torch.empty(0)] * len(self)
        batches = images.to(self.device).split(BATCH)
        for group in self.groups:
            for position, vector in zip(group.positions, group.weights, strict=True):
                tensors = {f"model.{name}": value for name, value in unflatten(vector, group.layout).items()}
                try:
                    parts = [functional_call(group.module, tensors, (batch,)) for batch in batches]
                except (RuntimeError, AssertionError) as error:
                    raise ZooError(
                        f"{self.model_ids[position]} cannot take images of shape {tuple(images.shape)}: {error}"
                    ) from None
                logits[position] = torch.cat([part[0] for part in parts])
                features[position] = torch.cat([part[1] for part in parts])
        if len({part.shape for part in features}) > 1:
            raise ZooError("these models differ in feature width: filter by `architecture`")
        return (torch.stack(logits) if want_logits else None), torch.stack(features)

    def trunks(self) -> Float[Tensor, "P D"]:
        """Weights of every model without its head.

        Raises:
            ZooError: if the trunks differ in layout.
        """
        trunks: list[Tensor] = [torch.empty(0)] * len(self)
        for group in self.groups:
            for position, vector in zip(group.positions, group.weights[:, group.layout.trunk()], strict=True):
                trunks[position] = vector
        if len({len(trunk) for trunk in trunks}) > 1:
            raise ZooError(
                "these models differ in trunk, so their weights have no distance: filter by `architecture`"
            )
        return torch.stack(trunks)
