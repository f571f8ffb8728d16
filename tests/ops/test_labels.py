"""A label of voxels to leave out that the type of the labels cannot hold: no voxel has it, on any kernel."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lungkit.losses import CodedLabelsLoss, DiceCELoss
from lungkit.metrics import measure_case
from lungkit.ops import confusion_counts
from lungkit.ops._labels import equal_to
from lungkit.ops.confusion_counts import reference as reference_counts
from lungkit.ops.dice_ce import dice_ce_loss, dice_ce_statistics, reference, reference_statistics

OUTSIDE = {
    torch.uint8: (256, -1, -256, 2**40),
    torch.bool: (2, 256, -1),
    torch.int16: (2**16, -(2**16) + 1),
    torch.int32: (2**32, 1 - 2**32),
}
CASES = [(dtype, index) for dtype, indices in OUTSIDE.items() for index in indices]


@pytest.mark.parametrize(("dtype", "index"), CASES)
def test_an_index_that_the_type_cannot_hold_equals_no_label(dtype: torch.dtype, index: int) -> None:
    assert not equal_to(torch.tensor([0, 1]).to(dtype), index).any()


def test_an_index_that_the_type_holds_is_found() -> None:
    assert equal_to(torch.tensor([0, 255], dtype=torch.uint8), 255).tolist() == [False, True]
    assert equal_to(torch.tensor([False, True]), 1).tolist() == [False, True]
    assert equal_to(torch.tensor([-1, 2], dtype=torch.int16), -1).tolist() == [True, False]


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 8, 40, generator=generator)
    return logits, torch.randint(0, 2, (2, 8, 40), generator=generator)


@pytest.mark.parametrize(("dtype", "index"), CASES)
def test_kernels_and_twins_leave_out_no_voxel(kernels: str, dtype: torch.dtype, index: int) -> None:
    logits, labels = inputs()
    labels = labels.to(dtype)
    expected = dice_ce_statistics(logits, labels)
    torch.testing.assert_close(dice_ce_statistics(logits, labels, ignore_index=index), expected)
    torch.testing.assert_close(reference_statistics(logits, labels, ignore_index=index), expected)
    loss = dice_ce_loss(logits, labels, ignore_index=index)
    torch.testing.assert_close(loss, reference(logits, labels))
    torch.testing.assert_close(reference(logits, labels, ignore_index=index), reference(logits, labels))
    counts, voxels = confusion_counts(logits, labels, 3, ignore_index=index)
    assert voxels.tolist() == [320, 320]
    twin_counts, twin_voxels = reference_counts(logits, labels, 3, ignore_index=index)
    assert torch.equal(counts, twin_counts)
    assert torch.equal(voxels, twin_voxels)


def test_losses_and_measures_leave_out_no_voxel() -> None:
    logits, labels = inputs()
    labels = labels.to(torch.uint8)
    torch.testing.assert_close(DiceCELoss(ignore_index=256)(logits, labels), DiceCELoss()(logits, labels))
    vectors = torch.eye(3)
    coded = [
        CodedLabelsLoss(DiceCELoss(softmax=True), vectors, ignore_index=index)(logits, labels)
        for index in (256, 255)
    ]
    torch.testing.assert_close(*coded)
    names = {"background": 0, "tumour": 1}
    measured = [
        measure_case(labels, labels, names, (2.0, 1.0, 1.0), ignore_index=index)["tumour"].values
        for index in (256, None)
    ]
    np.testing.assert_equal(*measured)
