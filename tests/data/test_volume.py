"""Reading and writing NIfTI: geometry, types, scaling, and what is refused."""

from __future__ import annotations

import logging
import struct
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from lungkit import _atomic
from lungkit.data import NanPolicy, Volume, read_volume, write_nifti
from lungkit.errors import DataError, ResourceError, UsageError

AFFINE = np.array([[-0.7, 0.0, 0.0, 10.5], [0.0, 0.7, 0.0, -20.0], [0.0, 0.0, 2.5, 30.25], [0, 0, 0, 1.0]])


def save_with_header(path: Path, array: np.ndarray, *, kind: Any = nib.Nifti1Image, **fields: Any) -> Path:
    """Write with nibabel, then put ``fields`` into the header of the plain file as they are."""
    nib.save(kind(array, AFFINE), path)
    content = bytearray(path.read_bytes())
    header_class = kind.header_class
    size = header_class.template_dtype.itemsize
    header = header_class(bytes(content[:size]), check=False)
    for name, value in fields.items():
        header[name] = value
    content[:size] = header.binaryblock
    path.write_bytes(content)
    return path


@pytest.fixture
def array() -> np.ndarray:
    return np.random.default_rng(0).integers(-1000, 400, (5, 4, 3)).astype(np.int16)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "uint16", "int32", "float32"])
def test_written_array_reads_back_with_its_type(tmp_path: Path, suffix: str, dtype: str) -> None:
    array = np.random.default_rng(0).integers(0, 100, (5, 4, 3)).astype(dtype)
    write_nifti(tmp_path / f"a{suffix}", array, AFFINE)
    volume = read_volume(tmp_path / f"a{suffix}")
    assert volume.array.dtype == dtype
    np.testing.assert_array_equal(volume.array, array)
    np.testing.assert_allclose(volume.affine, AFFINE, atol=1e-6)


@pytest.mark.parametrize("order", ["C", "F"])
def test_nibabel_reads_what_we_write(tmp_path: Path, array: np.ndarray, order: Any) -> None:
    write_nifti(tmp_path / "a.nii.gz", np.asarray(array, order=order), AFFINE)
    image: Any = nib.load(tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(np.asanyarray(image.dataobj), array)
    np.testing.assert_allclose(image.get_qform(), AFFINE, atol=1e-5)
    np.testing.assert_allclose(image.header.get_zooms(), (0.7, 0.7, 2.5), rtol=1e-6)


def test_oblique_affine_survives_in_both_forms(tmp_path: Path, array: np.ndarray) -> None:
    angle = 0.3
    rotation = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1.0]])
    affine = np.eye(4)
    affine[:3, :3] = rotation * (0.7, 0.8, 2.5)
    write_nifti(tmp_path / "a.nii.gz", array, affine)
    image: Any = nib.load(tmp_path / "a.nii.gz")
    np.testing.assert_allclose(image.get_qform(), affine, atol=1e-5)
    np.testing.assert_allclose(read_volume(tmp_path / "a.nii.gz").spacing_mm, (0.7, 0.8, 2.5), rtol=1e-6)


def test_sheared_affine_is_kept_in_the_sform_alone(tmp_path: Path, array: np.ndarray) -> None:
    affine = AFFINE.copy()
    affine[1, 2] = 1.3  # gantry tilt
    write_nifti(tmp_path / "a.nii.gz", array, affine)
    image: Any = nib.load(tmp_path / "a.nii.gz")
    assert int(image.header["qform_code"]) == 0
    np.testing.assert_allclose(read_volume(tmp_path / "a.nii.gz").affine, affine, atol=1e-6)


def test_plain_int16_is_read_without_a_float_copy(tmp_path: Path, array: np.ndarray) -> None:
    write_nifti(tmp_path / "a.nii.gz", array, AFFINE)
    volume = read_volume(tmp_path / "a.nii.gz")
    assert volume.array.dtype == np.int16
    assert volume.array.flags.f_contiguous


