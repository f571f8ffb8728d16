"""Recalibration of features by what the whole patch holds, and by what each voxel holds."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lungkit.nn.blocks import LEAKY_SLOPE
from lungkit.nn.convolution import CONVOLUTIONS
from lungkit.ops.gate_tail import gate_scale, reference_scale


class SpatialChannelSqueezeExcite(nn.Module):
    r"""Concurrent spatial and channel squeeze and excitation (scSE) of features x.

    .. math::
        s = \mathrm{sigmoid}(W_2\, \mathrm{leaky}(W_1\, \overline{x} + b_1) + b_2), \qquad
        q = \mathrm{sigmoid}(w \cdot x + b), \qquad
        \mathrm{out} = s\, x + q\, x

    with :math:`\overline{x}` the mean over the voxels of each channel, s one number a channel and q one a voxel.
    Biases start at zero: both factors are near one half, and the block near the identity. The paper's ReLU is leaky
    here: behind an instance norm the means hardly differ between images, and a unit that is off would be off for all.

    Args:
        dims: 2 or 3.
        channels: C.
        reduction: the inner width is C / reduction, at least 1.

    Shapes:
        (B, C, \*S) -> (B, C, \*S)

    Source: Roy et al., "Concurrent Spatial and Channel 'Squeeze & Excitation' in Fully Convolutional Networks",
    MICCAI 2018, with its sum of the two and its reduction of 2.

    Example:
        >>> import torch
        >>> from lungkit.nn.recalibration import SpatialChannelSqueezeExcite
        >>> SpatialChannelSqueezeExcite(3, 8)(torch.randn(1, 8, 4, 5, 6)).shape
        torch.Size([1, 8, 4, 5, 6])
    """

    def __init__(self, dims: int, channels: int, *, reduction: int = 2) -> None:
        super().__init__()
        inner = max(1, channels // reduction)
        self.squeeze = CONVOLUTIONS[dims](channels, inner, 1)
        self.excite = CONVOLUTIONS[dims](inner, channels, 1)
        self.spatial = CONVOLUTIONS[dims](channels, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        pooled = x.mean(tuple(range(2, x.dim())), keepdim=True)
        of_channels = self.excite(F.leaky_relu(self.squeeze(pooled), LEAKY_SLOPE)).sigmoid()
        of_voxels = self.spatial(x).sigmoid()
        # An exported program holds no op of ours where plain PyTorch does.
        scale = reference_scale if torch.compiler.is_exporting() else gate_scale
        scaled = scale(x, of_voxels)
        return torch.addcmul(scaled, x.to(scaled.dtype), of_channels.to(scaled.dtype))
