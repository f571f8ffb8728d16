"""A voxel grid in millimetres and soft-edged shapes on it.

All points and axes are in zyx order: z towards the head, y towards the back, x towards the patient's left.
Shapes are given by a signed distance in millimetres, negative inside; their *coverage* of a voxel, 0 to 1,
falls over one voxel width, which stands for the partial volume effect. Only elementwise numpy is used here
(no matrix products), so that results do not depend on the number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Box = tuple[slice, slice, slice]
Point = Sequence[float] | np.ndarray


class Grid:
    """Voxel centres of a volume: ``z`` (Z, 1, 1), ``y`` (1, Y, 1) and ``x`` (1, 1, X), float32, in mm."""

    def __init__(self, shape: Sequence[int], spacing_mm: Sequence[float], centre_mm: Sequence[float]) -> None:
        self.shape = (int(shape[0]), int(shape[1]), int(shape[2]))
        self.spacing_mm = (float(spacing_mm[0]), float(spacing_mm[1]), float(spacing_mm[2]))
        z, y, x = (
            float(middle - (length - 1) / 2 * size)
            for middle, length, size in zip(centre_mm, self.shape, self.spacing_mm, strict=True)
        )
        self.origin_mm = (z, y, x)
        self.softness_mm = max(self.spacing_mm[1:])
        axes = [
            (first + np.arange(length) * size).astype(np.float32)
            for first, length, size in zip(self.origin_mm, self.shape, self.spacing_mm, strict=True)
        ]
        self.z, self.y, self.x = axes[0][:, None, None], axes[1][None, :, None], axes[2][None, None, :]

    def box(self, low_mm: Point, high_mm: Point) -> Box | None:
        """The voxels between two corners, or None where the grid has none of them."""
        first, stop = self.boxes(np.array([low_mm]), np.array([high_mm]))
        if (first >= stop).any():
            return None
        z, y, x = (slice(int(a), int(b)) for a, b in zip(first[0], stop[0], strict=True))
        return z, y, x

    def boxes(self, low_mm: np.ndarray, high_mm: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """First and one-past-last voxel (n, 3) of n boxes, clipped to the grid; empty where first >= last."""
        origin, spacing = np.array(self.origin_mm), np.array(self.spacing_mm)
        first = np.ceil((low_mm - origin) / spacing).astype(np.int64)
        stop = np.floor((high_mm - origin) / spacing).astype(np.int64) + 1
        # A structure thinner than a slice is still seen by the slice nearest to it.
        thin = first == stop
        nearest = np.round(((low_mm + high_mm) / 2 - origin) / spacing).astype(np.int64)
        first, stop = np.where(thin, nearest, first), np.where(thin, nearest + 1, stop)
        return np.maximum(first, 0), np.minimum(stop, self.shape)

    def local(self, box: Box, centre_mm: Point) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """z, y and x of the voxels of a box, relative to a centre."""
        z, y, x = box
        return (
            self.z[z] - float(centre_mm[0]),
            self.y[:, y] - float(centre_mm[1]),
            self.x[:, :, x] - float(centre_mm[2]),
        )

    def points(self, voxels: np.ndarray) -> np.ndarray:
        """Positions (n, 3) in mm of voxel indices (n, 3)."""
        return np.array(self.origin_mm) + voxels * np.array(self.spacing_mm)

    def nearest(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Nearest voxel indices (..., 3) of points, clipped to the grid, and whether each lies in it."""
        index = np.round((points - np.array(self.origin_mm)) / np.array(self.spacing_mm)).astype(np.int64)
        clipped = np.clip(index, 0, np.array(self.shape) - 1)
        return clipped, (clipped == index).all(axis=-1)


def coverage(distance: np.ndarray, softness_mm: float) -> np.ndarray:
    """Share of each voxel that a shape covers, from its signed distance."""
    return np.clip(0.5 - distance / softness_mm, 0.0, 1.0)


def paint(image: np.ndarray, covered: np.ndarray, value: float | np.ndarray) -> None:
    """Mix ``value`` into ``image`` (in place) by the share that is covered."""
    image += covered * (value - image)


