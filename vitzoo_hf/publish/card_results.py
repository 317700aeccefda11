"""Results of a zoo -> the tables of its card: accuracy, what was measured again, pairs of models."""

from collections.abc import Iterable, Mapping
from statistics import fmean
from typing import Any

from vitzoo_hf.format import schema
from vitzoo_hf.publish.card_facts import Facts, value_counts
from vitzoo_hf.publish.markdown import bar, block, code, number, shown, table

MOST_VALUES = 12
BINS = 10
MEASURES = ["models", "mean", "lowest", "highest"]


def accuracy(facts: Facts, manifest: Mapping[str, Any]) -> dict[str, str] | None:
    """Test accuracy of the last row of each run: over all, by factor, and as a distribution; None without any."""
    rows = facts.accuracies
    if not rows:
        return None
    lines = [["all", "all", *measures(row["test_accuracy"] for row in rows)]]
    for factor in manifest["factors"]:
        values = [value for value, _ in value_counts(rows, f"factor_{factor}")]
        if 1 < len(values) <= MOST_VALUES:
            for value in values:
                chosen = (row["test_accuracy"] for row in rows if row[f"factor_{factor}"] == value)
                lines.append([code(f"factor_{factor}"), shown(value), *measures(chosen)])
    return {
        "dataset": code(rows[0]["dataset"]),
        "models": number(len(rows)),
        "table": table(["factor", "value", *MEASURES], lines),
        "distribution": distribution([row["test_accuracy"] for row in rows]),
    }


def measures(values: Iterable[float | None]) -> list[str]:
    """Count, mean, lowest and highest of the values that are there, as text."""
    held = present(values)
    if not held:
        return ["0", "none", "none", "none"]
    return [number(len(held)), *(f"{value:.4f}" for value in (fmean(held), min(held), max(held)))]


def present(values: Iterable[float | None]) -> list[float]:
    """The values that are neither None nor NaN."""
    return [value for value in values if value is not None and value == value]


def distribution(values: list[float]) -> str:
    """A histogram of shares between 0 and 1 as a block of text."""
    counts = [0] * BINS
    for value in values:
        counts[min(BINS - 1, max(0, int(value * BINS + 1e-6)))] += 1
    lines = [
        f"{i / BINS:.1f} – {(i + 1) / BINS:.1f}  {bar(count, max(counts))}{' ' if count else ''}{number(count)}"
        for i, count in enumerate(counts)
    ]
    return block("\n".join(lines), "text")


def evaluations(facts: Facts) -> dict[str, str] | None:
    """What was measured again from the weights, and how far it is from what was recorded; None without it."""
    if "evaluations" not in facts.configs:
        return None
    rows = facts.table("evaluations", ("model_id", *schema.EVALUATIONS))
    recorded = {row["model_id"]: row["test_accuracy"] for row in facts.rows}
    differences = [
        abs(row["test_accuracy"] - recorded[row["model_id"]])
        for row in rows
        if row["test_accuracy"] is not None and recorded.get(row["model_id"]) is not None
    ]
    lines = [
        [code(name), *measures(row[name] for row in rows)]
        for name in schema.EVALUATIONS
        if present(row[name] for row in rows)
    ]
    return {
        "table": table(["metric", *MEASURES], lines),
        "rows": number(len(rows)),
        "compared": number(len(differences)),
        "difference": f"{max(differences, default=0.0):.2g}",
    }


def pairs(facts: Facts) -> dict[str, str] | None:
    """Pair metrics of siblings and of others; None without them."""
    if "pairs" not in facts.configs:
        return None
    rows = facts.table("pairs", ("same_parent", "dataset", *schema.PAIR_METRICS))
    lines = []
    for same, label in ((True, "siblings: one parent"), (False, "all others")):
        members = [row for row in rows if row["same_parent"] == same]
        for metric in schema.PAIR_METRICS:
            if present(row[metric] for row in members):
                lines.append([label, code(metric), *measures(row[metric] for row in members)])
    if not lines:
        return None
    return {
        "table": table(["pairs", "metric", "pairs measured", *MEASURES[1:]], lines),
        "rows": number(len(rows)),
        "dataset": code(rows[0]["dataset"]),
    }
