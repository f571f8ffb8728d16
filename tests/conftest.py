"""Fixtures that every test folder shares."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real CT (see README, "Real data in the tests"); tests that need it skip where it is absent."""
    root = os.environ.get("LUNGKIT_TEST_DATA")
    folder = Path(root) if root else Path(__file__).resolve().parents[2] / "shared" / "data"
    if not (folder / "lidc_nodules").is_dir():
        pytest.skip(f"no real CT at {folder}: set LUNGKIT_TEST_DATA to a folder that holds lidc_nodules and nsclc_ct")
    return folder