def ellipse(
    along: np.ndarray, across: np.ndarray, centre: tuple[float, float], semi_axes: tuple[float, float]
) -> np.ndarray:
    """Approximate signed distance to an ellipse."""
    a = (along - centre[0]) / semi_axes[0]
    b = (across - centre[1]) / semi_axes[1]
    return (np.sqrt(a * a + b * b) - 1.0) * min(semi_axes)


def smooth_max(a: np.ndarray, b: np.ndarray, rounding_mm: float) -> np.ndarray:
    """Maximum of two distances (the intersection of shapes) with its edge rounded off."""
    overlap = np.maximum(rounding_mm - np.abs(a - b), 0.0)
    return np.maximum(a, b) + overlap * overlap * (0.25 / rounding_mm)


def paint_ellipsoid(image: np.ndarray, grid: Grid, centre: Point, semi_axes: Point, value: float) -> None:
    """Fill an axis-aligned ellipsoid with one value."""
    reach = np.array(semi_axes) + grid.softness_mm
    box = grid.box(np.array(centre) - reach, np.array(centre) + reach)
    if box is None:
        return
    squares = [
        (axis / float(semi)) ** 2 for axis, semi in zip(grid.local(box, centre), semi_axes, strict=True)
    ]
    distance = (np.sqrt(squares[0] + squares[1] + squares[2]) - 1.0) * min(map(float, semi_axes))
    paint(image[box], coverage(distance, grid.softness_mm), value)


def add_capsules(
    covered: np.ndarray, grid: Grid, starts: np.ndarray, ends: np.ndarray, radii: np.ndarray
) -> None:
    """Raise ``covered`` (in place) to the coverage of n tubes with round ends.

    ``starts`` and ``ends`` are (n, 3), ``radii`` (n,). A tube thinner than a voxel fills only a part of it.
    """
    softness = grid.softness_mm
    reach = (radii + softness / 2)[:, None]
    first, stop = grid.boxes(np.minimum(starts, ends) - reach, np.maximum(starts, ends) + reach)
    seen = np.flatnonzero((first < stop).all(axis=1))
    inverse, full = 1.0 / softness, np.minimum(1.0, 2.0 * radii / softness)
    for i in seen:
        (z0, y0, x0), (z1, y1, x1) = first[i].tolist(), stop[i].tolist()
        sz, sy, sx = starts[i].tolist()
        ez, ey, ex = ends[i].tolist()
        dz, dy, dx = ez - sz, ey - sy, ex - sx
        z, y, x = grid.z[z0:z1] - sz, grid.y[:, y0:y1] - sy, grid.x[:, :, x0:x1] - sx
        along = (z * dz + y * dy) + x * dx
        along *= 1.0 / max(dz * dz + dy * dy + dx * dx, 1e-9)
        np.clip(along, 0.0, 1.0, out=along)
        distance = np.sqrt((z - along * dz) ** 2 + (y - along * dy) ** 2 + (x - along * dx) ** 2)
        distance *= -inverse
        distance += float(radii[i]) * inverse + 0.5
        np.clip(distance, 0.0, 1.0, out=distance)
        distance *= float(full[i])
        part = covered[z0:z1, y0:y1, x0:x1]
        np.maximum(part, distance, out=part)


def smooth_noise(
    random: np.random.Generator, grid: Grid, scale_mm: float, box: Box | None = None
) -> np.ndarray:
    """float32 noise of about unit variance that varies over ``scale_mm``: a random lattice, interpolated."""
    lengths = grid.shape if box is None else tuple(part.stop - part.start for part in box)
    steps = [
        np.arange(length) * (size / scale_mm) for length, size in zip(lengths, grid.spacing_mm, strict=True)
    ]
    lattice = [int(step[-1]) + 2 for step in steps]
    field: np.ndarray = random.standard_normal(lattice, dtype=np.float32)
    for axis, step in enumerate(steps):
        cell = step.astype(np.int64)
        shape = [1, 1, 1]
        shape[axis] = -1
        weight = (step - cell).astype(np.float32).reshape(shape)
        # Smoothstep weights hide the lattice; dividing by their norm keeps the variance even.
        weight = weight * weight * (3.0 - 2.0 * weight)
        norm = 1.0 / np.sqrt(weight * weight + (1.0 - weight) ** 2)
        field = field.take(cell, axis) * ((1.0 - weight) * norm) + field.take(cell + 1, axis) * (
            weight * norm
        )
    return field
