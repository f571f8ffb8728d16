"""``lungkit-report``, and the pages that the other commands write, as a user meets them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dicom_cases import write_ct
from model_cases import save_model, threshold_network

from lungkit.cli.predict import main as predict
from lungkit.cli.report import main as report
from lungkit.data import write_nifti

AFFINE = np.array([[-0.8, 0, 0, 20], [0, 0.8, 0, -7], [0, 0, 2.5, 3], [0, 0, 0, 1.0]])
HOSTILE = "<img src=x onerror=alert(1)> 'q' \"" + "n" * 160


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    folder = tmp_path / "scans"
    folder.mkdir()
    for name in ("a", HOSTILE):
        array = np.full((20, 18, 10), -800, np.int16)
        array[4:8, 4:8, 2:6] = 200
        write_nifti(folder / f"{name}.nii.gz", array, AFFINE)
    return folder


def run(tmp_path: Path, *arguments: object) -> int:
    model = save_model(tmp_path / "model", threshold_network(0.1))
    fixed = ("--model", model, "--device", "cpu", "--precision", "fp32")
    return predict([str(one) for one in (*arguments, *fixed)])


def test_predictions_have_a_page_a_scan_and_one_that_lists_them(tmp_path: Path, scans: Path) -> None:
    out = tmp_path / "out"
    assert run(tmp_path, "-i", scans, "-o", out) == 0
    assert sorted(path.name for path in (out / "pages").iterdir()) == sorted(["a.html", f"{HOSTILE}.html"])
    text = (out / "report.html").read_text()
    assert "tumour: volume (ml)" in text
    assert "<img" not in text
    assert str(tmp_path) not in text + (out / "pages" / "a.html").read_text()


def test_a_page_made_anew_does_not_make_the_prediction_anew(
    tmp_path: Path, scans: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    run(tmp_path, "-i", scans, "-o", out)
    assert report([str(out), "--scans", str(scans), "--labels", str(out)]) == 0
    assert '"name":"truth"' in (out / "pages" / "a.html").read_text()
    mask = (out / "a.nii.gz").stat().st_mtime_ns
    run(tmp_path, "-i", scans, "-o", out)
    assert (out / "a.nii.gz").stat().st_mtime_ns == mask


def test_no_report_leaves_pages_out(tmp_path: Path, scans: Path) -> None:
    out = tmp_path / "out"
    assert run(tmp_path, "-i", scans, "-o", out, "--no-report") == 0
    assert not (out / "report.html").exists()
    assert not (out / "pages").exists()


def test_a_single_mask_has_its_page_beside_it_and_spares_a_file_of_others(
    tmp_path: Path, scans: Path
) -> None:
    assert run(tmp_path, "-i", scans / "a.nii.gz", "-o", tmp_path / "mask.nii.gz") == 0
    assert '"name":"prediction"' in (tmp_path / "mask.html").read_text()
    (tmp_path / "other.html").write_text("my notes")
    asked = ("-i", scans / "a.nii.gz", "-o", tmp_path / "other.nii.gz")
    assert run(tmp_path, *asked) == 2
    assert run(tmp_path, *asked, "--overwrite") == 0
    assert (tmp_path / "other.html").read_text() == "my notes"


def test_a_damaged_mask_is_named_and_the_others_have_their_pages(
    tmp_path: Path, scans: Path, caplog: pytest.LogCaptureFixture
) -> None:
    masks = tmp_path / "masks"
    masks.mkdir()
    write_nifti(masks / f"{HOSTILE}.nii.gz", np.ones((20, 18, 10), np.uint8), AFFINE)
    (masks / "a.nii.gz").write_bytes(b"\x1f\x8b damaged")
    assert report([str(masks), "--scans", str(scans)]) == 3
    assert [path.name for path in (masks / "pages").iterdir()] == [f"{HOSTILE}.html"]
    assert (masks / "report.html").is_file()


def test_a_folder_without_results_is_an_error_that_says_what_was_expected(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report([str(tmp_path)]) == 3
    assert "holds no results of lungkit; expected a folder of lungkit-predict" in capsys.readouterr().err
    assert report([str(tmp_path / "absent")]) == 3


def test_a_scan_and_its_masks_are_one_page(tmp_path: Path, scans: Path) -> None:
    mask = tmp_path / "m.nii.gz"
    write_nifti(mask, np.eye(20, 18, dtype=np.uint8)[..., None].repeat(10, 2), AFFINE)
    page = tmp_path / "case.html"
    options = ("--mask", f"reader 1={mask}", "--mask", f"truth={mask}", "--map", f"p={mask}")
    assert report([str(scans / "a.nii.gz"), *options, "-o", str(page)]) == 0
    text = page.read_text()
    assert '"name":"reader 1"' in text
    assert '"name":"p"' in text
    assert report([str(scans / "a.nii.gz"), "--mask", "nothing", "-o", str(page)]) == 2


def test_patient_data_are_shown_where_asked_for_alone(tmp_path: Path) -> None:
    def name(dataset: Any, _: int) -> None:
        dataset.PatientName, dataset.PatientID = "Doe^Jane", "4711"

    write_ct(tmp_path / "series", edit=name)
    page = tmp_path / "case.html"
    assert run(tmp_path, "-i", tmp_path / "series", "-o", tmp_path / "out") == 0
    hidden = (tmp_path / "out" / "pages" / "series.html").read_text()
    assert (
        run(tmp_path, "-i", tmp_path / "series", "-o", page.with_suffix(".nii"), "--with-patient-data") == 0
    )
    assert "4711" not in hidden
    assert "Doe" not in hidden
    assert "4711" in page.read_text()
