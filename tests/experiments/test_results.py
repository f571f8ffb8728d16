"""What an experiment found: means over runs, pairing, tables."""

from __future__ import annotations

import csv
import io
import math

import pytest

from lungkit.errors import UsageError
from lungkit.experiments.results import compare_tables, format_comparison, merge_runs
from lungkit.metrics import CaseTable


def table(dice: dict[str, float], label: str = "tumour") -> CaseTable:
    result = CaseTable()
    for case_id, value in dice.items():
        result.add_row(case_id, label, {"dice": value, "hd95_directed_mm": 10 * (1 - value)})
    return result


ARMS = {
    "A": [table({"a": 0.5, "b": 0.6, "c": 0.7}), table({"a": 0.7, "b": 0.6, "c": 0.5})],
    "B": [table({"a": 0.9, "b": 0.6, "c": 0.5}), table({"a": 0.7, "b": 0.6, "c": 0.5})],
}


def test_case_counts_once_however_many_runs_there_were() -> None:
    dice = compare_tables(ARMS, ["dice"])[0]
    assert [arm.cases for arm in dice.arms] == [3, 3]
    assert [arm.mean for arm in dice.arms] == pytest.approx([0.6, (0.8 + 0.6 + 0.5) / 3])


def test_difference_is_paired_by_case() -> None:
    result = compare_tables(ARMS, ["dice"])[0].comparison
    assert (result.better, result.worse, result.equal) == (1, 1, 1)
    assert result.mean_difference == pytest.approx((0.2 + 0 - 0.1) / 3)


def test_smaller_distance_is_better() -> None:
    result = compare_tables(ARMS, ["hd95_directed_mm"])[0].comparison
    assert (result.better, result.worse) == (1, 1)


def test_spread_is_that_of_the_runs_means() -> None:
    arms = {"A": [table({"a": 0.5}), table({"a": 0.7})], "B": [table({"a": 0.5}), table({"a": 0.5})]}
    assert [arm.run_spread for arm in compare_tables(arms, ["dice"])[0].arms] == pytest.approx(
        [math.sqrt(0.02), 0]
    )


def test_case_undefined_in_one_run_is_undefined() -> None:
    merged = merge_runs([table({"a": 0.5, "b": 0.5}), table({"a": math.nan, "b": 0.7})])
    assert merged.column("dice", "tumour").tolist() == pytest.approx([math.nan, 0.6], nan_ok=True)


def test_folds_with_different_cases_are_put_together() -> None:
    merged = merge_runs([table({"b": 0.5}), table({"a": 0.7})])
    assert merged.case_ids == ("a", "b")


def test_every_class_has_its_rows() -> None:
    both = table({"a": 0.5})
    for row in table({"a": 0.8}, "node").rows:
        both.add_row(row.case_id, row.label, row.values)
    rows = compare_tables({"A": [both], "B": [both]}, ["dice"])
    assert [row.label for row in rows] == ["tumour", "node"]
    assert "class" in format_comparison(rows).splitlines()[0]


def test_readable_table() -> None:
    rows = compare_tables(ARMS, ["dice"], paper={"dice": (0.908, 0.952)})
    text = format_comparison(rows, style="markdown")
    assert "| Dice | 0.600 [0.600, 0.600] |" in text
    assert "| 1 / 1 / 1 |" in text
    assert "| 0.908 / 0.952 |" in text


def test_no_minus_zero_in_a_table() -> None:
    rows = compare_tables(
        {"A": [table({"a": 0.5, "b": 0.5})], "B": [table({"a": 0.49999, "b": 0.49999})]}, ["dice"]
    )
    assert "+0.000 [+0.000, +0.000]" in format_comparison(rows)


def test_csv_holds_bare_numbers() -> None:
    reader = csv.DictReader(io.StringIO(format_comparison(compare_tables(ARMS, ["dice"]), style="csv")))
    row = next(reader)
    assert float(row["B: mean"]) == pytest.approx(1.9 / 3)
    assert float(row["difference: low"]) <= float(row["difference"]) <= float(row["difference: high"])


def test_latex_has_a_row_for_each_metric() -> None:
    text = format_comparison(compare_tables(ARMS, ["dice", "hd95_directed_mm"]), style="latex")
    assert text.count(r" \\") == 3


@pytest.mark.parametrize(
    ("arms", "message"),
    [
        ({"A": ARMS["A"]}, "at least two"),
        ({"A": [table({"a": 0.5})], "B": [table({"b": 0.5})]}, "different cases"),
        ({"A": ARMS["A"], "B": ARMS["B"][:1]}, "different cases"),
    ],
)
def test_arms_that_cannot_be_compared_are_refused(arms: dict[str, list[CaseTable]], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        compare_tables(arms, ["dice"])


def test_means_and_their_difference_are_of_the_same_cases() -> None:
    arms = {
        "A": [table({"a": 0.5, "b": math.nan, "c": 0.1, "d": 0.6})],
        "B": [table({"a": 0.7, "b": 0.9, "c": math.nan, "d": 0.6})],
    }
    dice = compare_tables(arms, ["dice"])[0]
    assert [arm.mean for arm in dice.arms] == pytest.approx([0.55, 0.65])
    assert [arm.cases for arm in dice.arms] == [2, 2] and dice.comparison.cases == 2
    assert dice.comparison.mean_difference == pytest.approx(dice.arms[1].mean - dice.arms[0].mean)


def test_a_text_table_fits_on_a_terminal_and_loses_no_column() -> None:
    arms = {f"Attention U-Net number {name} + Dice + CE": tables for name, tables in ARMS.items()}
    rows = compare_tables(arms, ["dice", "hd95_directed_mm"], paper={"dice": (0.908, 0.952)})
    text = format_comparison(rows)
    assert max(map(len, text.splitlines())) <= 100
    for heading in (
        *arms,
        "difference",
        "better / worse / equal",
        "spread over runs",
        "paper",
        "0.908 / 0.952",
    ):
        assert heading in text
    assert text.count("HD95 directed (mm)") == text.count("metric") >= 2
    assert len(format_comparison(rows, style="markdown").splitlines()) == 4  # one table elsewhere


def test_several_arms_have_a_row_each_and_adjusted_p() -> None:
    arms = {
        name: [table({f"{case:02d}": 0.5 + gain * (1 + case / 20) for case in range(12)})]
        for name, gain in {"A": 0.0, "B": 0.1, "C": -0.1}.items()
    }
    row = compare_tables(arms, ["dice"])[0]
    assert [result.mean_difference > 0 for result in row.comparisons] == [True, False]
    assert row.p_adjusted == pytest.approx([2 * result.p_value for result in row.comparisons])
    lines = format_comparison([row], style="markdown").splitlines()
    assert [line.split("|")[2].strip() for line in lines[2:]] == ["A", "B", "C"]
    assert "p (Holm)" in lines[0]


def test_cases_of_one_patient_count_as_one_in_the_test() -> None:
    cases = {f"{case:02d}": 0.5 for case in range(12)}
    arms = {"A": [table(cases)], "B": [table(dict.fromkeys(cases, 0.6))]}
    alone = compare_tables(arms, ["dice"])[0].comparison
    owners = {case: str(int(case) // 4) for case in cases}
    of_three = compare_tables(arms, ["dice"], patients=owners)[0].comparison
    assert (alone.p_value, of_three.p_value) == pytest.approx((2 / 2**12, 2 / 2**3))
