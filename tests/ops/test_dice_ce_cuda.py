"""dice_ce's CUDA kernels: on the emulator in three thread orders, and on a GPU where there is one."""

from __future__ import annotations

import os

import pytest
import torch
from cuda_on_cpu.emulator import Emulator
from dice_ce_cases import (
    CASES,
    FORMS,
    INDEX_DTYPES,
    LOGIT_DTYPES,
    ONE_CHANNEL_FORMS,
    Form,
    assert_matches_twin,
    gradient_of,
    random_indices,
    random_logits,
    random_vectors,
    statistics_and_gradient,
)

from lungkit.ops.dice_ce import dice_ce_loss, reference

# Arguments of the op dice_ce_loss from ignore_index on: nnU-Net's loss, and every option at once.
NNUNET = (None, False, False, True, True, 1e-5, 1e-5, 1.0, 1.0, 0.0)
ALL_OPTIONS = (1, True, True, False, False, 1e-3, 1e-2, 0.7, 0.3, 0.2)
NAMES = (
    "ignore_index", "include_background", "jaccard", "batch", "mean", "smooth_nr", "smooth_dr", "lambda_dice",
    "lambda_ce", "label_smoothing",
)  # fmt: skip


def as_keywords(arguments: tuple) -> dict:
    keywords = dict(zip(NAMES, arguments, strict=True))
    return {"reduction": "mean" if keywords.pop("mean") else "sum", **keywords}


# Few classes in whole 16-byte packs take kernels of their own; 65 x 67 voxels do not.
@pytest.mark.parametrize("dtype", LOGIT_DTYPES)
@pytest.mark.parametrize("classes", [2, 3, 4, 5])
@pytest.mark.parametrize("shape", [(2, 8, 24), (1, 13, 11)])
def test_emulated_usual_form_equals_the_twin(emulated, shape, classes, dtype):
    labels = random_indices(shape, classes, torch.uint8)
    assert_matches_twin(emulated, random_logits(shape, classes, dtype), labels, Form())


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_emulated_every_form_equals_the_twin(emulated, form):
    logits = random_logits((2, 4, 8), 3, torch.float32)
    assert_matches_twin(emulated, logits, random_indices((2, 4, 8), 3, torch.int32), form)
    assert_matches_twin(emulated, logits, random_vectors((2, 4, 8), 3, torch.float16), form)


@pytest.mark.parametrize("form", ONE_CHANNEL_FORMS, ids=str)
def test_emulated_one_channel_equals_the_twin(emulated, form):
    logits = random_logits((2, 4, 8), 1, torch.bfloat16)
    assert_matches_twin(emulated, logits, random_indices((2, 4, 8), 1, torch.uint8), form)


