"""DICOM in and out: CT series to volumes, masks to and from SEG and RTSTRUCT.

Needs ``pip install 'lungkit[dicom]'``.
"""

from __future__ import annotations

from lungkit.data.dicom.series import DicomScan, SeriesInfo, find_series, read_series

__all__ = ["DicomScan", "SeriesInfo", "find_series", "read_series"]
