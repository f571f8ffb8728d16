"""Reports for a browser: one file a scan with a viewer, and pages of tables and charts; offline, no dependency."""

from __future__ import annotations

from lungkit.report.html.case_page import Case, MapLayer, MaskLayer, write_case_page
from lungkit.report.html.page import is_ours, write_page
from lungkit.report.html.volumes import MAX_VOXELS

__all__ = ["MAX_VOXELS", "Case", "MapLayer", "MaskLayer", "is_ours", "write_case_page", "write_page"]
