"""Take eight final training models of a zoo for a smaller zoo: both parents, and fine-tuned models from good to bad.

    python examples/make_sample.py vitzoo-quickstart/zoo FOLDER

This is how `vitzoo_hf/sample` was made from the mini zoo.
"""

import sys
from pathlib import Path

from vitzoo_hf.convert.export import export_subset
from vitzoo_hf.evaluation.evaluate import evaluate
from vitzoo_hf.zoo import Zoo


def main(source: str, folder: str) -> None:
    """Write the sample and evaluate it."""
    zoo = Zoo(source).filter(is_final=True, split="train")
    chosen = zoo.filter(stage="pretrain").model_ids
    table = zoo.filter(stage="finetune").to_pandas()
    for optimizer, heads in (("adamw", ["linear", "mlp"]), ("sgd", ["linear"])):
        group = table[(table["factor_optimizer"] == optimizer) & table["head"].isin(heads)]
        for regime in ("supervised", "contrastive"):
            ranked = group[group["factor_regime"] == regime].sort_values("test_accuracy")
            chosen += ranked["model_id"].iloc[[-1] if optimizer == "sgd" else [0, -1]].tolist()
    sample = export_subset(zoo.filter(model_id=chosen), Path(folder), selection_of=["digits"])
    evaluate(Zoo(sample), progress=False).write(sample)
    print(f"{len(Zoo(sample))} models in {sample}")


if __name__ == "__main__":
    main(*sys.argv[1:])
