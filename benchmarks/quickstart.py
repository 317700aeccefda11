"""Time and memory of `vitzoo quickstart` from nothing, and what the zoo it makes is like.

    python benchmarks/quickstart.py [--readme | --smoke]

writes benchmarks/results/quickstart.csv; `--readme` also puts the figures into README.md.
"""

import argparse
import csv
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow.parquet as pq

from vitzoo_hf.environment import describe
from vitzoo_hf.report.factors import explained_variance
from vitzoo_hf.zoo import Zoo

REPOSITORY = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results" / "quickstart.csv"
FACTORS = ("optimizer", "lr", "regime", "head")
SMOKE = REPOSITORY / "tests" / "tiny.yaml"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--readme", action="store_true", help="put the figures into README.md")
    parser.add_argument("--smoke", action="store_true", help="tests/tiny.yaml, to see that it runs")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "quickstart"
        command = [sys.executable, "-m", "vitzoo_hf", "quickstart", "--out", str(out), "--json"]
        seconds, peak = measure([*command, "--blueprint", str(SMOKE)] if given.smoke else command)
        figures = {"seconds": f"{seconds:.0f}", "peak_memory_mb": f"{peak / 1e6:.0f}"} | describe_zoo(out / "zoo")
    environment = {name: str(value) for name, value in describe().items()}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True)
    row = figures | environment | {"commit": commit.stdout.strip(), "date": time.strftime("%Y-%m-%d")}
    print(json.dumps(row, indent=1))
    if given.smoke:
        return
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(row), lineterminator="\n")
        writer.writeheader()
        writer.writerow(row)
    if given.readme:
        fill_readme(row)


def measure(command: list[str]) -> tuple[float, int]:
    """Wall seconds and the largest sum of proportional memory over all processes of the command."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        peak = max(peak, tree_memory(process.pid))
        time.sleep(0.5)
    if process.returncode:
        raise SystemExit(f"quickstart failed with status {process.returncode}")
    return time.perf_counter() - start, peak


def tree_memory(pid: int) -> int:
    """Proportional set size in bytes of a process and its descendants; 0 for one that is gone."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return 0
    own = int(re.search(r"^Pss:\s+(\d+)", text, re.MULTILINE).group(1)) * 1024
    return own + sum(tree_memory(int(child)) for child in children)


def describe_zoo(folder: Path) -> dict[str, str]:
    zoo = Zoo(folder)
    shards = list((folder / "weights").glob("*.parquet"))
    raw = 4 * sum(
        pq.read_table(file, columns=["num_parameters"])["num_parameters"].to_numpy().sum() for file in shards
    )
    table = zoo.to_pandas("evaluations")
    tuned = table[table["is_final"] & (table["stage"] == "finetune")]
    chosen = tuned.loc[tuned["selection_accuracy"].idxmax()]
    explained = explained_variance(tuned)
    return {
        "models": str(int(table["is_final"].sum())),
        "rows": str(len(zoo)),
        "size_ratio": f"{sum(file.stat().st_size for file in shards) / raw:.3f}",
        "chosen_test_accuracy": f"{chosen['test_accuracy']:.3f}",
        "best_test_accuracy": f"{tuned['test_accuracy'].max():.3f}",
        "worst_test_accuracy": f"{tuned['test_accuracy'].min():.3f}",
        **{f"eta2_{name}": f"{explained[name]:.2f}" for name in FACTORS if name in explained},
    }


def fill_readme(row: dict[str, str]) -> None:
    """Rewrite the results table of README.md from its template in this file."""
    lines = [
        "| quickstart | measured |",
        "|---|---|",
        f"| wall time | {row['seconds']} s on {row['cores']} cores |",
        f"| peak memory, all processes | {row['peak_memory_mb']} MB |",
        f"| Parquet files of the weights | {row['size_ratio']} × the raw float32 |",
        f"| fine-tuned model chosen on selection images | {row['chosen_test_accuracy']} test accuracy |",
        f"| best and worst fine-tuned model | {row['best_test_accuracy']} and {row['worst_test_accuracy']} |",
        "| share of the variance of accuracy explained by optimizer, learning rate, regime, head |"
        f" {row['eta2_optimizer']}, {row['eta2_lr']}, {row['eta2_regime']}, {row['eta2_head']} |",
    ]
    file = REPOSITORY / "README.md"
    pattern = r"(<!-- results: [^\n]*-->\n).*?(<!-- end of results -->)"
    text = re.sub(
        pattern, lambda match: match[1] + "\n".join(lines) + "\n" + match[2], file.read_text(), flags=re.DOTALL
    )
    file.write_text(text)


if __name__ == "__main__":
    main()
