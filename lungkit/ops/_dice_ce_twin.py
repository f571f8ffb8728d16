"""Plain-PyTorch twins of the Dice + cross-entropy ops, and the arithmetic that turns statistics into a loss."""

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
    cross_entropy: Tensor  # sum -y log p; binary: the positive part of it
    rest: Tensor  # softmax: sum -log p, for label smoothing; binary: sum -(1 - y) log(1 - p)
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


def statistics_twin(
    logits: Tensor,
    labels: Tensor,
    mask: Tensor | None,
    activation: str,
    cross_entropy: str,
    squared: bool,
    ignore_index: int | None,
) -> Tensor:
    """Twin of ``lungkit::dice_ce_statistics``: (6, B, C), the rows of :class:`Statistics`."""
    z = logits.flatten(2).to(accumulate_dtype(logits.dtype))
    y, valid = _voxel_labels(z, logits, labels, mask, ignore_index)
    p = _activate(z, activation)
    zero = z.new_zeros(z.shape[:2])
    if cross_entropy == "softmax":
        surprise = -F.log_softmax(z, dim=1)
        positive, rest = (surprise * y).sum(2), (surprise * valid).sum(2)
    elif cross_entropy == "binary":
        positive, rest = (F.softplus(-z) * y).sum(2), (F.softplus(z) * (valid - y)).sum(2)
    else:
        positive, rest = zero, zero
    p = p * valid
    return torch.stack(
        [
            (p * y).sum(2),
            (p * p if squared else p).sum(2),
            (y * y if squared else y).sum(2),
            positive,
            rest,
            valid.sum(2).expand_as(zero),
        ]
    )


def loss_from_statistics(
    statistics: Tensor,
    *,
    weight: Tensor | None = None,
    class_indices: bool = True,
    binary: bool = False,
    include_background: bool = True,
    jaccard: bool = False,
    reduction: str = "mean",
    smooth_nr: float = 1e-5,
    smooth_dr: float = 1e-5,
    batch: bool = False,
    lambda_dice: float = 1.0,
    lambda_ce: float = 1.0,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Dice + cross-entropy loss of ``statistics`` (6, B, C); the arguments are those of ``DiceCELoss``.

    ``class_indices`` says what the labels were and decides the divisor of a weighted mean cross-entropy.
    """
    s = Statistics(*statistics)
    return lambda_dice * dice_from_statistics(
        s,
        weight=weight,
        include_background=include_background,
        jaccard=jaccard,
        reduction=reduction,
        smooth_nr=smooth_nr,
        smooth_dr=smooth_dr,
        batch=batch,
    ) + lambda_ce * cross_entropy_from_statistics(
        s,
        weight=weight,
        class_indices=class_indices,
        binary=binary,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )


def dice_from_statistics(
    statistics: Statistics,
    *,
    weight: Tensor | None,
    include_background: bool,
    jaccard: bool,
    reduction: str,
    smooth_nr: float,
    smooth_dr: float,
    batch: bool,
) -> Tensor:
    """Soft Dice (or Jaccard) loss; a term whose denominator is 0 counts as 0."""
    overlap, pred, label = statistics[:3]
    total = pred + label
    if batch:
        overlap, total = overlap.sum(0, keepdim=True), total.sum(0, keepdim=True)
    if not include_background and overlap.shape[1] > 1:
        overlap, total = overlap[:, 1:], total[:, 1:]
        weight = None if weight is None else weight[1:]
    denominator = (2.0 * (total - overlap) if jaccard else total) + smooth_dr
    empty = denominator == 0
    terms = 1.0 - (2.0 * overlap + smooth_nr) / torch.where(empty, 1.0, denominator)
    terms = torch.where(empty, 0.0, terms)
    if weight is not None and terms.shape[1] > 1:
        terms = terms * weight.to(terms)
    return reduce_terms(terms, reduction)


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
    w = positive.new_ones(classes) if weight is None else weight.to(positive).expand(classes)
    if binary:
        total, divisor = (w * positive + rest).sum(), voxels.sum()
    else:
        share = label_smoothing / classes
        total = ((1.0 - label_smoothing) * w * positive).sum()
        if label_smoothing:
            total = total + (share * w * rest).sum()
        divisor = (w * label).sum() if class_indices else voxels[:, 0].sum()
    if reduction == "sum":
        return total
    return total / torch.where(divisor == 0, 1.0, divisor)


def reduce_terms(terms: Tensor, reduction: str) -> Tensor:
    """Mean, sum or neither of loss terms; the mean of no terms (an empty batch) is 0."""
    if reduction == "none":
        return terms
    return terms.sum() / max(terms.numel(), 1) if reduction == "mean" else terms.sum()


def _activate(z: Tensor, activation: str) -> Tensor:
    if activation == "softmax":
        return z.softmax(1)
    return z.sigmoid() if activation == "sigmoid" else z


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
