"""24 fine-tunes of a small ViT: updates of one group beside those of 24 trainers, one behind the other.

python benchmarks/stacked_training.py [--device cuda] [--smoke] [--json FILE]
"""

from collections.abc import Callable

import side_by_side
import torch

from vitzoo_hf.blueprint.blueprint import ImagesSpec, Recipe
from vitzoo_hf.images.pixels import PreparedImages
from vitzoo_hf.images.sources import ImageSet
from vitzoo_hf.models.vit import create
from vitzoo_hf.training.loop import Trainer
from vitzoo_hf.training.stacked_trainer import StackedTrainer
from vitzoo_hf.training.trainer import SingleTrainer

RUNS = 24
NAME = "vit_tiny_patch16_224"
SIZES = {
    "d32 L2 16px": {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2},
    "d64 L4 28px": {"img_size": 28, "patch_size": 7, "embed_dim": 64, "depth": 4, "num_heads": 4},
}
AUGMENTATIONS = ("none", "crop")
BATCHES = (32, 128)
STEPS = {"cpu": 1, "cuda": 3}
ROUNDS = {"cpu": 3, "cuda": 20}
SMOKE = {"RUNS": 2, "SIZES": {"d32 L2 16px": SIZES["d32 L2 16px"]}, "BATCHES": (4,)}
SMOKE |= {"STEPS": {"cpu": 1, "cuda": 1}, "ROUNDS": {"cpu": 1, "cuda": 1}}


def main() -> None:
    parser = side_by_side.parser(__doc__)
    parser.add_argument("--device", default="cpu")
    given = side_by_side.parsed(parser, globals(), SMOKE)
    torch.set_num_threads(1)
    rows = [
        measure(size, augmentation, batch, given.device)
        for size in SIZES
        for augmentation in AUGMENTATIONS
        for batch in BATCHES
    ]
    side_by_side.report("stacked_training", rows, given)


def measure(size: str, augmentation: str, batch: int, device: str) -> dict[str, object]:
    """Seconds a step of all runs, and how many times faster together."""
    args = {"in_chans": 1, "num_classes": 10} | SIZES[size]
    steps = STEPS[device.partition(":")[0]]
    images = random_images(steps * batch, int(args["img_size"]))
    recipes = [
        Recipe(seed=seed, lr=1e-4 * (1 + seed % 3), weight_decay=0.01, augmentation=augmentation, batch_size=batch)
        for seed in range(RUNS)
    ]
    models = [[create(NAME, args, seed=recipe.seed) for recipe in recipes] for _ in range(2)]
    alone = [
        SingleTrainer(recipe, images, model, 10, device) for recipe, model in zip(recipes, models[0], strict=True)
    ]
    together = StackedTrainer(recipes, images, models[1], 10, device)

    def epoch(trainer: Trainer) -> Callable[[], None]:
        batches, draws = trainer.batches(1), trainer.draws(1)

        def steps() -> None:
            for batch in trainer.feed.batches(batches, draws):
                trainer.step(iter([batch]), draws, 0.0)

        return steps

    epochs, group_epoch = [epoch(trainer) for trainer in alone], epoch(together)

    def loop() -> None:
        for steps_of_one in epochs:
            steps_of_one()
        wait(device)

    def group() -> None:
        group_epoch()
        wait(device)

    for warm in (loop, group):
        warm()
    ways = side_by_side.interleaved({"loop": loop, "group": group}, ROUNDS[device.partition(":")[0]])
    clock = "wall_s" if device.startswith("cuda") else "cpu_s"
    loop_s, group_s = (ways[name][clock] / steps for name in ("loop", "group"))
    return {
        "model": size,
        "parameters": sum(parameter.numel() for parameter in models[0][0].parameters()),
        "runs": RUNS,
        "augmentation": augmentation,
        "batch_size": batch,
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu, one thread",
        "clock": clock,
        "loop_ms_a_step_of_all": loop_s * 1e3,
        "group_ms_a_step_of_all": group_s * 1e3,
        "ratio": loop_s / group_s,
    }


def random_images(count: int, size: int) -> ImageSet:
    """Noise of ten classes, all of it to train on."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (count, 1, size, size), generator=generator).to(torch.uint8)
    labels = torch.randint(10, (count,), generator=generator)
    splits = {"train": torch.arange(count), "selection": torch.arange(1), "test": torch.arange(1)}
    spec = ImagesSpec("noise", size)
    return ImageSet("noise", spec, PreparedImages(pixels, spec), labels, tuple("0123456789"), "none", splits)


def wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
