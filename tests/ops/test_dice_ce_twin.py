"""The plain-PyTorch twin of the native ops: a few voxels at a time it gives what PyTorch gives for all of them."""

from __future__ import annotations

import pytest
import torch

from lungkit.errors import LabelError
from lungkit.ops import _dice_ce_twin as twin
from lungkit.ops.dice_ce_arithmetic import DiceCEOptions

FORMS = {
    "softmax": DiceCEOptions(),
    "squared": DiceCEOptions(squared=True),
    "focal": DiceCEOptions(gamma=2.0),
    "ignored": DiceCEOptions(ignore_index=2),
    "sigmoid and binary": DiceCEOptions("sigmoid", "binary"),
    "sigmoid and binary, focal": DiceCEOptions("sigmoid", "binary", gamma=1.5),
    "no activation": DiceCEOptions("none", "none", squared=True),
    "minimum": DiceCEOptions(minimum=True),
    "minimum, focal": DiceCEOptions("sigmoid", "binary", gamma=1.5, minimum=True),
    "softmax of the Dice alone": DiceCEOptions("softmax", "none"),
    "softmax of the cross-entropy alone": DiceCEOptions("none", "softmax"),
}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(twin, "_CHUNK", 2 * 3 * 7)  # 7 of the 60 voxels


def inputs(*, soft: bool, channels_last: bool):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 6, 10, generator=generator, dtype=torch.float64)
    if channels_last:
        logits = logits.contiguous(memory_format=torch.channels_last)
    if soft:
        labels = torch.rand(2, 3, 6, 10, generator=generator, dtype=torch.float64)
    else:
        labels = torch.randint(0, 3, (2, 1, 6, 10), generator=generator).to(torch.uint8)
    return logits, labels, torch.rand(2, 1, 6, 10, generator=generator) < 0.8


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("soft", "channels_last"), [(False, False), (False, True), (True, False)])
def test_sums_and_gradient_are_those_of_all_voxels_at_once(form, masked, soft, channels_last):
    options = FORMS[form]
    if soft and options.ignore_index is not None:
        return  # turned into a mask before the op
    logits, labels, mask = inputs(soft=soft, channels_last=channels_last)
    mask = mask if masked else None
    logits.requires_grad_()
    whole = twin.statistics_twin(logits, labels, mask, options)
    slopes = torch.randn(whole.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    scale = torch.tensor(0.7, dtype=torch.float64)
    (expected,) = torch.autograd.grad((whole * slopes * scale).sum(), logits)
    logits = logits.detach()
    torch.testing.assert_close(twin.statistics_in_chunks(logits, labels, mask, options), whole.detach())
    found = twin.backward_twin(slopes, scale, logits, labels, mask, options)
    torch.testing.assert_close(found, expected)
    assert found.stride() == logits.stride()


def test_what_stands_in_left_out_voxels_does_not_matter():
    logits, labels, mask = inputs(soft=False, channels_last=False)
    hurt = torch.where(mask, logits, torch.nan)
    slopes = torch.ones(6, 2, 3, dtype=torch.float64)
    for options in FORMS.values():
        sums = twin.statistics_in_chunks(logits, labels, mask, options)
        assert torch.equal(twin.statistics_in_chunks(hurt, labels, mask, options), sums)
        gradient = twin.backward_twin(slopes, None, hurt, labels, mask, options)
        assert torch.equal(gradient, twin.backward_twin(slopes, None, logits, labels, mask, options))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64, torch.float32])
def test_indices_of_every_type_beyond_127_classes(dtype):
    labels = torch.tensor([[[0, 130, 199]]]).to(dtype)
    sums = twin.statistics_in_chunks(torch.zeros(1, 200, 3), labels, None, DiceCEOptions())
    assert sums[2, 0].nonzero().flatten().tolist() == [0, 130, 199]


def test_two_classes_as_bool():
    labels = torch.tensor([[[False, True, True]]])
    sums = twin.statistics_in_chunks(torch.zeros(1, 3, 3), labels, None, DiceCEOptions())
    assert sums[2, 0].tolist() == [1, 2, 0]


def test_a_label_of_no_class_in_a_later_chunk_is_named():
    logits, labels, _ = inputs(soft=False, channels_last=False)
    labels[1, 0, 5, 9] = 7
    with pytest.raises(LabelError, match="value 7 in image 1"):
        twin.statistics_in_chunks(logits, labels, None, DiceCEOptions())
