"""From statistics of logits against labels to a loss: the options of Dice + cross-entropy and their arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "DiceCEOptions",
    "Statistics",
    "cross_entropy_of_statistics",
    "dice_terms",
    "loss_from_statistics",
    "ratio_or_one",
    "reduce_terms",
]


class Statistics(NamedTuple):
    r"""Sums over the voxels of an image, each (B, C); a mask or ``ignore_index`` leaves voxels out of all of them.

    y is the label of a voxel as a one-hot (or soft) vector, p its activated prediction.
    """

    intersection: Tensor  # sum p y, or min(p, y)
    prediction: Tensor  # sum p, or sum p^2
    label: Tensor  # sum y, or sum y^2
    cross_entropy: Tensor  # sum -y log p, each term times (1 - p)^gamma
    rest: Tensor  # softmax: sum -log p, for label smoothing; binary: sum -(1 - y) log(1 - p), times p^gamma
    voxels: Tensor  # voxels counted, the same for each class


@dataclass(frozen=True)
class DiceCEOptions:
    """What the ops of Dice + cross-entropy compute, in the order in which the scalars follow the tensors of an op.

    The first six say how the statistics are summed (:func:`lungkit.ops.dice_ce.dice_ce_statistics`), the others what
    the loss makes of them (:func:`lungkit.ops.dice_ce.dice_ce_loss`). ``DiceCEOptions(*scalars)`` is the way back.

    Example:
        >>> from lungkit.ops.dice_ce_arithmetic import DiceCEOptions
        >>> DiceCEOptions(squared=True).of_statistics()
        ('softmax', 'softmax', True, 0.0, None, False)
    """

    activation: str = "softmax"
    cross_entropy: str = "softmax"
    squared: bool = False
    gamma: float = 0.0
    ignore_index: int | None = None
    minimum: bool = False
    include_background: bool = True
    jaccard: bool = False
    batch: bool = False
    mean: bool = True
    smooth_nr: float = 1e-5
    smooth_dr: float = 1e-5
    lambda_dice: float = 1.0
    lambda_ce: float = 1.0
    label_smoothing: float = 0.0

    def of_statistics(self) -> tuple[Any, ...]:
        """Scalars of ``lungkit::dice_ce_statistics`` and ``lungkit::dice_ce_backward``."""
        return (
            self.activation,
            self.cross_entropy,
            self.squared,
            self.gamma,
            self.ignore_index,
            self.minimum,
        )

    def of_loss(self) -> tuple[Any, ...]:
        """Scalars of ``lungkit::dice_ce_loss``."""
        return (
            *self.of_statistics(),
            self.include_background,
            self.jaccard,
            self.batch,
            self.mean,
            self.smooth_nr,
            self.smooth_dr,
            self.lambda_dice,
            self.lambda_ce,
            self.label_smoothing,
        )

    def for_logits(self, logits: Tensor) -> DiceCEOptions:
        """With the cross-entropy that the loss takes: binary for one channel, else that of a softmax."""
        entropy = "binary" if logits.dim() > 1 and logits.shape[1] == 1 else "softmax"
        return self if self.cross_entropy == entropy else replace(self, cross_entropy=entropy)


def loss_from_statistics(
    statistics: Tensor,
    options: DiceCEOptions,
    *,
    weight: Tensor | None,
    class_indices: bool,
    over_ranks: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Dice + cross-entropy loss of ``statistics`` (6, B, C).

    ``class_indices`` says what the labels were and decides the divisor of a weighted mean cross-entropy. ``over_ranks``
    sums a tensor over the ranks of a distributed run: then the loss is that of the images of all of them.
    """
    if over_ranks is not None and options.batch:
        # Batch Dice and the cross-entropy are functions of sums over the batch, so ranks need not share more.
        statistics, over_ranks = over_ranks(statistics.sum(1, keepdim=True)), None
    s = Statistics(*statistics)
    overlap, total = s.intersection, s.prediction + s.label
    if options.batch and len(overlap):  # a batch of no image has no term
        overlap, total = overlap.sum(0, keepdim=True), total.sum(0, keepdim=True)
    dice_weight = weight
    if not options.include_background and overlap.shape[1] > 1:
        overlap, total = overlap[:, 1:], total[:, 1:]
        dice_weight = None if weight is None else weight[1:]
    dice = dice_terms(overlap, total, options)
    if dice_weight is not None and dice.shape[1] > 1:
        dice = dice * dice_weight.to(dice)
    entropy, voxels = _cross_entropy_sums(s, options, weight=weight, class_indices=class_indices)
    reduction = "mean" if options.mean else "sum"
    if over_ranks is None:
        loss = reduce_terms(dice, reduction)
    else:
        number = dice.new_full((), dice.numel())
        dice_sum, number, entropy, voxels = over_ranks(torch.stack([dice.sum(), number, entropy, voxels]))
        loss = dice_sum / number.clamp_min(1.0) if options.mean else dice_sum
    return options.lambda_dice * loss + options.lambda_ce * _mean_entropy(entropy, voxels, options)


def dice_terms(overlap: Tensor, total: Tensor, options: DiceCEOptions) -> Tensor:
    """``1 - (2 I + smooth_nr) / (T + smooth_dr)`` of I and T = P + Y, or 2 (P + Y - I); 0 where the divisor is 0."""
    divisor = (2.0 * (total - overlap) if options.jaccard else total) + options.smooth_dr
    return 1.0 - ratio_or_one(2.0 * overlap + options.smooth_nr, divisor)


def ratio_or_one(numerator: Tensor, divisor: Tensor) -> Tensor:
    """``numerator / divisor``, and 1, with zero gradients, where the divisor is 0."""
    empty = divisor == 0
    return torch.where(empty, 1.0, numerator / torch.where(empty, 1.0, divisor))


def cross_entropy_of_statistics(
    statistics: Statistics, options: DiceCEOptions, *, weight: Tensor | None, class_indices: bool
) -> Tensor:
    """Cross-entropy of softmax or of one sigmoid a channel ("binary"); 0 where no voxel counts."""
    total, divisor = _cross_entropy_sums(statistics, options, weight=weight, class_indices=class_indices)
    return _mean_entropy(total, divisor, options)


def _cross_entropy_sums(
    statistics: Statistics, options: DiceCEOptions, *, weight: Tensor | None, class_indices: bool
) -> tuple[Tensor, Tensor]:
    """The sum over voxels, and what the mean divides by."""
    _, _, label, positive, rest, voxels = statistics
    classes = positive.shape[1]
    w = positive.new_ones(classes) if weight is None else weight.to(positive)
    if options.cross_entropy == "binary":
        total, divisor = (w * positive + rest).sum(), voxels.sum()
    else:
        share = options.label_smoothing / classes
        total = (w * ((1.0 - options.label_smoothing) * positive + share * rest)).sum()
        divisor = (w * label).sum() if class_indices else voxels[:, 0].sum()
    return total, divisor


def _mean_entropy(total: Tensor, divisor: Tensor, options: DiceCEOptions) -> Tensor:
    return total / torch.where(divisor == 0, 1.0, divisor) if options.mean else total


def reduce_terms(terms: Tensor, reduction: str) -> Tensor:
    """Mean, sum or neither of loss terms; the mean of no terms (an empty batch) is 0."""
    if reduction == "none":
        return terms
    return terms.sum() / max(terms.numel(), 1) if reduction == "mean" else terms.sum()
