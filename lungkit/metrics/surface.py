"""Distances between the surfaces of a predicted and a true mask, in mm: Hausdorff, ASSD, surface Dice."""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from types import ModuleType

import numpy as np
from torch import Tensor

from lungkit.errors import ResourceError, UsageError
from lungkit.metrics import _surface_numpy
from lungkit.metrics.overlap import ArrayLike, EmptyPolicy

# A distance that equals the tolerance but for the rounding of single precision counts as within it.
_ROUNDING = 1e-6


def _load_native() -> ModuleType | None:
    try:
        return importlib.import_module("lungkit._native._geometry")
    except ImportError:
        return None


_native = _load_native()


def is_native() -> bool:
    """Whether distances are computed by the native module, and not in numpy."""
    return _native is not None


class HausdorffDefinition(str, Enum):
    """How two sets of directed distances become one percentile; the value is part of the metric's name."""

    DIRECTED = "directed"
    """The larger of the two directed percentiles (MONAI, and most of the literature)."""
    POOLED = "pooled"
    """The percentile of both sets taken together (MedPy)."""


@dataclass(frozen=True)
class SurfaceDistances:
    """Distance in mm of every boundary voxel of a mask to the nearest one of the other mask; order unspecified.

    The boundary voxels of a mask are those with a face neighbour (6 in 3D, 4 in 2D) outside of it; the border of the
    volume counts as outside. Distances are between voxel centres, Euclidean and exact, and infinite where the
    other mask is empty.
    """

    prediction_to_truth: np.ndarray
    """float32 (boundary voxels of the prediction,)."""
    truth_to_prediction: np.ndarray
    """float32 (boundary voxels of the truth,)."""

    @property
    def empty_sides(self) -> int:
        """How many of the two masks are empty."""
        return int(not len(self.prediction_to_truth)) + int(not len(self.truth_to_prediction))


def surface_distances(
    prediction: ArrayLike, truth: ArrayLike, spacing_mm: Sequence[float], *, threads: int | None = None
) -> SurfaceDistances:
    """Distances between the surfaces of two masks.

    Args:
        prediction: 2D or 3D mask, foreground where not 0; an array or a tensor.
        truth: mask of the same shape.
        spacing_mm: size of a voxel along every axis, in the order of the axes.
        threads: CPU threads, by default one a core; the result does not depend on it.

    Raises:
        UsageError: shapes differ, or a spacing is not a positive number.

    Example:
        >>> prediction, truth = np.zeros((2, 8, 8)), np.zeros((2, 8, 8))
        >>> prediction[0, 3, 3], truth[1, 3, 7] = 1, 1
        >>> distances = surface_distances(prediction, truth, (3.0, 1.0, 1.0))
        >>> distances.prediction_to_truth.tolist()
        [5.0]
    """
    masks = [_is_foreground(_as_tensor_or_array(mask)) for mask in (prediction, truth)]
    return label_surface_distances(*masks, labels=(1,), spacing_mm=spacing_mm, threads=threads)[0]