def test_big_endian_file_reads_the_same(tmp_path: Path, array: np.ndarray) -> None:
    header = nib.Nifti1Header(endianness=">")
    header.set_data_dtype(">i2")
    nib.save(nib.Nifti1Image(array, AFFINE, header), tmp_path / "a.nii.gz")
    volume = read_volume(tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(volume.array, array)
    assert volume.array.dtype.isnative


def test_nifti2_is_read(tmp_path: Path, array: np.ndarray) -> None:
    nib.save(nib.Nifti2Image(array, AFFINE), tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(read_volume(tmp_path / "a.nii.gz").array, array)


def test_header_extension_is_skipped(tmp_path: Path, array: np.ndarray) -> None:
    image = nib.Nifti1Image(array, AFFINE)
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"scanner notes" * 20))
    nib.save(image, tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(read_volume(tmp_path / "a.nii.gz").array, array)


def test_slice_becomes_a_volume_of_one_slice(tmp_path: Path) -> None:
    write_nifti(tmp_path / "a.nii.gz", np.arange(12, dtype=np.int16).reshape(4, 3), AFFINE)
    volume = read_volume(tmp_path / "a.nii.gz")
    assert volume.array.shape == (4, 3, 1)
    assert volume.array[1, 2, 0] == 5


def test_trailing_axis_of_one_is_dropped(tmp_path: Path, array: np.ndarray) -> None:
    nib.save(nib.Nifti1Image(array[..., None], AFFINE), tmp_path / "a.nii.gz")
    assert read_volume(tmp_path / "a.nii.gz").array.shape == array.shape


def test_four_axes_are_refused_with_the_shape(tmp_path: Path, array: np.ndarray) -> None:
    nib.save(nib.Nifti1Image(np.stack([array, array], -1), AFFINE), tmp_path / "a.nii.gz")
    with pytest.raises(DataError, match=r"a\.nii\.gz: 4D file of shape \(5, 4, 3, 2\)"):
        read_volume(tmp_path / "a.nii.gz")


def test_fractional_slope_is_applied(tmp_path: Path, array: np.ndarray) -> None:
    path = save_with_header(tmp_path / "a.nii", array, scl_slope=0.5, scl_inter=-3.25)
    volume = read_volume(path)
    assert volume.array.dtype == np.float32
    np.testing.assert_allclose(volume.array, array * 0.5 - 3.25)


def test_whole_intercept_keeps_whole_numbers(tmp_path: Path) -> None:
    stored = np.array([0, 24, 4095], np.uint16).reshape(3, 1, 1)
    path = save_with_header(tmp_path / "a.nii", stored, scl_slope=1, scl_inter=-1024)
    volume = read_volume(path)
    assert volume.array.dtype == np.int16
    assert volume.array.ravel().tolist() == [-1024, -1000, 3071]


def test_scaled_values_beyond_int16_become_int32(tmp_path: Path) -> None:
    stored = np.array([0, 30000], np.int16).reshape(2, 1, 1)
    volume = read_volume(save_with_header(tmp_path / "a.nii", stored, scl_slope=100, scl_inter=0))
    assert volume.array.dtype == np.int32
    assert volume.array.ravel().tolist() == [0, 3_000_000]


def test_slope_of_zero_means_no_scaling(tmp_path: Path, array: np.ndarray) -> None:
    volume = read_volume(save_with_header(tmp_path / "a.nii", array, scl_slope=0, scl_inter=7))
    np.testing.assert_array_equal(volume.array, array)


def test_nan_is_refused_with_count_and_position(tmp_path: Path) -> None:
    array = np.zeros((5, 4, 3), np.float32)
    array[2, 3, 1] = np.nan
    array[4, 3, 2] = np.inf
    write_nifti(tmp_path / "a.nii.gz", array, AFFINE)
    with pytest.raises(DataError, match=r"2 of 60 voxels are NaN or infinite, the first at .* = \(2, 3, 1\)"):
        read_volume(tmp_path / "a.nii.gz")


def test_nan_policy_minimum_replaces_and_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    array = np.full((2, 2, 2), 5.0, np.float32)
    array[0, 0, 0], array[1, 1, 1] = np.nan, -7.0
    write_nifti(tmp_path / "a.nii.gz", array, AFFINE)
    with caplog.at_level(logging.WARNING, logger="lungkit"):
        volume = read_volume(tmp_path / "a.nii.gz", nan_policy=NanPolicy.MINIMUM)
    assert volume.array[0, 0, 0] == -7.0
    assert "1 of 8 voxels" in caplog.text


def test_all_nan_is_refused_under_either_policy(tmp_path: Path) -> None:
    write_nifti(tmp_path / "a.nii.gz", np.full((2, 2, 2), np.nan, np.float32), AFFINE)
    with pytest.raises(DataError, match="8 of 8"):
        read_volume(tmp_path / "a.nii.gz", nan_policy=NanPolicy.MINIMUM)


@pytest.mark.parametrize(
    ("array", "name"),
    [
        (np.zeros((2, 2, 2), np.complex64), "complex64"),
        (np.zeros((2, 2, 2), [("R", "u1"), ("G", "u1"), ("B", "u1")]), "RGB"),
    ],
)
def test_complex_and_colour_are_refused(tmp_path: Path, array: np.ndarray, name: str) -> None:
    nib.save(nib.Nifti1Image(array, AFFINE), tmp_path / "a.nii.gz")
    with pytest.raises(DataError, match=name):
        read_volume(tmp_path / "a.nii.gz")


def test_more_voxels_than_allowed_are_refused(tmp_path: Path, array: np.ndarray) -> None:
    write_nifti(tmp_path / "a.nii.gz", array, AFFINE)
    with pytest.raises(DataError, match="5 x 4 x 3 = 60 voxels, more than max_voxels = 59"):
        read_volume(tmp_path / "a.nii.gz", max_voxels=59)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_header_that_claims_far_more_than_the_file_holds_is_refused_before_allocation(
    tmp_path: Path, array: np.ndarray, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_with_header(tmp_path / "a.nii", array, dim=[3, 30000, 30000, 30000, 1, 1, 1, 1])
    if suffix == ".nii.gz":
        import gzip

        path = path.with_name("a.nii.gz")
        path.write_bytes(gzip.compress((tmp_path / "a.nii").read_bytes()))

    def refuse(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(np, "empty", refuse)
    with pytest.raises(DataError, match="more than the file can hold"):
        read_volume(path, max_voxels=2**62)


def test_lack_of_memory_is_a_resource_error(
    tmp_path: Path, array: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_nifti(tmp_path / "a.nii", array, AFFINE)

    def refuse(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(np, "empty", refuse)
    with pytest.raises(ResourceError, match="no memory for 60 voxels"):
        read_volume(tmp_path / "a.nii")


def test_plain_file_cut_short_is_refused(tmp_path: Path, array: np.ndarray) -> None:
    write_nifti(tmp_path / "a.nii", array, AFFINE)
    (tmp_path / "a.nii").write_bytes((tmp_path / "a.nii").read_bytes()[:-1])
    with pytest.raises(DataError, match=r"120 bytes.* holds 119"):
        read_volume(tmp_path / "a.nii")


def test_plain_file_with_bytes_to_spare_is_refused(tmp_path: Path, array: np.ndarray) -> None:
    write_nifti(tmp_path / "a.nii", array, AFFINE)
    with (tmp_path / "a.nii").open("ab") as file:
        file.write(b"xyz")
    with pytest.raises(DataError, match="3 bytes follow the voxels"):
        read_volume(tmp_path / "a.nii")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"empty \(0 bytes\)"),
        (b"\0" * 100, "truncated"),
        (b"\0" * 1000, "not a NIfTI file"),
        (b"\x5c\x01\0\0" + b"\0" * 1000, "wrong NIfTI mark"),
    ],
    ids=["empty", "short", "zeros", "mark"],
)
def test_file_that_is_not_nifti_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.nii").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_volume(tmp_path / "a.nii")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dim": [0, 5, 4, 3, 1, 1, 1, 1]}, "the header gives dim"),
        ({"dim": [3, 5, -4, 3, 1, 1, 1, 1]}, "the header gives dim"),
        ({"datatype": 1}, r"datatype 1 \(unknown\)"),
        ({"bitpix": 8}, "8 bits a voxel, datatype 4 has 16"),
        ({"vox_offset": 0}, "puts the voxels at byte 0"),
        ({"vox_offset": np.nan}, "puts the voxels at byte nan"),
        ({"vox_offset": 1e12}, r"puts the voxels at byte 1e\+12"),
        ({"scl_slope": 2, "scl_inter": np.inf}, "scl_slope and scl_inter"),
        ({"srow_x": [0, 0, 0, 0]}, r"affine is not invertible \[0 0 0 0"),
        ({"srow_x": [np.nan, 0, 0, 0]}, "values that are not finite"),
        ({"srow_x": [0, 0.7, 0, 0]}, "affine is not invertible"),
        ({"sform_code": 0, "qform_code": 1, "quatern_b": 3}, "geometry in the header"),
    ],
)
def test_impossible_header_is_refused(
    tmp_path: Path, array: np.ndarray, fields: dict[str, Any], message: str
) -> None:
    path = save_with_header(tmp_path / "a.nii", array, **fields)
    with pytest.raises(DataError, match=message):
        read_volume(path)


