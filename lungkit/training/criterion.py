"""The loss that a run trains on, put together from its configuration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lungkit.data import Dataset
from lungkit.data.dataset import IGNORE_INDEX
from lungkit.data.readers import ReaderCodes
from lungkit.losses import (
    CodedLabelsLoss,
    DeepSupervisionLoss,
    DiceCELoss,
    DiceFocalLoss,
    FocalTverskyLoss,
    HardNegativesLoss,
    LesionDiceLoss,
    SoftDiceCELoss,
)
from lungkit.training.config import LossConfig
from lungkit.training.lesion_numbers import split_lesion_numbers
from lungkit.training.planning import Plan

DiceAndEntropy = Callable[[float, float], nn.Module]
"""A loss of logits, labels and a mask from the weights of its Dice and of its cross-entropy."""


def make_criterion(
    config: LossConfig,
    plan: Plan,
    codes: ReaderCodes | None = None,
    dataset: Dataset | None = None,
    *,
    synchronise: bool = False,
) -> nn.Module:
    """The loss as configured; of shares of readers with ``codes``, of all outputs with deep supervision.

    Regions are as many binary problems, as in nnU-Net: sigmoid, Dice of each, binary cross-entropy.
    With ``synchronise`` it is the loss of the patches of all processes.
    """
    vectors = None
    if codes is not None:
        vectors = torch.from_numpy(codes.shares)
    elif dataset is not None and dataset.regions:
        vectors = torch.from_numpy(dataset.region_vectors)

    sigmoid = vectors is not None and codes is None

    def loss_of(*, gamma: float) -> nn.Module:
        loss = _loss_of_voxels(
            config,
            _dice_and_entropy(config, sigmoid, codes, synchronise),
            gamma,
            sigmoid=sigmoid,
            soft=codes is not None,
            synchronise=synchronise,
        )
        if vectors is not None:
            loss = CodedLabelsLoss(loss, vectors, ignore_index=IGNORE_INDEX)
        if config.lesion_weight:
            loss = WithLesions(loss, LesionDiceLoss(synchronise=synchronise), config.lesion_weight)
        return loss

    loss = loss_of(gamma=config.tversky_gamma)
    if not plan.model["deep_supervision"]:
        return loss
    if config.overlap == "dice":
        return DeepSupervisionLoss(loss)
    # As Abraham and Khan train: all outputs count alike, and the final one has no focal exponent.
    outputs = len(plan.model["features"]) - 1
    return DeepSupervisionLoss(loss, [1 / outputs] * outputs, finest=loss_of(gamma=1.0))


class WithLesions(nn.Module):
    """A loss of labels and a weighted one of the lesions that are numbered in them.

    Shapes:
        logits (B, C, *S), labels with lesion numbers (B, *S), see :func:`number_lesions`.
    """

    def __init__(self, loss: nn.Module, of_lesions: nn.Module, weight: float) -> None:
        super().__init__()
        self.loss, self.of_lesions, self.weight = loss, of_lesions, weight

    def forward(self, logits: Tensor, numbered: Tensor) -> Tensor:
        """The sum of both."""
        labels, lesions = split_lesion_numbers(numbered)
        return self.loss(logits, labels) + self.weight * self.of_lesions(logits, labels, lesions)


class SumOfLosses(nn.Module):
    """Weighted sum of losses of the same logits, labels and mask."""

    def __init__(self, losses: Sequence[nn.Module], weights: Sequence[float]) -> None:
        super().__init__()
        self.losses, self.weights = nn.ModuleList(losses), tuple(weights)

    def forward(self, logits: Tensor, labels: Tensor, mask: Tensor | None = None) -> Tensor:
        """The sum."""
        terms = [
            weight * loss(logits, labels, mask)
            for loss, weight in zip(self.losses, self.weights, strict=True)
        ]
        return torch.stack(terms).sum()


def _dice_and_entropy(
    config: LossConfig, sigmoid: bool, codes: ReaderCodes | None, synchronise: bool
) -> DiceAndEntropy:
    if sigmoid:
        kind: Callable[..., Any] = partial(DiceFocalLoss, sigmoid=True, gamma=0.0)
        return lambda dice, entropy: kind(
            batch=config.batch_dice, lambda_dice=dice, lambda_focal=entropy, synchronise=synchronise
        )
    kind = SoftDiceCELoss
    if codes is None:
        kind = partial(DiceCELoss, softmax=True, ignore_index=IGNORE_INDEX)
    return lambda dice, entropy: kind(
        include_background=config.include_background,
        batch=config.batch_dice,
        lambda_dice=dice,
        lambda_ce=entropy,
        synchronise=synchronise,
    )


def _loss_of_voxels(
    config: LossConfig,
    dice_and_entropy: DiceAndEntropy,
    gamma: float,
    *,
    sigmoid: bool,
    soft: bool,
    synchronise: bool,
) -> nn.Module:
    """One fused loss where that does it, else the overlap and the cross-entropy by themselves."""
    is_mined = config.hard_negatives < 1 and config.ce_weight > 0
    if config.overlap == "dice" and not is_mined:
        return dice_and_entropy(config.dice_weight, config.ce_weight)
    losses, weights = [], []
    if config.dice_weight and config.overlap == "dice":
        losses.append(dice_and_entropy(1.0, 0.0))
        weights.append(config.dice_weight)
    elif config.dice_weight:
        focal = FocalTverskyLoss(
            include_background=config.include_background or sigmoid,
            sigmoid=sigmoid,
            softmax=not sigmoid,
            alpha=1 - config.tversky_beta,
            beta=config.tversky_beta,
            gamma=gamma,
            batch=config.batch_dice,
            ignore_index=None if sigmoid or soft else IGNORE_INDEX,
            minimum=soft,
            synchronise=synchronise,
        )
        losses.append(focal)
        weights.append(config.dice_weight)
    if config.ce_weight:
        entropy = dice_and_entropy(0.0, 1.0)
        losses.append(
            HardNegativesLoss(entropy, config.hard_negatives, sigmoid=sigmoid) if is_mined else entropy
        )
        weights.append(config.ce_weight)
    return SumOfLosses(losses, weights)
