"""A dataset as the rest of the library sees it, whichever layout it was found in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from lungkit.data.geometry import on_grid_of
from lungkit.data.volume import DEFAULT_MAX_VOXELS, NanPolicy, Volume, read_volume
from lungkit.errors import DataError, UsageError, shorten

IGNORE_INDEX = 255
"""Class index of voxels that neither the loss nor a metric looks at."""

MAX_LABEL_VALUE = 65_535
"""Largest value in a mask: what uint16 holds."""

BLACK_AND_WHITE = "the mask holds 0 and 255, read as 0 and 1"
"""Note of a mask that was."""


@dataclass(frozen=True)
class Case:
    """One scan: its channels in order, its mask if it has one, and the group (patient) it belongs to.

    ``readers`` are the files of several readers: one that counts their votes (``holds_votes``), or a mask of each.
    """

    case_id: str
    images: tuple[Path, ...]
    label: Path | None
    group: str
    readers: tuple[Path, ...] = ()
    holds_votes: bool = False


@dataclass(frozen=True)
class Readers:
    """The readers of a dataset: ``count`` of them (None: nobody says), with ``names`` where each has masks."""

    count: int | None
    names: tuple[str, ...] = ()


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
    readers: Readers | None = None
    regions: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Where classes lie inside each other: region -> the mask values that belong to it, in the order in which a
    predicted mask is written; ``labels`` holds the value that each is written as. Empty where classes exclude each
    other."""

    @property
    def num_classes(self) -> int:
        """K, background included and the ignore label left out."""
        return len(self.labels)

    @property
    def outputs(self) -> int:
        """Channels of a network: one a class with the background, or one a region without it."""
        return self.num_classes - 1 if self.regions else self.num_classes

    @property
    def region_classes(self) -> dict[str, tuple[int, ...]]:
        """Region -> the class indices that belong to it, in the order of writing."""
        indices = self.label_map
        return {name: tuple(indices[value] for value in values) for name, values in self.regions.items()}

    @property
    def region_vectors(self) -> np.ndarray:
        """Whether a class index lies in the region of a channel, float32 (K, K - 1); channel k - 1 is class k's."""
        vectors = np.zeros((self.num_classes, self.num_classes - 1), np.float32)
        for channel, name in enumerate(self.class_names[1:]):
            vectors[list(self.region_classes[name]), channel] = 1
        return vectors

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
    case: Case,
    label_map: Mapping[int, int],
    *,
    max_voxels: int = DEFAULT_MAX_VOXELS,
    nan_policy: NanPolicy = NanPolicy.REFUSE,
) -> tuple[tuple[Volume, ...], Volume | None]:
    """Read the channels and the mask of one case, all on the grid of the first channel.

    A channel or mask that is stored in another orientation is turned, see :func:`lungkit.data.geometry.on_grid_of`.

    Args:
        case: the case.
        label_map: mask value -> class index, as :attr:`Dataset.label_map` gives it.
        max_voxels: refuse larger files, see :func:`lungkit.data.read_volume`.
        nan_policy: what to do with voxels of the channels that are not finite.

    Returns:
        The channels, and the mask with class indices as uint8 (None where the case has none).

    Raises:
        DataError: a file cannot be read, lies on other voxels, or the mask holds a value that is not in
            ``label_map``.
    """
    first, *others = (read_volume(path, max_voxels=max_voxels, nan_policy=nan_policy) for path in case.images)
    volumes = (first, *(on_grid_of(other, first) for other in others))
    if case.label is None:
        return volumes, None
    mask = on_grid_of(read_volume(case.label, max_voxels=max_voxels), first)
    notes = (*mask.notes, BLACK_AND_WHITE) if is_black_and_white(mask.array, label_map) else mask.notes
    return volumes, replace(mask, array=map_labels(mask.array, label_map, str(case.label)), notes=notes)


