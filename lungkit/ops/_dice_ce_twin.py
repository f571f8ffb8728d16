"""Dice + cross-entropy in plain PyTorch: the twins of the native ops, and the arithmetic from statistics to a loss."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Statistics(NamedTuple):
    r"""Sums over the voxels of an image, each (B, C); a mask or ``ignore_index`` leaves voxels out of all of them.

    y is the label of a voxel as a one-hot (or soft) vector, p its activated prediction.
    """

    intersection: Tensor  # sum p y
    prediction: Tensor  # sum p, or sum p^2
    label: Tensor  # sum y, or sum y^2
    cross_entropy: Tensor  # sum -y log p, each term times (1 - p)^gamma
    rest: Tensor  # softmax: sum -log p, for label smoothing; binary: sum -(1 - y) log(1 - p), times p^gamma
    voxels: Tensor  # voxels counted, the same for each class


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of the sums over logits of a dtype: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def has_class_indices(logits: Tensor, labels: Tensor) -> bool:
    r"""Whether labels are class indices (B, \*S) or (B, 1, \*S) rather than one vector (B, C, \*S) a voxel.

    Beside one channel, integers are indices (0 or 1) and floating numbers are soft labels.
    """
    one_channel = labels.dim() < logits.dim() or labels.shape[1] == 1
    return one_channel and not (logits.shape[1] == 1 and labels.is_floating_point())


# ---- twins of the ops -------------------------------------------------------------------------------------------


def statistics_twin(
    logits: Tensor,
    labels: Tensor,
    mask: Tensor | None,
    activation: str,
    cross_entropy: str,
    squared: bool,
    gamma: float,
    ignore_index: int | None,
) -> Tensor:
    """``lungkit::dice_ce_statistics``: (6, B, C), the rows of :class:`Statistics`."""
    z = logits.flatten(2).to(accumulate_dtype(logits.dtype))
    y, valid = _voxel_labels(z, logits, labels, mask, ignore_index)
    if mask is not None or ignore_index is not None:
        z = torch.where(valid != 0, z, 0.0)  # NaN times 0 would be NaN
    p = _activate(z, activation) * valid
    positive = rest = z.new_zeros(z.shape[:2])
    if cross_entropy == "softmax":
        surprise = -F.log_softmax(z, dim=1)
        positive, rest = (_focal(surprise, gamma) * y).sum(2), (surprise * valid).sum(2)
    elif cross_entropy == "binary":
        positive = (_focal(F.softplus(-z), gamma) * y).sum(2)
        rest = (_focal(F.softplus(z), gamma) * (valid - y)).sum(2)
    return torch.stack(
        [
            (p * y).sum(2),
            (p * p if squared else p).sum(2),
            (y * y if squared else y).sum(2),
            positive,
            rest,
            valid.sum(2).expand_as(positive),
        ]
    )


def backward_twin(
    slopes: Tensor,
    scale: Tensor | None,
    logits: Tensor,
    labels: Tensor,
    mask: Tensor | None,
    activation: str,
    cross_entropy: str,
    squared: bool,
    gamma: float,
    ignore_index: int | None,
) -> Tensor:
    """``lungkit::dice_ce_backward``: gradient of the logits from ``slopes``, that of their statistics."""

    def statistics(z: Tensor) -> Tensor:
        return statistics_twin(z, labels, mask, activation, cross_entropy, squared, gamma, ignore_index)

    pull_back = torch.func.vjp(statistics, logits)[1]
    (gradient,) = pull_back(slopes if scale is None else slopes * scale)
    return empty_gradient(logits).copy_(gradient)


def loss_twin(
    logits: Tensor,
    labels: Tensor,
    mask: Tensor | None,
    weight: Tensor | None,
    activation: str,
    cross_entropy: str,
    squared: bool,
    gamma: float,
    ignore_index: int | None,
    include_background: bool,
    jaccard: bool,
    batch: bool,
    mean: bool,
    smooth_nr: float,
    smooth_dr: float,
    lambda_dice: float,
    lambda_ce: float,
    label_smoothing: float,
) -> tuple[Tensor, Tensor]:
    """``lungkit::dice_ce_loss``: the loss, and its gradient with respect to the statistics."""
    statistics = statistics_twin(
        logits, labels, mask, activation, cross_entropy, squared, gamma, ignore_index
    )
    binary = cross_entropy == "binary"

    def loss(of: Tensor) -> Tensor:
        return loss_from_statistics(
            of,
            weight=weight,
            class_indices=has_class_indices(logits, labels),
            binary=binary,
            include_background=include_background,
            jaccard=jaccard,
            reduction="mean" if mean else "sum",
            smooth_nr=smooth_nr,
            smooth_dr=smooth_dr,
            batch=batch,
            lambda_dice=lambda_dice,
            lambda_ce=lambda_ce,
            label_smoothing=label_smoothing,
        )

    slopes, value = torch.func.grad_and_value(loss)(statistics)
    return value, slopes


def empty_gradient(logits: Tensor) -> Tensor:
    """Memory for the gradient of the logits: laid out as they are where that is channels-last, else contiguously."""
    channels = logits.shape[1]
    channels_last = (
        channels > 1
        and not logits.is_contiguous()
        and logits.movedim(1, -1).is_contiguous()
        and logits.stride(1) == 1
    )
    if channels_last:
        return torch.empty_like(logits)
    return logits.new_empty(logits.shape)


# ---- from statistics to a loss ----------------------------------------------------------------------------------


def loss_from_statistics(
    statistics: Tensor,
    *,
    weight: Tensor | None,
    class_indices: bool,
    binary: bool,
    include_background: bool,
    jaccard: bool,
    reduction: str,
    smooth_nr: float,
    smooth_dr: float,
    batch: bool,
    lambda_dice: float,
    lambda_ce: float,
    label_smoothing: float,
) -> Tensor:
    """Dice + cross-entropy loss of ``statistics`` (6, B, C); the arguments are those of ``DiceCELoss``.

    ``class_indices`` says what the labels were and decides the divisor of a weighted mean cross-entropy.
    """
    s = Statistics(*statistics)
    overlap, total = s.intersection, s.prediction + s.label
    if batch:
        overlap, total = overlap.sum(0, keepdim=True), total.sum(0, keepdim=True)
    dice_weight = weight
    if not include_background and overlap.shape[1] > 1:
        overlap, total = overlap[:, 1:], total[:, 1:]
        dice_weight = None if weight is None else weight[1:]
    dice = dice_terms(overlap, total, jaccard=jaccard, smooth_nr=smooth_nr, smooth_dr=smooth_dr)
    if dice_weight is not None and dice.shape[1] > 1:
        dice = dice * dice_weight.to(dice)
    entropy = cross_entropy_from_statistics(
        s,
        weight=weight,
        class_indices=class_indices,
        binary=binary,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )
    return lambda_dice * reduce_terms(dice, reduction) + lambda_ce * entropy


def dice_terms(
    overlap: Tensor, total: Tensor, *, jaccard: bool, smooth_nr: float, smooth_dr: float
) -> Tensor:
    """``1 - (2 I + smooth_nr) / (T + smooth_dr)`` of I and T = P + Y, or 2 (P + Y - I); 0 where the divisor is 0."""
    divisor = (2.0 * (total - overlap) if jaccard else total) + smooth_dr
    return 1.0 - ratio_or_one(2.0 * overlap + smooth_nr, divisor)


def ratio_or_one(numerator: Tensor, divisor: Tensor) -> Tensor:
    """``numerator / divisor``, and 1, with zero gradients, where the divisor is 0."""
    empty = divisor == 0
    return torch.where(empty, 1.0, numerator / torch.where(empty, 1.0, divisor))


def cross_entropy_from_statistics(
    statistics: Statistics,
    *,
    weight: Tensor | None,
    class_indices: bool,
    binary: bool,
    reduction: str,
    label_smoothing: float,
) -> Tensor:
    """Cross-entropy of softmax or, with ``binary``, of one sigmoid a channel; 0 where no voxel counts."""
    _, _, label, positive, rest, voxels = statistics
    classes = positive.shape[1]
    w = positive.new_ones(classes) if weight is None else weight.to(positive)
    if binary:
        total, divisor = (w * positive + rest).sum(), voxels.sum()
    else:
        share = label_smoothing / classes
        total = (w * ((1.0 - label_smoothing) * positive + share * rest)).sum()
        divisor = (w * label).sum() if class_indices else voxels[:, 0].sum()
    if reduction == "sum":
        return total
    return total / torch.where(divisor == 0, 1.0, divisor)


def reduce_terms(terms: Tensor, reduction: str) -> Tensor:
    """Mean, sum or neither of loss terms; the mean of no terms (an empty batch) is 0."""
    if reduction == "none":
        return terms
    return terms.sum() / max(terms.numel(), 1) if reduction == "mean" else terms.sum()


# ---- parts ------------------------------------------------------------------------------------------------------


def _activate(z: Tensor, activation: str) -> Tensor:
    if activation == "softmax":
        return z.softmax(1)
    return z.sigmoid() if activation == "sigmoid" else z


def _focal(surprise: Tensor, gamma: float) -> Tensor:
    """``(1 - p)^gamma * surprise`` with surprise = -log p."""
    return surprise if gamma == 0 else (-torch.expm1(-surprise)) ** gamma * surprise


def _voxel_labels(
    z: Tensor, logits: Tensor, labels: Tensor, mask: Tensor | None, ignore_index: int | None
) -> tuple[Tensor, Tensor]:
    """Label vectors (B, C, V) that are zero in left-out voxels, and ``valid`` (B, 1, V): 1 where a voxel counts."""
    batch, classes, voxels = z.shape
    valid = z.new_ones((batch, 1, voxels))
    if mask is not None:
        valid = valid * (mask.reshape(batch, 1, voxels) != 0)
    if not has_class_indices(logits, labels):
        y = labels.reshape(batch, classes, voxels).to(z)
        return torch.where(valid != 0, y, 0.0), valid
    indices = labels.reshape(batch, 1, voxels)
    if ignore_index is not None:
        valid = valid * (indices != ignore_index)
    _check_indices(indices, valid, classes, ignore_index)
    first = 1 if classes == 1 else 0  # one channel is the probability of class 1
    y = indices == torch.arange(first, first + classes, device=z.device).view(1, -1, 1)
    return y * valid, valid


def _check_indices(indices: Tensor, valid: Tensor, classes: int, ignore_index: int | None) -> None:
    outside = (valid != 0) & ((indices < 0) | (indices >= max(classes, 2)))
    if outside.any():
        image = int(outside.flatten(1).any(1).nonzero()[0])
        ignored = "no ignore_index is set" if ignore_index is None else f"ignore_index is {ignore_index}"
        raise RuntimeError(
            f"dice_ce: labels hold the value {int(indices[outside][0])} in image {image}; classes are "
            f"0..{max(classes, 2) - 1} and {ignored}"
        )
