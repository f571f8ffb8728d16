"""Metrics of a segmentation, as pure functions on arrays or tensors, with every definition named."""

from __future__ import annotations

from lungkit.metrics.case_table import CaseRow, CaseTable, MetricSummary
from lungkit.metrics.overlap import (
    OVERLAP_METRICS,
    CaseOverlap,
    EmptyPolicy,
    evaluate_case,
    overlap_metrics,
    touched_by_policy,
)

__all__ = [
    "OVERLAP_METRICS",
    "CaseOverlap",
    "CaseRow",
    "CaseTable",
    "EmptyPolicy",
    "MetricSummary",
    "evaluate_case",
    "overlap_metrics",
    "touched_by_policy",
]
