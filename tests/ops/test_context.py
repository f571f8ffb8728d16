from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from lungkit.ops._context import autocast_dtype, is_transformed, runs_plainly


@pytest.mark.parametrize(
    ("tensor", "enabled", "expected"),
    [
        (torch.empty(1), True, torch.bfloat16),
        (torch.empty(1), False, None),
        (torch.empty(1, dtype=torch.float64), True, None),
        (torch.empty(1, device="meta"), True, None),
    ],
)
def test_autocast_concerns_tensors_that_it_can_cast(tensor, enabled, expected):
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
        assert autocast_dtype(tensor) == expected


def test_a_plain_call_is_plain():
    assert runs_plainly() and not is_transformed()
    with torch.no_grad(), torch.autocast("cpu"):
        assert runs_plainly()


def test_transforms_and_modes_are_noticed():
    seen = []
    torch.func.vmap(lambda x: seen.append((is_transformed(), runs_plainly())) or x)(torch.ones(2))
    with forward_ad.dual_level():
        seen.append((is_transformed(), runs_plainly()))
    with FakeTensorMode():
        seen.append((is_transformed(), runs_plainly()))
    assert seen == [(True, False), (True, False), (False, False)]
