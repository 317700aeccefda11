"""The arguments of a row's architecture: a JSON object of plain values, none larger than its weights allow."""

import re
from collections.abc import Mapping
from typing import Any

from vitzoo_hf.format.gate.values import Field, parse_json, shown
from vitzoo_hf.format.schema import ZooError

LONGEST_ARGS = 20_000
INTEGERS = ("depth", "embed_dim", "num_heads", "num_classes", "in_chans", "reg_tokens", "pre_patch_size")
POSITIVE = ("depth", "embed_dim", "num_heads", "num_classes", "in_chans")
SIZES = ("img_size", "patch_size")
NUMBERS = ("mlp_ratio", "drop_rate", "attn_drop_rate", "drop_path_rate", "proj_drop_rate", "pos_drop_rate")
LAYERS = re.compile("depth|layer|block|stage")
"""In the name of an argument that counts parts of the network."""
LARGEST_IMAGE = 100_000
MOST_LAYERS = 1_000
"""Bound of such an argument where only the number of weights is known."""


def parse_args(text: object, what: str = "architecture_args") -> dict[str, Any]:
    """Parse `architecture_args`.

    Args:
        text: the value of the column.
        what: where it stands, for messages.

    Raises:
        ZooError: for anything but a JSON object of texts, numbers, truth values, null and lists of numbers.
    """
    expected = "expected a JSON object"
    if not isinstance(text, str) or len(text) > LONGEST_ARGS:
        raise ZooError(f"{what} is {shown(text)}; {expected}")
    try:
        args = parse_json(text, what, most_values=LONGEST_ARGS)
    except ZooError:
        raise ZooError(f"{what} is {shown(text)}; {expected}") from None
    if not isinstance(args, dict):
        raise ZooError(f"{what} is {shown(text)}; {expected}")
    for name, field in Field(args, what).entries().items():
        _check_type(name, field)
    return args


def _check_type(name: str, field: Field) -> None:
    value = field.value
    if name in INTEGERS and type(value) is not int:
        raise _refused(field, "an integer")
    if name in NUMBERS and type(value) not in (int, float):
        raise _refused(field, "a number")
    if name in SIZES and not (type(value) is int or _is_pair(value)):
        raise _refused(field, "an integer, or two")
    if isinstance(value, list):
        plain = all(type(entry) in (int, float, bool, str) for entry in value)
    else:
        plain = value is None or isinstance(value, str | int | float)
    # what no network takes: objects, and lists in lists
    if not plain:
        raise _refused(field, "text, a number, true, false, null, or a list of these")


def _is_pair(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(entry) is int for entry in value)


def _refused(field: Field, expected: str) -> ZooError:
    return ZooError(f"{field.file}: `{field.place}` is {shown(field.value)}; expected {expected}")


def check_size(args: Mapping[str, Any], what: str, *, num_parameters: int, tensors: int | None = None) -> None:
    """Refuse arguments that no network of this many weights has, before anything is built.

    Args:
        args: from `parse_args`.
        what: where they stand, for messages.
        num_parameters: D, the length of the weights.
        tensors: number of tensors in the layout, where it is known.

    Raises:
        ZooError: if an integer is too small, or larger than the weights can have of it.
    """
    for name, value in args.items():
        for number in value if isinstance(value, list) else [value]:
            if type(number) is not int:
                continue
            low = 1 if name in (*POSITIVE, *SIZES) else -1
            most = LARGEST_IMAGE if name in SIZES else max(num_parameters, 0)
            if LAYERS.search(name):
                most = min(num_parameters, MOST_LAYERS if tensors is None else tensors)
            elif name not in (*INTEGERS, *SIZES):
                # other settings, such as a seed or an offset, are bounded only in kind
                most = max(most, LARGEST_IMAGE)
            if not low <= number <= most:
                raise ZooError(
                    f"{what}: `{name}` is {shown(number)}; a network of {num_parameters} weights"
                    f"{'' if tensors is None else f' in {tensors} tensors'} has {low} to {most}"
                )
