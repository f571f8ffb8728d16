"""A tiny dataset and configurations that train on it in a second."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lungkit.data import write_phantom_dataset
from lungkit.training import DataConfig, EngineConfig, ModelConfig, OptimiserConfig, TrainConfig


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors this small gain nothing from threads, and other work on the machine would slow them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def phantom_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten phantom slices of 32 x 32."""
    return write_phantom_dataset(tmp_path_factory.mktemp("phantom"), cases=10, shape=(32, 32), dims=2)


@pytest.fixture(scope="session")
def cache_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache for all tests."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def tiny(phantom_root: Path, cache_root: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    """Factory of configurations: six epochs of two steps on the tiny phantom; keywords replace options."""

    def build(**options: Any) -> TrainConfig:
        config = TrainConfig(
            data=DataConfig(root=str(phantom_root), cache=str(cache_root), patch_size=(16, 16)),
            model=ModelConfig(name="attention-unet", features=(4, 8)),
            optimiser=OptimiserConfig(warmup_steps=3),
            engine=EngineConfig(accelerator="cpu"),
            epochs=6,
            steps_per_epoch=2,
            batch_size=2,
            runs=str(tmp_path / "runs"),
            name="run",
        )
        for name, value in options.items():
            part, _, field = name.partition("__")
            config = replace(
                config, **{part: replace(getattr(config, part), **{field: value}) if field else value}
            )
        return config

    return build
