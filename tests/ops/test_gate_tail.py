"""The gate's tail: the kernels of every backend against the twin in fp64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lungkit.errors import UsageError
from lungkit.ops.attention_gate import _product_and_tail, _upsample, _upsample_by_products, reference
from lungkit.ops.gate_tail import gate_psi, gate_scale, reference_psi

OPS = torch.ops.lungkit
# The last one: more channels than the rows of a block take at once, in both orders of memory.
SHAPES = [(1, 1, 1, 1), (2, 5, 4, 6, 5), (1, 37, 3, 7), (2, 16, 33, 40), (3, 2, 1, 1, 130), (1, 136, 2, 8)]
# As a share of the largest value: half types round once, on the way out.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
HALF_DTYPES = [torch.bfloat16, torch.float16]


def draw(shape: tuple[int, ...], dtype: torch.dtype, seed: int, *, channels_last: bool = False) -> Tensor:
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    if channels_last:
        order = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
        tensor = tensor.contiguous(memory_format=order)
    return tensor


def map_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[0], 1, *shape[2:])


def assert_near(found: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    assert found.shape == exact.shape
    limit = TOLERANCE[dtype] * max(float(exact.abs().max()), 1e-3) if exact.numel() else 0
    difference = float((found.double() - exact).abs().max()) if exact.numel() else 0
    assert difference <= limit, f"differs by {difference}, allowed {limit}"


def assert_psi_matches(a: Tensor, b: Tensor, weight: Tensor, grad_psi: Tensor) -> None:
    psi, q = OPS.gate_psi(a, b, weight)
    exact = [tensor.double().clone().requires_grad_() for tensor in (a, b, weight)]
    expected, kept = reference_psi(*exact)
    assert_near(psi, expected.detach(), a.dtype)
    assert_near(q, kept.detach(), a.dtype)
    grad_features, grad_weight = OPS.gate_psi_backward(grad_psi, q, weight, True, True)
    # From the q that was kept: a sum next to zero may have been rounded to it.
    q_exact, weight_exact = q.double(), weight.double()
    column = weight_exact.reshape(-1, *(1,) * (q.dim() - 2))
    assert_near(grad_features, torch.where(q_exact > 0, grad_psi.double() * column, 0), a.dtype)
    assert_near(
        grad_weight, torch.einsum("bcv,bv->c", q_exact.flatten(2), grad_psi.double().flatten(1)), weight.dtype
    )


def assert_scale_matches(x: Tensor, alpha: Tensor, grad_out: Tensor) -> None:
    assert_near(OPS.gate_scale(x, alpha), x.double() * alpha.double(), x.dtype)
    grad_x, grad_alpha = OPS.gate_scale_backward(grad_out, x, alpha, True, True)
    assert_near(grad_x, grad_out.double() * alpha.double(), x.dtype)
    assert_near(grad_alpha, (grad_out.double() * x.double()).sum(1, keepdim=True), x.dtype)


def check_both(shape: tuple[int, ...], dtype: torch.dtype, *, channels_last: bool = False) -> None:
    a, b, x, grad = (draw(shape, dtype, seed, channels_last=channels_last) for seed in range(4))
    weight, small = draw((shape[1],), dtype, 4), draw(map_shape(shape), dtype, 5)
    assert_psi_matches(a, b, weight, small)
    assert_scale_matches(x, small, grad)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_equals_the_twin(kernels, shape, dtype, channels_last):
    check_both(shape, dtype, channels_last=channels_last)


@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_half_features_take_float_weights(kernels, dtype):
    a, b = draw(SHAPES[1], dtype, 0), draw(SHAPES[1], dtype, 1)
    weight, grad = draw((5,), torch.float32, 2).bfloat16().float(), draw(map_shape(SHAPES[1]), dtype, 3)
    assert_psi_matches(a, b, weight, grad)


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t.repeat(1, 2, 1, 1, 1)[:, : t.shape[1]],
        lambda t: t.transpose(3, 4).contiguous().transpose(3, 4),
        lambda t: t.contiguous(memory_format=torch.channels_last_3d),
        lambda t: t[:1].expand_as(t),
    ],
    ids=["channel slice", "transposed", "another order", "one image"],
)
@pytest.mark.parametrize("which", range(3))
def test_any_strides_equal_the_twin(kernels, which, view):
    a, b, x, grad = (draw(SHAPES[1], torch.float32, seed) for seed in range(4))
    weight, small = draw((5,), torch.float32, 4), draw(map_shape(SHAPES[1]), torch.float32, 5)
    if which == 0:
        a, x = view(a), view(x)
    elif which == 1:
        b, grad = view(b), view(grad)
    else:
        small = small.transpose(3, 4).contiguous().transpose(3, 4)
    assert_psi_matches(a, b, weight, small)
    assert_scale_matches(x, small, grad)


def test_results_lie_as_the_features_do(kernels):
    a = draw(SHAPES[1], torch.float32, 0, channels_last=True)
    alpha = draw(map_shape(SHAPES[1]), torch.float32, 1)
    psi, q = OPS.gate_psi(a, a.contiguous(), torch.ones(5))
    assert q.stride() == OPS.gate_scale(a, alpha).stride() == a.stride()
    assert psi.is_contiguous()


@pytest.mark.parametrize("shape", [(0, 5, 4, 6), (2, 5, 0, 6)])
def test_nothing_in_gives_nothing_out(kernels, shape):
    x, weight = torch.zeros(shape, requires_grad=True), torch.ones(5, requires_grad=True)
    (gate_psi(x, x, weight).sum() + gate_scale(x, torch.zeros(map_shape(shape))).sum()).backward()
    assert x.grad.shape == shape
    assert float(weight.grad.abs().sum()) == 0


def test_nan_stays_in_its_voxel(kernels):
    a = draw(SHAPES[1], torch.float32, 0)
    a[1, 2, 0, 3, 4] = float("nan")
    assert gate_psi(a, a, torch.ones(5)).isnan().nonzero().tolist() == [[1, 0, 0, 3, 4]]


def test_psi_keeps_the_relu_in_place_of_its_operands(kernels):
    kept = []
    a, b = (draw(SHAPES[1], torch.float32, seed).requires_grad_() for seed in (0, 1))
    weight = torch.ones(5, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        gate_psi(a, b, weight)
    assert [tuple(tensor.shape) for tensor in kept] == [SHAPES[1], (5,)]
    assert kept[0].data_ptr() not in (a.data_ptr(), b.data_ptr())


def leaves(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    shape = (2, 3, 3, 4)
    drawn = [draw(s, dtype, seed) for seed, s in enumerate((shape, shape, (3,), shape, map_shape(shape)))]
    return [tensor.requires_grad_() for tensor in drawn]


def test_gradcheck(kernels):
    a, b, weight, x, alpha = leaves()
    assert torch.autograd.gradcheck(gate_psi, (a, b, weight))
    assert torch.autograd.gradcheck(gate_scale, (x, alpha))


def test_gradients_not_asked_for_are_not_made(kernels):
    a, _, weight, x, alpha = (tensor.detach() for tensor in leaves())
    for needs in ((False, True), (True, False)):
        sizes = [g.numel() for g in OPS.gate_psi_backward(alpha, a.relu(), weight, *needs)]
        assert sizes == [needs[0] * a.numel(), needs[1] * weight.numel()]
        sizes = [g.numel() for g in OPS.gate_scale_backward(x, x, alpha, *needs)]
        assert sizes == [needs[0] * x.numel(), needs[1] * alpha.numel()]


def test_a_second_derivative_is_refused():
    a, b, weight, x, alpha = leaves()
    for result, leaf in ((gate_psi(a, b, weight), weight), (gate_scale(x, alpha), alpha)):
        (grad,) = torch.autograd.grad(result.square().sum(), leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            grad.sum().backward()


def test_same_bits_in_every_schedule(schedules):
    batch, channels, *grid = (2, 6, 33, 40) if schedules.backend == "emulated" else (2, 9, 30, 31, 32)
    a, b = (draw((batch, channels, *grid), torch.float32, seed) for seed in (0, 1))
    weight, grad = draw((channels,), torch.float32, 2), draw((batch, 1, *grid), torch.float32, 3)

    def run() -> list[Tensor]:
        psi, q = OPS.gate_psi(a, b, weight)
        scaled = OPS.gate_scale_backward(a, b, grad, True, True)
        return [psi, q, *OPS.gate_psi_backward(grad, q, weight, True, True), *scaled]

    schedules.assert_same_bits(run)


@pytest.mark.parametrize("channels_last", [False, True])
def test_opcheck(channels_last):
    a, b, x, grad = (draw(SHAPES[1], torch.float32, k, channels_last=channels_last) for k in range(4))
    weight, alpha = torch.ones(5), draw(map_shape(SHAPES[1]), torch.float32, 5)
    wanted = [tensor.clone().requires_grad_() for tensor in (a, b, weight, x, alpha)]
    torch.library.opcheck(OPS.gate_psi.default, tuple(wanted[:3]))
    torch.library.opcheck(OPS.gate_scale.default, tuple(wanted[3:]))
    torch.library.opcheck(OPS.gate_psi_backward.default, (alpha, a.relu(), weight, True, True))
    torch.library.opcheck(OPS.gate_scale_backward.default, (grad, x, alpha, True, True))


def both(a: Tensor, b: Tensor, weight: Tensor, x: Tensor, alpha: Tensor) -> Tensor:
    return gate_scale(x, torch.sigmoid(gate_psi(a * 2, b, weight)) + alpha)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_breaks(dynamic):
    compiled = torch.compile(both, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    inputs = leaves(torch.float32)
    found, expected = (torch.autograd.grad(f(*inputs).sum(), inputs) for f in (compiled, both))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_autocast_halves_the_features():
    a, b, weight, x, alpha = leaves(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert gate_psi(a, b, weight).dtype == gate_scale(x, alpha).dtype == torch.bfloat16


@pytest.mark.parametrize("dims", [2, 3])
def test_product_and_tail_are_the_gate(dims):
    """What the gate takes on CUDA where its own kernels end."""
    fine, coarse = ((5, 6), (3, 3)) if dims == 2 else ((3, 5, 6), (2, 3, 3))
    drawn = [(2, 7, *fine), (2, 4, *coarse), (4, 7), (4,), (1,)]
    inputs = [draw(shape, torch.float64, seed).requires_grad_() for seed, shape in enumerate(drawn)]
    results = []
    for gate in (_product_and_tail, reference):
        out, alpha = gate(*inputs)
        gradients = torch.autograd.grad((out.square().sum() + alpha.square().sum()), inputs)
        results.append((out, alpha, *gradients))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


A, MAP, WEIGHT = torch.zeros(2, 3, 4, 5), torch.zeros(2, 1, 4, 5), torch.zeros(3)
BAD: dict[str, tuple[Callable[..., object], tuple[Tensor, ...], str]] = {
    "no channels": (gate_psi, (A[0], A[0], WEIGHT), r"a must be \(B, C, Y, X\).*\(3, 4, 5\)"),
    "other shapes": (gate_psi, (A, A[:1], WEIGHT), r"a and b .*\(2, 3, 4, 5\) and \(1, 3, 4, 5\)"),
    "other dtypes": (gate_psi, (A, A.double(), WEIGHT), "a and b .*float32 and torch.float64"),
    "other weight": (gate_psi, (A, A, MAP.flatten()[:4]), r"weight must be \(C,\) = \(3,\).*\(4,\)"),
    "weight too fine": (gate_psi, (A, A, WEIGHT.double()), "weight must have a's dtype"),
    "integers": (gate_psi, (A.int(), A.int(), WEIGHT), "a must be float64.*int32"),
    "another device": (gate_psi, (A, A, WEIGHT.to("meta")), "a and weight.*cpu and meta"),
    "map of two channels": (gate_scale, (A, A), r"alpha must be .*\(2, 1, 4, 5\).*\(2, 3, 4, 5\)"),
    "map in another dtype": (gate_scale, (A, MAP.double()), "x and alpha .*float32 and torch.float64"),
}


@pytest.mark.parametrize(("call", "arguments", "message"), BAD.values(), ids=BAD)
def test_arguments_that_do_not_fit_are_named(call, arguments, message):
    with pytest.raises(UsageError, match=message):
        call(*arguments)


@pytest.mark.parametrize(
    ("call", "arguments", "message"),
    [
        (OPS.gate_psi, (A, A[:1], WEIGHT), "gate_psi: a and b must have the same shape"),
        (OPS.gate_psi_backward, (A, A, WEIGHT, True, True), "gate_psi_backward: grad_psi must be"),
        (OPS.gate_scale, (A, A), "gate_scale: alpha must be"),
        (OPS.gate_scale_backward, (MAP, A, MAP, True, True), "grad_out and x must have the same shape"),
    ],
)
def test_the_ops_themselves_refuse_shapes_that_do_not_fit(call, arguments, message):
    with pytest.raises(RuntimeError, match=message):
        call(*arguments)


@pytest.mark.parametrize(("coarse", "fine"), [((3, 4), (6, 9)), ((2, 1, 3), (5, 4, 3)), ((1, 1), (1, 1))])
def test_the_product_that_upsamples_is_linear_interpolation(coarse, fine):
    phi = torch.randn(2, 3, *coarse, dtype=torch.float64, requires_grad=True)
    x = torch.zeros(2, 1, *fine, dtype=torch.float64)
    found, expected = _upsample_by_products(phi, x), _upsample(phi, x)
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(expected)
    torch.testing.assert_close(*(torch.autograd.grad((y * weights).sum(), phi) for y in (found, expected)))