def test_missing_geometry_is_said_and_spacing_used(
    tmp_path: Path, array: np.ndarray, caplog: pytest.LogCaptureFixture
) -> None:
    path = save_with_header(tmp_path / "a.nii", array, sform_code=0, qform_code=0)
    with caplog.at_level(logging.WARNING, logger="lungkit"):
        volume = read_volume(path)
    assert "neither sform nor qform" in caplog.text
    np.testing.assert_allclose(volume.affine, np.diag([0.7, 0.7, 2.5, 1.0]), rtol=1e-6)


def test_absent_file_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_volume(tmp_path / "absent.nii.gz")


def test_folder_is_a_data_error(tmp_path: Path) -> None:
    (tmp_path / "a.nii").mkdir()
    with pytest.raises(DataError, match="not a regular file"):
        read_volume(tmp_path / "a.nii")


def test_other_format_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="convert the scan to NIfTI"):
        read_volume(tmp_path / "scan.mha")


@pytest.mark.parametrize(
    ("array", "stored"),
    [
        (np.array([[[True, False]]]), np.uint8),
        (np.array([[[0, 3]]], np.int64), np.uint8),
        (np.array([[[-1024, 3071]]], np.int64), np.int16),
        (np.array([[[0, 70000]]], np.int64), np.int32),
        (np.array([[[0.5, 1.0]]], np.float16), np.float32),
    ],
)
def test_written_type_is_the_smallest_that_holds_the_values(
    tmp_path: Path, array: np.ndarray, stored: type
) -> None:
    write_nifti(tmp_path / "a.nii.gz", array, AFFINE)
    volume = read_volume(tmp_path / "a.nii.gz")
    assert volume.array.dtype == stored
    np.testing.assert_array_equal(volume.array, array)


