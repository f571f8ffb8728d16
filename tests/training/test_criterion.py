"""The loss that options ask for is the one that a run trains on."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lungkit.data.readers import ReaderCodes
from lungkit.losses import DiceCELoss, FocalTverskyLoss, HardNegativesLoss, LesionDiceLoss, TverskyLoss
from lungkit.training.config import LossConfig
from lungkit.training.criterion import make_criterion
from lungkit.training.lesion_numbers import number_lesions

OPTIONS: dict[str, Any] = {"softmax": True, "include_background": False, "batch": False, "ignore_index": 255}


def criterion_of(options: dict[str, Any], *arguments: Any, deep: bool = False) -> nn.Module:
    plan: Any = SimpleNamespace(model={"deep_supervision": deep, "features": (4, 8, 8)})
    return make_criterion(LossConfig(**options), plan, *arguments)


def logits_and_labels() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 2, 16, 16, generator=generator)
    labels = torch.zeros(2, 16, 16, dtype=torch.uint8)
    labels[:, 3:7, 4:9], labels[0, 10:14, 10:12], labels[:, 15] = 1, 1, 255
    return logits, labels


def test_without_options_it_is_dice_ce() -> None:
    logits, labels = logits_and_labels()
    assert torch.equal(criterion_of({})(logits, labels), DiceCELoss(**OPTIONS)(logits, labels))
    over_the_batch = DiceCELoss(**{**OPTIONS, "batch": True})(logits, labels)
    assert torch.equal(criterion_of({"batch_dice": True})(logits, labels), over_the_batch)
    assert not torch.equal(over_the_batch, DiceCELoss(**OPTIONS)(logits, labels))


def test_hard_negatives_leave_the_overlap_as_it_is() -> None:
    logits, labels = logits_and_labels()
    entropy = DiceCELoss(lambda_dice=0.0, **OPTIONS)
    expected = 0.5 * DiceCELoss(lambda_ce=0.0, **OPTIONS)(logits, labels)
    expected = expected + 2 * HardNegativesLoss(entropy, 0.1)(logits, labels)
    options = {"hard_negatives": 0.1, "dice_weight": 0.5, "ce_weight": 2.0}
    torch.testing.assert_close(criterion_of(options)(logits, labels), expected)


def test_focal_tversky_takes_the_place_of_dice() -> None:
    logits, labels = logits_and_labels()
    focal = FocalTverskyLoss(alpha=0.2, beta=0.8, gamma=2.0, **OPTIONS)(logits, labels)
    options: dict[str, Any] = {"overlap": "focal_tversky", "tversky_beta": 0.8, "tversky_gamma": 2.0}
    torch.testing.assert_close(criterion_of({**options, "ce_weight": 0.0})(logits, labels), focal)
    both = focal + DiceCELoss(lambda_dice=0.0, **OPTIONS)(logits, labels)
    torch.testing.assert_close(criterion_of(options)(logits, labels), both)


def test_focal_tversky_of_several_outputs_is_focal_on_the_side_outputs() -> None:
    logits, labels = logits_and_labels()
    side = logits[:, :, 1::2, 1::2].contiguous()
    expected = TverskyLoss(alpha=0.3, beta=0.7, **OPTIONS)(logits, labels)
    expected = expected + FocalTverskyLoss(**OPTIONS)(side, labels[:, 1::2, 1::2])
    criterion = criterion_of({"overlap": "focal_tversky", "ce_weight": 0.0}, deep=True)
    torch.testing.assert_close(criterion((logits, side), labels), expected / 2)


@pytest.mark.parametrize("deep", [False, True])
def test_lesions_count_beside_the_voxels(deep: bool) -> None:
    logits, labels = logits_and_labels()
    numbered = number_lesions(labels)
    expected = DiceCELoss(**OPTIONS)(logits, labels)
    expected = expected + 0.5 * LesionDiceLoss()(logits, labels, numbered >> 8)
    criterion = criterion_of({"lesion_weight": 0.5}, deep=deep)
    torch.testing.assert_close(criterion(logits, numbered), expected)
    if deep:
        side = logits[:, :, 1::2, 1::2]
        assert criterion((logits, side), numbered).isfinite()


def test_shares_of_readers_and_regions_are_mined_too() -> None:
    logits, labels = logits_and_labels()
    shares = criterion_of({"hard_negatives": 0.1}, ReaderCodes(2, 2))
    regions: Any = SimpleNamespace(regions={"whole": (1, 2)}, region_vectors=torch.eye(3)[:, 1:].numpy())
    for criterion in (shares, criterion_of({"hard_negatives": 0.1}, None, regions)):
        assert criterion(logits, labels).isfinite()


def test_focal_tversky_of_shares_takes_the_smaller_of_share_and_probability() -> None:
    readers = ReaderCodes(4, 2)
    codes = torch.tensor([1, 3], dtype=torch.uint8).repeat(2, 4, 2)
    logits = torch.tensor(readers.shares)[codes.long()].movedim(-1, 1).log()  # what the readers say
    criterion = criterion_of({"overlap": "focal_tversky", "ce_weight": 0.0}, readers)
    assert criterion(logits, codes) < 1e-4 < 0.1 < criterion(2 * logits, codes)
