"""A label mask from DICOM, whichever object holds it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lungkit.data.dicom.files import read_header
from lungkit.data.dicom.rtstruct import STRUCTURE_SET, read_rtstruct
from lungkit.data.dicom.segmentation import LABEL_MAP, SEGMENTATION, read_dicom_seg
from lungkit.data.dicom.series import DicomScan
from lungkit.data.volume import Volume
from lungkit.errors import DataError, UsageError


@dataclass(frozen=True)
class StructureRule:
    """Structures whose name ``pattern`` fits, whole and in any case, are of the class ``label``."""

    pattern: re.Pattern[str]
    label: str

    @classmethod
    def parse(cls, text: str) -> StructureRule:
        """From "REGEX=LABEL", as a command line gives it.

        Raises:
            UsageError: another form, or no regular expression.

        Example:
            >>> StructureRule.parse("gtv.*=tumour").fits("GTV-1")
            True
        """
        pattern, equals, label = text.rpartition("=")
        if not equals or not pattern or not label.strip():
            raise UsageError(f"--roi is {text!r}; give REGEX=LABEL, e.g. 'GTV.*=tumour'")
        try:
            return cls(re.compile(pattern, re.IGNORECASE), label.strip())
        except re.error as error:
            raise UsageError(f"--roi {text!r}: {pattern!r} is not a regular expression ({error})") from error

    def fits(self, name: str) -> bool:
        """Whether a structure of that name is meant."""
        return self.pattern.fullmatch(name.strip()) is not None


def read_dicom_label(
    path: str | os.PathLike[str], scan: DicomScan, *, names: str | Sequence[str] | None = None
) -> tuple[Volume, dict[str, int]]:
    """Read an RTSTRUCT or a SEG onto the grid of ``scan``, whichever the file is.

    Args:
        path: the file.
        scan: the series it was made on.
        names: of the structures or segments to read; None: all.

    Returns:
        The mask, uint8 (X, Y, Z), and its names with their values.

    Raises:
        DataError: the file holds neither, or cannot be used (see :func:`read_rtstruct`, :func:`read_dicom_seg`).
        UsageError: pydicom is not installed.

    Example:
        >>> mask, labels = read_dicom_label("RS.dcm", scan, names="GTV-1")  # doctest: +SKIP
        >>> labels  # doctest: +SKIP
        {'GTV-1': 1}
    """
    path = Path(path)
    kind = read_header(path).SOPClassUID
    if kind == STRUCTURE_SET:
        return read_rtstruct(path, scan, roi=names)
    if kind in (SEGMENTATION, LABEL_MAP):
        return read_dicom_seg(path, scan, segment=names)
    raise DataError(f"{path.name}: {kind.name} holds no mask; name an RTSTRUCT or a SEG")


def add_structures(
    labels: np.ndarray,
    path: Path,
    scan: DicomScan,
    structures: Sequence[str],
    rules: Sequence[StructureRule],
    values: Mapping[str, int],
) -> None:
    """Add the structures of a mask that the rules choose to ``labels`` (X, Y, Z), with the values of their classes.

    A structure is of the first rule that fits. Where classes overlap, the one of the earlier rule stays, whichever
    file or structure it comes from: rules go from what lies inside to what lies around it.

    Raises:
        DataError: the file cannot be used.
    """
    rank = {values[rule.label]: index for index, rule in reversed(list(enumerate(rules)))}
    table = np.full(1 + max(values.values()), len(rules))
    for value, index in rank.items():
        table[value] = index
    for name in structures:
        rule = next((rule for rule in rules if rule.fits(name)), None)
        if rule is not None:
            # One at a time: those of one class may overlap.
            inside = read_dicom_label(path, scan, names=name)[0].array != 0
            labels[inside & (table[labels] > rank[values[rule.label]])] = values[rule.label]
