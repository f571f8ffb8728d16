"""Positions of slices: which stacks are a grid, and what is said of those that are not."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dicom_cases import OBLIQUE, files, make_hu, write_ct

from lungkit.data import read_series
from lungkit.errors import DataError


def at(slice_index: int, keyword: str, value: list[float]) -> Callable[[Any, int], None]:
    """An edit that sets one attribute of one slice."""

    def edit(dataset: Any, k: int) -> None:
        if k == slice_index:
            setattr(dataset, keyword, value)

    return edit


@pytest.mark.parametrize(("gone", "count"), [([3], 1), ([2, 3], 2)])
def test_missing_slices_are_counted_and_placed(tmp_path: Path, gone: list[int], count: int) -> None:
    write_ct(tmp_path / "ct")
    for index in gone:
        files(tmp_path / "ct")[index - (0 if index == gone[0] else 1)].unlink()
    before, after = gone[0] - 1, gone[-1] + 1
    place = rf"{count} between 1-00{6 - before}-00{before}.dcm \({100 + 2.5 * before:.3f} mm\) and 1-00{6 - after}"
    with pytest.raises(DataError, match=rf"slices are missing, at a spacing of 2.500 mm: {place}"):
        read_series(tmp_path / "ct")


def test_one_gap_between_three_slices_counts_as_missing(tmp_path: Path) -> None:
    write_ct(tmp_path / "ct", make_hu((4, 4, 4)))
    files(tmp_path / "ct")[1].unlink()
    with pytest.raises(DataError, match=r"1 between .*000.dcm .* and .*002.dcm"):
        read_series(tmp_path / "ct")


def test_a_copied_slice_is_told_from_a_second_phase(tmp_path: Path) -> None:
    write_ct(tmp_path / "copy")
    shutil.copy(files(tmp_path / "copy")[2], tmp_path / "copy" / "again.dcm")
    with pytest.raises(DataError, match=r"more than once: 1-004-002.dcm and again.dcm at 105.000 mm"):
        read_series(tmp_path / "copy")
    write_ct(tmp_path / "phase", edit=at(3, "ImagePositionPatient", [-50, -60, 105]))
    with pytest.raises(
        DataError, match=r"two slices at one position: 1-003-003.dcm and 1-004-002.dcm at 105.000"
    ):
        read_series(tmp_path / "phase")


def test_uneven_spacing_names_the_gap(tmp_path: Path) -> None:
    write_ct(tmp_path / "ct", edit=at(5, "ImagePositionPatient", [-50, -60, 113.5]))
    with pytest.raises(
        DataError, match=r"2.500 mm, but 3.500 mm between 1-002-004.dcm \(110.000 mm\) and 1-001-005"
    ):
        read_series(tmp_path / "ct")


def test_a_slice_shifted_sideways_is_refused(tmp_path: Path) -> None:
    write_ct(tmp_path / "ct", edit=at(3, "ImagePositionPatient", [-50, -61, 107.5]))
    with pytest.raises(DataError, match=r"1-003-003.dcm: at \(-50, -61, 107.5\) mm, 0.8\d\d mm away"):
        read_series(tmp_path / "ct")


def test_positions_rounded_to_a_tenth_of_a_millimetre_are_even_enough(tmp_path: Path) -> None:
    def rounded(dataset: Any, k: int) -> None:
        x, y, z = dataset.ImagePositionPatient
        dataset.ImagePositionPatient = [x, y, round(float(z), 1)]

    write_ct(tmp_path / "ct", make_hu((4, 4, 40)), step=0.625, origin=(0, 0, -250.31), edit=rounded)
    volume = read_series(tmp_path / "ct").volume
    assert volume.spacing_mm[2] == pytest.approx(0.625, abs=0.002)
    np.testing.assert_allclose(volume.affine[:3, 3], (0, 0, -250.31), atol=0.06)


def test_gantry_tilt_is_refused_with_its_angle(tmp_path: Path) -> None:
    write_ct(tmp_path / "ct", tilt_degrees=12)
    with pytest.raises(DataError, match=r"gantry tilt of 12.0 degrees.*dcm2niix"):
        read_series(tmp_path / "ct")


def test_a_tilt_within_tolerance_is_shear_in_the_affine(tmp_path: Path) -> None:
    hu = write_ct(tmp_path / "ct", tilt_degrees=0.4)
    volume = read_series(tmp_path / "ct").volume
    np.testing.assert_array_equal(volume.array, hu)
    shift = 2.5 * np.tan(np.radians(0.4))
    np.testing.assert_allclose(volume.affine[:3, 2], (0, -shift, 2.5), atol=1e-6)


@pytest.mark.parametrize(
    ("keyword", "value", "message"),
    [
        ("ImageOrientationPatient", [1, 0, 0, 0, 0.8, 0.6], r"differ in orientation.*in 1-003-003.dcm"),
        ("PixelSpacing", [0.7, 0.8], r"differ in pixel spacing.*\(0.7, 0.8\) in 1-003-003.dcm"),
        ("ImagePositionPatient", [1, 2], r"1-003-003.dcm: ImagePositionPatient holds \(1, 2\), expected 3"),
        ("PixelSpacing", [], "1-003-003.dcm: PixelSpacing is missing"),
    ],
)
def test_geometry_that_differs_or_lacks_is_refused(
    tmp_path: Path, keyword: str, value: list[float], message: str
) -> None:
    write_ct(tmp_path / "ct", edit=at(3, keyword, value))
    with pytest.raises(DataError, match=message):
        read_series(tmp_path / "ct")


def test_directions_that_are_not_at_a_right_angle_are_refused(tmp_path: Path) -> None:
    write_ct(tmp_path / "ct", orientation=(1, 0, 0, 0.1, 1, 0))
    with pytest.raises(DataError, match="not two unit vectors at a right angle"):
        read_series(tmp_path / "ct")


def test_a_single_slice_takes_its_thickness_as_spacing(tmp_path: Path) -> None:
    write_ct(tmp_path / "ct", make_hu((4, 3, 1)), orientation=OBLIQUE, step=3.5)
    volume = read_series(tmp_path / "ct").volume
    assert volume.spacing_mm == pytest.approx((0.9, 0.7, 3.5))
    assert np.linalg.det(volume.affine[:3, :3]) > 0


def test_a_single_slice_with_a_thickness_that_is_no_number_says_what_to_add(tmp_path: Path) -> None:
    write_ct(tmp_path / "ct", make_hu((4, 3, 1)))
    path = files(tmp_path / "ct")[0]
    path.write_bytes(
        path.read_bytes().replace(b"\x18\x00\x50\x00DS\x04\x002.5 ", b"\x18\x00\x50\x00DS\x04\x002x5 ")
    )
    with pytest.raises(DataError, match="neither SliceThickness nor SpacingBetweenSlices"):
        read_series(tmp_path / "ct")
