"""Images that are read and resampled a few rows at a time, so that a long scan needs no float volume."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lungkit.data.geometry import Geometry, orient
from lungkit.data.preprocessing import Preprocessing
from lungkit.data.volume import Volume
from lungkit.errors import UsageError


class Rows(Protocol):
    r"""An image (C, \*S) whose rows along the first axis of S are asked for in ascending order."""

    @property
    def shape(self) -> tuple[int, ...]:
        r"""(C, \*S), for a scan (C, Z, Y, X)."""

    def read(self, first: int, last: int) -> Tensor:
        r"""Rows ``first`` to ``last`` - 1 as float32 (C, last - first, \*S[1:]); ``first`` never goes back."""


class TensorRows:
    r"""The rows of a tensor (C, \*S)."""

    def __init__(self, image: Tensor) -> None:
        self.image = image
        self.shape = tuple(image.shape)

    def read(self, first: int, last: int) -> Tensor:
        """A view."""
        return self.image[:, first:last]


class ScanRows:
    """A scan reoriented, clipped, resampled and normalised: :func:`lungkit.data.preprocess_image`, by rows.

    The result equals that of the whole scan to the rounding of float32. ``volumes`` are the channels.
    """

    def __init__(self, volumes: Sequence[Volume], preprocessing: Preprocessing, geometry: Geometry) -> None:
        self._channels = [
            (orient(volume.array, geometry), channel)
            for volume, channel in zip(volumes, preprocessing.channels, strict=True)
        ]
        self._old, self._new = geometry.oriented_shape, geometry.shape

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, Z, Y, X) after resampling."""
        return len(self._channels), *self._new

    def read(self, first: int, last: int) -> Tensor:
        """Rows of the resampled grid."""
        low, high, _ = linear_weights(self._old[0], self._new[0], first, last)
        rows = torch.empty((len(self._channels), high - low, *self._old[1:]))
        for target, (stored, channel) in zip(rows, self._channels, strict=True):
            np.clip(stored[low:high], *channel.window, out=target.numpy(), dtype=np.float32, casting="unsafe")
        rows = resample_plane(rows, self._new[1:])
        rows = resample_rows(rows, self._old[0], self._new[0], first, last)
        for target, (_, channel) in zip(rows, self._channels, strict=True):
            target.sub_(channel.mean).div_(channel.std)
        return rows


class ContextRows:
    """Every slice with n slices on either side as further channels, see :func:`with_context`."""

    def __init__(self, rows: Rows, context_slices: int) -> None:
        self._rows, self._context = RecentRows(rows), context_slices

    @property
    def shape(self) -> tuple[int, ...]:
        """((2 n + 1) C, Z, Y, X)."""
        channels, *extent = self._rows.shape
        return channels * (2 * self._context + 1), *extent

    def read(self, first: int, last: int) -> Tensor:
        """Channels of slice z - n first, then z - n + 1, up to z + n."""
        depth = self.shape[1]
        low, high = max(first - self._context, 0), min(last + self._context, depth)
        rows = self._rows.read(low, high)
        wanted = torch.arange(first, last, device=rows.device)
        offsets = range(-self._context, self._context + 1)
        return torch.cat([rows[:, (wanted + k).clamp(0, depth - 1) - low] for k in offsets])


class RecentRows:
    """Keeps the rows that were read last, so that windows which overlap read each row once."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self._kept: Tensor | None = None
        self._first = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the rows kept."""
        return self._rows.shape

    def read(self, first: int, last: int) -> Tensor:
        """A view that holds until the next call."""
        have = self._first + (0 if self._kept is None else self._kept.shape[1])
        if self._kept is None or first >= have:
            self._kept, self._first = self._rows.read(first, last), first
        elif last > have:
            self._kept = torch.cat([self._kept[:, first - self._first :], self._rows.read(have, last)], 1)
            self._first = first
        return self._kept[:, first - self._first : last - self._first]


