"""Training curves: losses, metrics and the learning rate over the epochs of one run or several."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lungkit._atomic import atomic_path
from lungkit.errors import UsageError
from lungkit.metrics import OVERLAP_METRICS
from lungkit.report.tables import metric_title

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Rows = Sequence[Mapping[str, Any]]

_COLOURS = ("#1f6fb4", "#e8612c", "#2a9d6f", "#8e5bb5", "#c9a227", "#5c6670")
_DASHES = ("solid", (0, (4, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
_PANELS = ("loss", "metric", "learning rate")


def save_curves(
    path: str | os.PathLike[str],
    rows: Rows | Mapping[str, Rows],
    *,
    x: str = "epoch",
    title: str | None = None,
) -> None:
    """Draw the curves of a run's ``metrics.csv``: a panel each for losses, metrics and the learning rate.

    A column belongs to the panel that its name says: "loss" in it, the name of an overlap metric in it ("dice",
    "iou", ...), or "lr" or "learning_rate". Other columns, and values that are missing or NaN, are left out; a panel
    without columns is not drawn. The best value of a validation Dice is marked.

    Args:
        path: picture to write; its suffix (.png, .pdf, .svg) says which kind.
        rows: one mapping a row from column to number; or several runs by name, a colour each.
        x: column of the horizontal axis.
        title: heading of the picture.

    Raises:
        UsageError: a row lacks the column ``x``, or nothing can be drawn.

    Example:
        >>> import pathlib, tempfile
        >>> rows = [{"epoch": i, "train_loss": 1 / (i + 1), "val_dice": i / 10} for i in range(5)]
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "progress.png"
        >>> save_curves(path, rows)
        >>> path.stat().st_size > 1000
        True
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    runs = dict(rows) if isinstance(rows, Mapping) else {"": rows}
    series = {name: _series(run, x) for name, run in runs.items()}
    columns = list(dict.fromkeys(column for run in series.values() for column in run))
    panels = {panel: [c for c in columns if _panel_of(c) == panel] for panel in _PANELS}
    panels = {panel: found for panel, found in panels.items() if found}
    if not panels:
        raise UsageError(f"no loss, metric or learning rate to draw among the columns {sorted(_keys(runs))}")

    figure = Figure(figsize=(4.6 * len(panels), 3.5), dpi=130, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    for ax, (panel, found) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        for line, column in enumerate(found):
            for number, (run, curves) in enumerate(series.items()):
                if column not in curves:
                    continue
                # Colours tell columns apart in one run, and runs where there are several.
                colour, dash = (line, 0) if len(series) == 1 else (number, line)
                _draw_curve(
                    ax,
                    *curves[column],
                    _COLOURS[colour % len(_COLOURS)],
                    _DASHES[dash % len(_DASHES)],
                    " · ".join(filter(None, [run, _curve_title(column)])),
                    mark_best=_is_validation_dice(column),
                )
        _dress(ax, panel, x)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    if title:
        figure.suptitle(title, fontsize=12, parse_math=False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary)


def _series(rows: Rows, x: str) -> dict[str, tuple[list[float], list[float]]]:
    curves: dict[str, tuple[list[float], list[float]]] = {}
    for number, row in enumerate(rows):
        at = _number(row.get(x))
        if at is None:
            raise UsageError(f"row {number} has no number in column {x!r}; it has {sorted(row)}")
        for column, cell in row.items():
            value = _number(cell)
            if value is not None and _panel_of(column) is not None:
                xs, ys = curves.setdefault(column, ([], []))
                xs.append(at)
                ys.append(value)
    return curves


def _draw_curve(
    ax: Axes,
    xs: list[float],
    ys: list[float],
    colour: str,
    dashes: Any,
    label: str,
    *,
    mark_best: bool,
) -> None:
    best = max(range(len(ys)), key=ys.__getitem__)
    if mark_best:
        label = f"{label} (best {ys[best]:.3f})"
        ax.plot(xs[best], ys[best], marker="o", markersize=5, color=colour)
    # A single point is no line; a dot shows it.
    marker = "o" if len(xs) == 1 else None
    ax.plot(xs, ys, color=colour, linestyle=dashes, linewidth=1.7, label=label, marker=marker)


def _dress(ax: Axes, panel: str, x: str) -> None:
    ax.set_title(panel.capitalize() if panel != "metric" else "Metrics", fontsize=11, loc="left")
    ax.set_xlabel(x, fontsize=9)
    ax.grid(True, color="#e3e6e8", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.tick_params(labelsize=8, length=0)
    for side in ("top", "right", "left", "bottom"):
        ax.spines[side].set_visible(False)
    if panel == "metric":
        ax.set_ylim(0, 1.04)
    if panel == "learning rate":
        ax.yaxis.set_major_formatter("{x:.3g}")
        ax.set_ylim(bottom=0)
    for text in ax.legend(fontsize=8, frameon=False).get_texts():
        text.set_parse_math(False)


def _panel_of(column: str) -> str | None:
    words = column.lower().replace("/", "_").split("_")
    if "loss" in words:
        return "loss"
    if "lr" in words or words[-2:] == ["learning", "rate"]:
        return "learning rate"
    return "metric" if any(name in column.lower() for name in OVERLAP_METRICS) else None


def _is_validation_dice(column: str) -> bool:
    return "dice" in column.lower() and "val" in column.lower() and _panel_of(column) == "metric"


def _curve_title(column: str) -> str:
    return " ".join(metric_title(word) for word in column.replace("/", "_").split("_"))


def _number(cell: Any) -> float | None:
    try:
        value = float(cell)
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None


def _keys(runs: Mapping[str, Rows]) -> set[str]:
    return {key for rows in runs.values() for row in rows for key in row}
