"""Overlap metrics: the formulas, the empty cases under each policy, and the arguments."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lungkit.errors import DataError, UsageError
from lungkit.metrics import OVERLAP_METRICS, EmptyPolicy, decided_by_policy, evaluate_case, overlap_metrics

NAN = math.nan
BOTH_EMPTY = (0, 0, 0)
FALSE_ALARM = (0, 5, 0)
MISSED = (0, 0, 5)


def of(counts: tuple[int, int, int], policy: EmptyPolicy) -> dict[str, float]:
    values = overlap_metrics(torch.tensor(counts), voxels=20, empty=policy)
    return {name: float(value) for name, value in values.items()}


def test_formulas_on_hand_computed_counts() -> None:
    values = overlap_metrics(np.array([6, 2, 4]), voxels=32)
    expected = {
        "dice": 12 / 18,
        "iou": 6 / 12,
        "ppv": 6 / 8,
        "sensitivity": 6 / 10,
        "volume_similarity": 1 - 2 / 18,
        "specificity": 20 / 22,
    }
    assert {name: float(value) for name, value in values.items()} == pytest.approx(expected, abs=1e-15)


def test_every_metric_is_listed() -> None:
    assert set(overlap_metrics(torch.tensor([1, 1, 1]), voxels=9)) == set(OVERLAP_METRICS)


def test_specificity_needs_the_voxels() -> None:
    assert "specificity" not in overlap_metrics(torch.tensor([1, 1, 1]))


def test_leading_axes_are_kept() -> None:
    values = overlap_metrics(torch.ones(4, 2, 3, dtype=torch.int64), voxels=torch.full((4, 1), 9))
    assert all(value.shape == (4, 2) for value in values.values())


@pytest.mark.parametrize(
    ("policy", "counts", "expected"),
    [
        (EmptyPolicy.NAN, BOTH_EMPTY, (NAN, NAN, NAN, NAN)),
        (EmptyPolicy.NAN, FALSE_ALARM, (0, 0, 0, NAN)),
        (EmptyPolicy.NAN, MISSED, (0, 0, NAN, 0)),
        (EmptyPolicy.PERFECT_IF_BOTH_EMPTY, BOTH_EMPTY, (1, 1, 1, 1)),
        (EmptyPolicy.PERFECT_IF_BOTH_EMPTY, FALSE_ALARM, (0, 0, 0, 0)),
        (EmptyPolicy.PERFECT_IF_BOTH_EMPTY, MISSED, (0, 0, 0, 0)),
        (EmptyPolicy.NAN_IF_TRUTH_EMPTY, BOTH_EMPTY, (NAN, NAN, NAN, NAN)),
        (EmptyPolicy.NAN_IF_TRUTH_EMPTY, FALSE_ALARM, (NAN, NAN, NAN, NAN)),
        (EmptyPolicy.NAN_IF_TRUTH_EMPTY, MISSED, (0, 0, NAN, 0)),
    ],
)
def test_empty_policy(
    policy: EmptyPolicy, counts: tuple[int, int, int], expected: tuple[float, float, float, float]
) -> None:
    values = of(counts, policy)
    assert [values[name] for name in ("dice", "iou", "ppv", "sensitivity")] == pytest.approx(
        expected, nan_ok=True
    )


@pytest.mark.parametrize(
    ("counts", "policy", "decided"),
    [
        (BOTH_EMPTY, EmptyPolicy.NAN, {"dice", "iou", "ppv", "sensitivity", "volume_similarity"}),
        (FALSE_ALARM, EmptyPolicy.NAN, {"sensitivity"}),
        (MISSED, EmptyPolicy.PERFECT_IF_BOTH_EMPTY, {"ppv"}),
        (FALSE_ALARM, EmptyPolicy.NAN_IF_TRUTH_EMPTY, set(OVERLAP_METRICS)),
        ((1, 1, 1), EmptyPolicy.NAN, set()),
    ],
)
def test_names_are_given_of_the_values_that_the_policy_decided(
    counts: tuple[int, int, int], policy: EmptyPolicy, decided: set[str]
) -> None:
    found = decided_by_policy(torch.tensor(counts), voxels=20, empty=policy)
    assert {name for name, flag in found.items() if flag} == decided


def test_counts_of_another_shape_are_refused() -> None:
    with pytest.raises(UsageError, match=r"\(\.\.\., 3\)"):
        overlap_metrics(torch.ones(4, 2))


def test_case_is_evaluated_for_every_class() -> None:
    truth = np.array([[0, 1, 1], [2, 2, 2]], np.uint8)
    prediction = np.array([[0, 1, 2], [2, 2, 0]], np.uint8)
    overlap = evaluate_case(prediction, truth, 3)
    assert overlap.counts.tolist() == [[1, 1, 0], [1, 0, 1], [2, 1, 1]]
    assert overlap.of_class(2)["dice"] == pytest.approx(4 / 6)


def test_ignored_voxels_count_nowhere() -> None:
    overlap = evaluate_case(np.array([1, 1, 1, 0]), np.array([1, 255, 255, 0]), 2, ignore_index=255)
    assert overlap.counts[1].tolist() == [1, 0, 0]
    assert overlap.voxels == 2


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int16, np.uint16, np.int64])
def test_arrays_of_any_integer_dtype_give_the_same(dtype: type) -> None:
    truth, prediction = np.array([0, 1, 1, 1]), np.array([1, 1, 0, 1])
    overlap = evaluate_case(prediction.astype(dtype), truth.astype(dtype), 2)
    assert overlap.counts[1].tolist() == [2, 1, 1]


def test_read_only_array_is_taken(recwarn: pytest.WarningsRecorder) -> None:
    truth = np.array([0, 1], np.uint8)
    truth.setflags(write=False)
    assert evaluate_case(truth, truth, 2).of_class(1)["dice"] == 1.0
    assert not recwarn.list


def test_tensor_and_array_mix() -> None:
    assert evaluate_case(torch.tensor([0, 1]), np.array([0, 1], np.uint8), 2).of_class(1)["iou"] == 1.0


def test_shapes_that_differ_are_refused() -> None:
    with pytest.raises(UsageError, match=r"\(4,\).*\(3,\)"):
        evaluate_case(np.zeros(4, np.uint8), np.zeros(3, np.uint8), 2)


def test_float_labels_are_refused() -> None:
    with pytest.raises(UsageError, match="label must hold integer"):
        evaluate_case(np.zeros(4, np.uint8), np.zeros(4), 2)


def test_class_outside_the_label_map_is_a_data_error() -> None:
    with pytest.raises(DataError, match="7"):
        evaluate_case(np.array([0, 7]), np.array([0, 1]), 2)
