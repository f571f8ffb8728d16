"""Forest plot: what each arm of an experiment changes, with its interval."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lungkit._atomic import atomic_path
from lungkit.errors import UsageError
from lungkit.metrics import Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BETTER, _WORSE, _UNCLEAR = "#2a9d6f", "#c0392b", "#5c6670"
_ROOM_FOR_P = 0.2  # beside the intervals, as a share of their panel


@dataclass(frozen=True)
class Effect:
    """The difference that one arm makes in one metric, and its p (adjusted where there are several arms)."""

    name: str
    difference: float
    interval: Interval
    p_value: float


def save_forest(
    path: str | os.PathLike[str],
    effects: Mapping[str, Sequence[Effect]],
    *,
    baseline: str,
    lower_is_better: Sequence[str] = (),
) -> None:
    """Draw the effects of every metric: a panel a metric, a row an arm, a line at zero for the baseline.

    An interval without zero is green where the arm is better and red where it is worse; others are grey. A row whose
    difference is not defined stays empty.

    Args:
        path: picture to write; its suffix (.png, .pdf, .svg) says which kind.
        effects: heading of the metric -> an effect an arm, the same arms in each.
        baseline: name of the arm that the others are compared with.
        lower_is_better: headings of metrics, such as distances, of which less is better.

    Raises:
        UsageError: there is no effect, or the metrics have different arms.

    Example:
        >>> import pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "forest.png"
        >>> save_forest(path, {"Dice": [Effect("residual", 0.01, Interval(-0.01, 0.03), 0.4)]}, baseline="plain")
        >>> path.stat().st_size > 1000
        True
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    names = [[effect.name for effect in found] for found in effects.values()]
    if not names or not names[0] or any(other != names[0] for other in names):
        raise UsageError("effects must hold at least one metric, each with the same arms")
    figure = Figure(figsize=(2.2 + 2.9 * len(effects), 1.3 + 0.3 * len(names[0])), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(effects), sharey=True, squeeze=False)[0]
    for ax, (title, found) in zip(panels, effects.items(), strict=True):
        _draw(ax, found, better=-1 if title in lower_is_better else 1)
        ax.set_title(title, fontsize=10)
        ax.set_xlabel("difference", fontsize=8)
        low, high = ax.get_xlim()
        ax.set_xlim(low, high + _ROOM_FOR_P * (high - low))
        ax.xaxis.set_major_locator(MaxNLocator(4))  # more would run into each other
    panels[0].set_yticks(range(len(names[0])), names[0], fontsize=8)
    panels[0].set_ylim(len(names[0]) - 0.4, -0.6)
    figure.suptitle(f"Differences to {baseline}, with 95 % intervals and p", fontsize=10)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=140)


def _draw(ax: Axes, effects: Sequence[Effect], *, better: int) -> None:
    ax.axvline(0, color="#202428", linewidth=0.8)
    for row, effect in enumerate(effects):
        low, high = effect.interval.low, effect.interval.high
        if not np.isfinite(effect.difference):
            continue
        colour = _UNCLEAR
        if low > 0 or high < 0:
            colour = _BETTER if better * effect.difference > 0 else _WORSE
        if np.isfinite(low) and np.isfinite(high):
            ax.plot([low, high], [row, row], color=colour, linewidth=1.6, solid_capstyle="butt")
        ax.plot([effect.difference], [row], marker="D", markersize=4, color=colour, linestyle="none")
        if np.isfinite(effect.p_value):
            shown = "< 0.001" if effect.p_value < 0.001 else f"{effect.p_value:.3f}"
            ax.annotate(
                shown,
                (1, row),
                xycoords=("axes fraction", "data"),
                xytext=(-2, 2),
                textcoords="offset points",
                ha="right",
                va="bottom",
                fontsize=6,
                color=colour,
            )
    ax.tick_params(labelsize=7)
    ax.grid(axis="x", linewidth=0.4, alpha=0.5)
