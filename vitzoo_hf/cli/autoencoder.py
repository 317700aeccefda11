"""The verbs of the weight autoencoder: train it and `encode` models, `decode` latents, `sample` new models."""

from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from vitzoo_hf.cli.options import Json, Quiet, Where, hint, open_zoo, print_json, print_table
from vitzoo_hf.format.schema import ZooError

if TYPE_CHECKING:
    from vitzoo_hf.zoo.zoo import Zoo

Train = Annotated[
    str | None,
    Parameter(
        help="Train the autoencoder first by this recipe: a YAML file, or default. An interrupted training continues."
    ),
]
Pool = Literal["mean", "layers"]
Arm = Annotated[str | None, Parameter(help="Loss of the training, with --train: S, B, S+B, C+S, C+B or C+S+B.")]


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
    """Encode models with a weight autoencoder: one embedding per model, as features for `vitzoo properties`.

    With --train, the autoencoder is first trained on the selected models of the train split. They must share one
    layout and one dataset.

    Args:
        zoo: Folder, dataset id, or `sample`.
        autoencoder: Folder of the autoencoder.
        out: File for the table of embeddings, .csv or .parquet; by default AUTOENCODER/embeddings.csv.
        pool: How latent tokens become an embedding: mean takes the mean over all tokens; layers takes the mean and
            the standard deviation over the tokens of each layer.
        latents: File, .safetensors, into which all latents are written too, for `vitzoo decode --latents`.
        device: cpu or cuda.
    """
    from vitzoo_hf.apply.autoencoder.rows import encode_rows, write_latents
    from vitzoo_hf.apply.autoencoder.trained import load_autoencoder
    from vitzoo_hf.progress import progress_bar

    table = out if out is not None else autoencoder / "embeddings.csv"
    if table.suffix not in (".csv", ".parquet"):
        raise ZooError(f"--out {table}: expected a name that ends in .csv or .parquet")
    if arm is not None and train is None:
        raise ZooError("--arm selects the loss of a training: give --train too, or leave --arm out")
    # writing latents there would overwrite the trained weights
    if latents is not None and latents.resolve() == (autoencoder / "autoencoder.safetensors").resolve():
        raise ZooError(f"--latents {latents} is the file of the autoencoder: give another file")
    table.parent.mkdir(parents=True, exist_ok=True)
    opened, shown = open_zoo(zoo, where), not (json or quiet)
    if train is not None:
        _train(opened, train, arm, autoencoder, device, shown=shown)
    trained = load_autoencoder(autoencoder, device=device)
    with progress_bar("encoding", "model", shown=shown, total=len(opened)) as bar:
        encoded = encode_rows(opened, trained, pool=pool, latents=latents is not None, on_models=bar.update)
    write = encoded.embeddings.to_csv if table.suffix == ".csv" else encoded.embeddings.to_parquet
    write(table, index=False)
    if latents is not None:
        write_latents(encoded.latents, trained, latents)
    numbers = encoded.embeddings.shape[1] - 1  # one column is `model_id`
    if json:
        files = {"embeddings": str(table), "latents": None if latents is None else str(latents)}
        print_json(files | {"models": len(opened), "numbers": numbers, "steps": trained.step})
        return
    print(f"{len(opened)} models as {numbers} numbers each in {table}")
    if trained.step < trained.recipe.steps:
        print(f"the autoencoder has made {trained.step} of {trained.recipe.steps} steps: --train continues it")
    if not quiet:
        hint(f"Next: vitzoo properties {quote(zoo)} --embedding {quote(str(table))}")


