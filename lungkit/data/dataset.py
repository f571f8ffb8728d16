"""A dataset as the rest of the library sees it, whichever layout it was found in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from lungkit.data.volume import DEFAULT_MAX_VOXELS, Volume, read_volume
from lungkit.errors import DataError, UsageError, shorten

IGNORE_INDEX = 255
"""Class index of voxels that neither the loss nor a metric looks at."""

_AFFINE_TOLERANCE_MM = 1e-3


@dataclass(frozen=True)
class Case:
    """One scan: its channels in order, its mask if it has one, and the group (patient) it belongs to."""

    case_id: str
    images: tuple[Path, ...]
    label: Path | None
    group: str


@dataclass(frozen=True)
class Dataset:
    """Cases with one declaration of labels and channels.

    ``labels`` maps each class name to the value in the mask files, the ignore label left out; ``label_map``
    maps those values to the class indices 0..K-1 used everywhere else, in ascending order.
    """

    root: Path
    name: str
    cases: tuple[Case, ...]
    labels: dict[str, int]
    channel_names: tuple[str, ...]
    ignore_label: int | None
    layout: str

    @property
    def num_classes(self) -> int:
        """K, background included and the ignore label left out."""
        return len(self.labels)

    @property
    def label_map(self) -> dict[int, int]:
        """Mask value -> class index 0..K-1; the ignore label, where there is one, -> 255."""
        mapping = {value: index for index, value in enumerate(sorted(self.labels.values()))}
        if self.ignore_label is not None:
            mapping[self.ignore_label] = IGNORE_INDEX
        return mapping

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names in the order of the class indices."""
        return tuple(sorted(self.labels, key=self.labels.__getitem__))

    def case(self, case_id: str) -> Case:
        """The case of that id.

        Raises:
            UsageError: no such case.
        """
        try:
            return self._by_id[case_id]
        except KeyError:
            raise UsageError(
                f"case_id: no case {case_id!r} in {self.root}, which holds {len(self.cases)} cases "
                f"({shorten([case.case_id for case in self.cases])})"
            ) from None

    @cached_property
    def _by_id(self) -> dict[str, Case]:
        return {case.case_id: case for case in self.cases}


def read_case(
    case: Case, label_map: Mapping[int, int], *, max_voxels: int = DEFAULT_MAX_VOXELS
) -> tuple[tuple[Volume, ...], Volume | None]:
    """Read the channels and the mask of one case, and check that they lie on one grid.

    Args:
        case: the case.
        label_map: mask value -> class index, as :attr:`Dataset.label_map` gives it.
        max_voxels: refuse larger files, see :func:`lungkit.data.read_volume`.

    Returns:
        The channels, and the mask with class indices as uint8 (None where the case has none).

    Raises:
        DataError: a file cannot be read, shapes or affines differ by more than 1e-3, or the mask holds a
            value that is not in ``label_map``.
    """
    volumes = tuple(read_volume(path, max_voxels=max_voxels) for path in case.images)
    for other in volumes[1:]:
        _check_same_grid(volumes[0], other)
    if case.label is None:
        return volumes, None
    mask = read_volume(case.label, max_voxels=max_voxels)
    _check_same_grid(volumes[0], mask)
    return volumes, Volume(map_labels(mask.array, label_map, str(case.label)), mask.affine, mask.path)


def map_labels(array: np.ndarray, label_map: Mapping[int, int], where: str) -> np.ndarray:
    """Class indices (uint8) of the mask values in ``array``; ``where`` begins the message of an error.

    Raises:
        DataError: a value is not a key of ``label_map``, with the value, its count and the declared set.

    Example:
        >>> map_labels(np.array([0, 7, 7]), {0: 0, 7: 1}, "mask.nii.gz").tolist()
        [0, 1, 1]
    """
    if array.dtype == np.uint8:
        # Counting all 256 values is one fast pass, and masks are nearly always uint8.
        flat = array.ravel(order="K")
        # In pieces, since bincount makes an int64 copy of what it is given.
        counts = np.sum(
            [
                np.bincount(flat[start : start + (1 << 20)], minlength=256)
                for start in range(0, flat.size, 1 << 20)
            ],
            axis=0,
        )
        values = np.flatnonzero(counts)
        counts = counts[values]
    else:
        values, counts = np.unique(array, return_counts=True)
    unknown = [index for index, value in enumerate(values.tolist()) if value not in label_map]
    if unknown:
        found = ", ".join(f"{values[index]:g} ({counts[index]} voxels)" for index in unknown[:5])
        more = f" and {len(unknown) - 5} more values" if len(unknown) > 5 else ""
        raise DataError(
            f"{where}: undeclared label {found}{more}; the dataset declares {sorted(label_map)}: "
            "correct the mask or declare the label"
        )
    if all(label_map[int(value)] == value for value in values.tolist()):
        return array.astype(np.uint8, copy=False)
    if array.dtype == np.uint8:
        table = np.zeros(256, np.uint8)
        table[values] = [label_map[int(value)] for value in values]
        return table[array]
    mapped = np.empty(array.shape, np.uint8, order="F" if array.flags.f_contiguous else "C")
    for value in values:
        mapped[array == value] = label_map[int(value)]
    return mapped


def _check_same_grid(first: Volume, second: Volume) -> None:
    if first.array.shape != second.array.shape:
        raise DataError(
            f"{second.path}: shape {second.array.shape}, but {first.path} has {first.array.shape}; "
            "channels and mask of a case must lie on one grid: resample one onto the other"
        )
    difference = float(np.abs(first.affine - second.affine).max())
    if difference > _AFFINE_TOLERANCE_MM:
        raise DataError(
            f"{second.path}: affine {_rows(second.affine)} differs by {difference:g} from "
            f"{_rows(first.affine)} of {first.path}; correct the header of the one that is wrong"
        )


def _rows(affine: np.ndarray) -> str:
    return "[" + "; ".join(" ".join(f"{value:g}" for value in row) for row in affine[:3]) + "]"
