"""scSE: its numbers and gradients are those of plain PyTorch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lungkit.nn.recalibration import SpatialChannelSqueezeExcite

pytestmark = pytest.mark.usefixtures("one_thread")


def plain(block: SpatialChannelSqueezeExcite, x: torch.Tensor) -> torch.Tensor:
    axes = tuple(range(2, x.dim()))
    channels = block.excite(F.leaky_relu(block.squeeze(x.mean(axes, keepdim=True)), 0.01)).sigmoid()
    return x * channels + x * block.spatial(x).sigmoid()


@pytest.mark.parametrize("dims", [2, 3])
def test_numbers_and_gradients_are_those_of_plain_pytorch(dims):
    torch.manual_seed(0)
    block = SpatialChannelSqueezeExcite(dims, 6).double()
    x = torch.randn(2, 6, *(5, 4, 3)[:dims], dtype=torch.float64, requires_grad=True)
    results = []
    for out in (block(x), plain(block, x)):
        results.append((out, *torch.autograd.grad(out.square().sum(), [x, *block.parameters()])))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


def test_bfloat16_stays_near_the_full_numbers():
    torch.manual_seed(0)
    block, x = SpatialChannelSqueezeExcite(2, 8), torch.randn(1, 8, 6, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = block(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), block(x), atol=0.05, rtol=0.02)


def test_an_exported_program_needs_no_op_of_ours():
    block = SpatialChannelSqueezeExcite(2, 4).eval()
    program = torch.export.export(block, (torch.randn(1, 4, 6, 6),))
    assert not any("lungkit" in str(node.target) for node in program.graph.nodes)
