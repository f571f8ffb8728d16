"""Distribution of metrics over the cases: a box and every case as a dot."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from lungkit._atomic import atomic_path
from lungkit.errors import UsageError
from lungkit.metrics import CaseTable
from lungkit.report.tables import metric_title

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = ("#1f6fb4", "#e8612c", "#2a9d6f", "#8e5bb5", "#c9a227", "#5c6670")
_RATIOS = ("dice", "iou", "ppv", "sensitivity", "specificity", "volume_similarity", "nsd", "lesion_")
_MOST_COLUMNS = 4
_NAME_WIDTH = 16
_FEWEST_FOR_A_BOX = 6  # quartiles of fewer say less than the points do


def save_distributions(
    path: str | os.PathLike[str],
    tables: CaseTable | Mapping[str, CaseTable],
    metrics: Sequence[str],
    *,
    title: str | None = None,
) -> None:
    """Draw the distribution of each metric over the cases, a panel a metric.

    In every panel a box for each class, or for each model where several tables are given: the box spans the
    quartiles, the line is the median, the whiskers reach the farthest cases within 1.5 times the box, the diamond is
    the mean. Every case is a dot; fewer than six have no box. Cases that are NaN or infinite are left out, and
    their number is written below.

    Args:
        path: picture to write; its suffix (.png, .pdf, .svg) says which kind.
        tables: metrics of the cases; or several tables by the name of the model.
        metrics: names of the metrics to draw.
        title: heading of the picture.

    Raises:
        UsageError: no metric, or a table that lacks one.

    Example:
        >>> import pathlib, tempfile
        >>> table = CaseTable()
        >>> for case in range(5):
        ...     table.add_row(str(case), "tumour", {"dice": case / 5})
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "dice.png"
        >>> save_distributions(path, table, ["dice"])
        >>> path.stat().st_size > 1000
        True
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not metrics:
        raise UsageError("metrics must name at least one metric")
    groups = _groups(tables)
    rows = -(-len(metrics) // _MOST_COLUMNS)
    columns = -(-len(metrics) // rows)
    width = max(2.6, 1.0 + 0.75 * len(groups))
    figure = Figure(figsize=(width * columns, 3.4 * rows), dpi=130, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False).reshape(-1)
    for ax in panels[len(metrics) :]:
        ax.set_visible(False)
    for ax, metric in zip(panels, metrics, strict=False):
        _draw_panel(
            ax, metric, {name: table.column(metric, label) for name, (table, label) in groups.items()}
        )
    if title:
        figure.suptitle(title, fontsize=12, parse_math=False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary)


def _groups(tables: CaseTable | Mapping[str, CaseTable]) -> dict[str, tuple[CaseTable, str]]:
    if isinstance(tables, CaseTable):
        return {label: (tables, label) for label in tables.labels}
    several = len({label for table in tables.values() for label in table.labels}) > 1
    return {
        f"{name}\n{label}" if several else name: (table, label)
        for name, table in tables.items()
        for label in table.labels
    }


def _draw_panel(ax: Axes, metric: str, groups: Mapping[str, np.ndarray]) -> None:
    # The dots' places are drawn from a fixed seed, so that the same numbers give the same picture.
    random = np.random.default_rng(0)
    names = []
    for position, (name, values) in enumerate(groups.items(), start=1):
        colour = _COLOURS[(position - 1) % len(_COLOURS)]
        shown = values[np.isfinite(values)]
        names.append(
            f"{textwrap.fill(name, _NAME_WIDTH)}\nn = {len(shown)}"
            + (f" of {len(values)}" if len(shown) < len(values) else "")
        )
        if not len(shown):
            continue
        few = len(shown) < _FEWEST_FOR_A_BOX
        line = {"color": colour, "linewidth": 1.4}
        box = ax.boxplot(
            [shown],
            positions=[position],
            widths=0.5,
            showfliers=False,
            showbox=not few,
            showcaps=not few,
            showmeans=True,
            patch_artist=True,
            boxprops={**line, "facecolor": colour + "22"},
            whiskerprops={**line, "linestyle": "none" if few else "-"},
            capprops=line,
            medianprops={"color": colour, "linewidth": 2.2},
            meanprops={"marker": "D", "markerfacecolor": "white", "markeredgecolor": colour, "markersize": 5},
        )
        for mean in box["means"]:
            mean.set_zorder(4)
        places = position + random.uniform(-0.17, 0.17, len(shown))
        size, alpha = (26, 0.8) if few else (9, 0.45)
        ax.scatter(places, shown, s=size, color=colour, alpha=alpha, linewidths=0, zorder=3)
    ax.set_xticks(range(1, len(names) + 1), names, fontsize=8, parse_math=False)
    ax.set_xlim(0.4, len(names) + 0.6)
    ax.set_title(metric_title(metric), fontsize=11, loc="left")
    ax.grid(True, axis="y", color="#e3e6e8", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.tick_params(labelsize=8, length=0)
    for side in ("top", "right", "left", "bottom"):
        ax.spines[side].set_visible(False)
    if metric.startswith(_RATIOS):
        ax.set_ylim(-0.02, 1.03)
