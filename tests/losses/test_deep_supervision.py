"""DeepSupervisionLoss: weights, labels on coarser grids, single outputs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lungkit.errors import UsageError
from lungkit.losses import DeepSupervisionLoss, DiceCELoss
from lungkit.losses.deep_supervision import nearest_labels

CRITERION = DiceCELoss(softmax=True)


def test_the_loss_is_the_weighted_sum_over_levels():
    outputs = [torch.randn(2, 3, size, size) for size in (8, 4, 2)]
    labels = torch.randint(0, 3, (2, 1, 8, 8))
    levels = [CRITERION(z, nearest_labels(labels, tuple(z.shape[2:]))) for z in outputs]
    actual = DeepSupervisionLoss(CRITERION, weights=(1.0, 0.0, 0.25))(outputs, labels)
    torch.testing.assert_close(actual, levels[0] + 0.25 * levels[2])
    halved = DeepSupervisionLoss(CRITERION)(tuple(outputs), labels)
    torch.testing.assert_close(halved, (4 * levels[0] + 2 * levels[1] + levels[2]) / 7)


def test_the_finest_output_may_have_a_loss_of_its_own():
    outputs = [torch.randn(2, 3, size, size) for size in (8, 4)]
    labels = torch.randint(0, 3, (2, 1, 8, 8))
    finest = DiceCELoss(softmax=True, lambda_ce=0.0)
    criterion = DeepSupervisionLoss(CRITERION, (0.5, 0.25), finest=finest)
    side = CRITERION(outputs[1], nearest_labels(labels, (4, 4)))
    torch.testing.assert_close(criterion(outputs, labels), 0.5 * finest(outputs[0], labels) + 0.25 * side)
    assert torch.equal(criterion(outputs[0], labels), finest(outputs[0], labels))


def test_a_single_output_takes_the_plain_loss():
    logits, labels = torch.randn(2, 3, 8, 8), torch.randint(0, 3, (2, 1, 8, 8))
    assert torch.equal(DeepSupervisionLoss(CRITERION)(logits, labels), CRITERION(logits, labels))


@pytest.mark.parametrize("grid", [(4, 2, 8), (3, 5, 7), (1, 1, 1), (8, 8, 8)])
def test_labels_come_from_the_nearest_voxel(grid):
    labels = torch.randint(0, 200, (2, 1, 8, 8, 8), dtype=torch.uint8)
    expected = F.interpolate(labels.float(), size=grid, mode="nearest-exact").to(torch.uint8)
    assert torch.equal(nearest_labels(labels, grid), expected)
    assert torch.equal(nearest_labels(labels[:, 0], grid), expected[:, 0])


def test_labels_on_half_the_grid_are_a_view():
    labels = torch.randint(0, 3, (2, 8, 8))
    assert nearest_labels(labels, (4, 4)).untyped_storage().data_ptr() == labels.untyped_storage().data_ptr()


def test_every_level_gets_a_gradient():
    outputs = [torch.randn(1, 2, size, size, requires_grad=True) for size in (8, 4)]
    DeepSupervisionLoss(CRITERION)(outputs, torch.randint(0, 2, (1, 8, 8))).backward()
    assert all(z.grad.abs().sum() > 0 for z in outputs)


def test_wrong_numbers_of_outputs_are_named():
    labels = torch.zeros(1, 1, 8, 8).long()
    with pytest.raises(UsageError, match="got 1 outputs for 2 weights"):
        DeepSupervisionLoss(CRITERION, weights=(1.0, 0.5))([torch.randn(1, 2, 8, 8)], labels)
    with pytest.raises(UsageError, match="outputs is empty"):
        DeepSupervisionLoss(CRITERION)([], labels)
