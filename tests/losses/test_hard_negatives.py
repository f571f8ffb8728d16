"""HardNegativesLoss: which voxels count, whatever form the labels have."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from lungkit.errors import UsageError
from lungkit.losses import CodedLabelsLoss, DiceCELoss, HardNegativesLoss, SoftDiceCELoss

ENTROPY = DiceCELoss(softmax=True, lambda_dice=0.0, ignore_index=255)


def logits_and_labels(classes: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, classes, 8, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, classes, (2, 8, 5), generator=generator)
    return logits, (labels * (torch.rand(labels.shape, generator=generator) < 0.3)).to(torch.uint8)


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_the_foreground_and_the_hardest_background_count(share):
    logits, labels = logits_and_labels()
    voxels = F.cross_entropy(logits, labels.long(), reduction="none").flatten()
    background = labels.flatten() == 0
    hard = voxels[background].sort(descending=True).values[: math.ceil(share * voxels.numel())]
    expected = torch.cat([voxels[~background], hard]).mean()
    loss = HardNegativesLoss(ENTROPY, share)(logits, labels)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(value, logits)[0] for value in (loss, expected)))


def test_ignored_and_masked_voxels_are_never_chosen():
    logits, labels = logits_and_labels()
    labels[:, 0] = 255
    mask = torch.ones(2, 8, 5, dtype=torch.bool)
    mask[:, 1] = False
    criterion = HardNegativesLoss(ENTROPY, 0.2)
    extreme = logits.detach().clone()
    extreme[:, 0, :2] = -50.0  # the hardest background of all, were it to count
    kept = criterion.hard_voxels(extreme, labels, mask)[:, 0]
    assert not kept[:, 1].any()
    assert (kept & (labels == 0)).sum() == math.ceil(0.2 * labels.numel())
    assert torch.equal(criterion(extreme, labels, mask), criterion(logits, labels, mask))


def test_vectors_choose_what_indices_choose():
    logits, labels = logits_and_labels()
    coded = CodedLabelsLoss(HardNegativesLoss(SoftDiceCELoss(lambda_dice=0.0), 0.1), torch.eye(3))
    torch.testing.assert_close(coded(logits, labels), HardNegativesLoss(ENTROPY, 0.1)(logits, labels))


def test_voxels_on_which_readers_disagree_are_foreground():
    shares = torch.tensor([[1.0, 0.0], [0.5, 0.5]])[torch.tensor([[0, 0, 1, 0]])].movedim(-1, 1)
    logits = torch.tensor([[[0.0, 9.0, 9.0, 9.0], [0.0, 0.0, 0.0, 0.0]]])
    kept = HardNegativesLoss(SoftDiceCELoss(), 0.25).hard_voxels(logits, shares)
    assert kept.flatten().tolist() == [True, False, True, False]


def test_regions_are_background_where_no_channel_is_set():
    vectors = torch.tensor([[[0.0, 0, 1, 0], [0, 0, 0, 0]]])
    logits = torch.tensor([[[-9.0, 3, -9, -9], [-9, -9, -9, -2]]])
    kept = HardNegativesLoss(ENTROPY, 0.25, sigmoid=True).hard_voxels(logits, vectors)
    assert kept.flatten().tolist() == [False, True, True, False]


@pytest.mark.parametrize("share", [0.0, -0.1, 1.5])
def test_a_share_out_of_its_range_is_refused(share):
    with pytest.raises(UsageError, match="share"):
        HardNegativesLoss(ENTROPY, share)
