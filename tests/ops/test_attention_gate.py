"""attention_gate: the kernels of every backend against the twin in fp64, layouts, gradients."""

from __future__ import annotations

import subprocess
import sys
from itertools import product

import pytest
import torch
from attention_gate_cases import (
    CASES,
    CUDA_CASES,
    CUDA_DTYPES,
    DTYPES,
    HALF_DTYPES,
    LARGE_CASES,
    SMALL,
    WIDE_CASES,
    Case,
    assert_matches_twin,
    gate_and_gradients,
    leaves,
    random_gradients,
    random_inputs,
)
from op_kernels import CPU, EMULATED, on_cuda_kernels, on_kernels
from torch import Tensor

from lungkit.errors import UsageError
from lungkit.ops.attention_gate import (
    _fits_device,
    _reference_backward,
    _upsample_by_products,
    attention_gate,
    reference,
)

OPS = torch.ops.lungkit
SMALL_OF_SEVERAL_BLOCKS = Case((6, 8, 20), (3, 4, 10), 6, 5, batch=2)


# ---- the kernels against the twin -------------------------------------------------------------------------------


@pytest.mark.parametrize("channels_last", [False, True])
@on_kernels(
    "case, dtype",
    product(CASES, DTYPES),
    emulated=product(CUDA_CASES, CUDA_DTYPES),
    cuda=product(CUDA_CASES, CUDA_DTYPES),
    ids=str,
)
def test_every_shape_equals_the_twin(kernels, case, dtype, channels_last):
    inputs = random_inputs(case, dtype, channels_last=channels_last)
    assert_matches_twin(inputs, random_gradients(inputs[0]))


@pytest.mark.parametrize("kernels", CPU, indirect=True)
@pytest.mark.parametrize("case", WIDE_CASES, ids=str)
def test_any_number_of_channels_equals_the_twin(kernels, case):
    inputs = random_inputs(case, torch.float32)
    assert_matches_twin(inputs, random_gradients(inputs[0]))


@pytest.mark.parametrize("channels_last", [False, True])
@on_kernels(
    "case, dtype",
    product(LARGE_CASES, [torch.float32]),
    emulated=[],
    cuda=product(LARGE_CASES, CUDA_DTYPES),
    ids=str,
)
def test_many_chunks_equal_the_twin(kernels, case, dtype, channels_last):
    inputs = random_inputs(case, dtype, channels_last=channels_last)
    assert_matches_twin(inputs, random_gradients(inputs[0]))


@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_half_features_take_float_weights(kernels, dtype):
    x, phi, *_ = random_inputs(SMALL, dtype)
    weights = random_inputs(SMALL, torch.float32, seed=2)[2:]
    on_tensor_cores = kernels not in CPU
    if on_tensor_cores:
        weights = tuple(weight.to(dtype).float() for weight in weights)
    inputs = (x, phi, *weights)
    assert_matches_twin(inputs, random_gradients(x), multiplied_as=dtype if on_tensor_cores else None)
    _, _, *found = OPS.attention_gate_backward(*random_gradients(x), *inputs, True, True, True, True)
    assert {grad.dtype for grad in found} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float32, *HALF_DTYPES])
def test_an_open_gate_passes_every_value_bit_for_bit(kernels, dtype):
    """alpha = 1: what comes out went through the kernels' conversions of the half types and back."""
    if dtype == torch.float32:
        values = torch.randn(1 << 16) * torch.logspace(-45, 38, 1 << 16)
    else:
        values = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(dtype)
    x = torch.where(values.isfinite(), values, 0).reshape(1, 1, 256, 256)
    out, alpha = attention_gate(
        x, torch.zeros_like(x), torch.zeros(1, 1), torch.zeros(1), torch.full((1,), 100.0)
    )
    assert torch.equal(out, x)
    assert bool((alpha == 1).all())


@pytest.mark.parametrize("gradients", ["out", "alpha"])
def test_either_output_may_have_no_gradient(kernels, gradients):
    inputs = random_inputs(SMALL, torch.float32)
    grad_out, grad_alpha = random_gradients(inputs[0])
    assert_matches_twin(inputs, (grad_out, None) if gradients == "out" else (None, grad_alpha))


def test_2d_equals_3d_with_one_slice(kernels):
    x, phi, *weights = random_inputs(Case((9, 14), (5, 7), 6, 4), torch.float32)
    flat, _ = attention_gate(x, phi, *weights)
    solid, _ = attention_gate(x[:, :, None], phi[:, :, None], *weights)
    assert torch.equal(flat, solid[:, :, 0])


