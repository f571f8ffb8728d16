"""The pixels of one slice, whole and in HU, or an error that says why not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from lungkit.data.dicom._packages import quiet, require
from lungkit.data.dicom.files import read_dataset
from lungkit.errors import DataError, UsageError


def read_slice(path: Path, header: Any) -> np.ndarray:
    """Stored values (rows, columns) of a single-frame CT image, integers as stored.

    Raises:
        DataError: no decoder for the compression, pixels missing, truncated or damaged, or another object
            than ``header`` describes.
    """
    dataset = read_dataset(path)
    if (
        "SOPInstanceUID" not in dataset
    ):  # pydicom gives up on the whole object where compressed pixels end early
        raise DataError(f"{path.name}: truncated within the pixels; export or copy it again")
    syntax = dataset.file_meta.get("TransferSyntaxUID")
    try:
        with quiet:
            if dataset.SOPInstanceUID != header.SOPInstanceUID:
                raise DataError(f"{path.name}: changed while the series was read; read it again")
            if "PixelData" not in dataset:
                raise DataError(f"{path.name}: no pixel data; the file is truncated: export or copy it again")
            if syntax is not None and syntax.is_encapsulated:
                _require_decoder(syntax, path)
            else:
                _check_length(dataset, path)
            stored = np.asarray(dataset.pixel_array)
    except (DataError, UsageError, MemoryError):
        raise
    except Exception as error:  # each decoder has its own kinds
        how = "unknown" if syntax is None else syntax.name
        raise DataError(
            f"{path.name}: the pixels cannot be decoded ({type(error).__name__}, transfer syntax {how}); the file is "
            "truncated or damaged: export or copy it again"
        ) from None
    if stored.shape != (header.Rows, header.Columns) or stored.dtype.kind not in "iu":
        raise DataError(
            f"{path.name}: pixels of shape {stored.shape} and type {stored.dtype}, expected integers "
            f"({header.Rows}, {header.Columns})"
        )
    return _stored_bits(stored, int(header.BitsStored))


def _require_decoder(syntax: Any, path: Path) -> None:
    try:
        available = require("pydicom.pixels").get_decoder(syntax).is_available
    except NotImplementedError:
        available = False
    if not available:
        raise DataError(
            f"{path.name}: compressed as {syntax.name}, for which no decoder is installed; decompress the files first "
            "(gdcmconv --raw, dcmdjpeg), or pip install python-gdcm or pylibjpeg with its plugins"
        )


def _check_length(dataset: Any, path: Path) -> None:
    expected = int(dataset.Rows) * int(dataset.Columns) * int(dataset.BitsAllocated) // 8
    got = len(dataset.PixelData)
    if got not in (expected, expected + expected % 2):
        raise DataError(
            f"{path.name}: {got} bytes of pixels, the header describes {expected}; the file is truncated or damaged: "
            "export or copy it again"
        )


def _stored_bits(stored: np.ndarray, bits: int) -> np.ndarray:
    """Keep the lowest ``bits`` of every value, with their sign: old scanners drew overlays into the others."""
    unused = 8 * stored.dtype.itemsize - bits
    return (stored << unused) >> unused if unused else stored
