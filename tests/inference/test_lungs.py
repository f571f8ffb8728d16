"""Lungs by HU: on the phantom, whose lungs are known, on real scans, and where there are none."""

from __future__ import annotations

import functools
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from lungkit.data import Phantom, make_phantom, open_dataset, read_case
from lungkit.data.geometry import orient, plan_geometry
from lungkit.errors import UsageError
from lungkit.inference.lungs import lung_mask, near, near_lungs

WHOLE = (48, 96, 96)
NSCLC = ("nsclc_pat1", "nsclc_pat2", "nsclc_pat3", "nsclc_pat4", "pyradiomics_lung2")


@functools.cache
def phantom(seed: int, shape: tuple[int, int, int] = WHOLE) -> Phantom:
    return make_phantom(seed, shape=shape)


@functools.cache
def real_scan(
    root: Path, case_id: str
) -> tuple[np.ndarray, np.ndarray, tuple[float, float, float], np.ndarray]:
    """HU, tumour and spacing of a real scan on the library's grid, and its lungs."""
    dataset = open_dataset(root / "nsclc_ct")
    (volume,), label = read_case(dataset.case(case_id), dataset.label_map)
    assert label is not None
    geometry = plan_geometry(volume)
    hu = orient(volume.array, geometry)
    return hu, orient(label.array, geometry), geometry.spacing_mm, lung_mask(hu, geometry.spacing_mm)


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * np.count_nonzero(a & b) / (np.count_nonzero(a) + np.count_nonzero(b))


def trachea_of(scan: Phantom) -> np.ndarray:
    """The middle of the windpipe of the phantom, a straight tube from (140, 3, 0) to (34, 9, 0) mm (z, y, x)."""
    z, y, x = np.meshgrid(
        *(
            o + np.arange(n) * s
            for o, n, s in zip(scan.origin_mm, scan.image.shape, scan.spacing_mm, strict=True)
        ),
        indexing="ij",
    )
    return (z > 45) & (z < 120) & (np.hypot(y - 9 + 6 * (z - 34) / 106, x) < 6)


# Fluid in the pleura is within the phantom's lungs, but no air: seeds 3, 4, 5 and 7 have none, 0 and 1 some.
@pytest.mark.parametrize(
    ("seed", "least"), [(3, 0.975), (4, 0.985), (5, 0.985), (7, 0.985), (0, 0.955), (1, 0.96)]
)
def test_the_lungs_of_the_phantom_are_found(seed, least):
    scan = phantom(seed)
    found, truth = lung_mask(scan.image, scan.spacing_mm), scan.lungs > 0
    assert dice(found, truth) > least
    assert np.count_nonzero(found & ~truth) < 0.015 * np.count_nonzero(found)


@pytest.mark.parametrize("seed", [4, 5, 7])
def test_the_windpipe_is_left_out(seed):
    scan = phantom(seed)
    trachea = trachea_of(scan)
    assert trachea.sum() > 100 and scan.image[trachea].mean() < -950
    assert not (lung_mask(scan.image, scan.spacing_mm) & trachea).any()


@pytest.mark.parametrize("seed", [10, 13, 16])
def test_one_slice_is_enough(seed):
    scan = phantom(seed, (1, 128, 128))
    assert dice(lung_mask(scan.image, scan.spacing_mm), scan.lungs > 0) > 0.93


@pytest.mark.parametrize("seed", [11, 13, 16])
def test_a_field_of_view_that_cuts_the_lungs_is_no_obstacle(seed):
    scan = make_phantom(seed, shape=(24, 96, 96), spacing_mm=(2.5, 1.2, 1.2))
    truth = scan.lungs > 0
    assert truth[:, 0].any() or truth[:, -1].any() or truth[:, :, 0].any() or truth[:, :, -1].any()
    assert dice(lung_mask(scan.image, scan.spacing_mm), truth) > 0.975


@pytest.mark.parametrize("spacing", [(5.0, 2.5, 2.5), (2.5, 3.5, 3.5), (2.0, 4.5, 3.0)])
def test_any_spacing_will_do(spacing):
    scan = make_phantom(
        4,
        shape=tuple(int(size / mm) for size, mm in zip((240, 340, 340), spacing, strict=True)),
        spacing_mm=spacing,
    )
    assert dice(lung_mask(scan.image, scan.spacing_mm), scan.lungs > 0) > 0.975


