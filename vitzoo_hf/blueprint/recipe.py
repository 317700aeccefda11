"""How one run is trained: the settings that a blueprint gives, each of which can be a generating factor."""

from dataclasses import asdict, dataclass, replace

CHOICES = {
    "regime": ("supervised", "contrastive"),
    "optimizer": ("adamw", "sgd"),
    "schedule": ("constant", "cosine"),
    "head": ("linear", "mlp"),
    "init": ("timm", "kaiming"),
    "precision": ("float32", "bfloat16", "float16"),
    "augmentation_reading": ("declared", "executed"),
    "augmentation": (
        "none",
        "shift",
        "crop",
        "crop-flip",
        "random-crop-flip",
        "random-crop-flip-rotate",
        "simclr",
        "simclr-no-flip",
        "simclr-imagenet",
    ),
}
LATER = ("accumulate", "precision", "warmup_epochs", "augmentation_reading")
"""Settings that blueprints did not have at first: at their default they change no fingerprint."""


@dataclass(frozen=True)
class Recipe:
    """How one run is trained. Every field can be a setting or a generating factor.

    `lr` is per step and unscaled; `mixup` and `cutmix` are the alphas, `random_erase` a probability, as in timm;
    `temperature` and `projection_dim` matter to contrastive runs, `head_hidden` to MLP heads. `accumulate` batches,
    each mixed and, if contrastive, contrasted for itself, give one step with their mean gradient: what as many
    data-parallel processes compute, which `ddp` declares. `precision` is that of the forward pass under autocast.
    In `warmup_epochs` the learning rate rises linearly; the schedule follows. `augmentation_reading: executed` trains
    as the published code of the ViT model zoo did, not as its configuration says; see `executed`.
    """

    regime: str = "supervised"
    optimizer: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.0
    momentum: float = 0.0
    schedule: str = "constant"
    batch_size: int = 128
    seed: int = 0
    head: str = "linear"
    head_hidden: int = 256
    init: str = "timm"
    augmentation: str = "none"
    label_smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    random_erase: float = 0.0
    temperature: float = 0.07
    projection_dim: int = 32
    freeze_trunk: bool = False
    ddp: bool = False
    accumulate: int = 1
    precision: str = "float32"
    warmup_epochs: float = 0.0
    augmentation_reading: str = "declared"

    @property
    def executed(self) -> "Recipe":
        """The recipe as training carries it out, which for `executed` is what the published code did.

        Its call shifted three positional arguments by one (ViTModelZoo, `get_data_augmentations`), so that
        `label_smoothing` received the value of `mixup`, `mixup` that of `cutmix`, and `cutmix` none. Images were
        erased with probability 0.25. Contrastive runs had none of these.
        """
        if self.augmentation_reading == "declared" or self.regime == "contrastive":
            return self
        return replace(self, label_smoothing=self.mixup, mixup=self.cutmix, cutmix=0.0, random_erase=0.25)

    @property
    def decides(self) -> dict[str, object]:
        """The recipe as JSON values. Newer settings are left out at their default, so that old fingerprints hold."""
        default = {name: getattr(Recipe, name) for name in LATER}
        return {name: value for name, value in asdict(self).items() if default.get(name) != value}

    def contradictions(self, stage: str) -> dict[str, bool]:
        """Message about settings that exclude each other in this stage -> whether this recipe has them."""
        contrastive = self.regime == "contrastive"
        return {
            "a contrastive run is a pre-training run": contrastive and stage == "finetune",
            "a contrastive run has no labels to smooth or mix: drop label_smoothing, mixup, cutmix": contrastive
            and bool(self.label_smoothing or self.mixup or self.cutmix),
            "a contrastive run needs two different views: set an augmentation": contrastive
            and self.augmentation == "none",
            "the executed reading smooths labels by mixup: at most 1": self.executed.label_smoothing > 1,
            "a contrastive run needs a batch of at least 2": contrastive and self.batch_size < 2,
            "a contrastive run's head is its projection: it is linear": contrastive and self.head == "mlp",
            "adamw has no momentum setting": self.optimizer == "adamw" and self.momentum > 0,
            "a trunk can be frozen only in fine-tuning": self.freeze_trunk and stage == "pretrain",
            "ddp says that each step takes batches of several processes: set accumulate to their number": self.ddp
            and self.accumulate < 2,
        }
