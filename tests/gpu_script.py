"""What `benchmarks/gpu.sh` runs."""

import re

from places import REPOSITORY

GPU_SH = REPOSITORY / "benchmarks" / "gpu.sh"


def gpu_parts() -> dict[str, int]:
    """Part -> the seconds it may take, in the order of the script."""
    (line,) = re.findall(r"^parts=\((.*)\)$", GPU_SH.read_text(encoding="utf-8"), re.MULTILINE)
    return {part: int(seconds) for part, seconds in (entry.split(":") for entry in line.split())}
