"""Rows of a zoo through an autoencoder: to latents and embeddings, and back to rows; some models at a time."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from vitzoo_hf.apply.autoencoder.model import embedding, embedding_by_layer
from vitzoo_hf.apply.autoencoder.sampling import decoded, encoded
from vitzoo_hf.apply.autoencoder.tokens import vectors_of
from vitzoo_hf.apply.autoencoder.trained import Trained
from vitzoo_hf.apply.candidates import candidate_scores
from vitzoo_hf.apply.made_zoos import check_folder, derived_row, write_streamed
from vitzoo_hf.format import schema
from vitzoo_hf.format.atomic import write_atomically
from vitzoo_hf.format.messages import did_you_mean
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.format.tables import records
from vitzoo_hf.publish.folder import Rows
from vitzoo_hf.zoo import Zoo

POOLS = ("mean", "layers")
NUMBERS_AT_ONCE, MODELS_AT_ONCE = 2**24, 64


class Encoded(NamedTuple):
    """Models as an autoencoder encodes them.

    Attributes:
        embeddings: `model_id`, then `z0`, `z1`, …
        latents: model id -> latents, empty unless asked for.
    """

    embeddings: pd.DataFrame
    latents: dict[str, Float[Tensor, "N latent"]]


def encode_rows(
    zoo: Zoo,
    trained: Trained,
    *,
    pool: str = "mean",
    latents: bool = False,
    on_models: Callable[[int], object] = lambda done: None,
) -> Encoded:
    """Encode every row of a zoo.

    Args:
        zoo: of models of the autoencoder's layout.
        trained: the autoencoder.
        pool: `mean` over all tokens, or `layers`, mean and deviation over those of each layer.
        latents: keep all latents, from which models can be decoded, besides the embeddings.
        on_models: called with the number of models of each batch, once it is encoded.

    Raises:
        ZooError: if a model has another layout, there is no model, or `pool` is unknown.
    """
    if pool not in POOLS:
        raise ZooError(f"unknown embedding {pool!r}: {did_you_mean(pool, POOLS)}")
    check_layout(zoo, trained)
    kept: dict[str, Tensor] = {}
    ids: list[str] = []
    vectors = []
    for batch in _batches(zoo.rows(), trained):
        found = encoded(trained, vectors_of(batch))
        names = [row["model_id"] for row in batch]
        ids += names
        vectors.append(embedding(found) if pool == "mean" else embedding_by_layer(found, trained.tokenizer.lengths))
        if latents:
            kept |= dict(zip(names, found, strict=True))
        on_models(len(batch))
    table = pd.DataFrame(torch.cat(vectors).numpy()).rename(columns=lambda number: f"z{number}")
    table.insert(0, "model_id", ids)
    return Encoded(table, kept)


def write_latents(latents: Mapping[str, Float[Tensor, "N latent"]], trained: Trained, file: Path) -> None:
    """Write latents as safetensors, one tensor a model."""
    held = {name: values.contiguous() for name, values in latents.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, lambda temporary: save_file(held, temporary, {"autoencoder": trained.fingerprint}))


def read_latents(file: Path, trained: Trained) -> dict[str, Float[Tensor, "N latent"]]:
    """Latents that `write_latents` wrote, of the same autoencoder.

    Raises:
        ZooError: if the file cannot be read, or is of another autoencoder.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            source = (opened.metadata() or {}).get("autoencoder")
        latents = load_file(file)
    except (OSError, SafetensorError, ValueError):
        raise ZooError(f"cannot read {file} as latents: `vitzoo encode ZOO --latents FILE` writes them") from None
    shape = (trained.tokenizer.num_tokens, trained.recipe.sizes.latent)
    wrong = [name for name, values in latents.items() if tuple(values.shape) != shape]
    if source is None:
        raise ZooError(
            f"{file} does not say whose latents it holds: when you change them, save the metadata of"
            " `vitzoo encode --latents` with them, save_file(latents, FILE, {'autoencoder': …})"
        )
    if source != trained.fingerprint or wrong:
        raise ZooError(f"{file} holds latents of another autoencoder: encode the zoo again")
    return {name: values.float() for name, values in latents.items()}


