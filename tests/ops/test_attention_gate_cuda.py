"""attention_gate's CUDA kernels: on the emulator in three thread orders, and on a GPU where there is one."""

from __future__ import annotations

import pytest
import torch
from attention_gate_cases import (
    CASES,
    HALF_DTYPES,
    LARGE_CASES,
    Case,
    assert_matches_twin,
    random_gradients,
    random_inputs,
)
from cuda_on_cpu.emulator import Emulator

from lungkit.ops.attention_gate import attention_gate, reference

CUDA_DTYPES = [torch.float32, *HALF_DTYPES]
SMALL = Case((4, 6, 5), (2, 3, 3), 5, 4, batch=2)
# What only the CUDA kernels tell apart: their three sizes of channels, tiles that end inside a row, boxes cut along x.
CUDA_CASES = [
    *(case for case in CASES if case.inner <= 32 and case.x_channels <= 64),
    Case((2, 3, 70), (2, 3, 35), 33, 17),
    Case((2, 2, 9), (1, 1, 5), 64, 32),
    Case((3, 300), (3, 150), 2, 32),
]
WIDE_CASES = [Case((3, 4, 5), (2, 2, 3), 128, 64), Case((3, 7), (2, 4), 70, 3), Case((3, 7), (2, 4), 3, 50)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CUDA_CASES, ids=str)
def test_emulated_kernels_equal_the_twin(emulated, case, dtype):
    inputs = random_inputs(case, dtype)
    assert_matches_twin(emulated, inputs, random_gradients(inputs[0]))


@pytest.mark.parametrize("case", WIDE_CASES, ids=str)
def test_emulated_kernels_of_many_channels_equal_the_twin(emulated, case):
    inputs = random_inputs(case, torch.bfloat16)
    assert_matches_twin(emulated, inputs, random_gradients(inputs[0]))


@pytest.mark.parametrize("case", [SMALL, Case((3, 4, 5), (2, 2, 3), 33, 17)], ids=str)
def test_emulated_kernels_where_tf32_is_allowed_equal_the_twin(emulated, case):
    """The path through memory of the TF32 kernels; the emulator multiplies in float32."""
    inputs = random_inputs(case, torch.float32)
    grads = random_gradients(inputs[0])
    allowed = (
        *emulated.attention_gate(*inputs, True),
        *emulated.attention_gate_backward(*grads, *inputs, True, True, True, True, True),
    )
    plain = (
        *emulated.attention_gate(*inputs),
        *emulated.attention_gate_backward(*grads, *inputs, True, True, True, True),
    )
    assert all(torch.equal(a, b) for a, b in zip(allowed, plain, strict=True))


@pytest.mark.parametrize("dtype", CUDA_DTYPES)
def test_emulated_kernels_read_channels_last(emulated, dtype):
    inputs = random_inputs(SMALL, dtype, channels_last=True)
    assert_matches_twin(emulated, inputs, random_gradients(inputs[0]))
    assert emulated.attention_gate(*inputs)[0].stride() == inputs[0].stride()


def test_emulated_kernels_read_rows_off_a_16_byte_boundary(emulated):
    x, *others = random_inputs(SMALL, torch.float32)
    x = torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape)
    assert_matches_twin(emulated, (x, *others), random_gradients(x))


@pytest.mark.parametrize("gradients", ["out", "alpha"])
def test_emulated_kernels_take_one_gradient_alone(emulated, gradients):
    inputs = random_inputs(SMALL, torch.float32)
    grad_out, grad_alpha = random_gradients(inputs[0])
    assert_matches_twin(emulated, inputs, (grad_out, None) if gradients == "out" else (None, grad_alpha))


@pytest.mark.parametrize("needed", range(4))
def test_emulated_gradients_alone_are_those_of_all_together(emulated, needed):
    inputs = random_inputs(SMALL, torch.float32)
    gradients = random_gradients(inputs[0])
    together = emulated.attention_gate_backward(*gradients, *inputs, True, True, True, True)
    needs = [k == needed for k in range(4)]
    alone = emulated.attention_gate_backward(*gradients, *inputs, *needs)
    torch.testing.assert_close(alone[needed], together[needed])
    assert [grad.numel() > 0 for grad in alone] == [*needs, needs[3]]


