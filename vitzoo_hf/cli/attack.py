"""The verb that audits what models tell about the distribution they were trained on."""

from pathlib import Path
from typing import Annotated, Any, Literal

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
    table_records,
)
from vitzoo_hf.format.atomic import make_folder
from vitzoo_hf.format.schema import ZooError

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
    """Guess a property of the training distribution of targets, from shadows whose property is known.

    For auditing models of one's own. Columns say each model's secret, and whether it is a target or a shadow.

    Args:
        zoo: Folder, dataset id, or `sample`.
        secret: Column of the property, such as label_ratio; two values are classes, more numbers are a number,
            columns with commas between them several numbers.
        shadows: A zoo whose shadows are used instead, such as of another architecture; without access to weights;
            --where chooses among them too.
        role: Column that says target or shadow.
        access: What is seen of models; weights come with probabilities.
        attacks: loss_test, threshold_test, per_point_threshold_test, kl_test, calibrated_kl_test, meta_classifier,
            ridge_on_outputs, head, components, statistics, set_encoder, log_odds, flat_mlp; by default all that fit
            but the last two.
        queries: Selection images that models are asked about.
        seeds: Repetitions of attacks with randomness.
        shuffled: A control: secrets of shadows are shuffled, 20 times; every attack should then be at chance level.
        unequal: Go on although models differ in more than their secret; the card says so.
        out: Folder for attacks.csv, guesses.csv and attack_card.md.
        cache: Folder that keeps outputs; by default `.evaluation` in the folder of --out.
        device: cpu or cuda.
    """
    from vitzoo_hf.apply.distribution_inference.zoo_attacks import attack_zoo

    _check(queries, seeds, out)
    names = [name for given in attacks or () for name in names_of("--attack", given, "kl_test,ridge_on_outputs")]
    options: dict[str, Any] = {"role": role, "access": access, "attacks": names, "num_queries": queries}
    options |= {"seeds": seeds, "shuffled": shuffled, "unequal": unequal, "seed": seed, "device": device}
    options |= {"shadows": shadows and open_zoo(shadows, where), "cache": cache or (out and out / CACHE)}
    report = attack_zoo(open_zoo(zoo, where), secret, progress=not (json or quiet), **options)
    if out is not None:
        _write(report, out)
    if json:
        print_json({"facts": dict(report.facts), "attacks": table_records(report.table)})
        return
    print_table(table_records(report.table[list(SHOWN)]))
    for name, told in report.facts["guards"].items():
        print(f"{name}: {told}")
    if not quiet:
        hint("Next: the same with --out FOLDER for a card" if out is None else f"Next: read {out / 'attack_card.md'}")


def _check(queries: int, seeds: int, out: Path | None) -> None:
    check_least("--queries", queries, 1)
    check_least("--seeds", seeds, 1)
    if out is not None and (out / "zoo.json").exists():
        raise ZooError(f"{out} is a zoo, which attacks never write into: give --out another folder")
    if out is not None:
        make_folder(out)


def _write(report: Any, out: Path) -> None:
    from vitzoo_hf.apply.distribution_inference.zoo_attacks import attack_card

    try:
        report.table.to_csv(out / "attacks.csv", index=False)
        report.guesses.to_csv(out / "guesses.csv", index=False)
        (out / "attack_card.md").write_text(attack_card(report), encoding="utf-8")
    except OSError as error:
        raise ZooError(f"cannot write into {out}: {error.strerror}") from None
