"""Which images a blueprint trains on and how they are prepared."""

from dataclasses import asdict, dataclass, field, fields

from vitzoo_hf.blueprint.located_yaml import Located
from vitzoo_hf.blueprint.world import World
from vitzoo_hf.format.messages import did_you_mean

CHOICES = {
    "interpolation": ("bilinear", "bicubic"),
    "decode": ("auto", "once", "on_demand"),
    "world": ("none", "two-colour"),
    "style": ("rotated", "inverted", "thick", "classes"),
}
OF_WORLDS = ("world", "style", "region", "queries", "tests", "worlds")
LATER = ("interpolation", "label", "decode", *OF_WORLDS)
"""Fields that blueprints did not have at first: at their default they change no fingerprint and no record."""


@dataclass(frozen=True)
class ImagesSpec:
    """Which images, prepared how.

    The shorter side is resized to `resize`, if given; a centred square of `crop` pixels, or as large as it goes, is
    resized to `size`, by `interpolation` (bilinear or bicubic, antialiased); models are fed (x/255 − mean)/std, where
    mean and std are one number or one a channel.

    `selection` and `test` are shares of the images; a source with a test set of its own keeps it, and gives
    `selection` from its training images. `classes` and `count`, of images to train on, let a blueprint be planned
    where its images are not. `label` is the column of a dataset that has several.

    `decode` says when: `once`, into memory; `on_demand`, for each batch, random crops being cut from the original
    image; `auto` is `once` unless the prepared images would take more than 4 GB.

    `world: two-colour` makes a world of the images: grey becomes one of two colours, and the label is whether the
    class is in the first or second half. Each run draws its own images, from `train` as a target or from `selection`
    as a shadow, by settings of its own (`vitzoo_hf.blueprint.world`). `style` makes images of group 1: rotated by 90
    degrees, inverted, thick, or of other `classes`; `region` are the classes whose labels `flip_rate` flips. Of the
    adversary's images `queries` are kept from shadows, as the zoo's selection images; `tests` are the test images;
    both are drawn equally from all `worlds` of the blueprint, which nobody writes by hand.
    """

    source: str
    size: int
    crop: int | None = None
    resize: int | None = None
    channels: int | None = None
    mean: float | tuple[float, ...] = 0.5
    std: float | tuple[float, ...] = 0.5
    selection: float = 0.2
    test: float = 0.2
    split_seed: int = 0
    path: str | None = None
    classes: int | None = None
    count: int | None = None
    interpolation: str = "bilinear"
    label: str | None = None
    decode: str = "auto"
    world: str = "none"
    style: str = "rotated"
    region: int | tuple[int, ...] = ()
    queries: int = 1024
    tests: int = 2048
    worlds: tuple[World, ...] = field(default=(), metadata={"derived": True})

    @property
    def is_world(self) -> bool:
        """Whether each run draws training images of its own."""
        return self.world != "none"

    def decides(self) -> dict[str, object]:
        """Everything that can change a weight, as JSON values; paths of this machine and counts stay out.

        >>> "interpolation" in ImagesSpec("digits", 8).decides()
        False
        >>> ImagesSpec("digits", 8, mean=(0.1, 0.2, 0.3), interpolation="bicubic").decides()["mean"]
        [0.1, 0.2, 0.3]
        """
        values = asdict(self)
        del values["path"], values["classes"], values["count"]
        defaults = {entry.name: entry.default for entry in fields(self)}
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in values.items()
            if not (name in LATER and value == defaults[name])
        }


def check_images(spec: ImagesSpec, node: Located) -> None:
    """Refuse a specification by which no images can be prepared.

    Raises:
        ZooError: naming the place in the file.
    """
    counts = {"size": spec.size, "crop": spec.crop, "resize": spec.resize, "channels": spec.channels}
    counts |= {"queries": spec.queries, "tests": spec.tests}
    for name, count in (counts | {"classes": spec.classes, "count": spec.count}).items():
        if count is not None and count < 1:
            raise node.error(f"{name} is {count}; it must be positive")
    for name in ("mean", "std"):
        value = getattr(spec, name)
        if isinstance(value, tuple) and len(value) != (spec.channels or 3):
            raise node.error(f"{name} has {len(value)} numbers; give one, or one for each channel")
    for std in spec.std if isinstance(spec.std, tuple) else (spec.std,):
        if std <= 0:
            raise node.error(f"std is {std}; it must be positive")
    for name, choices in CHOICES.items():
        value = getattr(spec, name)
        if value not in choices:
            raise node.error(f"unknown {name} {value!r}: {did_you_mean(value, choices)}")
    if spec.is_world and spec.channels not in (None, 3):
        raise node.error(f"channels is {spec.channels}; images of a world have 3")
    if not (0 < spec.selection < 1 and 0 < spec.test < 1 and spec.selection + spec.test < 1):
        raise node.error("selection and test are shares above 0 that leave images to train on")
