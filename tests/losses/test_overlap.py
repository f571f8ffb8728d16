"""DiceLoss, JaccardLoss, TverskyLoss, GeneralizedDiceLoss, DiceFocalLoss: MONAI's values and gradients."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from lungkit import losses
from lungkit.errors import UsageError

monai = pytest.importorskip("monai.losses")

SHAPE = (2, 6, 7)


def case(classes, *, vectors=False):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(SHAPE[0], classes, *SHAPE[1:], generator=generator, dtype=torch.float64)
    labels = torch.randint(0, max(classes, 2), (SHAPE[0], 1, *SHAPE[1:]), generator=generator)
    if vectors:
        labels = F.one_hot(labels[:, 0], classes).movedim(-1, 1).double()
    return logits, labels


def assert_equal_to_monai(ours, theirs, logits, labels):
    """Equal to fp32, in which MONAI computes one-hot labels, generalised weights and the focal term."""
    values, gradients = [], []
    for criterion in (ours, theirs):
        z = logits.detach().requires_grad_()
        value = criterion(z, labels)
        (gradient,) = torch.autograd.grad(value.square().sum(), z)
        values.append(value.detach())
        gradients.append(gradient)
    torch.testing.assert_close(*values, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)


SWITCHES = list(itertools.product([False, True], repeat=2))
FAMILY = {
    "DiceLoss": [
        {},
        {"jaccard": True, "squared_pred": True},
        {"weight": 2.0},
        {"smooth_nr": 0.0, "smooth_dr": 0.1},
    ],
    "TverskyLoss": [{}, {"alpha": 0.3, "beta": 0.7}],
    "GeneralizedDiceLoss": [{}, {"w_type": "simple"}, {"w_type": "uniform", "smooth_nr": 0.5}],
}


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize(
    ("name", "options"),
    [(name, options) for name, all_options in FAMILY.items() for options in all_options],
    ids=str,
)
def test_the_family_has_monais_values_and_gradients(name, options, activation, reduction):
    for include_background, batch in SWITCHES:
        for vectors in (False, True):
            arguments = {
                **options, activation: True, "reduction": reduction, "include_background": include_background,
                "batch": batch, "to_onehot_y": not vectors,
            }  # fmt: skip
            ours, theirs = getattr(losses, name)(**arguments), getattr(monai, name)(**arguments)
            assert_equal_to_monai(ours, theirs, *case(3, vectors=vectors))


@pytest.mark.parametrize("name", ["DiceLoss", "TverskyLoss"])
def test_ignored_voxels_count_as_in_monai(name):
    logits, labels = case(3)
    labels[0, 0, :2] = 255
    arguments = {"softmax": True, "to_onehot_y": True, "ignore_index": 255}
    assert_equal_to_monai(
        getattr(losses, name)(**arguments), getattr(monai, name)(**arguments), logits, labels
    )


def test_weights_of_the_foreground_have_monais_value():
    arguments = {"softmax": True, "to_onehot_y": True, "include_background": False, "weight": [1.0, 3.0]}
    assert_equal_to_monai(losses.DiceLoss(**arguments), monai.DiceLoss(**arguments), *case(3))


def test_a_class_that_is_absent_takes_the_largest_generalised_weight():
    logits, labels = case(3)
    labels[labels == 2] = 0
    arguments = {"softmax": True, "to_onehot_y": True}
    assert_equal_to_monai(
        losses.GeneralizedDiceLoss(**arguments), monai.GeneralizedDiceLoss(**arguments), logits, labels
    )


def test_jaccard_loss_is_dice_loss_with_jaccard():
    logits, labels = case(3)
    expected = losses.DiceLoss(softmax=True, jaccard=True, batch=True)(logits, labels)
    assert torch.equal(losses.JaccardLoss(softmax=True, batch=True)(logits, labels), expected)


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gamma": 0.0, "reduction": "sum"},
        {"gamma": 1.5, "alpha": 0.25, "lambda_focal": 2.0},
        {"weight": [0.5, 3.0], "include_background": False},
        {"weight": [0.5, 1.0, 3.0], "batch": True, "lambda_dice": 0.5},
        {"jaccard": True, "squared_pred": True, "weight": 2.0, "reduction": "sum"},
    ],
    ids=str,
)
def test_dice_focal_loss_has_monais_value_and_gradient(options, activation):
    arguments = {**options, activation: True, "to_onehot_y": True}
    assert_equal_to_monai(losses.DiceFocalLoss(**arguments), monai.DiceFocalLoss(**arguments), *case(3))


def test_dice_focal_loss_of_one_channel_has_monais_value():
    arguments = {"sigmoid": True, "gamma": 2.0}
    assert_equal_to_monai(losses.DiceFocalLoss(**arguments), monai.DiceFocalLoss(**arguments), *case(1))


def test_focal_loss_without_voxels_is_finite():
    logits, labels = case(3)
    criterion = losses.DiceFocalLoss(softmax=True, ignore_index=255)
    assert torch.isfinite(criterion(logits, torch.full_like(labels, 255)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: losses.DiceLoss(reduction="max"),
            "reduction must be one of 'mean', 'sum', 'none', got 'max'",
        ),
        (lambda: losses.TverskyLoss(alpha=-0.1), "alpha must not be negative, got -0.1"),
        (lambda: losses.GeneralizedDiceLoss(w_type="cube"), "w_type must be one of .* got 'cube'"),
        (lambda: losses.DiceFocalLoss(alpha=2.0), r"alpha must lie in \[0, 1\], got 2.0"),
        (lambda: losses.DiceFocalLoss(gamma=-1.0), "gamma must not be negative, got -1.0"),
        (
            lambda: losses.DiceLoss(softmax=True, weight=[1.0])(*case(3)),
            "each of the 3 classes that count, got 1",
        ),
    ],
)
def test_options_that_do_not_fit_are_named(make, message):
    with pytest.raises(UsageError, match=message):
        make()
