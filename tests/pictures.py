"""What a picture shows: outlines and images as matplotlib holds them, and pixels of the file that was written."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Span = tuple[float, float]


class Outline(NamedTuple):
    """A contour line: from which to which row and column of the panel's image it goes."""

    colour: str
    dashed: bool
    rows: Span
    columns: Span


def outlines(ax: Axes) -> list[Outline]:
    """The contours in a panel, in the order in which they were drawn."""
    from matplotlib.colors import to_hex
    from matplotlib.contour import ContourSet

    found = []
    for drawn in ax.collections:
        if isinstance(drawn, ContourSet):
            points = np.concatenate([path.vertices for path in drawn.get_paths()])
            (left, top), (right, bottom) = points.min(0), points.max(0)
            dashed = drawn.get_linestyle()[0][1] is not None
            rows, columns = (float(top), float(bottom)), (float(left), float(right))
            found.append(Outline(to_hex(drawn.get_edgecolor()[0]), dashed, rows, columns))
    return found


def edge_of(mask: np.ndarray) -> tuple[Span, Span]:
    """Rows and columns of the line round the True pixels of an image: half a pixel outside their centres."""
    rows, columns = np.nonzero(mask)
    return (rows.min() - 0.5, rows.max() + 0.5), (columns.min() - 0.5, columns.max() + 0.5)


def image_of(ax: Axes) -> np.ndarray:
    """The pixels of a panel's image, the rows from its top."""
    return np.asarray(ax.images[0].get_array())


def pixels(path: Path) -> np.ndarray:
    """(height, width, 3) of a PNG, 0 to 255."""
    from matplotlib.image import imread

    return (imread(path)[..., :3] * 255).round().astype(int)


def shows(path: Path, ax: Axes, row: float, column: float, colour: str) -> bool:
    """Whether the file has a colour at a place of a panel, or in the pixels next to it, for the edges are smoothed."""
    image = pixels(path)
    scale = len(image) / ax.get_figure().bbox.height  # a file may have more dots an inch than the figure
    x, y = (int(place) for place in scale * ax.transData.transform((column, row)))
    around = image[len(image) - y - 2 : len(image) - y + 1, x - 1 : x + 2]
    return _holds(around, colour)


def has_colour(path: Path, colour: str) -> bool:
    """Whether any pixel of the file has a colour."""
    return _holds(pixels(path), colour)


def _holds(image: np.ndarray, colour: str) -> bool:
    wanted = [int(colour[at : at + 2], 16) for at in (1, 3, 5)]
    return bool((np.abs(image - wanted).max(-1) < 12).any())