def map_labels(array: np.ndarray, label_map: Mapping[int, int], where: str) -> np.ndarray:
    """Class indices (uint8) of the mask values in ``array``; ``where`` begins the message of an error.

    Floats are rounded where they lie within half a step of 8-bit storage (1/254 of their range) of a whole number:
    programs that save float labels as integers with scl_slope bring 1 back as 1.00002. Where 0 and 1 are declared,
    a mask of 0 and 255 (black and white) is read as 0 and 1.

    Raises:
        DataError: a value is not a key of ``label_map``, with the value, its count and the declared set.

    Example:
        >>> map_labels(np.array([0, 7, 7]), {0: 0, 7: 1}, "mask.nii.gz").tolist()
        [0, 1, 1]
        >>> map_labels(np.array([0.0, 1.00002]), {0: 0, 1: 1}, "mask.nii.gz").tolist()
        [0, 1]
        >>> map_labels(np.array([0, 255]), {0: 0, 1: 1}, "mask.nii.gz").tolist()
        [0, 1]
    """
    if array.dtype == np.bool_:
        array = array.view(np.uint8)
    values, counts = _values_of(array)
    labels = _whole(values)
    if labels is None or not set(labels) <= label_map.keys():
        if labels is not None and set(label_map) == {0, 1} and set(labels) == {0, 255}:
            label_map = {0: label_map[0], 255: label_map[1]}
        else:
            raise _undeclared(values, counts, label_map, where)
    if array.dtype.kind in "iu" and all(label_map[label] == label for label in labels):
        return array.astype(np.uint8, copy=False)
    if array.dtype == np.uint8:
        table = np.zeros(256, np.uint8)
        table[labels] = [label_map[label] for label in labels]
        return table[array]
    mapped = np.empty(array.shape, np.uint8, order="F" if array.flags.f_contiguous else "C")
    for value, label in zip(values, labels, strict=True):
        mapped[array == value] = label_map[label]
    return mapped


def is_black_and_white(array: np.ndarray, label_map: Mapping[int, int]) -> bool:
    """Whether :func:`map_labels` takes 255 for 1 in this mask."""
    return set(label_map) == {0, 1} and round(float(array.max())) == 255


def _values_of(array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The different values and how often each occurs."""
    if array.dtype != np.uint8:
        return np.unique(array, return_counts=True)
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
    return values, counts[values]


def _whole(values: np.ndarray) -> list[int] | None:
    """The whole number that each of the sorted ``values`` stands for, or None where one stands for none."""
    if values.dtype.kind != "f":
        return [int(value) for value in values]
    if not np.isfinite(values).all():
        return None
    exact = values.astype(np.float64)
    whole = np.rint(exact)
    step = float(exact[-1] - exact[0]) / 254
    apart = float(np.abs(exact - whole).max())
    if apart > min(max(step, 1e-4 * float(np.abs(exact).max())), 0.499):
        return None
    labels = [int(value) for value in whole]
    # Steps of half a label or more tell two labels apart only where no two values meet in one.
    return labels if apart < 0.05 or len(set(labels)) == len(labels) else None


def _undeclared(
    values: np.ndarray, counts: np.ndarray, label_map: Mapping[int, int], where: str
) -> DataError:
    whole = _whole(values)
    names = values.tolist() if whole is None else whole
    unknown = [index for index, value in enumerate(names) if value not in label_map]
    found = ", ".join(f"{names[index]:.9g} ({counts[index]} voxels)" for index in unknown[:5])
    more = f" and {len(unknown) - 5} more values" if len(unknown) > 5 else ""
    advice = "correct the mask or declare the label"
    if whole is None:
        advice = "labels are whole numbers: save the mask as integers, without interpolation or scaling"
    elif set(label_map) == {0, 1}:
        advice = "correct the mask (0 and 1, or 0 and 255), or declare its values in a dataset.json as nnU-Net has them"
    declared = shorten([str(value) for value in sorted(label_map)], limit=20)
    return DataError(f"{where}: undeclared label {found}{more}; the dataset declares [{declared}]: {advice}")
