"""A tiny dataset and the options of a run of seconds, for the tests of lungkit-train."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from lungkit.data import write_phantom_dataset


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors gain nothing from threads and lose much to a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five slices of 48 x 48 pixels; not to be changed by a test."""
    return write_phantom_dataset(
        tmp_path_factory.mktemp("phantoms") / "tiny", cases=5, shape=(1, 48, 48), dims=2
    )


@pytest.fixture
def dataset(phantoms: Path, tmp_path: Path) -> Path:
    """A copy of the phantoms to damage."""
    return Path(shutil.copytree(phantoms, tmp_path / "scans"))


@pytest.fixture(scope="session")
def session_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def options(phantoms: Path, session_cache: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """Command line of a small run into ``tmp_path / "runs"``; further options are appended."""

    def build(*more: object, data: Path = phantoms) -> list[str]:
        fixed = {
            "data": data,
            "data.cache": session_cache,
            "data.patch_size": "[16, 16]",
            "runs": tmp_path / "runs",
            "name": "run",
            "model": "unet",
            "model.features": "[4, 8]",
            "epochs": 1,
            "steps_per_epoch": 2,
            "batch_size": 2,
            "engine.accelerator": "cpu",
        }
        return [*(f"--{name}={value}" for name, value in fixed.items()), *map(str, more)]

    return build
