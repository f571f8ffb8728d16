"""The lungs in a CT, from its HU alone: thresholds, connected components and distances, no network.

It works on a grid of about 2 mm, which holds all that matters here and makes a whole chest a matter of a second:

1. *Outside*: air that reaches the edge of a slice and is as dark as air can be. Lung that a small field of view cuts
   reaches the edge too, but is not as dark.
2. *Airways and bowel*: dark air with tissue all round it. Regions are grown at rising thresholds, and each is taken at
   the last one before it leaks into lung, known by its walls and its volume.
3. *Lungs*: what is left of the air, where it is large, as dense as lung, and not the foam of a table.
4. *Vessels and nodules*: closed with a ball, each lung for itself so that what lies between them stays out; then holes.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Literal

import cc3d
import numpy as np
import torch

from lungkit.data.resampling import resample_plane
from lungkit.errors import UsageError

_LOG = logging.getLogger("lungkit")

_WORKING_MM = 2.0
_AIR_HU = -400.0
# Air round the body is about -1000 HU, in a table some more. Emphysema is below -950 HU (Gevenois et al. 1996), but
# hardly half of a lung.
_FREE_AIR_HU = {0.25: -970.0, 0.5: -950.0}
_DARKEST_LUNG_HU = -955.0
_AIRWAY_THRESHOLDS_HU = range(-960, -680, 40)
_AIRWAY_DARK_HU, _AIRWAY_DARK = -940.0, 0.4
_AIRWAY_ML = (0.3, 150.0)
_AIRWAY_WALLED = 0.7
_AIRWAY_WALL_MM = 2.5
# The smaller of the two, the latter times the height in view: a few slices hold little of a lung.
_SMALLEST_LUNG_ML = 15.0
_SMALLEST_LUNG_ML_PER_MM = 0.8
_TABLE_SHEET_MM = 6.0
_CLOSING_MM = 8.0
_FAR_MM = 20.0  # lung this far from the core of either side goes to the first


def lung_mask(hu: np.ndarray, spacing_mm: Sequence[float]) -> np.ndarray:
    """Lungs of a CT, with the vessels and nodules in them, without trachea and main bronchi.

    Both lungs are one mask. Collapsed or consolidated lung and tumours wider than 16 mm that reach the pleura are not
    air and are left out where they lie against chest wall or mediastinum. Which way the axes run does not matter. It
    takes 1 byte a voxel for the result, and 30 to 40 bytes a voxel of the grid of 2 mm, some 150 MB for a chest.

    Args:
        hu: (Z, Y, X) in HU, Z across axial slices, integer or float; may be cut off at any side.
        spacing_mm: (z, y, x).

    Returns:
        bool (Z, Y, X), all False, with a warning in the log, where no lungs are found.

    Raises:
        UsageError: not three axes, or a spacing that is not above 0.

    Example:
        >>> from lungkit.data import make_phantom
        >>> phantom = make_phantom(3, shape=(48, 96, 96), kinds=())
        >>> found = lung_mask(phantom.image, phantom.spacing_mm)
        >>> truth = phantom.lungs > 0
        >>> bool(2 * (found & truth).sum() / (found.sum() + truth.sum()) > 0.9)
        True
    """
    if hu.ndim != 3 or 0 in hu.shape:
        raise UsageError(f"hu must be (Z, Y, X) with at least one voxel, got shape {hu.shape}")
    if len(spacing_mm) != 3 or not all(math.isfinite(size) and size > 0 for size in spacing_mm):
        raise UsageError(f"spacing_mm must be three lengths (z, y, x) above 0, got {tuple(spacing_mm)}")
    factors = _factors(spacing_mm)
    spacing = _times(spacing_mm, factors)
    reduced = _reduce(hu, factors)
    air = reduced < _AIR_HU
    outside = _outside(reduced, air)
    inside = air & ~outside
    airways = _walled_air(reduced, inside, spacing)
    inside &= ~near(airways, spacing, _AIRWAY_WALL_MM)
    lungs = _lungs(reduced, inside, _beyond_table(air, outside, spacing), spacing)
    if not lungs.any():
        _LOG.warning("no lungs found: no body of air as large and as dense as lung, enclosed by tissue")
        return np.zeros(hu.shape, bool)
    lungs = _close(lungs, spacing)
    lungs &= ~near(airways, spacing, _AIRWAY_WALL_MM)
    return _enlarge(lungs, factors, hu.shape)


def near_lungs(
    lungs: np.ndarray, spacing_mm: Sequence[float], distance_mm: float, box: tuple[slice, ...]
) -> np.ndarray:
    """Whether the voxels of ``box`` lie within ``distance_mm`` of the lungs, or in them; some lie up to 2 mm beyond.

    Args:
        lungs: bool (Z, Y, X).
        spacing_mm: (z, y, x).
        distance_mm: at least 0.
        box: slices with start and stop, one an axis.

    Returns:
        bool, of the shape of ``lungs[box]``.

    Example:
        >>> lungs = np.zeros((1, 1, 12), bool)
        >>> lungs[..., :4] = True
        >>> near_lungs(lungs, (1.0, 1.0, 1.0), 3.0, (slice(0, 1), slice(0, 1), slice(0, 10))).tolist()
        [[[True, True, True, True, True, True, True, True, False, False]]]
    """
    factors = _factors(spacing_mm)
    starts = [np.arange(0, length, factor) for length, factor in zip(lungs.shape, factors, strict=True)]
    reduced = np.empty([len(first) for first in starts], bool)
    for target, first in zip(reduced, starts[0], strict=True):
        plane = lungs[first : first + factors[0]].any(axis=0)
        plane = np.logical_or.reduceat(np.logical_or.reduceat(plane, starts[1], axis=0), starts[2], axis=1)
        target[:] = plane
    # Voxels may be nearer to each other than the middles of their blocks.
    nearer = max((factor - 1) * size for factor, size in zip(factors, spacing_mm, strict=True))
    region = near(reduced, _times(spacing_mm, factors), distance_mm + nearer)
    blocks = [np.arange(side.start, side.stop) // factor for side, factor in zip(box, factors, strict=True)]
    return region[np.ix_(*blocks)]


def near(mask: np.ndarray, spacing_mm: Sequence[float], distance_mm: float) -> np.ndarray:
    """Voxels at most ``distance_mm`` from a mask, itself included; bool.

    Example:
        >>> near(np.array([[[True, False, False, False]]]), (5.0, 1.0, 1.0), 2.0).tolist()
        [[[True, True, True, False]]]
    """
    return _squared_distance(mask, spacing_mm, distance_mm) <= np.float32(distance_mm**2 * (1 + 1e-5))


def _squared_distance(mask: np.ndarray, spacing_mm: Sequence[float], reach_mm: float) -> np.ndarray:
    """To the nearest voxel of the mask, in mm^2, float32; right up to ``reach_mm``, some larger value beyond."""
    # Squares are sums over the axes: the lower envelope of parabolas, one axis after the other.
    squared = np.where(mask, np.float32(0), np.float32(4 * reach_mm**2 + 1))
    for axis, size in enumerate(spacing_mm):
        nearest = squared.copy()
        for step in range(1, min(int(reach_mm / size + 1e-6), mask.shape[axis] - 1) + 1):
            before = (slice(None),) * axis + (slice(None, -step),)
            after = (slice(None),) * axis + (slice(step, None),)
            cost = np.float32((step * size) ** 2)
            np.minimum(nearest[after], squared[before] + cost, out=nearest[after])
            np.minimum(nearest[before], squared[after] + cost, out=nearest[before])
        squared = nearest
    return squared


def _factors(spacing_mm: Sequence[float]) -> list[int]:
    """Voxels a side of the blocks that make the working grid."""
    return [max(1, round(_WORKING_MM / size)) for size in spacing_mm]


def _times(spacing_mm: Sequence[float], factors: Sequence[int]) -> list[float]:
    return [size * factor for size, factor in zip(spacing_mm, factors, strict=True)]


def _reduce(hu: np.ndarray, factors: Sequence[int]) -> np.ndarray:
    """Means over blocks of voxels, float32; the last block of an axis may be smaller. One slab at a time."""
    starts = [np.arange(0, length, factor) for length, factor in zip(hu.shape, factors, strict=True)]
    reduced = np.empty([len(first) for first in starts], np.float32)
    rows = np.diff(starts[1], append=hu.shape[1]).astype(np.float32)[:, None]
    columns = np.diff(starts[2], append=hu.shape[2]).astype(np.float32)
    for target, first in zip(reduced, starts[0], strict=True):
        slab = hu[first : first + factors[0]].astype(np.float32)
        # Padding round a circular field of view may be as low as -3024.
        plane = np.maximum(slab, np.float32(-1024)).mean(axis=0)
        plane = np.add.reduceat(np.add.reduceat(plane, starts[1], axis=0), starts[2], axis=1)
        np.divide(plane, rows * columns, out=target)
    return reduced


def _enlarge(mask: np.ndarray, factors: Sequence[int], shape: tuple[int, ...]) -> np.ndarray:
    """Inverse of the grid of :func:`_reduce`, with linear edges, one slice at a time."""
    result = np.empty(shape, bool)
    plane_shape = (mask.shape[1] * factors[1], mask.shape[2] * factors[2])
    for z, target in enumerate(result):
        position = min(max((z + 0.5) / factors[0] - 0.5, 0.0), len(mask) - 1.0)
        below = int(position)
        above = min(below + 1, len(mask) - 1)
        share = np.float32(position - below)
        plane = mask[below] * (1 - share) + mask[above] * share
        if plane.any():
            whole = resample_plane(torch.from_numpy(plane)[None, None], plane_shape)[0, 0]
            target[:] = whole[: shape[1], : shape[2]].numpy() > 0.5
        else:
            target[:] = False
    return result


def _outside(reduced: np.ndarray, air: np.ndarray) -> np.ndarray:
    """Free air round the body: pieces of air in a slice that reach its edge and are as dark as air, and what goes on
    from them in the next slices."""
    outside = np.zeros(air.shape, bool)
    pieces = [_components(plane, 4) for plane in air]
    for plane, numbered, target in zip(reduced, pieces, outside, strict=True):
        rim = np.unique(np.concatenate([numbered[0], numbered[-1], numbered[:, 0], numbered[:, -1]]))
        for number in rim[rim > 0]:
            piece = numbered == number
            if (np.quantile(plane[piece], [*_FREE_AIR_HU]) < [*_FREE_AIR_HU.values()]).any():
                target |= piece
    # A mattress may fill all that a small field of view shows beside the body, at the density of lung.
    upwards, downwards = range(1, len(air)), range(len(air) - 2, -1, -1)
    for order, before in ((upwards, -1), (downwards, 1)):
        for z in order:
            sizes = np.bincount(pieces[z].reshape(-1))
            common = np.bincount(pieces[z][outside[z + before]], minlength=len(sizes))
            going_on = common > 0.5 * sizes
            going_on[0] = False
            outside[z] |= going_on[pieces[z]]
    return outside


def _beyond_table(air: np.ndarray, outside: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    """What joins the outside in a slice once sheets too thin to be a chest wall are gone: the foam of a table."""
    half = max(_TABLE_SHEET_MM / 2, *spacing[1:])  # on a coarse grid too a sheet is at least a voxel thick
    thick = near(~near(air, spacing, half), spacing, half) & ~air
    beyond = np.zeros(air.shape, bool)
    for is_thick, is_outside, target in zip(thick, outside, beyond, strict=True):
        pieces = _components(~is_thick, 4)
        target[:] = np.isin(pieces, np.unique(pieces[is_outside]))
    return beyond


def _walled_air(reduced: np.ndarray, inside: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    """Airways down to where they enter the lungs, and bowel: dark air with tissue all round."""
    smallest, largest = (ml * 1000 / math.prod(spacing) for ml in _AIRWAY_ML)
    found = np.zeros(inside.shape, bool)
    tissue = reduced > _AIR_HU
    for threshold in _AIRWAY_THRESHOLDS_HU:
        pieces = _components(inside & (reduced < threshold), 6)
        numbers = pieces[pieces > 0]
        sizes = np.bincount(numbers)
        if len(sizes) < 2:
            continue
        dark = np.bincount(numbers, reduced[pieces > 0] < _AIRWAY_DARK_HU)
        airy = (sizes >= smallest) & (sizes <= largest) & (dark >= _AIRWAY_DARK * sizes)
        found |= (airy & (_walled_share(pieces, airy, tissue) >= _AIRWAY_WALLED))[pieces]
    return found


def _walled_share(pieces: np.ndarray, chosen: np.ndarray, tissue: np.ndarray) -> np.ndarray:
    """Share of the faces of each chosen piece behind which there is tissue within two voxels."""
    voxels = np.argwhere(chosen[pieces])
    own = pieces[tuple(voxels.T)]
    walled, faces = np.zeros(len(chosen)), np.zeros(len(chosen))
    for axis in range(pieces.ndim):
        for step in (-1, 1):
            along = voxels[:, axis] + 2 * step
            seen = (along >= 0) & (along < pieces.shape[axis])
            at, beside = own[seen], list(voxels[seen].T)
            beyond = beside.copy()
            beside[axis] = beside[axis] + step
            beyond[axis] = beyond[axis] + 2 * step
            leaves = pieces[tuple(beside)] != at
            # The first voxel is part air, part wall.
            wall = (tissue[tuple(beside)] | tissue[tuple(beyond)]) & leaves
            faces += np.bincount(at, leaves, minlength=len(chosen))
            walled += np.bincount(at, wall, minlength=len(chosen))
    return walled / np.maximum(faces, 1)


def _lungs(
    reduced: np.ndarray, inside: np.ndarray, beyond_table: np.ndarray, spacing: Sequence[float]
) -> np.ndarray:
    """Pieces of air that are large, as dense as lung within, and in the body."""
    pieces = _components(inside, 6)
    numbers = pieces[pieces > 0]
    sizes = np.bincount(numbers)
    lungs = np.zeros(inside.shape, bool)
    within = inside & ~near(~inside, spacing, max(spacing))
    smallest_ml = min(_SMALLEST_LUNG_ML, _SMALLEST_LUNG_ML_PER_MM * len(inside) * spacing[0])
    for number in np.flatnonzero(sizes >= smallest_ml * 1000 / math.prod(spacing)):
        piece = pieces == number
        core = piece & within
        density = np.median(reduced[core if core.any() else piece])
        if density > _DARKEST_LUNG_HU and np.count_nonzero(piece & beyond_table) < 0.5 * sizes[number]:
            lungs |= piece
    return lungs


def _close(lungs: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    """Fill what a ball cannot enter, each lung for itself, then what is enclosed on all sides."""
    reach = [math.ceil(_CLOSING_MM / size) + 1 for size in spacing]
    # Lung that is cut at the edge of the scan goes on beyond it.
    lungs = np.pad(lungs, [(width, width) for width in reach], mode="edge")
    closed = lungs.copy()
    for lung in _left_and_right(lungs, spacing):
        closed |= ~near(~near(lung, spacing, _CLOSING_MM), spacing, _CLOSING_MM)
    closed = closed[tuple(slice(width, -width) for width in reach)]
    pieces = _components(~closed, 6)
    open_to_edge = np.zeros(int(pieces.max(initial=0)) + 1, bool)
    for axis in range(3):
        for end in (0, -1):
            open_to_edge[pieces.take(end, axis)] = True
    open_to_edge[0] = False
    return ~open_to_edge[pieces]


def _left_and_right(lungs: np.ndarray, spacing: Sequence[float]) -> list[np.ndarray]:
    """The lungs, apart where they touch only in front of or behind the heart."""
    # They come apart without their outermost layers; every voxel then goes to the nearer one.
    cores = _components(~near(~lungs, spacing, 2 * _WORKING_MM), 6)
    sizes = np.bincount(cores[cores > 0])
    numbers = np.flatnonzero(sizes >= 0.1 * sizes.max(initial=1))
    if len(numbers) < 2:
        return [lungs]
    # Every other voxel of a slice is enough to tell left from right.
    coarse = [spacing[0], 2 * spacing[1], 2 * spacing[2]]
    distances = [_squared_distance(cores[:, ::2, ::2] == number, coarse, _FAR_MM) for number in numbers]
    nearest = np.argmin(distances, axis=0).repeat(2, axis=1).repeat(2, axis=2)
    nearest = nearest[:, : lungs.shape[1], : lungs.shape[2]]
    return [lungs & (nearest == index) for index in range(len(numbers))]


def _components(mask: np.ndarray, connectivity: Literal[4, 6]) -> np.ndarray:
    """Numbered components; as integers, not as bool, on which cc3d 4.1 errs."""
    pieces: np.ndarray = cc3d.connected_components(
        np.ascontiguousarray(mask).view(np.uint8), connectivity=connectivity
    )
    return pieces
