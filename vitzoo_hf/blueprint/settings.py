"""Settings of a blueprint -> recipes, and for runs on a world their distribution and learner."""

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import TypeVar

from vitzoo_hf.blueprint.located_yaml import Located
from vitzoo_hf.blueprint.recipe import CHOICES, Recipe
from vitzoo_hf.blueprint.world import CHOICES as WORLD_CHOICES
from vitzoo_hf.blueprint.world import SHARES, Learner, World
from vitzoo_hf.format.messages import did_you_mean

Settings = tuple[Recipe, World | None, Learner | None]


def settings_of(node: Located) -> dict[str, object]:
    """The settings of a mapping, each of its type.

    Raises:
        ZooError: for one that is unknown, mistyped or out of range, naming its place.
    """
    # all names first: an unknown one is reported before a wrong value above it
    for name, value in node.items():
        known_setting(name, value)
    return {name: setting(name, value) for name, value in node.items()}


RECIPE_TYPES: dict[str, object] = {entry.name: entry.type for entry in fields(Recipe)}
WORLD_TYPES: dict[str, object] = {entry.name: entry.type for entry in fields(World)}
LEARNER_TYPES: dict[str, object] = {entry.name: entry.type for entry in fields(Learner)}
SETTING_TYPES = RECIPE_TYPES | WORLD_TYPES | LEARNER_TYPES
KNOWN = CHOICES | WORLD_CHOICES


def known_setting(name: str, node: Located) -> None:
    """Refuse a name that is no setting of a recipe, a world or a learner."""
    if name not in SETTING_TYPES:
        raise node.error(f"unknown setting or factor {name!r}: {did_you_mean(name, SETTING_TYPES)}")


def setting(name: str, node: Located) -> object:
    """The value of a setting, of its type and within its range."""
    value = node.typed(SETTING_TYPES[name])
    if name in KNOWN and value not in KNOWN[name]:
        raise node.error(f"unknown {name} {value!r}: {did_you_mean(str(value), KNOWN[name])}")
    # no setting has a meaning below 0; True and False are ints and pass
    if isinstance(value, float | int) and value < 0:
        raise node.error(f"{name} is {value}; it must not be negative")
    if name in POSITIVE and value == 0:
        raise node.error(f"{name} is 0; it must be positive")
    if name in ("label_smoothing", "random_erase", "momentum", *SHARES) and value > 1:
        raise node.error(f"{name} is {value}; it must lie between 0 and 1")
    return value


POSITIVE = (
    "lr",
    "batch_size",
    "temperature",
    "head_hidden",
    "projection_dim",
    "accumulate",
    "num_images",
    "clip_norm",
)


def built(stage: str, values: Mapping[str, object], is_world: bool, node: Located) -> Settings:
    """Recipe, and on a world its distribution and learner.

    Raises:
        ZooError: if their parts contradict each other, or settings of a world come without one.
    """
    recipe = _part(Recipe, RECIPE_TYPES, values)
    contradictions = recipe.contradictions(stage)
    world: World | None = None
    learner: Learner | None = None
    if is_world:
        world, learner = _part(World, WORLD_TYPES, values), _part(Learner, LEARNER_TYPES, values)
        contradictions |= world.contradictions | learner.contradictions(world, recipe.batch_size)
        contradictions |= _contradictions_with_worlds(recipe, learner)
    else:
        name = next((name for name in values if name not in RECIPE_TYPES), None)
        contradictions[f"{name} is a setting of worlds: set `world` of the images"] = name is not None
    for message, broken in contradictions.items():
        if broken:
            raise node.error(f"{message} (in the combination {dict(values)})")
    return recipe, world, learner


Part = TypeVar("Part", Recipe, World, Learner)


def _part(make: Callable[..., Part], types: Mapping[str, object], values: Mapping[str, object]) -> Part:
    # `setting` has compared every value with the type of its field
    return make(**{name: value for name, value in values.items() if name in types})


def _contradictions_with_worlds(recipe: Recipe, learner: Learner) -> dict[str, bool]:
    mixes = bool(recipe.mixup or recipe.cutmix or recipe.random_erase)
    plain = recipe.regime == "supervised" and recipe.precision == "float32" and recipe.accumulate == 1
    penalised = learner.learner in ("irm", "irm-product")
    return {
        "runs on a world are supervised, in float32, without mixing, erasing or accumulation": mixes or not plain,
        f"learner {learner.learner} takes labels as they are: drop label_smoothing": penalised
        and bool(recipe.label_smoothing),
    }
