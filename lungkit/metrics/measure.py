"""All metrics of one case in one call: overlap, surfaces, lesions, sizes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np
from torch import Tensor

from lungkit.errors import UsageError
from lungkit.metrics.lesions import lesion_metrics, match_lesions
from lungkit.metrics.overlap import ArrayLike, EmptyPolicy, evaluate_case
from lungkit.metrics.size import longest_diameter_mm, volume_ml
from lungkit.metrics.surface import (
    HausdorffDefinition,
    SurfaceDistances,
    as_numpy,
    assd_mm,
    hausdorff_mm,
    label_surface_distances,
    surface_dice,
)
from lungkit.ops._labels import equal_to


class MetricGroup(str, Enum):
    """Families of metrics that :func:`measure_case` computes on request."""

    OVERLAP = "overlap"
    SURFACE = "surface"
    LESION = "lesion"
    SIZE = "size"


@dataclass(frozen=True)
class MetricOptions:
    """Which metrics, under which definitions; each definition that changes a number is part of the number's name.

    Raises:
        UsageError: a percentile, tolerance or IoU out of range, or no group.
    """

    groups: tuple[MetricGroup, ...] = tuple(MetricGroup)
    percentile: float = 95.0
    hausdorff: HausdorffDefinition = HausdorffDefinition.DIRECTED
    tolerance_mm: float = 2.0
    min_iou: float = 0.0
    empty: EmptyPolicy = EmptyPolicy.NAN

    def __post_init__(self) -> None:
        if not self.groups:
            raise UsageError(f"groups must name at least one of {', '.join(g.value for g in MetricGroup)}")
        if not 0 <= self.percentile <= 100:
            raise UsageError(f"percentile must be between 0 and 100, got {self.percentile}")
        if not self.tolerance_mm >= 0:
            raise UsageError(f"tolerance_mm must be at least 0, got {self.tolerance_mm}")
        if not 0 <= self.min_iou <= 1:
            raise UsageError(f"min_iou must be between 0 and 1, got {self.min_iou}")

    @property
    def hausdorff_name(self) -> str:
        """Name of the Hausdorff metric, e.g. ``hd95_directed_mm``."""
        return f"hd{self.percentile:g}_{HausdorffDefinition(self.hausdorff).value}_mm"

    @property
    def surface_dice_name(self) -> str:
        """Name of the surface Dice, e.g. ``nsd_voxel_2mm``."""
        return f"nsd_voxel_{self.tolerance_mm:g}mm"

    def definitions(self) -> dict[str, str]:
        """What every metric of these options is, in one line.

        Example:
            >>> MetricOptions().definitions()["nsd_voxel_2mm"]
            'share of the boundary voxels of both masks within 2 mm of the other surface, each voxel counting once'
        """
        percentile = (
            f"{self.percentile:g}th percentile of distances between boundary voxels and the other surface"
        )
        way = {
            HausdorffDefinition.DIRECTED: "the larger of both directions",
            HausdorffDefinition.POOLED: "both directions pooled",
        }[HausdorffDefinition(self.hausdorff)]
        touching = "one common voxel" if self.min_iou == 0 else f"IoU of at least {self.min_iou:g}"
        by_group = {
            MetricGroup.OVERLAP: {
                "dice": "2 TP / (2 TP + FP + FN)",
                "iou": "TP / (TP + FP + FN)",
                "ppv": "TP / (TP + FP)",
                "sensitivity": "TP / (TP + FN)",
                "volume_similarity": "1 - |FP - FN| / (2 TP + FP + FN)",
                "specificity": "TN / (TN + FP)",
                "tp": "true positive voxels",
                "fp": "false positive voxels",
                "fn": "false negative voxels",
            },
            MetricGroup.SURFACE: {
                self.hausdorff_name: f"{percentile}, {way}, mm",
                self.surface_dice_name: (
                    f"share of the boundary voxels of both masks within {self.tolerance_mm:g} mm of the other "
                    "surface, each voxel counting once"
                ),
                "assd_pooled_mm": "mean distance of the boundary voxels of both masks to the other surface, mm",
            },
            MetricGroup.LESION: {
                "lesion_sensitivity": f"true lesions found / true lesions; found: {touching} with a predicted one",
                "lesion_precision": f"predicted lesions that are real / predicted; real: {touching} with a true one",
                "lesion_f1": "harmonic mean of lesion sensitivity and precision",
                "lesion_dice": "mean over true lesions of the Dice with all predicted lesions that touch it",
                "lesions_true": "true lesions (26-connected components, 8-connected in 2D)",
                "lesions_found": "true lesions found",
                "lesions_predicted": "predicted lesions",
                "lesions_false": "predicted lesions without a match",
            },
            MetricGroup.SIZE: {
                "volume_true_ml": "volume of the truth, ml",
                "volume_predicted_ml": "volume of the prediction, ml",
                "diameter_true_mm": "longest in-plane diameter of a lesion of the truth, mm",
                "diameter_predicted_mm": "longest in-plane diameter of a lesion of the prediction, mm",
            },
        }
        return {
            name: text
            for group in MetricGroup
            if group in self.groups
            for name, text in by_group[group].items()
        }


@dataclass(frozen=True)
class Measurement:
    """Metrics of one class in one case."""

    values: dict[str, float]
    decided_by_policy: frozenset[str]
    """Names of the metrics that the empty policy decided."""


def measure_case(
    prediction: ArrayLike,
    truth: ArrayLike,
    labels: Mapping[str, int],
    spacing_mm: Sequence[float],
    *,
    options: MetricOptions | None = None,
    ignore_index: int | None = None,
    threads: int | None = None,
) -> dict[str, Measurement]:
    """Every metric of one case, for each class but the background (index 0).

    Voxels whose true label is ``ignore_index`` count nowhere: overlap leaves them out, and the other groups see
    background there in both label maps.

    Args:
        prediction: class indices (Y, X) or (Z, Y, X); an array or a tensor. One slice (1, Y, X) is measured in 2D.
        truth: class indices of the same shape.
        labels: name -> class index, 0 to K-1.
        spacing_mm: size of a voxel along every axis, in the order of the axes.
        options: which metrics, under which definitions.
        ignore_index: label of voxels to leave out.
        threads: CPU threads for the surface distances.

    Raises:
        UsageError: shapes or spacing do not fit.
        DataError: a class index outside the labels.

    Example:
        >>> mask = np.zeros((4, 8, 8), np.uint8)
        >>> mask[1:3, 2:6, 2:6] = 1
        >>> measured = measure_case(mask, mask, {"background": 0, "tumour": 1}, (2.5, 1, 1))["tumour"].values
        >>> measured["dice"], measured["hd95_directed_mm"], measured["volume_true_ml"]
        (1.0, 0.0, 0.08)
    """
    options = options or MetricOptions()
    measured: dict[str, dict[str, float]] = {name: {} for name, index in labels.items() if index != 0}
    decided: dict[str, set[str]] = {name: set() for name in measured}
    if MetricGroup.OVERLAP in options.groups:
        classes = max(2, *(index + 1 for index in labels.values()))
        overlap = evaluate_case(prediction, truth, classes, ignore_index=ignore_index, empty=options.empty)
        for name in measured:
            counts = zip(("tp", "fp", "fn"), overlap.counts[labels[name]].tolist(), strict=True)
            measured[name] |= overlap.of_class(labels[name]) | {key: float(count) for key, count in counts}
            decided[name] |= overlap.decided_in_class(labels[name])
    if set(options.groups) != {MetricGroup.OVERLAP}:
        if ignore_index is not None:
            kept = ~equal_to(truth, ignore_index) if isinstance(truth, Tensor) else truth != ignore_index
            prediction, truth = prediction * kept, truth * kept
        # Pixels of a 2D image have no volume; a single slice of a scan has.
        voxel_ml = volume_ml(np.ones((1, 1, 1)), spacing_mm) if len(spacing_mm) == 3 else math.nan
        if prediction.ndim == 3 and prediction.shape[0] == 1 and len(spacing_mm) == 3:
            prediction, truth, spacing_mm = prediction[0], truth[0], spacing_mm[1:]
    if MetricGroup.SURFACE in options.groups:
        indices = [labels[name] for name in measured]
        sets = label_surface_distances(
            prediction, truth, labels=indices, spacing_mm=spacing_mm, threads=threads
        )
        for name, distances in zip(measured, sets, strict=True):
            measured[name] |= _surface_metrics(distances, options)
            decided[name] |= _surface_metrics_decided(distances, options)
    for name in measured:
        if MetricGroup.LESION in options.groups or MetricGroup.SIZE in options.groups:
            masks = [as_numpy(volume) == labels[name] for volume in (prediction, truth)]
        if MetricGroup.LESION in options.groups:
            found = lesion_metrics(match_lesions(*masks, min_iou=options.min_iou), empty=options.empty)
            measured[name] |= found
            decided[name] |= _lesion_metrics_decided(found, options.empty)
        if MetricGroup.SIZE in options.groups:
            measured[name] |= _sizes(masks[0], masks[1], spacing_mm, voxel_ml)
    order = list(options.definitions())
    return {
        name: Measurement({key: values[key] for key in order}, frozenset(decided[name]))
        for name, values in measured.items()
    }


def _surface_metrics(distances: SurfaceDistances, options: MetricOptions) -> dict[str, float]:
    return {
        options.hausdorff_name: hausdorff_mm(
            distances, percentile=options.percentile, definition=options.hausdorff, empty=options.empty
        ),
        options.surface_dice_name: surface_dice(distances, options.tolerance_mm, empty=options.empty),
        "assd_pooled_mm": assd_mm(distances, empty=options.empty),
    }


def _surface_metrics_decided(distances: SurfaceDistances, options: MetricOptions) -> set[str]:
    decided = {options.hausdorff_name, "assd_pooled_mm"} if distances.empty_sides else set()
    no_truth = not len(distances.truth_to_prediction)
    if distances.empty_sides == 2 or (no_truth and options.empty is EmptyPolicy.NAN_IF_TRUTH_EMPTY):
        decided.add(options.surface_dice_name)
    return decided


def _lesion_metrics_decided(found: Mapping[str, float], empty: EmptyPolicy) -> set[str]:
    no_truth, no_prediction = not found["lesions_true"], not found["lesions_predicted"]
    if no_truth and (no_prediction or empty is EmptyPolicy.NAN_IF_TRUTH_EMPTY):
        return {"lesion_sensitivity", "lesion_precision", "lesion_f1", "lesion_dice"}
    if no_truth:
        return {"lesion_sensitivity", "lesion_dice"}
    return {"lesion_precision"} if no_prediction else set()


def _sizes(
    prediction: np.ndarray, truth: np.ndarray, spacing_mm: Sequence[float], voxel_ml: float
) -> dict[str, float]:
    return {
        "volume_true_ml": int(truth.sum()) * voxel_ml,
        "volume_predicted_ml": int(prediction.sum()) * voxel_ml,
        "diameter_true_mm": longest_diameter_mm(truth, spacing_mm),
        "diameter_predicted_mm": longest_diameter_mm(prediction, spacing_mm),
    }
