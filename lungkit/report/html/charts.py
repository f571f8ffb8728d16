"""Charts as SVG in a page: distributions, curves, intervals, calibration. Colours follow the page, light or dark."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np

from lungkit.report.html.markup import Markup, element, join

_SERIES = 6
_DASHES = (None, "6 3", "2 2", "8 3 2 3")
_WIDTH, _HEIGHT = 420.0, 240.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 52.0, 12.0, 10.0, 34.0
_MOST_DOTS = 150
_FEWEST_FOR_A_BOX = 6
_LONGEST_NAME = 34


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from about ``low`` to about ``high``.

    Example:
        >>> ticks(0, 1), ticks(3, 97)
        ([0.0, 0.2, 0.4, 0.6, 0.8, 1.0], [20.0, 40.0, 60.0, 80.0])
    """
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(step * number, 12) + 0.0 for number in range(first, last + 1)]


def distribution_chart(
    title: str, groups: Mapping[str, np.ndarray], *, limits: tuple[float, float] | None = None
) -> Markup:
    """A box and the cases as dots for every group; many cases as the outline of their histogram.

    The box spans the quartiles, the bar in it is the median, the whiskers reach the farthest cases within 1.5 times the
    box. Fewer than six cases have no box. NaN and infinity are left out; how many cases are shown is written below.

    Args:
        title: heading.
        groups: values by the name of a model or class.
        limits: of the axis; those of the values where not given.
    """
    finite = {name: values[np.isfinite(values)] for name, values in groups.items()}
    everything = np.concatenate([*finite.values(), []])
    if not everything.size:
        return _figure(title, element("p", "No case has a value."))
    low, high = limits or (float(everything.min()), float(everything.max()))
    margin = 0.04 * (high - low or abs(high) or 1.0)
    frame = _Frame((0.0, float(len(groups))), (low - margin, high + margin))
    parts = [*frame.rules_y()]
    random = np.random.default_rng(0)  # the same numbers give the same picture
    for number, (name, values) in enumerate(finite.items()):
        middle = number + 0.5
        marks: list[Markup] = []
        if values.size > _MOST_DOTS:
            marks.append(_histogram(frame, values, middle))
        elif values.size:
            size = 3.2 if values.size < _FEWEST_FOR_A_BOX else 2.0
            for value, shift in zip(values, random.uniform(-0.14, 0.14, values.size), strict=True):
                marks.append(
                    element(
                        "circle",
                        cx=_n(frame.x(middle + shift)),
                        cy=_n(frame.y(float(value))),
                        r=size,
                        class_="mark",
                        fill_opacity=0.55,
                    )
                )
        if values.size >= _FEWEST_FOR_A_BOX:
            marks += _box(frame, values, middle)
        shown = f"n = {values.size}" + (f" of {groups[name].size}" if values.size < groups[name].size else "")
        label = _short(name, max(8, int(58 / len(groups))))
        marks += [
            _text(label, frame.x(middle), _HEIGHT - 19, anchor="middle"),
            _text(shown, frame.x(middle), _HEIGHT - 5, anchor="middle", class_="faint"),
        ]
        parts.append(element("g", element("title", name), *marks, class_=_series(number)))
    medians = ", ".join(
        f"{name or title}: median {np.median(values):.3g}" for name, values in finite.items() if values.size
    )
    return _figure(title, _svg(parts, f"Distribution of {title}. {medians}."))


