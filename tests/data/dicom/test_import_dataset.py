"""From DICOM folders to a dataset: cases, patients, structures, and what is passed over."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from dicom_cases import PATIENT_ID, change, make_hu, make_mask, write_ct

from lungkit.data import open_dataset, read_case, read_series, read_volume, write_dicom_seg, write_rtstruct
from lungkit.data.dicom.import_dataset import import_dicom
from lungkit.data.dicom.read_label import StructureRule
from lungkit.errors import DataError, UsageError

LABELS = {"GTV-1": 1, "Lung": 2}
TUMOUR = (StructureRule.parse("gtv.*=tumour"),)

Build = Callable[..., Path]


@pytest.fixture
def archive(tmp_path: Path) -> Build:
    """Adds PATIENT/STUDY/ct and, beside it, a mask of it."""

    def build(
        patient: str,
        series: int,
        *,
        labels: dict[str, int] | None = None,
        kind: str = "rtstruct",
        name: str = "m",
    ) -> Path:
        study = tmp_path / "src" / patient / f"study{series}"
        ids = change(PatientID=patient, PatientName=f"Name^{patient}")
        if not (study / "ct").exists():
            write_ct(study / "ct", make_hu(seed=series), series=series, edit=ids)
        scan = read_series(study / "ct")
        write = write_rtstruct if kind == "rtstruct" else write_dicom_seg
        write(study / f"{name}.dcm", scan, make_mask(), labels or LABELS)
        return tmp_path / "src"

    return build


def test_cases_hold_the_voxels_of_the_series_and_of_the_structures(archive: Build, tmp_path: Path) -> None:
    archive("A", 1)
    source = archive("B", 2, kind="seg")
    result = import_dicom(source, tmp_path / "out", rules=[*TUMOUR, StructureRule.parse("lung=lung")])
    dataset = open_dataset(tmp_path / "out")
    assert dataset.labels == {"background": 0, "tumour": 1, "lung": 2}
    assert [case.case_id for case in result.cases] == ["p001-ct1", "p002-ct1"]
    for number, case in enumerate(dataset.cases, start=1):
        (image,), label = read_case(case, dataset.label_map)
        np.testing.assert_array_equal(image.array, make_hu(seed=number))
        assert label is not None
        np.testing.assert_array_equal(label.array, make_mask())
    assert result.cases[0].volume_ml["tumour"] == pytest.approx(
        (make_mask() == 1).sum() * 0.7 * 0.9 * 2.5 / 1000
    )
    assert not result.failed and not result.unlabelled


def test_a_real_structure_set_becomes_the_real_mask(real_data: Path, tmp_path: Path) -> None:
    import_dicom(real_data / "dicom_pat4", tmp_path / "out", rules=TUMOUR)
    for new, old in (
        ("imagesTr/p001-ct1_0000", "imagesTr/nsclc_pat4_0000"),
        ("labelsTr/p001-ct1", "labelsTr/nsclc_pat4"),
    ):
        made, expected = (
            read_volume(tmp_path / "out" / f"{new}.nii.gz"),
            read_volume(real_data / "nsclc_ct" / f"{old}.nii.gz"),
        )
        np.testing.assert_array_equal(made.array, expected.array)
        np.testing.assert_allclose(made.affine, expected.affine, atol=1e-4)


def test_scans_of_one_patient_stay_in_one_fold(archive: Build, tmp_path: Path) -> None:
    for patient, series in (("A", 1), ("A", 2), ("B", 3)):
        source = archive(patient, series)
    import_dicom(source, tmp_path / "out", rules=TUMOUR)
    groups = {case.case_id: case.group for case in open_dataset(tmp_path / "out").cases}
    assert groups == {"p001-ct1": "p001", "p001-ct2": "p001", "p002-ct1": "p002"}


def test_nothing_that_is_written_tells_who_the_patient_is(archive: Build, tmp_path: Path) -> None:
    source = archive(PATIENT_ID, 1)
    import_dicom(source, tmp_path / "out", rules=TUMOUR)
    for path in sorted((tmp_path / "out").rglob("*")):
        assert PATIENT_ID not in path.name
        assert path.is_dir() or PATIENT_ID.encode() not in path.read_bytes()
    import_dicom(source, tmp_path / "named", rules=TUMOUR, name_patients=True)
    assert [case.case_id for case in open_dataset(tmp_path / "named").cases] == [f"{PATIENT_ID}-ct1"]


def test_where_classes_overlap_the_first_stays(archive: Build, tmp_path: Path) -> None:
    archive("A", 1, labels={"GTV-1": 1, "node": 2})
    source = archive("A", 1, labels={"Lung": 1, "x": 2}, name="second")
    rules = [*TUMOUR, StructureRule.parse("lung|node=rest")]
    import_dicom(source, tmp_path / "out", rules=rules, unite=True)
    label = read_volume(tmp_path / "out" / "labelsTr" / "p001-ct1.nii.gz").array
    np.testing.assert_array_equal(label, make_mask())


def test_several_masks_of_one_series_are_not_chosen_among(archive: Build, tmp_path: Path) -> None:
    archive("A", 1)
    archive("A", 1, kind="seg", name="seg")
    source = archive("B", 2)
    result = import_dicom(source, tmp_path / "out", rules=TUMOUR)
    assert [case.case_id for case in result.cases] == ["p002-ct1"]
    ((path, reason),) = result.failed.items()
    assert path == source / "A" / "study1" / "ct" and "2 masks hold a structure that is wanted" in reason
    assert len(import_dicom(source, tmp_path / "one", rules=TUMOUR, kinds=["seg"]).cases) == 1
    assert len(import_dicom(source, tmp_path / "both", rules=TUMOUR, unite=True).cases) == 2


def test_what_is_passed_over_is_named_with_the_reason(archive: Build, tmp_path: Path) -> None:
    archive("A", 1)
    archive("B", 2, labels={"Heart": 1, "Lung": 2})
    source = archive("C", 3)
    write_ct(source / "D" / "ct", series=4)
    (source / "C" / "study3" / "ct").rename(tmp_path / "gone")
    result = import_dicom(source, tmp_path / "out", rules=TUMOUR)
    assert [case.case_id for case in result.cases] == ["p001-ct1"]
    assert "holds 'Heart', 'Lung'" in result.unlabelled[source / "B" / "study2" / "ct"].replace(
        "hold ", "holds "
    )
    assert "no mask" in result.unlabelled[source / "D" / "ct"]
    assert "is not there" in result.failed[source / "C" / "study3" / "m.dcm"]


def test_one_structure_needs_no_rule_and_several_are_listed(archive: Build, tmp_path: Path) -> None:
    source = archive("A", 1)
    with pytest.raises(DataError, match=r"several structures: 'GTV-1' \(1\), 'Lung' \(1\); .*--roi"):
        import_dicom(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (source / "A" / "study1" / "m.dcm").unlink()
    mask = (make_mask() == 1).astype(np.uint8)
    write_rtstruct(
        source / "A" / "study1" / "m.dcm", read_series(source / "A" / "study1" / "ct"), mask, {"GTV-1": 1}
    )
    import_dicom(source, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "dataset.json").read_text())["labels"] == {
        "background": 0,
        "GTV-1": 1,
    }


def test_nothing_stays_where_no_case_comes_out_or_the_disk_is_full(
    archive: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = archive("A", 1)
    with pytest.raises(
        DataError, match=r"no CT series with a mask that can be used \(1 series, 1 masks found\)"
    ):
        import_dicom(source, tmp_path / "out" / "deep", rules=[StructureRule.parse("nodule=tumour")])

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lungkit.data.dicom.import_dataset.write_json_atomic", interrupt)
    with pytest.raises(KeyboardInterrupt):
        import_dicom(source, tmp_path / "out" / "deep", rules=TUMOUR)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_folder_that_holds_something_is_not_touched(archive: Build, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    with pytest.raises(UsageError, match="is not an empty folder"):
        import_dicom(archive("A", 1), tmp_path / "out", rules=TUMOUR)


@pytest.mark.parametrize("text", ["tumour", "=tumour", "gtv=", "(=tumour"])
def test_rules_of_another_form_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--roi"):
        StructureRule.parse(text)


def test_a_rule_fits_whole_names_in_any_case() -> None:
    rule = StructureRule.parse("gtv.?[12]=tumour")
    assert [name for name in ("GTV-1", " gtv2 ", "CTV1", "GTV-1 old") if rule.fits(name)] == [
        "GTV-1",
        " gtv2 ",
    ]
