"""Import timm, also beside a CPU build of torch whose torchvision wheel is a CUDA build."""

import sys
import threading
from types import ModuleType

import torch

_declared_operators: list[torch.library.Library] = []
_importing = threading.RLock()


def import_timm() -> ModuleType:
    """Import timm, also beside a CPU build of torch whose torchvision wheel is a CUDA build.

    Such a torchvision cannot load its compiled operators and raises `operator torchvision::nms does not exist`
    while registering their fake kernels. Declaring the two missing schemas first lets it load; the operators
    themselves stay unusable, and a ViT calls neither. See `needs_operator_schemas` for when this is done.
    """
    with _importing:
        if needs_operator_schemas():
            declare_operator_schemas()
        import timm

        return timm


def needs_operator_schemas() -> bool:
    """Whether torchvision is about to fail for want of its compiled operators.

    True only if torch is a CPU build, torchvision is not imported yet, and its extension library does not load.
    A working torchvision, on any machine, is never touched.
    """
    if torch.version.cuda is not None or torch.version.hip is not None:
        return False
    if "torchvision" in sys.modules or _declared_operators:
        return False
    return not _torchvision_extension_loads()


def _torchvision_extension_loads() -> bool:
    import importlib.util
    from pathlib import Path

    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return True
    libraries = sorted(Path(spec.origin).parent.glob("_C*.so")) + sorted(Path(spec.origin).parent.glob("_C*.pyd"))
    try:
        for library in libraries:
            torch.ops.load_library(str(library))
    except OSError:
        return False
    return True


def declare_operator_schemas() -> None:
    """Declare `torchvision::nms` and `torchvision::qnms` so that a torchvision without operators can load."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _declared_operators.append(library)
