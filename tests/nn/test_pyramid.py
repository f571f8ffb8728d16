"""Multi-scale input: the sum of two convolutions is the paper's convolution of the concatenation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lungkit.nn import UNet
from lungkit.nn.pyramid import InputPyramid

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("dims", [2, 3])
def test_equals_concatenation_before_the_first_convolution_of_the_level(dims):
    network = UNet(dims, features=(4, 6, 8), norm="none", input_pyramid=True, seed=0).double()
    convolve, pool = (F.conv2d, F.avg_pool2d) if dims == 2 else (F.conv3d, F.avg_pool3d)
    torch.manual_seed(0)
    x = torch.randn(2, 1, *(8, 16, 12)[:dims], dtype=torch.float64)
    fine, pooled = network.encoder[0](x), pool(x, 2)
    unit, mix = network.pyramid.units[0], network.pyramid.mixes[0]
    block = network.encoder[1]
    strided = block.units[0].conv
    own = F.leaky_relu(convolve(pooled, unit.conv.weight, unit.conv.bias, padding=1), 0.01)
    # A strided convolution is every second voxel of the dense one; beside it lie the pooled image's features.
    dense = convolve(fine, strided.weight, strided.bias, padding=1)[(..., *(slice(None, None, 2),) * dims)]
    concatenated = torch.cat((dense, own), dim=1)
    identity = torch.eye(6, dtype=torch.float64).reshape(6, 6, *(1,) * dims)
    weight = torch.cat((F.pad(identity, (1, 1) * dims), mix.weight), dim=1)
    expected = F.leaky_relu(convolve(concatenated, weight, padding=1), 0.01)
    expected = block.units[1](expected)
    torch.testing.assert_close(block(fine, beside=network.pyramid(x)[0]), expected)


def test_levels_follow_the_strides_of_the_network():
    pyramid = InputPyramid(3, 2, (4, 6, 8), strides=((1, 2, 2), (2, 2, 1)), kernel_sizes=((3, 3, 3),) * 3)
    sizes = [tuple(out.shape) for out in pyramid(torch.randn(1, 2, 4, 8, 8))]
    assert sizes == [(1, 6, 4, 4, 4), (1, 8, 2, 2, 4)]
