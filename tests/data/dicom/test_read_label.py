"""Masks from DICOM, whichever object holds them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

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


def test_a_slice_is_no_mask(tmp_path: Path) -> None:
    write_ct(tmp_path / "ct")
    scan = read_series(tmp_path / "ct")
    with pytest.raises(DataError, match=r"1-006-000\.dcm: CT Image Storage holds no mask"):
        read_dicom_label(files(tmp_path / "ct")[0], scan)
