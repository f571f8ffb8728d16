"""Comparing models on the same cases: bootstrap intervals, the signed-rank test, how many cases got worse."""

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
    """Wilcoxon signed-rank test, two-sided; that of Rosner, Glynn and Lee where cases are of one patient."""
    better: int
    """Cases in which the second model is better."""
    worse: int
    equal: int


def bca_interval(
    values: Sequence[float] | np.ndarray,
    *,
    clusters: Sequence[str] | None = None,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    r"""Bias-corrected and accelerated (BCa) bootstrap interval of the mean over cases.

    With the mean t of the n values, the means t* of ``resamples`` resamples, z0 the normal quantile of the share of t*
    below t (half of the equal ones counting as below), and the acceleration
    ``a = sum d^3 / (6 (sum d^2)^1.5)`` from d = mean of the jackknife means minus each of them, the ends are the
    ``Phi(z0 + (z0 + z) / (1 - a (z0 + z)))`` quantiles of t* at z = Phi^-1((1 -+ confidence) / 2).

    With ``clusters``, whole clusters are resampled and left out by the jackknife: cases of one patient are not
    independent, and counting them as if they were makes the interval too narrow. The mean stays that over cases.

    NaN and infinite values are left out. With fewer than two values (clusters) there is no interval (NaN); with equal
    ones it is a point. The same ``seed`` gives the same interval.

    Source: Efron 1987, "Better bootstrap confidence intervals", JASA 82:171; clusters: Field and Welsh 2007,
    "Bootstrapping clustered data", JRSS B 69:369.

    Args:
        values: one a case.
        clusters: the patient of every case; None takes each case for a patient of its own.
        confidence: share of the intervals that hold the true mean.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        UsageError: ``confidence`` is not between 0 and 1, ``resamples`` is below 100, or ``clusters`` has another
            length.

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
    defined = np.isfinite(sample)
    group = _cluster_indices(clusters, len(sample))[defined]
    sample = sample[defined]
    # Of every cluster the sum and the number of its cases; without clusters the cases themselves.
    _, group = np.unique(group, return_inverse=True)
    sums, sizes = np.bincount(group, weights=sample), np.bincount(group)
    count = len(sums)
    if count < 2:
        return Interval(math.nan, math.nan)
    mean = float(sample.mean())
    if np.ptp(sample) == 0:
        return Interval(mean, mean)
    means = _resampled_means(sums, sizes, resamples, seed)
    below = float((means < mean).mean() + (means == mean).mean() / 2)
    # A share of 0 or 1 has no finite quantile; half a resample is what can be told from it at most.
    z0 = _NORMAL.inv_cdf(min(max(below, 0.5 / resamples), 1 - 0.5 / resamples))
    jackknife = (sample.sum() - sums) / (len(sample) - sizes)
    deviation = jackknife.mean() - jackknife
    acceleration = float((deviation**3).sum() / (6 * (deviation**2).sum() ** 1.5))
    ends = []
    for tail in ((1 - confidence) / 2, (1 + confidence) / 2):
        z = z0 + _NORMAL.inv_cdf(tail)
        ends.append(_NORMAL.cdf(z0 + z / (1 - acceleration * z)))
    low, high = np.quantile(means, ends)
    return Interval(float(low), float(high))


def wilcoxon_signed_rank(
    differences: Sequence[float] | np.ndarray, *, clusters: Sequence[str] | None = None
) -> float:
    """Two-sided p of the Wilcoxon signed-rank test that paired differences are symmetric about zero.

    Zeros are dropped (Wilcoxon's rule) and tied differences share their mean rank. Up to 50 differences the
    p is exact, ties included: the share of all assignments of signs to the ranks that are as extreme. Above, it comes
    from the normal approximation with the variance corrected for ties. Without any difference p is 1.

    With ``clusters`` (the patient of every difference) the signs of a patient's differences change together: the signed
    ranks of each patient are summed, and the sums take the place of the ranks. Patients of one case each give the test
    above.

    Source: Wilcoxon 1945, "Individual comparisons by ranking methods"; Rosner, Glynn and Lee 2006, "The Wilcoxon signed
    rank test for paired comparisons of clustered data", Biometrics 62:185.

    Example:
        >>> wilcoxon_signed_rank([0.1, 0.3, 0.2, -0.05, 0.4])
        0.125
    """
    values = np.asarray(differences, dtype=np.float64)
    counted = np.isfinite(values) & (values != 0)
    group = _cluster_indices(clusters, len(values))[counted]
    values = values[counted]
    if len(values) == 0:
        return 1.0
    _, group = np.unique(group, return_inverse=True)
    signed = np.bincount(group, weights=np.sign(values) * _mean_ranks(np.abs(values)))
    ranks = np.abs(signed)
    positive = float(ranks[signed > 0].sum())
    if len(signed) <= _EXACT_UP_TO:
        return _exact_p(ranks, positive)
    # Mean and variance where every sign is a coin's: half the sum, a quarter of the squares; ties are in the squares.
    deviation = math.sqrt(float((ranks**2).sum()) / 4)
    return (
        min(1.0, 2 * _NORMAL.cdf(-abs(positive - float(ranks.sum()) / 2) / deviation)) if deviation else 1.0
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """p of several tests, adjusted so that the chance of any false finding among them keeps its level.

    The k-th smallest of m is multiplied by m - k + 1, no adjusted p is below a smaller one's, and none above 1. NaN (no
    test) stays NaN and does not count.

    Source: Holm 1979, "A simple sequentially rejective multiple test procedure", Scand. J. Statist. 6:65.

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    tested = sorted((p, index) for index, p in enumerate(p_values) if not math.isnan(p))
    adjusted, least = [math.nan] * len(p_values), 0.0
    for rank, (p, index) in enumerate(tested):
        least = max(least, min(1.0, (len(tested) - rank) * p))
        adjusted[index] = least
    return adjusted


def compare_paired(
    first: Sequence[float] | np.ndarray,
    second: Sequence[float] | np.ndarray,
    *,
    higher_is_better: bool = True,
    equal_within: float = 1e-9,
    clusters: Sequence[str] | None = None,
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
        clusters: the patient of every case, where patients have several; interval and test are then by patient.
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
    kept = None if clusters is None else [name for name, use in zip(clusters, defined, strict=True) if use]
    gains = differences if higher_is_better else -differences
    return PairedComparison(
        cases=len(differences),
        undefined=int(len(one) - len(differences)),
        mean_difference=float(differences.mean()) if len(differences) else math.nan,
        interval=bca_interval(
            differences, clusters=kept, confidence=confidence, resamples=resamples, seed=seed
        ),
        p_value=wilcoxon_signed_rank(differences, clusters=kept) if len(differences) else math.nan,
        better=int((gains > 0).sum()),
        worse=int((gains < 0).sum()),
        equal=int((gains == 0).sum()),
    )


def _cluster_indices(clusters: Sequence[str] | None, count: int) -> np.ndarray:
    if clusters is None:
        return np.arange(count)
    if len(clusters) != count:
        raise UsageError(
            f"clusters must name the patient of every case, got {len(clusters)} for {count} cases"
        )
    _, index = np.unique(np.asarray(clusters), return_inverse=True)
    return index


def _resampled_means(sums: np.ndarray, sizes: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    means = np.empty(resamples)
    # In pieces of equal size, so that many cases need no gigabytes and the numbers do not depend on the piece.
    step = max(1, _VALUES_AT_ONCE // len(sums))
    for start in range(0, resamples, step):
        stop = min(start + step, resamples)
        drawn = random.integers(len(sums), size=(stop - start, len(sums)))
        means[start:stop] = sums[drawn].sum(1) / sizes[drawn].sum(1)
    return means


def _mean_ranks(magnitudes: np.ndarray) -> np.ndarray:
    """Ranks from 1, ties sharing their mean."""
    _, group, sizes = np.unique(magnitudes, return_inverse=True, return_counts=True)
    last = np.cumsum(sizes)
    ranks: np.ndarray = (last - (sizes - 1) / 2)[group]
    return ranks


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
