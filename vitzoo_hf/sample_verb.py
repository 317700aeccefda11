"""The verb that generates models with an autoencoder of weights."""

from pathlib import Path
from shlex import quote
from typing import Annotated, Literal

from cyclopts import Parameter

from vitzoo_hf.console import hint, print_json, print_table
from vitzoo_hf.options import Json, Quiet, Where, open_zoo, table_records
from vitzoo_hf.schema import ZooError

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
