"""Overlap of a predicted and a true mask: Dice, IoU, PPV, sensitivity, specificity, volume similarity."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import numpy as np
import torch
from torch import Tensor

from lungkit.errors import DataError, UsageError
from lungkit.ops import confusion_counts
from lungkit.ops._labels import equal_to

ArrayLike = Tensor | np.ndarray


class EmptyPolicy(str, Enum):
    """What a metric is for a case where its formula does not say.

    A ratio is undefined where its denominator is zero: Dice, IoU and volume similarity when prediction and truth are
    both empty, PPV when the prediction is empty, sensitivity when the truth is. A surface distance is undefined when
    either mask is empty, a surface Dice when both are.
    """

    NAN = "nan"
    """Undefined values are NaN: left out of means, and counted. A prediction where nothing is true has Dice 0."""
    PERFECT_IF_BOTH_EMPTY = "perfect-if-both-empty"
    """Two empty masks agree: ratios are 1, distances 0 mm. Any other undefined value is the worst: 0, infinite mm."""
    NAN_IF_TRUTH_EMPTY = "nan-if-truth-empty"
    """As NAN, and every metric of a case without true foreground is NaN, Dice 0 on a false alarm included."""


_Ratio = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
_RATIOS: dict[str, _Ratio] = {
    "dice": lambda tp, fp, fn: (2 * tp, 2 * tp + fp + fn),
    "iou": lambda tp, fp, fn: (tp, tp + fp + fn),
    "ppv": lambda tp, fp, fn: (tp, tp + fp),
    "sensitivity": lambda tp, fp, fn: (tp, tp + fn),
    "volume_similarity": lambda tp, fp, fn: (2 * tp + fp + fn - (fp - fn).abs(), 2 * tp + fp + fn),
}

OVERLAP_METRICS = (*_RATIOS, "specificity")
"""Names of the overlap metrics, in the order of tables."""


def overlap_metrics(
    counts: ArrayLike, *, voxels: ArrayLike | int | None = None, empty: EmptyPolicy = EmptyPolicy.NAN
) -> dict[str, Tensor]:
    r"""Overlap metrics from counts of true positives, false positives and false negatives.

    ::

        dice              = 2 TP / (2 TP + FP + FN)
        iou               = TP / (TP + FP + FN)
        ppv               = TP / (TP + FP)                        also called precision
        sensitivity       = TP / (TP + FN)                        also called recall
        volume_similarity = 1 - |FP - FN| / (2 TP + FP + FN)
        specificity       = TN / (TN + FP),  TN = voxels - TP - FP - FN

    Source: Taha and Hanbury 2015, "Metrics for evaluating 3D medical image segmentation".

    Args:
        counts: (..., 3) integers TP, FP, FN, as :func:`lungkit.ops.confusion_counts` gives them.
        voxels: (...) voxels counted, broadcast against the counts; specificity is given only with it.
        empty: what a ratio with denominator zero is.

    Returns:
        name -> float64 tensor (...), on the device of ``counts``.

    Raises:
        UsageError: counts do not end in an axis of 3.

    Example:
        >>> metrics = overlap_metrics(torch.tensor([8, 2, 4]))
        >>> {name: round(float(value), 3) for name, value in metrics.items()}
        {'dice': 0.727, 'iou': 0.571, 'ppv': 0.8, 'sensitivity': 0.667, 'volume_similarity': 0.909}
    """
    return {name: value for name, (value, _) in _overlap(counts, voxels, empty).items()}


def decided_by_policy(
    counts: ArrayLike, *, voxels: ArrayLike | int | None = None, empty: EmptyPolicy = EmptyPolicy.NAN
) -> dict[str, Tensor]:
    """Where ``empty`` and not the formula decided the values of :func:`overlap_metrics`, as bool tensors (...).

    Example:
        >>> decided = decided_by_policy(torch.tensor([[0, 0, 0], [0, 5, 0]]))
        >>> decided["dice"].tolist(), decided["sensitivity"].tolist()
        ([True, False], [True, True])
    """
    return {name: decided for name, (_, decided) in _overlap(counts, voxels, empty).items()}


@dataclass(frozen=True)
class CaseOverlap:
    """Overlap metrics of one case; each tensor is indexed by class."""

    counts: Tensor
    """int64 (K, 3): TP, FP, FN."""
    voxels: int
    """Voxels that count: all but the ignored ones."""
    values: dict[str, Tensor]
    """Metric name -> float64 (K,)."""
    decided_by_policy: dict[str, Tensor]
    """Metric name -> bool (K,): where the empty policy decided the value."""

    def of_class(self, index: int) -> dict[str, float]:
        """The metrics of one class as plain numbers."""
        return {name: float(value[index]) for name, value in self.values.items()}

    def decided_in_class(self, index: int) -> frozenset[str]:
        """Names of the metrics of one class that the empty policy decided."""
        return frozenset(name for name, decided in self.decided_by_policy.items() if decided[index])


def evaluate_case(
    prediction: ArrayLike,
    label: ArrayLike,
    num_classes: int,
    *,
    ignore_index: int | None = None,
    empty: EmptyPolicy = EmptyPolicy.NAN,
) -> CaseOverlap:
    r"""Overlap of one predicted label map with the true one, for every class.

    Args:
        prediction: class indices (\*S), integer or bool; an array or a tensor on any device.
        label: true class indices (\*S).
        num_classes: K, background included.
        ignore_index: label of voxels to leave out.
        empty: what a ratio with denominator zero is.

    Raises:
        UsageError: shapes differ or dtypes are not integer.
        DataError: a class index outside 0..K-1 that is not ``ignore_index``.

    Example:
        >>> overlap = evaluate_case(np.array([0, 1, 1, 1]), np.array([0, 0, 1, 1]), 2)
        >>> round(overlap.of_class(1)["dice"], 3), overlap.counts[1].tolist()
        (0.8, [2, 1, 0])
    """
    pred, truth = _as_labels(prediction, "prediction"), _as_labels(label, "label")
    if pred.shape != truth.shape:
        raise UsageError(
            f"prediction {tuple(pred.shape)} and label {tuple(truth.shape)} must have the same shape"
        )
    truth = truth.to(pred.device)
    try:
        counts, voxels = confusion_counts(
            pred.reshape(1, -1), truth.reshape(1, -1), num_classes, ignore_index
        )
    except UsageError:
        raise
    except RuntimeError as error:
        raise DataError(f"{error}; check the label map") from error
    seen = int(voxels)
    if pred.is_cuda:
        # The kernel leaves stray class indices out instead of raising; a difference in the total shows them.
        expected = truth.numel() - (0 if ignore_index is None else int(equal_to(truth, ignore_index).sum()))
        if seen != expected:
            raise DataError(
                f"{expected - seen} voxels of prediction or label hold a class outside 0..{num_classes - 1}"
            )
    results = _overlap(counts[0].cpu(), seen, empty)
    return CaseOverlap(
        counts=counts[0].cpu(),
        voxels=seen,
        values={name: value for name, (value, _) in results.items()},
        decided_by_policy={name: decided for name, (_, decided) in results.items()},
    )


def _overlap(
    counts: ArrayLike, voxels: ArrayLike | int | None, empty: EmptyPolicy
) -> dict[str, tuple[Tensor, Tensor]]:
    counts = torch.as_tensor(counts)
    if counts.dim() == 0 or counts.shape[-1] != 3:
        raise UsageError(
            f"counts must be (..., 3) with TP, FP, FN in the last axis, got {tuple(counts.shape)}"
        )
    tp, fp, fn = counts.double().unbind(-1)
    ratios = {name: ratio(tp, fp, fn) for name, ratio in _RATIOS.items()}
    if voxels is not None:
        tn = torch.as_tensor(voxels, dtype=torch.float64, device=counts.device) - tp - fp - fn
        ratios["specificity"] = (tn, tn + fp)
    empty = EmptyPolicy(empty)
    results = {}
    for name, (numerator, denominator) in ratios.items():
        decided = denominator == 0
        if empty is EmptyPolicy.NAN_IF_TRUTH_EMPTY:
            decided = decided | (tp + fn == 0)
        if empty is EmptyPolicy.PERFECT_IF_BOTH_EMPTY:
            # With the denominator at zero, "both empty" and "no error" are the same for each of the ratios.
            instead = (fp + fn == 0).double()
        else:
            instead = torch.full_like(tp, torch.nan)
        results[name] = (torch.where(decided, instead, numerator / denominator), decided)
    return results


def _as_labels(array: ArrayLike, name: str) -> Tensor:
    if isinstance(array, np.ndarray):
        if array.dtype.kind not in "bui":
            raise UsageError(f"{name} must hold integer class indices, got an array of {array.dtype}")
        if array.dtype in (np.uint16, np.uint32, np.uint64, np.int8):
            array = array.astype(np.int64)
        # A memory map opened for reading is shared as it is; nothing here writes to it.
        tensor = torch.as_tensor(
            np.array(array) if not array.flags.writeable else np.ascontiguousarray(array)
        )
    else:
        tensor = array
    if tensor.is_floating_point() or tensor.is_complex():
        raise UsageError(f"{name} must hold integer class indices, got a tensor of {tensor.dtype}")
    return tensor