# ---- values at the edge ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [-1e4, 1e4])
def test_a_saturated_gate_is_finite(kernels, bias):
    x, phi, w_x, w_psi, _ = random_inputs(SMALL, torch.float32)
    inputs = (x, phi, w_x, w_psi, torch.tensor([bias]))
    out, alpha = attention_gate(*inputs)
    grads = OPS.attention_gate_backward(*random_gradients(x), *inputs, True, True, True, True)
    assert all(bool(tensor.isfinite().all()) for tensor in (out, *grads))
    torch.testing.assert_close(alpha, torch.full_like(alpha, float(bias > 0)))


def test_nan_stays_in_its_voxel(kernels):
    x, *others = random_inputs(SMALL, torch.float32)
    x[1, 2, 0, 3, 4] = float("nan")
    out, alpha = attention_gate(x, *others)
    assert alpha.isnan().nonzero().tolist() == [[1, 0, 0, 3, 4]]
    assert out.isnan().nonzero()[:, [0, 2, 3, 4]].unique(dim=0).tolist() == [[1, 0, 3, 4]]


@pytest.mark.parametrize("shape", [(0, 5, 4, 6, 5), (2, 5, 0, 6, 5)])
def test_nothing_in_gives_nothing_out(kernels, shape):
    x = torch.zeros(shape, requires_grad=True)
    phi = torch.zeros(shape[0], 4, shape[2] // 2, 3, 3, requires_grad=True)
    weights = [torch.ones(4, 5), torch.ones(4), torch.ones(1)]
    out, alpha = attention_gate(x, phi, *(w.requires_grad_() for w in weights))
    out.sum().backward()
    assert (out.shape, alpha.shape) == (shape, (shape[0], 1, *shape[2:]))
    assert x.grad.shape == shape
    assert all(float(w.grad.abs().sum()) == 0 for w in weights)


# ---- memory ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["channels_last", "contiguous"])
def test_results_lie_as_the_inputs_do(kernels, order):
    x, phi, *weights = random_inputs(SMALL, torch.float32, channels_last=order == "channels_last")
    out, alpha = attention_gate(x, phi, *weights)
    grad_x, grad_phi, *_ = OPS.attention_gate_backward(
        *random_gradients(x), x, phi, *weights, True, True, True, True
    )
    assert out.stride() == grad_x.stride() == x.stride()
    assert grad_phi.stride() == phi.stride()
    assert alpha.is_contiguous()


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t.repeat(1, 2, 1, 1, 1)[:, : t.shape[1]],  # channels of a wider tensor
        lambda t: t.transpose(3, 4).contiguous().transpose(3, 4),  # voxels in another order
        lambda t: t.repeat(1, 1, 1, 1, 2)[..., : t.shape[4]],  # rows with gaps
        lambda t: t.permute(0, 2, 3, 4, 1).repeat(1, 1, 1, 1, 2)[..., : t.shape[1]].permute(0, 4, 1, 2, 3),
        lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape),  # off a 16-byte boundary
    ],
    ids=["channel slice", "transposed", "gaps", "channels-last slice", "misaligned"],
)
@pytest.mark.parametrize("which", [0, 1, "grad"])
def test_any_strides_equal_the_twin(kernels, which, view):
    inputs = list(random_inputs(SMALL, torch.float32))
    grad_out, grad_alpha = random_gradients(inputs[0])
    if which == "grad":
        grad_out = view(grad_out)
    else:
        inputs[which] = view(inputs[which])
    assert_matches_twin(tuple(inputs), (grad_out, grad_alpha))


@pytest.mark.parametrize("order", ["contiguous", "channels_last"])
def test_expanded_gradients_equal_the_twin(kernels, order):
    inputs = random_inputs(SMALL, torch.float32, channels_last=order == "channels_last")
    x = inputs[0]
    grad_out = torch.tensor(0.5).expand_as(x)
    assert_matches_twin(inputs, (grad_out, torch.tensor(2.0).expand(2, 1, *SMALL.fine)))


@pytest.mark.parametrize("which", [0, 1])
def test_a_batch_that_repeats_one_image_equals_the_twin(kernels, which):
    inputs = list(random_inputs(SMALL, torch.float32))
    inputs[which] = inputs[which][:1].expand_as(inputs[which])
    assert_matches_twin(tuple(inputs), random_gradients(inputs[0]))


def test_backward_keeps_the_inputs_alone():
    kept = []
    inputs = leaves(SMALL)

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        attention_gate(*inputs)
    assert sorted(kept) == sorted(tensor.data_ptr() for tensor in inputs)


