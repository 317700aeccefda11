"""The verb that aligns models by the symmetries of their architecture, and says what that does to barriers."""

from pathlib import Path
from shlex import quote
from typing import Annotated, Any

from cyclopts import Parameter

from vitzoo_hf.cli.options import (
    Json,
    Quiet,
    Where,
    check_least,
    hint,
    open_zoo,
    print_json,
    print_table,
    table_records,
)
from vitzoo_hf.format.schema import ZooError

Families = Annotated[
    str,
    Parameter(
        help="Symmetries to use, joined by commas, or all of them: mlp, heads, maps, residual, invertible, rotation."
    ),
]
MEASURES = ("barrier", "accuracy_barrier", "midpoint_accuracy", "mode_connectivity")
SHOWN = ("families", "by", *MEASURES, "distance_unaligned", "distance")


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
    """Align models by symmetries that leave their functions as they are; barriers before and after.

    With MODEL_A and MODEL_B: B is aligned to A; --out writes it. With MODEL_A alone: every other row that --where
    chooses is aligned to it, and --out is the folder of the new zoo. With --pairs instead: pairs of the final models
    that --where chooses are measured, and --out is a CSV file.

    Args:
        zoo: Folder, dataset id, or `sample`.
        model_a: The model to align to.
        model_b: The model to be aligned.
        by: weights, activations (on selection images), or both: by weights from where activations lead.
        out: B as a .safetensors file, or a folder for a zoo of A and B; see above.
        pairs: How many pairs to draw.
        kind: Of pairs: any, across parents, or within one parent.
        ladder: Measure each family with all before it, by each way, instead of --families and --by.
        points: Points on the straight path.
        images: Test images to measure on, at most.
        restarts: Further descents by weights from random starts.
        seed: Of pairs, images, orders and starts.
        device: cpu or cuda.
    """
    _check_numbers(points, images, restarts, seed, pairs, device)
    opened = open_zoo(zoo, where)
    shared: dict[str, Any] = {"restarts": restarts, "seed": seed, "device": device, "progress": not (json or quiet)}
    measured = {**shared, "points": points, "num_images": images}
    if pairs is not None:
        if model_a is not None or out is None or out.suffix != ".csv":
            raise ZooError("--pairs draws models itself and writes a table: give no model, and --out FILE.csv")
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
        ("--points", points, 3),
        ("--images", images, 1),
        ("--restarts", restarts, 0),
        ("--seed", seed, 0),
        ("--pairs", 1 if pairs is None else pairs, 1),
    ):
        check_least(option, value, least)
    usable_device(device)


def _check_pair_out(out: Path, opened: Any, variants: Any) -> None:
    """Refuse, before anything is computed, what an aligned model cannot be written to."""
    from vitzoo_hf.apply.made_zoos import check_file, check_folder

    if len(variants) > 1:
        raise ZooError("--ladder measures many alignments: leave it out to write one with --out")
    if out.suffix == ".safetensors":
        check_file(out)
    elif out.suffix:
        raise ZooError(
            f"--out {out}: two models are written as FILE.safetensors, or as FOLDER, a zoo of both, whose name has no"
            " suffix; --pairs N writes a table"
        )
    else:
        check_folder(out, opened, "rebasin_of")


def _hint_after_pair(zoo: str, model_b: str, out: Path | None) -> None:
    if out is None:
        hint(f"Next: the same with --out {quote(model_b)}.safetensors, or --out FOLDER for a zoo of both")
    elif out.suffix == ".safetensors":
        hint(f"Next: vitzoo rebasin {quote(zoo)} --pairs 10 --out pairs.csv")
    else:
        hint(f"Next: vitzoo evaluate {quote(str(out))}")


def _variants(families: str, by: str, *, ladder: bool) -> Any:
    from vitzoo_hf.apply.rebasin.barriers import LADDER, Variant
    from vitzoo_hf.apply.rebasin.rebasin import check_way
    from vitzoo_hf.apply.rebasin.symmetries import FAMILIES, check_families

    check_way(by)
    if ladder:
        return LADDER
    return [Variant(check_families(FAMILIES if families == "all" else families.split(",")), by)]


