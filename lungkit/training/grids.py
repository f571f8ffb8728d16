"""On which grid a prediction is measured and drawn: the cache's, or the scan's own where the cache is resampled."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import numpy as np

from lungkit.data import (
    CachedCase,
    Dataset,
    Preprocessing,
    preprocess_image,
    read_case,
    read_volume,
    restore_label,
)
from lungkit.data.dataset import map_labels
from lungkit.data.geometry import orient, plan_geometry
from lungkit.errors import UsageError


class Grid(Protocol):
    """Where truth and prediction meet, as (Z, Y, X) in canonical orientation."""

    note: str
    """One sentence for the table of results."""

    def labels(self, case: CachedCase, prediction: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Prediction and truth on this grid, for a prediction on the cache's."""

    def image(self, case: CachedCase) -> tuple[np.ndarray, tuple[float, float, float]]:
        """Normalised image (C, Z, Y, X) and spacing in mm (z, y, x)."""


class CacheGrid:
    """The grid that the network sees; the scan's own one where preprocessing does not resample."""

    note = "Measured on the scans' own grid."

    def labels(self, case: CachedCase, prediction: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As they are."""
        return prediction, np.asarray(case.label)

    def image(self, case: CachedCase) -> tuple[np.ndarray, tuple[float, float, float]]:
        """As it is."""
        return case.image_float(), case.spacing_mm


class ScanGrid:
    """The scan's own grid: predictions are resampled back (nearest voxel), the truth is what the file holds.

    Args:
        dataset: where the scans and masks are.
        preprocessing: that of the cache.
        max_voxels: refuse larger files.

    Raises:
        DataError: when called, a file has become unreadable.
        UsageError: when called, a case has no mask.
    """

    def __init__(self, dataset: Dataset, preprocessing: Preprocessing, *, max_voxels: int) -> None:
        self.dataset, self.preprocessing, self.max_voxels = dataset, preprocessing, max_voxels
        spacing = " x ".join(f"{size:g}" for size in preprocessing.target_spacing_mm or ())
        self.note = (
            f"Measured on the scans' own grid, to which predictions were brought back from {spacing} mm "
            "(z, y, x), the grid of training and of metrics.csv."
        )

    def labels(self, case: CachedCase, prediction: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Prediction and truth, both (Z, Y, X) of the scan."""
        path = self.dataset.case(case.case_id).label
        if path is None:
            raise UsageError(f"case {case.case_id} has no mask to measure against")
        mask = read_volume(path, max_voxels=self.max_voxels)
        truth = map_labels(mask.array, self.preprocessing.label_map, str(path))
        resampled = plan_geometry(mask, target_spacing_mm=self.preprocessing.target_spacing_mm)
        own = plan_geometry(mask)
        return orient(restore_label(prediction, resampled), own), orient(truth, own)

    def image(self, case: CachedCase) -> tuple[np.ndarray, tuple[float, float, float]]:
        """The scan, normalised but not resampled."""
        source = self.dataset.case(case.case_id)
        volumes, _ = read_case(source, self.preprocessing.label_map, max_voxels=self.max_voxels)
        image = preprocess_image(volumes, replace(self.preprocessing, target_spacing_mm=None))
        return image.array, image.spacing_mm


def grid_of_scans(dataset: Dataset, preprocessing: Preprocessing, *, max_voxels: int) -> Grid:
    """The scans' own grid; where it is the cache's, files are not read again."""
    if preprocessing.target_spacing_mm is None:
        return CacheGrid()
    return ScanGrid(dataset, preprocessing, max_voxels=max_voxels)
