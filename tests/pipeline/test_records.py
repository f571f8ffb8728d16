"""What is done in an output folder, over calls and shares."""

from __future__ import annotations

import csv
import json

import pytest

from lungkit.checkpoint import sha256_of
from lungkit.errors import DataError, UsageError
from lungkit.pipeline import Records, claim, merge


def row(folder, name, **more):
    (folder / f"{name}.nii.gz").write_text(name)
    files = {f"{name}.nii.gz": sha256_of(folder / f"{name}.nii.gz")}
    return {"scan": name, "status": "ok", "input": "f", "files": files, "seconds": 1.0, "classes": {}, **more}


def test_a_scan_is_done_while_its_files_are_as_they_were(tmp_path):
    Records(tmp_path, (0, 1)).add(row(tmp_path, "a"))
    assert Records(tmp_path, (0, 1)).is_done("a", "f")
    assert not Records(tmp_path, (0, 1)).is_done("a", "another file")
    assert not Records(tmp_path, (0, 1)).is_done("b", "f")
    (tmp_path / "a.nii.gz").write_text("changed")
    assert not Records(tmp_path, (0, 1)).is_done("a", "f")
    (tmp_path / "a.nii.gz").unlink()
    assert not Records(tmp_path, (0, 1)).is_done("a", "f")


def test_a_failed_scan_is_tried_again(tmp_path):
    records = Records(tmp_path, (0, 1))
    records.add(row(tmp_path, "a"))
    records.add({"scan": "a", "status": "failed", "error": "no"})
    assert not Records(tmp_path, (0, 1)).is_done("a", "f")


def test_what_a_scan_that_failed_has_written_stays_ours(tmp_path):
    records = Records(tmp_path, (0, 1))
    files = [tmp_path / "a.nii.gz", tmp_path / "a.json"]
    records.start("a", files)
    files[0].touch()
    records.add({"scan": "a", "status": "failed", "error": "the disk fails"})
    files[1].touch()  # somebody else's
    assert Records(tmp_path, (0, 1)).not_ours("a", files) == [files[1]]


def test_a_line_cut_short_by_a_crash_costs_its_own_scan_only(tmp_path):
    records = Records(tmp_path, (0, 1))
    records.add(row(tmp_path, "a"))
    with records.path.open("a") as file:
        file.write('{"scan": "b", "sta')
    again = Records(tmp_path, (0, 1))
    again.add(row(tmp_path, "c"))
    last = Records(tmp_path, (0, 1))
    assert [last.is_done(name, "f") for name in "abc"] == [True, False, True]


def test_shares_are_merged_into_one_table(tmp_path):
    classes = {"tumour": {"volume_ml": 1.5, "longest_diameter_mm": 12.0, "lesions": 2}}
    Records(tmp_path, (1, 2)).add(row(tmp_path, "b", classes=classes))
    Records(tmp_path, (0, 2)).add({"scan": "a", "status": "failed", "error": "truncated"})
    assert [found["scan"] for found in merge(tmp_path)] == ["a", "b"]
    with (tmp_path / "results.csv").open(newline="") as file:
        first, second = csv.DictReader(file)
    assert (first["status"], first["error"]) == ("failed", "truncated")
    assert (second["tumour: volume_ml"], second["tumour: lesions"]) == ("1.5", "2")
    assert not list(tmp_path.glob("results-*"))
    assert Records(tmp_path, (0, 1)).is_done("b", "f")  # merged records count as well


def test_a_missing_share_is_named(tmp_path):
    Records(tmp_path, (0, 3)).add(row(tmp_path, "a"))
    Records(tmp_path, (2, 3)).add(row(tmp_path, "c"))
    with pytest.raises(DataError, match=r"share 1 of 3 has no records; run it with --shard 1/3"):
        merge(tmp_path)
    with pytest.raises(DataError, match="is this a folder of lungkit-predict"):
        merge(tmp_path / "elsewhere")


def test_a_folder_of_another_model_or_of_other_things_is_not_touched(tmp_path):
    folder = tmp_path / "out"
    claim(folder, {"models": ["a"], "overlap": 0.5})
    claim(folder, {"models": ["a"], "overlap": 0.5})
    with pytest.raises(UsageError, match="made with other models, overlap"):
        claim(folder, {"models": ["b"], "overlap": 0.25})
    claim(folder, {"models": ["b"], "overlap": 0.25}, overwrite=True)
    assert json.loads((folder / "prediction.json").read_text())["models"] == ["b"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(UsageError, match="is not empty"):
        claim(tmp_path / "mine", {})
    with pytest.raises(UsageError, match="cannot be made"):
        claim(tmp_path / "mine" / "thesis.tex" / "out", {})


def test_files_that_no_prediction_wrote_are_known_for_others(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.nii.gz").touch()
    records = Records(tmp_path, (0, 1))
    records.add(row(tmp_path, "a"))
    records.start("b", [tmp_path / "b.nii.gz"])  # and then a crash
    again = Records(tmp_path, (0, 1))
    for name, strange in (("a", []), ("b", []), ("c", [tmp_path / "c.nii.gz"])):
        assert again.not_ours(name, [tmp_path / f"{name}.nii.gz", tmp_path / "absent"]) == strange
    again.add(row(tmp_path, "b"))
    again.add({"scan": "a", "status": "failed", "error": "no"})
    assert not list(tmp_path.glob(".*"))
    assert Records(tmp_path, (0, 1)).not_ours("a", [tmp_path / "a.nii.gz"]) == []