class StreamedRows:
    """Rows out of an iterator of ``(first, last, rows)`` that ascend without gaps, as they are asked for."""

    def __init__(
        self, parts: Iterable[tuple[int, int, Tensor]], channels: int, extent: tuple[int, int, int]
    ) -> None:
        self._parts: Iterator[tuple[int, int, Tensor]] = iter(parts)
        self._shape = channels, *extent
        self._kept: Tensor | None = None
        self._first = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, Z, Y, X)."""
        return self._shape

    def read(self, first: int, last: int) -> Tensor:
        """A view; rows below ``first`` are gone afterwards."""
        kept = self._kept
        if kept is not None and first > self._first:
            kept = kept[:, first - self._first :]
            self._first = first
        while kept is None or self._first + kept.shape[1] < last:
            low, _, rows = next(self._parts)
            if kept is None:
                kept, self._first = rows.clone(), low
            else:
                kept = torch.cat([kept, rows], 1)
        self._kept = kept
        return kept[:, first - self._first : last - self._first]


def with_context(image: Tensor, context_slices: int) -> Tensor:
    """Every slice with n slices on either side as further channels, as :class:`lungkit.data.PatchSampler` gives them.

    The channels of slice z are those of z - n, then z - n + 1, up to z + n; beyond the first and the last slice that
    one is repeated.

    Args:
        image: (C, Z, Y, X).
        context_slices: n.

    Returns:
        ((2 n + 1) C, Z, Y, X), ``image`` itself for n = 0.

    Raises:
        UsageError: ``context_slices`` is negative.

    Example:
        >>> image = torch.arange(3.0).reshape(1, 3, 1, 1)
        >>> with_context(image, 1)[:, :, 0, 0].tolist()
        [[0.0, 0.0, 1.0], [0.0, 1.0, 2.0], [1.0, 2.0, 2.0]]
    """
    if context_slices < 0:
        raise UsageError(f"context_slices must be 0 or more, got {context_slices}")
    if context_slices == 0:
        return image
    return ContextRows(TensorRows(image), context_slices).read(0, image.shape[1])


def linear_weights(old: int, new: int, first: int, last: int) -> tuple[int, int, Tensor]:
    """How new rows ``first`` to ``last`` - 1 of ``new`` are made of the ``old`` ones, linearly and antialiased.

    The filter of :func:`lungkit.data.resampling.resample_linear`: a triangle round (j + 1/2) old/new - 1/2, as wide as
    the coarser of the two grids, cut at the edge and renormalised.

    Returns:
        ``(low, high, weights)``: new row j is the sum over i of ``weights[j - first, i - low]`` times old row i;
        float32 (last - first, high - low).

    Example:
        >>> linear_weights(2, 4, 1, 3)
        (0, 2, tensor([[0.7500, 0.2500],
                [0.2500, 0.7500]]))
    """
    starts, weights = _filters(old, new)
    low = starts[first]
    high = starts[last - 1] + len(weights[last - 1])
    matrix = torch.zeros(last - first, high - low)
    for row in range(first, last):
        at = starts[row] - low
        matrix[row - first, at : at + len(weights[row])] = torch.from_numpy(weights[row])
    return low, high, matrix


@lru_cache(maxsize=8)
def _filters(old: int, new: int) -> tuple[list[int], list[np.ndarray]]:
    scale = old / new
    support = max(scale, 1.0)
    starts, weights = [], []
    for row in range(new):
        centre = scale * (row + 0.5)
        start = max(int(centre - support + 0.5), 0)
        stop = min(int(centre + support + 0.5), old)
        values = np.maximum(0.0, 1.0 - np.abs((np.arange(start, stop) + 0.5 - centre) / support))
        inside = np.flatnonzero(values)
        values = values[inside[0] : inside[-1] + 1]
        starts.append(start + int(inside[0]))
        weights.append((values / values.sum()).astype(np.float32))
    return starts, weights


def resample_rows(rows: Tensor, old: int, new: int, first: int, last: int) -> Tensor:
    """New rows ``first`` to ``last`` - 1 from the old rows (C, n, Y, X) that :func:`linear_weights` names."""
    if old == new:
        return rows
    _, _, weights = linear_weights(old, new, first, last)
    return torch.einsum("ji,ciyx->cjyx", weights.to(rows.device), rows)


def resample_plane(rows: Tensor, size: Sequence[int]) -> Tensor:
    """(C, n, Y, X) with every slice resampled to ``size`` (Y, X), linearly and antialiased."""
    if tuple(rows.shape[2:]) == tuple(size):
        return rows
    return F.interpolate(rows, list(size), mode="bilinear", align_corners=False, antialias=True)


def chunks(extent: int, row_voxels: int, *, most_voxels: int = 1 << 23) -> list[tuple[int, int]]:
    """``(first, last)`` of parts of an axis with at most ``most_voxels`` voxels each, at least one row.

    Example:
        >>> chunks(5, 10, most_voxels=20)
        [(0, 2), (2, 4), (4, 5)]
    """
    step = max(1, most_voxels // max(1, row_voxels))
    return [(first, min(first + step, extent)) for first in range(0, extent, step)]


def smallest(rows: Rows) -> Tensor:
    """Smallest value of every channel, (C,)."""
    channels, depth, *plane = rows.shape
    least = torch.full((channels,), math.inf)
    for first, last in chunks(depth, channels * math.prod(plane)):
        least = torch.minimum(least, rows.read(first, last).flatten(1).amin(1).cpu().float())
    return least