def test_equal_arrays_give_equal_files(tmp_path: Path, array: np.ndarray) -> None:
    write_nifti(tmp_path / "a.nii.gz", array, AFFINE)
    write_nifti(tmp_path / "b.nii.gz", array.copy(), AFFINE)
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()


@pytest.mark.parametrize(
    ("name", "array", "affine", "message"),
    [
        ("a.png", np.zeros((2, 2, 2)), AFFINE, "does not end with"),
        ("a.nii", np.zeros((2, 2, 2, 2)), AFFINE, r"shape \(2, 2, 2, 2\)"),
        ("a.nii", np.zeros((0, 2, 2)), AFFINE, r"shape \(0, 2, 2\)"),
        ("a.nii", np.zeros((2, 2, 2), complex), AFFINE, "dtype complex128"),
        ("a.nii", np.zeros((2, 2, 2)), np.zeros((4, 4)), "affine"),
        ("a.nii", np.zeros((2, 2, 2)), np.eye(3), "affine"),
    ],
)
def test_what_cannot_be_written_is_a_usage_error(
    tmp_path: Path, name: str, array: np.ndarray, affine: np.ndarray, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        write_nifti(tmp_path / name, array, affine)
    assert list(tmp_path.iterdir()) == []


def test_full_disk_keeps_the_old_file(
    tmp_path: Path, array: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_nifti(tmp_path / "a.nii.gz", array, AFFINE)
    before = (tmp_path / "a.nii.gz").read_bytes()

    def full(_: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_atomic, "flush", full)
    with pytest.raises(ResourceError, match=r"a\.nii\.gz: not written"):
        write_nifti(tmp_path / "a.nii.gz", array + 1, AFFINE)
    assert [path.name for path in tmp_path.iterdir()] == ["a.nii.gz"]
    assert (tmp_path / "a.nii.gz").read_bytes() == before


def test_simpleitk_places_voxels_where_we_do(tmp_path: Path, array: np.ndarray) -> None:
    sitk = pytest.importorskip("SimpleITK")
    write_nifti(tmp_path / "a.nii.gz", array, AFFINE)
    image = sitk.ReadImage(str(tmp_path / "a.nii.gz"))
    point = np.array(image.TransformIndexToPhysicalPoint((1, 2, 1))) * (-1, -1, 1)  # LPS to RAS
    np.testing.assert_allclose(point, (AFFINE @ (1, 2, 1, 1))[:3], atol=1e-4)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image).T, array)


