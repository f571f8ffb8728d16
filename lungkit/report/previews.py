"""One picture of a predicted scan, to see at a glance whether the mask lies where it should."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from lungkit._atomic import atomic_path
from lungkit.errors import UsageError
from lungkit.metrics import label_lesions
from lungkit.report._drawing import (
    BACKGROUND,
    CLASS_COLOURS,
    TEXT,
    Box,
    crop_box,
    draw_contours,
    draw_frame,
    draw_scale_bar,
    draw_sides,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PLANES = ("axial", "coronal", "sagittal")
_SIDES = {"axial": ("R", "L"), "coronal": ("R", "L"), "sagittal": ("A", "P")}


def save_preview(
    path: str | os.PathLike[str],
    image: np.ndarray,
    mask: np.ndarray,
    spacing_mm: Sequence[float],
    *,
    window: tuple[float, float],
    title: str = "",
    legend: Mapping[int, str] | None = None,
) -> None:
    """Draw the axial, coronal and sagittal slice through the largest lesion, outlines in colour, and the part round it.

    Of the connected lesion with most voxels it is the slices that hold most of it; without foreground those through
    the middle. The axial slice is shown with the front up, the others with the head up; the patient's right is on the
    left (marked R and L), and the front (A) of a sagittal slice as well. The enlarged part is left out where it would
    show the whole slice again.

    Args:
        path: picture to write (.png).
        image: scan (Z, Y, X) in RAS orientation.
        mask: classes (Z, Y, X), 0 background.
        spacing_mm: (z, y, x).
        window: lowest and highest intensity shown.
        title: heading.
        legend: class -> what is written beside its colour.

    Raises:
        UsageError: shapes do not agree.

    Example:
        >>> import pathlib, tempfile
        >>> mask = np.zeros((4, 32, 32), np.int16)
        >>> mask[1:3, 8:16, 8:16] = 1
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "preview.png"
        >>> save_preview(path, mask * 400 - 800, mask, (2.5, 0.8, 0.8), window=(-1000, 400))
        >>> path.stat().st_size > 1000
        True
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if image.ndim != 3 or image.shape != mask.shape or len(spacing_mm) != 3:
        raise UsageError(
            f"image {image.shape} and mask {mask.shape} must be (Z, Y, X) of one shape, with three spacings"
        )
    planes = _PLANES if image.shape[0] > 1 else _PLANES[:1]
    place = _middle_of_largest(mask)
    slices = [_slice(image, mask, spacing_mm, axis, place[axis]) for axis in range(len(planes))]
    box, whole = crop_box(slices[0][1] != 0), _everything(slices[0][1])
    enlarged = box != whole
    columns = len(planes) + enlarged
    figure = Figure(figsize=(3.4 * columns, 4.0), dpi=110, facecolor=BACKGROUND, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, columns, squeeze=False)[0]
    low, high = window
    for axis, (plane, (ct, labels, spacing)) in enumerate(zip(planes, slices, strict=True)):
        for ax, part in [
            (axes[axis], _everything(ct)),
            *([(axes[-1], box)] if axis == 0 and enlarged else []),
        ]:
            ax.imshow(
                ct[part],
                cmap="gray",
                vmin=low,
                vmax=high,
                aspect=spacing[0] / spacing[1],
                interpolation="nearest",
            )
            draw_contours(ax, labels[part], colours=CLASS_COLOURS, width=1.2)
            draw_scale_bar(ax, part, spacing)
            draw_sides(ax, _SIDES[plane])
            ax.set_axis_off()
        axes[axis].set_title(
            f"{plane}, slice {place[axis] + 1} of {image.shape[axis]}", color=TEXT, fontsize=10
        )
    if enlarged:
        axes[-1].set_title("axial, enlarged", color=TEXT, fontsize=10)
        draw_frame(axes[0], box)
    figure.suptitle(title, color=TEXT, fontsize=12, parse_math=False)
    _draw_legend(figure, legend or {})
    with atomic_path(path, durable=False) as temporary:
        figure.savefig(temporary, facecolor=BACKGROUND, format="png")


def _middle_of_largest(mask: np.ndarray) -> tuple[int, int, int]:
    """The slice across each axis that holds most of the largest lesion; the middle ones without any."""
    if not mask.any():
        return mask.shape[0] // 2, mask.shape[1] // 2, mask.shape[2] // 2
    hits = [np.flatnonzero(mask.any(axis=others)) for others in ((1, 2), (0, 2), (0, 1))]
    lesions, _ = label_lesions(mask[tuple(slice(hit[0], hit[-1] + 1) for hit in hits)] != 0)
    largest = lesions == 1 + np.bincount(lesions[lesions != 0])[1:].argmax()
    z, y, x = (
        int(hit[0] + largest.sum(axis=others).argmax())
        for hit, others in zip(hits, ((1, 2), (0, 2), (0, 1)), strict=True)
    )
    return z, y, x


def _slice(
    image: np.ndarray, mask: np.ndarray, spacing_mm: Sequence[float], axis: int, index: int
) -> tuple[np.ndarray, np.ndarray, tuple[float, float]]:
    """A slice across ``axis`` and its mask as seen, and (row, column) in mm."""
    others = tuple(other for other in range(3) if other != axis)
    # Rows run to the front or the head, which are shown up; columns to the right or the front, shown on the left.
    ct, labels = (np.take(array, index, axis)[::-1, ::-1] for array in (image, mask))
    return np.asarray(ct, np.float32), labels, (float(spacing_mm[others[0]]), float(spacing_mm[others[1]]))


def _everything(plane: np.ndarray) -> Box:
    return slice(0, plane.shape[0]), slice(0, plane.shape[1])


def _draw_legend(figure: Figure, legend: Mapping[int, str]) -> None:
    from matplotlib.lines import Line2D

    if legend:
        lines = [Line2D([], [], color=CLASS_COLOURS[(value - 1) % len(CLASS_COLOURS)]) for value in legend]
        drawn = figure.legend(
            lines, list(legend.values()), loc="outside lower center", ncols=2, labelcolor=TEXT, frameon=False
        )
        for text in drawn.get_texts():
            text.set_parse_math(False)
