"""The table of cases: means, what is left out of them, what the policy decided."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lungkit.errors import UsageError
from lungkit.metrics import CaseTable, EmptyPolicy, evaluate_case

LABELS = {"background": 0, "tumour": 1, "lung": 2}


def table_of(policy: EmptyPolicy = EmptyPolicy.NAN) -> CaseTable:
    table = CaseTable(empty=policy)
    pairs = {
        "full": ([1, 1, 2, 0], [1, 1, 2, 0]),
        "half": ([1, 0, 2, 2], [1, 1, 2, 2]),
        "none": ([0] * 4, [0] * 4),
    }
    for case_id, (prediction, truth) in pairs.items():
        table.add(case_id, evaluate_case(np.array(prediction), np.array(truth), 3, empty=policy), LABELS)
    return table


def test_background_has_no_row() -> None:
    assert table_of().labels == ("tumour", "lung")


def test_mean_leaves_nan_out_and_counts_it() -> None:
    summary = table_of().summary("tumour")["dice"]
    assert (summary.mean, summary.cases, summary.undefined) == (pytest.approx((1 + 2 / 3) / 2), 2, 1)


def test_policy_that_fills_in_is_counted() -> None:
    summary = table_of(EmptyPolicy.PERFECT_IF_BOTH_EMPTY).summary("tumour")["dice"]
    assert (summary.cases, summary.undefined, summary.decided_by_policy) == (3, 0, 1)


def test_mean_over_the_classes() -> None:
    assert table_of().mean("dice") == pytest.approx(((1 + 2 / 3) / 2 + 1) / 2)


def test_mean_is_nan_where_no_case_defines_the_metric() -> None:
    table = CaseTable()
    table.add_row("a", "tumour", {"dice": math.nan})
    assert math.isnan(table.mean("dice"))


def test_std_is_the_sample_standard_deviation() -> None:
    table = CaseTable()
    for case_id, value in (("a", 0.2), ("b", 0.6)):
        table.add_row(case_id, "tumour", {"dice": value})
    assert table.summary("tumour")["dice"].std == pytest.approx(math.sqrt(0.08))


def test_single_case_has_no_standard_deviation() -> None:
    table = CaseTable()
    table.add_row("a", "tumour", {"dice": 0.5})
    assert math.isnan(table.summary("tumour")["dice"].std)


def test_unknown_metric_is_refused_by_name() -> None:
    with pytest.raises(UsageError, match=r"'hd'.*dice"):
        table_of().mean("hd")


def test_row_with_other_metrics_is_refused() -> None:
    table = CaseTable()
    table.add_row("a", "tumour", {"dice": 0.5})
    with pytest.raises(UsageError, match="case b"):
        table.add_row("b", "tumour", {"iou": 0.5})


def test_label_beyond_the_classes_is_refused() -> None:
    overlap = evaluate_case(np.array([0, 1]), np.array([0, 1]), 2)
    with pytest.raises(UsageError, match="'lung' has index 2"):
        CaseTable().add("a", overlap, LABELS)
