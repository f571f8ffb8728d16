"""LesionDiceLoss: the mean over lesions of Dice in an image without the others."""

from __future__ import annotations

import pytest
import torch

from lungkit.errors import UsageError
from lungkit.losses import LesionDiceLoss


def case(classes: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two images: three lesions of which two are of one class, and one lesion; a row to ignore."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, classes, 6, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    labels, lesions = torch.zeros(2, 6, 8, dtype=torch.uint8), torch.zeros(2, 6, 8, dtype=torch.int32)
    for number, (image, rows, columns, label) in enumerate(
        [(0, slice(0, 2), slice(0, 5), 1), (0, slice(4, 5), slice(6, 7), 1), (0, slice(3, 5), slice(0, 2), 2)]
    ):
        labels[image, rows, columns], lesions[image, rows, columns] = label, number + 1
    labels[1, 2:4, 2:4], lesions[1, 2:4, 2:4] = 2, 7
    labels[:, 5] = 255
    return logits, labels, lesions


def expected_loss(logits: torch.Tensor, labels: torch.Tensor, lesions: torch.Tensor) -> torch.Tensor:
    """The published definition: a loss of every lesion with the others of its class masked."""
    terms = []
    for z, label, lesion in zip(logits, labels, lesions, strict=True):
        for number in lesion.unique()[1:]:
            mine = lesion == number
            index = int(label[mine][0])
            counts = (label != 255) & (mine | (label != index))
            p, y = z.softmax(0)[index][counts], mine[counts].to(z)
            terms.append(1 - (2 * (p * y).sum() + 1e-5) / (p.sum() + y.sum() + 1e-5))
    return torch.stack(terms).mean()


def test_value_and_gradient_are_those_of_the_definition():
    logits, labels, lesions = case()
    results = []
    for loss in (LesionDiceLoss()(logits, labels, lesions), expected_loss(logits, labels, lesions)):
        results.append((loss, *torch.autograd.grad(loss, logits)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


def test_a_batch_without_lesions_is_a_loss_of_nothing():
    logits, labels, _ = case()
    loss = LesionDiceLoss()(logits, labels * 0, torch.zeros_like(labels))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss == 0 and not gradient.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_logits_are_computed_in_full(dtype):
    logits, labels, lesions = case()
    half = logits.detach().to(dtype)
    loss = LesionDiceLoss()(half, labels, lesions)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, LesionDiceLoss()(half.float(), labels, lesions))


def test_volumes_are_as_slices():
    logits, labels, lesions = case()
    flat = LesionDiceLoss()(logits, labels, lesions)
    assert torch.equal(LesionDiceLoss()(logits[:, :, None], labels[:, None], lesions[:, None]), flat)


def test_what_does_not_fit_is_named():
    logits, labels, lesions = case()
    with pytest.raises(UsageError, match=r"lesions \(B, \*S\)"):
        LesionDiceLoss()(logits, labels, lesions[:1])
