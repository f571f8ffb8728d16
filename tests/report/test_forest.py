"""Forest plot: colours say what is better, arms must agree."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from pictures import has_colour, pixels

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


def test_p_stands_beside_the_intervals(tmp_path: Path) -> None:
    path = tmp_path / "forest.png"
    save_forest(path, {"M": [Effect("a", 0.2, Interval(-0.4, 0.6), math.nan)]}, baseline="plain")
    grey = np.abs(pixels(path) - (0x5C, 0x66, 0x70)).max(-1) < 12
    columns = np.nonzero(grey[grey.sum(1) > 100].any(0))[0]  # of the interval, not of the numbers below
    frame = np.nonzero((pixels(path) < 140).all(-1).mean(0) > 0.3)[0]  # its sides, and the line at zero
    assert (columns.max() - frame.min()) / (frame.max() - frame.min()) < 0.85


def test_metrics_of_different_arms_are_refused(tmp_path: Path) -> None:
    one, other = (Effect(name, 0.0, Interval(0, 0), 1.0) for name in "ab")
    with pytest.raises(UsageError, match="same arms"):
        save_forest(tmp_path / "f.png", {"A": [one], "B": [other]}, baseline="plain")