def label_surface_distances(
    prediction: ArrayLike,
    truth: ArrayLike,
    *,
    labels: Sequence[int],
    spacing_mm: Sequence[float],
    threads: int | None = None,
) -> list[SurfaceDistances]:
    """Distances between the surfaces of every label of two label maps, in one pass over them.

    CUDA tensors are measured on their GPU with CuPy (the extra ``lungkit[gpu]``); without it they are copied to the
    CPU, and a notice says so.

    Args:
        prediction: label map, 2D or 3D, integer or bool; an array or a tensor.
        truth: label map of the same shape.
        labels: labels to measure, 1 to 255.
        spacing_mm: size of a voxel along every axis, in the order of the axes.
        threads: CPU threads, by default one a core; the result does not depend on it.

    Returns:
        one :class:`SurfaceDistances` a label, in the order of ``labels``.

    Raises:
        UsageError: shapes differ, a label is out of range, or a spacing is not a positive number.
    """
    first, second = _as_tensor_or_array(prediction), _as_tensor_or_array(truth)
    _check_arguments(first, second, labels, spacing_mm)
    if threads is not None and threads < 1:
        raise UsageError(f"threads must be at least 1, got {threads}")
    if isinstance(first, Tensor) and first.is_cuda and isinstance(second, Tensor) and second.is_cuda:
        from lungkit.metrics import _surface_cuda

        if _surface_cuda.is_available():
            pairs = _surface_cuda.surface_distances(first, second, labels=labels, spacing_mm=spacing_mm)
            return [SurfaceDistances(*pair) for pair in pairs]
    spacing = [float(step) for step in spacing_mm]
    arrays = [_as_uint8(volume) for volume in (first, second)]
    if all(array.flags.f_contiguous and not array.flags.c_contiguous for array in arrays):
        # Volumes as nibabel gives them: reading their axes in reverse spares a copy.
        arrays, spacing = [array.T for array in arrays], spacing[::-1]
    arrays = [np.ascontiguousarray(array) for array in arrays]
    if _native is None:
        pairs = _surface_numpy.surface_distances(*arrays, spacing_mm=spacing, labels=labels)
    else:
        count = available_cpus() if threads is None else threads
        try:
            pairs = _native.surface_distances(*arrays, spacing_mm=spacing, labels=list(labels), threads=count)
        except MemoryError as error:
            raise ResourceError(
                f"not enough memory for the surface distances of volumes {arrays[0].shape}"
            ) from error
    return [SurfaceDistances(*pair) for pair in pairs]


def hausdorff_mm(
    distances: SurfaceDistances,
    *,
    percentile: float = 95.0,
    definition: HausdorffDefinition = HausdorffDefinition.DIRECTED,
    empty: EmptyPolicy = EmptyPolicy.NAN,
) -> float:
    r"""Hausdorff distance in mm, or its robust form, a percentile.

    With A the distances from the boundary voxels of the prediction to the truth, and B those the other way::

        directed:  max(percentile(A), percentile(B))        pooled:  percentile(A and B together)

    Percentiles interpolate linearly. At 100 both are the Hausdorff distance. The two differ by millimetres at 95, which
    is why tables name the one they hold. If a mask is empty the value is what ``empty`` says.

    Source: Huttenlocher et al. 1993, "Comparing images using the Hausdorff distance".

    Raises:
        UsageError: a percentile outside 0..100.

    Example:
        >>> sets = SurfaceDistances(np.float32([0, 0, 0, 4]), np.float32([0, 2]))
        >>> hausdorff_mm(sets, percentile=100), hausdorff_mm(sets, percentile=50)
        (4.0, 1.0)
        >>> hausdorff_mm(sets, percentile=50, definition=HausdorffDefinition.POOLED)
        0.0
    """
    if not 0 <= percentile <= 100:
        raise UsageError(f"percentile must be between 0 and 100, got {percentile}")
    if distances.empty_sides:
        return _distance_of_empty(distances, empty)
    sets = [
        distances.prediction_to_truth.astype(np.float64),
        distances.truth_to_prediction.astype(np.float64),
    ]
    if HausdorffDefinition(definition) is HausdorffDefinition.POOLED:
        return float(np.percentile(np.concatenate(sets), percentile))
    return max(float(np.percentile(values, percentile)) for values in sets)


def assd_mm(distances: SurfaceDistances, *, empty: EmptyPolicy = EmptyPolicy.NAN) -> float:
    """Average symmetric surface distance in mm: the mean of both sets of distances taken together.

    Source: Heimann et al. 2009, "Comparison and evaluation of methods for liver segmentation from CT datasets".

    Example:
        >>> assd_mm(SurfaceDistances(np.float32([0, 0, 3]), np.float32([1])))
        1.0
    """
    if distances.empty_sides:
        return _distance_of_empty(distances, empty)
    sets = (distances.prediction_to_truth, distances.truth_to_prediction)
    return float(sum(values.sum(dtype=np.float64) for values in sets) / sum(map(len, sets)))


