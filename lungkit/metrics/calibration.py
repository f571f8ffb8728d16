"""Whether probabilities are what they say: Brier score, expected calibration error, reliability curve."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from lungkit.errors import UsageError


@dataclass
class Calibration:
    r"""Sums over voxels of a probability p and of how often the thing is true, y: a class, or a share of readers.

    .. math::
        \mathrm{Brier} = \operatorname{mean}(p - y)^2, \qquad
        \mathrm{ECE} = \sum_b \frac{n_b}{n}\,\bigl|\operatorname{mean}_b p - \operatorname{mean}_b y\bigr|

    over bins b of equal width. Cases are added one after the other and parts of them may be merged; nothing of the
    size of a scan is kept.

    Args:
        bins: of equal width from 0 to 1.

    Source: Brier, "Verification of forecasts expressed in terms of probability", 1950; Naeini et al., "Obtaining Well
    Calibrated Probabilities Using Bayesian Binning", AAAI 2015.

    Example:
        >>> calibration = Calibration(bins=2)
        >>> calibration.add(np.array([0.1, 0.9, 0.9]), np.array([0.0, 1.0, 0.5]))
        >>> round(calibration.brier, 3), round(calibration.ece, 3)
        (0.06, 0.133)
    """

    bins: int = 15
    counts: np.ndarray = field(init=False)
    """Voxels of each bin."""
    predicted: np.ndarray = field(init=False)
    """Sum of p in each bin."""
    observed: np.ndarray = field(init=False)
    """Sum of y in each bin."""
    squares: float = field(init=False, default=0.0)
    """Sum of (p - y)^2."""

    def __post_init__(self) -> None:
        if self.bins < 1:
            raise UsageError(f"bins must be at least 1, got {self.bins}")
        self.counts = np.zeros(self.bins, np.int64)
        self.predicted, self.observed = np.zeros(self.bins), np.zeros(self.bins)

    def add(self, probability: np.ndarray, truth: np.ndarray) -> None:
        """Add voxels.

        Raises:
            UsageError: shapes differ, or a value lies outside [0, 1].
        """
        if probability.shape != truth.shape:
            raise UsageError(
                f"probability and truth must have one shape, got {probability.shape} and {truth.shape}"
            )
        p, y = probability.ravel().astype(np.float64), truth.ravel().astype(np.float64)
        for name, values in (("probability", p), ("truth", y)):
            if values.size and not (values.min() >= 0 and values.max() <= 1 + 1e-6):
                raise UsageError(f"{name} must lie in [0, 1], got {values.min():g} to {values.max():g}")
        place = np.minimum((p * self.bins).astype(np.int64), self.bins - 1)
        self.counts += np.bincount(place, minlength=self.bins)
        self.predicted += np.bincount(place, p, self.bins)
        self.observed += np.bincount(place, y, self.bins)
        self.squares += float(np.square(p - y).sum())

    def merge(self, other: Calibration) -> None:
        """Add what another one of as many bins has seen."""
        self.counts += other.counts
        self.predicted += other.predicted
        self.observed += other.observed
        self.squares += other.squares

    @property
    def voxels(self) -> int:
        """How many were added."""
        return int(self.counts.sum())

    @property
    def brier(self) -> float:
        """Brier score; NaN without voxels."""
        return self.squares / self.voxels if self.voxels else math.nan

    @property
    def ece(self) -> float:
        """Expected calibration error; NaN without voxels."""
        return float(np.abs(self.predicted - self.observed).sum()) / self.voxels if self.voxels else math.nan

    @property
    def curve(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Mean p, mean y and voxels of the bins that hold any."""
        filled = self.counts > 0
        counts = self.counts[filled]
        return self.predicted[filled] / counts, self.observed[filled] / counts, counts
