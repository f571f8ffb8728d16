"""What a tree of DICOM folders holds: CT series, and the masks that were made on them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lungkit.data.dicom.files import DICOMDIR, decoding, is_dicom, read_dataset, read_header
from lungkit.data.dicom.rtstruct import STRUCTURE_SET
from lungkit.data.dicom.segmentation import LABEL_MAP, SEGMENTATION
from lungkit.data.dicom.series import SeriesInfo, group_series, stray_slice
from lungkit.data.folders import walk_folders
from lungkit.errors import DataError

_KINDS = {STRUCTURE_SET: "rtstruct", SEGMENTATION: "seg", LABEL_MAP: "seg"}
_REFERENCES = (
    "SOPClassUID",
    "FrameOfReferenceUID",
    "ReferencedFrameOfReferenceSequence",
    "ReferencedSeriesSequence",
    "StructureSetROISequence",
    "SegmentSequence",
)


@dataclass(frozen=True)
class FoundSeries:
    """A CT series: ``patient`` tells patients apart and names nobody's file; it is not to be shown."""

    info: SeriesInfo
    folder: Path
    patient: str = field(repr=False)
    frame: str = field(repr=False)


@dataclass(frozen=True)
class FoundMask:
    """An RTSTRUCT or a SEG: the structures in it, and the series that it says it was made on."""

    path: Path
    kind: str
    structures: tuple[str, ...]
    series: frozenset[str]
    frame: str


@dataclass
class Archive:
    """CT series and masks in ``root`` and the folders below it.

    ``problems`` says of each file or folder that could not be read why; ``others`` counts objects of other kinds.
    """

    root: Path
    series: list[FoundSeries] = field(default_factory=list)
    masks: list[FoundMask] = field(default_factory=list)
    problems: dict[Path, str] = field(default_factory=dict)
    others: Counter[str] = field(default_factory=Counter)

    def series_of(self, mask: FoundMask) -> list[FoundSeries]:
        """The series that ``mask`` names; where it names none, those in its frame of reference."""
        if mask.series:
            return [found for found in self.series if found.info.uid in mask.series]
        return [found for found in self.series if mask.frame and found.frame == mask.frame]


def find_archive(root: Path) -> Archive:
    """Look through ``root`` at any depth; only headers are read.

    A file that cannot be read is named in ``problems``, and so is each series in its folder: a slice may be missing in
    it. Of a series that is there twice the first is taken.

    Raises:
        DataError: no such folder.
        UsageError: pydicom is not installed.
    """
    if not root.is_dir():
        raise DataError(f"{root}: no such folder")
    archive = Archive(root)

    def unreadable(folder: Path, error: OSError) -> None:
        archive.problems[folder] = f"cannot be listed ({error.strerror or error})"

    for folder, files in walk_folders(root, unreadable=unreadable):
        _look_into(folder, files, archive)
    return archive


def read_mask_header(path: Path) -> FoundMask | None:
    """The mask in ``path``, or None where it is another DICOM object.

    Raises:
        DataError: it is damaged, or no DICOM.
    """
    dataset = read_dataset(path, pixels=False, keywords=_REFERENCES)
    with decoding(path):
        kind = _KINDS.get(str(dataset.get("SOPClassUID")))
        if kind is None:
            return None
        frames = list(dataset.get("ReferencedFrameOfReferenceSequence") or ())
        if kind == "seg":
            structures = [str(item.SegmentLabel) for item in dataset.get("SegmentSequence") or ()]
            series = [item.SeriesInstanceUID for item in dataset.get("ReferencedSeriesSequence") or ()]
        else:
            structures = [str(item.ROIName or "") for item in dataset.get("StructureSetROISequence") or ()]
            series = [
                item.SeriesInstanceUID
                for frame in frames
                for study in frame.get("RTReferencedStudySequence") or ()
                for item in study.get("RTReferencedSeriesSequence") or ()
            ]
        own = dataset.get("FrameOfReferenceUID") or (frames[0].get("FrameOfReferenceUID") if frames else "")
        return FoundMask(
            path, kind, tuple(dict.fromkeys(structures)), frozenset(map(str, series)), str(own or "")
        )


def _look_into(folder: Path, files: list[Path], archive: Archive) -> None:
    headers: list[tuple[Path, Any]] = []
    damaged: list[Path] = []
    for path in files:
        try:
            if not is_dicom(path):
                continue
            header = read_header(path)
            if header.file_meta.get("MediaStorageSOPClassUID") == DICOMDIR:
                continue
            mask = read_mask_header(path) if str(header.SOPClassUID) in _KINDS else None
        except DataError as error:
            archive.problems[path] = str(error)
            damaged.append(path)
            continue
        if mask is None:
            headers.append((path, header))
        else:
            archive.masks.append(mask)
    known = {found.info.uid for found in archive.series}
    grouped = group_series(headers)
    for info, members in grouped:
        first = members[0]
        if not info.is_ct:
            archive.others[f"{info.modality or 'unknown'} series"] += 1
        elif info.uid in known:
            archive.problems[folder] = (
                "holds a series, or a part of one, that another folder holds; keep it in one"
            )
        elif (stray := stray_slice(grouped, info)) is not None:
            archive.problems[folder] = f"its series lacks {stray.name}, which has another SeriesInstanceUID"
        elif damaged:
            archive.problems[folder] = f"its series may lack a slice, since {damaged[0].name} cannot be read"
        else:
            patient = "\0".join(str(first.get(key) or "") for key in ("PatientID", "IssuerOfPatientID"))
            if not first.get("PatientID"):
                patient = f"study\0{first.get('StudyInstanceUID') or info.uid}"
            frame = str(first.get("FrameOfReferenceUID") or "")
            archive.series.append(FoundSeries(info, folder, patient, frame))
    images = sum(len(members) for _, members in grouped)
    if len(headers) > images:
        archive.others["objects that are no scans"] += len(headers) - images
