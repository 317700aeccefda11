"""Encode rows of a zoo to latents and embeddings, and decode latents to rows of a new zoo.

Models are read, encoded and written in batches of at most 64 models and 2**24 weights; only embeddings, and latents
if they are asked for, stay in memory.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypedDict

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
from vitzoo_hf.format.row import Row
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.format.tables import records
from vitzoo_hf.publish.folder import Rows
from vitzoo_hf.zoo import Zoo

POOLS = ("mean", "layers")
NUMBERS_AT_ONCE, MODELS_AT_ONCE = 2**24, 64


class Encoded(NamedTuple):
    """Embeddings and latents of models.

    Attributes:
        embeddings: table with the columns `model_id`, `z0`, `z1`, …
        latents: model id -> latents; empty unless `encode_rows` was called with `latents=True`.
    """

    embeddings: pd.DataFrame
    latents: dict[str, Float[Tensor, "T latent"]]


class ReconstructionScores(TypedDict):
    """Row of the table that `write_reconstructions` returns."""

    model_id: str
    original: str
    r2_beyond_mean: float
    test_loss: float | None
    test_accuracy: float | None
    test_accuracy_original: float | None


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
        zoo: models of the autoencoder's layout.
        trained: the autoencoder.
        pool: `mean` over all tokens, or `layers`, mean and deviation over the tokens of each layer.
        latents: return all latents, from which models can be decoded, besides the embeddings.
        on_models: called with the number of models of a batch after the batch is encoded.

    Raises:
        ZooError: if a model has another layout, there is no model, or `pool` is unknown.
    """
    if pool not in POOLS:
        raise ZooError(f"unknown embedding {pool!r}: {did_you_mean(pool, POOLS)}")
    check_layout(zoo, trained)
    by_id: dict[str, Tensor] = {}
    ids: list[str] = []
    vectors: list[Tensor] = []
    for batch in _batches(zoo.rows(), trained):
        codes = encoded(trained, vectors_of(batch))
        names = [row.model_id for row in batch]
        ids += names
        vectors.append(embedding(codes) if pool == "mean" else embedding_by_layer(codes, trained.tokenizer.lengths))
        if latents:
            by_id |= dict(zip(names, codes, strict=True))
        on_models(len(batch))
    table = pd.DataFrame(torch.cat(vectors).numpy()).rename(columns=lambda number: f"z{number}")
    table.insert(0, "model_id", ids)
    return Encoded(table, by_id)


def write_latents(latents: Mapping[str, Float[Tensor, "T latent"]], trained: Trained, file: Path) -> None:
    """Write latents as safetensors, one tensor a model."""
    tensors = {name: values.contiguous() for name, values in latents.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, lambda temporary: save_file(tensors, temporary, {"autoencoder": trained.fingerprint}))


