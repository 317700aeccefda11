"""The verb that decodes models with an autoencoder of weights."""

from pathlib import Path
from shlex import quote

from vitzoo_hf.console import hint, print_json, print_table
from vitzoo_hf.options import Json, Quiet, Where, open_zoo, table_records


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
