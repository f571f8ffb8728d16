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


CHUNK_VOXELS = 1 << 21
"""Voxels times channels that are worked on at once outside the network: few enough to stay in the cache."""


class TensorRows:
    r"""The rows of a tensor (C, \*S)."""

    def __init__(self, image: Tensor) -> None:
        self.image = image
        self.shape = tuple(image.shape)

    def read(self, first: int, last: int) -> Tensor:
        """A view."""
        return self.image[:, first:last]


class ClippedRows:
    """The channels of a scan reoriented and clipped to the window of each, in their own units."""

    def __init__(self, volumes: Sequence[Volume], preprocessing: Preprocessing, geometry: Geometry) -> None:
        channels = zip(volumes, preprocessing.channels, strict=True)
        self._channels = [(orient(volume.array, geometry), channel.window) for volume, channel in channels]
        self.shape = (len(self._channels), *geometry.oriented_shape)

    def read(self, first: int, last: int) -> Tensor:
        """Rows of the scan's own grid."""
        rows = torch.empty((self.shape[0], last - first, *self.shape[2:]))
        for target, (stored, window) in zip(rows, self._channels, strict=True):
            np.clip(stored[first:last], *window, out=target.numpy(), dtype=np.float32, casting="unsafe")
        return rows


class ResampledRows:
    """Rows on a grid of another size that covers the same field of view, see :func:`linear_weights`."""

    def __init__(self, rows: Rows, extent: tuple[int, int, int]) -> None:
        self._rows = recent(rows)
        self.shape = (rows.shape[0], *extent)

    def read(self, first: int, last: int) -> Tensor:
        """Rows of the new grid."""
        old, plane = self._rows.shape[1], self.shape[2:]
        low, high, weights = linear_weights(old, self.shape[1], first, last)
        rows = self._rows.read(low, high)
        becomes_smaller = math.prod(plane) < math.prod(rows.shape[2:])
        if becomes_smaller:  # the first step leaves the second one less to do
            rows = resample_plane(rows, plane)
        if old != self.shape[1]:
            rows = torch.einsum("ji,ciyx->cjyx", weights.to(rows.device), rows)
        return rows if becomes_smaller else resample_plane(rows, plane)


class ScanRows:
    """A scan reoriented, clipped, resampled and normalised: :func:`lungkit.data.preprocess_image`, by rows.

    The result equals that of the whole scan to the rounding of float32. ``volumes`` are the channels.
    """

    def __init__(self, volumes: Sequence[Volume], preprocessing: Preprocessing, geometry: Geometry) -> None:
        self._rows = ResampledRows(ClippedRows(volumes, preprocessing, geometry), geometry.shape)
        self._channels = preprocessing.channels
        self.shape = self._rows.shape

    def read(self, first: int, last: int) -> Tensor:
        """Normalised rows of the resampled grid."""
        means, deviations = (
            torch.tensor(values, dtype=torch.float32).reshape(-1, 1, 1, 1)
            for values in ([c.mean for c in self._channels], [c.std for c in self._channels])
        )
        return (self._rows.read(first, last) - means).div_(deviations)


class ContextRows:
    """Every slice with n slices on either side as further channels, see :func:`with_context`."""

    def __init__(self, rows: Rows, context_slices: int) -> None:
        self._rows, self._context = recent(rows), context_slices

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
    """Keeps the rows that were read last, so that windows which overlap read each row once.

    All of them lie in one buffer, which is filled a few rows at a time: what is made on the way to them stays small.
    """

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self._buffer = torch.empty(0, 0)
        self._first = self._last = 0  # the rows in the buffer, from its beginning on

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the rows kept."""
        return self._rows.shape

    def read(self, first: int, last: int) -> Tensor:
        """A view that holds until the next call."""
        if last > self._last:
            kept = max(0, self._last - first)
            channels, _, *plane = self.shape
            for low, high in chunks(
                last - first - kept, channels * math.prod(plane), most_voxels=CHUNK_VOXELS
            ):
                part = self._rows.read(first + kept + low, first + kept + high)
                if low == 0:
                    self._make_room(part, first - self._first, kept, last - first)
                self._buffer[:, kept + low : kept + high] = part
            self._first, self._last = first, last
        return self._buffer[:, first - self._first : last - self._first]

    def _make_room(self, like: Tensor, at: int, kept: int, rows: int) -> None:
        """``kept`` rows from ``at`` on go to the beginning of the buffer, which then has room for ``rows`` of them."""
        if self._buffer.shape[1] >= rows:
            move_up(self._buffer, at, kept)
            return
        old = self._buffer
        self._buffer = like.new_empty((like.shape[0], rows, *like.shape[2:]))
        if kept:
            self._buffer[:, :kept] = old[:, at : at + kept]


def recent(rows: Rows) -> Rows:
    """:class:`RecentRows`, but of an image that is in memory the image itself."""
    return rows if isinstance(rows, TensorRows) else RecentRows(rows)


def move_up(buffer: Tensor, step: int, count: int) -> None:
    """Row i takes what row i + ``step`` held, for i below ``count``; in place, without a copy of the buffer."""
    if step == 0:
        return
    for row in range(0, count, step):
        moved = min(step, count - row)
        buffer[:, row : row + moved] = buffer[:, row + step : row + step + moved]


class StreamedRows:
    """Rows out of an iterator of ``(first, last, rows)`` that ascend without gaps, as they are asked for.

    What the iterator gives need hold only until its next step: of that, no more than is still wanted is copied.
    """

    def __init__(self, parts: Iterable[tuple[int, int, Tensor]], shape: tuple[int, ...]) -> None:
        self._parts: Iterator[tuple[int, int, Tensor]] = iter(parts)
        self.shape = shape
        self._segments: list[tuple[int, Tensor]] = []

    def read(self, first: int, last: int) -> Tensor:
        """A tensor that holds until the next call."""
        while not self._segments or self._segments[-1][0] + self._segments[-1][1].shape[1] < last:
            self._segments = [(low, part) for low, part in self._segments if low + part.shape[1] > first]
            if self._segments:  # the iterator is about to overwrite the newest; the others are copies by now
                low, part = self._segments.pop()
                self._segments.append((max(low, first), part[:, max(first - low, 0) :].clone()))
            low, _, part = next(self._parts)
            self._segments.append((low, part))
        pieces = [
            part[:, max(first - low, 0) : last - low]
            for low, part in self._segments
            if low < last and low + part.shape[1] > first
        ]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)


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
