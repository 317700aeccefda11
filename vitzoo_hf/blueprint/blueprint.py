"""Blueprint (YAML) -> the runs of a zoo: ids, generating factors, seeds, lineage, kept epochs, splits.

A blueprint declares one architecture, the images, a pre-training stage and a fine-tuning stage. Each stage has
`settings` (the same for all its runs) and `factors`, a grid whose combinations are its runs; or `variants`, a list
of such pairs. `replicas` makes that many runs of each combination, with seeds of their own. Every pre-training run
becomes the parent of one run for each fine-tuning combination. A fine-tuned model inherits its parent's factors: its
`regime` is that of its pre-training. Nothing is trained or loaded here.
"""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path

from vitzoo_hf.blueprint.images_spec import ImagesSpec, check_images
from vitzoo_hf.blueprint.located_yaml import Located, parse_located, read_text
from vitzoo_hf.blueprint.recipe import Recipe
from vitzoo_hf.blueprint.settings import SETTING_TYPES, Settings, built, known_setting, setting, settings_of
from vitzoo_hf.blueprint.world import Learner, World
from vitzoo_hf.format.messages import did_you_mean
from vitzoo_hf.format.schema import RUN_ID, SPLITS, STAGES, ZooError, fingerprint, model_id, split_of

ID_PREFIXES = {"regime": "", "seed": "s", "lr": "lr", "weight_decay": "wd", "optimizer": "", "head": ""}
REGIMES = {"supervised": "sl", "contrastive": "cl"}


Splits = dict[str, str | int | float]
"""How runs are split: `by`, `seed` and the share of every split."""


@dataclass(frozen=True)
class Run:
    """One training and its place in the zoo.

    `world` and `learner` belong to a run that draws training images of its own; they are None for all others.
    """

    run_id: str
    stage: str
    parent_id: str | None
    images: str
    epochs: int
    keep_epochs: tuple[int, ...]
    recipe: Recipe
    factors: dict[str, object]
    split: str
    world: World | None = None
    learner: Learner | None = None

    @property
    def parent_run(self) -> str | None:
        """The run whose final weights initialise this one; None for pre-training."""
        return self.parent_id.rpartition("@")[0] if self.parent_id else None


@dataclass(frozen=True)
class Blueprint:
    """A zoo before it exists: all runs in an order in which parents come before their children.

    Example:
        >>> blueprint = Blueprint.load("mini")
        >>> len(blueprint.runs), blueprint.factor_types["lr"]
        (50, 'float')
    """

    name: str
    architecture: str
    architecture_args: dict[str, object]
    images: dict[str, ImagesSpec]
    runs: tuple[Run, ...]
    factor_types: dict[str, str]
    splits: Splits
    text: str = field(repr=False)

    @classmethod
    def load(cls, source: str | Path) -> "Blueprint":
        """A blueprint of the package by name, or any by the path of its YAML file.

        Raises:
            ZooError: naming file and line, for anything misspelt, mistyped, missing or impossible.
        """
        path = Path(source)
        if path.suffix not in (".yaml", ".yml"):
            path = BLUEPRINTS / f"{source}.yaml"
            if not path.is_file():
                names = sorted(str(file.relative_to(BLUEPRINTS))[:-5] for file in BLUEPRINTS.rglob("*.yaml"))
                raise ZooError(
                    f"unknown blueprint {str(source)!r}: {did_you_mean(str(source), names)}, or a .yaml file"
                )
        # read once: the text that is published is the one that was parsed
        text = read_text(path)
        return _parse(parse_located(text, path), text)

    @classmethod
    def parse(cls, text: str) -> "Blueprint":
        """A blueprint from its text, such as `Zoo.blueprint_text`.

        Raises:
            ZooError: for any mistake in the blueprint, naming its line.
        """
        return _parse(parse_located(text, Path("blueprint.yaml")), text)

    @cached_property
    def fingerprint(self) -> str:
        """Changes with anything that changes a weight, an id or a split."""
        decides = asdict(self)
        # comments and descriptions change no weight
        del decides["text"]
        decides["images"] = {name: spec.decides() for name, spec in self.images.items()}
        for run, entry in zip(self.runs, decides["runs"], strict=True):
            entry["recipe"] = run.recipe.decides
            # blueprints had no worlds at first: without one, old fingerprints hold
            if run.world is None:
                del entry["world"], entry["learner"]
        return fingerprint(decides)

    @property
    def secrets(self) -> tuple[str, ...]:
        """Factors that say what distribution runs drew their images from; `num_images` comes last."""
        properties = {entry.name for entry in fields(World)} - {"role"}
        secrets = [name for name in self.factor_types if name in properties]
        return tuple(sorted(secrets, key=lambda name: name == "num_images"))

    @property
    def num_rows(self) -> int:
        """Rows of the finished zoo: kept epochs over all runs."""
        return sum(len(run.keep_epochs) for run in self.runs)


