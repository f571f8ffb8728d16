"""Figures and tables for people; matplotlib is imported when a figure is drawn."""

from __future__ import annotations

from lungkit.report.curves import save_curves
from lungkit.report.distributions import save_distributions
from lungkit.report.overlays import choose_slice, save_overlays
from lungkit.report.previews import save_preview
from lungkit.report.tables import (
    case_table_from_dict,
    case_table_to_dict,
    format_case_table,
    format_rows,
    format_value,
    metric_title,
    policy_note,
    write_case_table,
)

__all__ = [
    "case_table_from_dict",
    "case_table_to_dict",
    "choose_slice",
    "format_case_table",
    "format_rows",
    "format_value",
    "metric_title",
    "policy_note",
    "save_curves",
    "save_distributions",
    "save_overlays",
    "save_preview",
    "write_case_table",
]
