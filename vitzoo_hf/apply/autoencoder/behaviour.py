"""What decoded networks compute on query images, all of them in one forward, with gradients to their weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from vitzoo_hf.batched_vit import BatchedViT
from vitzoo_hf.flatten import Layout, unflatten
from vitzoo_hf.rebuild import architecture_of
from vitzoo_hf.schema import ZooError
from vitzoo_hf.stacked_vit import stacked_logits, trainable_vit
from vitzoo_hf.vit import layout_of, skeleton


@dataclass(frozen=True)
class Networks:
    """The networks that vectors of one layout make.

    Attributes:
        architecture: name, arguments, head and hidden width, as `vit.create` takes them.
        layout: of the vectors.
        vit: sizes of the plain ViT.
    """

    architecture: tuple[str, dict[str, Any], str, int | None]
    layout: Layout
    vit: BatchedViT

    @classmethod
    def like(cls, row: Mapping[str, Any]) -> "Networks":
        """Those of the architecture and head of a row.

        Raises:
            ZooError: for an architecture other than a plain ViT without dropout.
        """
        return cls.of(*architecture_of(row))

    @classmethod
    def of(cls, name: str, args: Mapping[str, Any], head: str, hidden: int | None) -> "Networks":
        """Those of an architecture and head.

        Raises:
            ZooError: as `like`.
        """
        kind = (name, dict(args), head, hidden)
        vit = trainable_vit(skeleton(*kind))
        if vit is None:
            raise ZooError(f"a behavioural loss needs plain ViTs without dropout; {name!r} with {kind[1]} is none")
        return cls(kind, layout_of(*kind), vit)

    def patches(self, images: Float[Tensor, "n C H W"]) -> Float[Tensor, "n t c"]:
        """Images cut as the patch embedding takes them."""
        return self.vit.patches(images)

    def logits(self, vectors: Float[Tensor, "M D"], patches: Float[Tensor, "n t c"]) -> Float[Tensor, "M n K"]:
        """Outputs of M networks on the same images, differentiable in the vectors."""
        return stacked_logits(self.vit, unflatten(vectors, self.layout), patches.expand(len(vectors), -1, -1, -1))
