"""Folds: honoured or made, by patient, balanced, reproducible."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from lungkit.data import Case, Dataset, Split, make_or_load_splits, write_splits
from lungkit.errors import DataError, UsageError


def dataset_of(names: list[str], root: Path) -> Dataset:
    cases = tuple(Case(name, (), None, name) for name in names)
    return Dataset(root, "demo", cases, {"background": 0, "tumour": 1}, ("CT",), None, "nnunet")


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return dataset_of(
        [f"p{patient}_{scan}" for patient in range(8) for scan in range(1 + patient % 3)], tmp_path
    )


def test_every_case_is_validated_once(dataset: Dataset) -> None:
    splits = make_or_load_splits(dataset, folds=4)
    validated = sorted(name for split in splits for name in split.val)
    assert validated == sorted(case.case_id for case in dataset.cases)
    for split in splits:
        assert sorted(split.train + split.val) == validated


def test_patients_are_not_divided(dataset: Dataset) -> None:
    for split in make_or_load_splits(dataset, folds=4, patient_pattern=r"(p\d+)_"):
        assert not {name[:2] for name in split.train} & {name[:2] for name in split.val}


def test_folds_are_balanced(dataset: Dataset) -> None:
    sizes = [len(split.val) for split in make_or_load_splits(dataset, folds=4, patient_pattern=r"(p\d+)_")]
    assert sum(sizes) == len(dataset.cases)
    assert max(sizes) - min(sizes) <= 1


def test_same_seed_gives_the_same_folds_and_another_seed_others(dataset: Dataset) -> None:
    assert make_or_load_splits(dataset, seed=3) == make_or_load_splits(dataset, seed=3)
    assert make_or_load_splits(dataset, seed=3) != make_or_load_splits(dataset, seed=4)


def test_order_of_the_cases_does_not_matter(tmp_path: Path) -> None:
    names = [f"c{index}" for index in range(10)]
    assert make_or_load_splits(dataset_of(names, tmp_path)) == make_or_load_splits(
        dataset_of(names[::-1], tmp_path)
    )


def test_written_splits_are_honoured(dataset: Dataset) -> None:
    splits = make_or_load_splits(dataset, folds=3, seed=1)
    write_splits(dataset.root, splits)
    assert make_or_load_splits(dataset, folds=5, seed=2) == splits


def test_splits_are_written_where_the_caller_says(dataset: Dataset, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    path = write_splits(tmp_path / "run", [Split(("a",), ("b",))])
    assert path == tmp_path / "run" / "splits_final.json"
    assert json.loads(path.read_text()) == [{"train": ["a"], "val": ["b"]}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"train": ["p0_0", "nobody"], "val": ["p1_0"]}], "fold 0 names unknown cases in 'train': nobody"),
        ([{"train": ["p0_0", "p1_0"], "val": ["p1_0"]}], "fold 0 has cases in train and in val: p1_0"),
        ([{"train": ["p0_0", "p0_0"], "val": ["p1_0"]}], "names a case twice in 'train'"),
        ([{"train": ["p0_0"], "val": []}], "fold 0 needs a list of case ids under 'val'"),
        ([{"train": ["p0_0"]}], "fold 0 needs a list of case ids under 'val'"),
        ([{"train": "p0_0", "val": ["p1_0"]}], "under 'train'"),
        (["p0_0"], "fold 0 needs"),
        ({"train": []}, "expected a list of folds"),
        ([], "expected a list of folds"),
    ],
)
def test_malformed_file_is_refused(dataset: Dataset, content: Any, message: str) -> None:
    (dataset.root / "splits_final.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=message):
        make_or_load_splits(dataset)


def test_file_that_is_not_json_is_refused(dataset: Dataset) -> None:
    (dataset.root / "splits_final.json").write_text("{")
    with pytest.raises(DataError, match=r"splits_final\.json: not readable as JSON"):
        make_or_load_splits(dataset)


def test_cases_in_no_fold_are_warned_of(dataset: Dataset, caplog: pytest.LogCaptureFixture) -> None:
    write_splits(dataset.root, [Split(("p0_0",), ("p1_0",))])
    with caplog.at_level(logging.WARNING, logger="lungkit"):
        make_or_load_splits(dataset)
    assert f"{len(dataset.cases) - 2} cases are in no fold" in caplog.text


def test_patient_on_both_sides_of_a_loaded_fold_is_warned_of(
    dataset: Dataset, caplog: pytest.LogCaptureFixture
) -> None:
    write_splits(dataset.root, [Split(("p2_0",), ("p2_1",))])
    with caplog.at_level(logging.WARNING, logger="lungkit"):
        make_or_load_splits(dataset, patient_pattern=r"(p\d+)_")
    assert "fold 0 has cases of p2 in training and in validation" in caplog.text


def test_as_many_folds_as_patients_are_made_where_more_are_asked_for(
    dataset: Dataset, caplog: pytest.LogCaptureFixture
) -> None:
    splits = make_or_load_splits(dataset, folds=9, patient_pattern=r"(p\d+)_")
    assert splits == make_or_load_splits(dataset, folds=8, patient_pattern=r"(p\d+)_") and len(splits) == 8
    assert "9 folds cannot be made of 8 patients or cases; 8 are made" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"folds": 1}, "leaves nothing to validate on"),
        (
            {"patient_pattern": r"(p)\d+_"},
            r"data\.folds: all cases are of one patient \(p\).*training needs .* two",
        ),
        ({"patient_pattern": "("}, "not a regular expression"),
        ({"patient_pattern": "p"}, "has 0 groups, expected one"),
        ({"patient_pattern": "(q)"}, "does not match p0_0"),
    ],
)
def test_impossible_options_are_usage_errors(dataset: Dataset, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_or_load_splits(dataset, **options)


@pytest.mark.parametrize("seed", range(5))
def test_patient_with_many_scans_does_not_unbalance_the_folds(tmp_path: Path, seed: int) -> None:
    names = [f"p{patient}_0" for patient in range(4)] + [f"p9_{scan}" for scan in range(4)]
    splits = make_or_load_splits(dataset_of(names, tmp_path), folds=2, seed=seed, patient_pattern=r"(p\d+)_")
    assert [len(split.val) for split in splits] == [4, 4]
