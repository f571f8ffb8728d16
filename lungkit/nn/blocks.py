"""Building blocks of the networks: convolution blocks, upsampling and initialisation."""

from __future__ import annotations

import contextlib
import math
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lungkit.errors import UsageError
from lungkit.nn.convolution import CHANNELS_LAST, CONVOLUTIONS, TRANSPOSED_CONVOLUTIONS
from lungkit.nn.norms import GroupNorm, make_norm
from lungkit.ops._context import runs_plainly

_DROPOUTS: dict[int, Any] = {2: nn.Dropout2d, 3: nn.Dropout3d}
AVERAGE_POOLS: dict[int, Any] = {2: nn.AvgPool2d, 3: nn.AvgPool3d}
_INTERPOLATION = {2: "bilinear", 3: "trilinear"}

UPSAMPLINGS = ("transposed", "interpolate")
LEAKY_SLOPE = 0.01
# The first three overwrite their input: neither a norm nor a convolution needs its output for the backward pass.
_ACTIVATIONS = {
    "leaky_relu": lambda: nn.LeakyReLU(LEAKY_SLOPE, inplace=True),
    "relu": lambda: nn.ReLU(inplace=True),
    "elu": lambda: nn.ELU(inplace=True),
    "gelu": nn.GELU,
    "silu": nn.SiLU,
}
ACTIVATIONS = tuple(_ACTIVATIONS)


def make_activation(activation: str) -> nn.Module:
    """Activation layer by name; leaky ReLU has slope 0.01.

    Raises:
        UsageError: unknown name.

    Example:
        >>> from lungkit.nn.blocks import make_activation
        >>> make_activation("relu")
        ReLU(inplace=True)
    """
    if activation not in _ACTIVATIONS:
        raise UsageError(f"activation must be one of {', '.join(map(repr, ACTIVATIONS))}, got {activation!r}")
    return _ACTIVATIONS[activation]()


def concatenate(first: Tensor, second: Tensor) -> Tensor:
    """``torch.cat`` along the channels, fast for channels-last volumes on a GPU, which torch copies one by one.

    Example:
        >>> import torch
        >>> from lungkit.nn.blocks import concatenate
        >>> concatenate(torch.zeros(1, 2, 4, 4), torch.ones(1, 3, 4, 4)).shape
        torch.Size([1, 5, 4, 4])
    """
    if first.is_cuda and first.dim() == 5:
        order = torch.channels_last_3d
        if first.is_contiguous(memory_format=order) and second.is_contiguous(memory_format=order):
            return torch.cat((first.movedim(1, -1), second.movedim(1, -1)), dim=-1).movedim(-1, 1)
    return torch.cat((first, second), dim=1)


class _Branch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.detach()  # a view may have another stride along a batch of one, and torch.cat minds

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (gradient,) = gradients
        channels_last = gradient.dim() > 3 and gradient.stride(1) == 1
        return gradient.contiguous(
            memory_format=CHANNELS_LAST[gradient.dim() - 2] if channels_last else torch.contiguous_format
        )


def branch(x: Tensor) -> Tensor:
    """``x`` for one of its readers. On a CPU a half gradient from there is packed before torch adds the others to it.

    A reader that concatenates ``x`` gives back a part of wider rows, and torch adds such parts of half features a row
    at a time: on two threads 1 x 16 x 64^3 channels-last bfloat16 features in 3.2 ms; packing and adding take 1.2.

    Example:
        >>> import torch
        >>> from lungkit.nn.blocks import branch
        >>> branch(torch.ones(1, 2, 4, 4)).shape
        torch.Size([1, 2, 4, 4])
    """
    packs = x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16) and x.requires_grad
    return cast(Tensor, _Branch.apply(x)) if packs and runs_plainly() else x


