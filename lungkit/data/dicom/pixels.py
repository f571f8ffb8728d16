"""The pixels of one slice, whole and in HU, or an error that says why not."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lungkit.data.dicom._packages import quiet, require
from lungkit.data.dicom.files import read_dataset
from lungkit.errors import DataError, UsageError

AIR_HU = -1024
"""What padding becomes: as dark as 12-bit CT can store."""

# Packages whose decoders pydicom finds, by a part of the transfer syntax's name; the more special names come first.
_DECODERS = {
    "JPEG-LS": "pyjpegls",
    "JPEG 2000": "pylibjpeg and pylibjpeg-openjpeg",
    "JPEG": "pylibjpeg and pylibjpeg-libjpeg",
}

# Padding this dark is air already; real air may have the same value and must keep it.
_DARK_HU = -900
# No tissue, but dense metal: a padding value up to here may occur in the patient too, whatever the tag says.
_BRIGHT_HU = 3071


def read_slice(path: Path, header: Any) -> np.ndarray:
    """HU (rows, columns) of a single-frame CT image: integers where slope and intercept are whole, else float64.

    HU = RescaleSlope * stored + RescaleIntercept, of this slice. Voxels of PixelPaddingValue (up to
    PixelPaddingRangeLimit), which lie outside of the scanned circle, become :data:`AIR_HU` unless they are dark as
    air anyhow; where the value could be one of tissue as well, only those that hang together with the border do.

    Raises:
        DataError: no decoder for the compression, pixels missing, truncated or damaged, or another object
            than ``header`` describes.
    """
    return _to_hu(_read_raw(path, header), header, path)


def read_frames(path: Path, headers: Sequence[Any]) -> Iterator[np.ndarray]:
    """As :func:`read_slice`, for the frames of a multi-frame file, one at a time.

    Args:
        path: of the file.
        headers: of frames, see :func:`lungkit.data.dicom.enhanced.split_frames`, in the order to read them.

    Raises:
        DataError: as :func:`read_slice`.
    """
    syntax = read_dataset(path, pixels=False).file_meta.get("TransferSyntaxUID")
    with _decoding_pixels(path, syntax):
        if syntax is not None and syntax.is_encapsulated:
            _require_decoder(syntax, path)
    frames = require("pydicom.pixels").iter_pixels(
        path, indices=[int(header.InstanceNumber) - 1 for header in headers]
    )
    for header in headers:
        with _decoding_pixels(path, syntax):
            raw = np.asarray(next(frames))
        _check_shape(raw, header, path)
        yield _to_hu(raw, header, path)


def _to_hu(raw: np.ndarray, header: Any, path: Path) -> np.ndarray:
    stored = _stored_bits(raw, int(header.BitsStored))
    slope, intercept = rescale_of(header)
    if is_whole(slope, intercept):
        hu = stored.astype(np.int32 if stored.dtype.itemsize < 4 else np.int64)
        hu *= int(slope)
        hu += int(intercept)
    else:
        hu = stored * np.float64(slope) + intercept
    padding = _padding(raw, stored, hu, header, path)
    if padding is not None:
        hu[padding] = AIR_HU
    return hu


def rescale_of(header: Any) -> tuple[float, float]:
    """Slope and intercept of a slice."""
    return float(header.RescaleSlope), float(header.RescaleIntercept)


def is_whole(slope: float, intercept: float) -> bool:
    """Whether HU are whole numbers."""
    return slope.is_integer() and intercept.is_integer() and max(abs(slope), abs(intercept)) < 2**15


def _padding(
    raw: np.ndarray, stored: np.ndarray, hu: np.ndarray, header: Any, path: Path
) -> np.ndarray | None:
    """Which pixels are padding and are to become air."""
    value, limit = (header.get(name) for name in ("PixelPaddingValue", "PixelPaddingRangeLimit"))
    if value is None:
        return None
    try:
        ends = [int(end) for end in (value, value if limit is None else limit)]
    except (TypeError, ValueError):
        raise DataError(
            f"{path.name}: PixelPaddingValue or PixelPaddingRangeLimit is not a number; correct or remove it"
        ) from None
    # Written as signed or unsigned, with bits that are not stored or without them, whatever the other tags say.
    found = np.zeros(raw.shape, bool)
    for pixels, bits in ((raw, 8 * raw.dtype.itemsize), (stored, int(header.BitsStored))):
        low, high = sorted(_as_stored(end, bits, signed=raw.dtype.kind == "i") for end in ends)
        if high - low == abs(ends[1] - ends[0]):
            found |= (pixels >= low) & (pixels <= high)
    if not found.any():
        return None
    found &= (hu < AIR_HU) | (hu > _DARK_HU)
    doubtful = found & (hu > _DARK_HU) & (hu <= _BRIGHT_HU)
    if doubtful.any():
        found &= ~doubtful | _touching_border(found)
    return found


def _as_stored(value: int, bits: int, *, signed: bool) -> int:
    value %= 1 << bits
    return value - (1 << bits) if signed and value >= 1 << bits - 1 else value


def _touching_border(mask: np.ndarray) -> np.ndarray:
    """The part of ``mask`` (rows, columns) that hangs together with its border."""
    import cc3d

    labels = cc3d.connected_components(mask, connectivity=4)
    border = np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]])
    touching = np.zeros(int(labels.max()) + 1, bool)
    touching[border] = True
    touching[0] = False
    return touching[labels]


def _read_raw(path: Path, header: Any) -> np.ndarray:
    """Integers (rows, columns) with all their allocated bits."""
    dataset = read_dataset(path)
    if (
        "SOPInstanceUID" not in dataset
    ):  # pydicom gives up on the whole object where compressed pixels end early
        raise DataError(f"{path.name}: truncated within the pixels; export or copy it again")
    syntax = dataset.file_meta.get("TransferSyntaxUID")
    with _decoding_pixels(path, syntax):
        if dataset.SOPInstanceUID != header.SOPInstanceUID:
            raise DataError(f"{path.name}: changed while the series was read; read it again")
        if "PixelData" not in dataset:
            raise DataError(f"{path.name}: no pixel data; the file is truncated: export or copy it again")
        if syntax is not None and syntax.is_encapsulated:
            _require_decoder(syntax, path)
        else:
            _check_length(dataset, path)
        stored = np.asarray(dataset.pixel_array)
    _check_shape(stored, header, path)
    return stored


@contextlib.contextmanager
def _decoding_pixels(path: Path, syntax: Any) -> Iterator[None]:
    """Turn whatever a decoder raises into a DataError that names the file."""
    try:
        with quiet:
            yield
    except (DataError, UsageError, MemoryError):
        raise
    except Exception as error:  # each decoder has its own kinds
        how = "unknown" if syntax is None else syntax.name
        raise DataError(
            f"{path.name}: the pixels cannot be decoded ({type(error).__name__}, transfer syntax {how}); the file is "
            "truncated or damaged: export or copy it again"
        ) from None


def _check_shape(stored: np.ndarray, header: Any, path: Path) -> None:
    if stored.shape != (header.Rows, header.Columns) or stored.dtype.kind not in "iu":
        raise DataError(
            f"{path.name}: pixels of shape {stored.shape} and type {stored.dtype}, expected integers "
            f"({header.Rows}, {header.Columns})"
        )


def _require_decoder(syntax: Any, path: Path) -> None:
    try:
        available = require("pydicom.pixels").get_decoder(syntax).is_available
    except NotImplementedError:
        available = False
    if not available:
        raise DataError(
            f"{path.name}: compressed as {syntax.name}, for which no decoder is installed: {_decoder_of(syntax)}, or "
            "decompress the files first (gdcmconv --raw, dcmdjpeg)"
        )


def _decoder_of(syntax: Any) -> str:
    """What to install for a transfer syntax."""
    for family, packages in _DECODERS.items():
        if family in syntax.name:
            return f"pip install 'lungkit[dicom]', which has {packages}"
    return "pydicom knows of none"


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
