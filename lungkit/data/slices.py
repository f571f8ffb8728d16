"""Images that are read and resampled a few axial slices at a time, so that a long scan needs no float volume."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from lungkit.data.resampling import Filter, axis_weights, resample_plane


class Slices(Protocol):
    """An image (C, Z, Y, X) whose axial slices are asked for in ascending order; a scan may be begun anew."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, Z, Y, X)."""

    def read(self, first: int, last: int) -> Tensor:
        """Slices ``first`` to ``last`` - 1 as float32 (C, last - first, Y, X)."""


CHUNK_VOXELS = 1 << 21
"""Voxels times channels that are worked on at once outside the network: few enough to stay in the cache."""


def chunks(extent: int, slice_voxels: int, *, most_voxels: int = CHUNK_VOXELS) -> list[tuple[int, int]]:
    """``(first, last)`` of parts of an axis with at most ``most_voxels`` voxels each, at least one slice.

    Example:
        >>> chunks(5, 10, most_voxels=20)
        [(0, 2), (2, 4), (4, 5)]
    """
    step = max(1, most_voxels // max(1, slice_voxels))
    return [(first, min(first + step, extent)) for first in range(0, extent, step)]


class TensorSlices:
    r"""The slices of a tensor (C, Z, Y, X); of an image (C, Y, X) its rows."""

    def __init__(self, image: Tensor) -> None:
        self.image = image
        self.shape = tuple(image.shape)

    def read(self, first: int, last: int) -> Tensor:
        """A view."""
        return self.image[:, first:last]


class BufferedSlices:
    """Keeps the slices that were read last, so that patches which overlap read each slice once.

    All of them lie in one buffer, which is filled a few slices at a time: what is made on the way to them stays small.
    """

    def __init__(self, slices: Slices) -> None:
        self._slices = slices
        self._buffer = torch.empty(0, 0)
        self._first = self._last = 0  # the slices in the buffer, from its beginning on

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the slices kept."""
        return self._slices.shape

    def read(self, first: int, last: int) -> Tensor:
        """A view that holds until the next call."""
        if first < self._first:  # begun anew
            self._first = self._last = 0
        if last > self._last:
            kept = max(0, self._last - first)
            channels, _, *plane = self.shape
            for low, high in chunks(last - first - kept, channels * math.prod(plane)):
                part = self._slices.read(first + kept + low, first + kept + high)
                if low == 0:
                    self._make_room(part, first - self._first, kept, last - first)
                self._buffer[:, kept + low : kept + high] = part
            self._first, self._last = first, last
        return self._buffer[:, first - self._first : last - self._first]

    def _make_room(self, like: Tensor, at: int, kept: int, count: int) -> None:
        """``kept`` slices from ``at`` on go to the buffer's beginning, which then has room for ``count`` of them."""
        if self._buffer.shape[1] >= count:
            move_up(self._buffer, at, kept)
            return
        old = self._buffer
        self._buffer = like.new_empty((like.shape[0], count, *like.shape[2:]))
        if kept:
            self._buffer[:, :kept] = old[:, at : at + kept]


def buffered(slices: Slices) -> Slices:
    """:class:`BufferedSlices`, but of an image that is in memory the image itself."""
    return slices if isinstance(slices, TensorSlices) else BufferedSlices(slices)


def move_up(buffer: Tensor, step: int, count: int) -> None:
    """Slice i takes what slice i + ``step`` held, for i below ``count``; in place, without a copy of the buffer."""
    if step == 0:
        return
    for row in range(0, count, step):
        moved = min(step, count - row)
        buffer[:, row : row + moved] = buffer[:, row + step : row + step + moved]


class ResampledSlices:
    """Slices on a grid of another size that covers the same field of view, see :mod:`lungkit.data.resampling`.

    ``filters`` are those of Z, Y and X.
    """

    def __init__(
        self,
        slices: Slices,
        extent: tuple[int, int, int],
        filters: tuple[Filter, Filter, Filter] = ("triangle", "triangle", "triangle"),
    ) -> None:
        self._slices = buffered(slices)
        self._filters = filters
        self.shape = (slices.shape[0], *extent)

    def read(self, first: int, last: int) -> Tensor:
        """Slices of the new grid."""
        old, plane = self._slices.shape[1], self.shape[2:]
        along, *across = self._filters
        low, high, weights = axis_weights(old, self.shape[1], first, last, along)
        slices = self._slices.read(low, high)
        becomes_smaller = math.prod(plane) < math.prod(slices.shape[2:])
        if becomes_smaller:  # the first step leaves the second one less to do
            slices = resample_plane(slices, plane, (across[0], across[1]))
        if old != self.shape[1]:
            slices = torch.einsum("ji,ciyx->cjyx", weights.to(slices.device), slices)
        return slices if becomes_smaller else resample_plane(slices, plane, (across[0], across[1]))


class ContextSlices:
    """Every slice with n slices on either side as further channels, as :class:`~lungkit.data.PatchSampler` gives them.

    The channels of slice z are those of z - n, then z - n + 1, up to z + n; beyond the first and the last slice that
    one is repeated.

    Example:
        >>> image = torch.arange(3.0).reshape(1, 3, 1, 1)
        >>> ContextSlices(TensorSlices(image), 1).read(0, 3)[:, :, 0, 0].tolist()
        [[0.0, 0.0, 1.0], [0.0, 1.0, 2.0], [1.0, 2.0, 2.0]]
    """

    def __init__(self, slices: Slices, context_slices: int) -> None:
        self._slices, self._context = buffered(slices), context_slices
        self.shape = ((2 * context_slices + 1) * slices.shape[0], *slices.shape[1:])

    def read(self, first: int, last: int) -> Tensor:
        """Channels of slice z - n first, then z - n + 1, up to z + n."""
        depth = self.shape[1]
        low, high = max(first - self._context, 0), min(last + self._context, depth)
        slices = self._slices.read(low, high)
        wanted = torch.arange(first, last, device=slices.device)
        offsets = range(-self._context, self._context + 1)
        return torch.cat([slices[:, (wanted + k).clamp(0, depth - 1) - low] for k in offsets])


class PaddedSlices:
    r"""An image (C, \*S) grown by ``missing`` voxels, ``before`` of them in front, with ``value``.

    A value of None is each channel's smallest.
    """

    def __init__(
        self, slices: Slices, missing: Sequence[int], before: Sequence[int], value: float | None = None
    ) -> None:
        self._slices, self._before = slices, before
        self.shape = (slices.shape[0], *(n + m for n, m in zip(slices.shape[1:], missing, strict=True)))
        if value is not None:
            device = slices.read(0, 1).device
            self._air = torch.full((self.shape[0], *(1,) * (len(self.shape) - 1)), value, device=device)
            return
        channels, depth, *plane = slices.shape
        parts = chunks(depth, channels * math.prod(plane))
        smallest = [slices.read(first, last).flatten(1).amin(1) for first, last in parts]
        self._air = torch.stack(smallest).amin(0).reshape(-1, *(1,) * (len(self.shape) - 1))

    def read(self, first: int, last: int) -> Tensor:
        """Slices of the grown image."""
        depth = self._slices.shape[1]
        low, high = (min(max(row - self._before[0], 0), depth) for row in (first, last))
        inner = self._slices.read(low, high)
        grown = self._air.expand(-1, last - first, *self.shape[2:]).clone()
        at = low + self._before[0] - first
        sides = zip(self._before[1:], inner.shape[2:], strict=True)
        inside = (slice(None), slice(at, at + high - low), *(slice(b, b + n) for b, n in sides))
        grown[inside] = inner
        return grown


class PlacedSlices:
    """An image inside a larger grid ``extent`` (Z, Y, X), from ``corner`` on; round it each channel is ``outside``."""

    def __init__(
        self, slices: Slices, extent: tuple[int, int, int], corner: tuple[int, int, int], outside: Tensor
    ) -> None:
        self._slices, self._corner = slices, corner
        self._outside = outside.reshape(-1, 1, 1, 1)
        self.shape = (slices.shape[0], *extent)

    def read(self, first: int, last: int) -> Tensor:
        """Slices of the larger grid."""
        depth, height, width = self._slices.shape[1:]
        z, y, x = self._corner
        low, high = (min(max(row - z, 0), depth) for row in (first, last))
        inner = self._slices.read(low, high) if low < high else None
        device = self._outside.device if inner is None else inner.device
        placed = self._outside.to(device).expand(-1, last - first, *self.shape[2:]).clone()
        if inner is not None:
            placed[:, low + z - first : high + z - first, y : y + height, x : x + width] = inner
        return placed


class StreamedSlices:
    """Slices out of an iterator of ``(first, last, slices)`` that ascend without gaps, as they are asked for.

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
