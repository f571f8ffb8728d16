"""FocalTverskyLoss: the formula, its special cases, and gradients where a class is not there."""

from __future__ import annotations

import pytest
import torch

from lungkit.errors import UsageError
from lungkit.losses import FocalTverskyLoss, TverskyLoss


def logits_and_labels(classes: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, classes, 6, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    return logits, torch.randint(0, classes, (2, 6, 5), generator=generator)


@pytest.mark.parametrize("batch", [False, True])
def test_each_class_is_its_tversky_loss_to_a_power(batch):
    logits, labels = logits_and_labels()
    terms = TverskyLoss(softmax=True, alpha=0.3, beta=0.7, batch=batch, reduction="none")(logits, labels)
    loss = FocalTverskyLoss(softmax=True, batch=batch)(logits, labels)
    torch.testing.assert_close(loss, (terms**0.75).mean())
    torch.testing.assert_close(
        *(torch.autograd.grad(value, logits)[0] for value in (loss, (terms**0.75).mean()))
    )


def test_without_exponent_it_is_the_tversky_loss():
    logits, labels = logits_and_labels()
    options = {"softmax": True, "alpha": 0.2, "beta": 0.8}
    assert torch.equal(
        FocalTverskyLoss(gamma=1.0, **options)(logits, labels), TverskyLoss(**options)(logits, labels)
    )


def test_missed_voxels_cost_more_than_false_ones():
    labels = torch.tensor([[[0, 0, 1, 1, 1, 1, 0, 0]]])
    missed, false = (
        20.0 * (2 * torch.tensor([[[0, 0], [1, 1]]]).repeat_interleave(4, 2) - 1)[..., :8] for _ in range(2)
    )
    missed[0, 1] = torch.tensor([-20.0, -20, 20, 20, -20, -20, -20, -20])
    false[0, 1] = torch.tensor([20.0, 20, 20, 20, 20, 20, -20, -20])
    missed[0, 0], false[0, 0] = -missed[0, 1], -false[0, 1]
    criterion = FocalTverskyLoss(softmax=True, include_background=False)
    assert criterion(missed, labels) > criterion(false, labels)


def test_an_absent_class_that_is_not_predicted_has_a_finite_gradient():
    logits = torch.zeros(1, 2, 4, 4)
    logits[:, 0] = 200.0
    logits.requires_grad_()
    labels = torch.zeros(1, 4, 4, dtype=torch.uint8)
    FocalTverskyLoss(softmax=True, include_background=False)(logits, labels).backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("options", [{"gamma": 0.0}, {"gamma": -1.0}, {"reduction": "none"}])
def test_options_that_make_no_sense_are_refused(options):
    with pytest.raises(UsageError, match="gamma"):
        FocalTverskyLoss(**options)
