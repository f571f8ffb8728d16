"""Windows, normalisation, quantisation, and the plan made from a fingerprint."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest

from lungkit.data import Fingerprint, Preprocessing, Volume, plan_preprocessing, preprocess_image
from lungkit.data.fingerprint import ChannelFingerprint
from lungkit.data.geometry import plan_geometry
from lungkit.data.normalisation import Interpolation
from lungkit.data.preprocessing import ChannelNormalisation, ScanSlices, preprocess_label, quantise
from lungkit.errors import DataError, UsageError

HU = ChannelFingerprint("CT", "HU", "int16", -1024.0, 3071.0, -100.0, 200.0, -850.0, 160.0)
EIGHT_BIT = ChannelFingerprint("CT", "8-bit", "uint8", 0.0, 255.0, 120.0, 40.0, 10.0, 240.0)
PET = ChannelNormalisation((0.0, 20.0), 4.0, 0.5, "arbitrary")
LUNG = Preprocessing((ChannelNormalisation((-1000.0, 400.0), -100.0, 200.0, "HU"),), {0: 0, 1: 1})


def fingerprint(*channels: ChannelFingerprint, spacings: tuple[Any, ...] = ((2.5, 0.7, 0.7),)) -> Fingerprint:
    return Fingerprint(
        case_ids=tuple(f"c{index}" for index in range(len(spacings))),
        shapes=tuple((10, 64, 64) for _ in spacings),
        spacings_mm=spacings,
        channels=channels,
        foreground_fractions=tuple(0.1 for _ in spacings),
        class_voxels=(90, 10),
        label_map={0: 0, 1: 1},
        notices=(),
    )


@pytest.mark.parametrize(
    ("window", "expected"),
    [
        ("auto", (-1000.0, 400.0)),
        ("lung", (-1000.0, 400.0)),
        ("mediastinum", (-160.0, 240.0)),
        ("full", (-1024.0, 3071.0)),
        ("percentiles", (-850.0, 160.0)),
        ((-500, 500), (-500.0, 500.0)),
    ],
)
def test_window_of_hu_data(window: Any, expected: tuple[float, float]) -> None:
    plan = plan_preprocessing(fingerprint(HU), window=window)
    assert plan.channels == (ChannelNormalisation(expected, -100.0, 200.0, "HU"),)


def test_auto_window_of_8_bit_data_is_the_percentiles() -> None:
    assert plan_preprocessing(fingerprint(EIGHT_BIT)).channels[0].window == (10.0, 240.0)


def test_hu_window_for_8_bit_data_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match=r"'lung' is in HU, but the data are 8-bit \(0 to 255\)"):
        plan_preprocessing(fingerprint(EIGHT_BIT), window="lung")


def test_channels_are_normalised_each_by_its_own_statistics() -> None:
    pet = dataclasses.replace(
        HU, name="PET", units="arbitrary", mean=4.0, std=3.0, percentile_00_5=0.5, percentile_99_5=20.0
    )
    plan = plan_preprocessing(fingerprint(HU, pet), window="mediastinum")
    assert plan.channels == (
        ChannelNormalisation((-160.0, 240.0), -100.0, 200.0, "HU"),
        ChannelNormalisation((0.5, 20.0), 4.0, 3.0, "arbitrary"),
    )


def test_foreground_of_one_intensity_still_gives_a_usable_plan() -> None:
    flat = dataclasses.replace(EIGHT_BIT, std=0.0, percentile_00_5=7.0, percentile_99_5=7.0)
    (channel,) = plan_preprocessing(fingerprint(flat)).channels
    assert channel.window == (0.0, 255.0)
    assert channel.std == 255.0


@pytest.mark.parametrize(
    ("spacings", "option", "expected"),
    [
        (((2.5, 0.7, 0.7), (1.0, 0.6, 0.6), (3.0, 0.9, 0.9)), "auto", (2.5, 0.7, 0.7)),
        (((2.5, 0.7, 0.7), (2.51, 0.7, 0.7)), "auto", None),
        (((2.5, 0.7, 0.7), (1.0, 0.6, 0.6)), "native", None),
        (((2.5, 0.7, 0.7),), (1, 1, 1), (1.0, 1.0, 1.0)),
    ],
)
def test_target_spacing(spacings: tuple[Any, ...], option: Any, expected: Any) -> None:
    assert (
        plan_preprocessing(fingerprint(HU, spacings=spacings), spacing_mm=option).target_spacing_mm
        == expected
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": "bone"}, "'bone' is neither auto"),
        ({"window": (400, -1000)}, "low < high"),
        ({"window": (0, 1, 2)}, r"must be \(low, high\)"),
        ({"spacing_mm": "median"}, "'median' is neither 'auto'"),
        ({"spacing_mm": (1, 1)}, r"must be \(z, y, x\)"),
        ({"spacing_mm": (1, 0, 1)}, "above zero"),
    ],
)
def test_unknown_option_is_a_usage_error(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        plan_preprocessing(fingerprint(HU), **options)


def test_plan_survives_json() -> None:
    plan = dataclasses.replace(
        LUNG,
        target_spacing_mm=(1.0, 0.5, 0.5),
        channels=(*LUNG.channels, PET),
        label_map={0: 0, 3: 1, 9: 255},
    )
    assert Preprocessing.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


def test_the_form_of_older_checkpoints_is_read() -> None:
    old = """{"window": [-1000.0, 400.0], "mean": -100.0, "std": 200.0, "units": "HU", "label_map": {"0": 0, "1": 1},
        "target_spacing_mm": [1.0, 0.5, 0.5], "orientation": "RAS", "other_channels":
        [{"window": [0.0, 20.0], "mean": 4.0, "std": 0.5, "units": "arbitrary"}]}"""
    expected = Preprocessing((*LUNG.channels, PET), {0: 0, 1: 1}, (1.0, 0.5, 0.5))
    assert Preprocessing.from_dict(json.loads(old)) == expected


@pytest.mark.parametrize("change", [{"mean": "x"}, {"window": "lung"}, {"std": 0.0}, {"units": ...}])
def test_a_channel_that_makes_no_sense_is_a_data_error(change: dict[str, Any]) -> None:
    (channel,) = LUNG.to_dict()["channels"]
    broken = {name: value for name, value in (channel | change).items() if value is not ...}
    with pytest.raises(DataError, match="preprocessing cannot be restored"):
        Preprocessing.from_dict(LUNG.to_dict() | {"channels": [broken]})


def test_an_axis_through_the_planes_has_a_filter_of_its_own_where_spacing_is_anisotropic() -> None:
    interpolation = Interpolation("cubic", "nearest")
    assert interpolation.filters((1.0, 0.5, 3.5), (1.0, 1.0, 1.0)) == ("cubic", "cubic", "nearest")
    assert interpolation.filters((1.0, 0.8, 0.8), (5.0, 1.0, 1.0)) == ("nearest", "cubic", "cubic")
    assert interpolation.filters((3.5, 1.0, 3.5), (1.0, 1.0, 1.0)) == ("cubic", "cubic", "cubic")
    with pytest.raises(UsageError, match="anisotropy"):
        Interpolation("cubic", "nearest", "3")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "change",
    [
        {"channels": None},
        {"label_map": [0, 1]},
        {"target_spacing_mm": [1, 1]},
        {"axes": {"order": [0, 0, 1]}},
        {"crop": "lungs"},
        {"image_interpolation": {"filter": "sinc"}},
    ],
)
def test_broken_plan_is_a_data_error(change: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="preprocessing cannot be restored"):
        Preprocessing.from_dict(LUNG.to_dict() | change)


def test_image_is_clipped_and_normalised() -> None:
    array = np.array([-3000, -1000, -100, 100, 3000], np.int16).reshape(5, 1, 1)
    image = preprocess_image(Volume(array, np.eye(4)), LUNG)
    assert image.array.dtype == np.float32
    assert image.array.shape == (1, 1, 1, 5)
    np.testing.assert_allclose(image.array.ravel(), [-4.5, -4.5, 0.0, 1.0, 2.5])


def test_metal_is_clipped_before_it_is_averaged() -> None:
    array = np.array([0, 30000, 0, 0], np.int16).reshape(1, 1, 4)
    plan = dataclasses.replace(LUNG, target_spacing_mm=(2.0, 1.0, 1.0))
    image = preprocess_image(Volume(array, np.eye(4)), plan)
    assert image.array.max() <= LUNG.channels[0].bounds[1]


def test_image_and_label_are_resampled_onto_one_grid() -> None:
    label = np.zeros((16, 16, 8), np.uint8)
    label[4:12, 4:12, 2:6] = 1
    affine = np.diag([-0.5, -0.5, 2.0, 1.0])
    plan = dataclasses.replace(LUNG, target_spacing_mm=(1.0, 1.0, 1.0))
    image = preprocess_image(Volume(np.where(label, 400, -1000).astype(np.int16), affine), plan)
    resampled = preprocess_label(Volume(label, affine), image.geometry)
    assert image.array.shape == (1, 16, 8, 8)
    assert resampled.shape == (16, 8, 8)
    assert image.spacing_mm == (1.0, 1.0, 1.0)
    middle = sum(LUNG.channels[0].bounds) / 2
    np.testing.assert_array_equal((image.array[0] > middle).astype(np.uint8), resampled)


@pytest.mark.parametrize("step", [1, 3])
@pytest.mark.parametrize("spacing", [None, (2.0, 1.0, 1.0), (4.0, 0.9, 0.6)])
def test_an_image_is_its_slices_however_many_are_read_at_a_time(spacing: Any, step: int) -> None:
    rng = np.random.default_rng(0)
    affine = np.array([[0, -0.8, 0, 5], [0.7, 0, 0, 1], [0, 0, 2.5, -3], [0, 0, 0, 1.0]])
    volumes = [Volume(rng.integers(-1200, 900, (17, 14, 11)).astype(np.int16), affine) for _ in range(2)]
    plan = Preprocessing((*LUNG.channels, PET), {0: 0, 1: 1}, spacing)
    image = preprocess_image(volumes, plan)
    slices = ScanSlices(volumes, plan, plan_geometry(volumes[0], target_spacing_mm=spacing))
    assert slices.shape == image.array.shape
    for first in range(0, image.array.shape[1], step):
        last = min(first + step, image.array.shape[1])
        np.testing.assert_allclose(slices.read(first, last), image.array[:, first:last], atol=1e-5)


def test_wrong_number_of_channels_is_a_usage_error() -> None:
    volume = Volume(np.zeros((2, 2, 2), np.int16), np.eye(4))
    with pytest.raises(UsageError, match="2 channels, but the preprocessing was made for 1"):
        preprocess_image([volume, volume], LUNG)


def test_resampling_beyond_max_voxels_is_refused() -> None:
    plan = dataclasses.replace(LUNG, target_spacing_mm=(0.01, 0.01, 0.01))
    with pytest.raises(DataError, match="more than max_voxels = 1000000"):
        preprocess_image(Volume(np.zeros((8, 8, 8), np.int16), np.eye(4)), plan, max_voxels=1_000_000)


@pytest.mark.parametrize(
    ("window", "std"), [((-1000.0, 400.0), 201.13), ((0.0, 255.0), 44.77), ((-1024.0, 3071.0), 77.7)]
)
def test_whole_intensities_survive_quantisation_exactly(window: tuple[float, float], std: float) -> None:
    plan = Preprocessing((ChannelNormalisation(window, 3.7, std, "HU"),), {0: 0})
    values = np.arange(window[0], window[1] + 1, dtype=np.int16)
    image = preprocess_image(Volume(values.reshape(-1, 1, 1), np.eye(4)), plan)
    slope, intercept = plan.quantisation
    stored = quantise(image.array, plan)
    restored = (stored.astype(np.float64) * slope + intercept) * std + 3.7
    np.testing.assert_allclose(restored.ravel(), values, atol=1e-6)


@pytest.mark.parametrize("window", [(0.0, 0.001), (-5.5, 1e6), (-1000.3, 400.9)])
def test_quantisation_is_finer_than_a_32000th_of_the_window(window: tuple[float, float]) -> None:
    plan = Preprocessing(
        (ChannelNormalisation(window, window[0], window[1] - window[0], "arbitrary"),), {0: 0}
    )
    values = np.linspace(0, 1, 1001, dtype=np.float32)
    slope, intercept = plan.quantisation
    restored = quantise(values, plan) * slope + intercept
    np.testing.assert_allclose(restored, values, atol=1 / 64000)


def test_channels_share_one_scale() -> None:
    plan = dataclasses.replace(LUNG, channels=(*LUNG.channels, PET))
    low, high = -8.0, 32.0  # of channel 1; those of channel 0 lie between
    slope, intercept = plan.quantisation
    restored = quantise(np.array([low, high, -4.5, 2.5], np.float32), plan) * slope + intercept
    np.testing.assert_allclose(restored, [low, high, -4.5, 2.5], atol=slope)
