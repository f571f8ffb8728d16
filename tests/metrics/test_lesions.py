"""Lesion-wise detection: components, matching by overlap, the ratios and their empty cases."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import ndimage

from lungkit.errors import UsageError
from lungkit.metrics import EmptyPolicy, label_lesions, lesion_metrics, match_lesions


def row(*voxels: int) -> np.ndarray:
    mask = np.zeros((1, 20), np.uint8)
    mask[0, list(voxels)] = 1
    return mask


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("seed", range(8))
def test_lesions_are_scipys_components_with_corners_connected(dims: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    mask = random.random(random.integers(1, 14, dims)) < random.choice([0.05, 0.2, 0.5])
    lesions, count = label_lesions(mask)
    expected, expected_count = ndimage.label(mask, np.ones((3,) * dims))
    assert count == expected_count
    pairs = set(zip(lesions.reshape(-1).tolist(), expected.reshape(-1).tolist(), strict=True))
    assert len(pairs) == len({first for first, _ in pairs}) == len({second for _, second in pairs})


def test_empty_mask_has_no_lesion() -> None:
    assert label_lesions(np.zeros((2, 3, 4)))[1] == 0


def test_one_prediction_over_two_lesions_finds_both() -> None:
    match = match_lesions(row(0, 1, 2, 3, 4), row(0, 1, 3, 4))
    assert match.found.tolist() == [True, True]
    assert match.real.tolist() == [True]


def test_min_iou_asks_for_more_than_a_touch() -> None:
    truth, prediction = row(0, 1, 2, 3), row(3, 4)
    assert match_lesions(prediction, truth).found.tolist() == [True]
    assert match_lesions(prediction, truth, min_iou=0.2).found.tolist() == [True]
    assert match_lesions(prediction, truth, min_iou=0.21).found.tolist() == [False]


def test_lesion_dice_takes_all_predictions_that_touch() -> None:
    match = match_lesions(row(0, 2, 3, 9), row(0, 1, 2, 6))
    # Lesion {0, 1, 2} against {0} and {2, 3}: 2 * 2 / (3 + 3); lesion {6} is not touched.
    assert match.lesion_dice.tolist() == [pytest.approx(4 / 6), 0]


def test_metrics_of_a_hand_counted_case() -> None:
    metrics = lesion_metrics(match_lesions(row(0, 9, 15), row(0, 3, 6, 9)))
    assert metrics["lesion_sensitivity"] == 2 / 4
    assert metrics["lesion_precision"] == pytest.approx(2 / 3)
    assert metrics["lesion_f1"] == pytest.approx(2 * (1 / 2) * (2 / 3) / (1 / 2 + 2 / 3))
    assert (metrics["lesions_true"], metrics["lesions_predicted"], metrics["lesions_false"]) == (4, 3, 1)


@pytest.mark.parametrize(
    ("policy", "prediction", "truth", "expected"),
    [
        (EmptyPolicy.NAN, row(), row(), (math.nan, math.nan, math.nan)),
        (EmptyPolicy.NAN, row(3), row(), (math.nan, 0, 0)),
        (EmptyPolicy.NAN, row(), row(3), (0, math.nan, 0)),
        (EmptyPolicy.NAN, row(1), row(3), (0, 0, 0)),
        (EmptyPolicy.PERFECT_IF_BOTH_EMPTY, row(), row(), (1, 1, 1)),
        (EmptyPolicy.PERFECT_IF_BOTH_EMPTY, row(3), row(), (0, 0, 0)),
        (EmptyPolicy.NAN_IF_TRUTH_EMPTY, row(3), row(), (math.nan, math.nan, math.nan)),
        (EmptyPolicy.NAN_IF_TRUTH_EMPTY, row(), row(3), (0, math.nan, 0)),
    ],
)
def test_empty_policy(
    policy: EmptyPolicy, prediction: np.ndarray, truth: np.ndarray, expected: tuple[float, float, float]
) -> None:
    metrics = lesion_metrics(match_lesions(prediction, truth), empty=policy)
    found = [metrics[name] for name in ("lesion_sensitivity", "lesion_precision", "lesion_f1")]
    assert found == pytest.approx(expected, nan_ok=True)


def test_shapes_that_differ_are_refused() -> None:
    with pytest.raises(UsageError, match=r"\(1, 20\).*\(2, 20\)"):
        match_lesions(row(1), np.zeros((2, 20)))


def test_min_iou_out_of_range_is_refused() -> None:
    with pytest.raises(UsageError, match="min_iou"):
        match_lesions(row(1), row(1), min_iou=2)


def test_four_axes_are_refused() -> None:
    with pytest.raises(UsageError, match=r"\(1, 1, 1, 1\)"):
        label_lesions(np.ones((1, 1, 1, 1)))