def _train(zoo: "Zoo", recipe_name: str, arm: str | None, folder: Path, device: str, *, shown: bool) -> None:
    from vitzoo_hf.apply.autoencoder.recipe import AutoencoderRecipe
    from vitzoo_hf.apply.autoencoder.training import train_autoencoder
    from vitzoo_hf.progress import progress_bar

    recipe = AutoencoderRecipe() if recipe_name == "default" else AutoencoderRecipe.load(recipe_name)
    if arm is not None:
        recipe = recipe.arm(arm)
    with progress_bar("training", "step", shown=shown, total=recipe.steps) as bar:

        def tell(step: int, losses: dict[str, float]) -> None:
            if bar.n == 0 and step > 1:  # a continued training: steps of the first part must not count as speed
                bar.initial = step - 1
                bar.n = step - 1
            bar.set_postfix(loss=f"{losses['loss']:.4g}", refresh=False)
            bar.update(step - bar.n)

        train_autoencoder(zoo, recipe, folder, device=device, on_step=tell)


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
    """Reconstruct models with a weight autoencoder, and write the reconstructions as a zoo.

    Every reconstruction is a row with the factors of its original, and its provenance names the original.
    reconstructions.csv lists how close a reconstruction is to its original, and its accuracy on test images.

    Args:
        zoo: Folder, dataset id, or `sample`.
        autoencoder: Folder of the autoencoder, as `vitzoo encode --train` leaves it.
        out: Folder for the zoo of reconstructions and the table.
        latents: File of `vitzoo encode --latents`, possibly edited. Its latents are decoded instead of the latents
            of the rows.
        device: cpu or cuda.
    """
    from vitzoo_hf.apply.autoencoder.rows import read_latents, write_reconstructions
    from vitzoo_hf.apply.autoencoder.trained import load_autoencoder
    from vitzoo_hf.progress import progress_bar

    trained = load_autoencoder(autoencoder, device=device)
    opened = open_zoo(zoo, where)
    # None encodes the rows themselves
    codes = None if latents is None else read_latents(latents, trained)
    total = len(opened) if codes is None else len(codes)
    with progress_bar("decoding", "model", shown=not (json or quiet), total=total) as bar:
        table = write_reconstructions(opened, trained, out, latents=codes, device=device, on_models=bar.update)
    table.to_csv(out / "reconstructions.csv", index=False)
    if json:
        print_json({"zoo": str(out), "table": table})
        return
    # a column of None has type object; as float it is NaN
    means = table[["r2_beyond_mean", "test_accuracy", "test_accuracy_original"]].astype(float).mean()
    print_table([{"models": len(table)} | {f"mean {name}": float(value) for name, value in means.items()}])
    print(
        f"{len(table)} reconstructions in {out}; read r2_beyond_mean beside the accuracy: a decoder that always"
        " returns one good model has a high accuracy too"
    )
    if not quiet:
        hint(f"Next: vitzoo evaluate {quote(str(out))}")


Mode = Literal["joint", "token", "number"]
Keep = Annotated[
    int,
    Parameter(help="Number of samples to keep, best on selection images first, at most COUNT; 0 keeps every sample."),
]


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
    """Generate models around known ones in the latent space of a weight autoencoder, and write them as a zoo.

    The prompts are the training models that --where selects. Latents are drawn from a Gaussian kernel density
    estimate of the prompts. samples.csv lists the accuracy of every sample and the distance to its nearest prompt.

    Args:
        zoo: Folder, dataset id, or `sample`.
        autoencoder: Folder of the autoencoder, as `vitzoo encode --train` leaves it.
        out: Folder for the zoo of samples and the table.
        count: Number of models generated in a round.
        rounds: Number of rounds. The models kept in a round are the prompts of the next round (bootstrapping).
        fine_tune: Number of epochs to train the kept models, on the training images of the zoo's blueprint.
        mode: What is drawn around one prompt: joint draws all tokens of a model around the same prompt, token draws
            every token around a prompt of its own, number every latent number.
        bandwidth: Standard deviation of the kernel, in standard deviations of a latent number over the prompts.
        seed: Seed of the draw.
        device: cpu or cuda.
    """
    from vitzoo_hf.apply.autoencoder.fine_tuning import FineTuning
    from vitzoo_hf.apply.autoencoder.sampled_rows import Sampling, write_samples
    from vitzoo_hf.apply.autoencoder.trained import load_autoencoder

    if keep < 0:
        raise ZooError(f"--keep {keep}: expected a number of models of at least 1, or 0 for all")
    if fine_tune < 0:
        raise ZooError(f"--fine-tune {fine_tune}: expected a number of epochs of at least 1, or 0 for none")
    tuning = FineTuning(fine_tune, seed=seed) if fine_tune else None
    trained = load_autoencoder(autoencoder, device=device)
    # --keep 0 keeps every sample, which `Sampling` calls None
    sampling = Sampling(count, min(keep, count) or None, rounds, mode, bandwidth, seed)
    samples = write_samples(open_zoo(zoo, where), trained, out, sampling, tuning=tuning, device=device)
    samples.table.to_csv(out / "samples.csv", index=False)
    facts = {"diversity": samples.diversity, "prompts_nearest_distance": samples.anchors_nearest_distance}
    facts |= {"prompts_median_test_accuracy": samples.anchors_test_accuracy}
    facts_or_none = {name: value if value == value else None for name, value in facts.items()}  # JSON has no NaN
    if json:
        print_json({"zoo": str(out), "table": samples.table} | facts_or_none)
        return
    print_table(samples.table)
    print_table([facts_or_none])
    print(f"{len(samples.table)} samples in {out}; a nearest_distance near 0 means a copy of a prompt")
    if not quiet:
        hint(f"Next: vitzoo evaluate {quote(str(out))}")
