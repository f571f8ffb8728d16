"""RT Structure Sets: contours to label masks and back, voxel for voxel."""

from __future__ import annotations

import datetime
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import lungkit
from lungkit._atomic import atomic_path
from lungkit.data.dicom._packages import quiet, require
from lungkit.data.dicom.contours import fill_polygons, trace_polygons
from lungkit.data.dicom.files import PATIENT_AND_STUDY, decoding, read_dataset
from lungkit.data.dicom.labels import (
    LabelBuilder,
    check_frame_of_reference,
    check_mask,
    choose_character_set,
    choose_names,
    source_header,
)
from lungkit.data.dicom.round_trip import check_centroids
from lungkit.data.dicom.series import DicomScan
from lungkit.data.dicom.slices import LPS_TO_RAS
from lungkit.data.volume import Volume
from lungkit.errors import DataError, shorten

_LOG = logging.getLogger("lungkit")

STRUCTURE_SET = "1.2.840.10008.5.1.4.1.1.481.3"

_CLOSED = ("CLOSED_PLANAR", "CLOSEDPLANAR_XOR", "INTERPOLATED_PLANAR")
_CONTOUR_DATA = 0x30060050
_STUDY_MANAGEMENT = "1.2.840.10008.3.1.2.3.1"
_COLOURS = ((220, 40, 40), (40, 160, 220), (60, 180, 75), (245, 160, 30), (145, 30, 180))
# Slices apart: contours of one plane are drawn together, those of another plane lie elsewhere.
_SAME_PLANE = 0.01


@dataclass(frozen=True, eq=False)
class _Contour:
    points: np.ndarray  # (N, 2) x, y in voxels
    plane: float  # z in voxels


def read_rtstruct(
    path: str | os.PathLike[str], scan: DicomScan, *, roi: str | Sequence[str] | None = None
) -> tuple[Volume, dict[str, int]]:
    """Fill the contours of an RT Structure Set on the grid of ``scan``.

    A voxel belongs to a structure if its centre lies inside an odd number of its contours in that slice, so
    that keyholes and inner contours both cut holes; coordinates are taken to a millionth of a voxel. A contour
    goes to the nearest slice; where contours of several planes fall on one slice, the nearest plane counts and
    the others are left out with a warning. Structures of the same name share a value; values count from 1 in
    the order of the file.

    Args:
        path: the file.
        scan: a series in the same frame of reference.
        roi: name of the structure to read, or several; None: all that have closed contours.

    Returns:
        The mask, uint8 (X, Y, Z), and its names with their values.

    Raises:
        DataError: not an RTSTRUCT or damaged; another frame of reference; no such structure; contours off the
            grid, not parallel to the slices or not closed; structures that overlap.
        UsageError: pydicom is not installed.
    """
    path = Path(path)
    dataset = read_dataset(path)
    builder = LabelBuilder(path, scan, "roi")
    with decoding(path):
        if dataset.get("SOPClassUID") != STRUCTURE_SET:
            raise DataError(f"{path.name}: not an RT Structure Set; name an RTSTRUCT object")
        structures = list(dataset.StructureSetROISequence)
        drawn = {
            int(item.ReferencedROINumber): list(item.get("ContourSequence") or ())
            for item in dataset.get("ROIContourSequence") or ()
        }
        wanted = choose_names([str(item.ROIName or "") for item in structures], roi, path, "structure")
        for item in structures:
            name, contours = str(item.ROIName or ""), drawn.get(int(item.ROINumber), [])
            if name not in wanted:
                continue
            if roi is None and contours and not any(_is_closed(contour) for contour in contours):
                continue  # points and lines, such as an isocentre, enclose nothing
            builder.value(name)
            if contours:
                check_frame_of_reference(item.get("ReferencedFrameOfReferenceUID"), scan, path)
                where = f"{path.name}, structure {name!r}"
                _fill(builder, name, _contours(contours, scan, where), where)
    if not builder.labels:
        raise DataError(f"{path.name}: no structure with closed contours; name another file")
    return builder.finish()


