"""DICOM files of a folder: which are images, and their headers without the pixels."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lungkit.data.dicom._packages import quiet, require
from lungkit.errors import DataError, LungkitError

CT_IMAGE = "1.2.840.10008.5.1.4.1.1.2"
ENHANCED_CT = ("1.2.840.10008.5.1.4.1.1.2.1", "1.2.840.10008.5.1.4.1.1.2.2")
_FILE_META = (0x00020002, 0x00020010)  # MediaStorageSOPClassUID, TransferSyntaxUID
DICOMDIR = "1.2.840.10008.1.3.10"
_DEFLATED = "1.2.840.10008.1.2.1.99"
_MOST_INFLATED = 1 << 30
_MAX_DEFLATE_RATIO = 1032  # as in lungkit.data.integrity
_CHUNK = 1 << 20

# Names that DICOM files go by; some archives give them none, or end the name with a part of a UID.
_DICOM_SUFFIXES = ("", ".dcm", ".dicom", ".ima")

_PATIENT_AND_STUDY = """
    PatientName PatientID IssuerOfPatientID PatientBirthDate PatientSex PatientIdentityRemoved DeidentificationMethod
    DeidentificationMethodCodeSequence PatientAge PatientSize PatientWeight StudyInstanceUID StudyDate StudyTime
    StudyID StudyDescription AccessionNumber ReferringPhysicianName
"""
_IMAGE = """
    SpecificCharacterSet ImageType SOPClassUID SOPInstanceUID Modality SeriesDescription SeriesInstanceUID SeriesNumber
    InstanceNumber AcquisitionNumber FrameOfReferenceUID PositionReferenceIndicator ImagePositionPatient
    ImageOrientationPatient PixelSpacing SliceThickness SpacingBetweenSlices Rows Columns SamplesPerPixel
    PhotometricInterpretation BitsAllocated BitsStored HighBit PixelRepresentation NumberOfFrames RescaleSlope
    RescaleIntercept RescaleType PixelPaddingValue PixelPaddingRangeLimit LossyImageCompression
    LossyImageCompressionRatio LossyImageCompressionMethod
