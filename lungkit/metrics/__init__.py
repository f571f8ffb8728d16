"""Metrics of a segmentation, as pure functions on arrays or tensors, with every definition named."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lungkit.metrics.case_table import CaseRow, CaseTable, MetricSummary
from lungkit.metrics.overlap import (
    OVERLAP_METRICS,
    CaseOverlap,
    EmptyPolicy,
    decided_by_policy,
    evaluate_case,
    overlap_metrics,
)
from lungkit.metrics.surface import (
    HausdorffDefinition,
    SurfaceDistances,
    assd_mm,
    hausdorff_mm,
    label_surface_distances,
    surface_dice,
    surface_distances,
)

_LAZY = {
    "LesionMatch": "lesions",
    "LesionMetric": "modular",
    "label_lesions": "lesions",
    "lesion_metrics": "lesions",
    "match_lesions": "lesions",
    "Measurement": "measure",
    "MetricGroup": "measure",
    "MetricOptions": "measure",
    "measure_case": "measure",
    "Interval": "comparison",
    "OverlapMetric": "modular",
    "PairedComparison": "comparison",
    "SizeMetric": "modular",
    "SurfaceMetric": "modular",
    "axial_diameters_mm": "size",
    "bca_interval": "comparison",
    "compare_paired": "comparison",
    "holm": "comparison",
    "longest_diameter_mm": "size",
    "volume_ml": "size",
    "wilcoxon_signed_rank": "comparison",
}

if TYPE_CHECKING:
    from lungkit.metrics.comparison import (
        Interval,
        PairedComparison,
        bca_interval,
        compare_paired,
        holm,
        wilcoxon_signed_rank,
    )
    from lungkit.metrics.lesions import LesionMatch, label_lesions, lesion_metrics, match_lesions
    from lungkit.metrics.measure import Measurement, MetricGroup, MetricOptions, measure_case
    from lungkit.metrics.modular import LesionMetric, OverlapMetric, SizeMetric, SurfaceMetric
    from lungkit.metrics.size import axial_diameters_mm, longest_diameter_mm, volume_ml

__all__ = [
    "OVERLAP_METRICS",
    "CaseOverlap",
    "CaseRow",
    "CaseTable",
    "EmptyPolicy",
    "HausdorffDefinition",
    "Interval",
    "LesionMatch",
    "LesionMetric",
    "Measurement",
    "MetricGroup",
    "MetricOptions",
    "MetricSummary",
    "OverlapMetric",
    "PairedComparison",
    "SizeMetric",
    "SurfaceDistances",
    "SurfaceMetric",
    "assd_mm",
    "axial_diameters_mm",
    "bca_interval",
    "compare_paired",
    "decided_by_policy",
    "evaluate_case",
    "hausdorff_mm",
    "holm",
    "label_lesions",
    "label_surface_distances",
    "lesion_metrics",
    "longest_diameter_mm",
    "match_lesions",
    "measure_case",
    "overlap_metrics",
    "surface_dice",
    "surface_distances",
    "volume_ml",
    "wilcoxon_signed_rank",
]


def __getattr__(name: str) -> Any:
    # What needs a library of its own (connected components, torchmetrics) loads on first use.
    if name in _LAZY:
        return getattr(importlib.import_module(f"lungkit.metrics.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'lungkit.metrics' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
