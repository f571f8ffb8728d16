"""Losses of soft labels: equal to those of hard ones where labels are hard, least where p is the share."""

from __future__ import annotations

import pytest
import torch

from lungkit.errors import UsageError
from lungkit.losses import CodedLabelsLoss, DeepSupervisionLoss, DiceCELoss, SoftDiceCELoss


def logits_and_classes(classes: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, classes, 6, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    return logits, torch.randint(0, classes, (2, 6, 5), generator=generator)


def one_hot(labels: torch.Tensor, classes: int = 3) -> torch.Tensor:
    return torch.nn.functional.one_hot(labels, classes).movedim(-1, 1).double()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("include_background", [False, True])
def test_hard_labels_give_the_value_and_gradient_of_dice_ce(include_background, batch, reduction):
    logits, labels = logits_and_classes()
    options = {"include_background": include_background, "batch": batch, "reduction": reduction}
    results = []
    for criterion in (SoftDiceCELoss(**options), DiceCELoss(softmax=True, **options)):
        loss = criterion(logits, one_hot(labels))
        results.append((loss, *torch.autograd.grad(loss, logits)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


def test_masked_hard_labels_give_the_value_and_gradient_of_ignored_ones():
    logits, labels = logits_and_classes()
    ignored = labels.masked_fill(
        torch.rand(labels.shape, generator=torch.Generator().manual_seed(1)) < 0.3, 255
    )
    soft = SoftDiceCELoss(batch=True)(logits, one_hot(labels), (ignored != 255).unsqueeze(1))
    hard = DiceCELoss(softmax=True, batch=True, ignore_index=255)(logits, ignored.to(torch.uint8))
    torch.testing.assert_close(soft, hard)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in (soft, hard)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [False, True])
def test_value_and_gradient_are_those_of_the_definition(batch, dtype):
    logits, _ = logits_and_classes()
    logits = logits.detach().to(dtype).requires_grad_()
    generator = torch.Generator().manual_seed(2)
    shares = torch.softmax(torch.randn(2, 3, 6, 5, dtype=torch.float64, generator=generator), 1)
    mask = torch.rand(2, 1, 6, 5, generator=generator) < 0.8
    loss = SoftDiceCELoss(batch=batch, include_background=False, lambda_ce=0.5)(
        logits, shares.to(dtype), mask
    )
    exact = logits.detach().double().requires_grad_()
    p, y = exact.softmax(1) * mask, shares.to(dtype).double() * mask
    axes = (0, 2, 3) if batch else (2, 3)
    overlap, total = torch.minimum(p, y).sum(axes), p.sum(axes) + y.sum(axes)
    dice = 1 - (2 * overlap + 1e-5) / (total + 1e-5)
    entropy = -(y * exact.log_softmax(1)).sum() / mask.sum()
    expected = (dice[1:] if batch else dice[:, 1:]).mean() + 0.5 * entropy
    gradients = [
        torch.autograd.grad(value, z)[0].double() for value, z in ((loss, logits), (expected, exact))
    ]
    tolerance = {"rtol": 2**-7, "atol": 1e-6} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-7}
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(*gradients, **tolerance)


def test_the_loss_is_least_at_the_shares():
    shares = torch.tensor([0.75, 0.25], dtype=torch.float64).reshape(1, 2, 1, 1).expand(1, 2, 4, 4)
    criterion = SoftDiceCELoss(lambda_ce=0.0)
    assert criterion(shares.log(), shares).item() == pytest.approx(0.0, abs=1e-5)
    for wrong in (0.05, 0.2, 0.3, 0.9):
        other = torch.tensor([1 - wrong, wrong], dtype=torch.float64).reshape(1, 2, 1, 1).expand(1, 2, 4, 4)
        assert criterion(other.log(), shares) > 0.01


def test_gradients_are_those_of_the_formula():
    logits, _ = logits_and_classes()
    shares = torch.softmax(
        torch.randn(2, 3, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2)), 1
    )
    mask = torch.ones(2, 1, 6, 5, dtype=torch.bool)
    mask[:, :, 2] = False
    assert torch.autograd.gradcheck(lambda z: SoftDiceCELoss()(z, shares, mask), logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_logits_are_computed_in_full(dtype):
    logits, labels = logits_and_classes()
    half = logits.detach().to(dtype)
    loss = SoftDiceCELoss()(half, one_hot(labels))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, SoftDiceCELoss()(half.float(), one_hot(labels)))


def test_no_voxel_at_all_is_a_loss_of_nothing():
    logits, labels = logits_and_classes()
    loss = SoftDiceCELoss()(logits, one_hot(labels), torch.zeros(2, 1, 6, 5, dtype=torch.bool))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss == 0 and not gradient.any()


def test_codes_are_looked_up_and_ignored_ones_left_out():
    logits, labels = logits_and_classes()
    vectors = torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0], [0.2, 0.3, 0.5]])
    codes = labels.masked_fill(labels == 2, 255).to(torch.uint8)
    mask = (labels != 2).unsqueeze(1)
    expected = SoftDiceCELoss()(logits, vectors[labels].movedim(-1, 1).double(), mask)
    for shaped in (codes, codes.unsqueeze(1)):
        torch.testing.assert_close(CodedLabelsLoss(SoftDiceCELoss(), vectors)(logits, shaped), expected)


def test_deep_supervision_takes_codes():
    criterion = DeepSupervisionLoss(CodedLabelsLoss(SoftDiceCELoss(), torch.eye(2)))
    outputs = (torch.zeros(1, 2, 8, 8), torch.zeros(1, 2, 4, 4))
    assert criterion(outputs, torch.ones(1, 8, 8, dtype=torch.uint8)).isfinite()


@pytest.mark.parametrize(
    ("target", "mask", "message"),
    [
        (torch.zeros(1, 2, 4, 4, dtype=torch.uint8), None, "soft labels must be floating"),
        (torch.zeros(1, 3, 4, 4), None, "have the shape of the logits"),
        (torch.zeros(1, 2, 4, 4), torch.ones(1, 2, 4, 4).bool(), "mask of shape"),
    ],
)
def test_what_does_not_fit_is_named(target, mask, message):
    with pytest.raises(UsageError, match=message):
        SoftDiceCELoss()(torch.zeros(1, 2, 4, 4), target, mask)
