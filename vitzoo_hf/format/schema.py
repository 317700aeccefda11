"""What a row is: columns and their Hugging Face types, the configs of a published zoo, the format version.

A **row** is one checkpoint: one run at one epoch. Scalars come first, the flat weights last. This module
knows names and types only; it reads and writes nothing, and imports neither torch nor timm.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import datasets

VERSION = "0.1.0"
FORMAT_VERSION = 1
"""A reader of format N opens every format up to N and refuses a newer one."""
STAGES = ("pretrain", "finetune")
HEADS = ("linear", "mlp")
SPLITS = ("train", "validation", "test")
CONFIGS = ("weights", "index", "evaluations", "pairs", "probes")
MANIFEST = "zoo.json"
LAYOUTS = "layouts.json"
SHARDS = "shards.json"
CARD = "README.md"
LIST_LIMIT = 250_000
"""Up to this many parameters `weights` is a list of float32; above, raw little-endian bytes."""
FACTOR_TYPES = {"string": "string", "float": "float64", "int": "int64", "bool": "bool"}
ID_CHARACTERS = "A-Za-z0-9._=+-"
"""What run ids are made of, as in a regular expression: safe in a file name on every system and in a URL."""
RUN_ID = re.compile(f"[A-Za-z0-9][{ID_CHARACTERS}]*")
MODEL_ID = re.compile(f"{RUN_ID.pattern}@[0-9]+")


class ZooError(ValueError):
    """A mistake or damage the user can act on: what was given, what was expected, what to do, in one line."""


class MissingFileError(ZooError):
    """A file that every zoo has is not there, while the folder or dataset is."""


def model_id(run_id: str, epoch: int) -> str:
    """The id of a row.

    >>> model_id("sl-s42--adamw-lr0.003-linear-s42", 20)
    'sl-s42--adamw-lr0.003-linear-s42@20'
    """
    return f"{run_id}@{epoch}"


def safe_id(text: str, filler: str = "-") -> str:
    """Text with `filler` in place of characters that a run id cannot have.

    >>> safe_id("lr 0.1/seed 2")
    'lr-0.1-seed-2'
    """
    return re.sub(f"[^{ID_CHARACTERS}]+", filler, text)


def weights_sha256(vector: Any) -> str:
    """SHA-256 of a flat vector's little-endian float32 bytes, as hexadecimal.

    Args:
        vector: anything `numpy.asarray` turns into a one-dimensional float32 array, `[D]`.

    >>> import numpy as np
    >>> weights_sha256(np.zeros(2, np.float32))[:12]
    'af5570f5a181'
    """
    import numpy as np

    return hashlib.sha256(np.ascontiguousarray(vector, dtype="<f4").data).hexdigest()


def row_features(factors: Mapping[str, str], *, weights: str | None = "list") -> "datasets.Features":
    """The Hugging Face `Features` of the `weights` config, or of `index` with `weights=None`.

    Args:
        factors: generating factor -> one of `string`, `float`, `int`, `bool`, without the `factor_` prefix.
        weights: `list` (float32 list), `binary` (raw little-endian bytes) or None (no weights: `index`).

    >>> list(row_features({"lr": "float"}, weights=None))[:4]
    ['model_id', 'run_id', 'parent_id', 'stage']
    """
    from datasets import ClassLabel, Features, List, Value

    columns: dict[str, Any] = {
        "model_id": Value("string"),
        "run_id": Value("string"),
        "parent_id": Value("string"),
        "stage": ClassLabel(names=list(STAGES)),
        "epoch": Value("int32"),
        "is_final": Value("bool"),
        "dataset": Value("string"),
        "architecture": Value("string"),
        "architecture_args": Value("string"),
    }
    columns |= {"head": ClassLabel(names=list(HEADS)), "head_hidden": Value("int32")}
    columns |= {f"factor_{name}": Value(FACTOR_TYPES[kind]) for name, kind in factors.items()}
    columns |= {name: Value("float32") for name in RESULTS}
    columns |= {
        "num_parameters": Value("int64"),
        "layout": Value("string"),
        "weights_sha256": Value("string"),
        "dtype": Value("string"),
        "provenance": Value("string"),
    }
    if weights == "list":
        columns["weights"] = List(Value("float32"))
    elif weights == "binary":
        columns["weights"] = Value("binary")
    return Features(columns)


RESULTS = ("train_loss", "train_accuracy", "test_loss", "test_accuracy", "generalization_gap")


def evaluation_features(factors: Mapping[str, str]) -> "datasets.Features":
    """`Features` of the `evaluations` config: one row a model, metrics recomputed from its weights."""
    from datasets import ClassLabel, Features, Value

    columns: dict[str, Any] = {
        "model_id": Value("string"),
        "run_id": Value("string"),
        "parent_id": Value("string"),
        "stage": ClassLabel(names=list(STAGES)),
        "epoch": Value("int32"),
        "is_final": Value("bool"),
        "head": ClassLabel(names=list(HEADS)),
        "dataset": Value("string"),
    }
    columns |= {f"factor_{name}": Value(FACTOR_TYPES[kind]) for name, kind in factors.items()}
    columns |= {name: Value("float64") for name in EVALUATIONS}
    columns |= {"num_selection_images": Value("int32"), "num_test_images": Value("int32")}
    return Features(columns)


EVALUATIONS = (
    "selection_loss",
    "selection_accuracy",
    "test_loss",
    "test_accuracy",
    "test_top5_accuracy",
    "test_ece",
    "test_brier",
    "test_entropy",
)


def pair_features() -> "datasets.Features":
    """`Features` of the `pairs` config: one row a pair of final models, `model_a` before `model_b` in the zoo."""
    from datasets import Features, Value

    columns: dict[str, Any] = {"model_a": Value("string"), "model_b": Value("string")}
    columns |= {"same_parent": Value("bool"), "same_head": Value("bool"), "dataset": Value("string")}
    columns |= {name: Value("float64") for name in PAIR_METRICS}
    return Features(columns)


PAIR_METRICS = (
    "agreement",
    "cohen_kappa",
    "error_consistency",
    "error_overlap",
    "jensen_shannon",
    "cka",
    "cka_biased",
    "weight_l2",
    "weight_l2_normalized",
    "weight_cosine",
)
DISTANCES = ("jensen_shannon", "weight_l2", "weight_l2_normalized")
"""Pair metrics that are 0, not 1, for a model and itself."""


def probe_features() -> "datasets.Features":
    """`Features` of the `probes` config: the held-out images exactly as the models are fed them, as lossless PNG."""
    from datasets import Features, Image, Value

    return Features(
        {"dataset": Value("string"), "position": Value("int64"), "label": Value("int64"), "image": Image()}
    )


def split_of(run_id: str, group: str, *, fractions: Mapping[str, float], seed: int) -> str:
    """The split of a run, from a hash of its group alone: adding runs to a zoo never moves the others.

    Args:
        run_id: the run, named in the error.
        group: what must stay together: the run itself, or the root of its lineage.
        fractions: split -> share of the groups; shares sum to 1.
        seed: changes every assignment.

    Raises:
        ZooError: if the shares do not sum to 1.
    """
    if abs(sum(fractions.values()) - 1) > 1e-9:
        raise ZooError(f"split shares of run {run_id!r} sum to {sum(fractions.values())}; they must sum to 1")
    digest = hashlib.sha256(f"{seed}:{group}".encode()).digest()
    position = int.from_bytes(digest[:8], "big") / 2**64
    for split, share in fractions.items():
        if position < share:
            return split
        position -= share
    return list(fractions)[-1]


def union_find(pairs: Iterable[tuple[str, str]], key: Callable[[str], Any] | None = None) -> dict[str, str]:
    """Connected components, such as the runs that `parent_id` connects: name -> the least name of its component.

    Args:
        pairs: two connected names each; a name that is connected to nothing can be paired with itself.
        key: order of the names; by default alphabetical.

    >>> union_find([("a", "b"), ("c", "b"), ("d", "d")])
    {'a': 'a', 'b': 'a', 'c': 'a', 'd': 'd'}
    """
    leaders: dict[str, str] = {}

    def leader_of(name: str) -> str:
        while leaders.setdefault(name, name) != name:
            # path halving: without it a long chain of parents takes quadratic time
            leaders[name] = leaders[leaders[name]]
            name = leaders[name]
        return name

    for pair in pairs:
        first, second = sorted(map(leader_of, pair), key=key)
        leaders[second] = first
    return {name: leader_of(name) for name in leaders}


def canonical_json(value: object) -> str:
    """JSON with sorted keys and no white space: equal values give equal text, so it can be hashed.

    >>> canonical_json({"b": 1, "a": [1, 2]})
    '{"a":[1,2],"b":1}'
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def fingerprint(value: object, length: int = 16) -> str:
    """The first `length` hexadecimal digits of the SHA-256 of `canonical_json(value)`."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:length]
