"""The verb `rebasin`: align models by the symmetries of their architecture, and measure barriers before and after."""

from collections.abc import Sequence
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, TypedDict

from cyclopts import Parameter

from vitzoo_hf.cli.options import Json, Quiet, Where, check_least, hint, open_zoo, print_json, print_table
from vitzoo_hf.format.schema import ZooError

if TYPE_CHECKING:
    from vitzoo_hf.apply.rebasin.barriers import Variant
    from vitzoo_hf.zoo.zoo import Zoo

Families = Annotated[
    str,
    Parameter(
        help="Symmetries to use, joined by commas, or all of them: mlp, heads, maps, residual, invertible, rotation."
    ),
]
MEASURES = ("barrier", "accuracy_barrier", "midpoint_accuracy", "mode_connectivity")
SHOWN = ("families", "by", *MEASURES, "distance_unaligned", "distance")


class _Options(TypedDict):
    """Keyword arguments that alignments and barriers share."""

    restarts: int
    seed: int
    device: str
    progress: bool


class _Measured(_Options):
    """Keyword arguments of `pair_barriers`."""

    points: int
    num_images: int


def rebasin(
    zoo: str,
    model_a: str | None = None,
    model_b: str | None = None,
    *,
    families: Families = "all",
    by: str = "both",
    out: Path | None = None,
    where: Where = None,
    pairs: int | None = None,
    kind: str = "any",
    ladder: bool = False,
    points: int = 11,
    images: int = 2000,
    restarts: int = 0,
    seed: int = 0,
    device: str = "cpu",
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Align models by symmetries that do not change their functions, and measure barriers before and after.

    With MODEL_A and MODEL_B, B is aligned to A, and --out writes the aligned model. With MODEL_A alone, every other
    row that --where selects is aligned to A, and --out is the folder of the new zoo. With --pairs N, pairs of the
    final models that --where selects are drawn and measured, and --out is a CSV file.

    Args:
        zoo: Folder, dataset id, or `sample`.
        model_a: Model to which others are aligned.
        model_b: Model that is aligned.
        by: weights, activations (on selection images), or both (by activations first, then by weights).
        out: File or folder for the result. With two models: a .safetensors file for B, or a folder for a zoo of both.
        pairs: Number of pairs to draw.
        kind: Kind of pairs: any, across parents, or within one parent.
        ladder: Instead of --families and --by: measure growing sets of families, by weights, activations and both.
        points: Number of points on the straight path between two models.
        images: Largest number of test images to measure on.
        restarts: Number of further descents by weights from random starts.
        seed: Seed of pairs, images, orders and random starts.
        device: cpu or cuda.
    """
    _check_numbers(points, images, restarts, seed, pairs, device)
    opened = open_zoo(zoo, where)
    shared = _Options(restarts=restarts, seed=seed, device=device, progress=not (json or quiet))
    measured = _Measured(**shared, points=points, num_images=images)
    if pairs is not None:
        if model_a is not None or out is None or out.suffix != ".csv":
            raise ZooError("--pairs draws the models itself and writes a table: give no model, and --out FILE.csv")
        variants = _variants(families, by, ladder=ladder)
        _measure_pairs(opened, variants, out, pairs, kind, measured, json=json)
    elif model_a is None:
        raise ZooError(
            "which models? Give MODEL_A and MODEL_B, MODEL_A and --out FOLDER, or --pairs N --out FILE.csv"
        )
    elif model_b is None:
        _align_all(opened, model_a, families, by, out, shared, json=json, quiet=quiet)
    else:
        variants = _variants(families, by, ladder=ladder)
        _align_pair(opened, (model_a, model_b), variants, out, measured, json=json)
        if not (json or quiet):
            _hint_after_pair(zoo, model_b, out)


def _check_numbers(points: int, images: int, restarts: int, seed: int, pairs: int | None, device: str) -> None:
    from vitzoo_hf.models.rebuild import usable_device

    for option, value, least in (
        # both ends and a point between them: two points have no barrier
        ("--points", points, 3),
        ("--images", images, 1),
        ("--restarts", restarts, 0),
        ("--seed", seed, 0),
        ("--pairs", 1 if pairs is None else pairs, 1),
    ):
        check_least(option, value, least)
    # before any model is loaded
    usable_device(device)


def _check_pair_out(out: Path, opened: "Zoo", variants: "Sequence[Variant]") -> None:
    """Refuse an unusable --out before anything is computed."""
    from vitzoo_hf.apply.made_zoos import check_file, check_folder

    if len(variants) > 1:
        raise ZooError("--ladder measures many alignments and --out writes one: leave out one of the two options")
    if out.suffix == ".safetensors":
        check_file(out)
    elif out.suffix:
        raise ZooError(
            f"--out {out}: expected FILE.safetensors for the aligned model, or a FOLDER without a suffix for a zoo of"
            " both models; a table is written with --pairs N"
        )
    else:
        check_folder(out, opened, "rebasin_of")


def _hint_after_pair(zoo: str, model_b: str, out: Path | None) -> None:
    if out is None:
        hint(f"Next: add --out {quote(model_b)}.safetensors, or --out FOLDER for a zoo of both models")
    elif out.suffix == ".safetensors":
        hint(f"Next: vitzoo rebasin {quote(zoo)} --pairs 10 --out pairs.csv")
    else:
        hint(f"Next: vitzoo evaluate {quote(str(out))}")


def _variants(families: str, by: str, *, ladder: bool) -> "Sequence[Variant]":
    from vitzoo_hf.apply.rebasin.barriers import LADDER, Variant
    from vitzoo_hf.apply.rebasin.rebasin import check_way
    from vitzoo_hf.apply.rebasin.symmetries import FAMILIES, check_families

    check_way(by)
    if ladder:
        return LADDER
    return [Variant(check_families(FAMILIES if families == "all" else families.split(",")), by)]


def _align_pair(
    opened: "Zoo",
    ids: tuple[str, str],
    variants: "Sequence[Variant]",
    out: Path | None,
    options: _Measured,
    *,
    json: bool,
) -> None:
    """Measure a pair, and write the aligned model with --out."""
    from vitzoo_hf.apply.rebasin.barriers import pair_barriers

    if out is not None:
        # before the measurement, which takes much longer than the check
        _check_pair_out(out, opened, variants)
    table = pair_barriers(opened, [ids], variants, **options)
    if out is not None:
        _write(opened, ids, variants[0], out, options)
    if json:
        print_json(table if out is None else {"out": str(out), "table": table})
        return
    print_table(table[list(SHOWN)])
    print(f"barriers of test loss (nats) and accuracy between {ids[0]} and {ids[1]} on {table['dataset'][0]}")
    if out is not None:
        print(f"{ids[1]}, aligned, is in {out}; no logit changed by more than {table['logit_change'].max():.1e}")


def _write(opened: "Zoo", ids: tuple[str, str], variant: "Variant", out: Path, options: _Options) -> None:
    from vitzoo_hf.apply.rebasin.rebasin import matching_images
    from vitzoo_hf.apply.rebasin.rows import aligned_row, rebasin_zoo
    from vitzoo_hf.convert.export import export_row

    families, by = variant.families, variant.by
    restarts, seed, device = options["restarts"], options["seed"], options["device"]
    # a folder becomes a zoo of both models, a file holds B alone
    if out.suffix != ".safetensors":
        rebasin_zoo(
            opened.filter(model_id=list(ids)),
            ids[0],
            out,
            families=families,
            by=by,
            restarts=restarts,
            seed=seed,
            device=device,
            progress=options["progress"],
        )
        return
    target, row = opened.row(ids[0]), opened.row(ids[1])
    # weights are matched without images, so none are loaded
    images = matching_images(opened, target["dataset"], seed) if by != "weights" else None
    aligned = aligned_row(
        target, row, images=images, families=families, by=by, restarts=restarts, seed=seed, device=device
    )
    export_row(aligned, out)


def _align_all(
    opened: "Zoo",
    model_a: str,
    families: str,
    by: str,
    out: Path | None,
    options: _Options,
    *,
    json: bool,
    quiet: bool,
) -> None:
    from vitzoo_hf.apply.rebasin.rows import rebasin_zoo

    if out is None or out.suffix:
        raise ZooError(f"every other model is aligned to {model_a}: give --out FOLDER for the new zoo, or MODEL_B")
    # a ladder would give several zoos, and --out names one
    (variant,) = _variants(families, by, ladder=False)
    rebasin_zoo(opened, model_a, out, families=variant.families, by=by, **options)
    if json:
        print_json({"zoo": str(out), "rows": len(opened), "reference": model_a, "families": list(variant.families)})
        return
    print(f"{len(opened)} rows in {out}, aligned to {model_a} over {', '.join(variant.families)} by {by}")
    if not quiet:
        hint(f"Next: vitzoo evaluate {quote(str(out))}")


def _measure_pairs(
    opened: "Zoo",
    variants: "Sequence[Variant]",
    out: Path,
    count: int,
    kind: str,
    options: _Measured,
    *,
    json: bool,
) -> None:
    from vitzoo_hf.apply.made_zoos import check_file
    from vitzoo_hf.apply.rebasin.barriers import pair_barriers, sample_pairs, summary

    check_file(out)
    # final models only, so that no pair is two epochs of one run
    pairs = sample_pairs(opened.filter(is_final=True).to_pandas(), count, seed=options["seed"], kind=kind)
    table = pair_barriers(opened, pairs, variants, **options)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        table.to_csv(out, index=False)
    except OSError as error:
        raise ZooError(f"cannot write {out}: {error.strerror}") from None
    medians = summary(table, seed=options["seed"])
    if json:
        print_json({"out": str(out), "pairs": len(pairs), "summary": medians})
        return
    print_table(medians[["families", "by", "barrier", "barrier_low", "barrier_high", "lower", "midpoint_accuracy"]])
    print(f"medians over {len(pairs)} pairs, bootstrap intervals of 95 %; every pair is in {out}")
