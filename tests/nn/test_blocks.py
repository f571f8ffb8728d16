"""Convolution blocks, upsampling and initialisation."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lungkit.errors import UsageError
from lungkit.nn import UNet
from lungkit.nn.blocks import (
    ACTIVATIONS,
    ConvBlock,
    ConvUnit,
    Upsample,
    branch,
    concatenate,
    initialise,
    make_activation,
    seeded,
)

pytestmark = pytest.mark.usefixtures("one_thread")

LAYOUTS = {2: torch.channels_last, 3: torch.channels_last_3d}
SIZES = {2: (7, 6), 3: (3, 5, 4)}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_is_zero_at_zero_and_grows(name):
    activation = make_activation(name)
    y = activation(torch.tensor([0.0, 1.0, 2.0]))
    assert y[0] == 0
    assert y[1] < y[2]


def test_leaky_relu_has_slope_one_hundredth():
    torch.testing.assert_close(make_activation("leaky_relu")(torch.tensor([-1.0])), torch.tensor([-0.01]))


def test_make_activation_names_an_unknown_one():
    with pytest.raises(UsageError, match=r"activation must be one of .*'silu', got 'swish'"):
        make_activation("swish")


@pytest.mark.parametrize(("norm", "has_bias"), [("instance", False), ("batch", False), ("none", True)])
def test_convolution_has_a_bias_only_without_norm(norm, has_bias):
    unit = ConvUnit(2, 1, 8, kernel_size=(3, 3), norm=norm)
    assert (unit.conv.bias is not None) == has_bias


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("convolutions", [1, 2, 3])
def test_block_has_as_many_convolutions_as_asked(convolutions, residual):
    block = ConvBlock(2, 4, 4, kernel_size=(3, 3), convolutions=convolutions, residual=residual)
    assert sum(isinstance(module, nn.Conv2d) for module in block.modules()) == convolutions


def test_residual_block_with_zero_convolutions_is_its_input():
    block = ConvBlock(2, 4, 4, kernel_size=(3, 3), norm="none", activation="relu", residual=True)
    for parameter in block.parameters():
        nn.init.zeros_(parameter)
    x = torch.rand(1, 4, 6, 6)
    torch.testing.assert_close(block(x), x)


def test_residual_shortcut_follows_channels_and_stride():
    block = ConvBlock(3, 2, 6, kernel_size=(3, 3, 3), stride=(1, 2, 2), residual=True)
    assert block(torch.randn(1, 2, 4, 8, 8)).shape == (1, 6, 4, 4, 4)


def test_dropout_drops_whole_channels_in_training_only():
    torch.manual_seed(0)
    block = ConvBlock(2, 1, 64, kernel_size=(3, 3), norm="none", activation="relu", dropout=0.5)
    nn.init.ones_(block.units[1].conv.bias)
    nn.init.zeros_(block.units[1].conv.weight)
    values = block(torch.randn(1, 1, 4, 4)).flatten(2)
    assert bool((values == values[..., :1]).all())
    assert set(values[0, :, 0].tolist()) == {0.0, 2.0}
    assert bool((block.eval()(torch.randn(1, 1, 4, 4)) == 1).all())


@pytest.mark.parametrize("mode", ["transposed", "interpolate"])
def test_upsample_multiplies_the_grid_by_the_stride(mode):
    up = Upsample(3, 4, 2, stride=(1, 2, 3), mode=mode)
    assert up(torch.randn(1, 4, 3, 4, 5)).shape == (1, 2, 3, 8, 15)


def test_interpolating_upsample_equals_interpolation_before_the_convolution():
    up = Upsample(2, 4, 2, stride=(2, 2), mode="interpolate")
    x = torch.randn(1, 4, 5, 6)
    before = nn.functional.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
    torch.testing.assert_close(up(x), up.conv(before))


def test_upsample_names_an_unknown_mode():
    with pytest.raises(
        UsageError, match="upsampling must be one of 'transposed', 'interpolate', got 'nearest'"
    ):
        Upsample(2, 4, 2, stride=(2, 2), mode="nearest")


@pytest.mark.parametrize("kernel", [1, 3])
def test_initialisation_keeps_the_variance_of_a_leaky_relu_stack(kernel):
    torch.manual_seed(0)
    layers = [
        layer
        for _ in range(8)
        for layer in (
            nn.Conv2d(64, 64, kernel, padding=kernel // 2, padding_mode="circular"),
            nn.LeakyReLU(0.01),
        )
    ]
    stack = nn.Sequential(*layers).apply(initialise)
    square = stack(torch.randn(4, 64, 16, 16)).square().mean()
    assert 0.5 < square < 2


def test_initialisation_keeps_the_variance_of_a_transposed_convolution():
    torch.manual_seed(0)
    layer = nn.ConvTranspose2d(64, 32, 2, 2).apply(initialise)
    assert 0.9 < layer(torch.randn(4, 64, 16, 16)).var() < 1.1


def _forked(x, dims, *, read=branch):
    """Gradient of what reads ``x`` twice, once beside other features; and the features beside which it lay."""
    joined = concatenate(x.detach() + 1, read(x))
    weight = torch.arange(joined.numel()).reshape(joined.shape).to(x.dtype) / joined.numel()
    (gradient,) = torch.autograd.grad(
        (joined * weight.to(memory_format=LAYOUTS[dims])).sum() + (x * x).sum(), x
    )
    return gradient, joined


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("layout", ["channels-last", "channels-first"])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("dims", [2, 3])
def test_branch_changes_no_number_and_no_layout(dims, batch, layout, dtype):
    order = LAYOUTS[dims] if layout == "channels-last" else torch.contiguous_format
    x = torch.randn(batch, 4, *SIZES[dims]).to(dtype).contiguous(memory_format=order).requires_grad_()
    gradient, joined = _forked(x, dims)
    expected, plainly = _forked(x, dims, read=lambda x: x)
    assert torch.equal(gradient, expected)
    assert joined.stride() == plainly.stride()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_branch_packs_the_gradient_of_a_part_of_wider_rows(dtype):
    x = torch.randn(2, 4, 5, 3).to(dtype).requires_grad_()
    rows = torch.randn(2, 9, 5, 3).to(dtype).contiguous(memory_format=torch.channels_last)
    (packed,) = torch.autograd.grad(branch(x), x, rows[:, 2:6])
    assert torch.equal(packed, rows[:, 2:6])
    assert packed.is_contiguous(memory_format=torch.channels_last)


def test_branch_is_nothing_where_nothing_is_gained():
    x = torch.randn(1, 2, 3, 3, requires_grad=True)
    assert branch(x) is x
    half = x.detach().bfloat16()
    assert branch(half) is half


def test_seeded_gives_the_random_state_back():
    before = torch.get_rng_state()
    with seeded(7):
        torch.rand(5)
    assert torch.equal(torch.get_rng_state(), before)


def test_seeded_with_none_draws_from_the_global_state():
    before = torch.get_rng_state()
    with seeded(None):
        torch.rand(5)
    assert not torch.equal(torch.get_rng_state(), before)


def test_nothing_is_drawn_without_memory(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("weights are drawn on the meta device")

    monkeypatch.setattr(torch.nn.init, "normal_", refuse)
    monkeypatch.setattr(torch.nn.init, "kaiming_normal_", refuse)
    with torch.device("meta"):
        network = UNet(2, features=(4, 8))
    assert all(weight.is_meta for weight in network.parameters())
