"""Charts show what they were given."""

from __future__ import annotations

import re

import numpy as np
import pytest

from lungkit.report.html.charts import (
    calibration_chart,
    curve_chart,
    distribution_chart,
    forest_chart,
    ticks,
)


def test_few_cases_are_dots_and_undefined_ones_are_counted() -> None:
    chart = distribution_chart("Dice", {"A": np.array([0.2, 0.4, np.nan, 0.9])})
    assert chart.count("<circle") == 3
    assert "n = 3 of 4" in chart


def test_many_cases_are_an_outline_of_a_size_that_does_not_grow() -> None:
    values = np.random.default_rng(0).random(10_000)
    chart = distribution_chart("Dice", {"A": values})
    assert "<circle" not in chart
    assert len(chart) < 5_000


def test_hostile_names_of_groups_are_text() -> None:
    assert "<script>" not in distribution_chart("<script>", {"<script>": np.arange(9.0)})
    assert "<script>" not in curve_chart("a", {"<script>": [(0, 1)]})
    assert "<script>" not in forest_chart("a", [("<script>", 0.1, 0.0, 0.2, "<script>")], "")


def test_a_curve_falls_where_its_values_do() -> None:
    chart = curve_chart("Loss", {"train": [(1, 3.0), (2, 2.0), (3, 1.0)]})
    points = re.search(r'points="([^"]*)"', chart)
    assert points is not None
    ys = [float(point.split(",")[1]) for point in points[1].split()]
    assert ys == sorted(ys)  # downward in the picture


def test_an_interval_that_excludes_zero_lies_on_one_side_of_the_line() -> None:
    chart = forest_chart("d", [("Dice", 0.2, 0.1, 0.3, "0.2")], "")
    ends = re.findall(r'<line x1="([\d.]+)" x2="([\d.]+)"', chart)
    (zero, _), (low, high) = ((float(a), float(b)) for a, b in ends[:2])
    assert zero < low < high


def test_nothing_to_show_is_said() -> None:
    assert "No case has a value" in distribution_chart("Dice", {"A": np.array([np.nan])})
    assert "Nothing was measured" in curve_chart("Loss", {})
    assert "No difference is defined" in forest_chart("d", [("Dice", np.nan, 0, 0, "-")], "")
    assert "No voxel" in calibration_chart("c", [])


def test_a_calibrated_model_lies_on_the_diagonal() -> None:
    chart = calibration_chart("c", [(0.25, 0.25, 10), (0.75, 0.75, 20)], error=0.0)
    places = [(float(x), float(y)) for x, y in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', chart)]
    diagonal = re.search(r'x1="([\d.]+)" y1="([\d.]+)" x2="([\d.]+)" y2="([\d.]+)"', chart)
    assert diagonal is not None
    x1, y1, x2, y2 = map(float, diagonal.groups())
    for x, y in places:
        assert (y - y1) * (x2 - x1) == pytest.approx((x - x1) * (y2 - y1), rel=0.01)


def test_ticks_of_a_single_value_are_that_value() -> None:
    assert ticks(3, 3) == [3]
