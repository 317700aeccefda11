"""A trained autoencoder as a value, and as the one file `autoencoder.safetensors`.

The file has the tensors of the transformer, the scaling and the optimiser, from which training continues. Its
metadata are a JSON record: recipe, architecture of the networks, layout, steps, scales of the losses, history.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypedDict

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from vitzoo_hf.apply.autoencoder.losses import Composite
from vitzoo_hf.apply.autoencoder.metrics import Networks
from vitzoo_hf.apply.autoencoder.model import Sizes, WeightAutoencoder
from vitzoo_hf.apply.autoencoder.recipe import AutoencoderRecipe
from vitzoo_hf.apply.autoencoder.scaling import Scaling
from vitzoo_hf.apply.autoencoder.tokens import Tokenizer
from vitzoo_hf.format import schema
from vitzoo_hf.format.atomic import write_atomically
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.models.architecture import Architecture
from vitzoo_hf.models.rebuild import usable_device
from vitzoo_hf.zoo.stream import Stream

FILE = "autoencoder.safetensors"
# part of the file format: a change of it makes earlier files unreadable
KIND = "vitzoo-autoencoder-1"


class Record(TypedDict, total=False):
    """Metadata of a file, from JSON; `digest` is absent in files of the first version."""

    kind: str
    recipe: dict[str, object]
    fingerprint: str
    architecture: list[Any]
    layout: str
    step: int
    scales: dict[str, float]
    stream: dict[str, int | str]
    history: list[dict[str, float]]
    digest: str


@dataclass
class Trained:
    """An autoencoder with everything that encoding, decoding and further training need.

    Attributes:
        recipe: settings of the training.
        networks: networks that are encoded.
        tokenizer: tokenizer of the weights of the networks.
        scaling: scaling of the weights before tokens are made.
        model: encoder and decoder.
        loss: loss with the scales of the first batch.
        components: initial linear maps of the model, if it has linear maps.
        step: number of steps made.
        history: losses every 20 steps; `dropped` networks and `skipped` steps are counted since the previous entry.
    """

    recipe: AutoencoderRecipe
    networks: Networks
    tokenizer: Tokenizer
    scaling: Scaling
    model: WeightAutoencoder
    loss: Composite
    components: Float[Tensor, "L W latent"] | None = None
    step: int = 0
    history: list[dict[str, float]] = field(default_factory=list)

    @property
    def fingerprint(self) -> str:
        """Hash of the recipe, the number of steps and all weights."""
        state = {name: schema.weights_sha256(value.detach().cpu().flatten().numpy()) for name, value in self._state()}
        return schema.fingerprint({"recipe": self.recipe.fingerprint, "step": self.step, "tensors": state})

    def _state(self) -> list[tuple[str, Tensor]]:
        return [*self.model.state_dict().items(), ("mean", self.scaling.mean), ("std", self.scaling.std)]

    def encode(self, vectors: Float[Tensor, "B D"]) -> Float[Tensor, "B T latent"]:
        """Encode the weights of models."""
        return self.model.encode(self.tokenizer.tokens(self.scaling.normalised(vectors)))

    def decode(self, latents: Float[Tensor, "B T latent"]) -> Float[Tensor, "B D"]:
        """Decode latents to the weights of models."""
        return self.scaling.restored(self.tokenizer.vectors(self.model.decode(latents)))


def untrained_model(
    tokenizer: Tokenizer, recipe: AutoencoderRecipe, components: Float[Tensor, "L W latent"] | None
) -> WeightAutoencoder:
    """Make the model of a recipe before its first step, by the recipe's seed."""
    # forked, so that making a model does not move the caller's random numbers
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return WeightAutoencoder(tokenizer, recipe.sizes, components)


