"""Programs in a process of their own, and the memory they take at most."""

import subprocess
import sys
from pathlib import Path

from places import REPOSITORY

BENCHMARKS = REPOSITORY / "benchmarks"
PEAK = "\nimport resource\nprint(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3)\n"


def peak_mb(program: str, home: Path, *arguments: object) -> float:
    """Megabytes that a program took at its peak; it finds the modules of benchmarks/, and `home` as its HF_HOME."""
    result = subprocess.run(
        [sys.executable, "-c", program + PEAK, *map(str, arguments)],
        env={
            "PYTHONPATH": f"{BENCHMARKS}:{BENCHMARKS.parent}",
            "HF_HOME": str(home),
            "OMP_NUM_THREADS": "1",
            "PATH": "/usr/bin:/bin",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    peak = float(result.stdout.splitlines()[-1])
    print(f"{peak:.0f} MB")
    return peak
