"""Populations of vision transformers as a Hugging Face dataset.

Importing this package loads neither torch nor timm: each public name is imported when it is first used.
"""

import ast
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from vitzoo_hf.format import schema

if TYPE_CHECKING:
    from vitzoo_hf.blueprint.blueprint import Blueprint as Blueprint
    from vitzoo_hf.evaluation.evaluate import evaluate as evaluate
    from vitzoo_hf.evaluation.weight_metrics import zoo_task_vectors as zoo_task_vectors
    from vitzoo_hf.evaluation.weight_metrics import zoo_weight_metrics as zoo_weight_metrics
    from vitzoo_hf.format.layout import Layout as Layout
    from vitzoo_hf.format.layout import flatten as flatten
    from vitzoo_hf.format.layout import unflatten as unflatten
    from vitzoo_hf.format.schema import ZooError as ZooError
    from vitzoo_hf.metrics.agreement import agreement as agreement
    from vitzoo_hf.metrics.agreement import cohen_kappa as cohen_kappa
    from vitzoo_hf.metrics.agreement import error_consistency as error_consistency
    from vitzoo_hf.metrics.agreement import error_overlap as error_overlap
    from vitzoo_hf.metrics.agreement import jensen_shannon as jensen_shannon
    from vitzoo_hf.metrics.behavior import accuracy as accuracy
    from vitzoo_hf.metrics.behavior import brier_score as brier_score
    from vitzoo_hf.metrics.behavior import class_accuracy as class_accuracy
    from vitzoo_hf.metrics.behavior import cross_entropy as cross_entropy
    from vitzoo_hf.metrics.behavior import expected_calibration_error as expected_calibration_error
    from vitzoo_hf.metrics.behavior import prediction_entropy as prediction_entropy
    from vitzoo_hf.metrics.behavior import predictions as predictions
    from vitzoo_hf.metrics.cka import MinibatchCKA as MinibatchCKA
    from vitzoo_hf.metrics.cka import cka as cka
    from vitzoo_hf.metrics.cka import cka_between as cka_between
    from vitzoo_hf.metrics.features import FeatureFile as FeatureFile
    from vitzoo_hf.metrics.weight_distances import cosine_similarity as cosine_similarity
    from vitzoo_hf.metrics.weight_distances import part_distances as part_distances
    from vitzoo_hf.metrics.weight_distances import task_vectors as task_vectors
    from vitzoo_hf.metrics.weight_distances import weight_distances as weight_distances
    from vitzoo_hf.metrics.weight_statistics import singular_values as singular_values
    from vitzoo_hf.metrics.weight_statistics import stable_rank as stable_rank
    from vitzoo_hf.metrics.weight_statistics import weight_quantiles as weight_quantiles
    from vitzoo_hf.metrics.weight_statistics import weight_statistics as weight_statistics
    from vitzoo_hf.models.population import Population as Population
    from vitzoo_hf.models.rebuild import reconstruct as reconstruct
    from vitzoo_hf.models.rebuild import weights_of as weights_of
    from vitzoo_hf.zoo import Zoo as Zoo
    from vitzoo_hf.zoo.verify import verify as verify

__version__ = schema.VERSION


def _modules_by_name() -> dict[str, str]:
    """Public name -> its module, read from the imports above, so that the list stands once."""
    tree = ast.parse(Path(__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    return {alias.name: node.module or "" for node in imports for alias in node.names}


_MODULES = _modules_by_name()

__all__ = ["__version__", *sorted(_MODULES)]


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(__all__) | set(globals()))
