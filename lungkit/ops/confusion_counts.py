"""True positives, false positives and false negatives of a segmentation, counted in one pass."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lungkit.errors import UsageError
from lungkit.ops._labels import equal_to
from lungkit.ops._library import define_op

_MAX_CLASSES = 0xFFFE
_LABEL_DTYPES = (torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool)


def confusion_counts(
    pred: Tensor, labels: Tensor, num_classes: int, ignore_index: int | None = None
) -> tuple[Tensor, Tensor]:
    r"""Count TP, FP and FN per image and class, the integers under Dice, IoU, PPV and sensitivity.

    For image b and class c, over the voxels v whose label is not ``ignore_index``, with prediction p and label y:
    ``TP = #{p = c, y = c}``, ``FP = #{p = c, y != c}``, ``FN = #{p != c, y = c}``.

    Args:
        pred: logits (B, C, \*S) of a floating dtype, or class indices (B, \*S) or (B, 1, \*S). The class of a voxel is
            the index of its largest logit (the lowest one of a tie; NaN counts as largest). Logits with one channel
            are a sigmoid model of two classes: class 1 where the logit is positive.
        labels: class indices (B, \*S) or (B, 1, \*S); uint8, int16, int32, int64 or bool.
        num_classes: K, at least 2.
        ignore_index: label of voxels to leave out.

    Returns:
        ``(counts, voxels)``: int64 (B, K, 3) with TP, FP, FN in the last axis, and int64 (B,), the voxels counted.

    Raises:
        UsageError: shapes or dtypes that do not fit; the message names both sides.
        RuntimeError: on the CPU, a class index outside 0..K-1. On CUDA such a voxel is left out of ``counts`` and
            ``voxels`` instead, since raising would cost a synchronisation.

    Example:
        >>> import torch
        >>> from lungkit.ops import confusion_counts
        >>> counts, voxels = confusion_counts(torch.tensor([[0, 1, 1, 1]]), torch.tensor([[0, 0, 1, 1]]), 2)
        >>> counts[0, 1].tolist(), voxels.tolist()
        ([2, 1, 0], [4])
    """
    _check_arguments(pred, labels, num_classes)
    return torch.ops.lungkit.confusion_counts(pred, labels, num_classes, ignore_index)


def reference(
    pred: Tensor, labels: Tensor, num_classes: int, ignore_index: int | None = None
) -> tuple[Tensor, Tensor]:
    """Twin of :func:`confusion_counts` in plain PyTorch."""
    if pred.is_floating_point():
        pred = (pred[:, 0] > 0).long() if pred.shape[1] == 1 else pred.argmax(1)
    pred = pred.reshape(pred.shape[0], math.prod(pred.shape[1:])).long()
    labels = labels.reshape(labels.shape[0], math.prod(labels.shape[1:])).long()
    kept = (
        torch.ones_like(labels, dtype=torch.bool) if ignore_index is None else ~equal_to(labels, ignore_index)
    )
    for name, indices in (("labels", labels), ("pred", pred)):
        outside = kept & ((indices < 0) | (indices >= num_classes))
        if outside.any():
            image = int(outside.any(1).nonzero()[0])
            ignored = "no ignore_index is set" if ignore_index is None else f"ignore_index is {ignore_index}"
            raise RuntimeError(
                f"confusion_counts: {name} holds the value {int(indices[outside][0])} in image {image}; classes are "
                f"0..{num_classes - 1} (num_classes={num_classes}) and {ignored}"
            )
    counts = labels.new_zeros((labels.shape[0], num_classes, 3), dtype=torch.int64)
    for c in range(num_classes):
        in_pred, in_labels = (pred == c) & kept, (labels == c) & kept
        both = (in_pred & in_labels).sum(1)
        counts[:, c] = torch.stack([both, in_pred.sum(1) - both, in_labels.sum(1) - both], dim=1)
    return counts, kept.sum(1)


def _check_arguments(pred: Tensor, labels: Tensor, num_classes: int) -> None:
    if not 2 <= num_classes <= _MAX_CLASSES:
        raise UsageError(f"num_classes must be between 2 and {_MAX_CLASSES}, got {num_classes}")
    if labels.dtype not in _LABEL_DTYPES:
        raise UsageError(f"labels must be uint8, int16, int32, int64 or bool, got {labels.dtype}")
    if not pred.is_floating_point() and pred.dtype not in _LABEL_DTYPES:
        raise UsageError(f"pred must be floating-point logits or integer class indices, got {pred.dtype}")
    if pred.device != labels.device:
        raise UsageError(f"pred and labels must be on the same device, got {pred.device} and {labels.device}")
    logits = pred.is_floating_point()
    if pred.dim() < (3 if logits else 2):
        raise UsageError(
            "pred must be (B, C, *S) logits or (B, *S) class indices with at least one spatial axis, "
            f"got shape {tuple(pred.shape)}"
        )
    if logits and pred.shape[1] != num_classes and not (pred.shape[1] == 1 and num_classes == 2):
        raise UsageError(
            f"logits of shape {tuple(pred.shape)} have {pred.shape[1]} channels for num_classes={num_classes}; "
            "expected num_classes channels, or one for two classes"
        )
    if not logits and pred.dim() == labels.dim():
        same = pred.shape == labels.shape
    else:
        has_channel = logits or pred.dim() == labels.dim() + 1
        grid = (pred.shape[0], *pred.shape[2:]) if has_channel else tuple(pred.shape)
        label_grid = (labels.shape[0], *labels.shape[2:]) if labels.dim() > len(grid) else tuple(labels.shape)
        channels = (
            1 if not has_channel or logits else pred.shape[1],
            labels.shape[1] if labels.dim() > len(grid) else 1,
        )
        same = grid == label_grid and channels == (1, 1)
    if not same:
        raise UsageError(
            f"pred {tuple(pred.shape)} and labels {tuple(labels.shape)} do not agree; "
            "labels must be (B, *S) or (B, 1, *S) over pred's batch and voxels"
        )


define_op(
    "confusion_counts(Tensor pred, Tensor labels, int num_classes, int? ignore_index=None)"
    " -> (Tensor counts, Tensor voxels)",
    reference,
)


@torch.library.register_fake("lungkit::confusion_counts")
def _fake(
    pred: Tensor, labels: Tensor, num_classes: int, ignore_index: int | None = None
) -> tuple[Tensor, Tensor]:
    _check_arguments(pred, labels, num_classes)
    batch = labels.shape[0]
    return labels.new_empty((batch, num_classes, 3), dtype=torch.int64), labels.new_empty(
        (batch,), dtype=torch.int64
    )