def load_autoencoder(folder: str | Path, *, device: str = "cpu") -> Trained:
    """Load the autoencoder that `train_autoencoder` wrote to a folder.

    Args:
        folder: folder with `autoencoder.safetensors`.
        device: device of the model.

    Raises:
        ZooError: if there is no such file, it is damaged, or something else wrote it.
    """
    place, file = usable_device(device), Path(folder) / FILE
    if not file.is_file():
        raise ZooError(f"{folder} holds no {FILE}: train one with `vitzoo encode ZOO --train RECIPE.yaml`")
    record, tensors = _read(file)
    try:
        recipe = _recipe(record["recipe"])
        networks = Networks.of(Architecture(*record["architecture"]))
        tokenizer = Tokenizer.of(networks.layout, width=recipe.token_width or None, dense=recipe.dense)
        with torch.device("meta"):  # no initial weights, which the tensors of the file replace
            model = WeightAutoencoder(tokenizer, recipe.sizes)
        model.load_state_dict(tensors["model"], assign=True)
        scaling = Scaling(tensors["scaling"]["mean"], tensors["scaling"]["std"])
        loss = Composite(recipe.contrast, recipe.structure, dict(record["scales"]))
        identity = (record["fingerprint"], record["layout"], scaling.mean.shape, scaling.std.shape)
        step, history = int(record["step"]), list(record["history"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ZooError(f"{file} is damaged ({str(error).splitlines()[0]}): train again") from None
    size = torch.Size([networks.layout.num_parameters])
    if identity != (recipe.fingerprint, networks.layout.fingerprint, size, size):
        raise ZooError(f"{file} is damaged: its recipe, networks and tensors do not belong together; train again")
    components = tensors["scaling"].get("components")
    model = model.to(place).eval()
    return Trained(recipe, networks, tokenizer, scaling, model, loss, components, step, history)


def save(file: Path, trained: Trained, optimizer: torch.optim.Optimizer, stream: Stream) -> None:
    """Write an autoencoder, its optimiser and the place in the stream of models; atomically."""
    tensors = {f"model.{name}": value for name, value in trained.model.state_dict().items()}
    tensors |= {"scaling.mean": trained.scaling.mean, "scaling.std": trained.scaling.std}
    if trained.components is not None:
        tensors["scaling.components"] = trained.components
    moments = optimizer.state_dict()["state"]
    tensors |= {f"optimizer.{n}.{key}": value for n, entry in moments.items() for key, value in entry.items()}
    networks = trained.networks.architecture
    record: Record = {
        "kind": KIND,
        "recipe": asdict(trained.recipe),
        "fingerprint": trained.recipe.fingerprint,
        "architecture": [networks.name, dict(networks.args), networks.head, networks.head_hidden],
        "layout": trained.networks.layout.fingerprint,
        "step": trained.step,
        "scales": trained.loss.scales,
        "stream": stream.state_dict(),
        "history": trained.history,
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    # safetensors refuses tensors that are not contiguous
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    # safetensors checks lengths, not values: the digest finds flipped bits
    record["digest"] = _digest(plain)
    write_atomically(file, lambda temporary: save_file(plain, temporary, {"record": json.dumps(record)}))


def resume(file: Path, trained: Trained, optimizer: torch.optim.Optimizer, stream: Stream) -> None:
    """Continue from a checkpoint, if there is one.

    Raises:
        ZooError: if the checkpoint is damaged, or belongs to another recipe or layout.
    """
    if not file.is_file():
        return
    record, parts = _read(file)
    if (record["fingerprint"], record["layout"]) != (trained.recipe.fingerprint, trained.networks.layout.fingerprint):
        raise ZooError(
            f"{file} holds an autoencoder of another {_difference(record, trained)}: choose another folder, or"
            " delete it"
        )
    try:
        stream.load_state_dict(record["stream"])
    except ZooError:
        raise ZooError(f"{file} was trained on other models: choose another folder, or delete it") from None
    trained.model.load_state_dict(parts["model"])
    device = trained.model.index_table.device
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in parts["optimizer"].items():
        number, _, key = name.partition(".")
        state.setdefault(int(number), {})[key] = value.to(device)
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    trained.step, trained.history = record["step"], record["history"]
    trained.loss.scales |= record["scales"]


def _difference(record: Record, trained: Trained) -> str:
    """Name the settings in which the recipe of a checkpoint differs, or `layout` if none does."""
    # through JSON, in which tuples become lists like those of the file
    ours, theirs = json.loads(json.dumps(asdict(trained.recipe))), record["recipe"]
    differing = [name for name in ours if ours[name] != theirs.get(name)]
    return f"recipe ({', '.join(differing)})" if differing else "layout"


def _digest(tensors: Mapping[str, Tensor]) -> str:
    # sorted, because the order of tensors in a file is not part of its content
    hashes = {name: schema.weights_sha256(value.flatten().float().numpy()) for name, value in sorted(tensors.items())}
    return schema.fingerprint(hashes)


def _read(file: Path) -> tuple[Record, dict[str, dict[str, Tensor]]]:
    """Read the record of a file, and its tensors by part: model, scaling, optimizer."""
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
        content = json.loads(metadata.get("record", "{}"))
        tensors = load_file(file)
    except (OSError, SafetensorError, ValueError):
        raise ZooError(f"{file} is damaged: delete it, and train again") from None
    if not isinstance(content, dict) or content.get("kind") != KIND:
        raise ZooError(f"{file} is no autoencoder of this library, or of an older version: train again")
    record = Record(**content)
    if "digest" in record and record["digest"] != _digest(tensors):
        raise ZooError(f"{file} is damaged: its tensors are not those that were written; train again")
    parts: dict[str, dict[str, Tensor]] = {name: {} for name in ("model", "optimizer", "scaling")}
    for name, value in tensors.items():
        part, _, key = name.partition(".")
        parts.setdefault(part, {})[key] = value
    return record, parts


def _recipe(settings: dict[str, Any]) -> AutoencoderRecipe:
    return AutoencoderRecipe(**settings | {"sizes": Sizes(**settings["sizes"]), "views": tuple(settings["views"])})