def curve_chart(
    title: str,
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    x_title: str = "epoch",
    limits: tuple[float, float] | None = None,
) -> Markup:
    """Lines over a common axis, each with a colour and a dash of its own."""
    lines = {
        name: [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
        for name, points in series.items()
    }
    every = [point for points in lines.values() for point in points]
    if not every:
        return _figure(title, element("p", "Nothing was measured."))
    xs, ys = [x for x, _ in every], [y for _, y in every]
    low, high = limits or (min(ys), max(ys))
    margin = 0.04 * (high - low or abs(high) or 1.0)
    frame = _Frame((min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1), (low - margin, high + margin))
    parts = [
        *frame.rules_y(),
        *frame.ticks_x(whole=True),
        _text(x_title, _WIDTH - _RIGHT, _HEIGHT - 4, anchor="end"),
    ]
    legend = []
    for number, (name, points) in enumerate(lines.items()):
        dash = _DASHES[number % len(_DASHES)]
        path = " ".join(f"{_n(frame.x(x))},{_n(frame.y(y))}" for x, y in points)
        line = element("polyline", points=path, class_="line", stroke_dasharray=dash)
        dot = (
            element("circle", cx=_n(frame.x(points[0][0])), cy=_n(frame.y(points[0][1])), r=3, class_="mark")
            if len(points) == 1
            else None
        )
        parts.append(element("g", element("title", name), line, dot, class_=_series(number)))
        legend.append((name, number, dash))
    return _figure(title, _svg(parts, f"{title} over {x_title}: {', '.join(lines)}."), _legend(legend))


def forest_chart(title: str, rows: Sequence[tuple[str, float, float, float, str]], note: str) -> Markup:
    """Intervals one below the other round a line at zero.

    Args:
        title: heading.
        rows: (name, value, low, high, what is written beside it).
        note: what the axis is.
    """
    rows = [row for row in rows if all(map(math.isfinite, row[1:4]))]
    if not rows:
        return _figure(title, element("p", "No difference is defined."))
    left, right, height = 190.0, 220.0, 26.0
    width = 760.0
    low = min(0.0, *(row[2] for row in rows))
    high = max(0.0, *(row[3] for row in rows))
    margin = 0.05 * (high - low or 1.0)
    low, high = low - margin, high + margin

    def at(value: float) -> float:
        return left + (value - low) / (high - low) * (width - left - right)

    bottom = height * len(rows) + 12
    parts = [element("line", x1=_n(at(0)), x2=_n(at(0)), y1=6, y2=_n(bottom), class_="axis")]
    for number, (name, value, below, above, text) in enumerate(rows):
        y = height * number + 22
        parts += [
            _text(_short(name, 30), left - 12, y + 4, anchor="end"),
            element(
                "g",
                element("title", name),
                element("line", x1=_n(at(below)), x2=_n(at(above)), y1=y, y2=y, class_="line"),
                element("rect", x=_n(at(value) - 4.5), y=y - 4.5, width=9, height=9, class_="mark"),
                class_="s1",
            ),
            _text(text, width - right + 12, y + 4),
        ]
    for value in ticks(low, high):
        parts.append(_text(f"{value:g}", at(value), bottom + 14, anchor="middle", class_="faint"))
    parts.append(_text(note, width - right + 12, bottom + 14, class_="faint"))
    told = "; ".join(f"{name}: {text}" for name, *_, text in rows)
    return _figure(title, _svg(parts, f"{title}. {told}.", width, bottom + 22), wide=True)


def calibration_chart(
    title: str, bins: Sequence[tuple[float, float, int]], *, error: float | None = None
) -> Markup:
    """Observed share over predicted probability; on the diagonal a model is as sure as it is right.

    Args:
        title: heading.
        bins: (mean predicted probability, observed share, voxels) of every bin.
        error: expected calibration error, written below.
    """
    filled = [one for one in bins if one[2]]
    if not filled:
        return _figure(title, element("p", "No voxel was predicted."))
    frame = _Frame((0.0, 1.0), (0.0, 1.0))
    most = max(voxels for *_, voxels in filled)
    diagonal = element(
        "line",
        x1=_n(frame.x(0)), y1=_n(frame.y(0)), x2=_n(frame.x(1)), y2=_n(frame.y(1)),
        class_="axis", stroke_dasharray="4 4",
    )  # fmt: skip
    points = " ".join(f"{_n(frame.x(p))},{_n(frame.y(q))}" for p, q, _ in filled)
    dots = [
        element(
            "circle",
            element("title", f"predicted {p:.2f}, observed {q:.2f}, {voxels} voxels"),
            cx=_n(frame.x(p)),
            cy=_n(frame.y(q)),
            r=_n(2.5 + 5 * math.sqrt(voxels / most)),
            class_="mark",
        )
        for p, q, voxels in filled
    ]
    parts = [
        *frame.rules_y(), *frame.ticks_x(), diagonal,
        element("g", element("polyline", points=points, class_="line"), *dots, class_="s1"),
    ]  # fmt: skip
    note = element(
        "p",
        "Observed share of true voxels over predicted probability; larger dots stand for more voxels."
        + ("" if error is None else f" Expected calibration error {error:.3f}."),
        class_="note",
    )
    return _figure(title, _svg(parts, title), note)


class _Frame:
    """From values to places in the picture."""

    def __init__(self, xs: tuple[float, float], ys: tuple[float, float]) -> None:
        self.xs, self.ys = xs, ys

    def x(self, value: float) -> float:
        low, high = self.xs
        return _LEFT + (value - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        low, high = self.ys
        return _HEIGHT - _BOTTOM - (value - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    def rules_y(self) -> list[Markup]:
        rules = []
        for value in ticks(*self.ys, 4):
            y = _n(self.y(value))
            rules += [
                element("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=y, y2=y, class_="rule"),
                _text(f"{value:g}", _LEFT - 6, self.y(value) + 4, anchor="end", class_="faint"),
            ]
        return rules

    def ticks_x(self, *, whole: bool = False) -> list[Markup]:
        values = [value for value in ticks(*self.xs, 6) if not whole or value == int(value)]
        return [
            _text(f"{value:g}", self.x(value), _HEIGHT - _BOTTOM + 15, anchor="middle", class_="faint")
            for value in values
        ]


def _histogram(frame: _Frame, values: np.ndarray, middle: float) -> Markup:
    counts, edges = np.histogram(values, bins=24)
    half = 0.36 * counts / counts.max()
    right = [(middle + w, y) for w, pair in zip(half, itertools.pairwise(edges), strict=True) for y in pair]
    left = [(2 * middle - x, y) for x, y in reversed(right)]
    points = " ".join(f"{_n(frame.x(float(x)))},{_n(frame.y(float(y)))}" for x, y in [*right, *left])
    return element("polygon", points=points, class_="soft")


def _box(frame: _Frame, values: np.ndarray, middle: float) -> list[Markup]:
    low, median, high = (float(value) for value in np.percentile(values, (25, 50, 75)))
    reach = 1.5 * (high - low)
    ends = float(values[values >= low - reach].min()), float(values[values <= high + reach].max())
    x, width = frame.x(middle - 0.12), frame.x(middle + 0.12) - frame.x(middle - 0.12)
    centre = _n(frame.x(middle))
    return [
        element("line", x1=centre, x2=centre, y1=_n(frame.y(ends[0])), y2=_n(frame.y(low)), class_="line"),
        element("line", x1=centre, x2=centre, y1=_n(frame.y(high)), y2=_n(frame.y(ends[1])), class_="line"),
        element(
            "rect",
            x=_n(x),
            y=_n(frame.y(high)),
            width=_n(width),
            height=_n(frame.y(low) - frame.y(high)),
            class_="soft",
        ),
        element(
            "line", x1=_n(x), x2=_n(x + width), y1=_n(frame.y(median)), y2=_n(frame.y(median)), class_="line"
        ),
    ]


def _svg(parts: Sequence[Markup], told: str, width: float = _WIDTH, height: float = _HEIGHT) -> Markup:
    return element("svg", *parts, viewBox=f"0 0 {width:g} {height:g}", role="img", aria_label=told)


def _figure(title: str, *children: Markup, wide: bool = False) -> Markup:
    return element("figure", element("h3", title), *children, class_="chart wide" if wide else "chart")


def _legend(entries: Sequence[tuple[str, int, str | None]]) -> Markup:
    items = []
    for name, number, dash in entries:
        line = element("line", x1=0, x2=28, y1=6, y2=6, class_="line", stroke_dasharray=dash)
        key = element(
            "svg", element("g", line, class_=_series(number)), viewBox="0 0 28 12", aria_hidden="true"
        )
        items.append(element("li", join(key, name)))
    return element("ul", *items, class_="legend")


def _text(text: str, x: float, y: float, *, anchor: str | None = None, class_: str | None = None) -> Markup:
    return element("text", text, x=_n(x), y=_n(y), text_anchor=anchor, class_=class_)


def _series(number: int) -> str:
    return f"s{number % _SERIES + 1}"


def _short(text: str, longest: int = _LONGEST_NAME) -> str:
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def _n(value: float) -> str:
    return f"{value:.1f}"