def test_a_nodule_in_the_lung_belongs_to_it():
    scan = phantom(4)
    ball = np.zeros(WHOLE, bool)
    lung = lung_mask(scan.image, scan.spacing_mm)
    z, y, x = (int(axis) for axis in np.argwhere(~near(~lung, scan.spacing_mm, 18.0))[0])
    ball[z, y, x] = True
    ball = near(ball, scan.spacing_mm, 14.0)
    hu = np.where(ball, 40, scan.image)
    assert (lung_mask(hu, scan.spacing_mm) & ball).sum() == ball.sum()


def test_the_foam_of_a_table_is_no_lung():
    scan = phantom(4)
    hu = np.pad(scan.image, ((0, 0), (0, 20), (0, 0)), constant_values=-1000)
    hu[:, -19:, :] = -880
    hu[:, [-20, -2], :] = 0
    found = lung_mask(hu, scan.spacing_mm)
    assert not found[:, 96:].any()
    assert dice(found[:, :96], scan.lungs > 0) > 0.985


def test_directions_within_a_slice_do_not_matter():
    scan = phantom(4)
    turned = lung_mask(scan.image[:, ::-1, ::-1], scan.spacing_mm)[:, ::-1, ::-1]
    assert dice(turned, lung_mask(scan.image, scan.spacing_mm)) > 0.99


def test_padding_round_the_field_of_view_counts_as_air():
    scan = phantom(4)
    y, x = np.meshgrid(np.arange(96) - 47.5, np.arange(96) - 47.5, indexing="ij")
    hu = np.where(np.hypot(y, x) > 49, -3024, scan.image).astype(np.float32)
    assert dice(lung_mask(hu, scan.spacing_mm), scan.lungs > 0) > 0.985


@pytest.mark.parametrize(
    "hu",
    [
        np.full((12, 60, 60), -1000, np.int16),
        np.full((12, 60, 60), 40, np.int16),
        np.random.default_rng(0).integers(0, 256, (12, 60, 60)).astype(np.int16),  # an 8-bit picture
        np.zeros((1, 1, 1), np.int16),
    ],
    ids=["air", "tissue", "8-bit", "one voxel"],
)
def test_where_there_are_no_lungs_the_mask_is_empty_and_the_log_says_so(hu, caplog):
    assert not lung_mask(hu, (2.0, 2.0, 2.0)).any()
    assert "no lungs found" in caplog.text


def test_a_belly_with_gas_has_no_lungs(caplog):
    z, y, x = np.meshgrid(np.arange(30), np.arange(90) - 45, np.arange(120) - 60, indexing="ij")
    hu = np.where((y / 38) ** 2 + (x / 52) ** 2 < 1, 30, -1000)
    for centre, radius in (((15, -20, 10), 9), ((10, -15, -20), 7), ((20, 5, 30), 5)):
        away = np.sqrt(
            sum((axis - at) ** 2 for axis, at in zip((z, y, x), (centre[0], *centre[1:]), strict=True))
        )
        hu = np.where(away < radius, -1000, hu)
    hu = hu + np.random.default_rng(0).normal(0, 15, hu.shape)
    assert not lung_mask(hu, (4.0, 3.0, 3.0)).any()
    assert "no lungs found" in caplog.text


@pytest.mark.parametrize(
    ("hu", "spacing", "message"),
    [
        (np.zeros((3, 4)), (1.0, 1.0, 1.0), r"hu must be \(Z, Y, X\)"),
        (np.zeros((0, 4, 4)), (1.0, 1.0, 1.0), "at least one voxel"),
        (np.zeros((3, 4, 4)), (1.0, 1.0), "three lengths"),
        (np.zeros((3, 4, 4)), (1.0, -1.0, 1.0), "three lengths"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(hu, spacing, message):
    with pytest.raises(UsageError, match=message):
        lung_mask(hu, spacing)


@pytest.mark.parametrize("distance", [0.0, 1.9, 4.0, 7.3])
@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (2.5, 0.7, 0.9), (5.0, 2.0, 2.0)])
def test_distances_are_those_of_scipy(distance, spacing):
    mask = np.random.default_rng(0).random((9, 20, 17)) < 0.004
    expected = ndimage.distance_transform_edt(~mask, sampling=spacing) <= distance * (1 + 1e-6)
    assert np.array_equal(near(mask, spacing, distance), expected)


def test_nothing_is_near_an_empty_mask():
    assert not near(np.zeros((3, 4, 5), bool), (1.0, 1.0, 1.0), 4.0).any()


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (2.5, 0.7, 0.8), (5.0, 3.0, 3.0)])
def test_near_lungs_leaves_out_nothing_within_the_distance_and_little_beyond(spacing):
    lungs = np.zeros((14, 50, 47), bool)
    lungs[4:9, 11:25, 13:22] = True
    box = (slice(1, 13), slice(3, 44), slice(2, 45))
    away = ndimage.distance_transform_edt(~lungs, sampling=spacing)[box]
    region = near_lungs(lungs, spacing, 5.0, box)
    assert region[away <= 5].all()
    assert not region[away > 8.5].any()


