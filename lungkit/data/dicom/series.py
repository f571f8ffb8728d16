"""CT series from DICOM: which are in a folder, and one of them as a volume with what points back to its slices."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lungkit.data.dicom.enhanced import add_functional_groups, is_enhanced, split_frames
from lungkit.data.dicom.files import (
    CT_IMAGE,
    ENHANCED_CT,
    is_image,
    is_localizer,
    read_header,
    read_headers,
)
from lungkit.data.dicom.pixels import is_whole, read_frames, read_slice, rescale_of
from lungkit.data.dicom.slices import plan_slices
from lungkit.data.volume import DEFAULT_MAX_VOXELS, Volume
from lungkit.errors import DataError, ResourceError, shorten

_LOG = logging.getLogger("lungkit")

_NEEDED = (
    "Rows", "Columns", "SamplesPerPixel", "BitsAllocated", "BitsStored", "PixelRepresentation", "RescaleSlope",
    "RescaleIntercept",
)  # fmt: skip

# Codes of DICOM (PS3.3 C.7.3.1.1.1, C.7.6.3.1.2, C.11.1.1.2) say nothing about a patient; other text might.
_MODALITY = """
    ANN AR ASMT AU BI BMD CFM CR CT CTPROTOCOL DMS DG DOC DX ECG EEG EMG ES FID GM IO IOL IVOCT IVUS KER KO
    LEN LS M3D MG MR NM OAM OCT OP OPM OPT OPV OSS OT PLAN POS PR PT PX REG RESP RF RG RTDOSE RTIMAGE RTINTENT
    RTPLAN RTRAD RTRECORD RTSEGANN RTSTRUCT RWV SEG SM SMR SR SRF STAIN TG US VA XA XC
