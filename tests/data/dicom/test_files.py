"""DICOM files of a folder: damaged ones, foreign ones, and what is never said about a patient."""

from __future__ import annotations

import logging
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dicom_cases import PATIENT_ID, PATIENT_NAME, change, files, write_ct

from lungkit.data import read_series
from lungkit.errors import DataError, UsageError


def test_a_number_or_text_that_no_one_needs_may_be_broken(tmp_path: Path) -> None:
    def edit(dataset: Any, k: int) -> None:
        for keyword in ("SeriesNumber", "PatientWeight", "SliceThickness", "InstanceNumber"):
            dataset.add_new(keyword, "DS" if keyword in ("PatientWeight", "SliceThickness") else "IS", None)
            dataset[keyword]._value = "a few"

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hu = write_ct(tmp_path / "ct", edit=edit)
    np.testing.assert_array_equal(read_series(tmp_path / "ct").volume.array, hu)


def test_a_file_named_like_a_slice_that_is_none_is_refused(tmp_path: Path) -> None:
    write_ct(tmp_path / "ct")
    (tmp_path / "ct" / "IM0007.dcm").write_bytes(b"\0" * 400)
    with pytest.raises(DataError, match=r"IM0007\.dcm: not a DICOM file"):
        read_series(tmp_path / "ct")


def test_no_warning_log_or_message_quotes_the_patient(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write_ct(tmp_path / "ct", edit=change(2, PatientBirthDate=PATIENT_NAME, StudyTime=PATIENT_ID))
    caplog.clear()
    random, said = np.random.default_rng(0), []
    path = files(tmp_path / "ct")[2]
    content = path.read_bytes()
    with caplog.at_level(logging.DEBUG), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for position in random.integers(128, len(content) - 240, 150):
            damaged = bytearray(content)
            damaged[position] ^= 0x55
            path.write_bytes(damaged)
            try:
                read_series(tmp_path / "ct")
            except DataError as error:  # nothing else may come out
                said.append(str(error))
    assert len(said) > 50
    everything = " ".join([*said, caplog.text, *(str(warning.message) for warning in caught)])
    assert PATIENT_NAME not in everything
    assert PATIENT_ID not in everything


def test_importing_the_package_does_not_import_pydicom() -> None:
    script = (
        "import sys, lungkit.data.dicom; print([m for m in ('pydicom', 'highdicom') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_without_pydicom_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_ct(tmp_path / "ct")
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(UsageError, match=r"pip install 'lungkit\[dicom\]'"):
        read_series(tmp_path / "ct")


def test_a_deflated_file_that_unpacks_without_end_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import zlib

    from pydicom.uid import DeflatedExplicitVRLittleEndian

    from lungkit.data.dicom import files as module

    def deflate(dataset: Any, k: int) -> None:
        dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian

    folder = tmp_path / "ct"
    hu = write_ct(folder, edit=deflate)
    np.testing.assert_array_equal(read_series(folder).volume.array, hu)
    path = files(folder)[2]
    content = path.read_bytes()
    start = 132 + 12 + int.from_bytes(content[140:144], "little")
    inflated = zlib.decompress(content[start:], -15)
    deflater = zlib.compressobj(9, wbits=-15)
    bomb = deflater.compress(inflated) + deflater.compress(bytes(3 << 20)) + deflater.flush()
    path.write_bytes(content[:start] + bomb)
    monkeypatch.setattr(module, "_MOST_INFLATED", 1 << 20)
    monkeypatch.setattr("pydicom.dcmread", lambda *_, **__: pytest.fail("it is unpacked"))
    with pytest.raises(DataError, match=rf"{path.name}: .* bytes that unpack to more than 1048576"):
        module.read_dataset(path, pixels=False)