class ConvUnit(nn.Sequential):
    """Convolution, norm, activation; the last two as asked for.

    The convolution has a bias only where no norm follows: a norm subtracts it again.

    Args:
        dims: 2 or 3.
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: odd size along each axis; zero padding keeps the grid (divided by ``stride``).
        stride: stride along each axis.
        norm: see :func:`lungkit.nn.norms.make_norm`.
        groups: groups of a group norm.
        activation: see :func:`make_activation`; None for none.

    Shapes:
        (B, in_channels, *S) -> (B, out_channels, *ceil(S / stride))

    Example:
        >>> import torch
        >>> from lungkit.nn.blocks import ConvUnit
        >>> unit = ConvUnit(2, 1, 4, kernel_size=(3, 3), stride=(2, 2))
        >>> unit(torch.zeros(1, 1, 8, 8)).shape
        torch.Size([1, 4, 4, 4])
    """

    def __init__(
        self,
        dims: int,
        in_channels: int,
        out_channels: int,
        *,
        kernel_size: tuple[int, ...],
        stride: tuple[int, ...] | int = 1,
        norm: str = "instance",
        groups: int = 8,
        activation: str | None = "leaky_relu",
    ) -> None:
        layers: OrderedDict[str, nn.Module] = OrderedDict(
            conv=CONVOLUTIONS[dims](
                in_channels,
                out_channels,
                kernel_size,
                stride=stride,
                padding=tuple(k // 2 for k in kernel_size),
                bias=norm == "none",
            )
        )
        if norm != "none":
            layers["norm"] = make_norm(norm, dims, out_channels, groups=groups)
        if activation is not None:
            layers["act"] = make_activation(activation)
        super().__init__(layers)

    def forward(
        self,
        input: Tensor,
        *,
        beside: Tensor | None = None,
        residual: Tensor | None = None,
        activation: nn.Module | None = None,
    ) -> Tensor:
        """``activation(norm(conv(input) + beside) + residual)``, with the unit's own activation where it has one."""
        layers = dict(self.named_children())
        x = layers["conv"](input)
        x = x if beside is None else x + beside
        return _finish(x, layers.get("norm"), layers.get("act", activation), residual)


def _finish(
    x: Tensor, norm: nn.Module | None, activation: nn.Module | None, residual: Tensor | None
) -> Tensor:
    """``activation(norm(x) + residual)``: one op where it can be; x, which nobody else has seen, may be overwritten."""
    slope = _slope_of(activation)
    if isinstance(norm, GroupNorm) and slope is not None:
        out: Tensor = norm(x, slope=slope, residual=residual, in_place=True)
        return out
    x = x if norm is None else norm(x)
    x = x if residual is None else x + residual
    return x if activation is None else activation(x)


def _slope_of(activation: nn.Module | None) -> float | None:
    """Slope for negative values where the activation is a leaky ReLU, a ReLU or none."""
    if activation is None:
        return 1.0
    if isinstance(activation, nn.ReLU):
        return 0.0
    return activation.negative_slope if isinstance(activation, nn.LeakyReLU) else None


class ConvBlock(nn.Module):
    """Several convolution units at one level; the first carries the stride.

    With ``residual`` the last activation follows the sum with a shortcut: the input itself, or where channels or
    grid change its average pool over the stride, a 1x1 convolution and a norm.

    Args:
        dims, in_channels, out_channels, kernel_size, stride, norm, groups, activation: see :class:`ConvUnit`.
        convolutions: number of convolutions.
        residual: add the shortcut.
        shortcut_projects: the shortcut has its convolution where channels or grid "change", or for new "channels" only
            (ResNet-D's way).
        dropout: probability with which a whole channel of the block's output becomes zero in training.

    Shapes:
        (B, in_channels, *S) -> (B, out_channels, *S / stride)

    Source: Isensee et al., "nnU-Net", Nature Methods 2021; He et al., "Deep residual learning", 2016.

    Example:
        >>> import torch
        >>> from lungkit.nn.blocks import ConvBlock
        >>> block = ConvBlock(3, 2, 4, kernel_size=(1, 3, 3), stride=(1, 2, 2), residual=True)
        >>> block(torch.zeros(1, 2, 4, 8, 8)).shape
        torch.Size([1, 4, 4, 4, 4])
    """

    def __init__(
        self,
        dims: int,
        in_channels: int,
        out_channels: int,
        *,
        kernel_size: tuple[int, ...],
        stride: tuple[int, ...] | None = None,
        convolutions: int = 2,
        norm: str = "instance",
        groups: int = 8,
        activation: str = "leaky_relu",
        residual: bool = False,
        shortcut_projects: Literal["change", "channels"] = "change",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        stride = stride or (1,) * dims
        units = []
        for index in range(convolutions):
            last = index == convolutions - 1
            units.append(
                ConvUnit(
                    dims,
                    in_channels if index == 0 else out_channels,
                    out_channels,
                    kernel_size=kernel_size,
                    stride=stride if index == 0 else 1,
                    norm=norm,
                    groups=groups,
                    activation=None if residual and last else activation,
                )
            )
        self.units = nn.Sequential(*units)
        self.shortcut: nn.Module | None = None
        self.act: nn.Module | None = None
        if residual:
            self.act = make_activation(activation)
            projects = in_channels != out_channels or (
                shortcut_projects == "change" and math.prod(stride) > 1
            )
            self.shortcut = _shortcut(dims, in_channels, out_channels, stride, norm, groups, projects)
        self.dropout = _DROPOUTS[dims](dropout) if dropout else None

    def forward(self, x: Tensor, *, beside: Tensor | None = None) -> Tensor:
        """Features of the level; ``beside`` is added to what the first convolution gives, before its norm."""
        last = len(self.units) - 1
        out = x
        for index, unit in enumerate(self.units):
            end: dict[str, Any] = {}
            if self.shortcut is not None and index == last:
                end = {"residual": self.shortcut(x), "activation": self.act}
            out = unit(out, beside=beside if index == 0 else None, **end)
        return out if self.dropout is None else self.dropout(out)


def _shortcut(
    dims: int,
    in_channels: int,
    out_channels: int,
    stride: tuple[int, ...],
    norm: str,
    groups: int,
    projects: bool,
) -> nn.Module:
    layers: list[nn.Module] = []
    if math.prod(stride) > 1:
        layers.append(AVERAGE_POOLS[dims](stride, stride))
    if projects:
        one = (1,) * dims
        layers.append(
            ConvUnit(
                dims, in_channels, out_channels, kernel_size=one, norm=norm, groups=groups, activation=None
            )
        )
    return nn.Sequential(*layers)


class Upsample(nn.Module):
    """From a coarse level to the next finer one: grid times ``stride``, channels to ``out_channels``.

    Args:
        dims: 2 or 3.
        in_channels: channels of the coarse features.
        out_channels: channels of the result.
        stride: factor along each axis.
        mode: "transposed" is a transposed convolution with kernel = stride (no checkerboard overlap);
            "interpolate" a 1x1 convolution on the coarse grid followed by linear interpolation. Both are linear
            and the convolution is pointwise, so the order gives the same numbers at a fraction of the work.

    Shapes:
        (B, in_channels, *S) -> (B, out_channels, *S * stride)

    Example:
        >>> import torch
        >>> from lungkit.nn.blocks import Upsample
        >>> Upsample(2, 8, 4, stride=(2, 2))(torch.zeros(1, 8, 4, 4)).shape
        torch.Size([1, 4, 8, 8])
    """

    def __init__(
        self,
        dims: int,
        in_channels: int,
        out_channels: int,
        *,
        stride: tuple[int, ...],
        mode: str = "transposed",
    ) -> None:
        super().__init__()
        if mode not in UPSAMPLINGS:
            raise UsageError(f"upsampling must be one of {', '.join(map(repr, UPSAMPLINGS))}, got {mode!r}")
        self.scale = None
        if mode == "transposed":
            self.conv = TRANSPOSED_CONVOLUTIONS[dims](in_channels, out_channels, stride, stride=stride)
        else:
            self.conv = CONVOLUTIONS[dims](in_channels, out_channels, 1)
            self.scale = stride
            self.mode = _INTERPOLATION[dims]

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.scale is None:
            return x
        size = [n * s for n, s in zip(x.shape[2:], self.scale, strict=True)]
        return F.interpolate(x, size=size, mode=self.mode, align_corners=False)


def initialise(module: nn.Module) -> None:
    """Draw the weights of one layer after He et al.; biases become zero. For ``Module.apply``.

    Convolutions: normal with variance 2 / ((1 + slope^2) fan_in), the slope being that of the leaky ReLU.
    Transposed convolutions with kernel = stride reach each output voxel from one input voxel, and no activation
    follows them: variance 1 / in_channels.

    Source: He et al., "Delving deep into rectifiers", 2015.

    Example:
        >>> import torch
        >>> from lungkit.nn.blocks import initialise
        >>> _ = torch.manual_seed(0)
        >>> layer = torch.nn.Conv2d(64, 64, 3)
        >>> _ = layer.apply(initialise)
        >>> bool(abs(layer.weight.std() - (2 / (64 * 9)) ** 0.5) < 1e-3), bool((layer.bias == 0).all())
        (True, True)
    """
    if any(weight.is_meta for weight in module.parameters(recurse=False)):
        return  # nothing to draw; PyTorch would import its compiler for it, which takes over a second
    if isinstance(module, (nn.ConvTranspose2d, nn.ConvTranspose3d)):
        nn.init.normal_(module.weight, std=module.in_channels**-0.5)
    elif isinstance(module, (nn.Conv2d, nn.Conv3d)):
        nn.init.kaiming_normal_(module.weight, a=LEAKY_SLOPE, nonlinearity="leaky_relu")
    else:
        return
    if module.bias is not None:
        nn.init.zeros_(module.bias)


@contextlib.contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Draw from ``seed`` inside the block and give the global CPU random state back after it; None does nothing.

    Example:
        >>> import torch
        >>> from lungkit.nn.blocks import seeded
        >>> with seeded(3):
        ...     first = torch.rand(2)
        >>> with seeded(3):
        ...     bool((first == torch.rand(2)).all())
        True
    """
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would reseed the accelerators too, and nobody would give their state back.
        torch.random.default_generator.manual_seed(seed)
        yield
