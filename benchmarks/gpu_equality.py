"""Every metric on the GPU beside the CPU, and the outputs of a population.

The metrics are those of the table in tests/metrics/test_cuda_budgets.py.

python benchmarks/gpu_equality.py --out FOLDER [--simulate]
"""

from collections.abc import Callable

import gpu_shared
import torch
from torch import Tensor

import vitzoo_hf as vz

RTOL, ATOL = 1e-5, 1e-6
SIZES = {"models": 24, "images": 600}
UNCOVERED = {"FeatureFile": "files lie on the CPU"}


def main(figures: gpu_shared.Figures) -> None:
    table = gpu_shared.of_tests("metrics/test_cuda_budgets.py")
    sizes = {} if figures.simulated else SIZES

    def both(metric: Callable) -> tuple[Tensor, Tensor]:
        return metric(table.Inputs("cuda", **sizes)), metric(table.Inputs("cpu", **sizes))

    check_coverage(gpu_shared.TESTS / "metrics" / "test_cuda_budgets.py")
    for name, metric in table.METRICS.items():
        with figures.row(what=name) as row:
            row |= difference(*both(metric))
    for part in ("logits", "features", "logits, bfloat16"):
        with figures.row(what=f"population, {part}") as row:
            row |= difference(outputs("cuda", part), outputs("cpu", part), 0.1 if "bfloat16" in part else 1e-4)


def check_coverage(table: gpu_shared.Path) -> None:
    """A metric that the table lacks would pass unseen."""
    public = {name for name, module in vz._MODULES.items() if module.startswith("vitzoo_hf.metrics.")}
    text = table.read_text(encoding="utf-8")
    if lacking := sorted(name for name in public - UNCOVERED.keys() if f"vz.{name}" not in text):
        raise SystemExit(f"{table} has no case of {lacking}")


def outputs(device: str, part: str) -> Tensor:
    zoo = vz.Zoo.sample().filter(stage="finetune", head="mlp")
    precision = "bfloat16" if "bfloat16" in part else "float32"
    population = vz.Population.from_rows(zoo.rows(), device, precision=precision)
    images = torch.randn(40, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    return population.features(images) if part == "features" else population(images)


def difference(on_gpu: Tensor, on_cpu: Tensor, atol: float = ATOL) -> dict[str, object]:
    if on_gpu.device.type != "cuda":
        raise ValueError(f"the result lies on {on_gpu.device}, expected cuda")
    result, expected = on_gpu.cpu().double(), on_cpu.double()
    torch.testing.assert_close(result, expected, rtol=RTOL, atol=atol, equal_nan=True)
    gap = (result - expected).abs()
    gap = gap[gap.isfinite()]
    return {"largest_difference": gap.max().item() if len(gap) else 0.0, "largest_value": expected.abs().max().item()}


if __name__ == "__main__":
    gpu_shared.main("equality", __doc__, main)
