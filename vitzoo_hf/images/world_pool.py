"""Images whose shape, style, colour and label are drawn from a `World`, by position in one pool of grey images.

The pool is parted once: the victim's images, of which targets are trained; the adversary's, of which shadows are;
query and test images. What a run draws depends on its world and its seed alone, never on the runs beside it.
"""

import hashlib
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64, Shaped, UInt8
from torch import Tensor

from vitzoo_hf.blueprint.images_spec import ImagesSpec
from vitzoo_hf.blueprint.world import Learner, World
from vitzoo_hf.format.schema import ZooError, fingerprint
from vitzoo_hf.images.pixels import Source
from vitzoo_hf.images.preparation import prepare

ROLE_PARTS = {"target": "victim", "shadow": "adversary"}
FLIPPED_AGREEMENT = 0.1
"""Colour agreement of the test images in other colours, as in the ColoredMNIST of Arjovsky et al. 2019."""
MOST_KEPT = 4
"""At most one in so many of the adversary's images is kept from shadows, to be queried."""


@dataclass(frozen=True, eq=False)
class Draw:
    """Images drawn from a world, one entry an image.

    Attributes:
        positions: positions in the pool.
        groups: 0 or 1; 1 has the style.
        labels: labels that a run trains on, noise and flips included.
        colours: 0 or 1, the channel that has the image.
        environments: from 0, in the order of `World.agreements`.
    """

    positions: Int64[Tensor, " n"]
    groups: Int64[Tensor, " n"]
    labels: Int64[Tensor, " n"]
    colours: Int64[Tensor, " n"]
    environments: Int64[Tensor, " n"]

    def __len__(self) -> int:
        return len(self.positions)

    def take(self, entries: Int64[Tensor, " m"]) -> "Draw":
        """Select these entries, in this order."""
        return Draw(*(getattr(self, name)[entries] for name in self.__dataclass_fields__))

    def record(self) -> dict[str, Any]:
        """Facts about the training images as JSON values: sizes, and a hash of the set of positions."""
        positions, counts = self.positions.unique(return_counts=True)
        return {
            "num_images": len(self),
            "num_distinct_images": len(positions),
            "most_repeats": int(counts.max()),
            "positions_sha256": hashlib.sha256(positions.numpy().astype("<i8").tobytes()).hexdigest(),
            "images_by_environment": self.environments.bincount().tolist(),
        }


