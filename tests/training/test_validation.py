"""Validation by whole case equals counting by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lungkit.training.planning import Plan
from lungkit.training.validation import METRICS, validate

PLAN = Plan(
    dims=2,
    patch_size=(4, 4),
    context_slices=0,
    model={},
    epochs=1,
    steps_per_epoch=1,
    batch_size=1,
    learning_rate=0.1,
)


class Threshold(nn.Module):
    """Logits whose largest is the intensity itself, rounded: 0, 1 or 2."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([-(x - index).abs() for index in range(3)], dim=1)


def case(name: str, image: np.ndarray, label: np.ndarray) -> Any:
    volume = image[None].astype(np.float32)
    return SimpleNamespace(
        case_id=name, image_float=lambda: volume, label=label.astype(np.uint8), shape=label.shape
    )


def random_case(name: str, seed: int, *, ignored: bool = False) -> tuple[Any, np.ndarray, np.ndarray]:
    """Five slices of 9 x 7, which patches of 4 x 4 do not divide."""
    random = np.random.default_rng(seed)
    prediction = random.integers(0, 3, (5, 9, 7))
    label = np.where(random.random((5, 9, 7)) < 0.6, prediction, random.integers(0, 3, (5, 9, 7)))
    if ignored:
        label[:, 5:] = 255
    return case(name, prediction, label), prediction, label


def by_hand(prediction: np.ndarray, label: np.ndarray, index: int) -> dict[str, float]:
    counted = label != 255
    p, y = (prediction == index) & counted, (label == index) & counted
    tp, fp, fn = float((p & y).sum()), float((p & ~y).sum()), float((~p & y).sum())
    return {
        "dice": 2 * tp / (2 * tp + fp + fn),
        "iou": tp / (tp + fp + fn),
        "ppv": tp / (tp + fp),
        "sensitivity": tp / (tp + fn),
    }


@pytest.mark.parametrize("ignored", [False, True])
def test_whole_cases_are_measured_as_by_hand(ignored: bool) -> None:
    cases = [random_case(f"case_{seed}", seed, ignored=ignored) for seed in range(3)]
    names = ("background", "solid", "ground_glass")
    table = validate(Threshold(), [c for c, _, _ in cases], PLAN, names)
    assert table.labels == ("solid", "ground_glass")
    for number, (found, prediction, label) in enumerate(cases):
        for index, name in ((1, "solid"), (2, "ground_glass")):
            row = next(r for r in table.of_label(name) if r.case_id == found.case_id)
            assert row.values == pytest.approx(by_hand(prediction, label, index)), (number, name)
    dice = [by_hand(p, y, index)["dice"] for index in (1, 2) for _, p, y in cases]
    assert table.mean("dice") == pytest.approx(np.mean(dice))


def test_a_mean_is_over_cases_not_over_voxels() -> None:
    small, large = np.zeros((1, 8, 8), int), np.zeros((1, 8, 8), int)
    small[0, 0, 0] = 1
    large[0, 2:, 2:] = 1
    cases = [case("missed", np.zeros_like(small), small), case("found", large, large)]
    assert validate(Threshold(), cases, PLAN, ("background", "tumour")).mean("dice") == 0.5


def test_a_case_without_foreground_is_left_out_and_counted() -> None:
    empty, full = np.zeros((1, 8, 8), int), np.ones((1, 8, 8), int)
    cases = [case("empty", empty, empty), case("full", full, full)]
    table = validate(Threshold(), cases, PLAN, ("background", "tumour"))
    summary = table.summary("tumour")["dice"]
    assert (summary.mean, summary.cases, summary.undefined, summary.decided_by_policy) == (1.0, 1, 1, 1)


def test_only_empty_cases_have_no_mean() -> None:
    empty = np.zeros((1, 8, 8), int)
    table = validate(Threshold(), [case("empty", empty, empty)], PLAN, ("background", "tumour"))
    assert all(math.isnan(table.mean(metric)) for metric in METRICS)


def test_cases_keep_their_order() -> None:
    cases = [random_case(name, seed)[0] for seed, name in enumerate("dbca")]
    table = validate(Threshold(), cases, PLAN, ("background", "a", "b"))
    assert table.case_ids == ("d", "b", "c", "a")


def test_processes_share_the_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [random_case(f"case_{seed}", seed)[0] for seed in range(5)]
    names = ("background", "a", "b")
    whole = validate(Threshold(), cases, PLAN, names)
    shares: list[list[Any]] = []
    monkeypatch.setattr(
        "lungkit.training.validation.gather_objects", lambda mine, size: (shares.append(mine), shares)[1]
    )
    validate(Threshold(), cases, PLAN, names, rank=0, world_size=2)
    table = validate(Threshold(), cases, PLAN, names, rank=1, world_size=2)
    assert [len(share) for share in shares] == [3, 2]
    assert table.rows == whole.rows


def test_it_can_be_given_up_after_a_case() -> None:
    seen: list[int] = []

    def after_case() -> None:
        seen.append(1)
        if len(seen) == 2:
            raise KeyboardInterrupt

    cases = [random_case(f"case_{seed}", seed)[0] for seed in range(4)]
    with pytest.raises(KeyboardInterrupt):
        validate(Threshold(), cases, PLAN, ("background", "a", "b"), after_case=after_case)
    assert len(seen) == 2
