"""The loss of nnU-Net, from its formula."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from lungkit.interop.nnunet_loss import FusedDiceCE


@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("ignore_index", [None, 3])
def test_value_and_gradient_are_nnunets(batch: bool, ignore_index: int | None) -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 5, 6, 7, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 3 if ignore_index is None else 4, (2, 1, 5, 6, 7)).float()
    counts = (labels != 3).double()
    target = torch.where(labels == 3, 0, labels).long()
    p = logits.softmax(1) * counts
    y = F.one_hot(target[:, 0], 3).movedim(-1, 1) * counts
    axes = (0, 2, 3, 4) if batch else (2, 3, 4)
    sums = ((p * y).sum(axes), p.sum(axes), y.sum(axes))
    intersection, prediction, label = (total[..., 1:] for total in sums)
    dice = (2 * intersection + 1e-5) / (prediction + label + 1e-5)
    expected = -(y * logits.log_softmax(1)).sum() / counts.sum() - dice.mean()
    found = FusedDiceCE(batch=batch, ignore_index=ignore_index)(logits, labels)
    torch.testing.assert_close(found, expected)
    (slope,) = torch.autograd.grad(found, logits, retain_graph=True)
    (expected_slope,) = torch.autograd.grad(expected, logits)
    torch.testing.assert_close(slope, expected_slope)
