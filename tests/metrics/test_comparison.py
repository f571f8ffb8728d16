"""Comparison of two models: intervals and p values against scipy, counts by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from lungkit.errors import UsageError
from lungkit.metrics import bca_interval, compare_paired, holm, wilcoxon_signed_rank


@pytest.mark.parametrize("count", [5, 20, 200])
@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_bca_interval_is_scipys(count: int, confidence: float) -> None:
    sample = np.random.default_rng(count).beta(6, 2, count)
    ours = bca_interval(sample, confidence=confidence, resamples=40_000)
    theirs = stats.bootstrap(
        (sample,), np.mean, method="BCa", confidence_level=confidence, n_resamples=40_000, rng=0
    ).confidence_interval
    width = theirs.high - theirs.low
    # Two bootstraps of 40,000 resamples differ by the noise of their quantiles.
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.03 * width)


def test_bca_interval_of_skewed_values_is_not_symmetric() -> None:
    sample = np.random.default_rng(0).exponential(size=40)
    interval = bca_interval(sample)
    assert interval.high - sample.mean() > 1.1 * (sample.mean() - interval.low)


def test_same_seed_gives_the_same_interval() -> None:
    sample = np.random.default_rng(0).random(30)
    assert bca_interval(sample, seed=1) == bca_interval(sample, seed=1) != bca_interval(sample, seed=2)


def test_equal_values_give_a_point() -> None:
    interval = bca_interval([0.5, 0.5, 0.5])
    assert (interval.low, interval.high) == (0.5, 0.5)


def test_one_value_has_no_interval() -> None:
    assert math.isnan(bca_interval([0.5, math.nan]).low)


@pytest.mark.parametrize("options", [{"confidence": 1.0}, {"resamples": 10}])
def test_options_out_of_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=next(iter(options))):
        bca_interval([0.1, 0.2], **options)


@pytest.mark.parametrize("count", [1, 2, 7, 30, 50])
def test_p_of_few_cases_is_scipys_exact_one(count: int) -> None:
    differences = np.random.default_rng(count).normal(0.3, 1, count)
    assert wilcoxon_signed_rank(differences) == pytest.approx(
        stats.wilcoxon(differences, method="exact").pvalue
    )


def test_p_of_many_cases_is_scipys_approximation() -> None:
    differences = np.round(np.random.default_rng(0).normal(0.1, 1, 300), 1)
    expected = stats.wilcoxon(differences, zero_method="wilcox", method="approx").pvalue
    assert wilcoxon_signed_rank(differences) == pytest.approx(expected)


def test_p_with_ties_counts_all_assignments_of_signs() -> None:
    differences = np.array([1, 1, -1, 2, 2, 3, -3, 4])
    ranks = stats.rankdata(np.abs(differences))
    signs = (np.arange(2**8)[:, None] >> np.arange(8)) & 1
    sums = signs @ ranks
    observed = ranks[differences > 0].sum()
    expected = min(1, 2 * min((sums >= observed).mean(), (sums <= observed).mean()))
    assert wilcoxon_signed_rank(differences) == pytest.approx(expected)


def test_no_difference_is_p_one() -> None:
    assert wilcoxon_signed_rank([0.0, 0.0]) == 1.0


def test_cases_are_counted_by_hand() -> None:
    result = compare_paired([0.5, 0.5, 0.5, 0.5, math.nan, 0.5], [0.6, 0.4, 0.5, 0.9, 0.5, math.inf])
    assert (result.cases, result.undefined, result.better, result.worse, result.equal) == (4, 2, 2, 1, 1)
    assert result.mean_difference == pytest.approx(0.1)


def test_lower_is_better_for_distances() -> None:
    result = compare_paired([5.0, 5.0], [3.0, 4.0], higher_is_better=False)
    assert (result.better, result.worse, result.mean_difference) == (2, 0, -1.5)


def test_difference_within_tolerance_is_equal() -> None:
    assert compare_paired([0.5], [0.5001], equal_within=0.001).equal == 1


def test_no_common_case_has_no_numbers() -> None:
    result = compare_paired([math.nan], [0.5])
    assert math.isnan(result.mean_difference)
    assert math.isnan(result.p_value)


def test_lengths_that_differ_are_refused() -> None:
    with pytest.raises(UsageError, match=r"\(2,\) and \(1,\)"):
        compare_paired([0.5, 0.6], [0.5])


def test_patients_of_one_case_are_the_cases_themselves() -> None:
    random = np.random.default_rng(3)
    values = random.normal(0.1, 1, 60)
    names = [str(number) for number in random.permutation(60)]
    assert wilcoxon_signed_rank(values, clusters=names) == pytest.approx(wilcoxon_signed_rank(values))
    assert bca_interval(values, clusters=[f"{i:02d}" for i in range(60)]) == bca_interval(values)


def test_copies_of_a_patients_case_narrow_no_interval() -> None:
    values = np.random.default_rng(4).normal(0, 1, 20)
    names = [str(number) for number in range(20)]
    copied, owners = np.repeat(values, 5), np.repeat(names, 5).tolist()
    one, several = bca_interval(values), bca_interval(copied, clusters=owners)
    naive = bca_interval(copied)
    assert several.high - several.low == pytest.approx(one.high - one.low, rel=0.05)
    assert naive.high - naive.low < 0.6 * (several.high - several.low)


def test_signs_of_a_patients_cases_change_together() -> None:
    # Three patients: of the 8 ways to give them a sign, 2 are as extreme as all cases being better.
    values, owners = [1, 2, 3, 4, 5, 6, 7], ["a", "a", "a", "b", "b", "c", "c"]
    assert wilcoxon_signed_rank(values, clusters=owners) == pytest.approx(2 / 8)


def test_clusters_of_another_length_are_refused() -> None:
    with pytest.raises(UsageError, match="patient of every case, got 1 for 2 cases"):
        bca_interval([0.1, 0.2], clusters=["a"])


def test_holm_orders_multiplies_and_never_falls() -> None:
    assert holm([0.001, 0.2, 0.015, math.nan, 0.9]) == pytest.approx(
        [0.004, 0.4, 0.045, math.nan, 0.9], nan_ok=True
    )
    assert holm([0.6, 0.7]) == [1.0, 1.0]
