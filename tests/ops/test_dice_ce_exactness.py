"""Fused Dice + cross-entropy: digits, extremes, the same bits for any number of threads, memory for the backward."""

from __future__ import annotations

import pytest
import torch
from dice_ce_cases import (
    LOGIT_DTYPES,
    Form,
    gradient_of,
    random_indices,
    random_logits,
)

from lungkit.ops.dice_ce import (
    Statistics,
    dice_ce_loss,
    dice_ce_statistics,
    reference,
    reference_statistics,
)

OPS = torch.ops.lungkit


def test_float_loss_is_right_to_1e_6_on_a_large_batch():
    logits = torch.randn(2, 2, 192, 192, 192, generator=torch.Generator().manual_seed(0))
    labels = (logits[:, 0] > 0.3).to(torch.uint8)
    exact = dice_ce_loss(logits.double(), labels)
    assert abs(dice_ce_loss(logits, labels) / exact - 1) < 1e-6


@pytest.mark.parametrize("margin", [0.7, 1e-4, 16.0])
def test_equal_logits_everywhere_do_not_drift(isa, margin):
    # All roundings point the same way: the worst case of a sum in fp32.
    logits = torch.tensor([0.1, 0.1 + margin]).view(1, 2, 1).expand(1, 2, 3_000_000).contiguous()
    labels = torch.ones(1, 3_000_000, dtype=torch.uint8)
    exact = Statistics(*reference_statistics(logits.double(), labels))
    sums = Statistics(*dice_ce_statistics(logits, labels).double())
    for actual, expected in zip(sums, exact, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_logits_of_a_large_volume_give_the_float_answer(dtype):
    logits = torch.zeros(2, 2, 96, 96, 96, dtype=dtype)
    labels = (torch.arange(96**3).view(96, 96, 96) % 2).expand(2, 96, 96, 96).to(torch.uint8)
    loss = dice_ce_loss(logits, labels, lambda_ce=0.0)
    assert loss.dtype == torch.float32
    assert abs(loss - 0.5) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("classes", [2, 3])
def test_half_gradients_are_right_to_their_own_rounding(isa, classes, dtype):
    logits = random_logits((1, 40, 50), classes, dtype)
    labels = random_indices((1, 40, 50), classes, torch.uint8)
    slopes = torch.randn(6, 1, classes, generator=torch.Generator().manual_seed(0))
    gradient = OPS.dice_ce_backward(slopes, None, logits, labels, None, *Form(), None)
    exact = OPS.dice_ce_backward(slopes.double(), None, logits.double(), labels, None, *Form(), None)
    half_a_unit = torch.finfo(dtype).eps / 2
    torch.testing.assert_close(gradient.double(), exact, rtol=1.001 * half_a_unit, atol=2e-6)


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("dtype", LOGIT_DTYPES)
def test_huge_logits_stay_finite(isa, classes, dtype):
    logits = random_logits((2, 9, 11), classes, dtype).sign() * 1e4
    labels = random_indices((2, 9, 11), classes, torch.uint8)
    loss = dice_ce_loss(logits, labels)
    torch.testing.assert_close(loss.double(), reference(logits.double(), labels), rtol=1e-6, atol=0.0)
    assert torch.isfinite(gradient_of(dice_ce_loss, logits, labels)).all()


@pytest.mark.parametrize("ignore_index", [None, 0])
@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("shape", [(2, 9, 11), (1, 1)])
def test_all_background_or_all_ignored_is_finite(shape, batch, ignore_index):
    logits, labels = random_logits(shape, 2, torch.float32), torch.zeros(shape, dtype=torch.uint8)
    options = {"batch": batch, "include_background": False, "ignore_index": ignore_index, "smooth_dr": 0.0}
    assert torch.isfinite(dice_ce_loss(logits, labels, **options))
    gradient = gradient_of(dice_ce_loss, logits, labels, **options)
    assert torch.isfinite(gradient).all()
    assert (ignore_index is None) == bool(gradient.any())


def test_a_confident_cross_entropy_keeps_its_digits(isa):
    logits = torch.tensor([0.0, 18.0]).view(1, 2, 1).expand(1, 2, 1000).contiguous()
    labels = torch.ones(1, 1000, dtype=torch.uint8)
    exact = reference_statistics(logits.double(), labels)[3, 0, 1]
    torch.testing.assert_close(
        dice_ce_statistics(logits, labels)[3, 0, 1].double(), exact, rtol=1e-6, atol=0.0
    )


@pytest.mark.parametrize("right", [0, 1])
def test_small_overlaps_and_predictions_keep_their_digits(isa, right):
    # Confident and wrong but for `right` voxels: every sum has terms that 1 - p would lose.
    generator = torch.Generator().manual_seed(4)
    logits = torch.stack((torch.zeros(1, 5000), 9 + torch.rand(1, 5000, generator=generator)), 1)
    logits[:, 1, :right] *= -1
    labels = torch.zeros(1, 5000, dtype=torch.uint8)
    exact = reference_statistics(logits.double(), labels)
    torch.testing.assert_close(dice_ce_statistics(logits, labels).double(), exact, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("dtype", LOGIT_DTYPES)
def test_a_nan_logit_makes_loss_and_its_gradient_nan(isa, classes, dtype):
    logits = random_logits((1, 9, 11), classes, dtype)
    logits[0, 1, 4, 5] = torch.nan
    labels = random_indices((1, 9, 11), classes, torch.uint8)
    assert dice_ce_loss(logits, labels).isnan()
    assert gradient_of(dice_ce_loss, logits, labels)[0, :, 4, 5].isnan().all()


@pytest.mark.parametrize("classes", [2, 5])
def test_same_bits_for_any_number_of_threads(classes):
    logits, labels = (
        random_logits((2, 300, 170), classes, torch.float32),
        random_indices((2, 300, 170), classes, torch.int64),
    )
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = dice_ce_statistics(logits, labels), gradient_of(dice_ce_loss, logits, labels)
        torch.set_num_threads(3)
        three = dice_ce_statistics(logits, labels), gradient_of(dice_ce_loss, logits, labels)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))


def test_nothing_per_voxel_is_kept_for_backward():
    logits, labels = (
        random_logits((1, 40, 40), 2, torch.float32).requires_grad_(),
        torch.zeros(1, 40, 40).long(),
    )
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor
    ):
        dice_ce_loss(logits, labels)
    inputs = {logits.data_ptr(), labels.data_ptr()}
    assert sum(tensor.numel() for tensor in kept if tensor.data_ptr() not in inputs) == 6 * 2
