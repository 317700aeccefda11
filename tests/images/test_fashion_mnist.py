"""Fashion-MNIST from a folder, from Debian's package and from the Hub: the same bytes, or one clear line."""

import json
import shutil
from pathlib import Path

import pytest
from fashion_stand_in import hashes_of, stand_in, use, write_hub_folder, write_idx_folder
from local_hub import LocalHub
from places import TESTS

from vitzoo_hf.blueprint.blueprint import Blueprint
from vitzoo_hf.blueprint.images_spec import ImagesSpec
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.images import fashion_mnist
from vitzoo_hf.images.fashion_mnist import HUB_ID, PACKAGE_FOLDER
from vitzoo_hf.images.prepared import PreparedBlueprint
from vitzoo_hf.images.sources import ImageSet, load_images
from vitzoo_hf.publish.pack import pack
from vitzoo_hf.training.stacked import train_run
from vitzoo_hf.zoo import Zoo

ARRAYS = stand_in(100, 30)
LOAD = """
import json
from pathlib import Path
from vitzoo_hf.images import fashion_mnist
from vitzoo_hf.images.sources import load_images
from vitzoo_hf.blueprint.images_spec import ImagesSpec
from vitzoo_hf.format.schema import ZooError
fashion_mnist.PACKAGE_FOLDER, fashion_mnist.SHA256 = Path("/nowhere/fashion-mnist"), {sha256!r}
try:
    images = load_images("x", ImagesSpec("fashion-mnist", 28))
    print(json.dumps([images.digest, images.origin, images.class_names[0], images.licence]))
except ZooError as error:
    print(json.dumps(str(error)))
"""


@pytest.fixture
def debian(tmp_path, monkeypatch):
    """A stand-in where Debian's package would be."""
    folder = write_idx_folder(tmp_path / "debian", ARRAYS)
    use(monkeypatch, ARRAYS, folder)
    return folder


def load(path: Path | None = None) -> ImageSet:
    return load_images("x", ImagesSpec("fashion-mnist", 28, path=str(path) if path else None))


def test_folder_package_and_hub_give_the_same(debian, tmp_path):
    of_package, of_path = load(), load(Path(shutil.copytree(debian, tmp_path / "mine")))
    with LocalHub(tmp_path / "hub") as hub:
        hub.create(HUB_ID)
        hub.publish(HUB_ID, write_hub_folder(tmp_path / "parquet", ARRAYS))
        code = LOAD.format(sha256=hashes_of(ARRAYS))
        told = hub.run(code, tmp_path / "home", token=None)
        again = hub.run(code, tmp_path / "home", token=None, HF_HUB_OFFLINE="1")
        other = hub.run(LOAD.format(sha256=fashion_mnist.SHA256 | {"test labels": "0" * 64}), tmp_path / "home")
    assert again == told == [of_package.digest, f"the Hub's {HUB_ID}", "T-shirt/top", "MIT"]
    assert of_path.digest == of_package.digest
    assert (of_package.origin, of_path.origin) == ("Debian's dataset-fashion-mnist", "path")
    assert other.startswith(f"images 'fashion-mnist': the test labels from the Hub's {HUB_ID} are not those of")


def test_no_source_and_no_network_is_one_line(tmp_path):
    with LocalHub(tmp_path / "hub") as hub:
        pass  # an address at which nobody answers
    told = hub.run(LOAD.format(sha256=hashes_of(ARRAYS)), tmp_path / "home", token=None)
    assert "\n" not in told
    assert told.startswith(
        f"images 'fashion-mnist' are neither in /nowhere/fashion-mnist nor to be had from the Hub's '{HUB_ID}'"
    )
    assert "run `apt install dataset-fashion-mnist`, or set `path` to a folder with its four idx .gz files" in told
    assert told.endswith("or run once with a connection to the Hub")


@pytest.mark.parametrize("part", ARRAYS)
def test_other_bytes_are_refused_whichever_way_they_came(part, debian, tmp_path):
    changed = {name: values.copy() for name, values in ARRAYS.items()}
    changed[part].flat[-1] ^= 1
    folder = write_idx_folder(tmp_path / "changed", changed)
    told = rf"the {part} from path are not those of Fashion-MNIST .*set `source: folder` or `source: hf:<id or path>`"
    with pytest.raises(ZooError, match=told):
        load(folder)
    shutil.rmtree(debian)
    folder.rename(debian)
    with pytest.raises(
        ZooError, match=f"the {part} from Debian's .*: install Debian's `dataset-fashion-mnist` again"
    ):
        load()


def test_a_path_is_the_only_place_that_is_looked_in(debian, tmp_path):
    with pytest.raises(ZooError, match=rf"need train-images-idx3-ubyte\.gz in {tmp_path}/empty"):
        load(tmp_path / "empty")


def test_runs_and_rows_say_where_their_images_came_from(debian, tmp_path):
    blueprint = Blueprint.load(TESTS / "small.yaml")
    text = blueprint.text.replace("  digits: {size: 8}", "  digits: {source: fashion-mnist, size: 8}")
    blueprint = Blueprint.parse(text.replace("epochs: 12", "epochs: 1"))
    for run in blueprint.runs:
        train_run(PreparedBlueprint(blueprint), run, tmp_path / "runs")
        record = json.loads((tmp_path / "runs" / run.run_id / "images.json").read_text())
        assert record["origin"] == "Debian's dataset-fashion-mnist"
        assert record["sha256"] == hashes_of(ARRAYS)
    zoo = Zoo(pack(blueprint, tmp_path / "runs", tmp_path / "zoo", progress=False))
    assert zoo.manifest["images"]["digits"]["sha256"] == hashes_of(ARRAYS)
    for row in zoo.rows():
        assert json.loads(row["provenance"])["images"]["sha256"] == hashes_of(ARRAYS)


@pytest.mark.skipif(not PACKAGE_FOLDER.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_the_real_images_are_those_of_the_hashes():
    images = load()
    assert images.images.shape == (70000, 1, 28, 28)
    assert images.labels.bincount().tolist() == [7000] * 10
