"""Calibration: scores by their formulas, in one go or case by case."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lungkit.errors import UsageError
from lungkit.metrics.calibration import Calibration


def test_scores_are_those_of_the_formulas():
    random = np.random.default_rng(0)
    p, y = random.random(500), random.integers(0, 5, 500) / 4
    seen = Calibration(bins=10)
    seen.add(p, y)
    assert seen.brier == pytest.approx(np.mean((p - y) ** 2))
    place = np.floor(p * 10)
    gaps = [abs(p[place == b].mean() - y[place == b].mean()) * (place == b).sum() for b in np.unique(place)]
    assert seen.ece == pytest.approx(sum(gaps) / 500)
    predicted, observed, counts = seen.curve
    assert counts.sum() == 500
    assert observed[0] == pytest.approx(y[place == 0].mean()) and predicted[-1] == pytest.approx(
        p[place == 9].mean()
    )


def test_parts_give_what_the_whole_gives():
    random = np.random.default_rng(1)
    p, y = random.random((2, 40))
    whole, first, second = Calibration(), Calibration(), Calibration()
    whole.add(p, y)
    first.add(p[:10], y[:10])
    second.add(p[10:], y[10:])
    first.merge(second)
    assert (first.ece, first.brier, first.voxels) == pytest.approx((whole.ece, whole.brier, 40))


def test_certainty_that_is_right_has_no_error():
    seen = Calibration()
    seen.add(np.array([0.0, 1.0, 1.0]), np.array([0.0, 1.0, 1.0]))
    assert (seen.ece, seen.brier) == (0, 0)


def test_nothing_seen_is_undefined():
    assert math.isnan(Calibration().ece) and math.isnan(Calibration().brier)


def test_what_is_no_probability_is_refused():
    with pytest.raises(UsageError, match=r"probability must lie in \[0, 1\], got -1 to 2"):
        Calibration().add(np.array([-1.0, 2.0]), np.array([0.0, 1.0]))
    with pytest.raises(UsageError, match="bins must be at least 1"):
        Calibration(bins=0)
