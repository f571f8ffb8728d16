"""The CuPy path of the surface distances: its data flow on the CPU with scipy in CuPy's place, and on a GPU."""

from __future__ import annotations

import logging
import sys
from contextlib import nullcontext
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import ndimage

from lungkit.metrics import _surface_cuda, label_surface_distances


@pytest.fixture
def scipy_as_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    def transform(mask: np.ndarray, *, sampling: list[float], float64_distances: bool) -> np.ndarray:
        return ndimage.distance_transform_edt(mask, sampling=sampling)

    modules = {
        "cupy": SimpleNamespace(from_dlpack=np.from_dlpack, cuda=SimpleNamespace(Device=nullcontext)),
        "cupyx": ModuleType("cupyx"),
        "cupyx.scipy": ModuleType("cupyx.scipy"),
        "cupyx.scipy.ndimage": SimpleNamespace(distance_transform_edt=transform),
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)


def label_maps(shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple((torch.rand(shape, generator=generator) * 3).to(torch.uint8) for _ in range(2))


@pytest.mark.parametrize("shape", [(7, 9), (1, 12), (5, 6, 7), (1, 8, 8)])
def test_equal_to_the_cpu(scipy_as_cupy: None, shape: tuple[int, ...]) -> None:
    prediction, truth = label_maps(shape)
    spacing = (2.5, 0.8, 0.7)[-len(shape) :]
    ours = _surface_cuda.surface_distances(prediction, truth, labels=(1, 2, 9), spacing_mm=spacing)
    expected = label_surface_distances(prediction, truth, labels=(1, 2, 9), spacing_mm=spacing)
    for (first, second), sets in zip(ours, expected, strict=True):
        np.testing.assert_allclose(first, sets.prediction_to_truth, atol=1e-4)
        np.testing.assert_allclose(second, sets.truth_to_prediction, atol=1e-4)


def test_empty_side_is_infinitely_far(scipy_as_cupy: None) -> None:
    mask = torch.ones(2, 3, dtype=torch.uint8)
    ((first, second),) = _surface_cuda.surface_distances(mask, mask * 0, labels=(1,), spacing_mm=(1.0, 1.0))
    assert np.isinf(first).all()
    assert len(second) == 0


def test_missing_cupy_is_said_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(_surface_cuda.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(logging.getLogger("lungkit"), "propagate", True)
    _surface_cuda.is_available.cache_clear()
    try:
        assert not _surface_cuda.is_available()
        assert not _surface_cuda.is_available()
    finally:
        _surface_cuda.is_available.cache_clear()
    # A record may reach caplog through the logger and through its parent: count records, not arrivals.
    assert len({id(record) for record in caplog.records if "CuPy" in record.message}) == 1


@pytest.mark.cuda
def test_cuda_tensors_give_the_cpus_distances() -> None:
    prediction, truth = label_maps((20, 30, 40))
    expected = label_surface_distances(prediction, truth, labels=(1, 2), spacing_mm=(2.5, 0.8, 0.8))
    found = label_surface_distances(
        prediction.cuda(), truth.cuda(), labels=(1, 2), spacing_mm=(2.5, 0.8, 0.8)
    )
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(
            np.sort(ours.prediction_to_truth), np.sort(theirs.prediction_to_truth), atol=1e-4
        )
