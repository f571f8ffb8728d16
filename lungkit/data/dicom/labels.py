"""What label masks in DICOM share: checks on the way out, names and overlaps on the way in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lungkit.data.dataset import MAX_LABEL_VALUE
from lungkit.data.dicom._packages import quiet
from lungkit.data.dicom.series import DicomScan
from lungkit.data.volume import Volume
from lungkit.errors import DataError, UsageError

MAX_LABELS = 255
"""Most names in one object."""


def check_mask(mask: np.ndarray, scan: DicomScan, labels: Mapping[str, int]) -> np.ndarray:
    """``mask`` (X, Y, Z) as uint8, uint16 where a value needs it, after checking it against the scan and ``labels``.

    Raises:
        UsageError: another shape or type, a value without a name, or names or values DICOM cannot hold.
        DataError: the source lacks a tag that every object derived from it needs.
    """
    mask = np.asarray(mask)
    shape = scan.volume.array.shape
    if mask.shape != shape or mask.dtype.kind not in "biu":
        raise UsageError(f"mask: {mask.dtype} of shape {mask.shape}, expected whole numbers of shape {shape}")
    if not labels or len(labels) > MAX_LABELS:
        raise UsageError(f"labels: {len(labels)} names, expected 1 to {MAX_LABELS}")
    for name, value in labels.items():
        if not 1 <= len(name.strip()) <= 64 or "\\" in name or not name.isprintable():
            raise UsageError(
                f"labels: {name!r} cannot name a segment; use up to 64 characters and no backslash"
            )
        if not isinstance(value, (int, np.integer)) or not 1 <= value <= MAX_LABEL_VALUE:
            raise UsageError(
                f"labels: {name!r} has value {value!r}, expected a whole number from 1 to {MAX_LABEL_VALUE}"
            )
    if len(set(labels.values())) < len(labels):
        raise UsageError(f"labels: {dict(labels)} gives one value to several names")
    present: set[int] = set()
    for plane in mask.T:  # slice by slice: no copy of the volume
        present.update(np.unique(plane).tolist())
    unnamed = sorted(present - {0} - set(labels.values()))
    if unnamed:
        raise UsageError(f"mask: values {unnamed[:5]} have no name in labels {dict(labels)}")
    for keyword in ("StudyInstanceUID", "FrameOfReferenceUID"):
        if not scan.headers[0].get(keyword):
            raise DataError(f"{scan.series.files[0].name}: {keyword} is missing, and a mask must refer to it")
    return mask.astype(np.uint8 if max(labels.values()) <= 255 else np.uint16, copy=False)


class LabelBuilder:
    """Collects structures, one after the other, into one label volume on the grid of ``scan``.

    Structures of the same name share a value; values count from 1 in order of first appearance.
    """

    def __init__(self, path: Path, scan: DicomScan, option: str) -> None:
        self.array: np.ndarray = np.zeros(scan.volume.array.shape, np.uint8, order="F")
        self.labels: dict[str, int] = {}
        self._scan, self._path, self._option = scan, path, option

    def value(self, name: str) -> int:
        """The value that stands for ``name``, a new one where the name is new."""
        if name not in self.labels and len(self.labels) == MAX_LABELS:
            raise DataError(
                f"{self._path.name}: more than {MAX_LABELS} structures; name some with {self._option}="
            )
        return self.labels.setdefault(name, len(self.labels) + 1)

    def add(self, index: int, inside: np.ndarray, name: str) -> None:
        """Put ``inside``, bool (rows, columns), into slice ``index``.

        Raises:
            DataError: it overlaps with another structure.
        """
        value = self.value(name)
        plane = self.array[:, :, index].T
        taken = plane[inside & (plane != 0) & (plane != value)]
        if taken.size:
            other = next(key for key, number in self.labels.items() if number == taken[0])
            raise DataError(
                f"{self._path.name}: {other!r} and {name!r} overlap, and a voxel holds one label; read them one at a "
                f"time ({self._option}={name!r})"
            )
        plane[inside] = value

    def finish(self) -> tuple[Volume, dict[str, int]]:
        """The label volume and its names."""
        return Volume(array=self.array, affine=self._scan.volume.affine, path=self._path), self.labels


def choose_names(
    available: Sequence[str], wanted: str | Sequence[str] | None, path: Path, what: str
) -> list[str]:
    """``wanted`` names, or all of ``available`` where none are wanted.

    Raises:
        DataError: a name that is not there; the message lists those that are.
    """
    if wanted is None:
        return list(dict.fromkeys(available))
    names = [wanted] if isinstance(wanted, str) else list(wanted)
    for name in names:
        if name not in available:
            listed = ", ".join(repr(other) for other in available) or "none"
            raise DataError(f"{path.name}: no {what} {name!r}; it holds {listed}")
    return names


def check_frame_of_reference(found: Any, scan: DicomScan, path: Path) -> None:
    """Raise DataError where the mask was drawn in another patient coordinate system than the scan's."""
    expected = scan.headers[0].get("FrameOfReferenceUID")
    if found and expected and found != expected:
        raise DataError(
            f"{path.name}: drawn in another frame of reference than the scan's, so positions do not compare; give the "
            "mask that belongs to this series"
        )


def source_header(scan: DicomScan) -> Any:
    """The first slice's header with every patient and study attribute that DICOM wants, empty where unknown.

    Values outside what DICOM allows are emptied: writers refuse them, and would quote them in doing so.
    """
    from pydicom.valuerep import DA, TM

    header = (scan.headers[0] if scan.multiframe is None else scan.multiframe).copy()
    with quiet:
        for keyword in ("PatientName", "PatientID", "StudyID", "AccessionNumber", "ReferringPhysicianName"):
            if header.get(keyword) is None:
                setattr(header, keyword, "")
        if header.get("PatientSex") not in ("M", "F", "O"):
            header.PatientSex = ""
        for keyword, kind in (("PatientBirthDate", DA), ("StudyDate", DA), ("StudyTime", TM)):
            try:
                kind(header.get(keyword) or "")
            except (ValueError, TypeError):
                header[keyword].value = ""
            if header.get(keyword) is None:
                setattr(header, keyword, "")
    return header


def choose_character_set(scan: DicomScan, texts: Sequence[str]) -> str | None:
    """None (ASCII) or Latin-1 where the source has that and ``texts`` are ASCII, else UTF-8, which holds any other."""
    found = scan.headers[0].get("SpecificCharacterSet") or "ISO_IR 6"
    if all(text.isascii() for text in texts) and found in ("ISO_IR 6", "ISO_IR 100"):
        return None if found == "ISO_IR 6" else "ISO_IR 100"
    return "ISO_IR 192"
