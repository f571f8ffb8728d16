"""Training: configuration, planning, the loop, checkpoints."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lungkit.training.config import (
    DataConfig,
    EngineConfig,
    LossConfig,
    ModelConfig,
    OptimiserConfig,
    TrainConfig,
)

if TYPE_CHECKING:
    from lungkit.training.checkpoint import Checkpoint, load_checkpoint
    from lungkit.training.config_io import load_config
    from lungkit.training.trainer import Trainer, TrainResult

_LAZY = {
    "Checkpoint": "checkpoint",
    "load_checkpoint": "checkpoint",
    "load_config": "config_io",
    "Trainer": "trainer",
    "TrainResult": "trainer",
}

__all__ = [
    "Checkpoint",
    "DataConfig",
    "EngineConfig",
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
    # The trainer brings Fabric, jsonargparse and matplotlib along; a configuration needs none of them.
    if name in _LAZY:
        return getattr(importlib.import_module(f"lungkit.training.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'lungkit.training' has no attribute {name!r}")
