"""The verb that trains an autoencoder of weights, and encodes models with it."""

from pathlib import Path
from shlex import quote
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from vitzoo_hf.console import hint, print_json
from vitzoo_hf.options import Json, Quiet, Where, open_zoo
from vitzoo_hf.schema import ZooError

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
