"""The routes to the kernels under test: what a device changes in place is changed here."""

from __future__ import annotations

import op_kernels
import pytest
import torch
from op_kernels import device_op
from torch import Tensor

from lungkit.ops.norm_act import norm_act


def _elsewhere(tensor: Tensor) -> Tensor:
    """A copy with its own memory, strides and gaps, in place of one on a device."""
    storage = tensor.untyped_storage().clone()
    return torch.empty(0, dtype=tensor.dtype).set_(
        storage, tensor.storage_offset(), tensor.shape, tensor.stride()
    )


def test_an_op_in_place_changes_the_tensor_that_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op_kernels, "_moved", _elsewhere)
    base = torch.randn(2, 6, 5, 4, generator=torch.Generator().manual_seed(0))
    kept, expected = base.clone(), norm_act(base[:, 2:5])
    assert device_op("norm_act_")(base[:, 2:5], None, None, None, 3, 1e-5, 1.0) is None
    assert torch.equal(base[:, 2:5], expected)
    assert torch.equal(base[:, :2], kept[:, :2])


def test_the_results_of_an_op_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op_kernels, "_moved", _elsewhere)
    x = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(0))
    y, mean, rstd = device_op("norm_act")(x, None, None, None, 3, 1e-5, 1.0)
    assert torch.equal(y, norm_act(x))
    assert mean.shape == rstd.shape == (2, 3)