@pytest.mark.parametrize("shape", [(0, 5, 4, 6, 5), (2, 5, 0, 6, 5)])
def test_emulated_kernels_take_nothing(emulated, shape):
    x, phi = torch.zeros(shape), torch.zeros(shape[0], 4, shape[2] // 2, 3, 3)
    inputs = (x, phi, torch.ones(4, 5), torch.ones(4), torch.ones(1))
    out, _ = emulated.attention_gate(*inputs)
    *_, grad_w_x, _, _ = emulated.attention_gate_backward(x, None, *inputs, True, True, True, True)
    assert out.shape == shape
    assert float(grad_w_x.abs().sum()) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_emulated_results_have_the_same_bits_in_every_order(emulated_library, dtype):
    torch.ops.load_library(str(emulated_library))
    ops = torch.ops.lungkit_emulated
    inputs = random_inputs(Case((6, 8, 20), (3, 4, 10), 6, 5, batch=2), dtype)
    gradients = random_gradients(inputs[0])
    emulator = Emulator(emulated_library)
    emulator.in_every_order(lambda: ops.attention_gate(*inputs))
    emulator.in_every_order(lambda: ops.attention_gate_backward(*gradients, *inputs, True, True, True, True))


@pytest.mark.parametrize(
    ("case", "dtype", "message"),
    [
        (Case((2, 2), (1, 1), 65, 4), torch.float32, "at most 64 channels of x and 32 inner channels"),
        (Case((2, 2), (1, 1), 4, 65), torch.bfloat16, "at most 128 channels of x and 64 inner channels"),
        (Case((2, 2), (1, 1), 4, 4), torch.float64, "take float32, float16 and bfloat16, got Double"),
        (Case((1, 0x8000), (1, 2), 1, 1), torch.float32, "at most 32767 voxels along an axis"),
    ],
)
def test_emulated_kernels_name_what_is_too_large(emulated, case, dtype, message):
    with pytest.raises(RuntimeError, match=message):
        emulated.attention_gate(*random_inputs(case, dtype))


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", CUDA_DTYPES)
@pytest.mark.parametrize("case", [*CUDA_CASES, *LARGE_CASES], ids=str)
def test_cuda_equals_the_twin(case, dtype):
    inputs = tuple(tensor.cuda() for tensor in random_inputs(case, dtype))
    gradients = tuple(grad.cuda() for grad in random_gradients(inputs[0].cpu()))
    assert_matches_twin(torch.ops.lungkit, inputs, gradients)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_cuda_takes_the_librarys_product_for_what_its_kernels_do_not(dtype):
    inputs = tuple(tensor.cuda() for tensor in random_inputs(Case((4, 6), (2, 3), 256, 128), dtype))
    for a, b in zip(attention_gate(*inputs), reference(*inputs), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.cuda
def test_cuda_gradients_have_the_same_bits_in_every_run():
    inputs = tuple(tensor.cuda() for tensor in random_inputs(LARGE_CASES[0], torch.bfloat16))
    gradients = tuple(grad.cuda() for grad in random_gradients(inputs[0].cpu()))
    first, *others = (
        torch.ops.lungkit.attention_gate_backward(*gradients, *inputs, True, True, True, True)
        for _ in range(5)
    )
    assert all(torch.equal(a, b) for run in others for a, b in zip(first, run, strict=True))


@pytest.mark.cuda
def test_cuda_forward_and_backward_are_captured_in_a_graph():
    inputs = tuple(tensor.cuda() for tensor in random_inputs(SMALL, torch.bfloat16))
    gradients = tuple(grad.cuda() for grad in random_gradients(inputs[0].cpu()))

    def run() -> tuple[torch.Tensor, ...]:
        ops = torch.ops.lungkit
        return (
            *ops.attention_gate(*inputs),
            *ops.attention_gate_backward(*gradients, *inputs, True, True, True, True),
        )

    expected = run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


@pytest.mark.cuda
@pytest.mark.parametrize("allowed", [False, True])
@pytest.mark.parametrize("case", [SMALL, LARGE_CASES[0], Case((2, 2, 9), (1, 1, 5), 64, 32)], ids=str)
def test_cuda_multiplies_in_tf32_only_where_torch_allows_it(monkeypatch, case, allowed):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", allowed)
    inputs = [tensor.cuda().requires_grad_() for tensor in random_inputs(case, torch.float32)]
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    found, expected = (
        (*results, *torch.autograd.grad(results[0].sum() + results[1].sum(), leaves))
        for leaves, gate in ((inputs, attention_gate), (exact, reference))
        for results in [gate(*leaves)]
    )
    largest = max(
        float((a.double() - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True)
    )
    assert largest < (2e-2 if allowed else 1e-4)
    assert not allowed or largest > 1e-5  # the mantissa of TF32 has 10 bits
