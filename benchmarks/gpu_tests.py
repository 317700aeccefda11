"""`pytest -m gpu`, with a row for each test: of the files that have such tests, since others need more packages.

python benchmarks/gpu_tests.py --out FOLDER [--simulate]
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

import gpu_shared
import side_by_side

MARK = "@pytest.mark.gpu"
FEW = ("tests/metrics/test_agreement.py",)
"""What a simulation runs: it skips its tests where there is no CUDA device."""


def main(figures: gpu_shared.Figures) -> None:
    files = FEW if figures.simulated else files_of_tests()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        options = ["-q", "-m", "gpu", "-p", "no:cacheprovider", f"--junitxml={report}"]
        command = [sys.executable, "-m", "pytest", *options, *files]
        done = subprocess.run(command, cwd=side_by_side.REPOSITORY, env=os.environ, check=False)
        if not report.exists():
            sys.exit(f"pytest wrote no report and ended with {done.returncode}")
        cases = list(ElementTree.parse(report).iter("testcase"))
    for case in cases:
        outcome = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        figures.rows.append(
            {
                "test": f"{case.get('classname')}::{case.get('name')}",
                "outcome": "passed" if outcome is None else outcome.tag,
                "seconds": case.get("time"),
                "message": "" if outcome is None else " ".join((outcome.get("message") or "").split())[:300],
            }
        )
    outcomes = [str(row["outcome"]) for row in figures.rows]
    counts = {kind: outcomes.count(kind) for kind in dict.fromkeys(outcomes)}
    figures.add(test="all", outcome=" ".join(f"{count} {kind}" for kind, count in counts.items()), seconds="")
    # a skipped test has measured nothing, so on a GPU it is no success
    if done.returncode or (counts.get("skipped") and not figures.simulated):
        figures.add(test="pytest", outcome="failed", error=f"status {done.returncode}, {counts}")


def files_of_tests() -> list[str]:
    files = sorted(gpu_shared.TESTS.rglob("test_*.py"))
    return [
        str(file.relative_to(side_by_side.REPOSITORY)) for file in files if MARK in file.read_text(encoding="utf-8")
    ]


if __name__ == "__main__":
    gpu_shared.main("tests", __doc__, main, on_cpu=True)
