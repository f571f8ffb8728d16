"""Forest plot: colours say what is better, arms must agree."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from pictures import has_colour

from lungkit.errors import UsageError
from lungkit.metrics import Interval
from lungkit.report.forest import Effect, save_forest

GREEN, RED = "#2a9d6f", "#c0392b"


@pytest.mark.parametrize(
    ("effect", "lower", "expected"),
    [
        (Effect("a", 0.2, Interval(0.1, 0.3), 0.01), (), (True, False)),
        (Effect("a", 0.2, Interval(0.1, 0.3), 0.01), ("M",), (False, True)),
        (Effect("a", 0.2, Interval(-0.1, 0.3), 0.2), (), (False, False)),
        (Effect("a", math.nan, Interval(math.nan, math.nan), math.nan), (), (False, False)),
    ],
    ids=["better", "longer distance", "unclear", "undefined"],
)
def test_an_interval_without_zero_has_the_colour_of_its_side(
    tmp_path: Path, effect: Effect, lower: tuple[str, ...], expected: tuple[bool, bool]
) -> None:
    path = tmp_path / "forest.png"
    save_forest(path, {"M": [effect]}, baseline="plain", lower_is_better=lower)
    assert (has_colour(path, GREEN), has_colour(path, RED)) == expected


def test_metrics_of_different_arms_are_refused(tmp_path: Path) -> None:
    one, other = (Effect(name, 0.0, Interval(0, 0), 1.0) for name in "ab")
    with pytest.raises(UsageError, match="same arms"):
        save_forest(tmp_path / "f.png", {"A": [one], "B": [other]}, baseline="plain")
