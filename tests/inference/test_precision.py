"""Which number format a device gets."""

from __future__ import annotations

import pytest
import torch

from lungkit.inference import precision


@pytest.mark.parametrize(
    ("device", "recorded", "has_bf16", "chosen"),
    [
        ("cpu", "fp32", True, "fp32"),
        ("cpu", "bf16", True, "bf16"),
        ("cpu", "bf16", False, "fp32"),
        ("cpu", "fp16", False, "fp32"),
        ("cpu", None, True, "bf16"),
        ("cuda", "fp32", True, "fp32"),
        ("cuda", "fp16", True, "fp16"),
        ("cuda", "bf16", True, "bf16"),
        ("cuda", "bf16", False, "fp16"),
        ("cuda", None, False, "fp16"),
        ("mps", "bf16", True, "fp32"),
    ],
)
def test_the_recorded_format_is_used_where_the_device_has_it(monkeypatch, device, recorded, has_bf16, chosen):
    monkeypatch.setattr(precision, "cpu_computes_bf16", lambda: has_bf16)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
    assert precision.choose_precision(device, recorded) == chosen


@pytest.mark.parametrize(("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_autocast_computes_in_the_format(name, dtype):
    with precision.autocast("cpu", name):
        assert torch.nn.functional.linear(torch.ones(2, 2), torch.ones(2, 2)).dtype == dtype