@dataclass(frozen=True, eq=False)
class WorldPool:
    """Grey images to draw from.

    Attributes:
        pixels: plain, and in the style of group 1.
        classes: classes of the base images, int64 `[N]`.
        parts: `victim`, `adversary`, `query`, `test` -> positions, ascending; no position is in two of them.
    """

    spec: ImagesSpec
    pixels: UInt8[Tensor, "2 N S S"]
    classes: Int64[Tensor, " N"]
    num_classes: int
    parts: dict[str, Tensor]

    @classmethod
    def of(cls, source: Source, splits: dict[str, Tensor], spec: ImagesSpec) -> "WorldPool":
        """The pool of a source: targets learn from `train`, shadows from `selection` but for query images.

        Raises:
            ZooError: for images that are not in memory, or a region of classes that there are not.
        """
        if not isinstance(source.images, Tensor):
            raise ZooError(f"a world is made of images in memory: {spec.source!r} is decoded; take a built-in source")
        last = len(source.class_names) - 1
        unknown = [int(number) for number in np.atleast_1d(spec.region) if not 0 <= number <= last]
        if unknown:
            raise ZooError(f"region {unknown} is no class of {spec.source!r}: its classes are 0 to {last}")
        grey = replace(spec, channels=1)
        plain = prepare(source.images, grey)[:, 0]
        styled = plain if spec.style == "classes" else prepare(in_style(source.images, spec.style), grey)[:, 0]
        rng = np.random.default_rng([spec.split_seed, 1])
        adversary = splits["selection"][torch.from_numpy(rng.permutation(len(splits["selection"])))]
        num_queries = min(2 * spec.queries, len(adversary) // MOST_KEPT)
        parts = {
            "victim": splits["train"],
            "query": adversary[:num_queries].sort().values,
            "adversary": adversary[num_queries:].sort().values,
            "test": splits["test"],
        }
        return cls(spec, torch.stack([plain, styled]), source.labels, len(source.class_names), parts)

    @property
    def shapes(self) -> Int64[Tensor, " N"]:
        """0 for the first half of the classes, 1 for the second."""
        return (self.classes >= self.num_classes // 2).long()

    def members(self, part: str, shape: int, group: int) -> Int64[Tensor, " m"]:
        """Positions in a part with this shape, from which images of this group are made."""
        positions = self.parts[part]
        is_member = self.shapes[positions] == shape
        if self.spec.style == "classes":
            half = self.num_classes // 2
            place = self.classes[positions] - half * shape
            is_member &= (place >= half - half // 2) == bool(group)
        return positions[is_member]

    def training_draw(self, world: World, learner: Learner, seed: int) -> Draw:
        """The images that a run learns from, whatever other runs there are.

        Raises:
            ZooError: if the pool has no image of a shape and group, or the draw none to re-sample.
        """
        decides = fingerprint({"world": asdict(world), "seed": seed, "pool": self.spec.split_seed})
        rng = np.random.default_rng(int(decides, 16))
        drawn = self.draw(ROLE_PARTS[world.role], world, world.num_images, rng)
        if learner.use_images:
            drawn = drawn.take(torch.arange(learner.use_images))
        return resampled(drawn, learner, rng) if learner.learner == "resample" else drawn

    def draw(self, part: str, world: World, count: int, rng: np.random.Generator) -> Draw:
        """`count` images, equally many of each environment, in an order that tells nothing."""
        agreements = np.array(world.agreements)
        environments = rng.permutation(np.arange(count) % len(agreements))
        labels = rng.random(count) < world.label_ratio
        shapes = labels ^ (rng.random(count) < world.label_noise)
        groups = rng.random(count) < world.group_ratio
        positions = np.empty(count, dtype=np.int64)
        for shape in (0, 1):
            for of_group in ([0], [1]) if self.spec.style == "classes" else ([0, 1],):
                selected = (shapes == shape) & np.isin(groups, of_group)
                if selected.any():
                    members = self.members(part, shape, of_group[0]).numpy()
                    if len(members) == 0:
                        raise ZooError(f"no {part} image has shape {shape}, group {of_group}: take a larger source")
                    positions[selected] = np.resize(rng.permutation(members), selected.sum())
        region = np.isin(self.classes[torch.from_numpy(positions)].numpy(), np.atleast_1d(self.spec.region))
        labels = labels ^ (region & (rng.random(count) < world.flip_rate))
        colours = labels ^ (rng.random(count) >= agreements[environments])
        values = (positions, groups, labels, colours, environments)
        return Draw(*(torch.from_numpy(np.asarray(value, dtype=np.int64)) for value in values))

    def probes(self, part: str, count: int) -> Draw:
        """`count` images, equally many from each world of the blueprint."""
        rng = np.random.default_rng([self.spec.split_seed, 2, list(self.parts).index(part)])
        worlds = self.spec.worlds or (World(),)
        shares = probe_origins(count, len(worlds)).bincount(minlength=len(worlds)).tolist()
        draws = [self.draw(part, world, share, rng) for world, share in zip(worlds, shares, strict=True)]
        return Draw(*(torch.cat([getattr(draw, name) for draw in draws]) for name in Draw.__dataclass_fields__))

    def images(self, draw: Draw) -> UInt8[Tensor, "n 3 S S"]:
        """The images of a draw in their colours."""
        return coloured(self.pixels[draw.groups, draw.positions], draw.colours)

    def signature(self) -> bytes:
        """Changes with any pixel, class or part."""
        sha = hashlib.sha256(self.pixels.numpy().tobytes() + self.classes.numpy().tobytes())
        for positions in self.parts.values():
            sha.update(positions.numpy().tobytes())
        return sha.digest()


def probe_origins(count: int, worlds: int) -> Int64[Tensor, " n"]:
    """The world that each query or test image of a zoo is drawn from: equally many, one world behind the other.

    >>> probe_origins(5, 2)
    tensor([0, 0, 0, 1, 1])
    """
    return (torch.arange(count) % worlds).sort().values


def flipped(world: World) -> World:
    """The same distribution, but colour agrees with the label in one of ten images."""
    return replace(world, environments=(), last_environment=True, colour_agreement=FLIPPED_AGREEMENT)


def coloured(grey: Shaped[Tensor, "*n S S"], colours: Int64[Tensor, "*n"]) -> Shaped[Tensor, "*n 3 S S"]:
    """Grey images in channel 0 or 1; the other two are black.

    >>> coloured(torch.ones(2, 1, 1), torch.tensor([0, 1])).flatten(1)
    tensor([[1., 0., 0.],
            [0., 1., 0.]])
    """
    channels = torch.arange(3, device=colours.device) == colours[..., None]
    return grey.unsqueeze(-3) * channels[..., None, None].to(grey.dtype)


def colourless(grey: Float[Tensor, "*n S S"]) -> Float[Tensor, "*n 3 S S"]:
    """Grey images, half in each of channels 0 and 1: what is alike in both colours."""
    half = grey / 2
    return torch.stack([half, half, torch.zeros_like(half)], -3)


def in_style(images: UInt8[Tensor, "N C h w"], style: str) -> UInt8[Tensor, "N C h w"]:
    """Images turned by 90 degrees, inverted, or with strokes one pixel thicker all round."""
    if style == "rotated":
        return images.rot90(1, (2, 3)).contiguous()
    if style == "inverted":
        return 255 - images
    thick = torch.nn.functional.max_pool2d(images.float(), 3, stride=1, padding=1)
    return thick.to(torch.uint8)


def resampled(drawn: Draw, learner: Learner, rng: np.random.Generator) -> Draw:
    """Resample to the same number of images so that exactly `resample_to` of them have the chosen property.

    Images repeat as evenly as possible.

    Source: the over-sampling of Suri et al., "Dissecting Distribution Inference", 2023, at a fixed number of images.

    Raises:
        ZooError: if there is no image of a kind that is wanted.
    """
    kinds = {
        "label": drawn.labels,
        "group": drawn.groups,
        "agreement": (drawn.colours == drawn.labels).long(),
    }[learner.resample_by].numpy()
    positive = round(learner.resample_to * len(drawn))
    entries = []
    for kind, count in ((1, positive), (0, len(drawn) - positive)):
        members = np.flatnonzero(kinds == kind)
        if count and not len(members):
            raise ZooError(f"no image drawn has {learner.resample_by} {kind}, to re-sample from: draw more images")
        entries.append(np.resize(rng.permutation(members), count))
    return drawn.take(torch.from_numpy(rng.permutation(np.concatenate(entries))))