"""
PATIENT_AND_STUDY = tuple(_PATIENT_AND_STUDY.split())
"""Attributes of the Patient, General Study and Patient Study modules that a derived object repeats."""

# Where one of these cannot be decoded it counts as absent: no need to refuse a scan for a weight that is no number.
_DISPENSABLE = {
    *PATIENT_AND_STUDY,
    *(
        "SeriesDescription",
        "SeriesNumber",
        "InstanceNumber",
        "AcquisitionNumber",
        "PositionReferenceIndicator",
    ),
    *("SliceThickness", "SpacingBetweenSlices", "LossyImageCompressionRatio", "LossyImageCompressionMethod"),
}


def read_headers(folder: Path) -> list[tuple[Path, Any]]:
    """Header (a pydicom ``Dataset`` of the attributes that lungkit uses) of every DICOM object in ``folder``.

    Only the folder's own files, in order of name; hidden files, DICOMDIR and files of other kinds are passed
    over.

    Raises:
        DataError: no such folder, no DICOM file in it, or a file that is named like one and cannot be read.
    """
    if folder.is_file():
        raise DataError(f"{folder.name}: a file; name the folder that holds the slices")
    if not folder.is_dir():
        raise DataError(f"{folder.name}: no such folder; name a folder of DICOM files")
    try:
        files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    except OSError as error:
        raise DataError(f"{folder.name}: cannot be read ({error.strerror}); name a readable folder") from None
    dicom = [path for path in files if is_dicom(path)]
    suffixes = {path.suffix.lower() for path in dicom} - {""}
    for path in files:
        if path.suffix.lower() in suffixes and path not in dicom:
            raise DataError(
                f"{path.name}: no DICM mark at byte 128, and named like the DICOM files beside it; it is truncated or "
                "damaged: export or copy it again, or move it out of the folder"
            )
    found = [(path, read_header(path)) for path in dicom]
    found = [
        (path, header)
        for path, header in found
        if header.file_meta.get("MediaStorageSOPClassUID") != DICOMDIR
    ]
    if not found:
        raise DataError(
            f"{folder.name}: no DICOM file among the {len(files)} files of this folder (subfolders are not "
            "searched); name the folder that holds the slices"
        )
    return found


def read_header(path: Path) -> Any:
    """Header of one DICOM file.

    Raises:
        DataError: it cannot be read, or lacks what says which object and which series it is.
    """
    header = read_dataset(path, pixels=False, keywords=(*_IMAGE.split(), *PATIENT_AND_STUDY))
    with quiet:
        for tag in list(header.keys()):
            if not _is_sound(header, tag):
                keyword = require("pydicom.datadict").keyword_for_tag(tag)
                if keyword not in _DISPENSABLE:
                    raise DataError(
                        f"{path.name}: {keyword} holds what DICOM does not allow there; the file is damaged or badly "
                        "written: export it again"
                    )
                del header[tag]
    if header.file_meta.get("MediaStorageSOPClassUID") != DICOMDIR:
        for keyword in ("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID"):
            if not header.get(keyword):
                raise DataError(
                    f"{path.name}: {keyword} is missing; the file is truncated or not a whole DICOM object: "
                    "export or copy it again"
                )
        if header.file_meta.get("MediaStorageSOPClassUID", header.SOPClassUID) != header.SOPClassUID:
            raise DataError(
                f"{path.name}: SOPClassUID is not the one that the file meta information gives; the file is damaged: "
                "export or copy it again"
            )
    return header


def _is_sound(dataset: Any, tag: Any) -> bool:
    """Whether the element can be decoded and, for numbers and UIDs, is of the type and count that DICOM defines."""
    dictionary = require("pydicom.datadict")
    try:
        element = dataset[tag]  # converts the value
        defined = dictionary.dictionary_VR(tag)
        if defined in ("IS", "DS", "US", "UI"):
            if element.VR == "IS" and element.VM == 1:
                int(element.value)  # pydicom hands other text through
            single = dictionary.dictionary_VM(tag) == "1"
            return bool(defined == element.VR and (element.VM <= 1 or not single))
    except Exception:  # pydicom raises many kinds for a damaged value
        return False
    return True


def read_dataset(path: Path, *, pixels: bool = True, keywords: Sequence[str] | None = None) -> Any:
    """A file as a pydicom ``Dataset``, all of it or the attributes in ``keywords``, with or without pixels.

    Raises:
        DataError: the file is absent, unreadable, not DICOM or damaged.
    """
    pydicom = require("pydicom")
    try:
        with quiet:
            _check_inflated_size(path)
            dataset = pydicom.dcmread(
                path,
                stop_before_pixels=not pixels,
                specific_tags=None if keywords is None else list(keywords),
            )
            meta = dataset.file_meta
            if not all(_is_sound(meta, tag) for tag in _FILE_META if tag in meta):
                raise ValueError("file meta information")
            return dataset
    except FileNotFoundError:
        raise DataError(f"{path.name}: no such file") from None
    except (DataError, MemoryError):
        raise
    except OSError as error:
        raise DataError(
            f"{path.name}: cannot be read ({error.strerror or error}); name a readable file"
        ) from None
    except Exception as error:  # pydicom raises many kinds for a damaged file
        raise DataError(
            f"{path.name}: not a readable DICOM file ({type(error).__name__}); export or copy it again"
        ) from None


def _check_inflated_size(path: Path) -> None:
    """Refuse a deflated file that unpacks to more than images do: pydicom unpacks all of it, pixels wanted or not."""
    filereader = require("pydicom.filereader")
    if path.stat().st_size <= _MOST_INFLATED // _MAX_DEFLATE_RATIO:
        return
    with path.open("rb") as file:
        filereader.read_preamble(file, force=True)
        meta = filereader._read_file_meta_info(file)
        if meta.get("TransferSyntaxUID") != _DEFLATED:
            return
        inflate, total = zlib.decompressobj(-zlib.MAX_WBITS), 0
        source = file.read(_CHUNK)
        while source and not inflate.eof:
            total += len(inflate.decompress(source, _CHUNK))
            if total > _MOST_INFLATED:
                raise DataError(
                    f"{path.name}: {path.stat().st_size} bytes that unpack to more than {_MOST_INFLATED}; do not trust "
                    "this file, or write it without compression"
                )
            source = inflate.unconsumed_tail or file.read(_CHUNK)


@contextlib.contextmanager
def decoding(path: Path) -> Iterator[None]:
    """Turn whatever pydicom raises over a damaged or missing value into a DataError that names the file."""
    try:
        with quiet:
            yield
    except (LungkitError, MemoryError):
        raise
    except Exception as error:  # pydicom raises many kinds
        raise DataError(
            f"{path.name}: an attribute is missing or unusable ({type(error).__name__}); the file is damaged or badly "
            "written: export it again"
        ) from None


def is_image(header: Any) -> bool:
    """Whether the object is an image (a scan, a screenshot), not contours, a segmentation, a dose or a report."""
    return str(header.SOPClassUID.name).endswith("Image Storage") or header.SOPClassUID in ENHANCED_CT


def is_localizer(header: Any) -> bool:
    """Whether the image is a scout view on which the scan was planned."""
    return "LOCALIZER" in [str(word).upper() for word in (header.get("ImageType") or ())]


def is_dicom(path: Path) -> bool:
    """Whether the file carries the DICOM mark; DataError where it does not but its name or content says it should."""
    try:
        with path.open("rb") as file:
            start = file.read(132)
    except OSError as error:
        raise DataError(f"{path.name}: cannot be read ({error.strerror}); make the file readable") from None
    if start[128:] == b"DICM":
        return True
    suffix = path.suffix.lower()
    suffix = "" if suffix[1:].isdigit() else suffix
    # A file without a suffix may be a note beside the slices: text holds no zero bytes.
    if suffix in _DICOM_SUFFIXES and (suffix or not start or b"\0" in start):
        raise DataError(
            f"{path.name}: not a DICOM file ({'empty' if not start else 'no DICM mark at byte 128'}); it is truncated "
            "or damaged: export or copy it again, or move it out of the folder"
        )
    return False
