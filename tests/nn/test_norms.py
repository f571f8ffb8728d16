"""Norms by name, and the instance norm: torch's numbers in both memory layouts."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lungkit.errors import UsageError
from lungkit.nn.norms import GroupNorm, InstanceNorm, make_norm

pytestmark = pytest.mark.usefixtures("one_thread")

LAYOUTS = {2: torch.channels_last, 3: torch.channels_last_3d}
SIZES = {2: (7, 6), 3: (3, 5, 4)}
TORCH_INSTANCE_NORMS = {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}


def random_norm_pair(dims: int, channels: int, affine: bool) -> tuple[nn.Module, nn.Module]:
    ours = InstanceNorm(channels, affine=affine).double()
    theirs = TORCH_INSTANCE_NORMS[dims](channels, affine=affine).double()
    if affine:
        nn.init.normal_(ours.weight)
        nn.init.normal_(ours.bias)
        theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dims", [2, 3])
def test_instance_norm_equals_torch_in_output_and_gradients(dims, channels_last, affine):
    torch.manual_seed(0)
    ours, theirs = random_norm_pair(dims, 5, affine)
    layout = LAYOUTS[dims] if channels_last else torch.contiguous_format
    x = (3 + torch.randn(2, 5, *SIZES[dims], dtype=torch.float64)).to(memory_format=layout).requires_grad_()
    weight = torch.randn_like(x)
    results = []
    for norm in (ours, theirs):
        y = norm(x)
        inputs = [x, *norm.parameters()]
        results.append((y, *torch.autograd.grad((y * weight).sum(), inputs)))
    for mine, expected in zip(*results, strict=True):
        torch.testing.assert_close(mine, expected)


@pytest.mark.parametrize("dims", [2, 3])
def test_instance_norm_keeps_channels_last(dims):
    x = torch.randn(2, 4, *SIZES[dims]).to(memory_format=LAYOUTS[dims]).requires_grad_()
    y = InstanceNorm(4)(x)
    (gradient,) = torch.autograd.grad(y.square().sum(), x)
    assert y.is_contiguous(memory_format=LAYOUTS[dims])
    assert gradient.is_contiguous(memory_format=LAYOUTS[dims])


def test_instance_norm_takes_a_gradient_in_another_layout():
    torch.manual_seed(0)
    norm = InstanceNorm(4).double()
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64).to(memory_format=torch.channels_last).requires_grad_()
    dy = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    (got,) = torch.autograd.grad(norm(x), x, dy)
    (expected,) = torch.autograd.grad(norm(x), x, dy.to(memory_format=torch.channels_last))
    torch.testing.assert_close(got, expected)


def test_instance_norm_refuses_a_silent_second_derivative():
    x = torch.randn(2, 4, 5, 6).to(memory_format=torch.channels_last).requires_grad_()
    (gradient,) = torch.autograd.grad(InstanceNorm(4)(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()


def test_instance_norm_compiles_whole_in_channels_last():
    norm = InstanceNorm(4)
    x = torch.randn(2, 4, 5, 6).to(memory_format=torch.channels_last)
    compiled = torch.compile(norm, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), norm(x))


def test_instance_norm_takes_an_empty_batch():
    assert InstanceNorm(4)(torch.empty(0, 4, 5, 6)).shape == (0, 4, 5, 6)


@pytest.mark.parametrize(
    ("name", "kind"), [("instance", InstanceNorm), ("group", GroupNorm), ("none", nn.Identity)]
)
def test_make_norm_by_name(name, kind):
    assert type(make_norm(name, 2, 16)) is kind


@pytest.mark.parametrize(("dims", "kind"), [(2, nn.BatchNorm2d), (3, nn.BatchNorm3d)])
def test_make_norm_takes_the_batch_norm_of_the_dims(dims, kind):
    assert type(make_norm("batch", dims, 4)) is kind


def test_make_norm_names_an_unknown_norm():
    with pytest.raises(
        UsageError, match="norm must be one of 'instance', 'batch', 'group', 'none', got 'layer'"
    ):
        make_norm("layer", 2, 4)


def test_make_norm_names_groups_that_do_not_divide():
    with pytest.raises(
        UsageError, match="groups must divide the channels of every level, got 8 for 12 channels"
    ):
        make_norm("group", 2, 12)
