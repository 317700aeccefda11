"""What the parts of `gpu.sh` share: options, a device that may be simulated, timing, rows that are written at once.

A part goes on when a row fails: the row says why, and the part ends with status 1.
"""

import argparse
import importlib.util
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any, NamedTuple

import side_by_side
import torch
from torch.nn import functional

TESTS = side_by_side.REPOSITORY / "tests"
SECONDS, ROUNDS = 1.0, 20
"""A way is timed for so long, or so often; a way whose first call takes longer is called once."""


class Figures:
    """The rows of a part; each is in the file as soon as it is measured, so that a timeout loses none.

    Attributes:
        simulated: the device is simulated: its times mean nothing.
    """

    def __init__(self, part: str, folder: Path, simulated: bool) -> None:
        self.file, self.simulated = folder / f"{part}.csv", simulated
        self.rows: list[dict[str, object]] = []
        device = "simulated" if simulated else torch.cuda.get_device_name(0)
        self.about = {"gpu": device} | side_by_side.machine()

    def add(self, **row: object) -> None:
        self.rows.append(row)
        side_by_side.write_csv(self.file, self.rows, self.about)
        print("  ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()), flush=True)

    @contextmanager
    def row(self, **names: object) -> Iterator[dict[str, object]]:
        """A row to fill; an error becomes its last column."""
        row = dict(names)
        try:
            yield row
        except Exception as error:  # whatever a way raises must not cost the figures of the ways behind it
            traceback.print_exc()
            row["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            torch.cuda.empty_cache()
        self.add(**row)

    def failed(self) -> bool:
        return any("error" in row for row in self.rows)


def main(part: str, description: str, measure: Callable[[Figures], None], on_cpu: bool = False) -> None:
    """Run a part with the options of the command line.

    Args:
        part: name of the part and of its file.
        description: docstring of the script.
        measure: fills the rows.
        on_cpu: the part needs no simulated device where it is simulated.
    """
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help=f"folder in which {part}.csv is written")
    parser.add_argument("--simulate", action="store_true", help="tiny sizes on a simulated device, without meaning")
    given = parser.parse_args()
    if not given.simulate and not torch.cuda.is_available():
        sys.exit(f"{part}: torch {torch.__version__} sees no CUDA device; --simulate runs without one")
    given.out.mkdir(parents=True, exist_ok=True)
    sys.path.append(str(TESTS))
    if not given.simulate or on_cpu:
        figures = Figures(part, given.out, given.simulate)
        measure(figures)
    else:
        from simulated_cuda import SimulatedCuda

        torch.set_num_threads(1)
        with SimulatedCuda():
            figures = Figures(part, given.out, True)
            measure(figures)
    sys.exit(figures.failed())


def of_tests(path: str) -> ModuleType:
    """A module of the tests, by its path below tests/: its tables serve here too."""
    name = "gpu_" + path.removesuffix(".py").replace("/", "_")
    spec = importlib.util.spec_from_file_location(name, TESTS / path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Timing(NamedTuple):
    """Wall seconds of the first call and of the median of further calls, the device's work included, and the peak."""

    first_s: float
    seconds: float
    peak_gb: float
    result: Any


def timed(way: Callable[[], Any]) -> Timing:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    first_s, result = call(way)
    durations: list[float] = []
    while first_s <= SECONDS and len(durations) < ROUNDS and sum(durations) < SECONDS:
        result = None  # or two results would lie in memory
        duration, result = call(way)
        durations.append(duration)
    return Timing(first_s, median(durations or [first_s]), torch.cuda.max_memory_allocated() / 1e9, result)


def call(way: Callable[[], Any]) -> tuple[float, Any]:
    torch.cuda.synchronize()
    start = time.perf_counter()
    result = way()
    torch.cuda.synchronize()
    return time.perf_counter() - start, result


def code(line: str, names: Mapping[str, object]) -> Callable[[], Any]:
    """The function that a line of code is: what a table names is what ran."""
    scope = {"torch": torch, "functional": functional, **names}
    compiled = compile(line, "<line of a table>", "eval")
    # a scope a call, or what `:=` names would lie in memory for the next one
    return lambda: eval(compiled, dict(scope))


def compare(
    figures: Figures,
    task: str,
    lines: Iterable[str],
    names: Mapping[str, object],
    error: Callable[[Any], float] | None = None,
) -> None:
    """A row for each line of code, the first of which is ours: its time, and how far its result lies from ours.

    Args:
        figures: rows of the part.
        task: what all lines compute.
        lines: expressions of `names`, `torch` and `functional`.
        names: inputs and functions.
        error: error of a result, where there is a truth to compare with.
    """
    ours: Timing | None = None
    for number, line in enumerate(lines):
        with figures.row(task=task, line=line) as row:
            timing = timed(code(line, names))
            ours = timing if number == 0 else ours
            row |= {"ms": timing.seconds * 1e3, "first_ms": timing.first_s * 1e3, "peak_gb": timing.peak_gb}
            if error is not None:
                row["largest_error"] = error(timing.result)
            if ours is not None:
                difference = (timing.result.double() - ours.result.double()).abs()
                row["times_ours"] = timing.seconds / ours.seconds
                row["largest_difference"] = difference[difference.isfinite()].max().item()
