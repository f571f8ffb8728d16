"""Dice + cross-entropy in plain PyTorch: the twins of the native ops."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lungkit.errors import LabelError
from lungkit.ops._dice_ce_tensors import accumulate_dtype, empty_gradient, has_class_indices
from lungkit.ops.dice_ce_arithmetic import DiceCEOptions, loss_from_statistics

# A floating class index may be so far from a whole number: what resampling or a rescaled file leaves behind.
INDEX_TOLERANCE = 1e-3


def statistics_twin(logits: Tensor, labels: Tensor, mask: Tensor | None, options: DiceCEOptions) -> Tensor:
    """``lungkit::dice_ce_statistics``: (6, B, C), the rows of :class:`Statistics`."""
    z = logits.flatten(2).to(accumulate_dtype(logits.dtype))
    y, valid = _voxel_labels(z, logits, labels, mask, options.ignore_index)
    if mask is not None or options.ignore_index is not None:
        z = torch.where(valid != 0, z, 0.0)  # NaN times 0 would be NaN
    p = _activate(z, options.activation) * valid
    positive = rest = z.new_zeros(z.shape[:2])
    gamma = options.gamma
    if options.cross_entropy == "softmax":
        surprise = -F.log_softmax(z, dim=1)
        positive, rest = (_focal(surprise, gamma) * y).sum(2), (surprise * valid).sum(2)
    elif options.cross_entropy == "binary":
        positive = (_focal(F.softplus(-z), gamma) * y).sum(2)
        rest = (_focal(F.softplus(z), gamma) * (valid - y)).sum(2)
    return torch.stack(
        [
            (p * y).sum(2),
            (p * p if options.squared else p).sum(2),
            (y * y if options.squared else y).sum(2),
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
    options: DiceCEOptions,
) -> Tensor:
    """``lungkit::dice_ce_backward``: gradient of the logits from ``slopes``, that of their statistics."""
    pull_back = torch.func.vjp(lambda z: statistics_twin(z, labels, mask, options), logits)[1]
    (gradient,) = pull_back(slopes if scale is None else slopes * scale)
    return empty_gradient(logits).copy_(gradient)


def loss_twin(
    logits: Tensor, labels: Tensor, mask: Tensor | None, weight: Tensor | None, options: DiceCEOptions
) -> tuple[Tensor, Tensor]:
    """``lungkit::dice_ce_loss``: the loss, and its gradient with respect to the statistics."""
    indices = has_class_indices(logits, labels)
    slopes, value = torch.func.grad_and_value(
        lambda of: loss_from_statistics(of, options, weight=weight, class_indices=indices)
    )(statistics_twin(logits, labels, mask, options))
    return value, slopes


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
    values = labels.reshape(batch, 1, voxels)
    indices = _whole(values) if values.is_floating_point() else values
    if ignore_index is not None:
        valid = valid * (indices != ignore_index)
    _check_indices(values, indices, valid, classes, ignore_index)
    first = 1 if classes == 1 else 0  # one channel is the probability of class 1
    y = indices == torch.arange(first, first + classes, device=z.device).view(1, -1, 1)
    return y * valid, valid


def _whole(values: Tensor) -> Tensor:
    """Each floating class index rounded; NaN where it is further than the tolerance from a whole number."""
    values = values.to(accumulate_dtype(values.dtype))
    rounded = values.round()
    return torch.where((values - rounded).abs() <= INDEX_TOLERANCE, rounded, torch.nan)


def _check_indices(
    values: Tensor, indices: Tensor, valid: Tensor, classes: int, ignore_index: int | None
) -> None:
    outside = (valid != 0) & ~((indices >= 0) & (indices < max(classes, 2)))
    if not outside.any():
        return
    image = int(outside.flatten(1).any(1).nonzero()[0])
    value = values[outside][0].item()
    shown = f"{value:g}" if isinstance(value, float) else str(int(value))
    ignored = "no ignore_index is set" if ignore_index is None else f"ignore_index is {ignore_index}"
    advice = ""
    if value == 255 and classes <= 2:
        advice = "; of a mask of 0 and 255 pass (mask > 0), or ignore_index=255 where 255 marks voxels to leave out"
    elif bool(indices[outside][0].isnan()):
        advice = "; class indices are whole numbers, and soft labels need one channel a class, (B, C, *S)"
    raise LabelError(
        f"dice_ce: labels hold the value {shown} in image {image}; classes are 0..{max(classes, 2) - 1} and "
        f"{ignored}{advice}"
    )
