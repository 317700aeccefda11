"""Write the tables of results of a zoo's card: recorded accuracy, evaluations, pairs of models."""

from collections.abc import Iterable
from statistics import fmean

from vitzoo_hf.format import schema
from vitzoo_hf.format.manifest import Manifest
from vitzoo_hf.publish.card_facts import Facts, value_counts
from vitzoo_hf.publish.markdown import bar, block, code, number, shown, table

MOST_VALUES = 12
BINS = 10
MEASURES = ["models", "mean", "lowest", "highest"]


def accuracy(facts: Facts, manifest: Manifest) -> dict[str, str] | None:
    """Summarise the test accuracy of the last row of each run: over all, by factor, and as a distribution.

    The result is None where no run has a test accuracy.
    """
    rows = facts.accuracies
    if not rows:
        return None
    lines = [["all", "all", *measures(row["test_accuracy"] for row in rows)]]
    for factor in manifest["factors"]:
        values = [value for value, _ in value_counts(rows, f"factor_{factor}")]
        # a factor with one value says nothing, one with many makes a long table
        if 1 < len(values) <= MOST_VALUES:
            for value in values:
                accuracies = (row["test_accuracy"] for row in rows if row[f"factor_{factor}"] == value)
                lines.append([code(f"factor_{factor}"), shown(value), *measures(accuracies)])
    return {
        "dataset": code(rows[0]["dataset"]),
        "models": number(len(rows)),
        "table": table(["factor", "value", *MEASURES], lines),
        "distribution": distribution([row["test_accuracy"] for row in rows]),
    }


def measures(values: Iterable[float | None]) -> list[str]:
    """Write count, mean, lowest and highest of the values that are neither None nor NaN."""
    numbers = present(values)
    if not numbers:
        return ["0", "none", "none", "none"]
    return [number(len(numbers)), *(f"{value:.4f}" for value in (fmean(numbers), min(numbers), max(numbers)))]


def present(values: Iterable[float | None]) -> list[float]:
    """List the values that are neither None nor NaN."""
    # NaN is the one value that differs from itself
    return [value for value in values if value is not None and value == value]


def distribution(values: list[float]) -> str:
    """Draw a histogram of shares between 0 and 1 as a block of text."""
    counts = [0] * BINS
    for value in values:
        # 0.7 is stored as float32, which is below 0.7: the shift keeps it in the bin that begins there
        counts[min(BINS - 1, max(0, int(value * BINS + 1e-6)))] += 1
    lines = [
        f"{i / BINS:.1f} – {(i + 1) / BINS:.1f}  {bar(count, max(counts))}{' ' if count else ''}{number(count)}"
        for i, count in enumerate(counts)
    ]
    return block("\n".join(lines), "text")


def evaluations(facts: Facts) -> dict[str, str] | None:
    """Summarise the metrics recomputed from the weights, with the largest difference from recorded accuracies.

    The result is None without the config `evaluations`.
    """
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
    """Summarise the metrics of pairs of siblings and of all other pairs; None without the config `pairs`."""
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
