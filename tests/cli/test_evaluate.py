"""lungkit-evaluate: what it writes, what it prints, how it ends."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from lungkit.cli.evaluate import main
from lungkit.data import write_nifti
from lungkit.report import evaluation

FILES = {
    "distribution.png",
    "report.html",
    "pages",
    "metrics.csv",
    "metrics.json",
    "metrics.md",
    "metrics.txt",
    "metrics_summary.csv",
}


@pytest.fixture
def folders(tmp_path: Path) -> tuple[str, str]:
    mask = np.zeros((16, 16, 4), np.uint8)
    mask[4:9, 4:9, 1:3] = 1
    for name in ("predictions", "labels"):
        (tmp_path / name).mkdir()
        for case in ("a", "b"):
            write_nifti(tmp_path / name / f"{case}.nii.gz", mask, np.diag([0.8, 0.8, 2.5, 1.0]))
    return str(tmp_path / "predictions"), str(tmp_path / "labels")


def test_everything_is_written_and_the_table_is_printed(
    folders: tuple[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    figures: list[Figure],
) -> None:
    assert main([*folders, "-o", str(tmp_path / "out")]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES
    assert "HD95 directed (mm)" in capsys.readouterr().out
    (distribution,) = figures
    assert "Dice" in [ax.get_title(loc="left") for ax in distribution.axes]
    assert {label.get_text() for label in distribution.axes[0].get_xticklabels()} == {"foreground\nn = 2"}


def test_json_holds_definitions_and_csv_holds_all_metrics(folders: tuple[str, str], tmp_path: Path) -> None:
    main([*folders, "-o", str(tmp_path / "out"), "--percentile", "90", "--hausdorff", "pooled"])
    content = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert "both directions pooled" in content["definitions"]["hd90_pooled_mm"]
    with (tmp_path / "out" / "metrics.csv").open() as file:
        assert set(content["definitions"]) < set(next(csv.reader(file)))


def test_readable_table_states_the_definitions(folders: tuple[str, str], tmp_path: Path) -> None:
    main([*folders, "-o", str(tmp_path / "out"), "--tolerance-mm", "1"])
    assert "within 1 mm of the other surface" in (tmp_path / "out" / "metrics.txt").read_text()


def test_one_family_alone(folders: tuple[str, str], tmp_path: Path) -> None:
    assert main([*folders, "-o", str(tmp_path / "out"), "--metrics", "size"]) == 0
    assert "volume_true_ml" in json.loads((tmp_path / "out" / "metrics.json").read_text())["definitions"]


def test_bad_case_ends_with_3_and_the_others_are_written(
    folders: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(folders[0]) / "a.nii.gz"
    path.write_bytes(path.read_bytes()[:-9])
    assert main([*folders, "-o", str(tmp_path / "out")]) == 3
    assert f"not measured: {path}" in capsys.readouterr().err
    content = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert [row["case"] for row in content["cases"]] == ["b"]
    assert list(content["failed"]) == ["a"]


def test_missing_prediction_is_named_and_ends_with_3(
    folders: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (Path(folders[0]) / "a.nii.gz").unlink()
    assert main([*folders, "-o", str(tmp_path / "out")]) == 3
    assert "1 cases have no prediction: a" in capsys.readouterr().err


def test_common_only_accepts_different_case_sets(folders: tuple[str, str], tmp_path: Path) -> None:
    (Path(folders[1]) / "a.nii.gz").unlink()
    assert main([*folders, "-o", str(tmp_path / "out"), "--common-only"]) == 0


def test_every_case_bad_still_writes_the_reasons(folders: tuple[str, str], tmp_path: Path) -> None:
    for path in Path(folders[0]).iterdir():
        path.write_bytes(b"")
    assert main([*folders, "-o", str(tmp_path / "out")]) == 3
    assert set(json.loads((tmp_path / "out" / "metrics.json").read_text())["failed"]) == {"a", "b"}


def test_folder_with_results_is_refused_before_anything_is_measured(
    folders: tuple[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(evaluation, "evaluate_pairs", lambda *_, **__: pytest.fail("measured"))
    assert main([*folders, "-o", folders[1]]) == 2
    assert "not an empty folder" in capsys.readouterr().err


def test_default_folders_are_numbered(
    folders: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert main([*folders, "--metrics", "overlap"]) == 0
    assert (tmp_path / "evaluation").is_dir()
    assert (tmp_path / "evaluation-2").is_dir()


@pytest.mark.parametrize("step", ["evaluate_pairs", "write_measured"])
def test_an_interrupted_evaluation_leaves_nothing(
    folders: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    monkeypatch.chdir(tmp_path)
    before = list(tmp_path.iterdir())

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluation, step, interrupted)
    assert main([*folders]) == 130
    assert list(tmp_path.iterdir()) == before


def test_an_evaluation_that_ends_after_another_has_a_folder_of_its_own(
    folders: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write = evaluation.write_evaluation

    def after_another(*arguments: Any, **options: Any) -> str:
        monkeypatch.setattr(evaluation, "write_evaluation", write)
        assert main([*folders, "--metrics", "size"]) == 0
        return write(*arguments, **options)

    monkeypatch.setattr(evaluation, "write_evaluation", after_another)
    assert main([*folders, "--metrics", "overlap"]) == 0
    assert "dice" not in (tmp_path / "evaluation" / "metrics.csv").read_text()
    assert "dice" in (tmp_path / "evaluation-2" / "metrics.csv").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--percentile", "200"], "percentile"),
        (["--label", "tumour"], "NAME=VALUE"),
        (["--tolerance-mm", "-1"], "tolerance_mm"),
        (["-j", "0"], "jobs"),
        (["--max-voxels", "0"], "max-voxels must be at least 1, got 0"),
    ],
)
def test_bad_option_ends_with_2(
    folders: tuple[str, str], options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*folders, *options]) == 2
    assert message in capsys.readouterr().err


def test_absent_folder_ends_with_3(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "nowhere"), str(tmp_path)]) == 3
    assert "nowhere" in capsys.readouterr().err


def test_many_cases_are_summed_up_on_the_screen_and_written_in_full(
    folders: tuple[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lungkit.report.tables._MANY_CASES", 1)
    monkeypatch.setattr("lungkit.report.evaluation._CASES_SHOWN", 1)
    main([*folders, "-o", str(tmp_path / "out"), "--metrics", "overlap"])
    shown = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line]
    assert "mean" in shown
    assert len({"a", "b"} & set(shown)) == 1
    written = (tmp_path / "out" / "metrics.txt").read_text().splitlines()
    assert {"a", "b"} <= {line.split()[0] for line in written if line}


@pytest.mark.parametrize("output", [[], ["-o", "out"]])
def test_a_single_pair_that_cannot_be_measured_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], output: list[str]
) -> None:
    for name, size in (("a", 4), ("b", 5)):
        write_nifti(tmp_path / f"{name}.nii.gz", np.zeros((size, 4, 4), np.uint8), np.eye(4))
    monkeypatch.chdir(tmp_path)
    assert main(["a.nii.gz", "b.nii.gz", *output]) == 3
    found = capsys.readouterr()
    assert "not measured, nothing is written" in found.err and "(5, 4, 4)" in found.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.nii.gz", "b.nii.gz"] and not found.out
