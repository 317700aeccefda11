"""512 tiny ViTs of a distribution inference cell: trained together, as `launch` does, beside one by one.

python benchmarks/world_training.py [--smoke] [--json FILE]
"""

import re
import tempfile
import time
from pathlib import Path

import side_by_side

from vitzoo_hf.blueprint.blueprint import BLUEPRINTS, Blueprint
from vitzoo_hf.environment import default_workers
from vitzoo_hf.launch.local import launch

CELL = BLUEPRINTS / "distribution_inference" / "label_ratio_scratch.yaml"
WAYS = {"together (launch)": (85, 171, None), "one by one": (16, 32, 1)}
"""Way -> replicas of targets and of shadows for each of two secrets, and how many train together."""
SMOKE = {"CELL": CELL.with_name("smoke.yaml"), "WAYS": {"together (launch)": (1, 2, None), "one by one": (1, 1, 1)}}


def main() -> None:
    given = side_by_side.parsed(side_by_side.parser(__doc__), globals(), SMOKE)
    rows = []
    for way, (targets, shadows, stack) in WAYS.items():
        models = 2 * (targets + shadows)
        seconds = seconds_of(targets, shadows, stack)
        rows.append({"way": way, "models": models, "wall_s": seconds, "wall_ms_a_model": 1000 * seconds / models})
    for row in rows:
        row["over_together"] = row["wall_ms_a_model"] / rows[0]["wall_ms_a_model"]
    side_by_side.report("world_training", rows, given)


def seconds_of(targets: int, shadows: int, stack: int | None) -> float:
    """Wall time of training that many models, start of the workers included."""
    text = CELL.read_text(encoding="utf-8")
    counts = iter((targets, shadows))
    text = re.sub(r"replicas: \d+", lambda _: f"replicas: {next(counts)}", text)
    with tempfile.TemporaryDirectory() as folder:
        blueprint = Path(folder) / "cell.yaml"
        blueprint.write_text(text, encoding="utf-8")
        start = time.perf_counter()
        workers = default_workers("cpu")
        launch(Blueprint.load(blueprint), Path(folder) / "runs", workers=workers, stack=stack, progress=False)
        return time.perf_counter() - start


if __name__ == "__main__":
    main()
