"""What the pictures of a case share: colours, crops, contours, scale bars."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ArrayLike = np.ndarray | Tensor
Box = tuple[slice, slice]

BACKGROUND = "#101214"
TEXT = "#e8e8e8"
FAINT = "#9aa0a6"
CLASS_COLOURS = ("#ff6b4a", "#4aa8ff", "#c77dff", "#ffd166", "#06d6a0", "#f78fb3")
TRUTH_COLOUR = "#3ddc84"
_MINIMUM_CROP = 48
_SCALE_BARS_MM = (5, 10, 20, 50, 100)


def as_seen(array: np.ndarray) -> np.ndarray:
    """Rows (.., Y, X) in RAS as a radiologist sees them: front up, the patient's right on the left."""
    return array[..., ::-1, ::-1]


def crop_box(mask: np.ndarray) -> Box:
    """The part of a slice to show: a square round the foreground, or everything where that is not much more."""
    height, width = mask.shape
    whole = (slice(0, height), slice(0, width))
    if not mask.any():
        return whole
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    extent = max(rows[-1] - rows[0], columns[-1] - columns[0]) + 1
    side = min(max(2 * extent + 8, _MINIMUM_CROP), height, width)
    if side > 0.6 * max(height, width):
        return whole
    starts = [
        int(np.clip((hits[0] + hits[-1] + 1) // 2 - side // 2, 0, size - side))
        for hits, size in ((rows, height), (columns, width))
    ]
    return (slice(starts[0], starts[0] + side), slice(starts[1], starts[1] + side))


def draw_contours(
    ax: Axes, mask: np.ndarray, *, colours: Sequence[str], width: float, dashed: bool = False
) -> None:
    """Outline every class of ``mask``."""
    for value in np.unique(mask[mask != 0]):
        colour = colours[(int(value) - 1) % len(colours)]
        # One voxel of nothing all round closes the line of a mask that reaches the border.
        inside = np.pad((mask == value).astype(np.float32), 1)
        rows, columns = np.arange(inside.shape[0]) - 1, np.arange(inside.shape[1]) - 1
        ax.contour(
            columns,
            rows,
            inside,
            levels=[0.5],
            colors=[colour],
            linewidths=width,
            linestyles="dashed" if dashed else "solid",
        )


def draw_frame(ax: Axes, box: Box) -> None:
    """Frame the part of a slice that another panel shows."""
    from matplotlib.patches import Rectangle

    rows, columns = box
    corner = (columns.start - 0.5, rows.start - 0.5)
    size = (columns.stop - columns.start, rows.stop - rows.start)
    ax.add_patch(Rectangle(corner, *size, fill=False, edgecolor="#ffffff", linewidth=0.9, alpha=0.8))


def draw_sides(ax: Axes, sides: tuple[str, str]) -> None:
    """Letters of what lies on the left and on the right of the picture, as R and L of the patient."""
    from matplotlib.patheffects import withStroke

    outline = [withStroke(linewidth=2.5, foreground="#000000b0")]
    for x, side, align in ((0.02, sides[0], "left"), (0.98, sides[1], "right")):
        ax.text(
            x,
            0.98,
            side,
            color="#ffffff",
            ha=align,
            va="top",
            fontsize=9,
            transform=ax.transAxes,
            path_effects=outline,
        )


def draw_scale_bar(ax: Axes, box: Box, spacing: tuple[float, float]) -> None:
    """The longest bar that fits, in mm; ``spacing`` is (y, x)."""
    height, width = (part.stop - part.start for part in box)
    fitting = [mm for mm in _SCALE_BARS_MM if mm / spacing[1] <= 0.4 * width]
    if not fitting:
        return
    from matplotlib.patheffects import withStroke

    length, y, x = fitting[-1] / spacing[1], 0.94 * height, 0.05 * width
    outline = [withStroke(linewidth=3.5, foreground="#000000b0")]  # readable on fat and bone too
    ax.plot(
        [x, x + length], [y, y], color="#ffffff", linewidth=2, solid_capstyle="butt", path_effects=outline
    )
    ax.text(
        x + length / 2,
        y - 0.02 * height,
        f"{fitting[-1]} mm",
        color="#ffffff",
        ha="center",
        va="bottom",
        fontsize=8,
        path_effects=outline,
    )


def as_array(values: ArrayLike) -> np.ndarray:
    """On the CPU, as numpy has it."""
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
