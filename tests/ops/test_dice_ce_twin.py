"""The plain-PyTorch twin of Dice + cross-entropy, the oracle of the tests of the kernels."""

from __future__ import annotations

import pytest
import torch
from dice_ce_cases import Form, random_indices, random_logits, twin_in_double


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("form", [Form(), Form("sigmoid", "binary"), Form("none", "none")], ids=str)
def test_a_voxel_that_the_twin_leaves_out_may_hold_anything(form, value):
    logits = random_logits((1, 20), 3, torch.float64)
    labels = random_indices((1, 20), 3, torch.int64)
    mask = torch.arange(20).view(1, 20) != 7
    slopes = torch.rand(6, 1, 3, dtype=torch.float64)
    clean = twin_in_double(logits, labels, form, slopes, mask)
    logits[0, 1, 7] = value
    for actual, expected in zip(twin_in_double(logits, labels, form, slopes, mask), clean, strict=True):
        assert torch.equal(actual, expected)
