"""Norm, residual and leaky ReLU in one op: the kernels of every backend against the twin in fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from op_kernels import kernel_param, on_cuda_kernels, on_kernels, on_the_cpu
from torch import Tensor

from lungkit.errors import UsageError
from lungkit.ops import norm_act as module
from lungkit.ops.norm_act import norm_act, reference

OPS = torch.ops.lungkit
# Shape and groups: one voxel left over everywhere, channels that no vector divides, groups of several channels, long
# images of several chunks.
SHAPES = [
    ((2, 3, 5, 7), 3),
    ((1, 16, 9, 8, 7), 16),
    ((2, 33, 10, 11), 33),
    ((2, 8, 20, 33), 4),
    ((1, 24, 6, 7, 8), 3),
    ((2, 1, 50), 1),
    ((1, 4, 100, 101), 4),
    ((1, 300, 3, 4), 300),
    ((1, 2, 64, 128), 2),
]
# The emulator runs thread by thread: the same kinds in fewer voxels, two chunks included. Channels-last, a block
# holds all voxels of the last four, of the very last in the forward alone.
EMULATED_SHAPES = [
    ((1, 24, 3, 4, 4), 3),
    ((1, 1, 95, 97), 1),
    ((1, 32, 5, 7), 8),
    ((2, 3, 5, 7), 3),
    ((2, 33, 3, 5), 33),
    ((1, 24, 5, 7), 24),
    ((1, 16, 33, 35), 16),
]
# As a share of the largest value: half types round once, on the way out; float sums over a chunk.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
SLOPE = 0.1


def draw(
    shape: tuple[int, ...], dtype: torch.dtype, seed: int, *, channels_last: bool = False, offset: float = 0.0
) -> Tensor:
    tensor = (2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + offset).to(dtype)
    if channels_last and len(shape) > 3:
        order = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
        tensor = tensor.contiguous(memory_format=order)
    return tensor


def parameters(channels: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return draw((channels,), wide, 10), draw((channels,), wide, 11)


def assert_near(found: Tensor, exact: Tensor, limit: float, what: str) -> None:
    assert found.shape == exact.shape, what
    if exact.numel():
        scale = max(float(exact.abs().max()), 1e-3)
        difference = float((found.double() - exact).abs().max()) / scale
        assert difference <= limit, f"{what} differs by {difference:.2g} of the largest, allowed {limit:.2g}"


def check(
    x: Tensor,
    grad: Tensor,
    groups: int,
    *,
    affine: bool = True,
    residual: Tensor | None = None,
    slope: float = SLOPE,
) -> None:
    """Forward and backward against the twin and its autograd in float64."""
    weight, bias = parameters(x.shape[1], x.dtype) if affine else (None, None)
    y, mean, rstd = OPS.norm_act(x, weight, bias, residual, groups, 1e-5, slope)
    kept = None if residual is None else y
    found = OPS.norm_act_backward(grad, x, kept, mean, rstd, weight, bias, slope, residual is not None)
    exact = [
        None if tensor is None else tensor.double().clone().requires_grad_()
        for tensor in (x, weight, bias, residual)
    ]
    expected, expected_mean, expected_rstd = reference(*exact, groups, 1e-5, slope)
    limit = TOLERANCE[x.dtype]
    assert y.dtype == x.dtype
    assert_near(y, expected.detach(), limit, "y")
    # Which side of the activation a voxel next to zero is on is a matter of rounding: gradients go by the kernels' own.
    sums = min(limit, 1e-5)
    assert_near(mean, expected_mean.detach(), sums, "mean")
    assert_near(rstd, expected_rstd.detach(), sums, "rstd")
    wanted = module._reference_backward(
        grad.double(), x.double(), None if kept is None else y.double(), mean.double(), rstd.double(),
        None if weight is None else weight.double(), None if bias is None else bias.double(), slope,
        residual is not None,
    )  # fmt: skip
    for name, one, other in zip(("x", "weight", "bias", "residual"), found, wanted, strict=True):
        assert_near(one, other, limit, f"gradient of {name}")


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@on_kernels("shape, groups", SHAPES, emulated=EMULATED_SHAPES)
def test_every_shape_equals_the_twin(kernels, shape, groups, dtype, channels_last, with_residual):
    x, grad, residual = (
        draw(shape, dtype, seed, channels_last=channels_last, offset=3.0) for seed in range(3)
    )
    check(x, grad, groups, affine=not with_residual, residual=residual if with_residual else None)


@pytest.mark.parametrize("channels_last", [False, True])
def test_the_same_bits_however_the_parts_are_scheduled(schedules, channels_last):
    x, grad = (draw((2, 3, 50, 100), torch.float32, seed, channels_last=channels_last) for seed in (0, 1))
    weight, bias = parameters(3, torch.float32)

    def both():
        y, mean, rstd = OPS.norm_act(x, weight, bias, None, 3, 1e-5, SLOPE)
        return (y, mean, rstd, *OPS.norm_act_backward(grad, x, None, mean, rstd, weight, bias, SLOPE, False))

    schedules.assert_same_bits(both)


@on_cuda_kernels
@pytest.mark.parametrize(("channels", "dtype"), [(264, torch.bfloat16), (520, torch.float64)])
def test_more_channels_than_a_warp_or_a_block_takes_at_a_time_equal_the_twin(kernels, channels, dtype):
    x, grad = (draw((1, channels, 2, 3), dtype, seed, channels_last=True, offset=3.0) for seed in (0, 1))
    check(x, grad, channels // 2)


# Blocks that a large tensor would fill many times over read several batches one after the other; the last one is short.
@pytest.mark.parametrize(
    ("kernels", "channels_last"),
    [kernel_param("emulated-forward", True), kernel_param("cuda", True), kernel_param("cuda", False)],
    indirect=["kernels"],
)
def test_blocks_that_read_several_batches_equal_the_twin(kernels, channels_last):
    shape = (1, 3, 839, 841) if channels_last else (1, 64, 181, 181)
    x, grad = (draw(shape, torch.float32, seed, channels_last=channels_last, offset=300.0) for seed in (0, 1))
    check(x, grad, shape[1])


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("extent", "forward", "backward"), [(30, 1, 2), (96, 3, 3)])
def test_a_channel_that_a_block_holds_takes_one_launch(emulator, extent, forward, backward, channels_last):
    x = draw((1, 4, extent, extent), torch.float32, 0, channels_last=channels_last)
    weight, bias = parameters(4, torch.float32)
    ops = torch.ops.lungkit_emulated
    with emulator.counted() as counts:
        _, mean, rstd = ops.norm_act(x, weight, bias, None, 4, 1e-5, SLOPE)
    assert counts.launches == forward
    with emulator.counted() as counts:
        ops.norm_act_backward(x, x, None, mean, rstd, weight, bias, SLOPE, False)
    assert counts.launches == backward  # the parameters' gradients, sums over images, take one of their own


@pytest.mark.parametrize(("extent", "threads"), [(2, 32), (8, 64), (16, 256)])
def test_a_block_that_holds_a_channel_has_no_more_threads_than_have_a_vector(emulator, extent, threads):
    x = draw((1, 6, extent, extent, extent), torch.bfloat16, 0)
    with emulator.counted() as counts:
        torch.ops.lungkit_emulated.norm_act(x, None, None, None, 6, 1e-5, SLOPE)
    assert (counts.blocks, counts.threads) == (6, 6 * threads)


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t.repeat(1, 2, 1, 1, 1)[:, : t.shape[1]],
        lambda t: t.transpose(3, 4).contiguous().transpose(3, 4),
        lambda t: t.repeat(1, 2, 1, 1, 1).contiguous(memory_format=torch.channels_last_3d)[:, : t.shape[1]],
        lambda t: t[:1].expand_as(t),
        lambda t: t.repeat_interleave(2, 1)[:, ::2],
    ],
    ids=["channel slice", "transposed", "slice of channels-last", "one image", "every second channel"],
)
@pytest.mark.parametrize("which", range(3))
def test_any_strides_equal_the_twin(kernels, which, view):
    tensors = [draw((2, 6, 4, 6, 5), torch.float32, seed) for seed in range(3)]
    tensors[which] = view(tensors[which])
    x, grad, residual = tensors
    check(x, grad, 3, residual=residual)


@pytest.mark.parametrize("slope", [0.0, 0.01, 1.0])
@pytest.mark.parametrize("groups", [6, 2])
def test_the_numbers_are_those_of_torch(groups, slope):
    x, residual = draw((2, 6, 9, 8), torch.float64, 0), draw((2, 6, 9, 8), torch.float64, 1)
    weight, bias = parameters(6, torch.float64)
    found = norm_act(x, weight, bias, groups=groups, residual=residual, slope=slope)
    expected = F.leaky_relu(F.group_norm(x, groups, weight, bias) + residual, slope)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_a_large_mean_costs_no_digits(kernels):
    # E[x^2] - E[x]^2 in float32 would leave nothing of a variance of 1 beside a mean of 30,000.
    x = 30_000 + draw((1, 2, 64, 65), torch.float32, 0) / 2
    for features in (x, x.contiguous(memory_format=torch.channels_last)):
        exact = F.group_norm(features.double(), 2)
        assert float((norm_act(features).double() - exact).abs().max()) < 5e-3  # x itself has steps of 2e-3


def test_statistics_of_half_features_are_float(kernels):
    x = torch.full((1, 1, 300, 300), 1000.0, dtype=torch.float16)
    x[..., ::2] = 1002.0  # the sum is 9e7, the sum of squares 9e10
    y, mean, rstd = OPS.norm_act(x, None, None, None, 1, 0.0, 1.0)
    assert (mean.dtype, mean.item(), rstd.item()) == (torch.float32, 1001.0, 1.0)
    assert y.unique().tolist() == [-1.0, 1.0]


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
@pytest.mark.parametrize("shape", [(2, 6, 3, 5), (2, 3, 31, 35)], ids=["one block", "several blocks"])
def test_weight_and_bias_of_two_dtypes_get_gradients_of_their_own(kernels, shape, dtypes):
    x, grad = (draw(shape, torch.bfloat16, seed) for seed in (0, 1))
    parameters = [draw(shape[1:2], torch.bfloat16, seed) for seed in (2, 3)]
    _, mean, rstd = OPS.norm_act(x, None, None, None, shape[1], 1e-5, SLOPE)

    def gradients(*kinds: torch.dtype) -> list[Tensor]:
        weight, bias = (value.to(kind) for value, kind in zip(parameters, kinds, strict=True))
        return OPS.norm_act_backward(grad, x, None, mean, rstd, weight, bias, SLOPE, False)

    alike = gradients(torch.float32, torch.float32)
    mixed = gradients(*dtypes)
    assert torch.equal(mixed[0], alike[0])
    for found, expected, dtype in zip(mixed[1:3], alike[1:3], dtypes, strict=True):
        torch.testing.assert_close(found, expected.to(dtype))


@pytest.mark.parametrize("channels_last", [False, True])
def test_results_lie_as_the_features_do(kernels, channels_last):
    x = draw((2, 5, 4, 6, 5), torch.float32, 0, channels_last=channels_last).requires_grad_()
    y = norm_act(x, residual=x.detach().contiguous())
    y.backward(torch.ones_like(y, memory_format=torch.contiguous_format))
    assert y.stride() == x.grad.stride() == x.stride()


def test_in_place_overwrites_its_input_where_no_gradient_is_recorded(kernels):
    for channels_last in (False, True):
        x = draw((2, 6, 9, 8), torch.float32, 0, channels_last=channels_last)
        expected = norm_act(x, slope=SLOPE)
        with torch.no_grad():
            y = norm_act(x, slope=SLOPE, in_place=True)
        assert y.data_ptr() == x.data_ptr()
        assert torch.equal(y, expected)


def test_in_place_of_a_view_with_gaps_writes_to_the_view(kernels):
    base = draw((2, 6, 9, 8), torch.float32, 0).contiguous(memory_format=torch.channels_last)
    kept = base.clone()
    expected = norm_act(base[:, :3])
    with torch.no_grad():
        norm_act(base[:, :3], in_place=True)
    assert torch.equal(base[:, :3], expected)
    assert torch.equal(base[:, 3:], kept[:, 3:])


def test_in_place_leaves_its_input_alone_where_a_gradient_is_recorded():
    x = draw((2, 6, 9, 8), torch.float32, 0)
    before = x.clone()
    norm_act(x, in_place=True)
    assert torch.equal(x, before)


def test_backward_keeps_x_and_two_numbers_a_channel():
    kept = []
    x = draw((2, 6, 9, 8), torch.float32, 0).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        norm_act(x, slope=SLOPE)
    assert sorted(tuple(tensor.shape) for tensor in kept) == [(2, 6), (2, 6), (2, 6, 9, 8)]


@pytest.mark.parametrize("shape", [(0, 5, 4, 6), (2, 5, 0, 6)])
def test_nothing_in_gives_nothing_out(kernels, shape):
    x, weight = torch.zeros(shape, requires_grad=True), torch.ones(5, requires_grad=True)
    norm_act(x, weight, slope=SLOPE).sum().backward()
    assert x.grad.shape == shape
    assert float(weight.grad.abs().sum()) == 0


def test_nan_stays_in_its_channel(kernels):
    x = draw((1, 3, 5, 6), torch.float32, 0)
    x[0, 1, 2, 3] = float("nan")
    assert norm_act(x).isnan().flatten(2).all(2).tolist() == [[False, True, False]]


@on_the_cpu
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("groups", [4, 2])
def test_gradcheck(kernels, groups, with_residual):
    x, residual = (draw((2, 4, 3, 5), torch.float64, seed).requires_grad_() for seed in (0, 1))
    weight, bias = (tensor.requires_grad_() for tensor in parameters(4, torch.float64))
    inputs = (x, weight, bias, *([residual] if with_residual else []))

    def run(x, weight, bias, residual=None):
        return norm_act(x, weight, bias, groups=groups, residual=residual, slope=SLOPE)

    assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize("channels_last", [False, True])
def test_opcheck(channels_last):
    x = draw((2, 4, 3, 5), torch.float32, 0, channels_last=channels_last).requires_grad_()
    weight, bias = (tensor.requires_grad_() for tensor in parameters(4, torch.float32))
    torch.library.opcheck(OPS.norm_act.default, (x, weight, bias, None, 4, 1e-5, SLOPE))
    residual = x.detach().clone().requires_grad_()
    torch.library.opcheck(OPS.norm_act.default, (x, weight, bias, residual, 2, 1e-5, SLOPE))
    torch.library.opcheck(
        OPS.norm_act_.default, (x.detach().clone(), weight.detach(), None, None, 4, 1e-5, SLOPE)
    )


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(dynamic):
    torch._dynamo.reset()
    weight, bias = parameters(4, torch.float32)
    run = torch.compile(
        lambda x: norm_act(x, weight, bias, slope=SLOPE, in_place=True), fullgraph=True, dynamic=dynamic
    )
    for size in (6, 9):
        x = draw((2, 4, size, 5), torch.float32, 0)
        torch.testing.assert_close(run(x), norm_act(x, weight, bias, slope=SLOPE))


def test_exported_programs_hold_only_operations_of_torch():
    class Block(torch.nn.Module):
        def forward(self, x):
            return norm_act(x, slope=SLOPE)

    x = draw((2, 4, 6, 5), torch.float32, 0)
    program = torch.export.export(Block(), (x,))
    assert not any("lungkit" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(x), norm_act(x, slope=SLOPE))


def test_forward_mode_derivatives_are_those_of_torch():
    x, tangent = draw((2, 4, 6, 5), torch.float64, 0), draw((2, 4, 6, 5), torch.float64, 1)
    found = torch.func.jvp(lambda t: norm_act(t, slope=SLOPE), (x,), (tangent,))
    expected = torch.func.jvp(lambda t: F.leaky_relu(F.group_norm(t, 4), SLOPE), (x,), (tangent,))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_autocast_keeps_half_features_half():
    x = draw((2, 4, 6, 5), torch.float32, 0)
    weight, bias = parameters(4, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = norm_act(x, weight, bias)
    assert y.dtype == torch.bfloat16


def test_a_second_derivative_is_refused():
    x = draw((2, 4, 5, 6), torch.float32, 0).requires_grad_()
    (gradient,) = torch.autograd.grad(norm_act(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 4)}, r"x must be \(B, C, \*S\)"),
        ({"x": torch.zeros(2, 4, 3, dtype=torch.int32)}, "x must be float64"),
        ({"groups": 3}, "groups must divide the 4 channels of x, got 3"),
        ({"slope": -0.1}, "slope must be at least 0"),
        ({"weight": torch.ones(3)}, r"weight must be \(C,\) = \(4,\), got \(3,\)"),
        ({"bias": torch.ones(4, dtype=torch.float64)}, "bias must have x's dtype"),
        ({"residual": torch.ones(2, 4, 6)}, "residual must have the shape"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    arguments = {"x": torch.zeros(2, 4, 5), **change}
    with pytest.raises(UsageError, match=message):
        norm_act(**arguments)


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (1, torch.ones(3), r"weight must be \(C,\) = \(4,\)"),
        (3, torch.ones(2, 4, 6), "residual must have the shape of x"),
        (4, 3, "groups must divide the 4 channels"),
        (6, -1.0, "slope must be at least 0"),
    ],
)
def test_the_kernels_check_what_they_get(kernels, index, value, message):
    arguments = [torch.zeros(2, 4, 5), None, None, None, 4, 1e-5, SLOPE]
    arguments[index] = value
    with pytest.raises(RuntimeError, match=message):
        OPS.norm_act(*arguments)


def test_a_residual_in_another_order_of_memory_than_a_channels_last_line(kernels):
    x = draw((2, 5, 12), torch.float32, 0).transpose(1, 2).contiguous().transpose(1, 2)
    residual = draw((2, 5, 12), torch.float32, 1)
    expected = norm_act(x.contiguous(), groups=1, residual=residual)
    torch.testing.assert_close(norm_act(x, groups=1, residual=residual), expected)


def test_in_place_refuses_elements_that_share_their_memory(kernels):
    x = torch.ones(1, 3, 8).expand(2, 3, 8)
    with torch.no_grad(), pytest.raises(RuntimeError, match="share their memory"):
        norm_act(x, in_place=True)
