"""DICOM in and out: CT series to volumes, masks to and from SEG and RTSTRUCT, measures to SR, pictures.

Needs ``pip install 'lungkit[dicom]'``.
"""

from __future__ import annotations

from lungkit.data.dicom.measurement_report import LesionMeasures, write_measurement_report
from lungkit.data.dicom.read_label import read_dicom_label
from lungkit.data.dicom.rtstruct import read_rtstruct, write_rtstruct
from lungkit.data.dicom.secondary_capture import write_secondary_capture
from lungkit.data.dicom.segmentation import read_dicom_seg, write_dicom_seg
from lungkit.data.dicom.series import DicomScan, SeriesInfo, find_series, read_series

__all__ = [
    "DicomScan",
    "LesionMeasures",
    "SeriesInfo",
    "find_series",
    "read_dicom_label",
    "read_dicom_seg",
    "read_rtstruct",
    "read_series",
    "write_dicom_seg",
    "write_measurement_report",
    "write_rtstruct",
    "write_secondary_capture",
]
