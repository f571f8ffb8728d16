"""What is done in an output folder, over calls and shares."""

from __future__ import annotations

import csv
import json
import os

import pytest

from lungkit.checkpoint import sha256_of
from lungkit.errors import DataError, UsageError
from lungkit.pipeline import Records, claim, merge
from lungkit.pipeline.folder_report import write_folder_report


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


def test_what_another_process_writes_at_once_is_no_strangers(tmp_path):
    first, second = Records(tmp_path, (0, 1)), Records(tmp_path, (0, 1))
    files = [tmp_path / "a.nii.gz"]
    first.start("a", files)
    files[0].touch()
    second.start("b", [tmp_path / "b.nii.gz"])
    assert second.not_ours("a", files) == []  # by the note
    first.add(row(tmp_path, "a"))
    assert second.not_ours("a", files) == []  # by the row
    second.add(row(tmp_path, "b"))
    assert not list(tmp_path.glob(".results*"))


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


ODD = [
    *(
        "",
        "null",
        "[]",
        "7",
        '"a"',
        "{}",
        '{"scan": null}',
        '{"scan": ["a"]}',
        '{"scan": {"a": 1}}',
        "\x00",
        "{" * 5000,
    ),
    '{"scan": "\\ud800", "status": "ok"}',
    *(
        f'{{"scan": "odd", "classes": {value}}}'
        for value in ("[]", '"a"', '{"t": null}', '{"t": {"lesions": []}}')
    ),
    *(f'{{"scan": "odd", "files": {value}}}' for value in ('["a"]', '{"a": 1}', '"a"')),
    *(f'{{"scan": "odd", "{key}": [1]}}' for key in ("status", "error", "input", "seconds")),
    '{"scan": "odd", "seconds": NaN}',
]


@pytest.mark.parametrize("line", ODD)
def test_an_odd_row_costs_its_own_scan_only(tmp_path, line):
    records = Records(tmp_path, (0, 1))
    records.add(row(tmp_path, "a"))
    with records.path.open("a") as file:
        file.write(line + "\n")
    again = Records(tmp_path, (0, 1))
    assert again.is_done("a", "f")
    assert not again.is_done("odd", "f")
    assert again.not_ours("odd", [tmp_path / "a.nii.gz"]) == [tmp_path / "a.nii.gz"]
    again.add(row(tmp_path, "b"))
    again.write()
    assert [found["scan"] for found in merge(tmp_path)] == ["a", "b"]
    write_folder_report(tmp_path)


@pytest.mark.parametrize("content", ["null", "[1]", '{"a": 1, "b": [1], "c": ["c.nii.gz"]}', "[" * 5000])
def test_an_odd_note_of_unfinished_files_is_no_note(tmp_path, content):
    records = Records(tmp_path, (0, 1))
    (tmp_path / f".{records.path.stem}-unfinished.json").write_text(content)
    again = Records(tmp_path, (0, 1))
    (tmp_path / "x").touch()
    for name in "abc":
        assert again.not_ours(name, [tmp_path / "x"]) == [tmp_path / "x"]


@pytest.mark.parametrize("kind", ["pipe", "zeros", "folder"])
def test_records_that_are_no_file_are_refused_by_name(tmp_path, kind):
    path = tmp_path / "results.jsonl"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "zeros":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    with pytest.raises(DataError, match=r"results\.jsonl: records cannot be read"):
        Records(tmp_path, (0, 1))


def test_a_file_that_became_a_device_is_not_read_to_see_whether_its_scan_is_done(tmp_path):
    Records(tmp_path, (0, 1)).add(row(tmp_path, "a"))
    (tmp_path / "a.nii.gz").unlink()
    (tmp_path / "a.nii.gz").symlink_to("/dev/zero")
    assert not Records(tmp_path, (0, 1)).is_done("a", "f")


def test_names_that_a_spreadsheet_would_compute_are_text_in_the_table(tmp_path):
    classes = {"=1+1": {"volume_ml": -1.5, "longest_diameter_mm": 12.0, "lesions": 2}}
    records = Records(tmp_path, (0, 1))
    records.add(row(tmp_path, "@SUM(A1)", classes=classes))
    records.add({"scan": "b", "status": "failed", "error": "=cmd|' /C calc'!A0"})
    records.write()
    with (tmp_path / "results.csv").open(newline="") as file:
        cells = [cell for line in csv.reader(file) for cell in line]
    assert not [cell for cell in cells if cell[:1] in ("=", "+", "@")]
    assert {"'@SUM(A1)", "'=cmd|' /C calc'!A0", "'=1+1: volume_ml", "-1.5"} <= set(cells)
