"""Comparing two models on the same cases: bootstrap intervals, the signed-rank test, how many cases got worse."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from lungkit.errors import UsageError

_NORMAL = NormalDist()
_EXACT_UP_TO = 50
_VALUES_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Interval:
    """A confidence interval."""

    low: float
    high: float


@dataclass(frozen=True)
class PairedComparison:
    """What changes from a first model to a second one, over the cases that both define."""

    cases: int
    undefined: int
    """Cases left out because a value of either model is NaN or infinite."""
    mean_difference: float
    """Mean of second minus first."""
    interval: Interval
    """BCa bootstrap interval of the mean difference."""
    p_value: float
    """Wilcoxon signed-rank test, two-sided."""
    better: int
    """Cases in which the second model is better."""
    worse: int
    equal: int


def bca_interval(
    values: Sequence[float] | np.ndarray, *, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Interval:
    r"""Bias-corrected and accelerated (BCa) bootstrap interval of the mean over cases.

    With the mean t of the n values, the means t* of ``resamples`` resamples, z0 the normal quantile of the share of t*
    below t (half of the equal ones counting as below), and the acceleration
    ``a = sum d^3 / (6 (sum d^2)^1.5)`` from d = mean of the jackknife means minus each of them, the ends are the
    ``Phi(z0 + (z0 + z) / (1 - a (z0 + z)))`` quantiles of t* at z = Phi^-1((1 -+ confidence) / 2).

    NaN and infinite values are left out. With fewer than two values there is no interval (NaN); with equal ones it is a
    point. The same ``seed`` gives the same interval.

    Source: Efron 1987, "Better bootstrap confidence intervals", JASA 82:171.

    Raises:
        UsageError: ``confidence`` is not between 0 and 1, or ``resamples`` is below 100.

    Example:
        >>> interval = bca_interval([0.71, 0.80, 0.64, 0.90, 0.85, 0.77, 0.58, 0.83])
        >>> round(interval.low, 2), round(interval.high, 2)
        (0.68, 0.82)
    """
    if not 0 < confidence < 1:
        raise UsageError(f"confidence must be between 0 and 1, got {confidence}")
    if resamples < 100:
        raise UsageError(f"resamples must be at least 100, got {resamples}")
    sample = np.asarray(values, dtype=np.float64)
    sample = sample[np.isfinite(sample)]
    count = len(sample)
    if count < 2:
        return Interval(math.nan, math.nan)
    mean = float(sample.mean())
    if np.ptp(sample) == 0:
        return Interval(mean, mean)
    means = _resampled_means(sample, resamples, seed)
    below = float((means < mean).mean() + (means == mean).mean() / 2)
    # A share of 0 or 1 has no finite quantile; half a resample is what can be told from it at most.
    z0 = _NORMAL.inv_cdf(min(max(below, 0.5 / resamples), 1 - 0.5 / resamples))
    jackknife = (sample.sum() - sample) / (count - 1)
    deviation = jackknife.mean() - jackknife
    acceleration = float((deviation**3).sum() / (6 * (deviation**2).sum() ** 1.5))
    ends = []
    for tail in ((1 - confidence) / 2, (1 + confidence) / 2):
        z = z0 + _NORMAL.inv_cdf(tail)
        ends.append(_NORMAL.cdf(z0 + z / (1 - acceleration * z)))
    low, high = np.quantile(means, ends)
    return Interval(float(low), float(high))


def wilcoxon_signed_rank(differences: Sequence[float] | np.ndarray) -> float:
    """Two-sided p of the Wilcoxon signed-rank test that paired differences are symmetric about zero.

    Zeros are dropped (Wilcoxon's rule) and tied differences share their mean rank. Up to 50 differences the
    p is exact, ties included: the share of all assignments of signs to the ranks that are as extreme. Above, it comes
    from the normal approximation with the variance corrected for ties. Without any difference p is 1.

    Source: Wilcoxon 1945, "Individual comparisons by ranking methods".

    Example:
        >>> wilcoxon_signed_rank([0.1, 0.3, 0.2, -0.05, 0.4])
        0.125
    """
    values = np.asarray(differences, dtype=np.float64)
    values = values[np.isfinite(values) & (values != 0)]
    count = len(values)
    if count == 0:
        return 1.0
    ranks, ties = _mean_ranks(np.abs(values))
    positive = float(ranks[values > 0].sum())
    if count <= _EXACT_UP_TO:
        return _exact_p(ranks, positive)
    mean = count * (count + 1) / 4
    variance = count * (count + 1) * (2 * count + 1) / 24 - float((ties**3 - ties).sum()) / 48
    return min(1.0, 2 * _NORMAL.cdf(-abs(positive - mean) / math.sqrt(variance)))


def compare_paired(
    first: Sequence[float] | np.ndarray,
    second: Sequence[float] | np.ndarray,
    *,
    higher_is_better: bool = True,
    equal_within: float = 1e-9,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> PairedComparison:
    """Compare one metric of two models case by case.

    Args:
        first: the metric of the first model, one value a case.
        second: that of the second model, for the same cases in the same order.
        higher_is_better: true for Dice, false for a distance.
        equal_within: differences up to this are no difference.
        confidence: of the bootstrap interval.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        UsageError: the lengths differ.

    Example:
        >>> result = compare_paired([0.5, 0.6, 0.7, float("nan")], [0.6, 0.6, 0.9, 0.8])
        >>> result.cases, result.undefined, round(result.mean_difference, 3), result.better, result.worse
        (3, 1, 0.1, 2, 0)
    """
    one, two = (np.asarray(values, dtype=np.float64) for values in (first, second))
    if one.shape != two.shape or one.ndim != 1:
        raise UsageError(
            f"first and second must hold one value a case of the same cases, got {one.shape} and {two.shape}"
        )
    defined = np.isfinite(one) & np.isfinite(two)
    differences = two[defined] - one[defined]
    differences[np.abs(differences) <= equal_within] = 0
    gains = differences if higher_is_better else -differences
    return PairedComparison(
        cases=len(differences),
        undefined=int(len(one) - len(differences)),
        mean_difference=float(differences.mean()) if len(differences) else math.nan,
        interval=bca_interval(differences, confidence=confidence, resamples=resamples, seed=seed),
        p_value=wilcoxon_signed_rank(differences) if len(differences) else math.nan,
        better=int((gains > 0).sum()),
        worse=int((gains < 0).sum()),
        equal=int((gains == 0).sum()),
    )


def _resampled_means(sample: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    means = np.empty(resamples)
    # In pieces of equal size, so that many cases need no gigabytes and the numbers do not depend on the piece.
    step = max(1, _VALUES_AT_ONCE // len(sample))
    for start in range(0, resamples, step):
        stop = min(start + step, resamples)
        means[start:stop] = sample[random.integers(len(sample), size=(stop - start, len(sample)))].mean(1)
    return means


def _mean_ranks(magnitudes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ranks from 1, ties sharing their mean; and the sizes of the groups of ties."""
    _, group, sizes = np.unique(magnitudes, return_inverse=True, return_counts=True)
    last = np.cumsum(sizes)
    return (last - (sizes - 1) / 2)[group], sizes.astype(np.float64)


def _exact_p(ranks: np.ndarray, positive: float) -> float:
    # Mean ranks are whole or half: doubled, the sums of all subsets of them are counted by a short recurrence.
    doubled = np.rint(2 * ranks).astype(int)
    ways = np.zeros(doubled.sum() + 1)
    ways[0] = 1
    for rank in doubled:
        ways[rank:] = ways[rank:] + ways[: len(ways) - rank]
    at = round(2 * positive)
    share = min(ways[: at + 1].sum(), ways[at:].sum()) / ways.sum()
    return min(1.0, 2 * float(share))
