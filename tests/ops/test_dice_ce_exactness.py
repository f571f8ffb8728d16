"""Fused Dice + cross-entropy: digits, extremes, the same bits for any number of threads, memory for the backward."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from dice_ce_cases import (
    LOGIT_DTYPES,
    gradient_of,
    random_indices,
    random_logits,
)
from op_kernels import on_kernels

from lungkit.ops.dice_ce import (
    Statistics,
    dice_ce_loss,
    dice_ce_statistics,
    reference,
    reference_statistics,
)


def test_float_loss_is_right_to_1e_6_on_a_large_batch():
    logits = torch.randn(2, 2, 192, 192, 192, generator=torch.Generator().manual_seed(0))
    labels = (logits[:, 0] > 0.3).to(torch.uint8)
    exact = dice_ce_loss(logits.double(), labels)
    assert abs(dice_ce_loss(logits, labels) / exact - 1) < 1e-6


@on_kernels(
    "margin, voxels",
    product([0.7, 1e-4, 16.0], [3_000_000]),
    emulated=product([0.7, 1e-4, 16.0], [30_000]),
)
def test_equal_logits_everywhere_do_not_drift(kernels, margin, voxels):
    # All roundings point the same way: the worst case of a sum in fp32.
    logits = torch.tensor([0.1, 0.1 + margin]).view(1, 2, 1).expand(1, 2, voxels).contiguous()
    labels = torch.ones(1, voxels, dtype=torch.uint8)
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
def test_half_gradients_are_right_to_their_own_rounding(kernels, classes, dtype):
    logits = random_logits((1, 40, 50), classes, dtype)
    labels = random_indices((1, 40, 50), classes, torch.uint8)
    slopes = torch.randn(6, 1, classes, generator=torch.Generator().manual_seed(0))
    gradient, exact = (
        gradient_of(lambda z: (slopes * dice_ce_statistics(z, labels)).sum(), z)
        for z in (logits, logits.double())
    )
    half_a_unit = torch.finfo(dtype).eps / 2
    torch.testing.assert_close(gradient.double(), exact, rtol=1.001 * half_a_unit, atol=2e-6)


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("dtype", LOGIT_DTYPES)
def test_huge_logits_stay_finite(kernels, classes, dtype):
    logits = random_logits((2, 9, 11), classes, dtype).sign() * 1e4
    labels = random_indices((2, 9, 11), classes, torch.uint8)
    loss = dice_ce_loss(logits, labels)
    torch.testing.assert_close(loss.double(), reference(logits.double(), labels), rtol=1e-6, atol=0.0)
    assert torch.isfinite(gradient_of(dice_ce_loss, logits, labels)).all()


@pytest.mark.parametrize("ignore_index", [None, 0])
@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("shape", [(2, 9, 11), (1, 1)])
def test_all_background_or_all_ignored_is_finite(kernels, shape, batch, ignore_index):
    logits, labels = random_logits(shape, 2, torch.float32), torch.zeros(shape, dtype=torch.uint8)
    options = {"batch": batch, "include_background": False, "ignore_index": ignore_index, "smooth_dr": 0.0}
    assert torch.isfinite(dice_ce_loss(logits, labels, **options))
    gradient = gradient_of(dice_ce_loss, logits, labels, **options)
    assert torch.isfinite(gradient).all()
    assert (ignore_index is None) == bool(gradient.any())


def test_a_confident_cross_entropy_keeps_its_digits(kernels):
    logits = torch.tensor([0.0, 18.0]).view(1, 2, 1).expand(1, 2, 1000).contiguous()
    labels = torch.ones(1, 1000, dtype=torch.uint8)
    exact = reference_statistics(logits.double(), labels)[3, 0, 1]
    torch.testing.assert_close(
        dice_ce_statistics(logits, labels)[3, 0, 1].double(), exact, rtol=1e-6, atol=0.0
    )


@pytest.mark.parametrize("right", [0, 1])
def test_small_overlaps_and_predictions_keep_their_digits(kernels, right):
    # Confident and wrong but for `right` voxels: every sum has terms that 1 - p would lose.
    generator = torch.Generator().manual_seed(4)
    logits = torch.stack((torch.zeros(1, 5000), 9 + torch.rand(1, 5000, generator=generator)), 1)
    logits[:, 1, :right] *= -1
    labels = torch.zeros(1, 5000, dtype=torch.uint8)
    exact = reference_statistics(logits.double(), labels)
    torch.testing.assert_close(dice_ce_statistics(logits, labels).double(), exact, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("classes", [2, 3, 6])
@pytest.mark.parametrize("voxels", [32, 33, 99])
@pytest.mark.parametrize("dtype", LOGIT_DTYPES)
def test_a_nan_logit_makes_loss_and_its_gradient_nan(kernels, voxels, classes, dtype):
    logits = random_logits((1, voxels), classes, dtype)
    logits[0, 1, 7] = torch.nan
    labels = random_indices((1, voxels), classes, torch.uint8)
    assert dice_ce_loss(logits, labels).isnan()
    assert gradient_of(dice_ce_loss, logits, labels)[0, :, 7].isnan().all()


@pytest.mark.parametrize("classes", [2, 5])
def test_same_bits_in_every_schedule(schedules, classes):
    for shape in [(2, 40, 48), (2, 13, 11)] if schedules.backend == "emulated" else [(2, 300, 170)]:
        logits = random_logits(shape, classes, torch.float32)
        labels = random_indices(shape, classes, torch.int64)
        schedules.assert_same_bits(
            lambda z=logits, y=labels: (dice_ce_statistics(z, y), gradient_of(dice_ce_loss, z, y))
        )


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
