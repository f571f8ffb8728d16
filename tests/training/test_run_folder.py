from __future__ import annotations

import csv
import json

import pytest

from lungkit.errors import CheckpointError, UsageError
from lungkit.training.run_folder import RunFolder, environment


def test_no_run_is_overwritten(tmp_path):
    folders = [RunFolder.create(tmp_path / "runs", "lung") for _ in range(3)]
    assert [folder.path.name for folder in folders] == ["lung", "lung-2", "lung-3"]


def test_a_run_has_its_name_only_once_it_is_described(tmp_path):
    def describe(folder):
        (folder.path / "config.yaml").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        RunFolder.create(tmp_path / "runs", "lung", describe)
    assert not list((tmp_path / "runs").iterdir())


@pytest.mark.parametrize("name", ["../lung", "a/b", "/lung", "..", ".", ""])
def test_a_name_stays_inside_the_folder_of_runs(tmp_path, name):
    with pytest.raises(UsageError, match="name"):
        RunFolder.create(tmp_path / "runs", name)


def test_a_file_in_place_of_the_folder_of_runs_is_an_error(tmp_path):
    (tmp_path / "runs").write_text("")
    with pytest.raises(UsageError, match="runs"):
        RunFolder.create(tmp_path / "runs", "lung")


def test_metrics_are_the_same_in_both_files(tmp_path):
    folder = RunFolder.create(tmp_path, "lung")
    rows = [
        {"epoch": 1, "step": 5, "train_loss": 0.5},
        {"epoch": 2, "step": 10, "train_loss": 0.25, "val_dice": 0.7},
    ]
    folder.write_metrics(rows)
    with (folder.path / "metrics.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["train_loss"] for row in table] == ["0.5", "0.25"]
    assert [row["val_dice"] for row in table] == ["", "0.7"]
    assert [json.loads(line) for line in (folder.path / "metrics.jsonl").read_text().splitlines()] == rows


def test_a_folder_that_is_no_run_says_what_is_missing(tmp_path):
    with pytest.raises(CheckpointError, match=r"not a run folder, config\.yaml is missing"):
        RunFolder.open(tmp_path)


def test_a_damaged_description_is_named(tmp_path):
    folder = RunFolder.create(tmp_path, "lung")
    folder.write_description("", {}, [])
    (folder.path / "dataset.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"dataset\.json"):
        RunFolder.open(folder.path).dataset()


def test_the_environment_is_fit_for_json():
    content = json.loads(json.dumps(environment()))
    assert content["versions"]["torch"] and content["versions"]["lungkit"]