def read_latents(file: Path, trained: Trained) -> dict[str, Float[Tensor, "T latent"]]:
    """Read the latents that `write_latents` wrote, of the same autoencoder.

    Raises:
        ZooError: if the file cannot be read, or is of another autoencoder.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            # latents mean nothing to another autoencoder, even one of equal shapes
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
    latents: Mapping[str, Float[Tensor, "T latent"]] | None = None,
    device: str = "cpu",
    on_models: Callable[[int], object] = lambda done: None,
) -> pd.DataFrame:
    """Write reconstructions of rows as a zoo, with the factors of the originals and their ids in the provenance.

    Args:
        zoo: original models.
        trained: the autoencoder.
        folder: folder of the new zoo; earlier reconstructions in it are replaced.
        latents: model id of a row of the zoo -> latents to decode; the rows are encoded by default.
        device: device that measures reconstructions.
        on_models: called with the number of models of a batch after the batch is written.

    Returns:
        `model_id`, `original`, `r2_beyond_mean` (about the mean of the scaling), `test_loss` in nats,
        `test_accuracy`, `test_accuracy_original`; results are null where the zoo has no test images.

    Raises:
        ZooError: if a model has another layout, latents name no row, or the folder holds something else.
    """
    check_folder(folder, zoo, "reconstructions_of")
    if latents is not None:
        unknown = sorted(set(latents) - set(zoo.model_ids))
        if unknown:
            raise ZooError(f"latents of {unknown[0]!r}: no row of {zoo.name} among those chosen has that id")
        zoo = zoo.filter(model_id=sorted(latents))
    check_layout(zoo, trained)
    scores: list[ReconstructionScores] = []
    index, fingerprint = zoo.to_pandas(), trained.fingerprint
    size = trained.networks.layout.num_parameters

    def rows(split: str) -> Iterator[dict[str, object]]:
        for batch in _batches(zoo.filter(split=split).rows(), trained):
            for score, row in _reconstructed(zoo, batch, trained, latents, index, fingerprint, device):
                scores.append(score)
                yield row
            on_models(len(batch))

    counts = {split: int((index["split"] == split).sum()) for split in schema.SPLITS}
    # rows are generators, so models are decoded while the zoo is written
    splits = {split: Rows(count, size, rows(split) if count else iter(())) for split, count in counts.items()}
    write_streamed(zoo, splits, set(index["dataset"]), folder, "reconstructions")
    return pd.DataFrame(scores)


def _reconstructed(
    zoo: Zoo,
    batch: list[Row],
    trained: Trained,
    latents: Mapping[str, Tensor] | None,
    index: pd.DataFrame,
    fingerprint: str,
    device: str,
) -> Iterator[tuple[ReconstructionScores, dict[str, object]]]:
    """Decode a batch of rows: scores, and the row of the new zoo, of each model."""
    originals = vectors_of(batch)
    ids = [row["model_id"] for row in batch]
    codes = encoded(trained, originals) if latents is None else torch.stack([latents[name] for name in ids])
    weights = decoded(trained, codes)
    # without weights: the index is enough to derive a row
    light = {row["model_id"]: row for row in records(index[index["model_id"].isin(ids)])}
    losses, accuracies = results_on_test_images(zoo, weights, batch, device)
    for vector, original, row, loss, accuracy in zip(weights, originals, batch, losses, accuracies, strict=True):
        record = {
            "reconstruction_of": {"model_id": row["model_id"], "weights_sha256": row["weights_sha256"]},
            "autoencoder": fingerprint,
            "latents": "given" if latents is not None else "encoded",
        }
        new_row = dict(
            derived_row(
                zoo,
                [light[row["model_id"]]],
                f"reconstruction--{row['run_id']}",
                vector,
                record,
                is_final=row["is_final"],
                test_loss=loss,
                test_accuracy=accuracy,
            )
        )
        # the keys of `splits` say it, and the file has no such column
        del new_row["split"]
        error = (vector - original).double().square().sum()
        spread = (original - trained.scaling.mean).double().square().sum()
        yield (
            {
                "model_id": new_row["model_id"],
                "original": row["model_id"],
                "r2_beyond_mean": float(1 - error / spread) if spread else np.nan,
                "test_loss": loss,
                "test_accuracy": accuracy,
                "test_accuracy_original": row["test_accuracy"],
            },
            new_row,
        )


def results_on_test_images(
    zoo: Zoo, weights: Float[Tensor, "P D"], like: Sequence[Row], device: str
) -> tuple[list[float | None], list[float | None]]:
    """Loss and accuracy of networks on the test images of the datasets of rows; None where the zoo has no images.

    Args:
        zoo: zoo with the test images.
        weights: weights of P networks.
        like: P rows with the architectures and datasets of the networks.
        device: device that measures.
    """
    losses: list[float | None] = [None] * len(weights)
    # a copy: both lists are filled below
    accuracies = list(losses)
    with_images = {row["dataset"] for row in zoo.probe_rows("test")}
    # sorted, because the order of a set changes between runs of Python
    for dataset in sorted({row["dataset"] for row in like} & with_images):
        members = [place for place, row in enumerate(like) if row["dataset"] == dataset]
        scores = candidate_scores(weights[members], like[members[0]], *zoo.probes(dataset), device=device)
        for place, loss, accuracy in zip(members, scores.loss.tolist(), scores.accuracy.tolist(), strict=True):
            losses[place], accuracies[place] = loss, accuracy
    return losses, accuracies


def check_layout(zoo: Zoo, trained: Trained) -> None:
    """Refuse models of another layout than the autoencoder's.

    Raises:
        ZooError: if a model has another layout, or there is no model.
    """
    layouts = set(zoo.index["layout"])
    if not layouts:
        raise ZooError(f"{zoo.name} has no models among those chosen: loosen the filter")
    layout = trained.networks.layout.fingerprint
    if layouts != {layout}:
        raise ZooError(
            f"this autoencoder takes models of layout {layout} with a {trained.networks.architecture.head} head;"
            f" those chosen have {', '.join(sorted(layouts))}: filter, such as by `head`"
        )


def _batches(rows: Iterator[Row], trained: Trained) -> Iterator[list[Row]]:
    size = max(1, min(MODELS_AT_ONCE, NUMBERS_AT_ONCE // trained.networks.layout.num_parameters))
    batch: list[Row] = []
    for row in rows:
        batch.append(row)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
