"""What must be known of a whole scan before its slices can be read: statistics, limits, where it is not 0."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from lungkit.data.normalisation import ChannelNormalisation
from lungkit.data.slices import Slices, chunks
from lungkit.data.volume import Volume

_LEAST_DEVIATION = 1e-8

Box = tuple[slice, slice, slice]


def nonzero_box(volumes: Sequence[Volume]) -> Box:
    """The smallest box (X, Y, Z) of voxels round everything that is not 0 in some channel; all, where nothing is.

    Example:
        >>> array = np.zeros((4, 4, 4), np.int16)
        >>> array[1:3, 2, :] = 7
        >>> nonzero_box([Volume(array, np.eye(4))])
        (slice(1, 3, None), slice(2, 3, None), slice(0, 4, None))
    """
    shape = volumes[0].array.shape
    box = [slice(0, length) for length in shape]
    for axis in range(3):
        first, last = 0, shape[axis]
        while first < last and not _any_in_slice(volumes, box, axis, first):
            first += 1
        while last > first and not _any_in_slice(volumes, box, axis, last - 1):
            last -= 1
        if first == last:
            return slice(0, shape[0]), slice(0, shape[1]), slice(0, shape[2])
        box[axis] = slice(first, last)
    return box[0], box[1], box[2]


def _any_in_slice(volumes: Sequence[Volume], box: Sequence[slice], axis: int, index: int) -> bool:
    place = tuple(index if n == axis else part for n, part in enumerate(box))
    return any(bool((volume.array[place] != 0).any()) for volume in volumes)


def cropped(volume: Volume, box: Box) -> Volume:
    """The part of a volume in ``box``, a view, where it lies in the world."""
    affine = volume.affine.copy()
    affine[:3, 3] += affine[:3, :3] @ [part.start for part in box]
    return replace(volume, array=volume.array[box], affine=affine, space=None)


def filled(mask: np.ndarray) -> np.ndarray:
    """``mask`` and the holes in it, from which no way over faces leads to the array's border.

    Example:
        >>> ring = np.ones((3, 3, 3), bool)
        >>> ring[1, 1, 1] = False
        >>> bool(filled(ring).all())
        True
    """
    import cc3d

    regions = cc3d.connected_components(~mask, connectivity=6)
    outside = np.zeros(int(regions.max()) + 1, bool)
    for axis in range(3):
        for index in (0, -1):
            outside[np.unique(np.take(regions, index, axis=axis))] = True
    outside[0] = False
    return ~outside[regions]


class NormalisedSlices:
    """The channels of a scan, each normalised by its own statistics or by those that are given.

    Args:
        slices: the whole scan, clipped.
        channels: how each channel is normalised.
        nonzero: (Z, Y, X), where the channels that ask for it are not background.
    """

    def __init__(
        self, slices: Slices, channels: Sequence[ChannelNormalisation], nonzero: np.ndarray | None
    ) -> None:
        self._slices = slices
        self._nonzero = None if nonzero is None else torch.from_numpy(nonzero)
        self._masked = [channel.statistics == "nonzero" for channel in channels]
        self.shape = slices.shape
        found = [self._statistics(index, channel) for index, channel in enumerate(channels)]
        self._means, self._deviations = (
            torch.tensor(values, dtype=torch.float32).reshape(-1, 1, 1, 1)
            for values in zip(*found, strict=True)
        )

    def read(self, first: int, last: int) -> Tensor:
        """Normalised slices; background that is left out stays as it is."""
        slices = self._slices.read(first, last)
        normalised = (slices - self._means).div_(self._deviations)
        if self._nonzero is not None:
            inside = self._nonzero[first:last]
            for channel, masked in enumerate(self._masked):
                if masked:
                    normalised[channel] = torch.where(inside, normalised[channel], slices[channel])
        return normalised

    def _statistics(self, index: int, channel: ChannelNormalisation) -> tuple[float, float]:
        if channel.statistics == "training":
            return channel.mean, channel.std
        if channel.statistics == "range":
            low = min(float(values.min()) for values in self._values(index, False))
            high = max(float(values.max()) for values in self._values(index, False))
            return low, max(high - low, _LEAST_DEVIATION)
        masked = channel.statistics == "nonzero"
        sums = [(float(values.double().sum()), values.numel()) for values in self._values(index, masked)]
        count = max(1, sum(number for _, number in sums))
        mean = sum(total for total, _ in sums) / count
        squares = sum(
            float((values.double() - mean).square().sum()) for values in self._values(index, masked)
        )
        return mean, max(math.sqrt(squares / count), _LEAST_DEVIATION)

    def _values(self, channel: int, masked: bool) -> Iterator[Tensor]:
        for first, last in _parts(self._slices):
            values = self._slices.read(first, last)[channel]
            yield values[self._nonzero[first:last]] if masked and self._nonzero is not None else values


class LimitedSlices:
    """Resampled slices kept between the smallest and the largest value of each channel before, which a spline leaves.

    Args:
        slices: resampled.
        source: what they were made of.
        separate_axis: along which slices were taken as they are, so that each has limits of its own; None for none.
    """

    def __init__(self, slices: Slices, source: Slices, separate_axis: int | None) -> None:
        self._slices = slices
        self.shape = slices.shape
        kept = [axis for axis in (1, 2, 3) if separate_axis is None or axis != separate_axis + 1]
        lows, highs = [], []
        for first, last in _parts(source):
            values = source.read(first, last)
            lows.append(values.amin(kept, keepdim=True))
            highs.append(values.amax(kept, keepdim=True))
        if separate_axis == 0:
            self._low, self._high = torch.cat(lows, 1), torch.cat(highs, 1)
        else:
            self._low, self._high = torch.stack(lows).amin(0), torch.stack(highs).amax(0)
        self._by_slice = separate_axis == 0
        if separate_axis is not None:
            old, new = source.shape[separate_axis + 1], slices.shape[separate_axis + 1]
            nearest = torch.from_numpy((2 * np.arange(new, dtype=np.int64) + 1) * old // (2 * new))
            self._low, self._high = (
                limit.index_select(separate_axis + 1, nearest) for limit in (self._low, self._high)
            )

    def read(self, first: int, last: int) -> Tensor:
        """Slices of the new grid."""
        part = slice(first, last) if self._by_slice else slice(None)
        return torch.clamp(self._slices.read(first, last), self._low[:, part], self._high[:, part])


def _parts(slices: Slices) -> list[tuple[int, int]]:
    channels, depth, *plane = slices.shape
    return chunks(depth, channels * math.prod(plane))
