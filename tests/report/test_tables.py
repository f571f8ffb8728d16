"""Tables: what they show, and that files of them read back to the same numbers."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest

from lungkit.errors import UsageError
from lungkit.metrics import CaseTable, EmptyPolicy
from lungkit.report import format_case_table, format_rows, policy_note, write_case_table


@pytest.fixture
def table() -> CaseTable:
    table = CaseTable(empty=EmptyPolicy.NAN)
    table.add_row("lung_1", "tumour", {"dice": 0.123456789, "hd95_pooled_mm": 3.14159})
    table.add_row("lung_2", "tumour", {"dice": 0.5, "hd95_pooled_mm": math.inf})
    decided = frozenset({"dice", "hd95_pooled_mm"})
    table.add_row("lung_3", "tumour", {"dice": math.nan, "hd95_pooled_mm": math.nan}, decided)
    return table


def test_text_shows_cases_mean_and_what_was_left_out(table: CaseTable) -> None:
    lines = [line.split() for line in format_case_table(table).splitlines()]
    assert lines[0] == ["case", "label", "Dice", "HD95", "pooled", "(mm)"]
    assert ["lung_1", "tumour", "0.1235", "3.14"] in lines
    assert ["mean", "tumour", "0.3117", "inf"] in lines
    assert ["undefined", "tumour", "1", "1"] in lines


def test_note_counts_what_the_policy_decided(table: CaseTable) -> None:
    assert policy_note(table).endswith('policy "nan" decided 2 values in 1 case.')


def test_summary_alone(table: CaseTable) -> None:
    assert "lung_1" not in format_case_table(table, cases=False)


def test_markdown_escapes_the_bar() -> None:
    assert format_rows(["case"], [["a|b"]], style="markdown").splitlines()[-1] == r"| a\|b |"


def test_latex_escapes_the_underscore() -> None:
    assert r"lung\_1 & 0.5 \\" in format_rows(["case", "dice"], [["lung_1", "0.5"]], style="latex")


def test_unknown_style_is_refused() -> None:
    with pytest.raises(UsageError, match="html"):
        format_rows(["case"], [], style="html")


def test_row_of_another_length_is_refused() -> None:
    with pytest.raises(UsageError, match="2 cells"):
        format_rows(["case"], [["a", "b"]])


def test_csv_keeps_every_digit(tmp_path: Path, table: CaseTable) -> None:
    write_case_table(tmp_path, table)
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["dice"]) for row in rows[:2]] == [0.123456789, 0.5]
    assert math.isnan(float(rows[2]["dice"]))
    assert rows[2]["decided_by_policy"] == "dice hd95_pooled_mm"


def test_summary_csv_counts_undefined_cases(tmp_path: Path, table: CaseTable) -> None:
    write_case_table(tmp_path, table)
    with (tmp_path / "metrics_summary.csv").open() as file:
        dice = next(row for row in csv.DictReader(file) if row["metric"] == "dice")
    assert (dice["cases"], dice["undefined"]) == ("2", "1")


def test_json_has_null_for_nan_and_a_string_for_infinity(tmp_path: Path, table: CaseTable) -> None:
    write_case_table(tmp_path, table, name="eval", extra={"version": "1"})
    content = json.loads((tmp_path / "eval.json").read_text())
    assert content["version"] == "1"
    assert content["cases"][1]["hd95_pooled_mm"] == "inf"
    assert content["cases"][2]["dice"] is None
    assert content["summary"]["tumour"]["dice"]["undefined"] == 1


def test_empty_table_is_written(tmp_path: Path) -> None:
    write_case_table(tmp_path, CaseTable())
    assert json.loads((tmp_path / "metrics.json").read_text())["cases"] == []


def test_of_many_cases_the_worst_are_shown_and_the_means_are_of_all():
    table = CaseTable()
    for number in range(30):
        dice = float("nan") if number == 3 else number / 100
        table.add_row(f"case_{number:02d}", "tumour", {"dice": dice, "iou": 1.0})
    text = format_case_table(table, worst=5)
    assert [line.split()[0] for line in text.splitlines() if line.startswith("case_")] == [
        f"case_{number:02d}" for number in (0, 1, 2, 4, 5)
    ]
    mean = next(line for line in text.splitlines() if line.startswith("mean"))
    assert mean.split()[2] == f"{sum(n / 100 for n in range(30) if n != 3) / 29:.4f}"
    assert text.endswith("Shown: the 5 cases of the lowest Dice; the files hold all.")
    assert format_case_table(table).count("case_") == 30


def test_signs_that_latex_prints_as_other_letters_are_escaped():
    text = format_rows(["p < 0.05", "a^b"], [["< 0.001", "~"]], style="latex")
    assert "p $<$ 0.05" in text and "$<$ 0.001" in text
    assert r"a\textasciicircum{}b" in text and r"\textasciitilde{}" in text


HOSTILE = ("=HYPERLINK(1)", "<img src=x onerror=alert(1)>|\n# [x](javascript:1)", "a\x1b[2J")


def test_names_are_text_in_every_kind_of_table(tmp_path: Path) -> None:
    table = CaseTable()
    for name in HOSTILE:
        table.add_row(name, "@class", {"dice": 0.5, "difference": -1.5})
    write_case_table(tmp_path, table, notes=["<script>"])
    for path in tmp_path.glob("*.csv"):
        cells = [cell for line in csv.reader(path.open(newline="")) for cell in line]
        assert not [cell for cell in cells if cell[:1] in "=@+-" and cell and cell != "-1.5"], path
    page = (tmp_path / "metrics.md").read_text()
    assert "<" not in page
    assert "](" not in page
    assert "\n#" not in page
    for path in tmp_path.iterdir():
        assert "\x1b" not in path.read_text(), path


def test_names_come_back_from_a_table_as_they_were(tmp_path: Path) -> None:
    from lungkit.pipeline.folder_report import read_case_table

    table = CaseTable()
    names = ("=HYPERLINK(1)", "'=quoted", "it's", "-", "a b")
    for name in names:
        table.add_row(name, "+class", {"dice": 0.5})
    write_case_table(tmp_path, table)
    assert tuple(read_case_table(tmp_path / "metrics.csv").case_ids) == tuple(dict.fromkeys(names))
    assert read_case_table(tmp_path / "metrics.csv").labels == table.labels