MOST_EPOCHS = 100_000
FACTOR_KINDS: dict[object, str] = {str: "string", float: "float", int: "int", bool: "bool"}
BLUEPRINTS = Path(__file__).parents[1] / "blueprints"


def _parse(root: Located, text: str) -> Blueprint:
    root.only("name", "description", "architecture", "images", "stages", "splits")
    architecture = root.get("architecture")
    architecture.only("name", "args")
    if "num_classes" in architecture.get("args"):
        raise architecture.get("args").error("num_classes follows from the images: leave it out")
    images = {key: _images_spec(key, node) for key, node in root.get("images").items()}
    for key, spec in images.items():
        check_images(spec, root.get("images").get(key))
    published = _without_paths(text, images)
    # workers may be in another directory than the process that read the blueprint
    images = {
        key: replace(spec, path=str(Path(spec.path).absolute()) if spec.path else spec.path)
        for key, spec in images.items()
    }
    splits = _parse_splits(root)
    stages = root.get("stages")
    stages.only(*STAGES)
    parents: list[Run] = []
    children: list[Run] = []
    for stage, into in (("pretrain", parents), ("finetune", children)):
        if stage in stages:
            into.extend(_stage_runs(stage, stages.get(stage), images, parents, splits))
    if not parents:
        raise stages.error("a blueprint needs a `pretrain` stage")
    runs = _fill_factors((*parents, *children))
    images = {key: _with_worlds(key, spec, runs) for key, spec in images.items()}
    return Blueprint(
        name=root.get("name").typed(str),
        architecture=architecture.get("name").typed(str),
        architecture_args={key: node.plain() for key, node in architecture.get("args").items()},
        images=images,
        runs=runs,
        factor_types=_factor_types(runs),
        splits=splits,
        text=published,
    )


def _stage_runs(
    stage: str, node: Located, images: Mapping[str, ImagesSpec], parents: list[Run], splits: Splits
) -> Iterator[Run]:
    node.only("images", "epochs", "keep_epochs", "settings", "factors", "variants", "replicas")
    dataset = node.get("images").typed(str)
    if dataset not in images:
        raise node.get("images").error(f"unknown images {dataset!r}: {did_you_mean(dataset, images)}")
    epochs = node.get("epochs").typed(int)
    keep = _kept(node, epochs)
    shares = {split: float(splits[split]) for split in SPLITS}
    combinations = list(_combinations(stage, node, images[dataset].is_world))
    varied = list(dict.fromkeys(name for combination in combinations for name in combination[0]))
    run_ids: set[str] = set()
    for parent in parents if stage == "finetune" else (None,):
        for factors, (recipe, world, learner), place in combinations:
            if recipe.warmup_epochs >= epochs:
                raise place.error(f"warmup_epochs is {recipe.warmup_epochs:g}; it must be below epochs = {epochs}")
            if world is not None and world.flip_rate and images[dataset].region == ():
                raise place.error(f"flip_rate is {world.flip_rate:g}, but images {dataset!r} have no region: set it")
            stage_id = "-".join(_id_part(name, value) for name, value in factors.items())
            run_id = f"{parent.run_id}--{stage_id}" if parent else stage_id
            _check_id(run_id, run_ids, place)
            # the parent's id, so that a parent and its children are in one split
            group = run_id.partition("--")[0] if splits["by"] == "lineage" else run_id
            yield Run(
                run_id=run_id,
                stage=stage,
                parent_id=model_id(parent.run_id, parent.epochs) if parent else None,
                images=dataset,
                epochs=epochs,
                keep_epochs=keep,
                recipe=recipe,
                factors=_inherit(
                    {
                        name: factors[name] if name in factors else _value_of(name, recipe, world, learner)
                        for name in varied
                    },
                    parent,
                ),
                split=split_of(run_id, group, fractions=shares, seed=int(splits["seed"])),
                world=world,
                learner=learner,
            )


