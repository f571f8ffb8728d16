"""attention_gate under torch's transformations: opcheck, compilation, export, checkpointing, autocast."""

from __future__ import annotations

import io

import pytest
import torch
from attention_gate_cases import (
    SMALL,
    Case,
    gate_and_gradients,
    leaves,
    random_gradients,
    random_inputs,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lungkit.ops.attention_gate import attention_gate

OPS = torch.ops.lungkit


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype, channels_last):
    inputs = random_inputs(SMALL, dtype, channels_last=channels_last)
    leaf = [tensor.requires_grad_() for tensor in inputs]
    torch.library.opcheck(OPS.attention_gate.default, tuple(leaf))
    gradients = random_gradients(inputs[0])
    detached = tuple(tensor.detach() for tensor in inputs)
    for needs in ((True, True, True, True), (True, False, False, True)):
        torch.library.opcheck(OPS.attention_gate_backward.default, (*gradients, *detached, *needs))


def scaled(x: Tensor, phi: Tensor, w_x: Tensor, w_psi: Tensor, b_psi: Tensor) -> tuple[Tensor, Tensor]:
    out, alpha = attention_gate(torch.tanh(x), phi * 2, w_x, w_psi, b_psi)
    return out + 1, alpha


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_breaks(dynamic):
    compiled = torch.compile(scaled, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for case in (SMALL, Case((6, 7, 9), (3, 4, 5), 5, 4, batch=3)):
        for a, b in zip(
            gate_and_gradients(leaves(case), compiled), gate_and_gradients(leaves(case), scaled), strict=True
        ):
            torch.testing.assert_close(a, b)


class Gate(nn.Module):
    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        return attention_gate(*inputs)


def test_exports_with_dynamic_sizes_and_loads_again():
    inputs = random_inputs(SMALL, torch.float32)
    batch, coarse = torch.export.Dim("batch", min=1), [torch.export.Dim(f"n{d}", min=2) for d in range(3)]
    grids = (
        {0: batch, **{d + 2: 2 * n for d, n in enumerate(coarse)}},
        {0: batch, **dict(enumerate(coarse, 2))},
    )
    case = Case((8, 6, 10), (4, 3, 5), 5, 4, batch=2)
    program = torch.export.export(
        Gate(), random_inputs(case, torch.float32), dynamic_shapes=((*grids, {}, {}, {}),)
    )
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    inputs = random_inputs(Case((4, 6, 12), (2, 3, 6), 5, 4, batch=3), torch.float32)
    for a, b in zip(loaded(*inputs), attention_gate(*inputs), strict=True):
        assert torch.equal(a, b)


def test_activation_checkpointing_gives_the_same_gradients():
    plain = gate_and_gradients(leaves(SMALL))
    again = gate_and_gradients(
        leaves(SMALL), lambda *inputs: checkpoint(attention_gate, *inputs, use_reentrant=False)
    )
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_autocast_halves_the_features_and_keeps_the_weights():
    inputs = leaves(SMALL)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, alpha = attention_gate(*inputs)
    grads = torch.autograd.grad(out.float().sum(), inputs)
    assert out.dtype == alpha.dtype == torch.bfloat16
    assert {grad.dtype for grad in grads} == {torch.float32}
    expected, _ = attention_gate(inputs[0].bfloat16(), inputs[1].bfloat16(), *inputs[2:])
    assert torch.equal(out, expected)
