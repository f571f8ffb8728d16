"""All metrics of a case in one call: which ones, under which names, and what is left out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lungkit.errors import DataError, UsageError
from lungkit.metrics import (
    EmptyPolicy,
    HausdorffDefinition,
    MetricGroup,
    MetricOptions,
    hausdorff_mm,
    measure_case,
    surface_distances,
)

LABELS = {"background": 0, "tumour": 1}
SPACING = (2.5, 0.8, 0.8)


def block(shape: tuple[int, ...] = (6, 20, 20), start: int = 5, value: int = 1) -> np.ndarray:
    mask = np.zeros(shape, np.uint8)
    mask[..., start : start + 6, 5:11] = value
    return mask


def test_every_metric_has_a_definition_and_a_value() -> None:
    measured = measure_case(block(), block(start=7), LABELS, SPACING)["tumour"]
    assert list(measured.values) == list(MetricOptions().definitions())
    assert not any(math.isnan(value) for value in measured.values.values())


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (MetricOptions(percentile=90), "hd90_directed_mm"),
        (MetricOptions(hausdorff=HausdorffDefinition.POOLED), "hd95_pooled_mm"),
        (MetricOptions(tolerance_mm=1.5), "nsd_voxel_1.5mm"),
    ],
)
def test_definition_is_part_of_the_name(options: MetricOptions, name: str) -> None:
    assert name in measure_case(block(), block(), LABELS, SPACING, options=options)["tumour"].values


def test_only_the_groups_asked_for() -> None:
    options = MetricOptions(groups=(MetricGroup.SIZE,))
    assert set(measure_case(block(), block(), LABELS, SPACING, options=options)["tumour"].values) == {
        "volume_true_ml",
        "volume_predicted_ml",
        "diameter_true_mm",
        "diameter_predicted_mm",
    }


def test_classes_are_measured_apart() -> None:
    truth = block(start=2) + block(start=12, value=2)
    prediction = block(start=2) + block(start=10, value=2)
    measured = measure_case(prediction, truth, {**LABELS, "node": 2}, SPACING)
    assert measured["tumour"].values["hd95_directed_mm"] == 0
    assert measured["node"].values["hd95_directed_mm"] == pytest.approx(1.6)


def test_ignored_voxels_count_in_no_group() -> None:
    truth, prediction = block(), block()
    truth[:, 15:] = 255
    prediction[:, 15:] = 1
    measured = measure_case(prediction, truth, LABELS, SPACING, ignore_index=255)["tumour"].values
    assert measured["dice"] == 1
    assert measured["hd95_directed_mm"] == 0
    assert measured["lesions_false"] == 0
    assert measured["volume_predicted_ml"] == measured["volume_true_ml"]


def test_single_slice_is_measured_in_two_dimensions() -> None:
    prediction, truth = block((1, 20, 20)), block((1, 20, 20), start=7)
    measured = measure_case(prediction, truth, LABELS, SPACING)["tumour"].values
    flat = hausdorff_mm(surface_distances(prediction[0], truth[0], SPACING[1:]))
    assert measured["hd95_directed_mm"] == pytest.approx(flat)
    assert measured["volume_true_ml"] == pytest.approx(36 * 2.5 * 0.8 * 0.8 / 1000)


def test_two_dimensional_image_has_no_volume() -> None:
    measured = measure_case(block((20, 20)), block((20, 20)), LABELS, SPACING[1:])["tumour"].values
    assert math.isnan(measured["volume_true_ml"])


def test_tensors_give_what_arrays_give() -> None:
    arrays = measure_case(block(), block(start=7), LABELS, SPACING)
    tensors = measure_case(torch.from_numpy(block()), torch.from_numpy(block(start=7)), LABELS, SPACING)
    assert tensors == arrays


@pytest.mark.parametrize("policy", list(EmptyPolicy))
@pytest.mark.parametrize("prediction", [block(), block() * 0], ids=["false alarm", "both empty"])
def test_decided_by_the_policy_are_the_undefined_under_nan(
    policy: EmptyPolicy, prediction: np.ndarray
) -> None:
    truth = block() * 0
    measured = measure_case(prediction, truth, LABELS, SPACING, options=MetricOptions(empty=policy))["tumour"]
    undefined = {name for name, value in measured.values.items() if math.isnan(value)}
    if policy is EmptyPolicy.PERFECT_IF_BOTH_EMPTY:
        nan = measure_case(prediction, truth, LABELS, SPACING)["tumour"]
        assert not undefined
        assert measured.decided_by_policy == nan.decided_by_policy
    else:
        assert measured.decided_by_policy == undefined


def test_label_outside_the_map_is_a_data_error() -> None:
    with pytest.raises(DataError, match="3"):
        measure_case(block(value=3), block(), LABELS, SPACING)


@pytest.mark.parametrize(
    "options",
    [{"percentile": 101}, {"tolerance_mm": -1}, {"min_iou": 2}, {"groups": ()}],
    ids=lambda o: next(iter(o)),
)
def test_options_out_of_range_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=next(iter(options))):
        MetricOptions(**options)
