"""A label mask from DICOM, whichever object holds it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from lungkit.data.dicom.files import read_header
from lungkit.data.dicom.rtstruct import STRUCTURE_SET, read_rtstruct
from lungkit.data.dicom.segmentation import LABEL_MAP, SEGMENTATION, read_dicom_seg
from lungkit.data.dicom.series import DicomScan
from lungkit.data.volume import Volume
from lungkit.errors import DataError


def read_dicom_label(
    path: str | os.PathLike[str], scan: DicomScan, *, names: str | Sequence[str] | None = None
) -> tuple[Volume, dict[str, int]]:
    """Read an RTSTRUCT or a SEG onto the grid of ``scan``, whichever the file is.

    Args:
        path: the file.
        scan: the series it was made on.
        names: of the structures or segments to read; None: all.

    Returns:
        The mask, uint8 (X, Y, Z), and its names with their values.

    Raises:
        DataError: the file holds neither, or cannot be used (see :func:`read_rtstruct`, :func:`read_dicom_seg`).
        UsageError: pydicom is not installed.

    Example:
        >>> mask, labels = read_dicom_label("RS.dcm", scan, names="GTV-1")  # doctest: +SKIP
        >>> labels  # doctest: +SKIP
        {'GTV-1': 1}
    """
    path = Path(path)
    kind = read_header(path).SOPClassUID
    if kind == STRUCTURE_SET:
        return read_rtstruct(path, scan, roi=names)
    if kind in (SEGMENTATION, LABEL_MAP):
        return read_dicom_seg(path, scan, segment=names)
    raise DataError(f"{path.name}: {kind.name} holds no mask; name an RTSTRUCT or a SEG")
