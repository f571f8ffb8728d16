"""DICOM secondary captures: a picture that any viewer of a PACS shows beside the scan."""

from __future__ import annotations

import os

import numpy as np

from lungkit._atomic import atomic_path
from lungkit.data.dicom._packages import quiet, require
from lungkit.data.dicom.labels import choose_character_set, source_header
from lungkit.data.dicom.series import DicomScan
from lungkit.errors import DataError, UsageError


def write_secondary_capture(
    path: str | os.PathLike[str],
    scan: DicomScan,
    picture: np.ndarray,
    *,
    series_description: str = "lungkit preview",
    series_number: int = 303,
) -> None:
    """Write a picture as a Secondary Capture Image, whole or not at all; patient and study are those of the source.

    Args:
        path: of the file, usually ``.dcm``.
        scan: the series that the picture was made of.
        picture: uint8 (rows, columns, 3), RGB, which names no patient.
        series_description: of the new series, and its ``series_number``.

    Raises:
        UsageError: another shape or type; highdicom is not installed.
        DataError: the source lacks tags or holds values that DICOM forbids.
        ResourceError: the disk is full; nothing is left behind.

    Example:
        >>> write_secondary_capture("preview.dcm", scan, np.zeros((8, 8, 3), np.uint8))  # doctest: +SKIP
    """
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
        raise UsageError(
            f"picture: {picture.dtype} of shape {picture.shape}, expected uint8 (rows, columns, 3)"
        )
    hd = require("highdicom")
    try:
        with quiet:
            image = hd.sc.SCImage.from_ref_dataset(
                ref_dataset=source_header(scan),
                pixel_array=picture,
                photometric_interpretation=hd.PhotometricInterpretationValues.RGB,
                bits_allocated=8,
                coordinate_system=hd.CoordinateSystemNames.PATIENT,
                patient_orientation=("L", "F"),
                series_instance_uid=hd.UID(),
                series_number=series_number,
                sop_instance_uid=hd.UID(),
                instance_number=1,
                manufacturer="lungkit",
                series_description=series_description,
                specific_character_set=choose_character_set(scan, [series_description]),
            )
            image.PatientOrientation = None  # several planes in one picture
            image.BurnedInAnnotation = "NO"
            image.ConversionType = "WSD"
    except MemoryError:
        raise
    except Exception as error:
        # The message may quote a patient attribute, so only its kind is passed on.
        raise DataError(
            f"{scan.series.files[0].name}: no picture can be made from this source ({type(error).__name__}): a patient "
            "or study attribute is missing or not allowed; correct it or export the series again"
        ) from None
    with atomic_path(path) as temporary, quiet:
        image.save_as(temporary)
