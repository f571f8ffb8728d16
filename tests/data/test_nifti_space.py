"""Geometry fields of NIfTI headers, read as the standard and ITK read them, and written back as they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from lungkit.data import read_volume, write_nifti
from lungkit.errors import DataError, UsageError

AFFINE = np.array([[-0.7, 0, 0, 10.5], [0, -0.7, 0, 20.0], [0, 0, 2.5, -30.25], [0, 0, 0, 1.0]])
HALF = float(np.sqrt(0.5))
ONLY_QFORM = {"sform_code": 0, "qform_code": 1}
NO_ROWS = {"srow_x": [0.0] * 4, "srow_y": [0.0] * 4, "srow_z": [0.0] * 4}


def write(path: Path, *, kind: Any = nib.Nifti1Image, endianness: str = "<", **fields: Any) -> Path:
    """Both forms are AFFINE, then ``fields`` are put into the header as they are."""
    header = kind.header_class(endianness=endianness)
    image = kind(np.zeros((4, 5, 6), np.int16), AFFINE, header)
    image.set_sform(AFFINE, 1)
    image.set_qform(AFFINE, 1)
    nib.save(image, path)
    content = bytearray(path.read_bytes())
    size = kind.header_class.template_dtype.itemsize
    changed = kind.header_class(bytes(content[:size]), endianness=endianness, check=False)
    for name, value in fields.items():
        changed[name] = value
    content[:size] = changed.binaryblock
    path.write_bytes(content)
    return path


def itk_affine(path: Path) -> np.ndarray:
    """Voxels to RAS+ mm as ITK has it."""
    sitk = pytest.importorskip("SimpleITK")
    image = sitk.ReadImage(str(path))
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * np.array(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


@pytest.mark.parametrize(
    ("units", "factor"), [(0, 1), (1, 1e3), (2, 1), (3, 1e-3), (10, 1), (11, 1e-3), (17, 1e3)]
)
@pytest.mark.parametrize(
    "fields", [{}, ONLY_QFORM, {"sform_code": 0, "qform_code": 0}], ids=["s", "q", "none"]
)
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("endianness", ["<", ">"])
def test_lengths_are_converted_to_millimetres(
    tmp_path: Path, units: int, factor: float, fields: dict[str, int], kind: Any, endianness: str
) -> None:
    path = write(tmp_path / "a.nii", kind=kind, endianness=endianness, xyzt_units=units, **fields)
    expected = (0.7 * factor, 0.7 * factor, 2.5 * factor)
    np.testing.assert_allclose(read_volume(path).spacing_mm, expected, rtol=1e-6)


@pytest.mark.parametrize(
    "fields",
    [
        *({"xyzt_units": units} for units in (0, 1, 2, 3, 4, 11)),
        *(
            {"pixdim": [qfac, 0.7, 0.7, 2.5, 0, 0, 0, 0], **ONLY_QFORM}
            for qfac in (0, 1, -1, -0.5, 0.5, 2, np.nan)
        ),
        *(
            {
                "quatern_b": HALF * np.sqrt(1 + off),
                "quatern_c": HALF * np.sqrt(1 + off),
                "quatern_d": 0,
                **ONLY_QFORM,
            }
            for off in (-2e-5, 1e-8, 2e-5, 1e-3)
        ),
        NO_ROWS,
        {"srow_x": [0.0] * 4},
        {"quatern_b": np.nan},
        {"quatern_b": 3},
        {"sform_code": -1},
        {"qform_code": -1},
        {"sform_code": 0, "qform_code": 9},
        {"sform_code": 9, "qform_code": 0},
        {"dim": [4, 4, 5, 6, 0, 0, 0, 0]},
    ],
    ids=str,
)
@pytest.mark.parametrize("endianness", ["<", ">"])
def test_odd_headers_are_read_as_itk_reads_them(
    tmp_path: Path, fields: dict[str, Any], endianness: str
) -> None:
    path = write(tmp_path / "a.nii", endianness=endianness, **fields)
    np.testing.assert_allclose(read_volume(path).affine, itk_affine(path), atol=1e-4)


@pytest.mark.parametrize("bad", [NO_ROWS, {"srow_y": [np.nan] * 4}, {"srow_x": [0, -0.7, 0, 0]}], ids=str)
def test_an_sform_that_cannot_be_used_gives_way_to_the_qform_and_is_named(
    tmp_path: Path, bad: dict[str, Any]
) -> None:
    volume = read_volume(write(tmp_path / "a.nii", **bad))
    np.testing.assert_allclose(volume.affine, AFFINE, atol=1e-5)
    assert len(volume.notes) == 1
    assert volume.notes[0].startswith("the sform ")


def test_a_good_header_has_no_notes(tmp_path: Path) -> None:
    assert read_volume(write(tmp_path / "a.nii")).notes == ()


def test_a_quaternion_that_is_none_is_refused_where_there_is_no_sform(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="quaternion 2, 0, 0 is no rotation"):
        read_volume(write(tmp_path / "a.nii", quatern_b=2, quatern_c=0, quatern_d=0, **ONLY_QFORM))


@pytest.mark.parametrize("code", [1, 2, 4])
@pytest.mark.parametrize("change", ["moved", "mirrored", "scaled"])
def test_forms_that_disagree_are_named_and_kept_in_a_mask(tmp_path: Path, code: int, change: str) -> None:
    other = AFFINE.copy()
    if change == "moved":
        other[:3, 3] += (40, -25, 15)
    elif change == "mirrored":
        other[0] *= -1
    else:
        other[:3, :3] *= 2
    rows = {name: list(row) for name, row in zip(("srow_x", "srow_y", "srow_z"), other, strict=False)}
    path = write(tmp_path / "a.nii", sform_code=code, **rows)
    scan = read_volume(path)
    assert "sform and qform disagree" in scan.notes[0]
    np.testing.assert_allclose(scan.affine, other, atol=1e-5)
    write_nifti(tmp_path / "mask.nii.gz", np.ones((4, 5, 6), bool), scan.affine, space=scan.space)
    before: Any = nib.load(path)
    after: Any = nib.load(tmp_path / "mask.nii.gz")
    np.testing.assert_allclose(after.affine, before.affine, atol=1e-6)
    np.testing.assert_allclose(after.get_qform(), before.get_qform(), atol=1e-6)
    assert (int(after.header["sform_code"]), int(after.header["qform_code"])) == (code, 1)
    np.testing.assert_allclose(itk_affine(tmp_path / "mask.nii.gz"), itk_affine(path), atol=1e-5)


def test_a_spacing_that_is_another_in_pixdim_is_named(tmp_path: Path) -> None:
    volume = read_volume(write(tmp_path / "a.nii", qform_code=0, pixdim=[1, 1, 1, 1, 0, 0, 0, 0]))
    assert volume.notes[0].startswith("the sform has a spacing of 0.7, 0.7, 2.5 mm, pixdim says 1, 1, 1")


def test_a_mask_keeps_the_units_of_its_scan(tmp_path: Path) -> None:
    scan = read_volume(write(tmp_path / "a.nii", xyzt_units=3))
    write_nifti(tmp_path / "mask.nii", np.ones((4, 5, 6), bool), scan.affine, space=scan.space)
    mask = read_volume(tmp_path / "mask.nii")
    assert mask.space == scan.space
    np.testing.assert_array_equal(mask.affine, scan.affine)


def test_space_of_another_volume_is_refused(tmp_path: Path) -> None:
    scan = read_volume(write(tmp_path / "a.nii"))
    with pytest.raises(UsageError, match="space: puts the voxels elsewhere"):
        write_nifti(tmp_path / "b.nii", np.ones((4, 5, 6), bool), np.eye(4), space=scan.space)
    assert not (tmp_path / "b.nii").exists()
