"""A folder of results becomes one page, from the files that are in it."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from lungkit.errors import DataError, UsageError
from lungkit.metrics import CaseTable, MetricOptions
from lungkit.pipeline.folder_report import kind_of, read_case_table, write_folder_report
from lungkit.report import write_case_table


def table_of(*dice: float, name: str = "") -> CaseTable:
    table = CaseTable()
    for case, value in enumerate(dice):
        table.add_row(f"case{name}-{case}", "tumour", {"dice": value, "hd95_directed_mm": 9 - 9 * value})
    return table


def evaluation(folder: Path, table: CaseTable, **extra: object) -> Path:
    folder.mkdir(exist_ok=True)
    write_case_table(folder, table, extra={"definitions": MetricOptions().definitions(), **extra})
    return folder


def run_folder(folder: Path, dice: list[float]) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("epochs: 2\nname: <b>\n")
    rows = [
        {"epoch": i + 1, "train_loss": 1 - d, "val_dice": d, "learning_rate": 0.1} for i, d in enumerate(dice)
    ]
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    write_case_table(folder, table_of(0.5, 0.7, 0.9), name="validation")
    return folder


def test_a_table_of_cases_is_read_back(tmp_path: Path) -> None:
    table = table_of(0.5, float("nan"))
    write_case_table(tmp_path, table)
    found = read_case_table(tmp_path / "metrics.csv")
    assert [(row.case_id, row.label) for row in found.rows] == [
        (row.case_id, row.label) for row in table.rows
    ]
    np.testing.assert_array_equal(found.column("dice", "tumour"), [0.5, np.nan])


def test_an_evaluation_shows_its_worst_median_and_best_case_and_what_failed(tmp_path: Path) -> None:
    folder = evaluation(tmp_path / "e", table_of(0.9, 0.1, 0.5), failed={"x": "damaged <file>"})
    text = write_folder_report(folder).read_text()
    for rank, case in {"Worst": 1, "Median": 2, "Best": 0}.items():
        assert f"<h3>{rank}</h3><p>case-{case}</p>" in text
    assert "x was not measured: damaged &lt;file&gt;" in text
    assert "HD95 directed (mm)" in text


def test_a_training_run_shows_curves_and_its_validation(tmp_path: Path) -> None:
    text = write_folder_report(run_folder(tmp_path / "run", [0.1, 0.6])).read_text()
    for title in ("Loss", "Validation", "Learning rate", "Means over the cases"):
        assert title in text
    assert "name: &lt;b&gt;" in text


def test_a_comparison_shows_the_difference_with_its_interval(tmp_path: Path) -> None:
    folder = tmp_path / "comparison"
    for arm in ("A", "B"):
        run_folder(folder / "runs" / arm, [0.1, 0.6])
    (folder / "cases").mkdir()
    for arm, value in {"A": 0.3, "B": 0.5}.items():
        write_case_table(folder / "cases", table_of(value, value + 0.2, value + 0.1), name=arm)
    runs = {arm: [str(folder / "runs" / arm)] for arm in "AB"}
    (folder / "comparison.json").write_text(json.dumps({"runs": runs, "notes": ["Cells: <means>."]}))
    header = "metric,class,A: mean,A: low,A: high,B: mean,B: low,B: high,difference,difference: low,difference: high"
    row = "dice,tumour,0.4,0.3,0.5,0.6,0.5,0.7,0.2,0.1,0.3"
    (folder / "table.csv").write_text(f"{header},p,better,worse,equal\n{row},0.01,3,0,0\n")
    text = write_folder_report(folder).read_text()
    assert "0.2000 [0.1000, 0.3000]" in text
    assert "B minus A" in text
    assert "Cells: &lt;means&gt;." in text
    assert "A · Dice" in text  # a curve of each arm


def test_a_damaged_file_of_results_is_named(tmp_path: Path) -> None:
    folder = evaluation(tmp_path / "e", table_of(0.9))
    (folder / "metrics.csv").write_text("case,label,dice\na,tumour,much\n")
    with pytest.raises(DataError, match=r"metrics\.csv: not a table of cases"):
        write_folder_report(folder)


def test_a_report_of_others_is_not_replaced(tmp_path: Path) -> None:
    folder = evaluation(tmp_path / "e", table_of(0.9))
    (folder / "report.html").write_text("mine")
    with pytest.raises(UsageError, match="was not written by lungkit"):
        write_folder_report(folder)


def test_calibration_is_shown_where_it_was_measured(tmp_path: Path) -> None:
    folder = evaluation(tmp_path / "e", table_of(0.9))
    curve = {"predicted": [0.1, 0.9], "observed": [0.2, 0.8], "voxels": [5, 5]}
    content = {
        "regions": {"near": "near a lesion"},
        "classes": {"tumour": {"near": {"ece": 0.1, "curve": curve}}},
    }
    (folder / "calibration.json").write_text(json.dumps(content))
    text = write_folder_report(folder).read_text()
    assert "tumour, near a lesion" in text
    assert "Expected calibration error 0.100" in text


def test_a_folder_of_anything_is_of_no_kind(tmp_path: Path) -> None:
    assert kind_of(tmp_path) is None
    assert kind_of(tmp_path / "absent") is None