def _value_of(name: str, *holders: object) -> object:
    """The value of a setting, from the recipe, world or learner that has it."""
    return next((getattr(holder, name) for holder in holders if hasattr(holder, name)), None)


def _with_worlds(name: str, spec: ImagesSpec, runs: tuple[Run, ...]) -> ImagesSpec:
    """Add the distributions that runs on a world draw from, whatever their role and number of images."""
    worlds = (run.world for run in runs if run.images == name and run.world is not None)
    # a dict rather than a set: the order of worlds decides which images they draw
    plain = dict.fromkeys(replace(world, role="target", num_images=0, nominal=0) for world in worlds)
    return replace(spec, worlds=tuple(plain))


def _combinations(stage: str, node: Located, is_world: bool) -> Iterator[tuple[dict[str, object], Settings, Located]]:
    """Factors, settings and place in the file of every combination of a stage."""
    if "variants" in node and "factors" in node:
        raise node.get("variants").error("a stage has either factors or variants, not both")
    common = settings_of(node.get("settings")) if "settings" in node else {}
    # one count for all variants: two replicas of a stage never share a seed
    seeds = itertools.count()
    for variant in node.get("variants").sequence() if "variants" in node else [node]:
        settings: dict[str, object] = {}
        if variant is not node:
            variant.only("factors", "settings", "replicas")
            settings = settings_of(variant.get("settings")) if "settings" in variant else {}
        grid = variant.get("factors")
        expanded = _expand(grid)
        for factors in _replicated(expanded, variant, seeds) if "replicas" in variant else expanded:
            both = sorted(set(factors) & (set(common) | set(settings)))
            if both:
                raise grid.error(f"{both[0]!r} is both a setting and a factor of this stage: keep one of the two")
            yield factors, built(stage, common | settings | factors, is_world, grid), grid


def _replicated(
    combinations: Iterator[dict[str, object]], node: Located, seeds: Iterator[int]
) -> Iterator[dict[str, object]]:
    """Each combination as often as `replicas` says, with the next seeds of the stage."""
    count = node.get("replicas").typed(int)
    if count < 1:
        raise node.get("replicas").error(f"replicas is {count}; it must be positive")
    for factors in combinations:
        if "seed" in factors:
            raise node.get("replicas").error("replicas have seeds of their own: drop the factor seed")
        for _ in range(count):
            yield factors | {"seed": next(seeds)}


def _inherit(factors: dict[str, object], parent: Run | None) -> dict[str, object]:
    """A child has its parent's factors too; one that both vary is kept twice, the parent's as `parent_<factor>`."""
    if parent is None:
        return dict(factors)
    inherited = {(f"parent_{name}" if name in factors else name): value for name, value in parent.factors.items()}
    return inherited | factors


def _fill_factors(runs: tuple[Run, ...]) -> tuple[Run, ...]:
    """Give every run a value for each factor of the zoo: where its stage does not vary it, what its recipe says."""
    names = list(dict.fromkeys(name for run in runs for name in run.factors))
    return tuple(
        replace(
            run,
            factors={
                name: run.factors.get(name, _value_of(name, run.recipe, run.world, run.learner)) for name in names
            },
        )
        for run in runs
    )