def test_it_takes_a_byte_a_voxel_and_some_for_each_of_a_coarse_grid():
    scan = phantom(4)
    hu = scan.image.repeat(2, 0).repeat(4, 1).repeat(4, 2)
    spacing = tuple(size / factor for size, factor in zip(scan.spacing_mm, (2, 4, 4), strict=True))
    tracemalloc.start()
    found = lung_mask(hu, spacing)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert dice(found, scan.lungs.repeat(2, 0).repeat(4, 1).repeat(4, 2) > 0) > 0.97
    assert peak < hu.size + 40 * hu.size / (2 * 2)


# What was seen, within a tenth; lung2 is a whole chest, the others are parts of one.
@pytest.mark.parametrize(("case_id", "volume_ml"), [*zip(NSCLC, (1166, 924, 715, 824, 3954), strict=True)])
def test_real_lungs_have_their_volume_and_density(real_data: Path, case_id, volume_ml):
    hu, _, spacing, lungs = real_scan(real_data, case_id)
    assert np.count_nonzero(lungs) * np.prod(spacing) / 1000 == pytest.approx(volume_ml, rel=0.1)
    assert -870 < np.median(hu[lungs]) < -740


@pytest.mark.parametrize("case_id", NSCLC)
def test_real_tumours_lie_in_the_lungs_or_touch_them(real_data: Path, case_id):
    _, tumour, spacing, lungs = real_scan(real_data, case_id)
    pieces, count = ndimage.label(tumour, np.ones((3, 3, 3)))
    region = near_lungs(lungs, spacing, 5.0, tuple(slice(0, n) for n in lungs.shape))
    assert count >= 1
    assert all((region & (pieces == number)).any() for number in range(1, count + 1))


@pytest.mark.parametrize(
    ("name", "z", "row", "column"),
    [
        ("trachea", 47, 251, 260),
        ("trachea in the neck", 60, 275, 255),
        ("colon", 2, 350, 120),
        ("table", 30, 8, 256),
        ("air before the chest", 40, 500, 256),
    ],
)
def test_what_else_is_air_in_a_real_chest_is_left_out(real_data: Path, name, z, row, column):
    hu, _, _, lungs = real_scan(real_data, "pyradiomics_lung2")
    part = (z, slice(row - 2, row + 3), slice(column - 2, column + 3))
    assert hu[part].max() < -800, name
    assert not lungs[part].any()


def test_slices_above_and_below_the_lungs_are_empty(real_data: Path):
    hu, _, spacing, lungs = real_scan(real_data, "pyradiomics_lung2")
    assert not lungs[:5].any() and not lungs[58:].any()
    assert not lung_mask(hu[:5], spacing).any() and not lung_mask(hu[57:], spacing).any()


def test_parts_of_a_real_chest_give_parts_of_its_lungs(real_data: Path):
    hu, _, spacing, lungs = real_scan(real_data, "pyradiomics_lung2")
    random, found = np.random.default_rng(0), []
    for _ in range(12):
        sizes = [int(random.integers(low, high)) for low, high in ((12, 61), (160, 400), (160, 400))]
        starts = [int(random.integers(0, n - size + 1)) for n, size in zip(hu.shape, sizes, strict=True)]
        box = tuple(slice(start, start + size) for start, size in zip(starts, sizes, strict=True))
        if lungs[box].mean() > 0.05:
            found.append(dice(lung_mask(hu[box], spacing), lungs[box]))
    assert len(found) >= 6
    assert min(found) > 0.95 and np.mean(found) > 0.98


def test_emphysema_is_lung(real_data: Path):
    hu, _, spacing, lungs = real_scan(real_data, "pyradiomics_lung2")
    darker = np.where(lungs & (hu < -600), np.maximum(hu - 90, -1010), hu)
    assert np.median(darker[lungs]) < -915
    assert dice(lung_mask(darker, spacing), lungs) > 0.99
    box = (slice(10, 50), slice(100, 300), slice(0, 200))
    assert dice(lung_mask(darker[box], spacing), lungs[box]) > 0.97
