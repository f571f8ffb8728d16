"""The lesions of a predicted mask, and which of them are large enough to stay."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import cc3d
import numpy as np


@dataclass(frozen=True, eq=False)
class Lesions:
    """The lesions of a label map (Z, Y, X), numbered from 1.

    ``foreground`` is bool (Z, Y, X); ``numbers`` (N,) says for each of its voxels which lesion it belongs to;
    ``sizes`` are the voxels of each number.
    """

    foreground: np.ndarray
    numbers: np.ndarray
    sizes: np.ndarray

    @classmethod
    def find(cls, label: np.ndarray) -> Lesions:
        """Components of the classes of a uint8 label map."""
        pieces, count = cc3d.connected_components(np.ascontiguousarray(label), connectivity=26, return_N=True)
        foreground = label != 0
        numbers = pieces[foreground]
        return cls(foreground, numbers, np.bincount(numbers, minlength=count + 1))

    def kept(self, *, smallest: int = 0, region: np.ndarray | None = None) -> np.ndarray:
        """Whether each number has at least ``smallest`` voxels, and one of them in ``region``; bool."""
        kept: np.ndarray = self.sizes >= smallest
        if region is not None:
            kept &= np.bincount(self.numbers[region[self.foreground]], minlength=len(self.sizes)) > 0
        return kept

    def masses(self, probability: np.ndarray) -> np.ndarray:
        """The sum of a map (Z, Y, X) over the voxels of each number; float64, exact of whole numbers."""
        return np.bincount(self.numbers, weights=probability[self.foreground], minlength=len(self.sizes))

    def classes_in(self, label: np.ndarray) -> np.ndarray:
        """The class of each number in the label map that they were found in; uint8, 0 of no lesion."""
        classes = np.zeros(len(self.sizes), np.uint8)
        classes[self.numbers] = label[self.foreground]
        return classes


def beside_largest(kept: np.ndarray, masses: np.ndarray, classes: np.ndarray, share: float) -> np.ndarray:
    """Which lesions stay of those that are ``kept`` so far: bool (N,), of ``share`` of the largest mass of their class.

    Example:
        >>> kept, masses = np.array([True, True, True, False]), np.array([10.0, 2.0, 3.0, 99.0])
        >>> beside_largest(kept, masses, np.array([1, 1, 2, 1]), 0.3).tolist()
        [True, False, True, False]
    """
    largest_of = np.zeros(256)
    np.maximum.at(largest_of, classes[kept], masses[kept])
    # Rounding must not cost a lesion of just this share its place.
    remain: np.ndarray = kept & (masses >= share * largest_of[classes] * (1 - 1e-12))
    return remain


def voxels_of(volume_ml: float, spacing_mm: Sequence[float]) -> int:
    """The fewest voxels that make up a volume.

    Example:
        >>> voxels_of(0.1, (2.5, 0.8, 0.8)), voxels_of(0.0, (1.0, 1.0, 1.0))
        (63, 0)
    """
    # Rounding must not cost a lesion of just this volume a voxel.
    return math.ceil(volume_ml * 1000 / math.prod(spacing_mm) - 1e-6)
