"""A zoo trained in one process from the text of a blueprint."""

from pathlib import Path

from vitzoo_hf.blueprint.blueprint import Blueprint
from vitzoo_hf.images.prepared import PreparedBlueprint
from vitzoo_hf.publish.pack import pack
from vitzoo_hf.training.stacked import groups, train_stacked
from vitzoo_hf.zoo import Zoo


def packed_zoo(folder: Path, text: str, *, together: int = 32) -> Zoo:
    """Write the blueprint into `folder`, train its runs, as many together as said, and pack them."""
    folder.mkdir(exist_ok=True)
    (folder / "zoo.yaml").write_text(text)
    blueprint = Blueprint.load(folder / "zoo.yaml")
    for group in groups(blueprint.runs, together):
        train_stacked(PreparedBlueprint(blueprint), group, folder / "runs")
    return Zoo(pack(blueprint, folder / "runs", folder / "zoo", progress=False))
