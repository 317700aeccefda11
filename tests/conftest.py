"""One tiny zoo, built once by the real pipeline, and what tests of single modules share."""

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before anything loads the libraries that read it

import pytest
import torch
from places import TINY
from shared_folders import SharedFolders, root_of
from simulated_cuda import SimulatedCuda

from vitzoo_hf.blueprint.blueprint import Blueprint


@pytest.fixture(autouse=True, scope="session")
def _ctrl_c_works() -> None:
    """A shell starts what runs in the background deaf to Ctrl-C, and programs started by tests would inherit that."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """As workers train, so that weights are theirs to the bit; and tests run in a process a core."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _private_caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep `datasets` from writing into the user's cache, and everything from the network."""
    patch = pytest.MonkeyPatch()
    cache = tmp_path_factory.mktemp("hf")
    patch.setenv("HF_HOME", str(cache))
    patch.setattr("datasets.config.HF_DATASETS_CACHE", cache / "datasets")
    patch.setattr("datasets.builder.config.HF_DATASETS_CACHE", cache / "datasets")
    yield
    patch.undo()


@pytest.fixture(scope="session")
def tiny_blueprint() -> Blueprint:
    return Blueprint.load(TINY)


@pytest.fixture(scope="session")
def shared_folders(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[SharedFolders]:
    """Folders built once for all processes; tests that change one take a copy, or the session fails."""
    folders = SharedFolders(root_of(tmp_path_factory.getbasetemp(), hasattr(request.config, "workerinput")))
    yield folders
    folders.check_all()


def build_tiny(folder: Path) -> None:
    from vitzoo_hf.evaluation.evaluate import evaluate
    from vitzoo_hf.launch.local import launch
    from vitzoo_hf.publish.pack import pack
    from vitzoo_hf.zoo import Zoo

    blueprint = Blueprint.load(TINY)
    launch(blueprint, folder / "runs", workers=2, progress=False)
    pack(blueprint, folder / "runs", folder / "zoo", progress=False)
    evaluate(Zoo(folder / "zoo"), progress=False).write(folder / "zoo")


@pytest.fixture(scope="session")
def tiny_runs(shared_folders: SharedFolders) -> Path:
    """Finished runs; tests that train or write in them take `runs_copy`."""
    return shared_folders.get("tiny", build_tiny) / "runs"


@pytest.fixture(scope="session")
def tiny_zoo(shared_folders: SharedFolders) -> Path:
    """A finished and evaluated zoo; tests that change it take `zoo_copy`."""
    return shared_folders.get("tiny", build_tiny) / "zoo"


@pytest.fixture
def runs_copy(tiny_runs: Path, tmp_path: Path) -> Path:
    """Finished runs of one's own, to train in."""
    return Path(shutil.copytree(tiny_runs, tmp_path / "finished"))


@pytest.fixture
def zoo_copy(tiny_zoo: Path, tmp_path: Path) -> Path:
    """A zoo of one's own, to damage."""
    return Path(shutil.copytree(tiny_zoo, tmp_path / "zoo"))


@pytest.fixture
def simulated_cuda() -> Iterator[SimulatedCuda]:
    """A simulated CUDA device, on while the test runs; it counts kernels, copies and syncs."""
    if torch.backends.cuda.is_built():
        pytest.skip("this torch may have a real device, which must not meet a simulated one: simulated on CPU builds")
    with SimulatedCuda() as device:
        yield device
