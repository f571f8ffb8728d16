"""What all commands share: mistyped options, --quiet, --json."""

from __future__ import annotations

import importlib
import json
import logging
from pathlib import Path

import numpy as np
import pytest
from dicom_cases import change, write_ct

from lungkit._terminal import shows_progress
from lungkit.cli._common import run_command
from lungkit.cli._parser import CommandParser
from lungkit.cli.evaluate import main as evaluate
from lungkit.cli.import_data import main as import_data
from lungkit.data import read_series, write_nifti, write_rtstruct


@pytest.mark.parametrize(
    ("module", "arguments", "expected"),
    [
        (
            "predict",
            ["-i", "a", "--outptu", "b", "--model", "c"],
            "unknown option --outptu; did you mean '--output'?",
        ),
        ("predict", ["-i", "a", "-o", "b", "--model", "c", "--formt=nifti"], "did you mean '--format'?"),
        (
            "predict",
            ["-i", "a", "-o", "b", "--model", "c", "--format", "dicom-sge"],
            "did you mean 'dicom-seg'?",
        ),
        ("evaluate", ["a", "b", "--metric", "overlap"], "did you mean '--metrics'?"),
        ("export", ["--chekpoint", "a"], "unknown option --chekpoint"),
        ("train", ["--dry-rn"], "did you mean '--dry-run'?"),
        ("compare", ["--sedes", "1"], "did you mean '--seeds'?"),
        ("import_data", ["dicom", "a", "-o", "b", "--unit"], "did you mean '--unite'?"),
        ("info", ["--jsn"], "did you mean '--json'?"),
    ],
)
def test_a_mistyped_option_or_choice_names_the_nearest(
    module: str, arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"lungkit.cli.{module}").main(arguments)
    assert ended.value.code == 2
    assert expected in capsys.readouterr().err


def test_words_after_two_dashes_are_no_options() -> None:
    parser = CommandParser(prog="tool")
    parser.add_argument("files", nargs="*")
    assert parser.parse_args(["--", "--odd-name"]).files == ["--odd-name"]


def test_quiet_leaves_warnings_and_the_next_command_is_loud_again(capsys: pytest.CaptureFixture[str]) -> None:
    log = logging.getLogger("lungkit")

    def command() -> int:
        log.info("for your information")
        log.warning("look out")
        return 0

    def quiet() -> int:
        CommandParser(prog="tool").parse_args(["--quiet"])
        assert not shows_progress()
        return command()

    assert run_command(quiet) == 0
    assert capsys.readouterr().err == "look out\n"
    assert run_command(command) == 0
    assert capsys.readouterr().err == "for your information\nlook out\n"


def test_evaluation_as_json_is_that_of_its_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mask = np.zeros((8, 8, 4), np.uint8)
    mask[2:4, 2:4, 1] = 1
    for name in ("a.nii.gz", "b.nii.gz"):
        write_nifti(tmp_path / name, mask, np.eye(4))
    out = tmp_path / "out"
    assert (
        evaluate([str(tmp_path / "a.nii.gz"), str(tmp_path / "b.nii.gz"), "-o", str(out), "--json", "-q"])
        == 0
    )
    shown, told = capsys.readouterr()
    assert json.loads(shown) == json.loads((out / "metrics.json").read_text()) and told == ""


def test_import_as_json_names_cases_and_reasons(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in (1, 2):
        write_ct(tmp_path / f"src/p{number}/ct", series=number, edit=change(PatientID=str(number)))
    scan = read_series(tmp_path / "src/p1/ct")
    write_rtstruct(tmp_path / "src/p1/rs.dcm", scan, (scan.volume.array > 0).astype(np.uint8), {"GTV": 1})
    assert import_data(["dicom", str(tmp_path / "src"), "-o", str(tmp_path / "data"), "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert list(content["cases"]) == ["p001-ct1"] and content["cases"]["p001-ct1"]["GTV"] > 0
    assert list(content["unlabelled"].values()) == ["no mask was made on it"] and content["failed"] == {}