def write_reconstructions(
    zoo: Zoo,
    trained: Trained,
    folder: Path,
    *,
    latents: Mapping[str, Float[Tensor, "N latent"]] | None = None,
    device: str = "cpu",
    on_models: Callable[[int], object] = lambda done: None,
) -> pd.DataFrame:
    """Write reconstructions of rows as a zoo: each keeps the factors of its original, and names it in its provenance.

    Args:
        zoo: of the originals.
        trained: the autoencoder.
        folder: the new zoo; earlier reconstructions that are there are replaced.
        latents: decoded in place of those of the rows: model id of a row of the zoo -> latents.
        device: where reconstructions are measured.
        on_models: as for `encode_rows`.

    Returns:
        `model_id`, `original`, `r2_beyond_mean` (about the mean of the scaling), `test_loss` in nats,
        `test_accuracy`, `test_accuracy_original`; results are null where the zoo has no test images.

    Raises:
        ZooError: if a model has another layout, latents name no row, or as `check_folder`.
    """
    check_folder(folder, zoo, "reconstructions_of")
    if latents is not None:
        unknown = sorted(set(latents) - set(zoo.model_ids))
        if unknown:
            raise ZooError(f"latents of {unknown[0]!r}: no row of {zoo.name} among those chosen has that id")
        zoo = zoo.filter(model_id=sorted(latents))
    check_layout(zoo, trained)
    told: list[dict[str, Any]] = []
    index, fingerprint = zoo.to_pandas(), trained.fingerprint
    size = trained.networks.layout.num_parameters

    def rows(split: str) -> Iterator[dict[str, Any]]:
        for batch in _batches(zoo.filter(split=split).rows(), trained):
            for row, made in _reconstructed(zoo, batch, trained, latents, index, fingerprint, device):
                told.append(row)
                yield made
            on_models(len(batch))

    counts = {split: int((index["split"] == split).sum()) for split in schema.SPLITS}
    splits = {split: Rows(count, size, rows(split) if count else iter(())) for split, count in counts.items()}
    write_streamed(zoo, splits, set(index["dataset"]), folder, "reconstructions")
    return pd.DataFrame(told)


def _reconstructed(
    zoo: Zoo,
    batch: list[dict[str, Any]],
    trained: Trained,
    latents: Mapping[str, Tensor] | None,
    index: pd.DataFrame,
    fingerprint: str,
    device: str,
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    originals = vectors_of(batch)
    ids = [row["model_id"] for row in batch]
    found = encoded(trained, originals) if latents is None else torch.stack([latents[name] for name in ids])
    weights = decoded(trained, found)
    light = {row["model_id"]: row for row in records(index[index["model_id"].isin(ids)])}
    losses, accuracies = results_on_test_images(zoo, weights, batch, device)
    for vector, original, row, loss, accuracy in zip(weights, originals, batch, losses, accuracies, strict=True):
        record = {
            "reconstruction_of": {"model_id": row["model_id"], "weights_sha256": row["weights_sha256"]},
            "autoencoder": fingerprint,
            "latents": "given" if latents is not None else "encoded",
        }
        made = derived_row(
            zoo,
            [light[row["model_id"]]],
            f"reconstruction--{row['run_id']}",
            vector,
            record,
            is_final=row["is_final"],
            test_loss=loss,
            test_accuracy=accuracy,
        )
        del made["split"]
        error = (vector - original).double().square().sum()
        spread = (original - trained.scaling.mean).double().square().sum()
        yield (
            {
                "model_id": made["model_id"],
                "original": row["model_id"],
                "r2_beyond_mean": float(1 - error / spread) if spread else np.nan,
                "test_loss": loss,
                "test_accuracy": accuracy,
                "test_accuracy_original": row["test_accuracy"],
            },
            made,
        )


def results_on_test_images(
    zoo: Zoo, weights: Float[Tensor, "P D"], like: Sequence[Mapping[str, Any]], device: str
) -> tuple[list[float | None], list[float | None]]:
    """Loss and accuracy of networks on the test images of their rows' datasets; None where the zoo has none."""
    losses: list[float | None] = [None] * len(weights)
    accuracies = list(losses)
    held = {row["dataset"] for row in zoo.probe_rows("test")}
    for dataset in sorted({row["dataset"] for row in like} & held):
        members = [place for place, row in enumerate(like) if row["dataset"] == dataset]
        scores = candidate_scores(weights[members], like[members[0]], *zoo.probes(dataset), device=device)
        for place, loss, accuracy in zip(members, scores.loss.tolist(), scores.accuracy.tolist(), strict=True):
            losses[place], accuracies[place] = loss, accuracy
    return losses, accuracies


def check_layout(zoo: Zoo, trained: Trained) -> None:
    """Refuse models that the autoencoder cannot take.

    Raises:
        ZooError: if a model has another layout, or there is no model.
    """
    layouts = set(zoo.index["layout"])
    if not layouts:
        raise ZooError(f"{zoo.name} has no models among those chosen: loosen the filter")
    own = trained.networks.layout.fingerprint
    if layouts != {own}:
        raise ZooError(
            f"this autoencoder takes models of layout {own} with a {trained.networks.architecture.head} head; those"
            f" chosen have {', '.join(sorted(layouts))}: filter, such as by `head`"
        )


def _batches(rows: Iterator[dict[str, Any]], trained: Trained) -> Iterator[list[dict[str, Any]]]:
    together = max(1, min(MODELS_AT_ONCE, NUMBERS_AT_ONCE // trained.networks.layout.num_parameters))
    batch: list[dict[str, Any]] = []
    for row in rows:
        batch.append(row)
        if len(batch) == together:
            yield batch
            batch = []
    if batch:
        yield batch
