"""A level of a residual encoder: a stem where it is the first, then several residual blocks."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lungkit.nn.blocks import ConvBlock, ConvUnit


class ResidualStage(nn.Module):
    """Residual blocks of two convolutions, one after the other; the first carries the stride.

    A shortcut is the input, average-pooled over the stride, then a 1x1 convolution and a norm where channels change.

    Args:
        dims: 2 or 3.
        in_channels: channels of the input.
        out_channels: channels of the result.
        blocks: number of residual blocks.
        stem: begin with one convolution, norm and activation.
        kernel_size, stride, norm, groups, activation: see :class:`lungkit.nn.blocks.ConvUnit`.
        dropout: see :class:`lungkit.nn.blocks.ConvBlock`.
        residual: always; taken so that both kinds of levels have the same options.

    Shapes:
        (B, in_channels, *S) -> (B, out_channels, *S / stride)

    Source: He et al., "Bag of tricks for image classification with convolutional neural networks", 2019 (ResNet-D);
    Isensee et al., "nnU-Net Revisited", MICCAI 2024.

    Example:
        >>> import torch
        >>> from lungkit.nn.residual_stage import ResidualStage
        >>> stage = ResidualStage(2, 1, 4, blocks=2, stem=True, kernel_size=(3, 3))
        >>> stage(torch.zeros(1, 1, 8, 8)).shape, len(stage.blocks)
        (torch.Size([1, 4, 8, 8]), 2)
    """

    def __init__(
        self,
        dims: int,
        in_channels: int,
        out_channels: int,
        *,
        blocks: int,
        kernel_size: tuple[int, ...],
        stem: bool = False,
        stride: tuple[int, ...] | None = None,
        norm: str = "instance",
        groups: int = 8,
        activation: str = "leaky_relu",
        dropout: float = 0.0,
        residual: bool = True,
    ) -> None:
        super().__init__()
        unit: dict[str, Any] = {"norm": norm, "groups": groups, "activation": activation}
        self.stem: nn.Module | None = None
        if stem:
            self.stem = ConvUnit(dims, in_channels, out_channels, kernel_size=kernel_size, **unit)
            in_channels = out_channels
        self.blocks = nn.Sequential(
            *(
                ConvBlock(
                    dims,
                    out_channels if index else in_channels,
                    out_channels,
                    kernel_size=kernel_size,
                    stride=None if index else stride,
                    residual=True,
                    shortcut_projects="channels",
                    dropout=dropout,
                    **unit,
                )
                for index in range(blocks)
            )
        )

    def forward(self, x: Tensor, *, beside: Tensor | None = None) -> Tensor:
        """Features of the level; ``beside`` is added to what the first convolution of the first block gives."""
        x = x if self.stem is None else self.stem(x)
        for index, block in enumerate(self.blocks):
            x = block(x, beside=beside if index == 0 else None)
        return x