def _expand(grid: Located) -> Iterator[dict[str, object]]:
    values: dict[str, list[object]] = {}
    for name, node in grid.items():
        known_setting(name, node)
        values[name] = [setting(name, entry) for entry in (node.sequence() if node.is_sequence else [node])]
        if not values[name]:
            raise node.error(f"factor {name!r} has no value")
        if len(set(values[name])) < len(values[name]):
            raise node.error(f"factor {name!r} lists a value twice: {values[name]}")
    if not values:
        raise grid.error("a stage needs at least one factor: its runs are told apart by their factors")
    for combination in itertools.product(*values.values()):
        yield dict(zip(values, combination, strict=True))


def _kept(node: Located, epochs: int) -> tuple[int, ...]:
    if not 1 <= epochs <= MOST_EPOCHS:
        raise node.get("epochs").error(f"epochs is {epochs}; it must be at least 1 and at most {MOST_EPOCHS}")
    if "keep_epochs" not in node:
        return (epochs,)
    keep = node.get("keep_epochs")
    if keep.value == "all":
        return tuple(range(epochs + 1))
    keep_epochs = sorted({entry.typed(int) for entry in keep.sequence()} | {epochs})
    if keep_epochs[0] < 0 or keep_epochs[-1] > epochs:
        raise keep.error(f"keep_epochs {keep_epochs} must lie between 0 (initial weights) and epochs = {epochs}")
    return tuple(keep_epochs)


def _parse_splits(root: Located) -> Splits:
    node = root.get("splits")
    node.only("by", "seed", *SPLITS)
    by = node.get("by").typed(str)
    if by not in ("run", "lineage"):
        raise node.get("by").error(f"splits are by 'run' or by 'lineage', not by {by!r}")
    shares = {split: node.get(split).typed(float) for split in SPLITS}
    # 0.7 + 0.2 + 0.1 is below 1 in floats
    if abs(sum(shares.values()) - 1) > 1e-9 or min(shares.values()) < 0:
        raise node.error(f"the shares of {', '.join(SPLITS)} are {list(shares.values())}; they must sum to 1")
    return {"by": by, "seed": node.get("seed").typed(int)} | shares


def _images_spec(key: str, node: Located) -> ImagesSpec:
    # fields with metadata are filled in from the runs, not by a blueprint
    types = {entry.name: entry.type for entry in fields(ImagesSpec) if not entry.metadata}
    node.only(*types)
    values = {name: entry.typed(types[name]) for name, entry in node.items()}
    values.setdefault("source", key)
    for entry in fields(ImagesSpec):
        if entry.default is MISSING and entry.name not in values:
            raise node.error(f"{node.key} lacks {entry.name!r}")
    return ImagesSpec(**values)


def _without_paths(text: str, images: Mapping[str, ImagesSpec]) -> str:
    """The blueprint as it may be published: folders of this machine keep their last part only."""
    for spec in images.values():
        if spec.path:
            text = text.replace(spec.path, Path(spec.path).name)
    return text


def _id_part(name: str, value: object) -> str:
    if isinstance(value, bool):
        return name if value else f"no-{name}"
    # floats that agree to six digits give one id, which `_check_id` refuses
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return ID_PREFIXES.get(name, name) + (REGIMES[text] if name == "regime" else text)


def _check_id(run_id: str, run_ids: set[str], node: Located) -> None:
    if not RUN_ID.fullmatch(run_id):
        raise node.error(f"the run id {run_id!r} would not be safe as a file name")
    if run_id in run_ids:
        raise node.error(f"two combinations give the run id {run_id!r}: tell them apart by a factor")
    run_ids.add(run_id)


def _factor_types(runs: tuple[Run, ...]) -> dict[str, str]:
    return {name: FACTOR_KINDS[SETTING_TYPES[name.removeprefix("parent_")]] for run in runs for name in run.factors}