# ---- gradients ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case",
    [Case((4, 5), (2, 3), 3, 2), Case((3, 4, 4), (2, 2, 2), 2, 3), Case((2, 3, 2), (2, 3, 2), 3, 2)],
    ids=str,
)
def test_gradcheck(case):
    assert torch.autograd.gradcheck(attention_gate, leaves(case, torch.float64))


@pytest.mark.parametrize("needed", range(5))
def test_each_gradient_alone_is_that_of_all_together(kernels, needed):
    together = gate_and_gradients(leaves(SMALL))[2 + needed]
    alone = list(random_inputs(SMALL, torch.float32))
    alone[needed].requires_grad_()
    (found,) = torch.autograd.grad(attention_gate(*alone), alone[needed], random_gradients(alone[0]))
    if kernels in CPU:
        assert torch.equal(found, together)
    else:  # another number of sums a block, so another order
        torch.testing.assert_close(found, together)


@pytest.mark.parametrize("kernels", [*CPU, *EMULATED], indirect=True)
@pytest.mark.parametrize("case", [SMALL, Case((3, 4, 5), (2, 2, 3), 33, 17)], ids=str)
def test_without_tensor_cores_products_are_alike_whether_tf32_is_allowed(kernels, case):
    """The emulator takes the TF32 kernels' path through memory, and multiplies in float32."""
    results = []
    for allowed in ((), (True,)):
        inputs = leaves(case)
        out, alpha = OPS.attention_gate(*inputs, *allowed)
        results.append((out, alpha, *torch.autograd.grad((out, alpha), inputs, random_gradients(inputs[0]))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_gradients_not_asked_for_are_not_made(kernels):
    inputs = random_inputs(SMALL, torch.float32)
    for needed in range(4):
        needs = [k == needed for k in range(4)]
        found = OPS.attention_gate_backward(*random_gradients(inputs[0]), *inputs, *needs)
        asked = [*needs, needs[3]]
        assert [grad.numel() for grad in found] == [
            a * tensor.numel() for a, tensor in zip(asked, inputs, strict=True)
        ]


def test_a_second_derivative_is_refused():
    inputs = leaves(SMALL)
    (grad,) = torch.autograd.grad(attention_gate(*inputs)[0].sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_in_every_schedule(schedules, dtype):
    for case in [SMALL_OF_SEVERAL_BLOCKS] if schedules.backend == "emulated" else LARGE_CASES:
        inputs = leaves(case, dtype)
        schedules.assert_same_bits(lambda inputs=inputs: gate_and_gradients(inputs))


def test_the_twins_backward_is_its_autograd():
    inputs = leaves(SMALL, torch.float64)
    expected = gate_and_gradients(inputs, reference)[2:]
    found = _reference_backward(
        *random_gradients(inputs[0]), *(t.detach() for t in inputs), True, True, True, True
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


# ---- bad input ---------------------------------------------------------------------------------------------------

X, PHI, W_X, W_PSI, B_PSI = (
    torch.zeros(2, 5, 4, 6),
    torch.zeros(2, 3, 2, 3),
    torch.zeros(3, 5),
    torch.zeros(3),
    torch.zeros(1),
)
BAD = {
    "x without channels": ((X[0], PHI, W_X, W_PSI, B_PSI), r"x must be \(B, Cx, Y, X\).*got.*\(5, 4, 6\)"),
    "other axes": ((X, PHI[..., None], W_X, W_PSI, B_PSI), "phi"),
    "other batch": ((X, PHI[:1], W_X, W_PSI, B_PSI), "phi"),
    "finer phi": ((X, torch.zeros(2, 3, 5, 3), W_X, W_PSI, B_PSI), r"phi.*\(.*5, 3\).*\(.*4, 6\)"),
    "empty phi": ((X, torch.zeros(2, 3, 0, 3), W_X, W_PSI, B_PSI), "phi"),
    "w_x for other channels": ((X, PHI, torch.zeros(3, 4), W_PSI, B_PSI), r"w_x must be.*\(3, 5\).*\(3, 4\)"),
    "w_x with axes": ((X, PHI, W_X[..., None, None], W_PSI, B_PSI), r"w_x must be.*\(3, 5, 1, 1\)"),
    "w_psi for other channels": ((X, PHI, W_X, torch.zeros(4), B_PSI), r"w_psi must be.*\(3,?\).*\(4,\)"),
    "two biases": ((X, PHI, W_X, W_PSI, torch.zeros(2)), r"b_psi must be.*\(2,\)"),
    "phi in another dtype": ((X, PHI.double(), W_X, W_PSI, B_PSI), "x .*phi"),
    "weights finer than x": ((X, PHI, W_X.double(), W_PSI.double(), B_PSI.double()), "w_x must have x's dtype"),
    "w_psi in another dtype": ((X, PHI, W_X, W_PSI.double(), B_PSI), "w_x.*w_psi"),
    "integers": ((X.int(), PHI.int(), W_X.int(), W_PSI.int(), B_PSI.int()), "float"),
}  # fmt: skip


@pytest.mark.parametrize("call", [attention_gate, OPS.attention_gate], ids=["function", "op"])
@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD)
def test_arguments_that_do_not_fit_are_named(arguments, message, call):
    with pytest.raises(UsageError if call is attention_gate else RuntimeError, match=message):
        call(*arguments)


def test_another_device_is_named():
    with pytest.raises(UsageError, match="x and w_x must be on the same device, got cpu and meta"):
        attention_gate(X, PHI, W_X.to("meta"), W_PSI, B_PSI)


@pytest.mark.parametrize(
    ("moved", "names"),
    [
        (2, "x and phi"),
        (3, "x and w_x"),
        (4, "x and w_psi"),
        (5, "x and b_psi"),
        (0, "x and grad_out"),
        (1, "x and grad_alpha"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("library", ["lungkit", "lungkit_emulated"])
def test_another_device_is_named_in_a_direct_call_too(library, names, moved, request):
    if library == "lungkit_emulated":
        request.getfixturevalue("emulator")
    inputs = random_inputs(SMALL, torch.float32)
    tensors = [*random_gradients(inputs[0]), inputs[0], *inputs[1:]]
    at = moved if moved < 2 else moved + 1  # x itself decides which kernels run
    tensors[at] = tensors[at].to("meta")
    op = getattr(torch.ops, library).attention_gate_backward.default
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    with pytest.raises(RuntimeError, match=f"{names} must be on the same device"):
        op.redispatch(keys, *tensors, True, True, True, True)


@pytest.mark.parametrize("grad", ["grad_out", "grad_alpha"])
def test_a_gradient_of_another_shape_is_named(kernels, grad):
    inputs = random_inputs(SMALL, torch.float32)
    gradients = dict(zip(("grad_out", "grad_alpha"), random_gradients(inputs[0]), strict=True))
    gradients[grad] = gradients[grad][:1]
    with pytest.raises(RuntimeError, match=rf"{grad} must be \(B, .*, \*S\)"):
        OPS.attention_gate_backward(*gradients.values(), *inputs, True, True, True, True)


# ---- what a device allows ----------------------------------------------------------------------------------------

# Bytes of shared memory that a block may ask for, by compute capability.
SHARED_BYTES = {75: 64 << 10, 80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 120: 99 << 10}


@pytest.mark.parametrize("kernels", EMULATED[:1], indirect=True)
@pytest.mark.parametrize("dtype", CUDA_DTYPES)
@pytest.mark.parametrize("channels", [(8, 8), (32, 16), (64, 32)])
@pytest.mark.parametrize("capability", SHARED_BYTES)
def test_kernels_run_on_every_device_that_is_said_to_fit(kernels, emulator, capability, channels, dtype):
    inputs = random_inputs(Case((3, 6, 40), (2, 3, 20), *channels), dtype)
    with emulator.device(capability):
        if _fits_device(*inputs[:2], capability, SHARED_BYTES[capability]):
            assert_matches_twin(inputs, random_gradients(inputs[0]))
        else:
            with pytest.raises(
                RuntimeError, match=r"shared memory a block, too few|from compute capability 8\.0 on"
            ):
                OPS.attention_gate_backward(*random_gradients(inputs[0]), *inputs, True, True, True, True)


@pytest.mark.parametrize("kernels", EMULATED[:1], indirect=True)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_on_every_number_of_multiprocessors(kernels, emulator, dtype, channels_last):
    """1, 4 and 7 of them: blocks of the forward pass take as many runs as there are left."""
    inputs = random_inputs(SMALL_OF_SEVERAL_BLOCKS, dtype, channels_last=channels_last)
    found = []
    for capability in (86, 90, 80):
        with emulator.device(capability), emulator.counted() as counts:
            forward = OPS.attention_gate(*inputs)
            backward = OPS.attention_gate_backward(
                *random_gradients(inputs[0]), *inputs, True, True, True, True
            )
        found.append((counts.blocks, (*forward, *backward)))
    blocks, results = zip(*found, strict=True)
    assert dtype == torch.float32 or len(set(blocks)) == 3
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_only_float32_of_many_channels_and_half_types_are_too_large_for_the_oldest_device():
    fits = {
        (dtype, channels): _fits_device(
            *random_inputs(Case((2, 2), (1, 1), *channels), dtype)[:2], 75, SHARED_BYTES[75]
        )
        for dtype in (torch.float32, torch.bfloat16)
        for channels in ((32, 16), (64, 32))
    }
    assert [key for key, fit in fits.items() if fit] == [(torch.float32, (32, 16))]


@pytest.mark.parametrize("kernels", EMULATED[:1], indirect=True)
def test_shared_memory_is_asked_for_once_a_kernel(kernels, emulator):
    narrow, wide = (random_inputs(Case((4, 6), (2, 3), c, c), torch.bfloat16) for c in (3, 16))
    OPS.attention_gate(*narrow)
    with emulator.counted() as counts:
        OPS.attention_gate(*wide)
        OPS.attention_gate(*narrow)
    assert (counts.launches, counts.attributes) == (2, 0)


@pytest.mark.parametrize(
    "setting", ["allow_tf32", "matmul precision", "cuda.matmul.fp32_precision", "fp32_precision"]
)
def test_every_setting_of_tf32_is_read(setting):
    """In a process of its own: torch refuses its older setting for good once a newer one was used."""
    change = {
        "allow_tf32": "torch.backends.cuda.matmul.allow_tf32 = True",
        "matmul precision": "torch.set_float32_matmul_precision('high')",
        "cuda.matmul.fp32_precision": "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
        "fp32_precision": "torch.backends.fp32_precision = 'tf32'",
    }[setting]
    code = (
        "import torch; from lungkit.ops.attention_gate import _allows_tf32 as allows;"
        f"before = allows(); {change}; assert (before, allows()) == (False, True)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- CUDA alone ---------------------------------------------------------------------------------------------------


@on_cuda_kernels
@pytest.mark.parametrize(
    ("case", "dtype", "message"),
    [
        (Case((2, 2), (1, 1), 65, 4), torch.float32, "at most 64 channels of x and 32 inner channels"),
        (Case((2, 2), (1, 1), 4, 65), torch.bfloat16, "at most 64 channels of x and 32 inner channels"),
        (Case((2, 2), (1, 1), 4, 4), torch.float64, "take float32, float16 and bfloat16, got Double"),
        (Case((1, 0x8000), (1, 2), 1, 1), torch.float32, "at most 32767 voxels along an axis"),
    ],
)
def test_cuda_kernels_name_what_is_too_large(kernels, case, dtype, message):
    with pytest.raises(RuntimeError, match=message):
        OPS.attention_gate(*random_inputs(case, dtype))


def test_interpolation_by_products_trains_after_it_was_used_without_gradients():
    x, phi = torch.zeros(1, 1, 9, 14), torch.randn(1, 3, 4, 7)
    expected = torch.nn.functional.interpolate(phi, size=(9, 14), mode="bilinear", align_corners=False)
    with torch.inference_mode():
        torch.testing.assert_close(_upsample_by_products(phi, x), expected)
    phi.requires_grad_()
    _upsample_by_products(phi, x).sum().backward()
    torch.testing.assert_close(phi.grad.sum(), torch.tensor(3.0 * 9 * 14))


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_cuda_takes_the_librarys_product_for_what_its_kernels_do_not(monkeypatch, dtype):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # of the twin's convolution
    inputs = tuple(tensor.cuda() for tensor in random_inputs(Case((4, 6), (2, 3), 256, 128), dtype))
    for a, b in zip(attention_gate(*inputs), reference(*inputs), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.cuda
def test_cuda_forward_and_backward_are_captured_in_a_graph():
    inputs = tuple(tensor.cuda() for tensor in random_inputs(SMALL, torch.bfloat16))
    gradients = tuple(grad.cuda() for grad in random_gradients(inputs[0].cpu()))

    def run() -> tuple[Tensor, ...]:
        return (
            *OPS.attention_gate(*inputs),
            *OPS.attention_gate_backward(*gradients, *inputs, True, True, True, True),
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
    # Of the norms: where q is next to 0 its rounding decides whether a single gradient passes at all.
    largest = max(
        float((a.detach().double() - b.detach()).norm() / b.detach().norm())
        for a, b in zip(found, expected, strict=True)
    )
    assert largest < (2e-2 if allowed else 1e-4)
    assert not allowed or largest > 1e-5  # the mantissa of TF32 has 10 bits
