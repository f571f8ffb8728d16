"""Masks from DICOM, whichever object holds them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dicom_cases import files, make_mask, write_ct

from lungkit.data import read_dicom_label, read_series, write_dicom_seg, write_rtstruct
from lungkit.errors import DataError


@pytest.mark.parametrize("write", [write_dicom_seg, write_rtstruct])
def test_structure_sets_and_segmentations_are_told_apart(tmp_path: Path, write: Callable[..., None]) -> None:
    write_ct(tmp_path / "ct")
    scan = read_series(tmp_path / "ct")
    write(tmp_path / "mask.dcm", scan, make_mask(), {"tumour": 1, "lung": 2})
    mask, labels = read_dicom_label(tmp_path / "mask.dcm", scan, names="tumour")
    assert labels == {"tumour": 1}
    np.testing.assert_array_equal(mask.array, make_mask() == 1)


@pytest.mark.parametrize("write", [write_dicom_seg, write_rtstruct])
@pytest.mark.parametrize(
    ("character_set", "patient", "labels", "expected"),
    [
        (None, "Doe^Jane", {"a": 1, "b": 2}, None),
        ("ISO_IR 100", "Müller^Jörg", {"a": 1, "b": 2}, "ISO_IR 100"),
        ("ISO_IR 100", "Müller^Jörg", {"Läsion β": 1, "肺": 2}, "ISO_IR 192"),
        (["", "ISO 2022 IR 87"], "Yamada^Tarou=山田^太郎", {"a": 1, "b": 2}, "ISO_IR 192"),
    ],
)
def test_names_in_any_script_survive(
    tmp_path: Path,
    write: Callable[..., None],
    character_set: Any,
    patient: str,
    labels: dict[str, int],
    expected: str | None,
) -> None:
    import pydicom

    def edit(dataset: Any, k: int) -> None:
        if character_set is not None:
            dataset.SpecificCharacterSet = character_set
        dataset.PatientName = patient

    write_ct(tmp_path / "ct", edit=edit)
    scan = read_series(tmp_path / "ct")
    write(tmp_path / "mask.dcm", scan, make_mask(), labels)
    dataset = pydicom.dcmread(tmp_path / "mask.dcm")
    assert dataset.get("SpecificCharacterSet") == expected
    assert dataset.PatientName == patient
    assert read_dicom_label(tmp_path / "mask.dcm", scan)[1] == labels


def test_a_slice_is_no_mask(tmp_path: Path) -> None:
    write_ct(tmp_path / "ct")
    scan = read_series(tmp_path / "ct")
    with pytest.raises(DataError, match=r"1-006-000\.dcm: CT Image Storage holds no mask"):
        read_dicom_label(files(tmp_path / "ct")[0], scan)
