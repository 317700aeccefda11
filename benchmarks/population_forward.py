"""The forward pass of 16 models on the same images: ours beside a loop, vmap and one batched product for all.

python benchmarks/population_forward.py [--smoke] [--json FILE]
"""

import warnings

import side_by_side
import torch
from torch.func import functional_call, vmap

from vitzoo_hf.format.layout import flatten, unflatten
from vitzoo_hf.format.schema import canonical_json
from vitzoo_hf.models.population import Population
from vitzoo_hf.models.vit import create

MODELS = 16
NAME = "vit_tiny_patch16_224"
SIZES = {
    "nano, 28k": {"img_size": 28, "patch_size": 7, "in_chans": 1, "num_classes": 10, "embed_dim": 32, "depth": 2}
    | {"num_heads": 2},
    "micro, 205k": {"img_size": 28, "patch_size": 7, "in_chans": 1, "num_classes": 10, "embed_dim": 64, "depth": 4}
    | {"num_heads": 4},
    "cifar, 314k": {"img_size": 32, "patch_size": 4, "in_chans": 3, "num_classes": 100, "embed_dim": 64, "depth": 6}
    | {"num_heads": 4},
}
BATCHES = (1, 4, 16, 64, 256, 512)
OURS = "ours"
SMOKE = {"MODELS": 2, "SIZES": {"nano, 28k": SIZES["nano, 28k"]}, "BATCHES": (2,)}


def main() -> None:
    given = side_by_side.parsed(side_by_side.parser(__doc__), globals(), SMOKE)
    threads = torch.get_num_threads()
    warnings.filterwarnings("ignore", message=".*batching rule.*")
    rows = [
        row | {"threads": count}
        for count in dict.fromkeys((1, threads))
        for size, args in SIZES.items()
        for batch in BATCHES
        for row in figures(size, args, batch, count)
    ]
    side_by_side.report("population_forward", rows, given)


def figures(size: str, args: dict, batch: int, threads: int) -> list[dict]:
    """Microseconds a model and image of each way, and how much slower than the best way ours is."""
    torch.set_num_threads(threads)
    models = [create(NAME, args, seed=seed).eval() for seed in range(MODELS)]
    population = Population.from_rows(row_of(model, args) for model in models)
    group = population.groups[0]
    images = torch.randn(batch, args["in_chans"], args["img_size"], args["img_size"])
    stacked = unflatten(group.vectors, group.layout)

    def one_product() -> torch.Tensor:
        assert group.batched is not None
        return group.batched(stacked, group.batched.patches(images)).logits

    ways = {
        OURS: lambda: population(images),
        "loop": lambda: torch.stack([model(images) for model in models]),
        "vmap": lambda: vmap(lambda tensors: functional_call(group.model, tensors, (images,)))(stacked),
        "bmm, all models and images at once": one_product,
    }
    with torch.inference_mode():
        expected = ways["loop"]()
        errors = {name: float((way() - expected).abs().max()) for name, way in ways.items()}
        rounds = max(3, min(15, 1000 // (batch * MODELS)))
        taken = side_by_side.interleaved(ways, rounds)
    clock = "cpu_s" if threads == 1 else "wall_s"
    best = min(times[clock] for name, times in taken.items() if name != OURS)
    return [
        {
            "size": size,
            "images": batch,
            "way": name,
            "us_a_model_and_image": times[clock] / MODELS / batch * 1e6,
            "ours_over_best_other": taken[OURS][clock] / best,
            "largest_error": errors[name],
            "plan": population.describe(batch)[0] if name == OURS else "",
        }
        for name, times in taken.items()
    ]


def row_of(model: torch.nn.Module, args: dict) -> dict:
    """A row of a zoo that holds this model."""
    weights = flatten(model.state_dict()).numpy()
    about = {"architecture": NAME, "architecture_args": canonical_json(args), "head": "linear", "head_hidden": None}
    return about | {"weights": weights}


if __name__ == "__main__":
    main()
