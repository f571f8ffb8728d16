"""confusion_counts: the kernels of every backend and the twin give the same integers."""

from __future__ import annotations

import pytest
import torch
from op_kernels import on_cuda_kernels, on_kernels, on_the_cpu

from lungkit.errors import UsageError
from lungkit.ops import confusion_counts
from lungkit.ops.confusion_counts import reference

LABEL_DTYPES = [torch.uint8, torch.int16, torch.int32, torch.int64]
LOGIT_DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
# (batch, *spatial, num_classes): one voxel, odd sizes, more than a tile, more than a chunk, many classes
CASES = [
    ((1, 1), 2),
    ((2, 5, 7), 3),
    ((3, 2, 3, 5), 4),
    ((1, 65, 67), 2),
    ((2, 41, 2000), 3),
    ((2, 33, 9), 300),
]
# more classes than a block's shared memory holds; in the last more voxels of a thread than a byte counts
EMULATED_CASES = [((1, 1), 2), ((2, 5, 7), 3), ((1, 65, 67), 2), ((2, 33, 9), 300), ((1, 9, 8), 3000)]
EMULATED_HARD_CASES = [*EMULATED_CASES, ((2, 8, 9), 4), ((1, 128, 1032), 4)]


def hard_case(shape, classes, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    top = min(classes, torch.iinfo(dtype).max + 1)
    pred = torch.randint(0, top, shape, generator=generator).to(dtype)
    labels = torch.randint(0, top, shape, generator=generator).to(dtype)
    return pred, labels


def assert_same(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize("dtype", LABEL_DTYPES)
@on_kernels("shape, classes", CASES, emulated=EMULATED_HARD_CASES)
def test_hard_labels_equal_the_twin(kernels, shape, classes, dtype):
    pred, labels = hard_case(shape, classes, dtype)
    for ignore_index in (None, 1):
        actual = confusion_counts(pred, labels, classes, ignore_index)
        assert_same(actual, reference(pred, labels, classes, ignore_index))


@pytest.mark.parametrize("dtype", LOGIT_DTYPES)
@on_kernels("shape, classes", CASES, emulated=EMULATED_CASES[:4])
def test_logits_equal_the_twin(kernels, shape, classes, dtype):
    _, labels = hard_case(shape, classes, torch.int64)
    logits = torch.randn(shape[0], classes, *shape[1:]).to(dtype)
    assert_same(confusion_counts(logits, labels, classes), reference(logits, labels, classes))


def test_channels_last_logits_equal_the_twin(kernels):
    logits = torch.randn(2, 3, 9, 11).to(memory_format=torch.channels_last)
    labels = torch.randint(0, 3, (2, 9, 11))
    assert_same(confusion_counts(logits, labels, 3), reference(logits, labels, 3))


def test_transposed_inputs_equal_the_twin(kernels):
    logits = torch.randn(2, 3, 9, 11).transpose(2, 3)
    labels = torch.randint(0, 3, (2, 9, 11)).transpose(1, 2)
    assert_same(confusion_counts(logits, labels, 3), reference(logits, labels, 3))


def test_one_logit_channel_is_a_sigmoid_model(kernels):
    logits = torch.tensor([[[-1.0, 0.0, 0.5, 2.0]]])
    counts, _ = confusion_counts(logits, torch.tensor([[1, 0, 1, 0]]), 2)
    assert counts[0, 1].tolist() == [1, 1, 1]


def test_ties_take_the_lowest_class_and_nan_the_highest_rank(kernels):
    logits = torch.tensor([[[1.0, float("nan")], [1.0, 5.0]]])
    counts, _ = confusion_counts(logits, torch.zeros(1, 2, dtype=torch.long), 2)
    assert counts[0, 0].tolist() == [2, 0, 0]


@pytest.mark.parametrize("ignore_index", [0, 255, -1])
def test_ignored_voxels_are_not_counted(kernels, ignore_index):
    pred, labels = hard_case((2, 31, 17), 3, torch.int16)
    labels[0, :4] = ignore_index
    actual = confusion_counts(pred, labels, 3, ignore_index)
    assert_same(actual, reference(pred, labels, 3, ignore_index))
    assert actual[1][0] == (labels[0] != ignore_index).sum()


@pytest.mark.parametrize("classes", [2, 3, 4, 7])
@pytest.mark.parametrize("ignore_index", [0, 1, 2, 3, 255])
def test_ignored_bytes_are_not_counted(kernels, ignore_index, classes):
    pred, labels = hard_case((2, 8, 13), classes, torch.uint8)
    labels[1, 2:4] = ignore_index
    actual = confusion_counts(pred, labels, classes, ignore_index)
    assert_same(actual, reference(pred, labels, classes, ignore_index))


def test_more_groups_of_a_thread_than_a_byte_counts_equal_the_twin(emulator):
    pred, labels = hard_case((1, 130, 4200), 4, torch.uint8)
    actual = torch.ops.lungkit_emulated.confusion_counts(pred, labels, 4, None)
    assert_same(actual, reference(pred, labels, 4))


def test_runs_of_labels_equal_the_twin(kernels):
    pred, labels = torch.zeros(2, 1, 40, 60, dtype=torch.uint8)
    labels[:, 3:20, 11:33], pred[:, 5:22, 9:30], labels[:, 30:, 50:] = 4, 4, 5
    assert_same(confusion_counts(pred, labels, 6), reference(pred, labels, 6))


def test_a_prediction_may_be_anything_where_the_label_is_ignored(kernels):
    counts, voxels = confusion_counts(torch.tensor([[9, 1]]), torch.tensor([[255, 1]]), 2, 255)
    assert counts[0, 1].tolist() == [1, 0, 0]
    assert voxels.tolist() == [1]


def test_counts_add_up_to_the_voxels(kernels):
    pred, labels = hard_case((2, 40, 50), 5, torch.uint8)
    counts, voxels = confusion_counts(pred, labels, 5)
    assert torch.equal(counts[..., 0].sum(1) + counts[..., 2].sum(1), voxels)  # each voxel is a TP or an FN


@pytest.mark.parametrize("shape", [(0, 4, 4), (2, 0, 4)])
def test_empty_input_counts_nothing(kernels, shape):
    empty = torch.empty(shape, dtype=torch.uint8)
    counts, voxels = confusion_counts(empty, empty, 2)
    assert counts.shape == (shape[0], 2, 3)
    assert counts.sum() == 0
    assert voxels.sum() == 0


@on_the_cpu
@pytest.mark.parametrize(("which", "value"), [("labels", 3), ("labels", -2), ("pred", 7)])
def test_a_class_index_out_of_range_is_named(kernels, which, value):
    arrays = {"pred": torch.zeros(2, 5, dtype=torch.int64), "labels": torch.zeros(2, 5, dtype=torch.int64)}
    arrays[which][1, 2] = value
    with pytest.raises(RuntimeError, match=rf"{which} holds the value {value} in image 1; classes are 0..1"):
        confusion_counts(arrays["pred"], arrays["labels"], 2)


@on_cuda_kernels
def test_cuda_leaves_out_a_class_index_out_of_range(kernels):
    counts, voxels = confusion_counts(torch.tensor([[0, 1, 9]]), torch.tensor([[0, -7, 1]]), 2)
    assert counts[0].tolist() == [[1, 0, 0], [0, 0, 0]]
    assert voxels.tolist() == [1]


@on_cuda_kernels
@pytest.mark.parametrize("classes", [2, 3, 4, 5])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_cuda_leaves_out_any_of_many_class_indices_out_of_range(kernels, dtype, classes):
    pred, labels = hard_case((1, 48), classes, dtype)
    where = torch.arange(48) % 5 != 0
    expected = reference(pred[:, where], labels[:, where], classes)
    pred[:, ::10], labels[:, 5::10] = 77, 200
    assert_same(confusion_counts(pred, labels, classes), expected)


def test_twin_names_a_class_index_out_of_range_alike():
    with pytest.raises(RuntimeError, match=r"labels holds the value 3 in image 0; classes are 0..1"):
        reference(torch.zeros(1, 2), torch.tensor([[0, 3]]), 2)


@pytest.mark.parametrize(
    ("pred", "labels", "classes", "message"),
    [
        (torch.zeros(1, 3, 4), torch.zeros(1, 4).long(), 2, "have 3 channels for num_classes=2"),
        (
            torch.zeros(1, 2, 4),
            torch.zeros(1, 5).long(),
            2,
            r"pred \(1, 2, 4\) and labels \(1, 5\) do not agree",
        ),
        (torch.zeros(1, 2, 4), torch.zeros(2, 4).long(), 2, "do not agree"),
        (torch.zeros(1, 2, 4), torch.zeros(1, 4), 2, "labels must be uint8"),
        (torch.zeros(1, 4).long(), torch.zeros(1, 4).long(), 1, "num_classes must be between 2"),
        (torch.zeros(1, 2), torch.zeros(1, 2).long(), 2, "at least one spatial axis"),
        (torch.zeros(1, 4, dtype=torch.complex64), torch.zeros(1, 4).long(), 2, "pred must be"),
    ],
)
def test_arguments_that_do_not_fit_are_named(pred, labels, classes, message):
    with pytest.raises(UsageError, match=message):
        confusion_counts(pred, labels, classes)


def test_the_op_itself_refuses_shapes_that_do_not_fit():
    with pytest.raises(RuntimeError, match="do not agree"):
        torch.ops.lungkit.confusion_counts(torch.zeros(1, 2, 4), torch.zeros(1, 5).long(), 2)


def test_same_counts_in_every_schedule(schedules):
    pred, labels = hard_case(
        (2, 30, 70) if schedules.backend == "emulated" else (2, 300, 700), 3, torch.uint8
    )
    schedules.assert_same_bits(lambda: confusion_counts(pred, labels, 3))


@pytest.mark.parametrize("logits", [False, True])
def test_opcheck(logits):
    pred, labels = hard_case((2, 5, 7), 3, torch.int64)
    pred = torch.randn(2, 3, 5, 7) if logits else pred
    torch.library.opcheck(torch.ops.lungkit.confusion_counts.default, (pred, labels, 3, None))


def test_compiles_without_graph_breaks_for_dynamic_shapes():
    def score(logits, labels):
        counts, _ = confusion_counts(logits * 2, labels, 3)
        return counts.sum(0)

    compiled = torch.compile(score, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in (5, 9):
        logits, labels = torch.randn(2, 3, size, 7), torch.randint(0, 3, (2, size, 7))
        assert torch.equal(compiled(logits, labels), score(logits, labels))
