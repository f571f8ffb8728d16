"""From statistics to a loss: the options as the ops take them, and what the arithmetic does at its edges."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields

import pytest
import torch

from lungkit.ops._library import defined_ops
from lungkit.ops.dice_ce_arithmetic import (
    DiceCEOptions,
    dice_terms,
    loss_from_statistics,
    ratio_or_one,
    reduce_terms,
)

OTHER = DiceCEOptions(
    "sigmoid", "none", True, 2.0, 7, True, False, True, True, False, 1e-3, 1e-2, 0.7, 0.3, 0.2
)  # fmt: skip


def arguments_of(op: str) -> list[str]:
    schema = torch._C.parse_schema(f"lungkit::{defined_ops()[op]}")
    return [argument.name for argument in schema.arguments if "Tensor" not in str(argument.type)]


def test_options_are_frozen():
    with pytest.raises(FrozenInstanceError):
        OTHER.gamma = 1.0


def test_scalars_of_the_loss_are_the_fields_and_the_way_back():
    assert DiceCEOptions(*OTHER.of_loss()) == OTHER
    assert DiceCEOptions(*OTHER.of_statistics()).of_statistics() == OTHER.of_statistics()


def test_scalars_stand_in_the_order_of_the_schemas():
    names = [field.name for field in fields(DiceCEOptions)]
    assert arguments_of("dice_ce_loss") == names
    for op in ("dice_ce_statistics", "dice_ce_backward"):
        assert arguments_of(op) == names[: len(OTHER.of_statistics())]


@pytest.mark.parametrize(("channels", "entropy"), [(1, "binary"), (2, "softmax"), (5, "softmax")])
def test_one_channel_takes_the_binary_cross_entropy(channels, entropy):
    assert OTHER.for_logits(torch.zeros(1, channels, 4)).cross_entropy == entropy


def test_dice_terms_are_the_formula():
    overlap, total = torch.tensor([[3.0, 0.0]]), torch.tensor([[10.0, 4.0]])
    options = DiceCEOptions(smooth_nr=0.5, smooth_dr=2.0)
    torch.testing.assert_close(
        dice_terms(overlap, total, options), torch.tensor([[1 - 6.5 / 12, 1 - 0.5 / 6]])
    )
    options = DiceCEOptions(smooth_nr=0.5, smooth_dr=2.0, jaccard=True)
    torch.testing.assert_close(
        dice_terms(overlap, total, options), torch.tensor([[1 - 6.5 / 16, 1 - 0.5 / 10]])
    )


def test_a_ratio_over_nothing_is_one_without_gradient():
    divisor = torch.tensor([0.0, 2.0], requires_grad=True)
    ratio = ratio_or_one(torch.ones(2), divisor)
    ratio.sum().backward()
    assert ratio.tolist() == [1.0, 0.5]
    assert divisor.grad.tolist() == [0.0, -0.25]


@pytest.mark.parametrize(("reduction", "expected"), [("mean", 0.0), ("sum", 0.0)])
def test_no_terms_reduce_to_zero(reduction, expected):
    assert reduce_terms(torch.empty(0, 3), reduction) == expected


@pytest.mark.parametrize("mean", [True, False])
def test_statistics_of_no_voxel_give_the_loss_zero(mean):
    options = DiceCEOptions(smooth_nr=0.0, smooth_dr=0.0, mean=mean)
    assert loss_from_statistics(torch.zeros(6, 2, 3), options, weight=None, class_indices=True) == 0
