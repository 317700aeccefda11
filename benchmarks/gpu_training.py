"""24 desk models trained in one stack on the GPU beside the loop over trainers: `stacked_training.py` there.

python benchmarks/gpu_training.py --out FOLDER [--simulate]
"""

import gpu_shared
import stacked_training

ROUNDS = 6


def main(figures: gpu_shared.Figures) -> None:
    if figures.simulated:
        vars(stacked_training).update(stacked_training.SMOKE)
    else:
        stacked_training.ROUNDS["cuda"] = ROUNDS
    for size in stacked_training.SIZES:
        for batch in stacked_training.BATCHES:
            for augmentation in stacked_training.AUGMENTATIONS:
                with figures.row() as row:
                    row |= {"model": size, "batch_size": batch, "augmentation": augmentation}
                    row |= stacked_training.measure(size, augmentation, batch, "cuda")


if __name__ == "__main__":
    gpu_shared.main("training", __doc__, main)
