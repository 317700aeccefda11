"""Plan any kind of source: a release of a zoo, models on the Hub, or checkpoints in files."""

from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict

from vitzoo_hf.convert.rows import SourcePlan
from vitzoo_hf.convert.sources.checkpoints import plan_checkpoints
from vitzoo_hf.convert.sources.hub_models import plan_hub_models, read_list
from vitzoo_hf.convert.sources.places import FolderPlace, WebPlace
from vitzoo_hf.convert.sources.release import is_release, plan_release
from vitzoo_hf.format.schema import ZooError


class _Options(TypedDict, total=False):
    """Keyword arguments that every kind of source takes; `name` is left out for the default of the source."""

    architecture: str | None
    architecture_args: Mapping[str, object] | None
    name: str


def plan_source(
    source: str,
    *,
    table: Path | None = None,
    architecture: str | None = None,
    architecture_args: Mapping[str, object] | None = None,
    first_epoch: int | None = None,
    name: str | None = None,
) -> SourcePlan:
    """Plan the conversion of a source; no checkpoint is read yet, but two or so of a release.

    Args:
        source: a folder with the layout of the original ViT model zoo, or the http(s) address of one; a checkpoint
            file, a model folder, or a folder of those; `hf:ORG/NAME`, or a .txt file of Hub model ids, one a line.
        table: a CSV with a row a checkpoint; its columns become factors.
        architecture: timm name, where the source does not name it.
        architecture_args: arguments of `timm.create_model` that do not follow from the shapes.
        first_epoch: epochs completed at the first checkpoint of a release; found out by default.
        name: name of the zoo.

    Raises:
        ZooError: if there is no such source, or it is none of these.
    """
    options = _Options(architecture=architecture, architecture_args=architecture_args)
    if name is not None:
        options["name"] = name
    if source.startswith(("http://", "https://")):
        web = WebPlace(source)
        if not is_release(web):
            raise ZooError(
                f"{source} is no release of the ViT model zoo: expected folders vit_imagenet_pretrained and"
                " vit_cifar100_finetuned, listed as JSON"
            )
        return plan_release(web, first_epoch=first_epoch, **options)
    # before checkpoints: the files of a release are checkpoints too, but without their lineage
    if _is_release_folder(Path(source)):
        return plan_release(FolderPlace(Path(source)), first_epoch=first_epoch, **options)
    if first_epoch is not None:
        raise ZooError("first_epoch is only for releases of the ViT model zoo: a table's column `epoch` tells others")
    if source.startswith("hf:"):
        return plan_hub_models([source.removeprefix("hf:").removeprefix("//")], table=table, **options)
    path = Path(source)
    if not path.exists():
        raise ZooError(f"there is no {source}: give a folder, a file, an http address, or hf:ORG/NAME")
    if path.suffix == ".txt":
        return plan_hub_models(read_list(path), table=table, **options)
    return plan_checkpoints(path, table=table, **options)


def _is_release_folder(path: Path) -> bool:
    return path.is_dir() and is_release(FolderPlace(path))
