"""Fixtures that every test folder shares."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real CT (see README, "Real data in the tests"); tests that need it skip where it is absent."""
    root = os.environ.get("LUNGKIT_TEST_DATA")
    folder = Path(root) if root else Path(__file__).resolve().parents[2] / "shared" / "data"
    if not (folder / "lidc_nodules").is_dir():
        pytest.skip(
            f"no real CT at {folder}: set LUNGKIT_TEST_DATA to a folder that holds lidc_nodules and nsclc_ct"
        )
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked ``cuda`` where there is no device, and say so."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device here; the same kernels are tested on the emulator")
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(skip)
