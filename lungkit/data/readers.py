"""What several readers say of a voxel: votes or masks of each, as one small number a voxel."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from lungkit.data.dataset import IGNORE_INDEX, Case, Dataset, map_labels
from lungkit.data.geometry import on_grid_of
from lungkit.data.volume import DEFAULT_MAX_VOXELS, Volume, read_volume
from lungkit.errors import DataError, UsageError

_PIECE = 1 << 22  # voxels that are encoded at a time


@dataclass(frozen=True)
class ReaderCodes:
    """A number for each way in which readers can divide over the classes of a voxel.

    Codes take the road of class indices through cache, patches and augmentation; the loss looks up the shares. The
    first codes are those of all readers, so that with two classes a code up to ``readers`` is the number of votes, and
    0 is unanimous background. Further codes are those of voxels that not everybody has read.

    Args:
        readers: how many there are, 2 or more.
        classes: K, background included.

    Raises:
        UsageError: there are more ways than 8 bits hold.

    Example:
        >>> codes = ReaderCodes(readers=4, classes=2)
        >>> codes.shares[:5, 1].tolist()
        [0.0, 0.25, 0.5, 0.75, 1.0]
        >>> codes.votes(np.array([0, 2, 3, 255]), 1).tolist()
        [0, 2, 3, 0]
    """

    readers: int
    classes: int

    def __post_init__(self) -> None:
        if self.readers < 2:
            raise UsageError(f"readers must be at least 2, got {self.readers}")
        ways = sum(math.comb(n + self.classes - 1, n) for n in range(1, self.readers + 1))
        if ways > IGNORE_INDEX:
            raise UsageError(
                f"{self.readers} readers can divide over {self.classes} classes in {ways} ways; at most "
                f"{IGNORE_INDEX} are supported: use fewer readers or classes"
            )

    @cached_property
    def counts(self) -> np.ndarray:
        """Readers of each class, uint8 (codes, K)."""
        ways: list[tuple[int, ...]] = []
        for total in range(self.readers, 0, -1):
            foreground = (
                counts
                for counts in itertools.product(range(total + 1), repeat=self.classes - 1)
                if sum(counts) <= total
            )
            ways += [(total - sum(counts), *counts) for counts in foreground]
        return np.array(ways, np.uint8)

    @property
    def shares(self) -> np.ndarray:
        """Share of the readers for each class, float32 (codes, K)."""
        return (self.counts / self.counts.sum(1, keepdims=True)).astype(np.float32)

    def votes(self, codes: np.ndarray, index: int) -> np.ndarray:
        """Readers that chose class ``index``, of each voxel; 0 where it is to be ignored."""
        return self._of_codes(self.counts[:, index])[codes]

    def readings(self, codes: np.ndarray) -> np.ndarray:
        """Readers that said something of each voxel; 0 where it is to be ignored."""
        return self._of_codes(self.counts.sum(1))[codes]

    def encode(self, counts: np.ndarray) -> np.ndarray:
        """Codes (uint8) of voxels with ``counts`` (K, \\*S) readers of each class; 255 where there is none."""
        places = (self.readers + 1) ** np.arange(self.classes, dtype=np.int64)
        keys = self.counts @ places
        order = np.argsort(keys)
        wanted = np.tensordot(places, counts, 1)
        found = order[np.searchsorted(keys, wanted, sorter=order).clip(max=len(order) - 1)]
        return np.where(wanted == 0, IGNORE_INDEX, found).astype(np.uint8)

    def _of_codes(self, values: np.ndarray) -> np.ndarray:
        table = np.zeros(256, np.uint8)
        table[: len(values)] = values
        return table


def reader_codes(dataset: Dataset, *, readers: int | None = None) -> ReaderCodes:
    """The codes for what the readers of a dataset say.

    Args:
        dataset: with votes or masks of several readers.
        readers: how many they were, for votes of a dataset whose ``dataset.json`` does not tell.

    Raises:
        UsageError: the dataset has labels of one reader only, or the number of readers is not known.
    """
    found = dataset.readers
    if found is None:
        raise UsageError(
            f"{dataset.root} has no labels of several readers: no folder votesTr, and no 'readers' in dataset.json"
        )
    if dataset.regions:
        raise UsageError(f"{dataset.root} declares regions; what several readers say needs classes")
    count = found.count if readers is None else readers
    if count is None:
        raise UsageError(
            f"{dataset.root}: votesTr does not tell how many readers there were; give --data.readers "
            '(lungkit-evaluate: --readers), or declare e.g. "readers": 4 in dataset.json'
        )
    if found.names and count != found.count:
        raise UsageError(
            f"readers is {count}, but {dataset.root} has masks of {len(found.names)}; leave it out"
        )
    if not found.names and dataset.num_classes > 2:
        raise UsageError(
            f"{dataset.root}: votesTr holds votes for one class, but {dataset.num_classes - 1} are declared; several "
            "classes need a mask of each reader (readersTr)"
        )
    return ReaderCodes(count, dataset.num_classes)


def read_codes(
    case: Case,
    codes: ReaderCodes,
    label_map: Mapping[int, int],
    reference: Volume,
    *,
    max_voxels: int = DEFAULT_MAX_VOXELS,
) -> Volume:
    """What the readers of one case say: codes (uint8) on the grid of ``reference``.

    Args:
        case: with one file of votes, or a mask of each reader that has read it.
        codes: of :func:`reader_codes`.
        label_map: mask value -> class index; a voxel that a reader ignores is one that he has not read.
        reference: a volume on the grid of the case.
        max_voxels: refuse larger files.

    Raises:
        DataError: a file is absent, cannot be used, lies on another grid or holds more votes than readers.
    """
    if not case.readers:
        raise DataError(f"case {case.case_id} has labels of no reader; add them, or leave the case out")
    volumes = [on_grid_of(read_volume(path, max_voxels=max_voxels), reference) for path in case.readers]
    if case.holds_votes:
        array = volumes[0].array
        if array.dtype.kind == "f" and not (np.rint(array) == array).all():
            raise DataError(f"{case.readers[0]}: votes are whole numbers of readers; save them as integers")
        if int(array.max()) > codes.readers or int(array.min()) < 0:
            raise DataError(
                f"{case.readers[0]}: votes from {int(array.min())} to {int(array.max())}, but there were "
                f"{codes.readers} readers; correct the file or the number of readers"
            )
        return replace(volumes[0], array=array.astype(np.uint8))
    masks = [
        map_labels(volume.array, label_map, str(path)).reshape(-1, order="F")
        for volume, path in zip(volumes, case.readers, strict=True)
    ]
    encoded = np.empty(masks[0].size, np.uint8)
    for first in range(0, encoded.size, _PIECE):
        piece = slice(first, first + _PIECE)
        counts = np.zeros((codes.classes, encoded[piece].size), np.uint8)
        for mask in masks:
            for index in range(codes.classes):
                counts[index] += mask[piece] == index
        encoded[piece] = codes.encode(counts)
    return replace(volumes[0], array=encoded.reshape(volumes[0].array.shape, order="F"))


@dataclass(frozen=True)
class CodedCase:
    """A cached case whose label is what its readers say, for :class:`lungkit.data.PatchSampler`."""

    case: Any  # a CachedCase; the cache imports this module

    @property
    def case_id(self) -> str:
        """As of the case."""
        return str(self.case.case_id)

    @property
    def image(self) -> np.ndarray:
        """As of the case."""
        return self.case.image

    @property
    def label(self) -> np.ndarray:
        """Codes of :class:`ReaderCodes`, uint8 (Z, Y, X), 255 to ignore."""
        return self.case.codes

    @property
    def foreground(self) -> np.ndarray:
        """As of the case: foreground is what the consensus says."""
        return self.case.foreground

    @property
    def slope(self) -> float:
        """As of the case."""
        return float(self.case.slope)

    @property
    def intercept(self) -> float:
        """As of the case."""
        return float(self.case.intercept)
