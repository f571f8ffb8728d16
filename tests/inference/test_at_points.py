"""Pointing at nodules: geometry and choice of the nodule, with a network's place taken by a threshold."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from lungkit.data import Volume
from lungkit.errors import DataError, UsageError
from lungkit.inference import Box, Prediction, Predictor, segment_at
from lungkit.inference.at_points import CROP_PIXELS

AFFINES = {
    "ras": np.array([[0.7, 0, 0, -60], [0, 0.7, 0, -50], [0, 0, 2.0, 100], [0, 0, 0, 1.0]]),
    "lps": np.array([[-0.7, 0, 0, 60], [0, -0.7, 0, 50], [0, 0, 2.0, 100], [0, 0, 0, 1.0]]),
    "sagittal first": np.array([[0, 0, -0.7, 60], [2.0, 0, 0, -50], [0, -0.7, 0, 100], [0, 0, 0, 1.0]]),
}


class Threshold:
    """In place of a network: a voxel is foreground where it is above 40."""

    def __init__(self, units: str = "HU", channels: int = 1) -> None:
        channel = SimpleNamespace(units=units)
        self.models = [
            SimpleNamespace(
                name="threshold",
                channels=("CT",) * channels,
                dims=2,
                preprocessing=SimpleNamespace(channels=(channel,)),
            )
        ]
        self.seen: list[Volume] = []

    def __call__(self, scan: Volume) -> Prediction:
        self.seen.append(scan)
        return Prediction((scan.array > 40).astype(np.uint8), scan.affine, {}, 0.0, "cpu", "fp32")


class Narrow(Threshold):
    """The same, but blind to what is wider than 60 pixels."""

    def __call__(self, scan: Volume) -> Prediction:
        found = super().__call__(scan)
        return (
            found
            if np.ptp(np.nonzero(found.mask.any(axis=(1, 2)))) < 60
            else replace(found, mask=0 * found.mask)
        )


def scan_with(affine: np.ndarray, *balls: tuple[tuple[int, int, int], int], shape=(180, 160, 40)) -> Volume:
    """Air with balls of 100 HU: centre in voxels, radius in voxels."""
    array = np.full(shape, -800, np.int16)
    grid = np.indices(shape)
    for centre, radius in balls:
        array[sum((grid[i] - centre[i]) ** 2 for i in range(3)) <= radius**2] = 100
    return Volume(array, affine)


def world(affine: np.ndarray, index: tuple[float, float, float]) -> tuple[float, float, float]:
    x, y, z = (affine @ [*index, 1.0])[:3]
    return float(x), float(y), float(z)


@pytest.mark.parametrize("name", AFFINES)
def test_the_nodule_at_a_point_whatever_way_the_scan_is_stored(name):
    affine = AFFINES[name]
    scan = scan_with(affine, ((30, 140, 20), 5), ((60, 100, 20), 4))
    for number, (centre, radius) in enumerate([((30, 140, 20), 5), ((60, 100, 20), 4)], start=1):
        found = segment_at(Threshold(), scan, [world(affine, centre)])
        alone = scan_with(affine, (centre, radius)).array == 100
        assert np.array_equal(found.mask == 1, alone), number
        assert found.nodules[0].voxels == alone.sum()
        assert found.nodules[0].stability == 1.0


def test_the_crop_is_128_pixels_of_the_slices_near_the_point_moved_into_the_scan():
    scan = scan_with(AFFINES["ras"], ((3, 80, 5), 2))
    predictor = Threshold()
    segment_at(predictor, scan, [world(scan.affine, (3, 80, 5))], stability=False)
    (crop,) = predictor.seen
    # 20 mm are 10 slices; five lie below the point.
    assert crop.array.shape == (CROP_PIXELS, CROP_PIXELS, 16)
    assert np.array_equal(crop.array, scan.array[:128, 16:144, :16])
    assert crop.spacing_mm == pytest.approx((0.7, 0.7, 2.0))


def test_a_nodule_beyond_the_crop_is_followed():
    scan = scan_with(AFFINES["ras"], shape=(64, 64, 60))
    scan.array[30:34, 30:34, 5:55] = 100
    predictor = Threshold()
    found = segment_at(predictor, scan, [world(scan.affine, (31, 31, 30))], stability=False)
    assert found.nodules[0].voxels == 4 * 4 * 50
    assert [seen.array.shape[2] for seen in predictor.seen] == [21, 41, 60]


def test_a_mass_that_the_model_cannot_see_is_found_in_a_wider_view_with_a_warning():
    scan = scan_with(AFFINES["lps"], ((150, 130, 6), 50), shape=(300, 260, 12))
    found = segment_at(Narrow(), scan, [world(scan.affine, (160, 130, 6))])
    mass = scan.array == 100
    overlap = 2 * ((found.mask == 1) & mass).sum() / ((found.mask == 1).sum() + mass.sum())
    assert found.nodules[0].view == 2.0 and overlap > 0.97
    assert found.nodules[0].stability > 0.99
    assert "nodule 1 was found in a view 2 times as wide" in found.warnings[0]


def test_a_nodule_of_more_than_a_third_of_the_view_stays_in_it_where_a_wider_one_shows_no_more():
    scan = scan_with(AFFINES["ras"], ((90, 80, 6), 30), shape=(180, 160, 12))
    predictor = Threshold()
    found = segment_at(predictor, scan, [world(scan.affine, (90, 80, 6))], stability=False)
    assert len(predictor.seen) > 1  # it was looked at
    assert found.nodules[0].view == 1.0 and np.array_equal(found.mask == 1, scan.array == 100)


def test_a_wider_view_does_not_replace_a_nodule_beside_the_point():
    scan = scan_with(AFFINES["ras"], ((90, 80, 20), 3), ((20, 80, 20), 12))
    predictor = Threshold()
    found = segment_at(predictor, scan, [world(scan.affine, (90 + 6, 80, 20))], stability=False)
    assert found.nodules[0].view == 1.0 and found.nodules[0].voxels == (scan.array[60:] == 100).sum()
    assert max(max(seen.array.shape[:2]) for seen in predictor.seen) == CROP_PIXELS  # wider views are shrunk


def test_the_nearest_nodule_within_10_mm_and_none_beyond():
    scan = scan_with(AFFINES["ras"], ((90, 80, 20), 3))
    near = segment_at(Threshold(), scan, [world(scan.affine, (90 + 3 + 14, 80, 20))], stability=False)
    assert near.nodules[0].found  # 9.8 mm from its nearest voxel
    far = segment_at(Threshold(), scan, [world(scan.affine, (90 + 3 + 15, 80, 20))], stability=False)
    assert not far.nodules[0].found
    assert far.nodules[0].reason == (
        "no nodule within 10 mm of the point: it lies in lung (mean -800 within 3 mm)"
    )
    assert not far.mask.any() and far.labels == {"background": 0}


@pytest.mark.parametrize(
    ("hu", "tissue"), [(-1000, ": it lies in air"), (20, ": it lies in soft tissue"), (-400, ""), (38, "")]
)
def test_what_lies_at_a_point_without_a_nodule_is_said_where_it_is_sure(hu, tissue):
    scan = scan_with(AFFINES["ras"], shape=(64, 64, 12))
    scan.array[...] = hu
    scan.array[0, 0, 0] = -1024 if hu != 38 else 0  # without air these are no HU
    found = segment_at(Threshold(), scan, [world(scan.affine, (40, 40, 6))])
    assert found.nodules[0].reason == f"no nodule within 10 mm of the point{tissue} (mean {hu} within 3 mm)"


def test_points_have_the_numbers_of_their_order_and_share_no_voxel():
    scan = scan_with(AFFINES["lps"], ((30, 40, 10), 3), ((120, 100, 25), 4))
    points = [world(scan.affine, index) for index in [(120, 100, 25), (121, 100, 25), (30, 40, 10)]]
    found = segment_at(Threshold(), scan, points, stability=False)
    assert found.labels == {"background": 0, "nodule 1": 1, "nodule 3": 3}
    assert found.mask[120, 100, 25] == 1 and found.mask[30, 40, 10] == 3
    assert found.nodules[1].reason == "it lies in the nodule of point 1"


def test_a_box_cuts_the_nodule_off_at_its_walls():
    scan = scan_with(AFFINES["lps"], shape=(64, 64, 20))
    scan.array[20:44, 20:44, 5:15] = 100
    corners = [world(scan.affine, index) for index in [(24, 26, 7), (40, 38, 12)]]
    found = segment_at(Threshold(), scan, [Box(*corners)], stability=False)
    inside = np.zeros(scan.array.shape, bool)
    inside[24:41, 26:39, 7:13] = True
    assert np.array_equal(found.mask == 1, inside)


def test_a_model_of_8_bit_crops_sees_each_slice_from_its_smallest_to_its_largest_value():
    scan = scan_with(AFFINES["ras"], ((30, 30, 6), 3), shape=(64, 64, 12))
    scan.array[..., 6] += 50
    predictor = Threshold("8-bit")
    segment_at(predictor, scan, [world(scan.affine, (30, 30, 6))], stability=False)
    seen = predictor.seen[0].array
    assert seen.dtype == np.uint8
    assert seen[30, 30, 6] == 255 and seen[0, 0, 6] == 0
    assert not seen[..., 0].any()  # a slice of one value has no range


def test_no_point_is_refused():
    with pytest.raises(UsageError, match="at least one"):
        segment_at(Threshold(), scan_with(AFFINES["ras"], ((90, 80, 20), 3)), [])


def test_models_of_several_channels_are_refused():
    with pytest.raises(UsageError, match="several channels"):
        segment_at(Threshold(channels=2), scan_with(AFFINES["ras"]), [(0.0, 0.0, 110.0)])


def test_a_scan_of_one_value_is_refused():
    with pytest.raises(DataError, match="all voxels are -800"):
        segment_at(Threshold(), scan_with(AFFINES["ras"]), [(0.0, 0.0, 110.0)])


def test_the_model_of_the_package_finds_a_ball_in_lung_and_repeats_its_bits():
    from lungkit.inference import model_folder

    scan = scan_with(AFFINES["lps"], ((90, 80, 12), 9), shape=(180, 160, 24))
    scan.array[...] += np.random.default_rng(0).normal(0, 20, scan.array.shape).astype(np.int16)
    predictor = Predictor.from_run(model_folder("lidc-nodules"), device="cpu", precision="fp32")
    point = world(scan.affine, (91, 79, 12))
    found = predictor.segment_at(scan, [point], stability=False)
    ball = np.zeros(scan.array.shape, bool)
    grid = np.indices(ball.shape)
    ball[sum((grid[i] - (90, 80, 12)[i]) ** 2 for i in range(3)) <= 81] = True
    middle = np.s_[:, :, 12]
    dice = (
        2
        * (found.mask[middle].astype(bool) & ball[middle]).sum()
        / (found.mask[middle] > 0).sum().__add__(ball[middle].sum())
    )
    assert dice > 0.8
    assert np.array_equal(predictor.segment_at(scan, [point], stability=False).mask, found.mask)