def write_rtstruct(
    path: str | os.PathLike[str],
    scan: DicomScan,
    mask: np.ndarray,
    labels: Mapping[str, int],
    *,
    description: str = "lungkit structures",
    series_number: int = 301,
) -> None:
    """Write ``mask`` as an RT Structure Set, whole or not at all.

    Contours follow the edges of the voxels, slice by slice, each with a reference to the slice it lies on;
    holes are keyholes. :func:`read_rtstruct` gives the same mask back. A name without a voxel becomes a
    structure without contours. Patient and study are those of the source. What was written is read back, see
    :func:`~lungkit.data.dicom.round_trip.check_centroids`.

    Args:
        path: of the file, usually ``.dcm``.
        scan: the series the mask belongs to.
        mask: whole numbers (X, Y, Z) on the grid of ``scan.volume``.
        labels: name to value, 1 to 65,535; values in the mask without a name are refused.
        description: of the new series, and its ``series_number``.

    Raises:
        UsageError: the mask or the labels do not fit; the folder cannot be written; pydicom is not installed.
        DataError: the source lacks tags that contours must refer to; the mask would not lie where it should.
        ResourceError: the disk is full; nothing is left behind.

    Example:
        >>> write_rtstruct("structures.dcm", scan, mask, {"tumour": 1})  # doctest: +SKIP
    """
    pydicom = require("pydicom")
    mask = check_mask(mask, scan, labels)
    with quiet:
        dataset = _structure_set(pydicom, scan, description, series_number)
        if (character_set := choose_character_set(scan, [*labels, description])) is not None:
            dataset.SpecificCharacterSet = character_set
        for number, name in enumerate(sorted(labels, key=lambda name: labels[name]), start=1):
            _add_structure(pydicom.Dataset, dataset, scan, number, name, mask == labels[name])
    with atomic_path(path) as temporary:
        with quiet:
            dataset.save_as(temporary, enforce_file_format=True)
        check_centroids(temporary, scan, mask, labels, name=Path(path).name)


def _is_closed(contour: Any) -> bool:
    return contour.get("ContourGeometricType") in _CLOSED


def _contours(contours: Sequence[Any], scan: DicomScan, where: str) -> list[_Contour]:
    to_voxels = np.linalg.inv(LPS_TO_RAS @ scan.volume.affine)
    columns, rows, slices = scan.volume.array.shape
    found: list[_Contour] = []
    seen: set[bytes] = set()
    outside: list[str] = []
    for contour in contours:
        if not _is_closed(contour):
            raise DataError(
                f"{where}: a contour is {contour.get('ContourGeometricType')}, not closed; redraw it"
            )
        points_mm = _points(contour, where)
        if len(points_mm) < 3:
            continue  # a point or a line encloses nothing
        voxels = np.round(points_mm @ to_voxels[:3, :3].T + to_voxels[:3, 3], 6)
        low, high = voxels.min(axis=0), voxels.max(axis=0)
        position = f"({', '.join(f'{value:g}' for value in points_mm[0])}) mm"
        if high[2] - low[2] > 0.5:
            raise DataError(
                f"{where}: the contour at {position} is not parallel to the slices; redraw it on them"
            )
        plane = float(voxels[:, 2].mean())
        inside = -0.5 <= plane <= slices - 0.5 and high[0] >= -0.5 and low[0] <= columns - 0.5
        if not (inside and high[1] >= -0.5 and low[1] <= rows - 0.5):
            outside.append(position)
        elif (key := voxels.tobytes()) not in seen:  # the same contour twice would cancel out
            seen.add(key)
            found.append(_Contour(voxels[:, :2], plane))
    if outside:
        raise DataError(
            f"{where}: {len(outside)} contours lie outside the scan, at {shorten(outside, limit=3)}; give the series "
            "it was drawn on, complete"
        )
    return found


def _points(contour: Any, where: str) -> np.ndarray:
    # The raw text where pydicom still has it: a list of its decimal strings takes far longer to make.
    element = contour.get_item("ContourData")
    value = getattr(element, "value", None) or b""
    try:
        parts = value.split(b"\\") if isinstance(value, bytes) else value
        numbers = np.array([float(part) for part in parts if part not in (b"", "")])
        points = numbers.reshape(-1, 3)
        if not np.isfinite(points).all():
            raise ValueError
    except (TypeError, ValueError):
        raise DataError(
            f"{where}: contour data are not triples of numbers; export the structures again"
        ) from None
    return points


def _fill(builder: LabelBuilder, name: str, contours: list[_Contour], where: str) -> None:
    columns, rows, slices = builder.array.shape
    by_slice: dict[int, list[_Contour]] = {}
    for contour in contours:
        index = min(max(round(contour.plane), 0), slices - 1)
        by_slice.setdefault(index, []).append(contour)
    left_out = 0
    for index, members in by_slice.items():
        nearest = min((contour.plane for contour in members), key=lambda plane: abs(plane - index))
        near = [contour.points for contour in members if abs(contour.plane - nearest) <= _SAME_PLANE]
        left_out += len(members) - len(near)
        builder.add(index, fill_polygons(near, (rows, columns)), name)
    if left_out:
        _LOG.warning("%s: %d contours lie between slices and were left out", where, left_out)
    steps = np.diff(sorted(by_slice))
    if len(steps) > 1 and np.median(steps) > 1:
        _LOG.warning(
            "%s: contours on every %g slices only; the slices between stay empty", where, np.median(steps)
        )


