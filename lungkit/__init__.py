"""lungkit: segmentation of lung tumours in CT, with fused native kernels under a small PyTorch library."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_SUBPACKAGES = (
    "data",
    "experiments",
    "inference",
    "losses",
    "metrics",
    "nn",
    "ops",
    "pipeline",
    "report",
    "training",
)
_HOMES = {
    "Predictor": "lungkit.inference",
    "dice_ce_loss": "lungkit.ops.dice_ce",
    "keep_freed_memory": "lungkit._allocator",
}

__all__ = ["__version__", *_SUBPACKAGES, *_HOMES]


def __getattr__(name: str) -> Any:
    # Subpackages load on first use, so that `import lungkit` costs neither nibabel, Fabric nor matplotlib.
    if name in _SUBPACKAGES:
        return importlib.import_module(f"lungkit.{name}")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'lungkit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
