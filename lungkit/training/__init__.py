"""Training: configuration, planning, the loop, checkpoints."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lungkit.training.config import (
    DataConfig,
    EngineConfig,
    InitConfig,
    LossConfig,
    ModelConfig,
    OptimiserConfig,
    TrainConfig,
)

if TYPE_CHECKING:
    from lungkit.checkpoint import Checkpoint, load_checkpoint
    from lungkit.training.config_io import load_config
    from lungkit.training.trainer import Trainer, TrainResult

_LAZY = {
    "Checkpoint": "lungkit.checkpoint",
    "load_checkpoint": "lungkit.checkpoint",
    "load_config": "lungkit.training.config_io",
    "Trainer": "lungkit.training.trainer",
    "TrainResult": "lungkit.training.trainer",
}

__all__ = [
    "Checkpoint",
    "DataConfig",
    "EngineConfig",
    "InitConfig",
    "LossConfig",
    "ModelConfig",
    "OptimiserConfig",
    "TrainConfig",
    "TrainResult",
    "Trainer",
    "load_checkpoint",
    "load_config",
]


def __getattr__(name: str) -> Any:
    # The trainer brings Fabric and matplotlib along; a configuration needs none of them.
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'lungkit.training' has no attribute {name!r}")