@pytest.mark.parametrize(
    ("array", "affine", "message"),
    [
        (np.zeros((4, 4)), AFFINE, r"array: shape \(4, 4\), expected \(X, Y, Z\)"),
        (np.zeros((4, 4, 2, 1)), AFFINE, r"array: shape \(4, 4, 2, 1\)"),
        (np.zeros((0, 4, 2)), AFFINE, "holds no voxels"),
        (np.zeros((4, 4, 2), complex), AFFINE, "dtype complex128"),
        (np.full((4, 4, 2), "a"), AFFINE, "dtype <U1"),
        (np.zeros((4, 4, 2), object), AFFINE, "dtype object"),
        (np.zeros((4, 4, 2)), AFFINE[:3], r"affine: has shape \(3, 4\)"),
        (np.zeros((4, 4, 2)), AFFINE[:3, :3], r"affine: has shape \(3, 3\)"),
        (np.zeros((4, 4, 2)), np.zeros((4, 4)), "affine: does not end with"),
        (np.zeros((4, 4, 2)), np.diag([1, 1, 0, 1]), "affine: is not invertible"),
        (np.zeros((4, 4, 2)), np.full((4, 4), np.nan), "affine: holds values that are not finite"),
        (np.zeros((4, 4, 2)), "RAS", "affine: could not convert"),
        (np.zeros((4, 4, 2)), None, "affine: has shape"),
        (np.zeros((4, 4, 2)), [[1, 0], [0]], "affine: "),
    ],
)
def test_volume_refuses_what_is_no_volume(array: np.ndarray, affine: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Volume(array, affine)


def test_volume_takes_lists() -> None:
    volume = Volume([[[1, 2]], [[3, 4]]], AFFINE.tolist())  # type: ignore[arg-type]
    assert volume.array.shape == (2, 1, 2)
    np.testing.assert_array_equal(volume.affine, AFFINE)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_max_voxels_counts_bytes_of_wide_types(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"wide{suffix}"
    write_nifti(path, np.ones((8, 8, 8)), np.eye(4))
    with pytest.raises(
        DataError, match=r"\(8, 8, 8\) voxels of float64 take 4096 bytes, more than 4 \* max_voxels"
    ):
        read_volume(path, max_voxels=1023)
    assert read_volume(path, max_voxels=1024).array.dtype == np.float32
    write_nifti(path, np.ones((8, 8, 8), np.float32), np.eye(4))
    assert read_volume(path, max_voxels=512).array.size == 512


def test_a_scaled_volume_is_computed_in_parts_as_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "scaled.nii"
    stored = np.random.default_rng(0).integers(-(2**31), 2**31 - 1, (128, 128, 70), dtype=np.int32)
    write_nifti(path, stored, np.eye(4))
    content = bytearray(path.read_bytes())
    struct.pack_into("<ff", content, 112, 0.37, -11.5)  # scl_slope, scl_inter
    path.write_bytes(content)
    slope = float(np.float32(0.37))
    np.testing.assert_array_equal(read_volume(path).array, (stored * slope - 11.5).astype(np.float32))
