"""dice_ce under torch's transformations: opcheck, compilation, export, checkpointing, autocast, second derivatives."""

from __future__ import annotations

import io

import pytest
import torch
from dice_ce_cases import (
    Form,
    gradient_of,
    random_indices,
    random_logits,
)

from lungkit.ops.dice_ce import (
    dice_ce_loss,
    reference,
)

OPS = torch.ops.lungkit


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_opcheck(layout):
    logits = random_logits((2, 5, 7), 3, torch.float32).to(memory_format=layout).requires_grad_()
    labels, form = random_indices((2, 5, 7), 3, torch.uint8), (*Form(), None)
    torch.library.opcheck(OPS.dice_ce_statistics.default, (logits, labels, None, *form))
    arithmetic = (True, False, False, True, 1e-5, 1e-5, 1.0, 1.0, 0.0)
    torch.library.opcheck(OPS.dice_ce_loss.default, (logits, labels, None, None, *form, *arithmetic))
    slopes = torch.randn(6, 2, 3)
    # The op refuses a second derivative, so its own autograd is not compared.
    torch.library.opcheck(
        OPS.dice_ce_backward.default,
        (slopes, torch.tensor(2.0), logits.detach(), labels, None, *form),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_breaks(dynamic):
    def step(logits, labels):
        return dice_ce_loss(2 * logits, labels, include_background=False, weight=[1.0, 2.0, 0.5])

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for size in (5, 9):
        logits, labels = (
            random_logits((2, size, 7), 3, torch.float32),
            random_indices((2, size, 7), 3, torch.uint8),
        )
        torch.testing.assert_close(compiled(logits, labels), step(logits, labels))
        torch.testing.assert_close(gradient_of(compiled, logits, labels), gradient_of(step, logits, labels))


def test_exports_and_loads_again():
    class Criterion(torch.nn.Module):
        def forward(self, logits, labels):
            return dice_ce_loss(logits, labels, batch=True)

    logits, labels = random_logits((2, 5, 7), 2, torch.float32), random_indices((2, 5, 7), 2, torch.uint8)
    width = torch.export.Dim("width", min=2)
    program = torch.export.export(Criterion(), (logits, labels), dynamic_shapes=({3: width}, {2: width}))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    wide, wide_labels = (
        random_logits((2, 5, 13), 2, torch.float32),
        random_indices((2, 5, 13), 2, torch.uint8),
    )
    torch.testing.assert_close(loaded(wide, wide_labels), dice_ce_loss(wide, wide_labels, batch=True))


def test_activation_checkpointing_gives_the_same_gradient():
    logits, labels = random_logits((2, 5, 7), 2, torch.float32), random_indices((2, 5, 7), 2, torch.uint8)

    def checkpointed(z, y):
        return torch.utils.checkpoint.checkpoint(dice_ce_loss, z, y, use_reentrant=False)

    assert torch.equal(gradient_of(checkpointed, logits, labels), gradient_of(dice_ce_loss, logits, labels))


def test_autocast_logits_are_read_as_they_are():
    convolution = torch.nn.Conv2d(1, 2, 3)
    images, labels = torch.randn(2, 1, 8, 8), random_indices((2, 6, 6), 2, torch.uint8)
    with torch.autocast("cpu", torch.bfloat16):
        logits = convolution(images)
        loss = dice_ce_loss(logits, labels)
    assert logits.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    loss.backward()
    torch.testing.assert_close(loss, reference(logits.float(), labels))


def test_a_second_derivative_is_refused():
    logits = random_logits((1, 5, 7), 2, torch.float32).requires_grad_()
    loss = dice_ce_loss(logits, random_indices((1, 5, 7), 2, torch.uint8))
    (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        gradient.sum().backward()
