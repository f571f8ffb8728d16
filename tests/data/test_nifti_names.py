"""Names of NIfTI files: any case of the suffix, four digits for a channel."""

from __future__ import annotations

from pathlib import Path

import pytest

from lungkit.data.nifti_names import is_nifti, nifti_by_stem, nifti_files, split_channel, split_suffix
from lungkit.errors import DataError


@pytest.mark.parametrize(
    ("name", "stem", "suffix"),
    [
        ("a.nii", "a", ".nii"),
        ("a.nii.gz", "a", ".nii.gz"),
        ("A.NII.GZ", "A", ".NII.GZ"),
        ("a.b.Nii.gz", "a.b", ".Nii.gz"),
        ("a.nii.nii.gz", "a.nii", ".nii.gz"),
        ("a.gz", "a.gz", ""),
        (".nii.gz", ".nii.gz", ""),
        ("nii", "nii", ""),
    ],
)
def test_the_suffix_counts_in_any_case(name: str, stem: str, suffix: str) -> None:
    assert split_suffix(name) == (stem, suffix)
    assert is_nifti(name) == bool(suffix)


@pytest.mark.parametrize(
    ("stem", "expected"),
    [
        ("p_0000", ("p", 0)),
        ("p_0_0012", ("p_0", 12)),
        ("p_000", ("p_000", None)),
        ("p_00000", ("p_00000", None)),
        ("_0000", ("_0000", None)),
        ("p_٠٠٠٠", ("p_٠٠٠٠", None)),
    ],
)
def test_a_channel_is_four_digits_after_a_case(stem: str, expected: tuple[str, int | None]) -> None:
    assert split_channel(stem) == expected


def test_files_of_a_folder_by_suffix_without_hidden_ones(tmp_path: Path) -> None:
    for name in ("b.nii", "a.NII.GZ", "._a.nii.gz", "notes.txt"):
        (tmp_path / name).touch()
    assert [stem for stem, _ in nifti_files(tmp_path)] == ["a", "b"]
    assert [path.name for _, path in nifti_files(tmp_path, ".nii.gz")] == ["a.NII.GZ"]
    assert nifti_files(tmp_path / "absent") == []


def test_one_name_with_two_suffixes_is_refused(tmp_path: Path) -> None:
    for name in ("a.nii", "a.nii.GZ"):
        (tmp_path / name).touch()
    with pytest.raises(DataError, match="a exist with two suffixes"):
        nifti_by_stem(tmp_path)
