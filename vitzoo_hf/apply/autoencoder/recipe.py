"""Recipe of the training of an autoencoder, read from one YAML file."""

from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from vitzoo_hf.apply.autoencoder.losses import BEHAVIOURS
from vitzoo_hf.apply.autoencoder.model import Sizes
from vitzoo_hf.apply.autoencoder.scaling import CHOICES as SCALINGS
from vitzoo_hf.blueprint.located_yaml import Located, load_located
from vitzoo_hf.format.messages import did_you_mean
from vitzoo_hf.format.schema import ZooError, fingerprint
from vitzoo_hf.images.corruptions import parse_corruption

ARMS = {
    "S": (0.0, 1.0),
    "B": (0.0, 0.0),
    "S+B": (0.0, 0.1),
    "C+S": (0.05, 1.0),
    "C+B": (0.05, 0.0),
    "C+S+B": (0.05, 0.1),
}
"""The published arms: share of contrast (γ), and of structure in the remainder (β)."""

VIEWS = ("mlp", "heads")
QUERIES = ("data", "noise")
PRECISIONS = ("float32", "bfloat16")
LARGEST_SEED = 2**63 - 1
"""The largest seed that torch accepts."""


@dataclass(frozen=True)
class AutoencoderRecipe:
    """Settings of the training of an autoencoder.

    Attributes:
        contrast: γ of the composite loss.
        structure: β of the composite loss.
        behaviour: kind of behavioural loss: softmax, distillation or logits.
        normalise: divide the structural loss by the variance of the batch.
        warmup: share of the steps, at the start, that use the structural loss alone.
        scaling: none, layer or entry; see `Scaling.fit`.
        token_width: numbers in a token; 0 takes the longest row.
        dense: cut layers into tokens without regard to their rows.
        views: families of symmetries that views of a model are drawn from: mlp, heads.
        noise: standard deviation of the noise added to scaled weights of a view.
        queries: number of images on which a step compares outputs.
        query_images: `data`, the zoo's selection images; a corruption of them, such as `contrast:5`; or `noise`,
            uniform in the range of pixels.
        pool: number of images that queries are drawn from.
        steps: number of steps of AdamW with one cycle of the learning rate.
        batch_size: number of models in a step.
        lr: highest learning rate.
        weight_decay: weight decay of matrices; biases and norms have none.
        clip: largest norm of the gradient.
        seed: seed of initial weights, order, views and queries.
        precision: precision of the transformer: float32, or bfloat16 under autocast.
        compile: train through `torch.compile`; on a GPU it pays for its half minute of compilation.
        sizes: sizes of the transformer.
    """

    contrast: float = 0.0
    structure: float = 0.1
    behaviour: str = "softmax"
    normalise: bool = False
    warmup: float = 0.0
    scaling: str = "entry"
    token_width: int = 0
    dense: bool = False
    views: tuple[str, ...] = ()
    noise: float = 0.0
    queries: int = 64
    query_images: str = "data"
    pool: int = 1000
    steps: int = 1200
    batch_size: int = 24
    lr: float = 2e-3
    weight_decay: float = 3e-9
    clip: float = 1.0
    seed: int = 0
    precision: str = "float32"
    compile: bool = False
    sizes: Sizes = field(default_factory=Sizes)

    def __post_init__(self) -> None:
        choices = {"behaviour": BEHAVIOURS, "scaling": SCALINGS, "precision": PRECISIONS}
        for name, values in choices.items():
            if getattr(self, name) not in values:
                raise ZooError(f"unknown {name} {getattr(self, name)!r}: {did_you_mean(getattr(self, name), values)}")
        # raises for a corruption that does not exist, before any model is read
        if self.query_images not in QUERIES:
            parse_corruption(self.query_images)
        for view in self.views:
            if view not in VIEWS:
                raise ZooError(f"unknown family of views {view!r}: {did_you_mean(view, VIEWS)}")
        if self.seed > LARGEST_SEED:
            raise ZooError(f"seed of the autoencoder is {self.seed}; it must be at most {LARGEST_SEED}")
        # negated comparisons, so that NaN is refused too
        for name in ("queries", "pool", "steps", "batch_size", "lr", "clip"):
            if not getattr(self, name) > 0:
                raise ZooError(f"{name} of the autoencoder is {getattr(self, name)}; it must be positive")
        for name in ("contrast", "structure", "warmup"):
            if not 0 <= getattr(self, name) <= 1:
                raise ZooError(f"{name} of the autoencoder is {getattr(self, name)}; it must lie between 0 and 1")
        for name in ("noise", "weight_decay", "token_width", "seed"):
            if not getattr(self, name) >= 0:
                raise ZooError(f"{name} of the autoencoder is {getattr(self, name)}; it must not be negative")
        # equal views would make the contrast trivial: both latents of a model are the same
        if self.contrast and not self.views and not self.noise:
            raise ZooError(
                "contrast needs two different views: set views: [mlp, heads], or noise: 0.1, in the recipe"
            )
        if self.contrast and self.batch_size < 2:
            raise ZooError("contrast needs other models in a batch: set batch_size to 2 or more")

    @classmethod
    def load(cls, path: str | Path) -> "AutoencoderRecipe":
        """Read a recipe from YAML; absent settings have their defaults.

        Raises:
            ZooError: naming file and line of a setting that is unknown or has an impossible value.
        """
        root = load_located(Path(path), "the recipe")
        # types, not text, as long as this module does not postpone its annotations
        types = {entry.name: entry.type for entry in fields(cls)}
        root.only(*types)
        values = {name: _read(name, node, types[name]) for name, node in root.items()}
        try:
            return cls(**values)
        except ZooError as error:
            raise root.error(str(error)) from None

    def arm(self, name: str) -> "AutoencoderRecipe":
        """Replace the shares of the losses by those of a published arm.

        Raises:
            ZooError: for an unknown arm.
        """
        if name not in ARMS:
            raise ZooError(f"unknown arm {name!r}: {did_you_mean(name, ARMS)}")
        contrast, structure = ARMS[name]
        return replace(self, contrast=contrast, structure=structure)

    @property
    def fingerprint(self) -> str:
        """Hash of all settings but `compile`, which changes the speed of training, not its result."""
        # a checkpoint may be continued with or without compilation
        return fingerprint({name: value for name, value in asdict(self).items() if name != "compile"})


def _read(name: str, node: Located, kind: object) -> Any:
    if name == "sizes":
        types = {entry.name: entry.type for entry in fields(Sizes)}
        node.only(*types)
        values = {part: value.typed(types[part]) for part, value in node.items()}
        try:
            return Sizes(**values)
        except ZooError as error:
            raise node.error(str(error)) from None
    if name == "views":
        return tuple(entry.typed(str) for entry in node.sequence())
    return node.typed(kind)
