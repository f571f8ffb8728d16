"""Masks in files, NIfTI or DICOM: which belong together, and both of a pair on one grid."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lungkit.data import DEFAULT_MAX_VOXELS, Volume, open_dataset, read_volume
from lungkit.data.nifti_names import is_nifti, nifti_by_stem, split_suffix
from lungkit.errors import DataError, shorten

if TYPE_CHECKING:
    from lungkit.data.dicom import DicomScan
    from lungkit.data.dicom.archive import Archive, FoundMask
    from lungkit.data.dicom.read_label import StructureRule

_DICOM_NAME = re.compile(r"(.+?)(_seg|_rtstruct)?\.(dcm|dicom)", re.IGNORECASE)


@dataclass(frozen=True)
class CasePairs:
    """Predictions and labels by case id, and the cases that are on one side only."""

    pairs: dict[str, tuple[Path, Path]]
    without_prediction: tuple[str, ...] = ()
    without_label: tuple[str, ...] = ()


def find_pairs(predictions: str | os.PathLike[str], labels: str | os.PathLike[str]) -> CasePairs:
    """Pair predictions with labels: two files, or two folders whose files have the same names.

    Files are NIfTI or DICOM (SEG, RTSTRUCT; ``NAME.dcm``, ``NAME_seg.dcm`` or ``NAME_rtstruct.dcm``, as lungkit-predict
    writes them); where a folder holds a case as both, the NIfTI file counts. ``labels`` may be the root of a dataset as
    well (see :func:`lungkit.data.open_dataset`); its labels are then paired by case id.

    Raises:
        DataError: a path is absent, a folder holds no masks, or no case is on both sides.
    """
    predictions, labels = Path(predictions), Path(labels)
    for path in (predictions, labels):
        if not path.exists():
            raise DataError(f"{path}: no such file or folder")
    if predictions.is_file() != labels.is_file():
        raise DataError(f"{predictions} and {labels}: give two files or two folders, not one of each")
    if predictions.is_file():
        return CasePairs({_case_id(labels): (predictions, labels)})
    predicted, true = masks_in(predictions), _labels_in(labels)
    if not predicted:
        raise DataError(
            f"{predictions}: holds no masks; expected .nii, .nii.gz, or DICOM SEG or RTSTRUCT (.dcm)"
        )
    common = sorted(predicted.keys() & true.keys())
    if not common:
        raise DataError(
            f"{predictions} and {labels} have no case in common: predictions {shorten(sorted(predicted))}; "
            f"labels {shorten(sorted(true))}; the files must have the same names"
        )
    return CasePairs(
        {case_id: (predicted[case_id], true[case_id]) for case_id in common},
        without_prediction=tuple(sorted(true.keys() - predicted.keys())),
        without_label=tuple(sorted(predicted.keys() - true.keys())),
    )


def probability_name(case: str, class_name: str) -> str:
    """Name of the file with the probabilities of a class, as ``lungkit-predict --probabilities`` gives it.

    Example:
        >>> probability_name("scan_1", "lymph node")
        'scan_1_lymph-node.nii.gz'
    """
    safe = "".join(letter if letter.isalnum() or letter in "-." else "-" for letter in class_name)
    return f"{case}_{safe}.nii.gz"


@dataclass(frozen=True)
class MaskReader:
    """Reads pairs of masks; a DICOM mask lies on the grid of its series, or on that of the NIfTI file beside it.

    Args:
        values: value of each class, by name.
        rules: which structures of a DICOM mask are which class. A class of theirs that they find nothing of in a mask,
            such as a prediction beside contours with a clinic's own names, is the structure called like it. Without
            rules: those called like a class; or the only one that there is, where there is one class.
        archive: with the series that DICOM masks were made on. None: the grid of the other mask of the pair, or, where
            both are DICOM, the series in their own folders.
        max_voxels: refuse larger files.
    """

    values: Mapping[str, int]
    rules: tuple[StructureRule, ...] = ()
    archive: Archive | None = None
    max_voxels: int = DEFAULT_MAX_VOXELS

    def read(self, prediction: Path, label: Path) -> tuple[Volume, Volume]:
        """Prediction and label.

        Raises:
            DataError: one cannot be used, or its series is not found.
            UsageError: pydicom is not installed.
        """
        paths = (prediction, label)
        volumes = {
            path: read_volume(path, max_voxels=self.max_voxels) for path in paths if not _is_dicom(path)
        }
        on_grids = [
            volumes[path]
            if path in volumes
            else self._read_dicom(path, volumes.get(other), dict.fromkeys((path.parent, other.parent)))
            for path, other in (paths, paths[::-1])
        ]
        return on_grids[0], on_grids[1]

    def read_on(self, path: Path, scan: Volume) -> Volume:
        """One mask; a DICOM one on the grid of ``scan``, which is that of its series.

        Raises:
            DataError: it cannot be used.
            UsageError: pydicom is not installed.
        """
        if not _is_dicom(path):
            return read_volume(path, max_voxels=self.max_voxels)
        return self._read_dicom(path, scan, ())

    def _read_dicom(self, path: Path, other: Volume | None, folders: Iterable[Path]) -> Volume:
        from lungkit.data.dicom.archive import find_archive, read_mask_header
        from lungkit.data.dicom.read_label import add_structures

        mask = read_mask_header(path)
        if mask is None:
            raise DataError(f"{path}: holds no mask; name an RTSTRUCT or a SEG")
        if self.archive is None and other is not None:
            scan = _grid_as_scan(other)
        else:
            scan = self._scan_of(
                mask, [self.archive] if self.archive else [find_archive(one) for one in folders]
            )
        dtype = np.min_scalar_type(max(self.values.values()))
        labels: np.ndarray = np.zeros(scan.volume.array.shape, dtype, order="F")
        add_structures(labels, path, scan, mask.structures, self._rules_for(mask), self.values)
        return Volume(labels, scan.volume.affine, path)

    def _scan_of(self, mask: FoundMask, archives: Sequence[Archive]) -> DicomScan:
        from lungkit.data.dicom.series import read_found_series

        for archive in archives:
            if len(found := archive.series_of(mask)) == 1:
                return read_found_series(found[0].info, max_voxels=self.max_voxels)
        raise DataError(
            f"{mask.path}: {shorten(archive.root for archive in archives)} does not hold the CT series that it was "
            "made on, or holds several; name a folder that does with --scans"
        )

    def _rules_for(self, mask: FoundMask) -> tuple[StructureRule, ...]:
        from lungkit.data.dicom.read_label import StructureRule

        classes = {name.lower(): name for name, value in self.values.items() if value != 0}
        chosen = {rule.label for rule in self.rules for name in mask.structures if rule.fits(name)}
        by_name = {rule.label for rule in self.rules} - chosen if self.rules else set(classes.values())
        named = {
            name: classes[name.strip().lower()]
            for name in mask.structures
            if classes.get(name.strip().lower()) in by_name
        }
        if not self.rules and not named and len(mask.structures) == len(classes) == 1:
            named = {mask.structures[0]: next(iter(classes.values()))}
        if not chosen and not named:
            raise DataError(
                f"{mask.path}: holds {shorten(map(repr, mask.structures))}, the classes are "
                f"{', '.join(classes.values())}; say which structures are which class, e.g. --roi 'GTV.*=tumour'"
            )
        by_their_names = (
            StructureRule(re.compile(re.escape(name.strip()), re.IGNORECASE), label)
            for name, label in named.items()
        )
        return (*(self.rules if chosen else ()), *by_their_names)


def _grid_as_scan(volume: Volume) -> DicomScan:
    """A series without images on the grid of ``volume``: positions are all that a mask needs of its series."""
    from pydicom import Dataset

    from lungkit.data.dicom import DicomScan, SeriesInfo

    columns, rows, slices = volume.array.shape
    info = SeriesInfo("", "", "CT", slices, (columns, rows), (), True)
    return DicomScan(volume, info, (Dataset(),))


def _case_id(path: Path) -> str:
    match = _DICOM_NAME.fullmatch(path.name)
    return match[1] if match else split_suffix(path.name)[0]


def _is_dicom(path: Path) -> bool:
    if is_nifti(path.name):
        return False
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False  # its reader says why


def masks_in(folder: Path) -> dict[str, Path]:
    """Masks by case id: NIfTI, and DICOM where there is no NIfTI file of that case."""
    masks = nifti_by_stem(folder)
    dicom: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        case_id = _case_id(path)
        if not _DICOM_NAME.fullmatch(path.name) or case_id in masks or not _is_dicom(path):
            continue
        from lungkit.data.dicom.archive import read_mask_header

        if read_mask_header(path) is not None and (other := dicom.setdefault(case_id, path)) is not path:
            raise DataError(f"{folder}: {other.name} and {path.name} are masks of one case; keep one of them")
    return {**masks, **dicom}


def _labels_in(folder: Path) -> dict[str, Path]:
    # nnU-Net puts a copy of dataset.json beside its masks: it is the files that tell a folder of masks.
    masks = masks_in(folder)
    return masks or {
        case.case_id: case.label for case in open_dataset(folder).cases if case.label is not None
    }
