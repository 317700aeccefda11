"""Random resized crops and evaluation views of JPEGs, ours beside torchvision's transforms in a torch DataLoader.

python benchmarks/on_demand_images.py [--smoke] [--json FILE]
"""

import io
import resource
import statistics
import time
from collections.abc import Callable

import datasets
import numpy as np
import pyarrow as pa
import side_by_side
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from vitzoo_hf.blueprint.images_spec import ImagesSpec
from vitzoo_hf.images.crops import resized_crop_boxes
from vitzoo_hf.images.on_demand import OnDemandImages
from vitzoo_hf.read_ahead import mapped_ahead
from vitzoo_hf.timm_import import import_timm

SPEC = ImagesSpec("folder", 224, resize=256, crop=224, decode="on_demand")
ROUNDS = 3
BATCH = 32
DISTINCT = 16
COUNTS = (128, 32)
SMOKE = {"ROUNDS": 1, "BATCH": 2, "DISTINCT": 2, "COUNTS": (4, 2)}


class Encoded(Dataset):
    """What a torchvision user writes."""

    def __init__(self, files: list[bytes], transform: Callable) -> None:
        self.files, self.transform = files, transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, position: int) -> torch.Tensor:
        return self.transform(Image.open(io.BytesIO(self.files[position])).convert("RGB"))


def main() -> None:
    given = side_by_side.parsed(side_by_side.parser(__doc__), globals(), SMOKE)
    torch.set_num_threads(1)
    rows = measure("500×375", jpegs(375, 500), COUNTS[0]) + measure("2000×1500", jpegs(1500, 2000), COUNTS[1])
    side_by_side.report("on_demand_images", rows, given)


def jpegs(height: int, width: int) -> list[bytes]:
    """Photographs in what they cost: smooth shapes under fine texture, some 0.6 bytes a pixel."""
    rng = np.random.default_rng(0)
    made = []
    for _ in range(DISTINCT):
        shapes = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((width, height))
        texture = rng.normal(0, 12, (height, width, 1))
        pixels = (np.asarray(shapes) + texture).clip(0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=85)
        made.append(buffer.getvalue())
    return made


def measure(name: str, distinct: list[bytes], count: int) -> list[dict]:
    files = [distinct[number % DISTINCT] for number in range(count)]
    column = pa.chunked_array([pa.array([{"bytes": file, "path": None} for file in files], datasets.Image.pa_type)])
    batches = torch.arange(count).split(BATCH)

    def ours(threads: int, view: str) -> Callable[[], object]:
        images = OnDemandImages(column, SPEC, threads)
        generator = torch.Generator().manual_seed(0)

        def crops(batch: torch.Tensor) -> torch.Tensor:
            return images.crops(batch, resized_crop_boxes(images.sizes(batch), 0.08, generator))

        return lambda: [None for _ in mapped_ahead(crops if view == "crop" else images.evaluation, batches)]

    def theirs(workers: int, view: str) -> Callable[[], object]:
        loader = DataLoader(Encoded(files, transform(view)), BATCH, num_workers=workers)
        return lambda: [None for _ in loader]

    rows = []
    for view in ("crop", "evaluation"):
        ways = {
            "ours, 2 threads": ours(2, view),
            "torchvision in a DataLoader, 2 workers": theirs(2, view),
            "ours, 1 thread": ours(1, view),
            "torchvision in a DataLoader, no worker": theirs(0, view),
        }
        taken = interleaved(ways)
        base = {"2": taken["ours, 2 threads"], "1": taken["ours, 1 thread"]}
        for way, (wall, cpu) in taken.items():
            own_wall, own_cpu = base["2" if "2" in way else "1"]
            rows.append(
                {
                    "jpegs": name,
                    "kilobytes_each": sum(map(len, distinct)) / DISTINCT / 1e3,
                    "view": view,
                    "way": way,
                    "images_per_wall_s": count / wall,
                    "images_per_cpu_s": count / cpu,
                    "times_ours_wall": wall / own_wall,
                    "times_ours_cpu": cpu / own_cpu,
                }
            )
    return rows


def transform(view: str) -> Callable:
    import_timm()
    from torchvision import transforms

    steps = [transforms.RandomResizedCrop(224)]
    if view == "evaluation":
        steps = [transforms.Resize(256), transforms.CenterCrop(224)]
    return transforms.Compose([*steps, transforms.PILToTensor()])


def interleaved(ways: dict[str, Callable[[], object]]) -> dict[str, tuple[float, float]]:
    """Median wall and processor seconds, those of worker processes among them."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            wall, cpu = time.perf_counter(), processor_seconds()
            way()
            taken[name].append((time.perf_counter() - wall, processor_seconds() - cpu))
    return {
        name: (statistics.median(w for w, _ in pairs), statistics.median(c for _, c in pairs))
        for name, pairs in taken.items()
    }


def processor_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(entry.ru_utime + entry.ru_stime for entry in used)


if __name__ == "__main__":
    main()
