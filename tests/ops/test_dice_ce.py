"""dice_ce: the kernels of every backend against the twin in fp64, gradients, bad input."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from dice_ce_cases import (
    ALL_OPTIONS,
    CASES,
    FORMS,
    GRADIENT_TOLERANCE,
    INDEX_DTYPES,
    LOGIT_DTYPES,
    NNUNET,
    ONE_CHANNEL_FORMS,
    PACKED_CASES,
    Form,
    assert_loss_matches_twin,
    assert_matches_twin,
    gradient_of,
    random_indices,
    random_logits,
    random_vectors,
    statistics_and_gradient,
)
from op_kernels import on_cuda_kernels, on_kernels, on_the_cpu, on_the_emulator

from lungkit.errors import UsageError
from lungkit.ops.dice_ce import (
    DiceCEOptions,
    Statistics,
    dice_ce_loss,
    dice_ce_statistics,
    reference,
    reference_statistics,
)

OPS = torch.ops.lungkit


# ---- the kernels against the twin -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", LOGIT_DTYPES)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_every_form_equals_the_twin(kernels, form, dtype):
    for classes in (2, 3):
        for shape, index, vector in (
            ((2, 9, 11), torch.uint8, torch.float32),
            ((2, 4, 8), torch.int32, torch.float16),
        ):
            logits = random_logits(shape, classes, dtype)
            assert_matches_twin(logits, random_indices(shape, classes, index), form)
            assert_matches_twin(logits, random_vectors(shape, classes, vector), form)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 9, 11), (2, 4, 8)])
@pytest.mark.parametrize("form", ONE_CHANNEL_FORMS, ids=str)
def test_one_channel_equals_the_twin(kernels, form, shape, dtype):
    logits = random_logits(shape, 1, dtype)
    assert_matches_twin(logits, random_indices(shape, 1, torch.uint8), form)
    assert_matches_twin(logits, random_vectors(shape, 1, torch.float32), form)


@on_kernels(
    "case, dtype",
    product([*CASES, *PACKED_CASES], LOGIT_DTYPES),
    emulated=[
        *product(CASES, [torch.float32]),
        *product(PACKED_CASES, LOGIT_DTYPES),
        (((1, 128, 144), 2), torch.bfloat16),  # several chunks
    ],
)
def test_every_shape_equals_the_twin(kernels, case, dtype):
    shape, classes = case
    form = Form("sigmoid", "binary") if classes == 1 else Form()
    indices = torch.int16 if classes > 256 else torch.uint8
    for index in (indices, torch.int64):
        assert_matches_twin(random_logits(shape, classes, dtype), random_indices(shape, classes, index), form)


@pytest.mark.parametrize("dtype", [*INDEX_DTYPES, torch.bool])
@pytest.mark.parametrize("classes", [2, 4])
def test_every_index_dtype_equals_the_twin(kernels, classes, dtype):
    labels = random_indices((2, 1, 9, 11), 2 if dtype == torch.bool else classes, dtype)
    assert_matches_twin(random_logits((2, 9, 11), classes, torch.float32), labels, Form())


@pytest.mark.parametrize("dtype", [*LOGIT_DTYPES, torch.uint8, torch.int16, torch.int64])
def test_every_vector_dtype_equals_the_twin(kernels, dtype):
    labels = random_vectors((2, 9, 11), 3, torch.float32)
    labels = labels.to(dtype) if dtype.is_floating_point else (3 * labels).to(dtype)
    assert_matches_twin(random_logits((2, 9, 11), 3, torch.float32), labels, Form(squared=True))


@pytest.mark.parametrize("dtype", LOGIT_DTYPES)
@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_floating_class_indices_equal_the_twin(kernels, classes, dtype, masked):
    labels = random_indices((2, 1, 9, 11), classes, dtype)
    if dtype in (torch.float64, torch.float32):
        labels = labels + 9e-4 * (torch.rand(labels.shape) - 0.5)
    mask = None
    if masked:
        mask = torch.rand(labels.shape) < 0.7
        labels = torch.where(mask, labels, torch.nan)
    logits = random_logits((2, 9, 11), classes, torch.float32)
    assert_matches_twin(logits, labels, Form(), mask=mask)
    assert_matches_twin(
        logits, labels.movedim(3, 2).contiguous().movedim(2, 3), Form(), mask=mask, ignore_index=1
    )


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("ignore_index", [0, 1, 255])
def test_ignored_voxels_count_nowhere(kernels, classes, ignore_index):
    labels = random_indices((2, 9, 11), classes, torch.uint8)
    labels[0, ::3] = ignore_index
    logits = random_logits((2, 9, 11), classes, torch.float32)
    assert_matches_twin(logits, labels, Form(), ignore_index=ignore_index)


@pytest.mark.parametrize("vectors", [False, True])
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8])
def test_masked_voxels_count_nowhere(kernels, dtype, vectors):
    labels = (
        random_vectors((2, 9, 11), 2, torch.float32)
        if vectors
        else random_indices((2, 9, 11), 2, torch.int32)
    )
    mask = (random_indices((2, 1, 9, 11), 5, torch.uint8) > 1).to(dtype)
    for form in (Form(), Form(minimum=True)):
        assert_matches_twin(random_logits((2, 9, 11), 2, torch.float32), labels, form, mask=mask)


@pytest.mark.parametrize("classes", [2, 5])
def test_the_minimum_is_the_product_for_hard_labels(kernels, classes):
    logits, labels = (
        random_logits((2, 9, 11), classes, torch.float32),
        random_indices((2, 9, 11), classes, torch.int64),
    )
    vectors = torch.nn.functional.one_hot(labels, classes).movedim(-1, 1)
    for target, exactly in ((labels, True), (vectors, False), (vectors.half(), False)):
        for compute in (dice_ce_loss, lambda *a, **options: gradient_of(dice_ce_loss, *a, **options)):
            product_of, minimum_of = (
                compute(logits, target, minimum=minimum, **NNUNET) for minimum in (False, True)
            )
            torch.testing.assert_close(minimum_of, product_of, **({"rtol": 0, "atol": 0} if exactly else {}))


def test_the_minimum_beside_soft_labels_is_largest_at_the_shares(kernels):
    shares = torch.tensor([0.75, 0.25]).reshape(1, 2, 1, 1).expand(1, 2, 8, 8)
    at_shares, elsewhere = (
        dice_ce_loss(
            torch.tensor([1 - p, p]).log().reshape(1, 2, 1, 1).expand(1, 2, 8, 8),
            shares,
            minimum=True,
            lambda_ce=0.0,
        )
        for p in (0.25, 0.05)
    )
    assert abs(at_shares) < 1e-5 < 0.1 < elsewhere


@pytest.mark.parametrize("dtype", INDEX_DTYPES)
@pytest.mark.parametrize("shape", [(2, 4, 8), (2, 7, 9)])
def test_voxels_may_be_masked_and_ignored(kernels, shape, dtype):
    for classes, order in ((2, torch.contiguous_format), (3, torch.channels_last)):
        labels, mask = random_indices(shape, classes, dtype), random_indices(shape, 4, torch.uint8, seed=5)
        logits = random_logits(shape, classes, torch.float16).contiguous(memory_format=order)
        assert_matches_twin(logits, labels, Form(), mask=mask, ignore_index=0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", LOGIT_DTYPES)
@pytest.mark.parametrize("form", [Form(), Form("sigmoid", "binary"), Form("none", "none")], ids=str)
def test_a_masked_voxel_may_have_any_label_and_logit(kernels, form, dtype, value):
    for voxels, classes in ((20, 2), (20, 3), (32, 2), (33, 2), (32, 3), (32, 6)):
        logits = random_logits((1, voxels), classes, dtype)
        labels = random_indices((1, voxels), classes, torch.int64)
        mask = torch.arange(voxels).view(1, voxels) != 7
        clean = statistics_and_gradient(logits, labels, mask, form)
        logits[0, 1, 7], labels[0, 7] = value, 99
        for actual, expected in zip(statistics_and_gradient(logits, labels, mask, form), clean, strict=True):
            assert torch.equal(actual, expected)


@pytest.mark.parametrize("classes", [2, 3, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_channels_last_is_read_and_written_in_place(kernels, classes, dtype):
    for shape in ((2, 6, 9, 11), (2, 4, 6, 8)):
        logits = random_logits(shape, classes, dtype).to(memory_format=torch.channels_last_3d)
        labels = random_indices(shape, classes, torch.uint8)
        assert_matches_twin(logits, labels, Form())
        assert gradient_of(dice_ce_loss, logits, labels).stride() == logits.stride()


def test_any_strides_equal_the_twin(kernels):
    labels = random_indices((2, 9, 11), 2, torch.int64)
    expanded = torch.tensor([0.5, -1.0]).view(1, 2, 1, 1).expand(2, 2, 9, 11)
    assert_matches_twin(expanded, labels, Form())
    transposed = random_logits((2, 11, 9), 2, torch.float32).transpose(2, 3)
    assert_matches_twin(transposed, labels, Form())
    every_other = random_logits((2, 9, 22), 2, torch.float16)[..., ::2]
    assert_matches_twin(every_other, labels.transpose(1, 2).contiguous().transpose(1, 2), Form())
    of_a_larger_batch = random_logits((4, 9, 11), 4, torch.float32)[1:3, 1:3]
    assert_matches_twin(of_a_larger_batch, labels, Form())
    solid = random_logits((2, 8, 6, 4), 3, torch.float32).transpose(2, 4)
    assert_matches_twin(solid, random_indices((2, 4, 6, 8), 3, torch.int64), Form())


@pytest.mark.parametrize("shape", [(1, 9, 11), (2, 4, 8)])
def test_misaligned_memory_equals_the_twin(kernels, shape):
    logits = random_logits(shape, 2, torch.float32)
    misaligned = torch.cat([torch.zeros(1), logits.flatten()])[1:].view_as(logits)
    assert_matches_twin(misaligned, random_indices(shape, 2, torch.uint8), Form())


@pytest.mark.parametrize("shape", [(0, 4, 4), (2, 0, 4)])
def test_nothing_gives_sums_of_zero(kernels, shape):
    logits, labels = torch.empty(shape[0], 3, *shape[1:]), torch.empty(shape, dtype=torch.uint8)
    sums = dice_ce_statistics(logits, labels)
    assert sums.shape == (6, shape[0], 3)
    assert sums.sum() == 0
    assert gradient_of(dice_ce_loss, logits, labels).shape == logits.shape


@pytest.mark.parametrize("options", [{}, NNUNET], ids=str)
@pytest.mark.parametrize("shape", [(0, 4, 4), (2, 0, 4)])
def test_nothing_has_the_twins_loss(kernels, shape, options):
    logits, labels = torch.empty(shape[0], 2, *shape[1:]), torch.empty(shape, dtype=torch.uint8)
    torch.testing.assert_close(dice_ce_loss(logits, labels, **options), reference(logits, labels, **options))


def test_an_empty_batch_has_the_loss_zero(kernels):
    assert dice_ce_loss(torch.empty(0, 2, 4, 4), torch.empty(0, 4, 4, dtype=torch.uint8)) == 0


# ---- the finished loss ------------------------------------------------------------------------------------------

LOSS_OPTIONS = [
    {},
    {"include_background": False},
    {"include_background": False, "batch": True},
    {"jaccard": True, "reduction": "sum"},
    {"squared_pred": True, "weight": [0.2, 1.0, 3.0]},
    {"weight": [0.2, 1.0, 3.0], "label_smoothing": 0.2, "reduction": "sum"},
    {"label_smoothing": 0.3, "batch": True, "jaccard": True},
    {"lambda_dice": 0.0},
    {"lambda_ce": 0.0, "smooth_nr": 0.0, "smooth_dr": 0.5},
    {"activation": "sigmoid", "weight": [0.0, 1.0, 0.0], "include_background": False},
    {"activation": "none", "ignore_index": 2},
]


@pytest.mark.parametrize("vectors", [False, True])
@pytest.mark.parametrize("options", LOSS_OPTIONS, ids=str)
def test_loss_and_gradient_equal_the_twin(kernels, options, vectors):
    labels = (
        random_vectors((2, 9, 11), 3, torch.float64)
        if vectors
        else random_indices((2, 9, 11), 3, torch.uint8)
    )
    assert_loss_matches_twin(random_logits((2, 9, 11), 3, torch.float64), labels, **options)


@pytest.mark.parametrize("options", [NNUNET, ALL_OPTIONS], ids=["nnunet", "all options"])
@pytest.mark.parametrize("classes", [2, 3, 6])
def test_loss_of_float_logits_equals_the_twin(kernels, classes, options):
    logits = random_logits((3, 4, 8), classes, torch.float32)
    weight = torch.linspace(0.5, 2.0, classes)
    labels = random_indices((3, 4, 8), classes, torch.uint8)
    assert_loss_matches_twin(logits, labels, weight=weight, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", [(2, 8, 24), (2, 13, 11), (1, 112, 144)])
def test_the_usual_loss_is_right_to_1e_6(kernels, shape, channels_last, dtype):
    for classes in (2, 3, 4):
        logits = random_logits(shape, classes, dtype)
        if channels_last:
            logits = logits.contiguous(memory_format=torch.channels_last)
        labels = random_indices(shape, classes, torch.uint8)
        exact = reference(logits.double(), labels)
        assert abs(dice_ce_loss(logits, labels).double() / exact - 1) < 1e-6
        gradient, expected = (
            gradient_of(dice_ce_loss, logits, labels),
            gradient_of(reference, logits.double(), labels),
        )
        assert (gradient - expected).abs().max() < GRADIENT_TOLERANCE[dtype] * expected.abs().max()


@pytest.mark.parametrize(
    "options", [{}, {"weight": [2.5]}, {"batch": True, "include_background": False}], ids=str
)
def test_one_channel_takes_binary_cross_entropy(kernels, options):
    logits, labels = random_logits((2, 9, 11), 1, torch.float64), random_indices((2, 9, 11), 1, torch.uint8)
    assert_loss_matches_twin(logits, labels, activation="sigmoid", **options)


def test_gradcheck(kernels):
    logits = random_logits((2, 3, 4), 3, torch.float64).requires_grad_()
    labels = random_indices((2, 3, 4), 3, torch.uint8)
    assert torch.autograd.gradcheck(lambda z: dice_ce_loss(z, labels, weight=[0.5, 1.0, 2.0]), (logits,))
    assert torch.autograd.gradcheck(lambda z: dice_ce_statistics(z, labels, squared=True), (logits,))


def test_only_needed_rows_take_part_in_the_gradient_of_statistics(kernels):
    logits, labels = (
        random_logits((1, 9), 2, torch.float64).requires_grad_(),
        torch.zeros(1, 9, dtype=torch.uint8),
    )
    sums = Statistics(*dice_ce_statistics(logits, labels))
    (gradient,) = torch.autograd.grad(sums.label.sum() + sums.voxels.sum(), logits)
    assert (gradient == 0).all()


def test_the_loss_scales_its_gradient(kernels):
    logits, labels = random_logits((1, 5, 7), 2, torch.float64), random_indices((1, 5, 7), 2, torch.uint8)
    once = gradient_of(dice_ce_loss, logits, labels)
    torch.testing.assert_close(gradient_of(lambda z: -3 * dice_ce_loss(z, labels), logits), -3 * once)


# ---- bad input --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64])
@pytest.mark.parametrize("function", [dice_ce_loss, reference])
def test_a_class_index_out_of_range_is_named(function, dtype):
    labels = random_indices((2, 9, 11), 2, dtype)
    labels[1, 4, 4] = 7
    with pytest.raises(
        RuntimeError, match=r"hold the value 7 in image 1; classes are 0..1 and no ignore_index"
    ):
        function(random_logits((2, 9, 11), 2, torch.float32), labels)


@on_the_cpu
def test_an_index_that_wraps_around_is_out_of_range(kernels):
    labels = torch.zeros(1, 9, dtype=torch.int64)
    labels[0, 3] = 2**32 + 1
    with pytest.raises(RuntimeError, match=f"the value {2**32 + 1}"):
        dice_ce_statistics(random_logits((1, 9), 2, torch.float32), labels)


LOGITS = torch.zeros(2, 3, 4, 5)
INDICES = torch.zeros(2, 4, 5, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("logits", "labels", "options", "message"),
    [
        (
            LOGITS,
            torch.zeros(2, 5, 4).long(),
            {},
            r"labels of shape \(2, 5, 4\) do not fit .* expected \(2, 4, 5\)",
        ),
        (LOGITS, torch.zeros(2, 2, 4, 5), {}, r"labels of shape \(2, 2, 4, 5\) do not fit"),
        (LOGITS, INDICES.to(torch.int8), {}, "labels must be one of uint8.* got torch.int8"),
        (LOGITS.long(), INDICES, {}, "logits must be float64.* got torch.int64"),
        (torch.zeros(2, 3), torch.zeros(2).long(), {}, r"one to three spatial axes, got shape \(2, 3\)"),
        (LOGITS[:, :1], INDICES, {}, r"softmax over one channel is 1 everywhere.* \(2, 1, 4, 5\)"),
        (LOGITS, INDICES, {"weight": [1.0, 2.0]}, r"one number for each of the 3 classes.*got shape \(2,\)"),
        (LOGITS, INDICES, {"mask": torch.zeros(2, 3, 4, 5).bool()}, "mask of shape .* do not fit"),
        (LOGITS, INDICES, {"mask": torch.zeros(2, 4, 5)}, "mask must be bool or uint8, got torch.float32"),
        (LOGITS, LOGITS, {"minimum": True, "squared_pred": True}, "minimum and squared exclude each other"),
        (LOGITS, INDICES, {"activation": "relu"}, "activation must be one of .* got 'relu'"),
        (LOGITS, INDICES, {"reduction": "none"}, "reduction must be 'mean' or 'sum', got 'none'"),
        (LOGITS, torch.zeros_like(LOGITS).requires_grad_(), {}, "labels must not require a gradient"),
        (LOGITS, INDICES.to("meta"), {}, "must be on the same device, got cpu and meta"),
    ],
)
def test_arguments_that_do_not_fit_are_named(logits, labels, options, message):
    for function in (dice_ce_loss, reference):
        with pytest.raises(UsageError, match=message):
            function(logits, labels, **options)


def test_the_op_itself_refuses_shapes_that_do_not_fit():
    with pytest.raises(RuntimeError, match=r"labels .* do not fit logits"):
        OPS.dice_ce_statistics(LOGITS, torch.zeros(2, 5, 4).long(), None, *DiceCEOptions().of_statistics())


# ---- CUDA alone -------------------------------------------------------------------------------------------------


@on_cuda_kernels
@pytest.mark.parametrize("value", [2, 2**32 + 1])
def test_a_class_index_out_of_range_makes_the_image_nan(kernels, value):
    logits, labels = random_logits((2, 4, 8), 2, torch.float32), random_indices((2, 4, 8), 2, torch.int64)
    labels[1, 2, 3] = value
    sums = dice_ce_statistics(logits, labels)
    assert torch.isfinite(sums[:, 0]).all()
    assert torch.isnan(sums[:, 1]).all()
    assert torch.isnan(dice_ce_loss(logits, labels, **NNUNET))
    assert torch.isnan(gradient_of(dice_ce_loss, logits, labels, **NNUNET)[1]).any()


@on_cuda_kernels
@pytest.mark.parametrize("value", [0.5, 1.002, torch.nan, torch.inf, -1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_floating_label_that_is_no_class_makes_the_image_nan(kernels, dtype, value):
    logits, labels = random_logits((2, 4, 8), 2, torch.float32), random_indices((2, 4, 8), 2, dtype)
    labels[1, 2, 3] = value
    sums = dice_ce_statistics(logits, labels)
    assert torch.isfinite(sums[:, 0]).all()
    assert torch.isnan(sums[:, 1]).all()


# So many classes fill the shared memory of 4, 2 and 1 warps.
@on_the_emulator
@pytest.mark.parametrize("classes", [307, 614, 1228])
def test_classes_that_fill_the_shared_memory_equal_the_twin(kernels, classes):
    logits = random_logits((1, 5), classes, torch.float32)
    labels = random_indices((1, 5), classes, torch.int16)
    expected = reference_statistics(logits.double(), labels)
    torch.testing.assert_close(dice_ce_statistics(logits, labels).double(), expected, rtol=1e-6, atol=1e-6)


@on_cuda_kernels
def test_more_classes_than_shared_memory_holds_are_refused(kernels):
    with pytest.raises(RuntimeError, match="1300 classes are more than the CUDA kernel's limit of 1228"):
        dice_ce_statistics(torch.zeros(1, 1300, 4), torch.zeros(1, 4).long())


@on_the_emulator
@pytest.mark.parametrize(("shape", "classes"), [((2, 4, 8), 2), ((2, 5, 7), 9)])
def test_two_launches_forward_and_one_backward(kernels, emulator, shape, classes):
    logits = random_logits(shape, classes, torch.float32).requires_grad_()
    labels = random_indices(shape, classes, torch.uint8)
    with emulator.counted() as forward:
        loss = dice_ce_loss(logits, labels, **NNUNET)
    with emulator.counted() as backward:
        loss.backward()
    assert (forward.launches, backward.launches) == (2, 1)


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


# ---- devices ----------------------------------------------------------------------------------------------------

# The dispatcher chooses by all tensors; asked for the CPU's kernels alone, it hands them a tensor of another device.
ON_THE_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
TENSORS = {
    "dice_ce_statistics": ("logits", "labels", "mask"),
    "dice_ce_loss": ("logits", "labels", "mask", "weight"),
    "dice_ce_backward": ("slopes", "scale", "logits", "labels", "mask"),
}


@pytest.mark.parametrize("library", ["lungkit", "lungkit_emulated"])
@pytest.mark.parametrize(
    ("op", "name"),
    [(op, name) for op, names in TENSORS.items() for name in names if name != "logits"],
)
def test_a_tensor_on_another_device_than_the_logits_is_named(emulator, library, op, name):
    tensors = {
        "logits": torch.zeros(1, 2, 8),
        "labels": torch.zeros(1, 8, dtype=torch.uint8),
        "mask": torch.ones(1, 8, dtype=torch.bool),
        "weight": torch.ones(2),
        "slopes": torch.ones(6, 1, 2),
        "scale": torch.ones(()),
    }
    tensors[name] = tensors[name].to("meta")
    options = DiceCEOptions()
    scalars = options.of_loss() if op == "dice_ce_loss" else options.of_statistics()
    call = getattr(getattr(torch.ops, library), op).default
    with pytest.raises(RuntimeError, match=f"dice_ce: {name} must be on the device of the logits"):
        call.redispatch(ON_THE_CPU, *(tensors[each] for each in TENSORS[op]), *scalars)