"""
_CODES = {
    "Modality": frozenset(_MODALITY.split()),
    "PhotometricInterpretation": frozenset(
        (
            "MONOCHROME1",
            "MONOCHROME2",
            "PALETTE COLOR",
            "RGB",
            "YBR_FULL",
            "YBR_FULL_422",
            "YBR_RCT",
            "YBR_ICT",
        )
    ),
    "RescaleType": frozenset(("OD", "HU", "US", "MGML", "Z_EFF", "ED", "EDW", "HU_MOD", "PCT")),
}

# Scanners with an extended scale reach 30,710 HU or so in metal.
_BRIGHTEST_HU = 2**15


@dataclass(frozen=True)
class SeriesInfo:
    """An image series in a folder, localizers left out.

    ``modality`` is one of DICOM's codes, or empty where the file says anything else; ``size`` is (columns, rows) of the
    first slice, ``files`` are in order of name, ``is_ct`` says whether :func:`read_series` takes it. ``description`` is
    free text from the scanner, which may tell who the patient is: no message repeats it.
    """

    uid: str
    description: str
    modality: str
    slices: int
    size: tuple[int, int]
    files: tuple[Path, ...]
    is_ct: bool


@dataclass(frozen=True, eq=False)
class DicomScan:
    """A CT series as a volume.

    ``volume.array`` is (X, Y, Z) in HU: x along the columns, y along the rows, z along the slices in ascending
    order of their normal, so that slice ``array[:, :, k].T`` is the image of ``headers[k]``. ``volume.affine``
    is in RAS+ mm and ``volume.path`` the folder. ``headers`` are pydicom datasets without pixels, one a slice:
    what a segmentation or a structure set needs to refer to its source. Where the series is one multi-frame file,
    ``multiframe`` is its header, and those in ``headers`` are of its frames, with their numbers as InstanceNumber.
    """

    volume: Volume
    series: SeriesInfo
    headers: tuple[Any, ...] = field(repr=False)  # a scan that is logged must not tell the patient's name
    multiframe: Any = field(default=None, repr=False)


def find_series(folder: str | os.PathLike[str]) -> list[SeriesInfo]:
    """Image series among the folder's own files, subfolders not searched, in order of series number.

    Raises:
        DataError: no such folder, no DICOM file in it, or a damaged one.
        UsageError: pydicom is not installed.
    """
    return [info for info, _ in group_series(read_headers(Path(folder)))]


def read_series(
    folder: str | os.PathLike[str], *, series: str | int | None = None, max_voxels: int = DEFAULT_MAX_VOXELS
) -> DicomScan:
    """Read one CT series as int16 HU, slices in order, geometry checked.

    HU = RescaleSlope * stored + RescaleIntercept of each slice: int16 where all are whole numbers (int32 where the
    values do not fit), else float32. Padding outside the scanned circle becomes air, see
    :func:`lungkit.data.dicom.pixels.read_slice`.

    Slices may lie up to :data:`~lungkit.data.dicom.slices.POSITION_TOLERANCE_MM` (and a tenth of the spacing)
    off an even grid. The grid may be sheared by up to :data:`~lungkit.data.dicom.slices.MAX_TILT_DEGREES`,
    which the affine carries; a larger gantry tilt is refused, because measurements take voxels for boxes.

    RTSTRUCT, SEG and other objects that are not images are passed over, and so are localizers and series that
    are not CT. Enhanced CT, where all slices are frames of one file, is read like the files of single slices.

    Args:
        folder: that holds the slices, one file each, or all in one.
        series: which one where there are several: its number in the list of :func:`find_series` from 1, its
            series instance UID, or the beginning of that.
        max_voxels: refuse a larger series; checked before memory is allocated.

    Raises:
        DataError: no CT series, or several and none named; missing, doubled, unevenly spaced, tilted or
            unequal slices; a missing tag; truncated or damaged files; compression without a decoder.
        ResourceError: the memory does not suffice.
        UsageError: pydicom is not installed.

    Example:
        >>> scan = read_series("ct")  # doctest: +SKIP
        >>> scan.volume.array.shape, scan.volume.array.dtype.name  # doctest: +SKIP
        ((512, 512, 240), 'int16')
    """
    folder = Path(folder)
    info, headers = _choose(group_series(read_headers(folder)), series, folder)
    return _read(folder, info, headers, max_voxels)


def read_found_series(info: SeriesInfo, *, max_voxels: int = DEFAULT_MAX_VOXELS) -> DicomScan:
    """As :func:`read_series`, for a series of :func:`find_series`: no other file of its folder is looked at."""
    headers = [read_header(path) for path in info.files]
    return _read(info.files[0].parent, info, headers, max_voxels)


def _read(folder: Path, info: SeriesInfo, headers: list[Any], max_voxels: int) -> DicomScan:
    names = [path.name for path in info.files]
    paths, multiframe = list(info.files), None
    if info.slices * info.size[0] * info.size[1] > max_voxels:
        raise DataError(
            f"{folder.name}: {info.size[0]} x {info.size[1]} x {info.slices} voxels, more than max_voxels = "
            f"{max_voxels}; raise max_voxels"
        )
    if any(map(is_enhanced, headers)):
        if len(headers) > 1:
            raise DataError(
                f"{folder.name}: {len(headers)} files, some of them multi-frame, in one series, expected all slices in "
                f"one file; convert {names[0]} and the others to single frames (dcm4che emf2sf)"
            )
        multiframe = add_functional_groups(paths[0], headers[0])
        headers = split_frames(paths[0], multiframe)
        names = [f"{names[0]}, frame {header.InstanceNumber}" for header in headers]
        paths *= len(headers)
    _check_images(headers, names)
    grid = plan_slices(headers, names)
    lossy = [
        name
        for name, header in zip(names, headers, strict=True)
        if header.get("LossyImageCompression") == "01"
    ]
    notes = []
    if lossy:
        notes.append("compressed with loss, so values are not exactly those measured")
        _LOG.warning("%s: %s", shorten(lossy), notes[-1])
    headers = [headers[index] for index in grid.order]
    paths = [paths[index] for index in grid.order]
    array = _read_voxels(paths, headers)
    brightest = float(array.max())
    if brightest > _BRIGHTEST_HU:
        notes.append(
            f"values up to {brightest:g} HU, more than any scanner measures: padding without PixelPaddingValue, or "
            "signed values declared unsigned (PixelRepresentation)"
        )
        _LOG.warning("%s: %s", folder.name, notes[-1])
    volume = Volume(array, grid.affine, folder, notes=tuple(notes))
    return DicomScan(volume, info, tuple(headers), multiframe)


def group_series(headers: Sequence[tuple[Path, Any]]) -> list[tuple[SeriesInfo, list[Any]]]:
    """The image series among ``headers`` of :func:`~lungkit.data.dicom.files.read_headers`, by series number."""
    groups: dict[str, list[tuple[Path, Any]]] = {}
    for path, header in headers:
        if is_image(header) and not is_localizer(header):
            groups.setdefault(str(header.SeriesInstanceUID), []).append((path, header))
    found = []
    for uid, members in groups.items():
        first = members[0][1]
        info = SeriesInfo(
            uid=uid,
            description=" ".join(str(first.get("SeriesDescription") or "").split())[:64],
            modality=_code(first, "Modality"),
            slices=sum(int(header.get("NumberOfFrames") or 1) for _, header in members),
            size=(int(first.get("Columns") or 0), int(first.get("Rows") or 0)),
            files=tuple(path for path, _ in members),
            is_ct=first.get("Modality") == "CT" and first.SOPClassUID in (CT_IMAGE, *ENHANCED_CT),
        )
        found.append((info, [header for _, header in members]))
    found.sort(key=lambda entry: (int(entry[1][0].get("SeriesNumber") or 0), entry[0].uid))
    return found


def _code(header: Any, keyword: str) -> str:
    """What a header says under ``keyword`` where that is a code of DICOM, else nothing: messages and records travel."""
    code = str(header.get(keyword) or "")
    return code if code in _CODES[keyword] else ""


def stray_slice(found: Sequence[tuple[SeriesInfo, list[Any]]], chosen: SeriesInfo) -> Path | None:
    """A file that belongs to the series ``chosen`` by all but its SeriesInstanceUID, which one wrong byte changes.

    It has the series number, study, frame of reference and size of the chosen slices, and an instance number that none
    of them has: those of another series would begin anew.
    """
    (of_chosen,) = (headers for info, headers in found if info is chosen)
    numbers = {header.get("InstanceNumber") for header in of_chosen}
    kinds = {_kind_of_series(header) for header in of_chosen}
    for info, headers in found:
        for path, header in zip(info.files, headers, strict=True):
            number = header.get("InstanceNumber")
            known = number is not None and header.get("SeriesNumber") is not None
            if info is not chosen and known and number not in numbers and _kind_of_series(header) in kinds:
                return path
    return None


def _kind_of_series(header: Any) -> tuple[str, ...]:
    keywords = ("SOPClassUID", "StudyInstanceUID", "FrameOfReferenceUID", "SeriesNumber", "Rows", "Columns")
    return tuple(str(header.get(keyword)) for keyword in keywords)


def _choose(
    found: list[tuple[SeriesInfo, list[Any]]], wanted: str | int | None, folder: Path
) -> tuple[SeriesInfo, list[Any]]:
    listing = "; ".join(
        f"{number}: {info.uid} ({info.modality or 'no known modality'}, {info.size[0]} x {info.size[1]}, "
        f"{info.slices} slices)"
        for number, (info, _) in enumerate(found, start=1)
    )
    if not found:
        raise DataError(
            f"{folder.name}: no image series in this folder, or nothing but localizers; name another"
        )
    if wanted is None:
        chosen = [entry for entry in found if entry[0].is_ct]
        problem = (
            "several CT series; name one with --series UID (its number or the beginning of its UID will do)"
        )
    else:
        text = str(wanted)
        exact = [entry for entry in found if entry[0].uid == text]
        if text.isdecimal() and 1 <= int(text) <= len(found):
            exact = [found[int(text) - 1]]
        chosen = exact or [entry for entry in found if entry[0].uid.startswith(text)]
        problem = f"series {text!r} fits several; name one by its number or more of its UID"
        if not chosen:
            raise DataError(f"{folder.name}: no series {text!r}; the folder holds {listing}")
    if not chosen:
        raise DataError(f"{folder.name}: no CT series; the folder holds {listing}")
    if len(chosen) > 1:
        raise DataError(f"{folder.name}: {problem}: {listing}")
    info, headers = chosen[0]
    if not info.is_ct:
        raise DataError(
            f"{folder.name}: series {info.uid} is {info.modality or 'of no known modality'} "
            f"({headers[0].SOPClassUID.name}), not CT; name a CT series"
        )
    stray = stray_slice(found, info)
    if stray is not None:
        raise DataError(
            f"{stray.name}: of another SeriesInstanceUID than the series with whose numbers it goes on; the file is "
            "damaged, or was put together from several: export the series again, or move the file out of the folder"
        )
    if len(found) > 1:
        _LOG.info("read series %d of %d in the folder", found.index(chosen[0]) + 1, len(found))
    return info, headers


def _check_images(headers: Sequence[Any], names: Sequence[str]) -> None:
    """Refuse images that cannot make one volume."""
    sizes: dict[tuple[int, int], str] = {}
    frames: dict[str, str] = {}
    for header, name in zip(headers, names, strict=True):
        _check_image(header, name)
        sizes.setdefault((int(header.Columns), int(header.Rows)), name)
        frames.setdefault(str(header.get("FrameOfReferenceUID") or ""), name)
    if len(frames) > 1:
        raise DataError(
            f"slices differ in frame of reference: {shorten(frames.values())}; move what does not belong to the scan "
            "out of the folder"
        )
    if len(sizes) > 1:
        listed = shorten((f"{value} in {name}" for value, name in sizes.items()), limit=3)
        raise DataError(
            f"slices differ in columns and rows: {listed}; move what does not belong to the scan out of the folder"
        )


def _check_image(header: Any, name: str) -> None:
    if header.SOPClassUID not in (CT_IMAGE, *ENHANCED_CT) or header.get("Modality") != "CT":
        raise DataError(f"{name}: {header.SOPClassUID.name} among CT slices; move it out of the folder")
    for keyword in _NEEDED:
        try:
            known = header.get(keyword) is not None and np.isfinite(float(header[keyword].value))
        except (TypeError, ValueError):
            known = False
        if not known:
            raise DataError(f"{name}: {keyword} is missing or not a number; export the series again")
    problem = None
    if header.get("PhotometricInterpretation") != "MONOCHROME2" or int(header.SamplesPerPixel) != 1:
        problem = f"pixels are {_code(header, 'PhotometricInterpretation') or 'of another kind'}, expected MONOCHROME2"
    elif int(header.get("NumberOfFrames") or 1) != 1:
        problem = f"{header.NumberOfFrames} frames in a file, expected one"
    elif not 1 <= int(header.BitsStored) <= int(header.BitsAllocated) or int(header.BitsAllocated) not in (
        8,
        16,
        32,
    ):
        problem = f"{header.BitsStored} bits stored of {header.BitsAllocated} allocated"
    elif int(header.get("HighBit", header.BitsStored - 1)) != int(header.BitsStored) - 1:
        problem = f"the highest of {header.BitsStored} bits is bit {header.HighBit}"
    elif min(int(header.Rows), int(header.Columns)) < 1:
        problem = f"{header.Columns} columns and {header.Rows} rows"
    elif float(header.RescaleSlope) == 0:
        problem = "RescaleSlope is 0"
    elif str(header.get("RescaleType") or "HU") not in ("HU", "US"):
        problem = f"values are {_code(header, 'RescaleType') or 'something else'} (RescaleType), not HU"
    if problem is not None:
        raise DataError(f"{name}: {problem}; export the series as plain CT images in HU")


def _read_voxels(paths: Sequence[Path], headers: Sequence[Any]) -> np.ndarray:
    whole = all(is_whole(*rescale_of(header)) for header in headers)
    shape = (len(paths), int(headers[0].Rows), int(headers[0].Columns))
    try:
        voxels = np.empty(shape, np.int16 if whole else np.float32)
        frames = read_frames(paths[0], headers) if is_enhanced(headers[0]) else None
        for index, (path, header) in enumerate(zip(paths, headers, strict=True)):
            hu = read_slice(path, header) if frames is None else next(frames)
            if voxels.dtype == np.int16 and not _fits(hu, np.int16):
                voxels = voxels.astype(np.int32)
            if voxels.dtype == np.int32 and not _fits(hu, np.int32):
                raise DataError(f"{path.name}: values up to {hu.max()} HU; the rescale tags are wrong")
            voxels[index] = hu
    except MemoryError as error:
        raise ResourceError(
            f"no memory for {' x '.join(map(str, shape[::-1]))} voxels; close other programs"
        ) from error
    return voxels.T


def _fits(values: np.ndarray, dtype: Any) -> bool:
    return bool(np.iinfo(dtype).min <= values.min() and values.max() <= np.iinfo(dtype).max)
