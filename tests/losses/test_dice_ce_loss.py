"""DiceCELoss: MONAI's numbers over all options both have, nnU-Net's identity, ignored voxels, ranks, bad input."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from dice_ce_ranks import CRITERIA, network_and_batch, run_rank

from lungkit.errors import UsageError
from lungkit.losses import DiceCELoss

monai = pytest.importorskip("monai.losses")

SHAPES = [(2, 9), (2, 6, 7), (2, 4, 5, 6)]
WEIGHT = torch.tensor([0.2, 1.0, 3.0])


def case(shape, classes, *, vectors=False, dtype=torch.float64):
    generator = torch.Generator().manual_seed(len(shape))
    logits = torch.randn(shape[0], classes, *shape[1:], generator=generator, dtype=dtype)
    labels = torch.randint(0, max(classes, 2), (shape[0], 1, *shape[1:]), generator=generator)
    if vectors:
        labels = F.one_hot(labels[:, 0], classes).movedim(-1, 1).to(dtype)
    return logits, labels


def value_and_gradient(criterion, logits, labels):
    z = logits.detach().requires_grad_()
    value = criterion(z, labels)
    value.backward()
    return value.detach(), z.grad


def assert_equal_to_monai(logits, labels, **options):
    """Equal in fp64, but that MONAI keeps one-hot labels in fp32."""
    weight = options.pop("weight", None)
    ours = DiceCELoss(**options, weight=weight)
    theirs = monai.DiceCELoss(**options, weight=None if weight is None else weight.to(logits))
    for actual, expected in zip(
        value_and_gradient(ours, logits, labels), value_and_gradient(theirs, logits, labels), strict=True
    ):
        torch.testing.assert_close(
            actual, expected, rtol=1e-6, atol=1e-7, msg=lambda text: f"{options}: {text}"
        )


@pytest.mark.parametrize("activation", ["softmax", "sigmoid", None])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("vectors", [False, True])
@pytest.mark.parametrize("weight", [None, WEIGHT], ids=["unweighted", "weighted"])
@pytest.mark.parametrize("classes", [2, 3])
def test_every_combination_of_options_has_monais_value_and_gradient(
    classes, activation, reduction, vectors, weight
):
    logits, labels = case((2, 6, 7), classes, vectors=vectors)
    weight = None if weight is None else weight[:classes]
    switches = ("include_background", "squared_pred", "jaccard", "batch")
    for values in itertools.product([False, True], repeat=len(switches)):
        for label_smoothing in (0.0, 0.15):
            assert_equal_to_monai(
                logits,
                labels,
                **dict(zip(switches, values, strict=True)),
                to_onehot_y=not vectors,
                softmax=activation == "softmax",
                sigmoid=activation == "sigmoid",
                reduction=reduction,
                weight=weight,
                label_smoothing=label_smoothing,
            )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "options",
    [
        {"smooth_nr": 0.0, "smooth_dr": 1e-3},
        {"smooth_nr": 1.0, "smooth_dr": 2.0},
        {"lambda_dice": 0.3, "lambda_ce": 2.0},
        {"lambda_dice": 0.0},
        {"lambda_ce": 0.0},
    ],
    ids=str,
)
def test_smoothing_and_lambdas_have_monais_value_and_gradient(shape, options):
    for classes in (2, 5):
        assert_equal_to_monai(*case(shape, classes), to_onehot_y=True, softmax=True, **options)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weight", [None, torch.tensor([2.5])], ids=["unweighted", "weighted"])
@pytest.mark.parametrize(
    "options", [{}, {"batch": True, "jaccard": True}, {"reduction": "sum", "squared_pred": True}]
)
def test_one_channel_has_monais_value_and_gradient(shape, weight, options):
    logits, labels = case(shape, 1)
    assert_equal_to_monai(logits, labels.double(), sigmoid=True, weight=weight, **options)
    criterion = DiceCELoss(sigmoid=True, weight=weight, **options)
    assert criterion(logits, labels) == criterion(logits, labels.double())


@pytest.mark.parametrize("weight", [None, torch.tensor([0.5, 2.0])], ids=["unweighted", "weighted"])
def test_two_classes_without_background_leave_dice_unweighted_as_monai_does(weight):
    assert_equal_to_monai(
        *case((2, 6, 7), 2), to_onehot_y=True, softmax=True, include_background=False, weight=weight
    )


def test_soft_labels_have_monais_value_and_gradient():
    logits, _ = case((2, 6, 7), 3)
    labels = torch.rand(logits.shape, dtype=logits.dtype).softmax(1)
    assert_equal_to_monai(logits, labels, softmax=True, squared_pred=True)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.float32])
def test_class_indices_of_any_dtype_give_the_same_loss(dtype):
    logits, labels = case((2, 6, 7), 3)
    criterion = DiceCELoss(softmax=True, to_onehot_y=True)
    assert torch.equal(criterion(logits, labels.to(dtype)), criterion(logits, labels))
    assert torch.equal(criterion(logits, labels[:, 0].to(dtype)), criterion(logits, labels))


@pytest.mark.parametrize("ignore_index", [0, 2, 255])
@pytest.mark.parametrize("batch", [False, True])
def test_ignored_voxels_count_as_in_monais_dice_and_torchs_cross_entropy(batch, ignore_index):
    logits, labels = case((2, 6, 7), 3)
    labels[0, 0, :2] = ignore_index
    options = {"softmax": True, "to_onehot_y": True, "batch": batch}
    expected = monai.DiceLoss(**options, ignore_index=ignore_index)(logits, labels)
    expected = expected + F.cross_entropy(logits, labels[:, 0], ignore_index=ignore_index)
    torch.testing.assert_close(DiceCELoss(**options, ignore_index=ignore_index)(logits, labels), expected)


@pytest.mark.parametrize("ignore_index", [1, 9])
def test_ignored_label_vectors_count_as_in_monais_dice(ignore_index):
    logits, labels = case((2, 6, 7), 3, vectors=True)
    labels[0, :, :2] = 0.0  # for 9, which is no channel, these voxels do not count
    options = {"softmax": True, "lambda_ce": 0.0, "ignore_index": ignore_index}
    options_of_dice = {"softmax": True, "ignore_index": ignore_index}
    torch.testing.assert_close(
        DiceCELoss(**options)(logits, labels), monai.DiceLoss(**options_of_dice)(logits, labels)
    )


def test_a_mask_counts_like_an_ignored_class():
    logits, labels = case((2, 6, 7), 3)
    mask = torch.rand(labels.shape) < 0.6
    ignored = torch.where(mask, labels, 255)
    masked = DiceCELoss(softmax=True)(logits, labels, mask)
    torch.testing.assert_close(masked, DiceCELoss(softmax=True, ignore_index=255)(logits, ignored))


def test_nnunets_loss_is_ours_minus_one():
    # nnU-Net: minus the mean batch Dice of the foreground, plus cross-entropy, both without ignored voxels.
    logits, labels = case((2, 6, 7), 3)
    labels[1, 0, 3:] = 255
    kept = labels != 255
    y = F.one_hot(torch.where(kept, labels, 0)[:, 0], 3).movedim(-1, 1) * kept
    p = logits.softmax(1)
    axes = (0, 2, 3)
    overlap, predicted, actual = (p * y).sum(axes), (p * kept).sum(axes), y.sum(axes)
    dice = ((2 * overlap + 1e-5) / (predicted + actual + 1e-5).clamp_min(1e-8))[1:]
    expected = -dice.mean() + F.cross_entropy(logits, labels[:, 0], ignore_index=255)
    torch.testing.assert_close(DiceCELoss.nnunet(ignore_index=255)(logits, labels) - 1, expected)


def test_all_voxels_ignored_is_zero_with_zero_gradient():
    logits, labels = case((2, 6, 7), 2)
    value, gradient = value_and_gradient(
        DiceCELoss.nnunet(ignore_index=255), logits, torch.full_like(labels, 255)
    )
    assert value == 0
    assert not gradient.any()


def test_compiles_as_a_module():
    criterion = DiceCELoss.nnunet()
    logits, labels = case((2, 6, 7), 2, dtype=torch.float32)
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(logits, labels), criterion(logits, labels))


# ---- ranks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_give_loss_and_gradient_of_one_process_with_the_whole_batch(tmp_path: Path, ranks):
    mp.start_processes(run_rank, args=(ranks, str(tmp_path)), nprocs=ranks, start_method="spawn")
    found = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(ranks)]
    for name, build in CRITERIA.items():
        network, images, labels = network_and_batch()
        loss = build(synchronise=False)(network(images), labels)
        loss.backward()
        for of_rank in found:
            value, gradients = of_rank[name]
            torch.testing.assert_close(value, loss.detach(), msg=lambda text, name=name: f"{name}: {text}")
            for gradient, parameter in zip(gradients, network.parameters(), strict=True):
                torch.testing.assert_close(
                    gradient, parameter.grad, msg=lambda text, name=name: f"{name}: {text}"
                )


def test_synchronising_without_a_process_group_is_refused():
    with pytest.raises(UsageError, match="init_process_group"):
        DiceCELoss(softmax=True, batch=True, synchronise=True)(*case((2, 6, 7), 3))


# ---- bad input --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sigmoid": True, "softmax": True}, "exclude each other"),
        ({"reduction": "none"}, "reduction must be one of 'mean', 'sum', got 'none'"),
        ({"lambda_ce": -1.0}, "lambda_ce must not be negative, got -1.0"),
        ({"label_smoothing": 1.5}, r"label_smoothing must lie in \[0, 1\], got 1.5"),
        ({"weight": [1.0, -2.0]}, r"weight must be numbers that are not negative.*\[1.0, -2.0\]"),
    ],
)
def test_options_that_do_not_fit_are_named(options, message):
    with pytest.raises(UsageError, match=message):
        DiceCELoss(**options)


@pytest.mark.parametrize(
    ("options", "classes", "vectors", "message"),
    [
        (
            {"softmax": True},
            1,
            False,
            "have one channel, which needs sigmoid=True.* got activation 'softmax'",
        ),
        ({}, 1, False, "have one channel, which needs sigmoid=True.* got activation 'none'"),
        (
            {"to_onehot_y": True, "softmax": True},
            3,
            True,
            r"to_onehot_y=True takes class indices.*\(2, 3, 6, 7\)",
        ),
        ({"softmax": True, "weight": [1.0, 2.0]}, 3, False, r"each of the 3 classes.*got shape \(2,\)"),
    ],
)
def test_tensors_that_do_not_fit_are_named(options, classes, vectors, message):
    with pytest.raises(UsageError, match=message):
        DiceCELoss(**options)(*case((2, 6, 7), classes, vectors=vectors))
