"""The verb `attack`: audit how much models reveal about the distribution of their training images."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from vitzoo_hf.cli.options import (
    Json,
    Quiet,
    Where,
    check_least,
    hint,
    names_of,
    open_zoo,
    print_json,
    print_table,
    writing_into,
)
from vitzoo_hf.format.atomic import make_folder
from vitzoo_hf.format.schema import ZooError

if TYPE_CHECKING:
    from vitzoo_hf.apply.distribution_inference.zoo_attacks import Report

CACHE = ".evaluation"
SHOWN = ("attack", "access", "metric", "value", "low", "high", "advantage", "n_leaked", "shadow_value", "chosen")
Attacks = Annotated[list[str] | None, Parameter(name="--attack", negative=(), consume_multiple=True)]


def attack(
    zoo: str,
    *,
    secret: str,
    shadows: str | None = None,
    role: str = "role",
    access: Literal["weights", "probabilities", "labels"] = "weights",
    attacks: Attacks = None,
    queries: int = 512,
    seeds: int = 5,
    shuffled: bool = False,
    unequal: bool = False,
    seed: int = 0,
    where: Where = None,
    out: Path | None = None,
    cache: Path | None = None,
    device: str = "cpu",
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Infer a property of the training distribution of target models, from shadow models whose property is known.

    Use it to audit your own models. One column holds the secret of a model, another says target or shadow.

    Args:
        zoo: Folder, dataset id, or `sample`.
        secret: Column of the property: two values are classified, more numbers regressed; A,B regresses several.
        shadows: Zoo of other shadow models, selected by --where too; not possible with --access weights.
        role: Column that says whether a model is a target or a shadow.
        access: What the attacker observes of a target. With weights the attacker sees probabilities too.
        attacks: loss_test, threshold_test, per_point_threshold_test, kl_test, calibrated_kl_test, meta_classifier,
            ridge_on_outputs, head, components, statistics, set_encoder (by default), log_odds, flat_mlp.
        queries: Number of selection images on which the attacker queries each model.
        seeds: Number of repetitions of an attack that uses randomness.
        shuffled: Run a control: shuffle the secrets of the shadows 20 times. Attacks should be at chance level.
        unequal: Continue although models differ in more than their secret. The card reports the differences.
        seed: Seed that selects the query images.
        out: Folder for attacks.csv, guesses.csv and attack_card.md.
        cache: Folder in which outputs of models are kept; by default `.evaluation` in the folder of --out.
        device: cpu or cuda.
    """
    from vitzoo_hf.apply.distribution_inference.zoo_attacks import attack_zoo

    _check(queries, seeds, out)
    report = attack_zoo(
        open_zoo(zoo, where),
        secret,
        shadows=None if shadows is None else open_zoo(shadows, where),
        role=role,
        access=access,
        attacks=_names(attacks),
        num_queries=queries,
        seeds=seeds,
        shuffled=shuffled,
        unequal=unequal,
        seed=seed,
        cache=cache or (out and out / CACHE),  # without --out, outputs are not stored
        device=device,
        progress=not (json or quiet),
    )
    _finish(report, out, json=json, quiet=quiet)


def _finish(report: "Report", out: Path | None, *, json: bool, quiet: bool) -> None:
    if out is not None:
        _write(report, out)
    if json:
        print_json({"facts": dict(report.facts), "attacks": report.table})
        return
    print_table(report.table[list(SHOWN)])
    for guard, verdict in report.facts["guards"].items():
        print(f"{guard}: {verdict}")
    if not quiet:
        hint("Next: the same with --out FOLDER for a card" if out is None else f"Next: read {out / 'attack_card.md'}")


def _names(attacks: list[str] | None) -> list[str]:
    return [name for text in attacks or () for name in names_of("--attack", text, "kl_test,ridge_on_outputs")]


def _check(queries: int, seeds: int, out: Path | None) -> None:
    check_least("--queries", queries, 1)
    check_least("--seeds", seeds, 1)
    # attacks.csv in a zoo would not be listed by its manifest
    if out is not None and (out / "zoo.json").exists():
        raise ZooError(f"--out {out} is a zoo, and attacks never write into a zoo: give another folder")
    if out is not None:
        make_folder(out)


def _write(report: "Report", out: Path) -> None:
    from vitzoo_hf.apply.distribution_inference.zoo_attacks import attack_card

    with writing_into(out):
        report.table.to_csv(out / "attacks.csv", index=False)
        report.guesses.to_csv(out / "guesses.csv", index=False)
        (out / "attack_card.md").write_text(attack_card(report), encoding="utf-8")
