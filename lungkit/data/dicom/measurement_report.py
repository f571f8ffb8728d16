"""DICOM structured reports (TID 1500): what was measured of each lesion, in a form that a PACS stores and displays."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lungkit
from lungkit._atomic import atomic_path
from lungkit.data.dicom._packages import quiet, require
from lungkit.data.dicom.files import decoding, read_dataset
from lungkit.data.dicom.labels import choose_character_set, source_header
from lungkit.data.dicom.series import DicomScan
from lungkit.errors import DataError, UsageError

MEASUREMENT_REPORT = "1.2.840.10008.5.1.4.1.1.88.33"
"""Comprehensive SR."""


@dataclass(frozen=True)
class LesionMeasures:
    """What a report says of a lesion: volume, long and short axial diameter, mean attenuation."""

    volume_ml: float
    long_axis_mm: float
    short_axis_mm: float
    mean_hu: float


def write_measurement_report(
    path: str | os.PathLike[str],
    scan: DicomScan,
    segmentation: str | os.PathLike[str] | None,
    lesions: Sequence[LesionMeasures],
    *,
    algorithm: str = "lungkit",
    version: str | None = None,
    series_description: str = "lungkit measurements",
    series_number: int = 302,
) -> None:
    """Write an Imaging Measurement Report (PS3.16, TID 1500) as a Comprehensive SR, whole or not at all.

    One measurement group a lesion (TID 1411) with its volume (SCT 118565006), long and short axis (SCT 103339001,
    103340004) and mean attenuation (DCM 112031, derivation mean), which refers to the lesion's segment and has its
    tracking identifiers, kind and anatomic region; without a lesion one group that says so, with a volume of 0. Patient
    and study are those of the source.

    Args:
        path: of the file, usually ``.dcm``.
        scan: the series that was measured.
        segmentation: SEG of :func:`~lungkit.data.dicom.write_dicom_seg`, one segment a lesion in the order of
            ``lesions``; None where there is no lesion.
        lesions: what was measured.
        algorithm: name of what made the masks, and ``version`` (lungkit's own if None).
        series_description: of the new series, and its ``series_number``.

    Raises:
        UsageError: another number of segments than lesions; highdicom is not installed.
        DataError: the source lacks tags or holds values that DICOM forbids.
        ResourceError: the disk is full; nothing is left behind.

    Example:
        >>> write_measurement_report("sr.dcm", scan, "seg.dcm", [LesionMeasures(1.2, 15, 11, 38)])  # doctest: +SKIP
    """
    hd, codes = require("highdicom"), require("pydicom.sr.codedict").codes
    evidence = (
        [source_header(scan)] if scan.multiframe is not None else [source_header(scan), *scan.headers[1:]]
    )
    groups: list[Any] = []
    segments: Sequence[Any] = ()
    seg: Any = None
    if segmentation is not None:
        seg = read_dataset(Path(segmentation))
        with decoding(Path(segmentation)):
            segments = list(seg.SegmentSequence)
    if len(segments) != len(lesions):
        raise UsageError(
            f"segmentation: {len(segments)} segments for {len(lesions)} lesions; give one for each"
        )
    try:
        with quiet:
            for number, (segment, measures) in enumerate(zip(segments, lesions, strict=True), start=1):
                groups.append(_group(hd, codes, scan, seg, number, segment, measures))
            if not groups:
                groups.append(_nothing_found(hd, codes))
            device = hd.sr.DeviceObserverIdentifyingAttributes(
                uid=hd.UID(),
                name=algorithm[:64],
                manufacturer_name="lungkit",
                model_name=version or lungkit.__version__,
            )
            observer = hd.sr.ObserverContext(
                observer_type=codes.DCM.Device, observer_identifying_attributes=device
            )
            content = hd.sr.MeasurementReport(
                observation_context=hd.sr.ObservationContext(observer_device_context=observer),
                procedure_reported=codes.SCT.ComputedTomography,
                imaging_measurements=groups,
                title=codes.DCM.ImagingMeasurementReport,
            )
            report = hd.sr.ComprehensiveSR(
                evidence=evidence if seg is None else [*evidence, seg],
                content=content[0],
                series_instance_uid=hd.UID(),
                series_number=series_number,
                sop_instance_uid=hd.UID(),
                instance_number=1,
                manufacturer="lungkit",
                is_complete=True,
                series_description=series_description,
                specific_character_set=choose_character_set(
                    scan, [algorithm, series_description, *(str(one.SegmentLabel) for one in segments)]
                ),
            )
    except MemoryError:
        raise
    except Exception as error:
        # The message may quote a patient attribute, so only its kind is passed on.
        raise DataError(
            f"{scan.series.files[0].name}: no report can be made from this source ({type(error).__name__}): a patient, "
            "study or image attribute is missing or not allowed; correct it or export the series again"
        ) from None
    with atomic_path(path) as temporary, quiet:
        report.save_as(temporary)


def _nothing_found(hd: Any, codes: Any) -> Any:
    return hd.sr.MeasurementsAndQualitativeEvaluations(
        tracking_identifier=hd.sr.TrackingIdentifier(uid=hd.UID(), identifier="no lesion found"),
        measurements=[hd.sr.Measurement(codes.SCT.Volume, 0.0, codes.UCUM.CubicCentimeter)],
    )


def _group(
    hd: Any, codes: Any, scan: DicomScan, seg: Any, number: int, segment: Any, measures: LesionMeasures
) -> Any:
    coded = hd.sr.CodedConcept.from_dataset
    regions = segment.get("AnatomicRegionSequence") or ()
    attenuation = hd.sr.Measurement(
        codes.DCM.AttenuationCoefficient,
        measures.mean_hu,
        codes.UCUM.HounsfieldUnit,
        derivation=codes.SCT.Mean,
    )
    reference = hd.sr.ReferencedSegment(
        seg.SOPClassUID,
        seg.SOPInstanceUID,
        number,
        source_series=hd.sr.SourceSeriesForSegmentation(scan.series.uid),
    )
    lengths = ((codes.SCT.LongAxis, measures.long_axis_mm), (codes.SCT.ShortAxis, measures.short_axis_mm))
    return hd.sr.VolumetricROIMeasurementsAndQualitativeEvaluations(
        tracking_identifier=hd.sr.TrackingIdentifier(uid=segment.TrackingUID, identifier=segment.TrackingID),
        referenced_segment=reference,
        finding_category=coded(segment.SegmentedPropertyCategoryCodeSequence[0]),
        finding_type=coded(segment.SegmentedPropertyTypeCodeSequence[0]),
        finding_sites=[hd.sr.FindingSite(coded(region)) for region in regions] or None,
        measurements=[
            hd.sr.Measurement(codes.SCT.Volume, measures.volume_ml, codes.UCUM.CubicCentimeter),
            *(hd.sr.Measurement(code, value, codes.UCUM.Millimeter) for code, value in lengths),
            attenuation,
        ],
    )
