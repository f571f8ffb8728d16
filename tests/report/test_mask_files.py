"""Masks in DICOM: paired, chosen by structure, read on the grid of their series or of the other mask."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from dicom_cases import OBLIQUE, make_mask, write_ct

from lungkit.cli.evaluate import main
from lungkit.data import read_series, write_dicom_seg, write_nifti, write_rtstruct
from lungkit.data.dicom import DicomScan
from lungkit.data.dicom.archive import find_archive
from lungkit.data.dicom.read_label import StructureRule
from lungkit.errors import DataError
from lungkit.report.mask_files import MaskReader, find_pairs

CLASSES = {"background": 0, "tumour": 1, "lung": 2}
WRITERS = {"seg": write_dicom_seg, "rtstruct": write_rtstruct}


@pytest.fixture(params=[{}, {"orientation": OBLIQUE}], ids=["axial", "oblique"])
def scan(request: pytest.FixtureRequest, tmp_path: Path) -> DicomScan:
    write_ct(tmp_path / "scans" / "patient" / "ct", **request.param)
    return read_series(tmp_path / "scans" / "patient" / "ct")


@pytest.fixture
def masks(scan: DicomScan, tmp_path: Path) -> Path:
    """One mask in three forms, in a folder without the series."""
    folder = tmp_path / "masks"
    folder.mkdir()
    write_nifti(folder / "a.nii.gz", make_mask(), scan.volume.affine)
    for kind, write in WRITERS.items():
        write(folder / f"a_{kind}.dcm", scan, make_mask(), {"tumour": 1, "lung": 2})
    return folder


@pytest.mark.parametrize("kind", WRITERS)
def test_a_dicom_mask_is_read_on_the_grid_of_the_nifti_file(masks: Path, kind: str) -> None:
    for pair in (
        (masks / "a.nii.gz", masks / f"a_{kind}.dcm"),
        (masks / f"a_{kind}.dcm", masks / "a.nii.gz"),
    ):
        first, second = MaskReader(CLASSES).read(*pair)
        np.testing.assert_array_equal(first.array, second.array)
        np.testing.assert_array_equal(first.array, make_mask())


def test_two_dicom_masks_are_read_on_the_grid_of_their_series(masks: Path, tmp_path: Path) -> None:
    pair = masks / "a_seg.dcm", masks / "a_rtstruct.dcm"
    with pytest.raises(DataError, match=r"masks does not hold the CT series .*--scans"):
        MaskReader(CLASSES).read(*pair)
    first, second = MaskReader(CLASSES, archive=find_archive(tmp_path / "scans")).read(*pair)
    np.testing.assert_array_equal(first.array, make_mask())
    np.testing.assert_array_equal(second.array, make_mask())
    beside = masks / "b_seg.dcm"
    (masks / "a_seg.dcm").rename(tmp_path / "scans" / beside.name)
    first, _ = MaskReader(CLASSES).read(tmp_path / "scans" / beside.name, masks / "a_rtstruct.dcm")
    np.testing.assert_array_equal(first.array, make_mask())


def test_structures_are_chosen_by_rule_or_by_the_name_of_the_class(
    scan: DicomScan, masks: Path, tmp_path: Path
) -> None:
    write_rtstruct(masks / "b.dcm", scan, make_mask(), {"GTV-1": 1, "Lung": 2})
    rules = (StructureRule.parse("gtv.*=tumour"),)
    found = MaskReader(CLASSES, rules).read(masks / "a.nii.gz", masks / "b.dcm")[1]
    np.testing.assert_array_equal(found.array, make_mask() == 1)
    found = MaskReader(CLASSES).read(masks / "a.nii.gz", masks / "b.dcm")[1]
    np.testing.assert_array_equal(found.array, np.where(make_mask() == 2, 2, 0))
    with pytest.raises(DataError, match=r"holds 'GTV-1', 'Lung', the classes are nodule; .*--roi"):
        MaskReader({"background": 0, "nodule": 1}).read(masks / "a.nii.gz", masks / "b.dcm")


def test_rules_for_the_names_of_one_mask_leave_the_other_to_the_names_of_the_classes(
    scan: DicomScan, masks: Path, tmp_path: Path
) -> None:
    write_rtstruct(masks / "b.dcm", scan, make_mask(), {"GTV-1": 1, "Lung": 2})
    reader = MaskReader(
        {"background": 0, "tumour": 1},
        (StructureRule.parse("GTV.*=tumour"),),
        find_archive(tmp_path / "scans"),
    )
    for found in reader.read(masks / "a_seg.dcm", masks / "b.dcm"):
        np.testing.assert_array_equal(found.array, make_mask() == 1)
    both = tuple(map(StructureRule.parse, ("GTV.*=tumour", "lung=lung")))
    for found in MaskReader(CLASSES, both, reader.archive).read(masks / "a_seg.dcm", masks / "b.dcm"):
        np.testing.assert_array_equal(found.array, make_mask())


def test_a_mask_of_which_no_structure_is_chosen_is_refused(scan: DicomScan, masks: Path) -> None:
    write_rtstruct(masks / "b.dcm", scan, (make_mask() == 2).astype(np.uint8), {"Lung": 1})
    rules = (StructureRule.parse("GTV.*=tumour"),)
    with pytest.raises(DataError, match=r"holds 'Lung', the classes are tumour; .*--roi"):
        MaskReader({"background": 0, "tumour": 1}, rules).read(masks / "a.nii.gz", masks / "b.dcm")


def test_values_are_those_of_the_other_masks(scan: DicomScan, masks: Path) -> None:
    values = {"background": 0, "tumour": 7, "lung": 300}
    found = MaskReader(values).read(masks / "a.nii.gz", masks / "a_seg.dcm")[1]
    assert np.unique(found.array).tolist() == [0, 7, 300]


def test_folders_of_dicom_masks_are_paired_by_name(scan: DicomScan, masks: Path, tmp_path: Path) -> None:
    (tmp_path / "labels").mkdir()
    write_rtstruct(tmp_path / "labels" / "a.dcm", scan, make_mask(), {"tumour": 1, "lung": 2})
    (tmp_path / "labels" / "notes.dcm").write_text("no mask")
    found = find_pairs(masks, tmp_path / "labels")
    assert found.pairs == {
        "a": (masks / "a.nii.gz", tmp_path / "labels" / "a.dcm")
    }  # NIfTI where there are both
    (masks / "a.nii.gz").unlink()
    with pytest.raises(DataError, match=r"a_rtstruct\.dcm and a_seg\.dcm are masks of one case"):
        find_pairs(masks, tmp_path / "labels")


def test_a_scan_is_no_mask(scan: DicomScan, masks: Path) -> None:
    with pytest.raises(DataError, match="holds no mask"):
        MaskReader(CLASSES).read(masks / "a.nii.gz", scan.series.files[0])


@pytest.mark.parametrize("kind", WRITERS)
def test_the_command_measures_them(
    masks: Path, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [
        str(masks / "a.nii.gz"),
        str(masks / f"a_{kind}.dcm"),
        "-o",
        str(tmp_path / "out"),
        "--metrics",
        "overlap",
    ]
    assert main([*given, "--label", "tumour=1", "--label", "lung=2"]) == 0
    assert "1.000" in capsys.readouterr().out
    assert main([*given, "--roi", "tumour=nodule", "--label", "tumour=1"]) == 2
    assert "nodule is none of the classes" in capsys.readouterr().err


def test_real_contours_are_measured_against_the_real_mask(
    real_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    label = real_data / "nsclc_ct" / "labelsTr" / "nsclc_pat4.nii.gz"
    contours = real_data / "dicom_pat4" / "DCM_RS_00056.dcm"
    options = [
        "-o",
        str(tmp_path / "out"),
        "--roi",
        "GTV.*=tumour",
        "--label",
        "tumour=1",
        "--metrics",
        "overlap",
    ]
    assert main([str(label), str(contours), *options]) == 0
    assert "1.000" in capsys.readouterr().out


def test_a_dataset_json_among_masks_is_no_dataset(masks: Path, tmp_path: Path) -> None:
    (masks / "dataset.json").write_text("{}")
    assert list(find_pairs(masks, masks).pairs) == ["a"]
