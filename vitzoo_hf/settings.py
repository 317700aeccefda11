"""Settings of a blueprint -> recipes, and for runs on a world their distribution and learner."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from vitzoo_hf.located_yaml import Located
from vitzoo_hf.recipe import CHOICES, Recipe
from vitzoo_hf.schema import did_you_mean
from vitzoo_hf.world import CHOICES as WORLD_CHOICES
from vitzoo_hf.world import SHARES, Learner, World

Settings = tuple[Recipe, World | None, Learner | None]


def settings_of(node: Located) -> dict[str, Any]:
    """The settings of a mapping, each of its type.

    Raises:
        ZooError: for one that is unknown, mistyped or out of range, naming its place.
    """
    for name, value in node.items():
        known_setting(name, value)
    return {name: setting(name, value) for name, value in node.items()}


RECIPE_TYPES: dict[str, Any] = {entry.name: entry.type for entry in fields(Recipe)}
WORLD_TYPES: dict[str, Any] = {entry.name: entry.type for entry in (*fields(World), *fields(Learner))}
SETTING_TYPES = RECIPE_TYPES | WORLD_TYPES
KNOWN = CHOICES | WORLD_CHOICES


def known_setting(name: str, node: Located) -> None:
    """Refuse what is no setting of a recipe, a world or a learner."""
    if name not in SETTING_TYPES:
        raise node.error(f"unknown setting or factor {name!r}: {did_you_mean(name, SETTING_TYPES)}")


def setting(name: str, node: Located) -> Any:
    """The value of a setting, of its type and within its range."""
    value = node.typed(SETTING_TYPES[name])
    if name in KNOWN and value not in KNOWN[name]:
        raise node.error(f"unknown {name} {value!r}: {did_you_mean(str(value), KNOWN[name])}")
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
)


def built(stage: str, values: Mapping[str, Any], is_world: bool, node: Located) -> Settings:
    """Recipe, and on a world its distribution and learner, refused if their parts contradict each other."""
    recipe, world, learner = (
        kind(**{entry.name: values[entry.name] for entry in fields(kind) if entry.name in values})
        for kind in (Recipe, World, Learner)
    )
    of_worlds = [name for name in values if name in WORLD_TYPES]
    contradictions = recipe.contradictions(stage) | {
        f"{of_worlds[0] if of_worlds else ''} is a setting of worlds: set `world` of the images": not is_world
        and bool(of_worlds)
    }
    if is_world:
        contradictions |= world.contradictions | learner.contradictions(world, recipe.batch_size)
        contradictions["runs on a world are supervised, in float32, without mixing, erasing or accumulation"] = (
            recipe.regime != "supervised"
            or recipe.precision != "float32"
            or recipe.accumulate > 1
            or bool(recipe.mixup or recipe.cutmix or recipe.random_erase)
        )
    for message, broken in contradictions.items():
        if broken:
            raise node.error(f"{message} (in the combination {dict(values)})")
    return (recipe, world, learner) if is_world else (recipe, None, None)
