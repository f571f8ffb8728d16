"""How the intensities of a channel are normalised, and by which filters an image comes to another grid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lungkit.data.resampling import FILTERS, Filter
from lungkit.errors import UsageError

Statistics = Literal["training", "scan", "nonzero", "range"]
"""Of what a channel's mean and standard deviation are."""


@dataclass(frozen=True)
class ChannelNormalisation:
    """normalised = (clip(x, *window) - mean) / std, for one channel; ``units`` are those of the window.

    A window of None does not clip. ``statistics`` says of what mean and std are: of the "training" scans, as given; of
    the "scan" itself, whatever is given; of its "nonzero" part, the rest staying 0; or the "range" of the scan, minimum
    and maximum minus minimum, so that intensities run from 0 to 1.
    """

    window: tuple[float, float] | None
    mean: float
    std: float
    units: str
    statistics: Statistics = "training"

    @property
    def bounds(self) -> tuple[float, float]:
        """The window's two ends after normalisation.

        Raises:
            UsageError: normalised intensities have no bounds.
        """
        if self.window is None or self.statistics != "training":
            raise UsageError(
                f"normalisation by {self.statistics} statistics with the window {self.window} has no bounds"
            )
        return (self.window[0] - self.mean) / self.std, (self.window[1] - self.mean) / self.std


@dataclass(frozen=True)
class Interpolation:
    """Filter that brings an image to another grid, see :mod:`lungkit.data.resampling`.

    Where ``through_plane`` is given, the axis of the largest spacing takes that one, in scans (or else target grids) of
    which the largest spacing is more than ``anisotropy`` times the smallest.

    Example:
        >>> Interpolation("cubic", "nearest").filters((5.0, 0.7, 0.7), (2.5, 1.0, 1.0))
        ('nearest', 'cubic', 'cubic')
    """

    filter: Filter = "triangle"
    through_plane: Filter | None = None
    anisotropy: float = 3.0

    def __post_init__(self) -> None:
        for name in (self.filter, self.through_plane or self.filter):
            if name not in FILTERS:
                raise UsageError(f"interpolation {name!r} is none of {', '.join(FILTERS)}")
        if not isinstance(self.anisotropy, (int, float)) or not self.anisotropy >= 1:
            raise UsageError(f"anisotropy must be a number of at least 1, got {self.anisotropy!r}")

    def filters(
        self, own_mm: tuple[float, float, float], target_mm: tuple[float, float, float]
    ) -> tuple[Filter, Filter, Filter]:
        """The filter of each axis, from a grid of spacing ``own_mm`` to one of ``target_mm``."""
        axis = self.separate_axis(own_mm, target_mm)
        first, second, third = (
            self.filter if n != axis or self.through_plane is None else self.through_plane for n in range(3)
        )
        return first, second, third

    def separate_axis(
        self, own_mm: tuple[float, float, float], target_mm: tuple[float, float, float]
    ) -> int | None:
        """The axis that takes ``through_plane``, None where all are alike."""
        for spacing in (own_mm, target_mm):
            if self.through_plane is not None and max(spacing) > self.anisotropy * min(spacing):
                return spacing.index(max(spacing)) if spacing.count(max(spacing)) == 1 else None
        return None


TRIANGLE = Interpolation()