def _align_pair(
    opened: Any, ids: tuple[str, str], variants: Any, out: Path | None, options: dict[str, Any], *, json: bool
) -> None:
    """Measure, and write the aligned model where it is asked for."""
    from vitzoo_hf.apply.rebasin.barriers import pair_barriers

    if out is not None:
        _check_pair_out(out, opened, variants)
    table = pair_barriers(opened, [ids], variants, **options)
    if out is not None:
        _write(opened, ids, variants[0], out, options)
    if json:
        print_json(table_records(table) if out is None else {"out": str(out), "table": table_records(table)})
        return
    print_table(table_records(table[list(SHOWN)]))
    print(f"barriers of test loss (nats) and accuracy between {ids[0]} and {ids[1]} on {table['dataset'][0]}")
    if out is not None:
        print(f"{ids[1]}, aligned, is in {out}; no logit changed by more than {table['logit_change'].max():.1e}")


def _write(opened: Any, ids: tuple[str, str], variant: Any, out: Path, options: dict[str, Any]) -> None:
    from vitzoo_hf.apply.rebasin.rebasin import matching_images
    from vitzoo_hf.apply.rebasin.rows import aligned_row, rebasin_zoo
    from vitzoo_hf.convert.export import export_row

    chosen = {name: options[name] for name in ("restarts", "seed", "device")}
    chosen |= {"families": variant.families, "by": variant.by}
    if out.suffix != ".safetensors":
        rebasin_zoo(opened.filter(model_id=list(ids)), ids[0], out, progress=options["progress"], **chosen)
        return
    target, row = opened.row(ids[0]), opened.row(ids[1])
    images = matching_images(opened, target["dataset"], chosen["seed"]) if variant.by != "weights" else None
    export_row(aligned_row(target, row, images=images, **chosen), out)


def _align_all(
    opened: Any,
    model_a: str,
    families: str,
    by: str,
    out: Path | None,
    options: dict[str, Any],
    *,
    json: bool,
    quiet: bool,
) -> None:
    from vitzoo_hf.apply.rebasin.rows import rebasin_zoo

    if out is None or out.suffix:
        raise ZooError(f"{model_a} alone aligns every other model to it: give --out FOLDER for the new zoo")
    (variant,) = _variants(families, by, ladder=False)
    rebasin_zoo(opened, model_a, out, families=variant.families, by=by, **options)
    if json:
        print_json({"zoo": str(out), "rows": len(opened), "reference": model_a, "families": list(variant.families)})
        return
    print(f"{len(opened)} rows in {out}, aligned to {model_a} over {', '.join(variant.families)} by {by}")
    if not quiet:
        hint(f"Next: vitzoo evaluate {quote(str(out))}")


def _measure_pairs(
    opened: Any, variants: Any, out: Path, count: int, kind: str, options: dict[str, Any], *, json: bool
) -> None:
    from vitzoo_hf.apply.made_zoos import check_file
    from vitzoo_hf.apply.rebasin.barriers import pair_barriers, sample_pairs, summary

    check_file(out)
    chosen = sample_pairs(opened.filter(is_final=True).to_pandas(), count, seed=options["seed"], kind=kind)
    table = pair_barriers(opened, chosen, variants, **options)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        table.to_csv(out, index=False)
    except OSError as error:
        raise ZooError(f"cannot write {out}: {error.strerror}") from None
    medians = summary(table, seed=options["seed"])
    if json:
        print_json({"out": str(out), "pairs": len(chosen), "summary": table_records(medians)})
        return
    shown = ["families", "by", "barrier", "barrier_low", "barrier_high", "lower", "midpoint_accuracy"]
    print_table(table_records(medians[shown]))
    print(f"medians over {len(chosen)} pairs, bootstrap intervals of 95 %; every pair is in {out}")