def _structure_set(pydicom: Any, scan: DicomScan, description: str, series_number: int) -> Any:
    make, uid = pydicom.Dataset, pydicom.uid.generate_uid
    now = datetime.datetime.now()
    date, time = now.strftime("%Y%m%d"), now.strftime("%H%M%S")
    source = source_header(scan)
    dataset = make()
    for keyword in PATIENT_AND_STUDY:
        if keyword in source:
            dataset[keyword] = source[keyword]
    dataset.SOPClassUID, dataset.SOPInstanceUID = STRUCTURE_SET, uid()
    dataset.InstanceCreationDate, dataset.InstanceCreationTime = date, time
    dataset.Modality, dataset.SeriesInstanceUID, dataset.SeriesNumber = "RTSTRUCT", uid(), series_number
    dataset.SeriesDescription, dataset.OperatorsName = description, ""
    dataset.Manufacturer, dataset.ManufacturerModelName = "lungkit", "lungkit"
    dataset.SoftwareVersions = lungkit.__version__
    dataset.FrameOfReferenceUID = source.FrameOfReferenceUID
    dataset.PositionReferenceIndicator = source.get("PositionReferenceIndicator", "")
    dataset.StructureSetLabel = "lungkit"
    dataset.StructureSetDescription = "Made by a research tool, not a medical device"
    dataset.StructureSetDate, dataset.StructureSetTime = date, time
    dataset.InstanceNumber, dataset.ApprovalStatus = 1, "UNAPPROVED"
    series = make()
    series.SeriesInstanceUID = scan.series.uid
    series.ContourImageSequence = [_image_reference(make, scan, header) for header in scan.headers]
    study = make()
    study.ReferencedSOPClassUID, study.ReferencedSOPInstanceUID = _STUDY_MANAGEMENT, source.StudyInstanceUID
    study.RTReferencedSeriesSequence = [series]
    frame = make()
    frame.FrameOfReferenceUID, frame.RTReferencedStudySequence = source.FrameOfReferenceUID, [study]
    dataset.ReferencedFrameOfReferenceSequence = [frame]
    dataset.StructureSetROISequence, dataset.ROIContourSequence = [], []
    dataset.RTROIObservationsSequence = []
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    # Implicit: with explicit types a contour could hold no more than 64 KiB of text.
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ImplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = STRUCTURE_SET
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    return dataset


def _add_structure(
    make: Any, dataset: Any, scan: DicomScan, number: int, name: str, inside: np.ndarray
) -> None:
    structure, drawing, observation = make(), make(), make()
    structure.ROINumber, structure.ROIName, structure.ROIGenerationAlgorithm = number, name, "AUTOMATIC"
    structure.ReferencedFrameOfReferenceUID = dataset.FrameOfReferenceUID
    observation.ObservationNumber, observation.ReferencedROINumber = number, number
    observation.RTROIInterpretedType, observation.ROIInterpreter = "", ""
    drawing.ReferencedROINumber = number
    drawing.ROIDisplayColor = list(_COLOURS[(number - 1) % len(_COLOURS)])
    contours: list[Any] = []
    for index in np.flatnonzero(inside.any(axis=(0, 1))):
        header = scan.headers[index]
        for polygon in trace_polygons(inside[:, :, index].T):
            contour = make()
            contour.ContourImageSequence = [_image_reference(make, scan, header)]
            contour.ContourGeometricType = "CLOSED_PLANAR"
            contour.NumberOfContourPoints = len(polygon)
            contour.ContourNumber = len(contours) + 1
            contour[_CONTOUR_DATA] = _contour_data(polygon, header, scan.volume.affine)
            contours.append(contour)
    if contours:
        drawing.ContourSequence = contours
    dataset.StructureSetROISequence.append(structure)
    dataset.ROIContourSequence.append(drawing)
    dataset.RTROIObservationsSequence.append(observation)


def _contour_data(polygon: np.ndarray, header: Any, affine: np.ndarray) -> Any:
    """Points in LPS mm, to a tenth of a micrometre, in the plane of the slice that ``header`` describes."""
    axes = (LPS_TO_RAS @ affine)[:3, :2]
    position = np.array([float(value) for value in header.ImagePositionPatient])
    points_mm = np.round(polygon @ axes.T + position, 4) + 0.0  # no minus before a zero
    text = "\\".join(f"{value:.10g}" for value in points_mm.ravel()).encode()
    text += b" " * (len(text) % 2)
    # As bytes: pydicom takes ten times as long to check a list of decimal strings one by one.
    return require("pydicom.dataelem").RawDataElement(
        require("pydicom.tag").Tag(_CONTOUR_DATA), "DS", len(text), text, 0, True, True
    )


def _image_reference(make: Any, scan: DicomScan, header: Any) -> Any:
    reference = make()
    reference.ReferencedSOPClassUID, reference.ReferencedSOPInstanceUID = (
        header.SOPClassUID,
        header.SOPInstanceUID,
    )
    if scan.multiframe is not None:
        reference.ReferencedFrameNumber = header.InstanceNumber
    return reference
