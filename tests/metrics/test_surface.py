"""Surface distances: hand-computed cases, the native module and its numpy twin against scipy, empty masks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import ndimage

from lungkit.errors import UsageError
from lungkit.metrics import (
    EmptyPolicy,
    HausdorffDefinition,
    SurfaceDistances,
    assd_mm,
    hausdorff_mm,
    label_surface_distances,
    surface,
    surface_dice,
    surface_distances,
)

POOLED, DIRECTED = HausdorffDefinition.POOLED, HausdorffDefinition.DIRECTED
SHAPES = [(1, 1), (7, 9), (1, 12), (40, 1), (5, 6, 7), (1, 8, 8), (9, 1, 4), (3, 30, 33), (16, 16, 70)]


@pytest.fixture(params=["native", "numpy"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "numpy":
        monkeypatch.setattr(surface, "_native", None)
    elif surface._native is None:
        pytest.skip("the geometry module is not built")
    return request.param


def box(shape: tuple[int, ...], *slices: slice) -> np.ndarray:
    mask = np.zeros(shape, bool)
    mask[slices] = True
    return mask


def random_mask(shape: tuple[int, ...], seed: int, kind: str) -> np.ndarray:
    random = np.random.default_rng(seed)
    if kind == "noise":
        return random.random(shape) < 0.3
    if kind == "sparse":
        return random.random(shape) < 0.02
    return ndimage.gaussian_filter(random.random(shape), 1.5) > 0.5


def by_scipy(origin: np.ndarray, target: np.ndarray, spacing: tuple[float, ...]) -> np.ndarray:
    face = ndimage.generate_binary_structure(origin.ndim, 1)
    surfaces = [mask & ~ndimage.binary_erosion(mask, face) for mask in (origin, target)]
    if not target.any():
        return np.full(surfaces[0].sum(), np.inf)
    return ndimage.distance_transform_edt(~surfaces[1], sampling=spacing)[surfaces[0]]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["noise", "sparse", "blobs"])
def test_distances_equal_scipys(implementation: str, shape: tuple[int, ...], kind: str) -> None:
    spacing = (2.5, 0.8, 0.7)[-len(shape) :]
    first, second = random_mask(shape, 1, kind), random_mask(shape, 2, kind)
    found = surface_distances(first, second, spacing)
    np.testing.assert_allclose(found.prediction_to_truth, by_scipy(first, second, spacing), atol=1e-4)
    np.testing.assert_allclose(found.truth_to_prediction, by_scipy(second, first, spacing), atol=1e-4)


def test_face_of_two_slabs_is_their_distance_in_mm(implementation: str) -> None:
    prediction, truth = box((8, 4, 4), slice(0, 1)), box((8, 4, 4), slice(3, 4))
    found = surface_distances(prediction, truth, (2.5, 1.0, 1.0))
    assert set(found.prediction_to_truth.tolist()) == {7.5}
    assert len(found.prediction_to_truth) == 16


def test_diagonal_uses_the_spacing_of_every_axis(implementation: str) -> None:
    prediction, truth = np.zeros((2, 4, 4)), np.zeros((2, 4, 4))
    prediction[0, 0, 0], truth[1, 2, 3] = 1, 1
    found = surface_distances(prediction, truth, (3.0, 2.0, 4.0))
    assert found.prediction_to_truth.tolist() == [13.0]


def test_border_of_the_volume_counts_as_outside(implementation: str) -> None:
    full = np.ones((4, 5, 6), bool)
    assert len(surface_distances(full, full, (1, 1, 1)).prediction_to_truth) == 4 * 5 * 6 - 2 * 3 * 4


def test_two_dimensional_image_has_no_neighbours_above_and_below(implementation: str) -> None:
    full = np.ones((5, 6), bool)
    assert len(surface_distances(full, full, (1, 1)).prediction_to_truth) == 5 * 6 - 3 * 4


def test_inner_voxels_are_no_surface(implementation: str) -> None:
    solid = box((9, 9, 9), slice(2, 7), slice(2, 7), slice(2, 7))
    hollow = solid & ~box((9, 9, 9), slice(4, 5), slice(4, 5), slice(4, 5))
    found = surface_distances(solid, hollow, (1, 1, 1))
    assert found.prediction_to_truth.max() == 0
    # The hole makes its six face neighbours boundary voxels, each one voxel below the outer surface.
    assert sorted(found.truth_to_prediction.tolist())[-6:] == [1.0] * 6
    assert len(found.truth_to_prediction) == len(found.prediction_to_truth) + 6


def test_labels_touching_each_other_are_measured_apart(implementation: str) -> None:
    truth = np.zeros((4, 12, 12), np.uint8)
    truth[:, :6], truth[:, 6:] = 1, 2
    prediction = np.zeros_like(truth)
    prediction[:, :8], prediction[:, 8:] = 1, 2
    found = label_surface_distances(prediction, truth, labels=(2, 1, 7), spacing_mm=(1, 0.5, 0.5))
    for label, sets in zip((2, 1), found, strict=False):
        alone = surface_distances(prediction == label, truth == label, (1, 0.5, 0.5))
        assert np.array_equal(np.sort(sets.prediction_to_truth), np.sort(alone.prediction_to_truth))
        assert np.array_equal(np.sort(sets.truth_to_prediction), np.sort(alone.truth_to_prediction))
    assert found[2].empty_sides == 2


@pytest.mark.parametrize("threads", [2, 3, 16])
def test_threads_change_nothing(threads: int) -> None:
    first, second = random_mask((40, 60, 80), 1, "blobs"), random_mask((40, 60, 80), 2, "blobs")
    one = surface_distances(first, second, (2, 1, 1), threads=1)
    many = surface_distances(first, second, (2, 1, 1), threads=threads)
    assert np.array_equal(one.prediction_to_truth, many.prediction_to_truth)
    assert np.array_equal(one.truth_to_prediction, many.truth_to_prediction)


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int16, np.int64, np.float32])
def test_dtype_of_the_mask_does_not_matter(dtype: type) -> None:
    first, second = random_mask((4, 9, 9), 1, "noise"), random_mask((4, 9, 9), 2, "noise")
    expected = surface_distances(first, second, (1, 1, 1))
    found = surface_distances(first.astype(dtype), second.astype(dtype), (1, 1, 1))
    assert np.array_equal(found.prediction_to_truth, expected.prediction_to_truth)


@pytest.mark.parametrize(
    "change", [np.asfortranarray, lambda a: np.repeat(a, 2, 2)[:, :, ::2], torch.from_numpy]
)
def test_memory_layout_does_not_matter(change: object) -> None:
    first, second = random_mask((4, 9, 10), 1, "noise"), random_mask((4, 9, 10), 2, "noise")
    expected = surface_distances(first, second, (3, 2, 1))
    found = surface_distances(change(first), change(second), (3, 2, 1))
    np.testing.assert_allclose(
        np.sort(found.prediction_to_truth), np.sort(expected.prediction_to_truth), rtol=1e-6
    )


SETS = SurfaceDistances(np.float32([0, 1, 2, 3, 10]), np.float32([0, 0, 0, 4]))


def test_directed_hausdorff_is_the_larger_percentile() -> None:
    assert hausdorff_mm(SETS, percentile=95) == pytest.approx(8.6)


def test_pooled_hausdorff_is_the_percentile_of_all() -> None:
    assert hausdorff_mm(SETS, percentile=95, definition=POOLED) == pytest.approx(7.6)


def test_definitions_agree_at_the_maximum() -> None:
    assert hausdorff_mm(SETS, percentile=100) == hausdorff_mm(SETS, percentile=100, definition=POOLED) == 10


def test_assd_weighs_every_boundary_voxel_alike() -> None:
    assert assd_mm(SETS) == pytest.approx(20 / 9)


def test_surface_dice_includes_the_tolerance_itself() -> None:
    assert surface_dice(SETS, 3.0) == pytest.approx(7 / 9)


def test_surface_dice_tolerance_survives_rounding() -> None:
    prediction, truth = np.zeros((1, 8)), np.zeros((1, 8))
    prediction[0, 0], truth[0, 7] = 1, 1
    assert surface_dice(surface_distances(prediction, truth, (1.0, 0.7)), 4.9) == 1.0


NONE = np.zeros(0, np.float32)
BOTH_EMPTY = SurfaceDistances(NONE, NONE)
NO_TRUTH = SurfaceDistances(np.float32([np.inf]), NONE)
NO_PREDICTION = SurfaceDistances(NONE, np.float32([np.inf]))


@pytest.mark.parametrize(
    ("policy", "sets", "distance", "nsd"),
    [
        (EmptyPolicy.NAN, BOTH_EMPTY, math.nan, math.nan),
        (EmptyPolicy.NAN, NO_TRUTH, math.nan, 0),
        (EmptyPolicy.NAN, NO_PREDICTION, math.nan, 0),
        (EmptyPolicy.PERFECT_IF_BOTH_EMPTY, BOTH_EMPTY, 0, 1),
        (EmptyPolicy.PERFECT_IF_BOTH_EMPTY, NO_TRUTH, math.inf, 0),
        (EmptyPolicy.PERFECT_IF_BOTH_EMPTY, NO_PREDICTION, math.inf, 0),
        (EmptyPolicy.NAN_IF_TRUTH_EMPTY, BOTH_EMPTY, math.nan, math.nan),
        (EmptyPolicy.NAN_IF_TRUTH_EMPTY, NO_TRUTH, math.nan, math.nan),
        (EmptyPolicy.NAN_IF_TRUTH_EMPTY, NO_PREDICTION, math.nan, 0),
    ],
)
def test_empty_policy(policy: EmptyPolicy, sets: SurfaceDistances, distance: float, nsd: float) -> None:
    found = [
        hausdorff_mm(sets, empty=policy),
        assd_mm(sets, empty=policy),
        surface_dice(sets, 1.0, empty=policy),
    ]
    assert found == pytest.approx([distance, distance, nsd], nan_ok=True)


def test_distance_to_an_empty_mask_is_infinite(implementation: str) -> None:
    found = surface_distances(box((3, 4), slice(0, 1)), np.zeros((3, 4)), (1, 1))
    assert found.prediction_to_truth.tolist() == [math.inf] * 4
    assert len(found.truth_to_prediction) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"spacing_mm": (1.0, 1.0)}, "3 positive numbers"),
        ({"spacing_mm": (1.0, 0.0, 1.0)}, "positive"),
        ({"spacing_mm": (1.0, math.nan, 1.0)}, "positive"),
        ({"truth": np.zeros((2, 2, 3))}, r"\(2, 2, 2\).*\(2, 2, 3\)"),
        ({"threads": 0}, "threads"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, object], message: str) -> None:
    defaults = {
        "prediction": np.zeros((2, 2, 2)),
        "truth": np.zeros((2, 2, 2)),
        "spacing_mm": (1.0, 1.0, 1.0),
    }
    with pytest.raises(UsageError, match=message):
        surface_distances(**{**defaults, **arguments})


@pytest.mark.parametrize(("labels", "message"), [((0,), "1 to 255"), ((256,), "1 to 255")])
def test_labels_out_of_range_are_refused(labels: tuple[int, ...], message: str) -> None:
    blank = np.zeros((2, 2), np.uint8)
    with pytest.raises(UsageError, match=message):
        label_surface_distances(blank, blank, labels=labels, spacing_mm=(1, 1))


def test_label_map_beyond_eight_bits_is_refused() -> None:
    wide = np.full((2, 2), 300)
    with pytest.raises(UsageError, match="300"):
        label_surface_distances(wide, wide, labels=(1,), spacing_mm=(1, 1))


@pytest.mark.parametrize("percentile", [-1, 101])
def test_percentile_out_of_range_is_refused(percentile: float) -> None:
    with pytest.raises(UsageError, match="percentile"):
        hausdorff_mm(SETS, percentile=percentile)


def test_negative_tolerance_is_refused() -> None:
    with pytest.raises(UsageError, match="tolerance_mm"):
        surface_dice(SETS, -1.0)
