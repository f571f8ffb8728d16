"""From a DICOM series to masks that refer to it."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from dicom_cases import PATIENT_ID, PATIENT_NAME, files, write_ct
from model_cases import save_model, threshold_network

from lungkit.cli.predict import main
from lungkit.data import read_volume
from lungkit.data.geometry import orient, plan_geometry

pydicom = pytest.importorskip("pydicom", reason="pydicom is not installed (extra 'dicom')")
pytest.importorskip("highdicom", reason="highdicom is not installed (extra 'dicom')")


@pytest.fixture
def series(real_data):
    folder = real_data / "dicom_pat4"
    if not folder.is_dir():
        pytest.skip(f"no DICOM series at {folder}")
    return folder


@pytest.fixture
def model(tmp_path):
    # In this phantom everything that is not air.
    return save_model(tmp_path / "model", threshold_network(-0.2), patch_size=(16, 96, 96))


def predict(*arguments) -> int:
    return main([*map(str, arguments), "--device", "cpu", "--precision", "fp32", "--overlap", "0"])


def test_a_real_series_and_its_nifti_give_the_same_mask(tmp_path, real_data, series, model):
    nifti = real_data / "nsclc_ct" / "imagesTr" / "nsclc_pat4_0000.nii.gz"
    for source, out in ((series, "dicom"), (nifti, "nifti")):
        assert predict("-i", source, "-o", tmp_path / out, "--model", model) == 0
    masks = [
        read_volume(tmp_path / "dicom/dicom_pat4.nii.gz"),
        read_volume(tmp_path / "nifti/nsclc_pat4.nii.gz"),
    ]
    first, second = (orient(mask.array, plan_geometry(mask)) for mask in masks)
    assert first.any() and (first == second).all()
    reports = [
        json.loads(path.read_text())
        for out in ("dicom", "nifti")
        for path in (tmp_path / out / "reports").iterdir()
    ]
    assert reports[0]["classes"] == reports[1]["classes"]


def test_segmentation_and_structure_set_of_a_real_series_hold_the_masks_voxels(
    tmp_path, series, model, caplog
):
    import highdicom

    from lungkit.data.dicom import read_dicom_label, read_series

    out = tmp_path / "out"
    formats = ("--format", "nifti", "dicom-seg", "rtstruct")
    assert predict("-i", series, "-o", out, "--model", model, *formats, "--smallest-lesion-ml", 20) == 0
    scan = read_series(series)
    mask = read_volume(out / "dicom_pat4.nii.gz").array
    for suffix in ("seg", "rtstruct"):
        label, values = read_dicom_label(out / f"dicom_pat4_{suffix}.dcm", scan)
        assert (label.array == mask).all() and values == {"tumour": 1}
    seg = highdicom.seg.segread(str(out / "dicom_pat4_seg.dcm"))
    sources = [header.SOPInstanceUID for header in scan.headers]
    frames = seg.get_pixels_by_source_instance(sources, ignore_spatial_locations=True, segment_numbers=[1])
    assert (frames[..., 0].transpose(2, 1, 0) == mask).all()
    plain = pydicom.dcmread(out / "dicom_pat4_seg.dcm")
    assert np.count_nonzero(plain.pixel_array) == np.count_nonzero(mask)


def test_a_report_a_segment_a_lesion_and_the_preview_for_a_reading_room(tmp_path, model):
    import highdicom

    from lungkit.data.dicom import read_dicom_label, read_series

    hu = np.full((40, 36, 10), -1000, np.int16)
    hu[4:14, 5:11, 2:5], hu[25:29, 20:27, 6:9] = 35, -90
    write_ct(tmp_path / "series", hu)
    out = tmp_path / "out"
    formats = ("--format", "nifti", "dicom-sr", "dicom-sc")
    assert predict("-i", tmp_path / "series", "-o", out, "--model", model, *formats) == 0
    report = json.loads((out / "reports/series.json").read_text())
    lesions = report["classes"]["tumour"]["lesions"]
    assert len(lesions) == 2
    scan = read_series(tmp_path / "series")
    mask = read_volume(out / "series.nii.gz").array
    segments, values = read_dicom_label(out / "measurements/series_lesions.dcm", scan)
    assert list(values) == [f"tumour {number}" for number in range(1, len(lesions) + 1)]
    assert ((segments.array > 0) == (mask > 0)).all()
    groups = highdicom.sr.srread(
        out / "measurements/series_sr.dcm"
    ).content.get_volumetric_roi_measurement_groups()
    for value, (group, lesion) in enumerate(zip(groups, lesions, strict=True), start=1):
        inside = segments.array == value
        measured = {one.name.meaning: one.value for one in group.get_measurements()}
        assert np.count_nonzero(inside) == lesion["voxels"]
        assert measured == {
            "Volume": lesion["volume_ml"],
            "Long axis": lesion["longest_diameter_mm"],
            "Short axis": lesion["short_diameter_mm"],
            "Attenuation Coefficient": round(float(scan.volume.array[inside].mean()), 2),
        }
    picture = pydicom.dcmread(out / "previews/series_preview.dcm").pixel_array
    assert picture.shape[2] == 3 and picture.std() > 10
    written = {name for name in report["files"] if name.endswith(".dcm")}
    assert written == {str(path.relative_to(out)) for path in out.rglob("*.dcm")} and len(written) == 3


def test_a_scan_without_lesions_has_a_report_alone(tmp_path, model):
    write_ct(tmp_path / "series", np.full((20, 18, 9), -1000, np.int16))
    out = tmp_path / "mask.dcm"
    assert predict("-i", tmp_path / "series", "-o", out, "--model", model, "--format", "dicom-sr") == 0
    assert pydicom.dcmread(out).Modality == "SR"
    assert not (tmp_path / "mask_lesions.dcm").exists()


def test_no_report_log_or_name_tells_who_the_patient_is(tmp_path, model, caplog):
    write_ct(tmp_path / "series", np.random.default_rng(0).integers(-900, 900, (20, 18, 9)).astype(np.int16))
    out = tmp_path / "out"
    assert (
        predict("-i", tmp_path / "series", "-o", out, "--model", model, "--format", "nifti", "dicom-seg") == 0
    )
    texts = [path.read_text() for path in out.rglob("*.json*")]
    told = "".join([caplog.text, *texts, *(str(path) for path in out.rglob("*"))])
    assert len(texts) == 3 and PATIENT_NAME not in told and PATIENT_ID not in told
    assert str(pydicom.dcmread(out / "series_seg.dcm").PatientName) == PATIENT_NAME  # as DICOM wants it


def test_a_folder_of_series_is_predicted_and_a_broken_one_named(tmp_path, model):
    for name in ("first", "second"):
        write_ct(tmp_path / "all" / name)
    files(tmp_path / "all" / "first")[2].unlink()
    out = tmp_path / "out"
    assert predict("-i", tmp_path / "all", "-o", out, "--model", model) == 3
    assert [path.name for path in out.glob("*.nii.gz")] == ["second.nii.gz"]
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert {row["scan"]: row["status"] for row in rows} == {"first": "failed", "second": "ok"}


def test_a_zip_of_nested_series_is_predicted_and_known_again(tmp_path, model, caplog):
    for name in ("p1/study/ct", "p2/study/thin"):
        write_ct(tmp_path / "all" / name)
    path = shutil.make_archive(str(tmp_path / "export"), "zip", tmp_path / "all")
    for _ in range(2):
        assert predict("-i", path, "-o", tmp_path / "out", "--model", model) == 0
    assert sorted(path.name for path in (tmp_path / "out").glob("*.nii.gz")) == ["ct.nii.gz", "thin.nii.gz"]
    assert "0 predicted" in caplog.text and "2 done before" in caplog.text
    (tmp_path / "bad.zip").write_bytes(b"PK\x03\x04 no zip")
    assert predict("-i", tmp_path / "bad.zip", "-o", tmp_path / "other", "--model", model) == 3


def test_several_series_need_a_name(tmp_path, model, capsys):
    for number in (1, 2):
        write_ct(tmp_path / "both", series=number)
    assert predict("-i", tmp_path / "both", "-o", tmp_path / "a", "--model", model) == 3
    assert "--series" in capsys.readouterr().err
    assert (
        predict("-i", tmp_path / "both", "-o", tmp_path / "b", "--model", model, "--series", "1.2.3.2") == 0
    )
