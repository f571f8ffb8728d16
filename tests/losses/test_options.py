"""The labels that every loss of the family takes and refuses: class indices as integers and as floating numbers."""

from __future__ import annotations

import pytest
import torch

from lungkit import losses
from lungkit.errors import UsageError

FAMILY = {
    "DiceCELoss": losses.DiceCELoss(softmax=True),
    "DiceFocalLoss": losses.DiceFocalLoss(softmax=True, to_onehot_y=True),
    "DiceLoss": losses.DiceLoss(softmax=True),
    "JaccardLoss": losses.JaccardLoss(softmax=True),
    "TverskyLoss": losses.TverskyLoss(softmax=True),
    "GeneralizedDiceLoss": losses.GeneralizedDiceLoss(softmax=True),
    "DeepSupervisionLoss": losses.DeepSupervisionLoss(losses.DiceCELoss(softmax=True)),
}
every_loss = pytest.mark.parametrize("criterion", FAMILY.values(), ids=FAMILY.keys())


def case(classes: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, classes, 6, 7, generator=generator)
    return logits, torch.randint(classes, (2, 1, 6, 7), generator=generator)


@every_loss
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_floating_class_indices_give_the_loss_of_integers(criterion, dtype):
    logits, labels = case()
    assert torch.equal(criterion(logits, labels.to(dtype)), criterion(logits, labels))


@every_loss
@pytest.mark.parametrize("factor", [0.9999999998, 1.0004, 0.9996])
def test_floating_class_indices_are_rounded_not_cut(criterion, factor):
    logits, labels = case()
    assert torch.equal(criterion(logits, labels.double() * factor), criterion(logits, labels))


@every_loss
@pytest.mark.parametrize(("value", "shown"), [(0.5, "0.5"), (1.002, "1.002"), (torch.nan, "nan")])
def test_a_floating_class_index_between_two_classes_is_named(criterion, value, shown):
    logits, labels = case()
    labels = labels.float()
    labels[1, 0, 3, 4] = value
    message = f"hold the value {shown} in image 1; classes are 0..2 .* class indices are whole numbers"
    with pytest.raises(UsageError, match=message):
        criterion(logits, labels)


@every_loss
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.float32])
def test_a_mask_of_0_and_255_is_refused_with_advice(criterion, dtype):
    logits, labels = case(2)
    message = r"the value 255 .* classes are 0..1 .* \(mask > 0\), or ignore_index=255"
    with pytest.raises(UsageError, match=message):
        criterion(logits, (255 * labels).to(dtype))


@every_loss
def test_a_class_that_logits_lack_is_named(criterion):
    logits, labels = case()
    labels[0, 0, 0, 0] = 3
    with pytest.raises(UsageError, match=r"the value 3 in image 0; classes are 0..2"):
        criterion(logits, labels)


def test_voxels_that_a_mask_leaves_out_may_hold_any_floating_label():
    logits, labels = case()
    mask = torch.arange(labels.numel()).view(labels.shape) % 5 != 0
    strange = torch.where(mask, labels.double(), 0.5)
    for criterion in list(FAMILY.values())[:-1]:
        assert torch.equal(criterion(logits, strange, mask), criterion(logits, labels, mask))


def test_floating_labels_may_be_ignored():
    logits, labels = case()
    labels[:, :, :2] = 255
    criterion = losses.DiceCELoss(softmax=True, ignore_index=255)
    assert torch.equal(criterion(logits, labels.float()), criterion(logits, labels))


def test_floating_labels_compile_without_graph_breaks():
    logits, labels = case()
    criterion = losses.DiceCELoss(softmax=True)
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(logits, labels.float()), criterion(logits, labels))
    with pytest.raises(RuntimeError, match=r"hold the value 0\.5"):
        compiled(logits, torch.full_like(labels, 0.5, dtype=torch.float32))


def test_floating_labels_of_one_channel_are_soft():
    logits, labels = case(1)
    half = torch.full_like(labels, 0.5, dtype=torch.float32)
    for criterion in (losses.DiceCELoss(sigmoid=True), losses.DiceFocalLoss(sigmoid=True)):
        assert criterion(logits, half).isfinite()
