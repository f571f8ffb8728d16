"""The page of a scan is made of what was read, predicted or measured."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from lungkit.data import Volume
from lungkit.errors import DataError
from lungkit.metrics import CaseTable
from lungkit.pipeline.inputs import LoadedScan
from lungkit.pipeline.scan_pages import patient_facts, write_files_page, write_measured_page
from lungkit.report.evaluation import FOREGROUND, LabelScheme

SCAN = Volume(np.full((12, 10, 4), -700, np.int16), np.diag([-0.8, -0.8, 2.0, 1.0]))


def mask(value: int = 1, affine: np.ndarray = SCAN.affine) -> Volume:
    array = np.zeros(SCAN.array.shape, np.uint8)
    array[2:6, 2:6, 1:3] = value
    return Volume(array, affine)


def test_a_mask_without_names_of_classes_shows_its_values(tmp_path: Path) -> None:
    both = Volume(mask().array + 2 * np.roll(mask().array, 5, 0), SCAN.affine)
    write_files_page(tmp_path / "a.html", "a", LoadedScan((SCAN,)), [("prediction", both)])
    assert "value 2" in (tmp_path / "a.html").read_text()


def test_a_mask_on_another_grid_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="must lie on one grid"):
        write_files_page(
            tmp_path / "a.html", "a", LoadedScan((SCAN,)), [("prediction", mask(affine=np.eye(4)))]
        )
    assert not (tmp_path / "a.html").exists()


def test_several_models_and_their_metrics_stand_beside_the_truth(tmp_path: Path) -> None:
    table = CaseTable()
    table.add_row("a", "foreground", {"dice": 0.625, "tp": 3.0})
    write_measured_page(
        tmp_path / "a.html",
        "a",
        mask(),
        FOREGROUND,
        {"U": mask(), "V": mask()},
        {"U": table, "V": table},
        image=SCAN,
    )
    text = (tmp_path / "a.html").read_text()
    assert text.count("0.6250") == 2
    assert "Side by side" in text
    assert ">TP<" not in text


def test_what_is_to_be_ignored_is_no_lesion_of_the_truth(tmp_path: Path) -> None:
    scheme = LabelScheme({"background": 0, "tumour": 1}, ignore_value=3)
    write_measured_page(tmp_path / "a.html", "a", mask(3), scheme, {"": mask(0)}, {})
    assert "None." in (tmp_path / "a.html").read_text()


def test_patient_facts_are_those_that_the_header_has() -> None:
    header = SimpleNamespace(PatientName="Doe^Jane", PatientID="", StudyDate="20200101")
    scan = LoadedScan((SCAN,), SimpleNamespace(headers=(header,)))  # type: ignore[arg-type]
    assert patient_facts(scan) == {"Patient": "Doe^Jane", "Study date": "20200101"}
    assert patient_facts(LoadedScan((SCAN,))) == {}
