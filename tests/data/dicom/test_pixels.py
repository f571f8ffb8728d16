"""HU of slices: what lies outside of the scanned circle becomes air, and nothing else changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dicom_cases import make_hu, write_ct

from lungkit.data.dicom import read_series
from lungkit.errors import DataError


def padded(
    folder: Path,
    stored: int,
    value: int,
    *,
    vr: str = "US",
    signed: bool = False,
    bits: int = 16,
    intercept: int = -1024,
    limit: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Write a series whose first three rows hold ``stored``; HU without padding, and as they are read."""
    hu = make_hu()

    def edit(dataset: Any, k: int) -> None:
        pixels = hu[:, :, k].T.astype(np.int64) - intercept
        pixels &= (1 << bits) - 1
        pixels[:3] = stored
        dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = bits, bits - 1, int(signed)
        dataset.RescaleIntercept = intercept
        dataset.PixelData = (pixels % 65536).astype("<u2").tobytes()
        dataset.add_new("PixelPaddingValue", vr, value)
        if limit is not None:
            dataset.add_new("PixelPaddingRangeLimit", vr, limit)

    write_ct(folder, hu, edit=edit)
    return hu, read_series(folder).volume.array


@pytest.mark.parametrize(
    "options",
    [
        {"stored": 63536, "value": 63536},
        {"stored": 63536, "value": -2000, "vr": "SS"},
        {"stored": -2000, "value": -2000, "vr": "SS", "signed": True, "intercept": 0},
        {"stored": -2000, "value": 63536, "signed": True, "intercept": 0},
        {"stored": -2000, "value": 63536, "signed": True, "intercept": -1024},
        {"stored": 63536, "value": 63536, "bits": 12},
        {"stored": 4095, "value": 4095, "bits": 12},
        {"stored": -2000 & 0xFFF, "value": -2000, "vr": "SS", "signed": True, "bits": 12, "intercept": 0},
        {"stored": -32768, "value": 32768, "signed": True, "intercept": 0},
        {"stored": 65535, "value": 65535},
        {"stored": 63600, "value": 63536, "limit": 64000},
        {"stored": 63600, "value": 64000, "limit": 63536},
        {"stored": 1024, "value": 1024},  # water
    ],
    ids=str,
)
def test_padding_becomes_air_and_the_rest_stays(tmp_path: Path, options: dict[str, Any]) -> None:
    hu, array = padded(tmp_path / "ct", **options)
    assert array.dtype == np.int16
    assert (array[:, :3] == -1024).all()
    expected = hu[:, 3:]
    # A value that tissue has as well: what touches the padding is taken for it.
    same = (array[:, 3:] == expected) | (expected == options["stored"] - 1024)
    assert same.all()


def test_padding_as_dark_as_air_is_left_alone(tmp_path: Path) -> None:
    _, array = padded(tmp_path / "ct", stored=24, value=24)
    assert (array[:, :3] == -1000).all()


def test_tissue_of_the_padding_value_stays_tissue(tmp_path: Path) -> None:
    hu = np.full((12, 10, 6), 40, np.int16)
    hu[5:8, 5:8] = 0  # water, while the tag claims that 0 HU is padding
    hu[:2] = 0

    def edit(dataset: Any, k: int) -> None:
        dataset.add_new("PixelPaddingValue", "US", 1024)

    write_ct(tmp_path / "ct", hu, edit=edit)
    array = read_series(tmp_path / "ct").volume.array
    assert (array[:2] == -1024).all()
    np.testing.assert_array_equal(array[2:], hu[2:])


def test_padding_of_a_compressed_series_becomes_air(tmp_path: Path) -> None:
    hu = make_hu().astype(np.int32)
    hu[:, :3] = 62512
    write_ct(
        tmp_path / "ct",
        hu,
        compress="1.2.840.10008.1.2.5",
        edit=lambda dataset, k: dataset.add_new("PixelPaddingValue", "US", 63536),
    )
    array = read_series(tmp_path / "ct").volume.array
    assert (array[:, :3] == -1024).all()
    np.testing.assert_array_equal(array[:, 3:], hu[:, 3:])


def test_a_padding_value_may_differ_by_slice(tmp_path: Path) -> None:
    hu = make_hu().astype(np.int32)
    for k in range(6):
        hu[:, :3, k] = 60000 + k
    write_ct(
        tmp_path / "ct", hu, edit=lambda dataset, k: dataset.add_new("PixelPaddingValue", "US", 61024 + k)
    )
    assert (read_series(tmp_path / "ct").volume.array[:, :3] == -1024).all()


def test_a_padding_value_that_is_no_number_is_refused(tmp_path: Path) -> None:
    write_ct(tmp_path / "ct", edit=lambda dataset, k: dataset.add_new("PixelPaddingValue", "US", [1, 2]))
    with pytest.raises(DataError, match="PixelPaddingValue"):
        read_series(tmp_path / "ct")
