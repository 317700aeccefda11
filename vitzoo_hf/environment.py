"""What this machine is: Python, packages, cores, memory, devices."""

import importlib.metadata
import os
import platform
from typing import Any

PACKAGES = ("vitzoo-hf", "torch", "torchvision", "timm", "datasets", "huggingface-hub", "pyarrow", "numpy")


def describe() -> dict[str, Any]:
    """Facts for a bug report or a results file; no host name and no path."""
    import torch

    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": default_workers("cpu"),
    }
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        facts["memory_gb"] = round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1)
    for package in PACKAGES:
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            facts[package] = "not installed"
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    facts["cuda_devices"] = devices or "none"
    return facts


def default_workers(device: str) -> int:
    """One process a core this process may use; one for a CUDA device."""
    if device.startswith("cuda"):
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
