"""Lesion-wise detection: which true lesions were found, and which predicted ones are real."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import cc3d
import numpy as np

from lungkit.errors import UsageError
from lungkit.metrics.overlap import ArrayLike, EmptyPolicy
from lungkit.metrics.surface import as_numpy


@dataclass(frozen=True)
class LesionMatch:
    """True and predicted lesions of one case, and how they overlap."""

    true_voxels: np.ndarray
    """int64 (T,): size of every true lesion."""
    predicted_voxels: np.ndarray
    """int64 (P,): size of every predicted lesion."""
    overlap: np.ndarray
    """int64 (T, P): voxels that a true and a predicted lesion have in common."""
    found: np.ndarray
    """bool (T,): true lesions with a match."""
    real: np.ndarray
    """bool (P,): predicted lesions with a match."""

    @property
    def lesion_dice(self) -> np.ndarray:
        """float64 (T,): Dice of every true lesion with all predicted lesions that overlap it taken together."""
        touching = (self.overlap > 0) @ self.predicted_voxels
        return 2 * self.overlap.sum(1) / (self.true_voxels + touching)


def label_lesions(mask: ArrayLike) -> tuple[np.ndarray, int]:
    """Number the lesions of a mask: components connected over faces, edges or corners (26 in 3D, 8 in 2D).

    Returns:
        integer array of the mask's shape, 0 outside and 1..N inside, and N.

    Example:
        >>> label_lesions(np.array([[1, 0, 0, 1], [0, 1, 0, 1]]))[1]
        2
    """
    array = as_numpy(mask) != 0
    connectivity: Literal[8, 26] = 8 if array.ndim == 2 else 26
    if array.ndim not in (2, 3):
        raise UsageError(f"mask must be (Y, X) or (Z, Y, X), got shape {array.shape}")
    if not array.any():
        return np.zeros(array.shape, np.uint16), 0
    # As integers, not as bool: on bool arrays of odd extent cc3d 4.1 joins and invents components.
    lesions, count = cc3d.connected_components(
        np.ascontiguousarray(array).view(np.uint8), connectivity=connectivity, return_N=True
    )
    return lesions, int(count)


def match_lesions(prediction: ArrayLike, truth: ArrayLike, *, min_iou: float = 0.0) -> LesionMatch:
    """Match the lesions of a predicted and a true mask by their overlap.

    A true and a predicted lesion match if they have a voxel in common and their IoU is at least ``min_iou``. One
    lesion may match several; from an IoU above 0.5 on, none can.

    Args:
        prediction: 2D or 3D mask, foreground where not 0.
        truth: mask of the same shape.
        min_iou: 0 to 1; at 0 one common voxel is enough.

    Raises:
        UsageError: shapes differ, or ``min_iou`` is out of range.

    Example:
        >>> truth, prediction = np.zeros((1, 12), int), np.zeros((1, 12), int)
        >>> truth[0, [0, 1, 2, 6]], prediction[0, [1, 2, 3, 10]] = 1, 1
        >>> match = match_lesions(prediction, truth)
        >>> match.found.tolist(), match.real.tolist(), match.overlap.tolist()
        ([True, False], [True, False], [[2, 0], [0, 0]])
    """
    if tuple(prediction.shape) != tuple(truth.shape):
        raise UsageError(
            f"prediction {tuple(prediction.shape)} and truth {tuple(truth.shape)} must have the same shape"
        )
    if not 0 <= min_iou <= 1:
        raise UsageError(f"min_iou must be between 0 and 1, got {min_iou}")
    predicted, predicted_count = label_lesions(prediction)
    true, true_count = label_lesions(truth)
    predicted_voxels = np.bincount(predicted.reshape(-1), minlength=predicted_count + 1)[1:]
    true_voxels = np.bincount(true.reshape(-1), minlength=true_count + 1)[1:]
    common = (predicted != 0) & (true != 0)
    pairs = (true[common].astype(np.int64) - 1) * predicted_count + predicted[common] - 1
    overlap = np.bincount(pairs, minlength=true_count * predicted_count).reshape(true_count, predicted_count)
    union = true_voxels[:, None] + predicted_voxels[None, :] - overlap
    match = np.logical_and(overlap > 0, overlap >= min_iou * union)
    return LesionMatch(
        true_voxels, predicted_voxels, overlap, np.asarray(match.any(1)), np.asarray(match.any(0))
    )


def lesion_metrics(match: LesionMatch, *, empty: EmptyPolicy = EmptyPolicy.NAN) -> dict[str, float]:
    """Detection of one case::

        lesion_sensitivity = true lesions found / true lesions
        lesion_precision   = predicted lesions that are real / predicted lesions
        lesion_f1          = 2 sensitivity precision / (sensitivity + precision)
        lesion_dice        = mean over the true lesions of their Dice, 0 for one not found

    and the counts ``lesions_true``, ``lesions_found``, ``lesions_predicted``, ``lesions_false``. Ratios of nothing are
    what ``empty`` says; F1 is 0 where one side is empty, and undefined where both are.

    Example:
        >>> truth, prediction = np.zeros((1, 9)), np.zeros((1, 9))
        >>> truth[0, [0, 4]], prediction[0, [0, 1, 7]] = 1, 1
        >>> metrics = lesion_metrics(match_lesions(prediction, truth))
        >>> metrics["lesion_sensitivity"], metrics["lesion_precision"], metrics["lesions_false"]
        (0.5, 0.5, 1.0)
    """
    true, predicted = len(match.true_voxels), len(match.predicted_voxels)
    found, real = int(match.found.sum()), int(match.real.sum())

    def ratio(numerator: float, denominator: float) -> float:
        if empty is EmptyPolicy.NAN_IF_TRUTH_EMPTY and not true:
            return math.nan
        if denominator:
            return numerator / denominator
        if empty is EmptyPolicy.PERFECT_IF_BOTH_EMPTY:
            return float(not true and not predicted)
        return math.nan

    sensitivity, precision = ratio(found, true), ratio(real, predicted)
    # With one side empty nothing was matched: F1 is 0 though one of its parts is undefined.
    both = sensitivity + precision if true and predicted else 0.0
    f1 = 2 * sensitivity * precision / both if both else ratio(0.0, true + predicted)
    return {
        "lesion_sensitivity": sensitivity,
        "lesion_precision": precision,
        "lesion_f1": f1,
        "lesion_dice": ratio(float(match.lesion_dice.sum()), true),
        "lesions_true": float(true),
        "lesions_found": float(found),
        "lesions_predicted": float(predicted),
        "lesions_false": float(predicted - real),
    }
