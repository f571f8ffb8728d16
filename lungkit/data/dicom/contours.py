"""Contours of one slice: polygons to pixels, and pixels to polygons that give the same pixels back.

Coordinates are voxel indices (x along the columns, y along the rows); pixel (x, y) has its centre there and
its edges half a pixel away.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def fill_polygons(polygons: Sequence[np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    """Pixels whose centre lies inside an odd number of ``polygons``.

    Even-odd filling: an inner contour cuts a hole, a keyhole (a channel of no width that joins outline and
    hole) leaves no trace, separate outlines add up. Of centres on an edge, those on a left or upper edge are
    inside, so that polygons that share an edge share no pixel.

    Args:
        polygons: each (N, 2) of x, y; closed without repeating the first point; parts outside the image are cut.
        shape: (rows, columns).

    Returns:
        bool (rows, columns).

    Example:
        >>> fill_polygons([np.array([[0.5, -0.5], [2.5, -0.5], [2.5, 0.5], [0.5, 0.5]])], (2, 4)).astype(int)
        array([[0, 1, 1, 0], [0, 0, 0, 0]])
    """
    rows, columns = shape
    toggles = np.zeros(rows * (columns + 1), np.int64)
    for polygon in polygons:
        start, end = polygon, np.roll(polygon, -1, axis=0)
        # Every edge from its upper end, so that the two sides of a keyhole cross a row at the very same x.
        upward = (start[:, 1] > end[:, 1])[:, None]
        upper, lower = np.where(upward, end, start), np.where(upward, start, end)
        first = np.clip(np.ceil(upper[:, 1]), 0, rows).astype(np.int64)
        last = np.clip(np.ceil(lower[:, 1]), 0, rows).astype(np.int64)
        count = last - first
        edge = np.repeat(np.arange(len(polygon)), count)
        y = np.arange(len(edge)) - np.repeat(np.cumsum(count) - count, count) + first[edge]
        (x0, y0), (x1, y1) = upper[edge].T, lower[edge].T
        x = x0 + (y - y0) / (y1 - y0) * (x1 - x0)
        column = np.clip(np.ceil(x), 0, columns).astype(np.int64)
        toggles += np.bincount(y * (columns + 1) + column, minlength=len(toggles))
    inside = np.cumsum(toggles.reshape(rows, columns + 1), axis=1) & 1
    return inside[:, :columns].astype(bool)


def trace_polygons(mask: np.ndarray) -> list[np.ndarray]:
    """Outlines of ``mask`` (rows, columns) along the edges of its pixels, one polygon for each 4-connected region.

    A hole is joined to the outline of its region by a keyhole, as DICOM asks of closed contours
    (PS3.3 C.8.8.6.3), so that :func:`fill_polygons` of the result is ``mask`` again.

    Returns:
        Each (N, 2) of x, y, corners only, all on half-integers.

    Example:
        >>> trace_polygons(np.array([[0, 1, 1, 0]], bool))
        [array([[ 0.5, -0.5], [ 2.5, -0.5], [ 2.5,  0.5], [ 0.5,  0.5]])]
    """
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not rows.size:
        return []
    box = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    loops = _loops(box)
    outlines = [loop for loop in loops if _area(loop) > 0]
    areas = np.array([_area(loop) for loop in outlines])
    low, high = (
        np.array([loop.min(axis=0) for loop in outlines]),
        np.array([loop.max(axis=0) for loop in outlines]),
    )
    for hole in (loop for loop in loops if _area(loop) < 0):
        x, y = hole[np.lexsort((hole[:, 0], hole[:, 1]))[0]] + (
            0.5,
            -0.5,
        )  # the pixel above the hole's first corner
        boxes = np.flatnonzero(((low < (x, y)) & (high > (x, y))).all(axis=1))
        # Of the outlines around it, the innermost is that of the hole's own region.
        owner = next(n for n in boxes[np.argsort(areas[boxes])].tolist() if _contains(outlines[n], x, y))
        outlines[owner] = _keyhole(outlines[owner], hole)
    corner = np.array([columns[0] - 0.5, rows[0] - 0.5])
    return [outline + corner for outline in outlines]


def _loops(mask: np.ndarray) -> list[np.ndarray]:
    """Boundary loops on the lattice of pixel corners, pixels on the right-hand side (y runs down)."""
    width = mask.shape[1] + 1
    padded = np.pad(mask, 1)
    above, below = padded[:-1, 1:] > padded[1:, 1:], padded[1:, 1:] > padded[:-1, 1:]
    left, right = padded[1:, :-1] > padded[1:, 1:], padded[1:, 1:] > padded[1:, :-1]
    # Bit d of a corner: an edge starts there and runs right, down, left, up for d = 0, 1, 2, 3.
    starts = below.astype(np.uint8) | left.astype(np.uint8) << 1
    starts[:, 1:] |= above[:, :-1].astype(np.uint8) << 2
    starts[1:] |= right[:-1].astype(np.uint8) << 3
    steps = (1, width, -1, -width)
    edges = bytearray(starts.tobytes())
    open_edges = bytearray(edges)
    loops = []
    for origin in np.flatnonzero(starts).tolist():
        while open_edges[origin]:
            first = (open_edges[origin] & -open_edges[origin]).bit_length() - 1
            corner, direction, corners = origin, first, []
            while True:
                open_edges[corner] &= ~(1 << direction)
                corner += steps[direction]
                # Where two regions touch at a corner, turn right and stay on the same one.
                for turn in (1, 0, 3):
                    following = (direction + turn) & 3
                    if edges[corner] >> following & 1:
                        break
                if following != direction:
                    corners.append(corner)
                direction = following
                if corner == origin and direction == first:
                    break
            flat = np.array(corners[-1:] + corners[:-1])  # begin where the walk began, at its first corner
            loops.append(np.stack([flat % width, flat // width], axis=1).astype(np.float64))
    return loops


def _area(loop: np.ndarray) -> float:
    """Twice the signed area: positive where the pixels lie inside."""
    x, y = loop.T
    return float(x @ np.roll(y, -1) - y @ np.roll(x, -1))


def _contains(loop: np.ndarray, x: float, y: float) -> bool:
    start, end = loop, np.roll(loop, -1, axis=0)
    crosses = (start[:, 1] > y) != (end[:, 1] > y)
    (x0, y0), (x1, y1) = start[crosses].T, end[crosses].T
    return bool(np.count_nonzero(x0 + (y - y0) / (y1 - y0) * (x1 - x0) < x) % 2)


def _keyhole(outline: np.ndarray, hole: np.ndarray) -> np.ndarray:
    distance = np.linalg.norm(outline[:, None] - hole[None], axis=2)
    at, entry = np.unravel_index(int(distance.argmin()), distance.shape)
    turned = np.roll(hole, -int(entry), axis=0)
    return np.concatenate([outline[: at + 1], turned, turned[:1], outline[at:]])
