"""The card of an attack: what was guessed from what, how well, how sure that is, and what it may be used for."""

from typing import Any

from vitzoo_hf.apply.distribution_inference.zoo_attacks import Report
from vitzoo_hf.card import template
from vitzoo_hf.row_tables import records

TEMPLATE = "attack_card.md.jinja"


def attack_card(report: Report) -> str:
    """The card as Markdown.

    Raises:
        ZooError: if the template is missing from the installation.
    """
    from jinja2 import Environment, StrictUndefined

    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False)
    rows = [_shown(row) for row in records(report.table)]
    filled = environment.from_string(template(TEMPLATE)).render(rows=rows, **report.facts)
    return filled.rstrip("\n") + "\n"


def _shown(row: dict[str, Any]) -> dict[str, str]:
    interval = f"{row['value']:.3f} ({row['low']:.3f} to {row['high']:.3f})"
    found = {name: _number(row[name]) for name in ("auc", "advantage", "n_leaked", "shadow_value")}
    attack = row["attack"] + (" (chosen on shadows)" if row["chosen"] else "")
    return found | {"attack": attack, "access": row["access"], "seeds": str(row["seeds"]), "value": interval}


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}" if value != float("inf") else "∞"
