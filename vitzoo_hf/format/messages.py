"""Words that error messages share."""

import difflib
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


def counted(count: int, one: str, many: str) -> str:
    """A number of things in words.

    >>> counted(1, "tree", "trees"), counted(2, "tree", "trees")
    ('1 tree', '2 trees')
    """
    return f"{count} {one if count == 1 else many}"


REPAIR = "pack the zoo again, or download this file again"


def one_line(error: BaseException) -> str:
    """The message of an error on one line, cut to 200 characters."""
    return " ".join((str(error) or type(error).__name__).split())[:200]


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """A hint to append to an error: the closest known name, else all of them.

    >>> did_you_mean("factor_lrr", ["factor_lr", "factor_seed"])
    "did you mean 'factor_lr'?"
    >>> did_you_mean("lr", ["factor_lr", "factor_seed"])
    "did you mean 'factor_lr'?"
    >>> did_you_mean("x", ["factor_lr", "factor_seed"])
    'expected one of: factor_lr, factor_seed'
    """
    names = [str(name) for name in known]
    holding = [name for name in names if len(given) > 1 and f"_{given}" in f"_{name}"]
    close = holding or difflib.get_close_matches(given, names[:10_000], n=1)  # 1 s; a zoo may have a million
    if close:
        return f"did you mean {close[0]!r}?"
    shown = ", ".join(names[:12]) + (f", … ({len(names)} in all)" if len(names) > 12 else "")
    return f"expected one of: {shown}"


def describe(tensor: object) -> str:
    """Type and shape, for messages."""
    import torch

    if not isinstance(tensor, torch.Tensor):
        return f"of type {type(tensor).__module__}.{type(tensor).__name__}, not torch.Tensor"
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