@pytest.mark.parametrize("dtype", INDEX_DTYPES)
@pytest.mark.parametrize("shape", [(2, 4, 8), (2, 7, 9)])
def test_emulated_index_dtypes_masks_and_ignored_voxels(emulated, shape, dtype):
    labels = random_indices(shape, 2, dtype)
    mask = random_indices(shape, 4, torch.uint8, seed=5)
    logits = random_logits(shape, 2, torch.float16)
    assert_matches_twin(emulated, logits, labels, Form(), mask=mask, ignore_index=0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("form", [Form(), Form("sigmoid", "binary"), Form("none", "none")], ids=str)
def test_emulated_masked_voxel_may_have_any_label_and_logit(emulated, form, value):
    for voxels, classes in ((32, 2), (33, 2), (32, 3), (32, 6)):
        logits = random_logits((1, voxels), classes, torch.float32)
        labels = random_indices((1, voxels), classes, torch.int64)
        mask = torch.arange(voxels).view(1, voxels) != 7
        clean = statistics_and_gradient(emulated, logits, labels, mask, form)
        logits[0, 1, 7], labels[0, 7] = value, 99
        for actual, expected in zip(
            statistics_and_gradient(emulated, logits, labels, mask, form), clean, strict=True
        ):
            assert torch.equal(actual, expected)


@pytest.mark.parametrize("classes", [2, 3, 6])
@pytest.mark.parametrize("voxels", [32, 33])
def test_emulated_nan_logit_makes_loss_and_its_gradient_nan(emulated, voxels, classes):
    logits = random_logits((1, voxels), classes, torch.float32)
    logits[0, 1, 7] = torch.nan
    labels = random_indices((1, voxels), classes, torch.uint8)
    loss, slopes = emulated.dice_ce_loss(logits, labels, None, None, *Form(), *NNUNET)
    assert loss.isnan()
    assert emulated.dice_ce_backward(slopes, None, logits, labels, None, *Form(), None)[0, :, 7].isnan().all()


@pytest.mark.parametrize(("shape", "classes"), CASES)
def test_emulated_shapes_equal_the_twin(emulated, shape, classes):
    form = Form("sigmoid", "binary") if classes == 1 else Form()
    labels = random_indices(shape, classes, torch.int16)
    assert_matches_twin(emulated, random_logits(shape, classes, torch.float32), labels, form)


def test_emulated_several_chunks_equal_the_twin(emulated):
    labels = random_indices((1, 128, 144), 2, torch.uint8)
    assert_matches_twin(emulated, random_logits((1, 128, 144), 2, torch.bfloat16), labels, Form())


def test_emulated_layouts_equal_the_twin(emulated):
    labels = random_indices((2, 4, 6, 8), 3, torch.int64)
    logits = random_logits((2, 4, 6, 8), 3, torch.float32)
    last = logits.to(memory_format=torch.channels_last_3d)
    assert_matches_twin(emulated, last, labels, Form())
    slopes = torch.ones(6, 2, 3)
    assert (
        emulated.dice_ce_backward(slopes, None, last, labels, None, *Form(), None).stride() == last.stride()
    )
    assert_matches_twin(emulated, logits.transpose(2, 4).contiguous().transpose(2, 4), labels, Form())
    misaligned = torch.cat([torch.zeros(1), logits.flatten()])[1:].view_as(logits)
    assert_matches_twin(emulated, misaligned, labels, Form())


@pytest.mark.parametrize("arguments", [NNUNET, ALL_OPTIONS])
@pytest.mark.parametrize("classes", [2, 3, 6])
def test_emulated_loss_equals_the_twin(emulated, classes, arguments):
    logits, labels = (
        random_logits((3, 4, 8), classes, torch.float32),
        random_indices((3, 4, 8), classes, torch.uint8),
    )
    weight = torch.linspace(0.5, 2.0, classes)
    loss, slopes = emulated.dice_ce_loss(logits, labels, None, weight, *Form(), *arguments)
    options = as_keywords(arguments)
    torch.testing.assert_close(loss, reference(logits, labels, weight=weight, **options))
    gradient = emulated.dice_ce_backward(
        slopes, torch.tensor(2.0), logits, labels, None, *Form(), options["ignore_index"]
    )
    torch.testing.assert_close(gradient, 2 * gradient_of(reference, logits, labels, weight=weight, **options))


def test_emulated_class_index_out_of_range_makes_the_image_nan(emulated):
    logits, labels = random_logits((2, 4, 8), 2, torch.float32), random_indices((2, 4, 8), 2, torch.uint8)
    labels[1, 2, 3] = 2
    sums = emulated.dice_ce_statistics(logits, labels, None, *Form(), None)
    assert torch.isfinite(sums[:, 0]).all()
    assert torch.isnan(sums[:, 1]).all()
    loss, slopes = emulated.dice_ce_loss(logits, labels, None, None, *Form(), *NNUNET)
    assert torch.isnan(loss)
    gradient = emulated.dice_ce_backward(slopes, None, logits, labels, None, *Form(), None)
    assert torch.isnan(gradient[1]).any()


@pytest.mark.parametrize("shape", [(0, 4, 8), (2, 0, 8)])
def test_emulated_empty_input_gives_a_loss(emulated, shape):
    logits, labels = torch.empty(shape[0], 2, *shape[1:]), torch.empty(shape, dtype=torch.uint8)
    loss, slopes = emulated.dice_ce_loss(logits, labels, None, None, *Form(), *NNUNET)
    torch.testing.assert_close(loss, dice_ce_loss(logits, labels, **as_keywords(NNUNET)))
    assert emulated.dice_ce_backward(slopes, None, logits, labels, None, *Form(), None).shape == logits.shape


@pytest.mark.skipif(
    "LUNGKIT_TEST_SANITIZED" in os.environ,
    reason="the sanitizer keeps a byte for every eight, touched or not",
)
@pytest.mark.parametrize("shape", [(2, 8, 24), (2, 5, 7)])
def test_emulated_offsets_beyond_32_bits(emulated, shape):
    logits, labels = random_logits(shape, 2, torch.float16), random_indices(shape, 2, torch.uint8)
    far, far_labels = (
        torch.empty(2**31 + 1024, dtype=like.dtype)
        .as_strided(like.shape, (2**31 + 64, *like.stride()[1:]))
        .copy_(like)
        for like in (logits, labels)
    )
    loss, slopes = emulated.dice_ce_loss(far, far_labels, None, None, *Form(), *NNUNET)
    torch.testing.assert_close(loss, dice_ce_loss(logits, labels, **as_keywords(NNUNET)))
    gradient, near_gradient = (
        emulated.dice_ce_backward(slopes, None, *of, None, *Form(), None)
        for of in ((far, far_labels), (logits, labels))
    )
    assert torch.equal(gradient, near_gradient)


def test_emulated_two_launches_forward_and_one_backward(emulated, emulated_library):
    emulator = Emulator(emulated_library)
    for shape, classes in (((2, 4, 8), 2), ((2, 5, 7), 9)):
        logits, labels = (
            random_logits(shape, classes, torch.float32),
            random_indices(shape, classes, torch.uint8),
        )
        with emulator.counted() as forward:
            _, slopes = emulated.dice_ce_loss(logits, labels, None, None, *Form(), *NNUNET)
        with emulator.counted() as backward:
            emulated.dice_ce_backward(slopes, None, logits, labels, None, *Form(), None)
        assert (forward.launches, backward.launches) == (2, 1)


@pytest.mark.parametrize("shape", [(2, 40, 48), (2, 13, 11)])
def test_emulated_bits_do_not_depend_on_the_order_of_threads(emulated_library, shape):
    torch.ops.load_library(str(emulated_library))
    logits, labels = random_logits(shape, 2, torch.float32), random_indices(shape, 2, torch.uint8)
    ops = torch.ops.lungkit_emulated
    Emulator(emulated_library).in_every_order(
        lambda: ops.dice_ce_loss(logits, labels, None, None, *Form(), *NNUNET)
    )


def test_emulated_more_classes_than_shared_memory_holds_are_refused(emulated):
    with pytest.raises(RuntimeError, match="1300 classes are more than the CUDA kernel's limit of 1228"):
        emulated.dice_ce_statistics(torch.zeros(1, 1300, 4), torch.zeros(1, 4).long(), None, *Form(), None)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", LOGIT_DTYPES)
@pytest.mark.parametrize(("shape", "classes"), CASES)
def test_cuda_equals_the_twin(shape, classes, dtype):
    form = Form("sigmoid", "binary") if classes == 1 else Form()
    labels = random_indices(shape, classes, torch.uint8).cuda()
    assert_matches_twin(torch.ops.lungkit, random_logits(shape, classes, dtype).cuda(), labels, form)


@pytest.mark.cuda
def test_cuda_loss_and_gradient_are_captured_in_a_graph():
    logits = random_logits((2, 16, 16), 2, torch.float32).cuda().requires_grad_()
    labels = random_indices((2, 16, 16), 2, torch.uint8).cuda()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.autograd.grad(dice_ce_loss(logits, labels), logits)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = dice_ce_loss(logits, labels)
        (gradient,) = torch.autograd.grad(loss, logits)
    with torch.no_grad():
        logits.copy_(random_logits((2, 16, 16), 2, torch.float32, seed=9))
    graph.replay()
    torch.testing.assert_close(loss, reference(logits, labels))
    torch.testing.assert_close(gradient, gradient_of(reference, logits, labels))


@pytest.mark.cuda
def test_cuda_class_index_out_of_range_makes_the_loss_nan():
    labels = torch.full((1, 8, 8), 5, device="cuda")
    assert torch.isnan(dice_ce_loss(torch.zeros(1, 2, 8, 8, device="cuda"), labels))
