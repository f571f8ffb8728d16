"""Synthetic DICOM: small CT series, whole or spoilt in one way, for every test that reads or writes DICOM."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

PATIENT_NAME, PATIENT_ID = "Doe^Jane", "PID-4711"

OBLIQUE = (0.96, 0.28, 0.0, -0.224, 0.768, 0.6)
"""Row and column direction of slices turned about two axes."""


def make_hu(shape: tuple[int, int, int] = (12, 10, 6), seed: int = 0) -> np.ndarray:
    """HU (X, Y, Z) with a different value in almost every voxel, int16."""
    return np.random.default_rng(seed).integers(-1000, 1500, shape).astype(np.int16)


def write_ct(
    folder: Path,
    hu: np.ndarray | None = None,
    *,
    spacing: tuple[float, float] = (0.7, 0.9),
    step: float = 2.5,
    orientation: Sequence[float] = (1, 0, 0, 0, 1, 0),
    origin: tuple[float, float, float] = (-50.0, -60.0, 100.0),
    tilt_degrees: float = 0.0,
    intercept: float = -1024,
    series: int = 1,
    edit: Callable[[Any, int], None] | None = None,
    compress: str | None = None,
) -> np.ndarray:
    """Write a CT series, one file a slice, whose names run against the order of the slices.

    Args:
        folder: made if need be.
        hu: (X, Y, Z) as the volume should hold it; default :func:`make_hu`.
        spacing: between rows and between columns in mm, as in PixelSpacing; ``step`` between slices.
        orientation: ImageOrientationPatient; ``origin`` is the first slice's position.
        tilt_degrees: shifts each slice along its columns, as a tilted gantry does.
        intercept: RescaleIntercept; the slope is 1.
        series: number that tells the series in one folder apart.
        edit: changes the dataset of slice k before it is written.
        compress: transfer syntax to encode the pixels with.

    Returns:
        ``hu``.
    """
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian

    hu = make_hu() if hu is None else hu
    folder.mkdir(parents=True, exist_ok=True)
    row, column = np.array(orientation[:3], float), np.array(orientation[3:], float)
    along = np.cross(row, column) * step + column * step * np.tan(np.radians(tilt_degrees))
    for k in range(hu.shape[2]):
        stored = hu[:, :, k].T.astype(np.int32) - int(intercept)
        dataset = Dataset()
        dataset.file_meta = FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
        dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = f"1.2.3.{series}.{k + 1}"
        dataset.PatientName, dataset.PatientID = PATIENT_NAME, PATIENT_ID
        dataset.PatientBirthDate, dataset.PatientSex = "19500101", "F"
        dataset.StudyInstanceUID, dataset.SeriesInstanceUID = "1.2.3", f"1.2.3.{series}"
        dataset.StudyDate, dataset.StudyTime, dataset.StudyID = "20200102", "101112", "7"
        dataset.AccessionNumber, dataset.ReferringPhysicianName = "A1", "Roe^Richard"
        dataset.FrameOfReferenceUID, dataset.PositionReferenceIndicator = "1.2.3.99", ""
        dataset.Modality, dataset.SeriesNumber, dataset.SeriesDescription = "CT", series, f"Chest {series}"
        dataset.ImageType, dataset.InstanceNumber = ["ORIGINAL", "PRIMARY", "AXIAL"], k + 1
        dataset.ImageOrientationPatient = [float(value) for value in orientation]
        dataset.ImagePositionPatient = [round(float(value), 9) for value in np.array(origin) + k * along]
        dataset.PixelSpacing, dataset.SliceThickness = list(spacing), step
        dataset.Rows, dataset.Columns = stored.shape
        dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 16, 15
        dataset.PixelRepresentation = 0
        dataset.RescaleSlope, dataset.RescaleIntercept = 1, intercept
        dataset.add_new("PixelData", "OW", stored.astype("<u2").tobytes())
        if compress is not None:
            dataset.compress(compress)
        if edit is not None:
            edit(dataset, k)
        name = f"{series}-{hu.shape[2] - k:03d}-{k:03d}.dcm"
        dataset.save_as(folder / name, enforce_file_format=True)
    return hu


def write_enhanced_ct(
    folder: Path,
    hu: np.ndarray | None = None,
    *,
    spacing: tuple[float, float] = (0.7, 0.9),
    step: float = 2.5,
    orientation: Sequence[float] = (1, 0, 0, 0, 1, 0),
    edit: Callable[[Any], None] | None = None,
    compress: str | None = None,
) -> np.ndarray:
    """Write the series of :func:`write_ct` as one multi-frame file, its frames from the last slice to the first.

    Args:
        folder, hu, spacing, step, orientation, compress: as there.
        edit: changes the dataset before it is written.

    Returns:
        ``hu``.
    """
    from pydicom.dataset import Dataset

    headers: list[Any] = []
    hu = write_ct(
        folder,
        hu,
        spacing=spacing,
        step=step,
        orientation=orientation,
        edit=lambda one, _: headers.append(one),
    )
    for path in files(folder):
        path.unlink()

    def group(*keywords: str, of: Any) -> list[Any]:
        item = Dataset()
        for keyword in keywords:
            item[keyword] = of[keyword]
        return [item]

    whole, shared = headers[0], Dataset()
    shared.PixelMeasuresSequence = group("PixelSpacing", "SliceThickness", of=whole)
    shared.PlaneOrientationSequence = group("ImageOrientationPatient", of=whole)
    shared.PixelValueTransformationSequence = group("RescaleSlope", "RescaleIntercept", of=whole)
    frames = []
    for header in reversed(headers):
        frames.append(Dataset())
        frames[-1].PlanePositionSequence = group("ImagePositionPatient", of=header)
    whole.PixelData = b"".join(header.PixelData for header in reversed(headers))
    whole.SharedFunctionalGroupsSequence, whole.PerFrameFunctionalGroupsSequence = [shared], frames
    whole.NumberOfFrames = len(frames)
    whole.SOPClassUID = whole.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.2.1"
    for keyword in (
        *shared.PixelMeasuresSequence[0].dir(),
        "ImageOrientationPatient",
        "ImagePositionPatient",
    ):
        delattr(whole, keyword)
    del whole.RescaleSlope, whole.RescaleIntercept
    if compress is not None:
        whole.compress(compress)
    if edit is not None:
        edit(whole)
    whole.save_as(folder / "enhanced.dcm", enforce_file_format=True)
    return hu


def change(slice_index: int | None = None, **values: Any) -> Callable[[Any, int], None]:
    """An edit that sets attributes of one slice, or of all; None removes the attribute."""

    def edit(dataset: Any, k: int) -> None:
        if slice_index in (None, k):
            for keyword, value in values.items():
                if value is None:
                    delattr(dataset, keyword)
                else:
                    setattr(dataset, keyword, value)

    return edit


def lossless_jpeg(syntax: str) -> Callable[[Any, int], None]:
    """An edit that encodes the pixels as lossless JPEG (ITU T.81, process 14, first-order prediction from the left)."""

    def edit(dataset: Any, k: int) -> None:
        from pydicom.encaps import encapsulate

        pixels = np.frombuffer(dataset.PixelData, "<u2").reshape(dataset.Rows, dataset.Columns)
        dataset.PixelData = encapsulate([_lossless_jpeg(pixels)])
        dataset["PixelData"].VR = "OB"
        dataset.file_meta.TransferSyntaxUID = syntax

    return edit


def _lossless_jpeg(pixels: np.ndarray) -> bytes:
    rows, columns = pixels.shape
    predicted = np.empty(pixels.shape, np.int64)
    predicted[:, 1:], predicted[1:, 0], predicted[0, 0] = pixels[:, :-1], pixels[:-1, 0], 1 << 15
    bits = ""
    for difference in ((pixels.astype(np.int64) - predicted + 32767) % 65536 - 32767).ravel().tolist():
        size = abs(difference).bit_length()
        bits += f"{size:05b}"  # a Huffman table of codes that are all five bits long
        if 0 < size < 17 and difference != 32768:
            bits += f"{difference if difference > 0 else difference + (1 << size) - 1:0{size}b}"
    bits += "1" * (-len(bits) % 8)
    coded = int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\x00")
    frame = bytes((16, *divmod(rows, 256), *divmod(columns, 256), 1, 1, 0x11, 0))
    table = bytes((0, *([0] * 4), 17, *([0] * 11), *range(17)))
    segments = ((0xC3, frame), (0xC4, table), (0xDA, bytes((1, 1, 0, 1, 0, 0))))
    head = b"".join(bytes((0xFF, kind, *divmod(len(body) + 2, 256))) + body for kind, body in segments)
    return b"\xff\xd8" + head + coded + b"\xff\xd9"


def files(folder: Path) -> list[Path]:
    """The files of a series written by :func:`write_ct`, in the order of its slices."""
    return sorted(folder.glob("*.dcm"), key=lambda path: path.stem.split("-")[-1])


def make_mask(shape: tuple[int, int, int] = (12, 10, 6)) -> np.ndarray:
    """Labels 1 (a ring with a hole and an island in it, and a corner touch) and 2 (two separate pieces), uint8."""
    mask = np.zeros(shape, np.uint8)
    mask[1:8, 1:8, 1:4] = 1
    mask[2:7, 2:7, 2] = 0
    mask[4, 4, 2] = 1
    mask[8, 8, 1:4] = 1
    mask[10:, :3, 2:5] = 2
    mask[0, 9, 5] = 2
    return mask
