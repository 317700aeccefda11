"""The verb that generates models with an autoencoder of weights.

The verb that trains an autoencoder of weights, and encodes models with it.

The verb that decodes models with an autoencoder of weights.
"""

from pathlib import Path
from shlex import quote
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from vitzoo_hf.cli.options import Json, Quiet, Where, hint, open_zoo, print_json, print_table, table_records
from vitzoo_hf.format.schema import ZooError

Train = Annotated[
    str | None, Parameter(help="Train first, by this recipe: a YAML file, or default; continues what is there.")
]
Pool = Literal["mean", "layers"]
Arm = Annotated[str | None, Parameter(help="With --train: the loss, S, B, S+B, C+S, C+B or C+S+B.")]


def encode(
    zoo: str,
    *,
    autoencoder: Path,
    train: Train = None,
    arm: Arm = None,
    out: Path | None = None,
    pool: Pool = "mean",
    latents: Path | None = None,
    where: Where = None,
    device: str = "cpu",
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Encode models with a weight autoencoder: one embedding a model, as features for `vitzoo properties`.

    Trains it first with --train, on the models of the train split among those chosen, all of one layout and dataset.

    Args:
        zoo: Folder, dataset id, or `sample`.
        autoencoder: Folder of the autoencoder.
        out: Table of embeddings, .csv or .parquet; AUTOENCODER/embeddings.csv by default.
        pool: An embedding is the mean over all tokens, or mean and deviation over those of each layer.
        latents: Also write all latents into this .safetensors file, for `vitzoo decode --latents`.
        device: cpu or cuda.
    """
    from vitzoo_hf.apply.autoencoder.rows import encode_rows, write_latents
    from vitzoo_hf.apply.autoencoder.trained import load_autoencoder
    from vitzoo_hf.progress import progress_bar

    table = out if out is not None else autoencoder / "embeddings.csv"
    if table.suffix not in (".csv", ".parquet"):
        raise ZooError(f"--out {table}: expected a name that ends in .csv or .parquet")
    if arm is not None and train is None:
        raise ZooError("--arm chooses the loss of a training: give --train too, or leave it out")
    if latents is not None and latents.resolve() == (autoencoder / "autoencoder.safetensors").resolve():
        raise ZooError(f"--latents {latents} is the file of the autoencoder: name another")
    table.parent.mkdir(parents=True, exist_ok=True)
    opened, shown = open_zoo(zoo, where), not (json or quiet)
    if train is not None:
        _train(opened, train, arm, autoencoder, device, shown=shown)
    trained = load_autoencoder(autoencoder, device=device)
    with progress_bar("encoding", "model", shown=shown, total=len(opened)) as bar:
        found = encode_rows(opened, trained, pool=pool, latents=latents is not None, on_models=bar.update)
    if table.suffix == ".csv":
        found.embeddings.to_csv(table, index=False)
    else:
        found.embeddings.to_parquet(table, index=False)
    if latents is not None:
        write_latents(found.latents, trained, latents)
    numbers = found.embeddings.shape[1] - 1
    if json:
        files = {"embeddings": str(table), "latents": None if latents is None else str(latents)}
        print_json(files | {"models": len(opened), "numbers": numbers, "steps": trained.step})
        return
    print(f"{len(opened)} models as {numbers} numbers each in {table}")
    if trained.step < trained.recipe.steps:
        print(f"the autoencoder has made {trained.step} of {trained.recipe.steps} steps: --train continues it")
    if not quiet:
        hint(f"Next: vitzoo properties {quote(zoo)} --embedding {quote(str(table))}")


def _train(zoo: Any, recipe: str, arm: str | None, folder: Path, device: str, *, shown: bool) -> None:
    from vitzoo_hf.apply.autoencoder.recipe import AutoencoderRecipe
    from vitzoo_hf.apply.autoencoder.training import train_autoencoder
    from vitzoo_hf.progress import progress_bar

    chosen = AutoencoderRecipe() if recipe == "default" else AutoencoderRecipe.load(recipe)
    if arm is not None:
        chosen = chosen.arm(arm)
    with progress_bar("training", "step", shown=shown, total=chosen.steps) as bar:

        def tell(step: int, losses: dict[str, float]) -> None:
            if bar.n == 0 and step > 1:
                bar.initial = step - 1
                bar.n = step - 1
            bar.set_postfix(loss=f"{losses['loss']:.4g}", refresh=False)
            bar.update(step - bar.n)

        train_autoencoder(zoo, chosen, folder, device=device, on_step=tell)


def decode(
    zoo: str,
    *,
    autoencoder: Path,
    out: Path,
    latents: Path | None = None,
    where: Where = None,
    device: str = "cpu",
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Reconstruct models by a weight autoencoder; reconstructions become a zoo.

    Each is a row with the factors of its original, which its provenance names; reconstructions.csv has how near it is
    and what it is worth on test images.

    Args:
        zoo: Folder, dataset id, or `sample`.
        autoencoder: Folder of the autoencoder, as `vitzoo encode --train` leaves it.
        out: Folder for the zoo of reconstructions and the table.
        latents: Decode these in place of those of the rows: a file of `vitzoo encode --latents`, as it is or changed.
        device: cpu or cuda.
    """
    from vitzoo_hf.apply.autoencoder.rows import read_latents, write_reconstructions
    from vitzoo_hf.apply.autoencoder.trained import load_autoencoder
    from vitzoo_hf.progress import progress_bar

    trained = load_autoencoder(autoencoder, device=device)
    opened = open_zoo(zoo, where)
    given = None if latents is None else read_latents(latents, trained)
    total = len(opened) if given is None else len(given)
    with progress_bar("decoding", "model", shown=not (json or quiet), total=total) as bar:
        table = write_reconstructions(opened, trained, out, latents=given, device=device, on_models=bar.update)
    table.to_csv(out / "reconstructions.csv", index=False)
    if json:
        print_json({"zoo": str(out), "table": table_records(table)})
        return
    means = table[["r2_beyond_mean", "test_accuracy", "test_accuracy_original"]].astype(float).mean()
    print_table([{"models": len(table)} | {f"mean {name}": float(value) for name, value in means.items()}])
    print(f"{len(table)} reconstructions in {out}; accuracy alone does not tell one from a good prototype")
    if not quiet:
        hint(f"Next: vitzoo evaluate {quote(str(out))}")


Mode = Literal["joint", "token", "number"]
Keep = Annotated[int, Parameter(help="The best by selection images are kept, at most COUNT; 0 keeps all, unchosen.")]


def sample(
    zoo: str,
    *,
    autoencoder: Path,
    out: Path,
    count: int = 50,
    keep: Keep = 10,
    rounds: int = 1,
    fine_tune: int = 0,
    mode: Mode = "joint",
    bandwidth: float = 0.2,
    seed: int = 0,
    where: Where = None,
    device: str = "cpu",
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Generate models around known ones in the latents of a weight autoencoder; they become a zoo.

    Latents are drawn from a Gaussian kernel density of the training models that --where chooses, the prompts.
    samples.csv has the accuracy of each sample and its distance to the nearest of them.

    Args:
        zoo: Folder, dataset id, or `sample`.
        autoencoder: Folder of the autoencoder, as `vitzoo encode --train` leaves it.
        out: Folder for the zoo of samples and the table.
        count: Models a round.
        rounds: More than one bootstraps: the models kept are the prompts of the next round.
        fine_tune: Epochs to train those kept on, on the training images of the zoo's blueprint.
        mode: A model's tokens around one prompt; each token around its own; each number around its own.
        bandwidth: Standard deviation of the kernel, in deviations of a latent number over the prompts.
        seed: Of the draw.
        device: cpu or cuda.
    """
    from vitzoo_hf.apply.autoencoder.fine_tuning import FineTuning
    from vitzoo_hf.apply.autoencoder.sampled_rows import Sampling, write_samples
    from vitzoo_hf.apply.autoencoder.trained import load_autoencoder

    if keep < 0:
        raise ZooError(f"--keep {keep}: expected a number of models, or 0 for all")
    if fine_tune < 0:
        raise ZooError(f"--fine-tune {fine_tune}: expected a number of epochs, or 0 for none")
    tuning = FineTuning(fine_tune, seed=seed) if fine_tune else None
    trained = load_autoencoder(autoencoder, device=device)
    how = Sampling(count, min(keep, count) or None, rounds, mode, bandwidth, seed)
    found = write_samples(open_zoo(zoo, where), trained, out, how, tuning=tuning, device=device)
    found.table.to_csv(out / "samples.csv", index=False)
    facts = {"diversity": found.diversity, "prompts_nearest_distance": found.anchors_nearest_distance}
    facts |= {"prompts_median_test_accuracy": found.anchors_test_accuracy}
    known = {name: value if value == value else None for name, value in facts.items()}
    if json:
        print_json({"zoo": str(out), "table": table_records(found.table)} | known)
        return
    print_table(table_records(found.table))
    print_table([known])
    print(f"{len(found.table)} samples in {out}; a nearest_distance near 0 is a copy of a prompt")
    if not quiet:
        hint(f"Next: vitzoo evaluate {quote(str(out))}")
