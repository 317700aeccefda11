"""Populations of vision transformers as a Hugging Face dataset.

Importing this package loads neither torch nor timm: each public name is imported when it is first used.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from vitzoo_hf import schema

if TYPE_CHECKING:
    from vitzoo_hf.behavior import accuracy as accuracy
    from vitzoo_hf.behavior import agreement as agreement
    from vitzoo_hf.behavior import cross_entropy as cross_entropy
    from vitzoo_hf.behavior import expected_calibration_error as expected_calibration_error
    from vitzoo_hf.behavior import predictions as predictions
    from vitzoo_hf.blueprint import Blueprint as Blueprint
    from vitzoo_hf.cka import cka as cka
    from vitzoo_hf.evaluate import evaluate as evaluate
    from vitzoo_hf.flatten import Layout as Layout
    from vitzoo_hf.flatten import flatten as flatten
    from vitzoo_hf.flatten import unflatten as unflatten
    from vitzoo_hf.population import Population as Population
    from vitzoo_hf.rebuild import reconstruct as reconstruct
    from vitzoo_hf.rebuild import weights_of as weights_of
    from vitzoo_hf.schema import ZooError as ZooError
    from vitzoo_hf.spectra import singular_values as singular_values
    from vitzoo_hf.spectra import stable_rank as stable_rank
    from vitzoo_hf.verify import verify as verify
    from vitzoo_hf.weight_metrics import zoo_task_vectors as zoo_task_vectors
    from vitzoo_hf.weight_metrics import zoo_weight_metrics as zoo_weight_metrics
    from vitzoo_hf.weight_statistics import weight_quantiles as weight_quantiles
    from vitzoo_hf.weight_statistics import weight_statistics as weight_statistics
    from vitzoo_hf.weightspace import cosine_similarity as cosine_similarity
    from vitzoo_hf.weightspace import part_distances as part_distances
    from vitzoo_hf.weightspace import task_vectors as task_vectors
    from vitzoo_hf.weightspace import weight_distances as weight_distances
    from vitzoo_hf.zoo import Zoo as Zoo

__version__ = schema.VERSION

_PUBLIC = {
    "Blueprint": "blueprint",
    "Layout": "flatten",
    "Population": "population",
    "Zoo": "zoo",
    "ZooError": "schema",
    "accuracy": "behavior",
    "agreement": "behavior",
    "cka": "cka",
    "cosine_similarity": "weightspace",
    "cross_entropy": "behavior",
    "evaluate": "evaluate",
    "expected_calibration_error": "behavior",
    "flatten": "flatten",
    "part_distances": "weightspace",
    "predictions": "behavior",
    "reconstruct": "rebuild",
    "singular_values": "spectra",
    "stable_rank": "spectra",
    "task_vectors": "weightspace",
    "unflatten": "flatten",
    "verify": "verify",
    "weight_distances": "weightspace",
    "weight_quantiles": "weight_statistics",
    "weight_statistics": "weight_statistics",
    "weights_of": "rebuild",
    "zoo_task_vectors": "weight_metrics",
    "zoo_weight_metrics": "weight_metrics",
}

__all__ = ["__version__", *sorted(_PUBLIC)]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(__all__) | set(globals()))


class _Package(ModuleType):
    """Keeps `vitzoo_hf.cka` and its like the function, although a module of the same name is imported too."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _PUBLIC and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