def surface_dice(
    distances: SurfaceDistances, tolerance_mm: float, *, empty: EmptyPolicy = EmptyPolicy.NAN
) -> float:
    """Normalised surface Dice (NSD): the share of boundary voxels within a tolerance of the other surface.

    ``(#{a <= t} + #{b <= t}) / (#a + #b)`` over the boundary voxels of both masks, each counting once. (The
    original weighs them by their surface area.) It is 0 where one mask is empty, and as ``empty`` says where both are.

    Source: Nikolov et al. 2021, "Clinically applicable segmentation of head and neck anatomy for radiotherapy".

    Raises:
        UsageError: a negative tolerance.

    Example:
        >>> surface_dice(SurfaceDistances(np.float32([0, 0, 3]), np.float32([1])), 1.0)
        0.75
    """
    if not tolerance_mm >= 0:
        raise UsageError(f"tolerance_mm must be at least 0, got {tolerance_mm}")
    if distances.empty_sides == 2 or (
        empty is EmptyPolicy.NAN_IF_TRUTH_EMPTY and not len(distances.truth_to_prediction)
    ):
        return 1.0 if empty is EmptyPolicy.PERFECT_IF_BOTH_EMPTY else math.nan
    sets = (distances.prediction_to_truth, distances.truth_to_prediction)
    limit = tolerance_mm * (1 + _ROUNDING)
    return float(sum((values <= limit).sum() for values in sets) / sum(map(len, sets)))


def available_cpus() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _distance_of_empty(distances: SurfaceDistances, empty: EmptyPolicy) -> float:
    if EmptyPolicy(empty) is EmptyPolicy.PERFECT_IF_BOTH_EMPTY:
        return 0.0 if distances.empty_sides == 2 else math.inf
    return math.nan


def as_numpy(volume: ArrayLike) -> np.ndarray:
    """A tensor or array as an array, on the CPU."""
    return volume.detach().cpu().numpy() if isinstance(volume, Tensor) else np.asarray(volume)


def _as_tensor_or_array(volume: ArrayLike) -> ArrayLike:
    return volume.detach() if isinstance(volume, Tensor) else np.asarray(volume)


def _is_foreground(mask: ArrayLike) -> ArrayLike:
    """``mask != 0``; without a copy, which takes as long as the rest for a small lesion, of what is bool already."""
    return mask if str(mask.dtype).endswith("bool") else mask != 0


def _as_uint8(volume: ArrayLike) -> np.ndarray:
    array = as_numpy(volume)
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.bool_:
        return array.view(np.uint8)
    if array.dtype.kind not in "iu":
        raise UsageError(f"label maps must be integer or bool, got {array.dtype}")
    if array.size and (array.min() < 0 or array.max() > 255):
        raise UsageError(f"labels must be 0 to 255, found {array.min()} to {array.max()}")
    return array.astype(np.uint8)


def _check_arguments(
    prediction: ArrayLike, truth: ArrayLike, labels: Sequence[int], spacing_mm: Sequence[float]
) -> None:
    if tuple(prediction.shape) != tuple(truth.shape):
        raise UsageError(
            f"prediction {tuple(prediction.shape)} and truth {tuple(truth.shape)} must have the same shape"
        )
    if prediction.ndim not in (2, 3):
        raise UsageError(f"masks must be (Y, X) or (Z, Y, X), got shape {tuple(prediction.shape)}")
    if len(spacing_mm) != prediction.ndim or not all(0 < step < math.inf for step in spacing_mm):
        raise UsageError(
            f"spacing_mm must be {prediction.ndim} positive numbers, one an axis, got {tuple(spacing_mm)}"
        )
    if not all(1 <= label <= 255 for label in labels):
        raise UsageError(f"labels must be 1 to 255, got {tuple(labels)}")
