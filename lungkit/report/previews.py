"""One picture of a predicted scan, to see at a glance whether the mask lies where it should."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np

from lungkit._atomic import atomic_path
from lungkit.errors import UsageError
from lungkit.report._drawing import (
    BACKGROUND,
    CLASS_COLOURS,
    TEXT,
    crop_box,
    draw_contours,
    draw_frame,
    draw_scale_bar,
)

_PLANES = ("axial", "coronal", "sagittal")


def save_preview(
    path: str | os.PathLike[str],
    image: np.ndarray,
    mask: np.ndarray,
    spacing_mm: Sequence[float],
    *,
    window: tuple[float, float],
    title: str = "",
) -> None:
    """Draw the axial, coronal and sagittal slice with most foreground, its outlines in colour, and the part round it.

    The axial slice is shown with the front up, the others with the head up; the patient's right is on the left, and
    the front of a sagittal slice as well. Without foreground it is the slices through the middle.

    Args:
        path: picture to write (.png).
        image: scan (Z, Y, X) in RAS orientation.
        mask: classes (Z, Y, X), 0 background.
        spacing_mm: (z, y, x).
        window: lowest and highest intensity shown.
        title: heading.

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
    figure = Figure(
        figsize=(3.4 * (1 + len(planes)), 3.7), dpi=110, facecolor=BACKGROUND, layout="constrained"
    )
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 1 + len(planes), squeeze=False)[0]
    low, high = window
    for axis, plane in enumerate(planes):
        index, ct, labels, spacing = _slice(image, mask, spacing_mm, axis)
        box = crop_box(labels != 0)
        whole = (slice(0, ct.shape[0]), slice(0, ct.shape[1]))
        shown = [(axes[axis], whole)] + ([(axes[-1], box)] if axis == 0 else [])
        for ax, part in shown:
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
            ax.set_axis_off()
        axes[axis].set_title(f"{plane}, slice {index + 1} of {image.shape[axis]}", color=TEXT, fontsize=10)
        if axis == 0:
            axes[-1].set_title("axial, enlarged" if box != whole else "axial", color=TEXT, fontsize=10)
            if box != whole:
                draw_frame(axes[0], box)
    figure.suptitle(title, color=TEXT, fontsize=12)
    with atomic_path(path, durable=False) as temporary:
        figure.savefig(temporary, facecolor=BACKGROUND, format="png")


def _slice(
    image: np.ndarray, mask: np.ndarray, spacing_mm: Sequence[float], axis: int
) -> tuple[int, np.ndarray, np.ndarray, tuple[float, float]]:
    """Index of the slice across ``axis`` with most foreground; its image and mask as seen, and (row, column) in mm."""
    others = tuple(other for other in range(3) if other != axis)
    area = np.array([np.count_nonzero(part) for part in np.moveaxis(mask, axis, 0)])
    index = int(area.argmax()) if area.any() else mask.shape[axis] // 2
    # Rows run to the front or the head, which are shown up; columns to the right or the front, shown on the left.
    ct, labels = (np.take(array, index, axis)[::-1, ::-1] for array in (image, mask))
    spacing = float(spacing_mm[others[0]]), float(spacing_mm[others[1]])
    return index, np.asarray(ct, np.float32), labels, spacing
