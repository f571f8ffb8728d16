"""Fixtures that every test folder shares."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real CT (see docs/installation.md, "Tests"); tests that need it skip where it is absent."""
    root = os.environ.get("LUNGKIT_TEST_DATA")
    folder = Path(root) if root else Path(__file__).resolve().parents[2] / "shared" / "data"
    if not (folder / "lidc_nodules").is_dir():
        pytest.skip(
            f"no real CT at {folder}: set LUNGKIT_TEST_DATA to a folder that holds lidc_nodules and nsclc_ct"
        )
    return folder


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that the test saves, as they were saved, to look into; tests/pictures.py reads them."""
    from matplotlib.figure import Figure

    saved: list[Figure] = []
    save = Figure.savefig

    def keep(figure: Figure, *arguments: Any, **options: Any) -> None:
        save(figure, *arguments, **options)
        saved.append(figure)

    monkeypatch.setattr(Figure, "savefig", keep)
    return saved


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked ``slow`` where nobody asks for them, and ``cuda`` where there is no device; say so."""
    if not os.environ.get("LUNGKIT_SLOW_TESTS"):
        slow = pytest.mark.skip(reason="takes minutes; run with LUNGKIT_SLOW_TESTS=1")
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(slow)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device here; the same kernels are tested on the emulator")
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(skip)
