"""The Attention U-Net of MONAI: same numbers, same weights, the gates computed by the fused op."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn

from lungkit.errors import CheckpointError, UsageError
from lungkit.nn import _options
from lungkit.nn._foreign_weights import check_fits
from lungkit.nn._grid import check_image, crop_to, pad_to_multiple, scales_of
from lungkit.nn.attention_gate import MonaiAttentionGate
from lungkit.nn.blocks import branch, concatenate, seeded
from lungkit.nn.convolution import CONVOLUTIONS, TRANSPOSED_CONVOLUTIONS
from lungkit.nn.norms import BATCH_NORMS, InstanceNorm


class MonaiAttentionUNet(nn.Module):
    r"""Attention U-Net as MONAI builds it, for its weights: loads the state dict of ``AttentionUnet``.

    Against :class:`lungkit.nn.AttentionUNet`: batch norm and ReLU in the encoder; the gating signal is the
    upsampled decoder feature, so the gate works on one grid; the gate has batch norms; one convolution with
    instance norm and PReLU merges. The output equals MONAI's to rounding, in training and evaluation mode.

    Args:
        dims: 2 or 3 spatial axes.
        in_channels: channels of the image.
        out_channels: K, classes of the logits.
        features: MONAI's ``channels``, finest level first.
        strides: an integer for all steps, or one entry per step, an integer or one integer per axis.
        kernel_size: odd; an integer or one per axis, as in MONAI (not per level).
        up_kernel_size: odd; of the transposed convolutions; an integer or one per axis.
        dropout: probability of dropping a value, in training.
        gate: "auto" computes the gates by the fused op where it is available, "reference" in plain PyTorch.
        padding: "auto" repeats the last voxels of sizes that the strides do not divide and crops the results
            back (MONAI's own network stops at such sizes); "error" refuses them.
        seed: seed of the initial weights (PyTorch's default initialisation, as in MONAI); the global random
            state is left as it was. None draws from the global random state.

    Shapes:
        x (B, in_channels, \*S) -> logits (B, K, \*S); ``return_attention=True`` gives ``(logits, maps)``, one map
        (B, 1, \*S_l) per gate, finest first, at the size of its level.

    Raises:
        UsageError: an argument out of range, or an input that does not fit.

    Source: MONAI 1.6.1, ``monai.networks.nets.AttentionUnet``; Oktay et al., "Attention U-Net", 2018.

    Example:
        >>> import torch
        >>> from lungkit.nn import MonaiAttentionUNet
        >>> network = MonaiAttentionUNet(2, features=(8, 16, 32))
        >>> network(torch.randn(2, 1, 32, 32)).shape
        torch.Size([2, 2, 32, 32])
        >>> same = MonaiAttentionUNet.from_monai_state_dict(network.monai_state_dict())
        >>> same.config["features"]
        [8, 16, 32]
    """

    name = "monai-attention-unet"

    def __init__(
        self,
        dims: int = 2,
        in_channels: int = 1,
        out_channels: int = 2,
        *,
        features: Sequence[int] = (16, 32, 64, 128),
        strides: _options.LevelValue = 2,
        kernel_size: int | Sequence[int] = 3,
        up_kernel_size: int | Sequence[int] = 3,
        dropout: float = 0.0,
        gate: Literal["auto", "reference"] = "auto",
        padding: Literal["auto", "error"] = "auto",
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.dims = dims = _options.check_dims(dims)
        self.in_channels = _options.check_integer("in_channels", in_channels)
        self.out_channels = _options.check_integer("out_channels", out_channels)
        self.features = _options.check_features(features)
        if min(self.features[:-1]) < 2:
            raise UsageError(f"features must be 2 or more at every gate, got {features!r}")
        levels = len(self.features)
        self.strides = _options.per_level_per_axis("strides", strides, levels=levels - 1, dims=dims)
        self.scales = scales_of(self.strides, dims)
        self.padding = _options.check_choice("padding", padding, ("auto", "error"))
        dropout = _options.check_probability("dropout", dropout)
        _options.check_choice("gate", gate, ("auto", "reference"))
        odd: dict[str, Any] = {"dims": dims, "fits": _options.is_odd, "rule": "an odd integer"}
        kernel = _options.per_axis("kernel_size", kernel_size, **odd)
        up_kernel = _options.per_axis("up_kernel_size", up_kernel_size, **odd)
        if seed is not None:
            _options.check_integer("seed", seed, minimum=0)
        self._config: dict[str, Any] = {
            "name": self.name,
            "dims": dims,
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "features": self.features,
            "strides": self.strides,
            "kernel_size": kernel,
            "up_kernel_size": up_kernel,
            "dropout": dropout,
            "gate": gate,
            "padding": self.padding,
            "seed": seed,
        }
        with seeded(seed):
            self.encoder = nn.ModuleList(
                nn.Sequential(
                    _unit(dims, before, width, kernel, stride, dropout=dropout),
                    _unit(dims, width, width, kernel, (1,) * dims, dropout=dropout),
                )
                for before, width, stride in zip(
                    [self.in_channels, *self.features[:-1]],
                    self.features,
                    [(1,) * dims, *self.strides],
                    strict=True,
                )
            )
            skips = list(zip(self.features[:-1], self.features[1:], self.strides, strict=True))
            self.upsample = nn.ModuleList(
                _unit(dims, coarse, fine, up_kernel, stride, transposed=True)
                for fine, coarse, stride in skips
            )
            self.gates = nn.ModuleList(
                MonaiAttentionGate(dims, f_int=fine // 2, f_g=fine, f_l=fine, implementation=gate)
                for fine, _, _ in skips
            )
            self.decoder = nn.ModuleList(_merge(dims, fine, dropout) for fine, _, _ in skips)
            self.head = CONVOLUTIONS[dims](self.features[0], self.out_channels, 1)

    @property
    def config(self) -> dict[str, Any]:
        """Constructor arguments in plain types, with the name: ``build_model(**config)`` builds the network again."""
        return {key: _options.plain(value) for key, value in self._config.items()}

    def forward(
        self, x: Tensor, *, return_attention: bool = False
    ) -> Tensor | tuple[Tensor, tuple[Tensor, ...]]:
        multiple = self.scales[-1]
        check_image(x, dims=self.dims, channels=self.in_channels, multiple=multiple, padding=self.padding)
        size = x.shape[2:]
        x = pad_to_multiple(x, multiple)
        skips = []
        for block in self.encoder:
            x = block(x)
            skips.append(x)
        maps: list[Tensor] = []
        for level in reversed(range(len(self.decoder))):
            g = self.upsample[level](x)
            skip, alpha = self.gates[level](g, skips[level], return_attention=True)
            x = self.decoder[level](concatenate(skip, branch(g)))
            if return_attention:
                maps.insert(0, crop_to(alpha, size, self.scales[level]))
        logits = crop_to(self.head(x), size, self.scales[0])
        return (logits, tuple(maps)) if return_attention else logits

    def monai_state_dict(self) -> dict[str, Tensor]:
        """State dict under MONAI's names, for ``monai.networks.nets.AttentionUnet.load_state_dict``."""
        state = self.state_dict()
        return {theirs: state[ours] for ours, theirs in self._names().items()}

    def load_monai_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Load the state dict of a MONAI ``AttentionUnet`` of the same shape.

        Args:
            state_dict: names and tensors as ``AttentionUnet.state_dict()`` gives them.

        Raises:
            CheckpointError: names are missing or unexpected, or shapes differ; the message lists them. Nothing
                is loaded then.
        """
        names = self._names()
        check_fits(
            self.state_dict(),
            names,
            state_dict,
            "does not fit this MonaiAttentionUNet",
            "Build the network with the channels, strides and kernel sizes of the MONAI network",
        )
        self.load_state_dict({ours: state_dict[theirs] for ours, theirs in names.items()})

    @classmethod
    def from_monai_state_dict(
        cls, state_dict: Mapping[str, Tensor], *, strides: _options.LevelValue = 2, **options: Any
    ) -> MonaiAttentionUNet:
        """Build the network that a MONAI ``AttentionUnet`` state dict belongs to, and load it.

        Axes, channels and kernel sizes are read off the tensors.

        Args:
            state_dict: as ``AttentionUnet.state_dict()`` gives it.
            strides: those of the MONAI network; its weights do not show them.
            **options: ``dropout``, ``gate`` and ``padding`` of the constructor.

        Raises:
            CheckpointError: not the state dict of an ``AttentionUnet``.
            UsageError: ``strides`` does not fit the number of levels.
        """
        first = [state_dict.get(f"{name}.conv.0.conv.weight") for name in _encoder_names(state_dict)]
        up = state_dict.get("model.1.upconv.up.conv.weight")
        head = state_dict.get("model.2.conv.weight")
        weights = [weight for weight in first if weight is not None]
        if len(weights) < 2 or up is None or head is None:
            raise CheckpointError(
                "not the state dict of a MONAI AttentionUnet: names such as model.0.conv.0.conv.weight, "
                f"model.1.upconv.up.conv.weight and model.2.conv.weight are expected, got "
                f"{', '.join(list(state_dict)[:3]) or 'none'}"
            )
        network = cls(
            weights[0].dim() - 2,
            weights[0].shape[1],
            head.shape[0],
            features=[weight.shape[0] for weight in weights],
            strides=strides,
            kernel_size=tuple(weights[0].shape[2:]),
            up_kernel_size=tuple(up.shape[2:]),
            **options,
        )
        network.load_monai_state_dict(state_dict)
        return network

    def _names(self) -> dict[str, str]:
        """MONAI's name of every entry of the state dict. MONAI nests level l + 1 inside level l."""
        levels = len(self.features)
        names = {}
        for key in self.state_dict():
            part, _, rest = key.partition(".")
            level, _, rest = rest.partition(".")
            if part == "head":
                names[key] = f"model.2.conv.{level}"
                continue
            outer = f"model.1{'.submodule.1' * int(level)}"
            if part == "encoder":
                unit, _, rest = rest.partition(".")
                outer = _encoder_name(int(level), levels)
                names[key] = f"{outer}.conv.{unit}.{_unit_name(rest)}"
            elif part == "gates":
                names[key] = f"{outer}.attention.{rest}"
            elif part == "upsample":
                names[key] = f"{outer}.upconv.up.{_unit_name(rest)}"
            else:
                names[key] = f"{outer}.merge.{_unit_name(rest)}"
        return names


def _encoder_name(level: int, levels: int) -> str:
    if level == 0:
        return "model.0"
    outer = f"model.1{'.submodule.1' * (level - 1)}.submodule"
    # The innermost submodule is the block itself, the others hold it beside the next level.
    return outer if level == levels - 1 else f"{outer}.0"


def _encoder_names(state_dict: Mapping[str, Tensor]) -> Iterator[str]:
    levels = 2
    while f"{_encoder_name(levels - 1, levels + 1)}.conv.0.conv.weight" in state_dict:
        levels += 1
    return (_encoder_name(level, levels) for level in range(levels))


def _unit_name(rest: str) -> str:
    """MONAI's name inside one of its ``Convolution`` blocks."""
    layer, _, parameter = rest.partition(".")
    return {"conv": "conv", "norm": "adn.N", "act": "adn.A"}[layer] + f".{parameter}"


def _unit(
    dims: int,
    in_channels: int,
    out_channels: int,
    kernel_size: tuple[int, ...],
    stride: tuple[int, ...],
    *,
    dropout: float = 0.0,
    transposed: bool = False,
) -> nn.Sequential:
    """Convolution, batch norm, dropout, ReLU; transposed, the grid grows by exactly ``stride``."""
    padding = tuple(k // 2 for k in kernel_size)
    if transposed:
        missing = tuple(s - k + 2 * p for s, k, p in zip(stride, kernel_size, padding, strict=True))
        convolution = TRANSPOSED_CONVOLUTIONS[dims](
            in_channels, out_channels, kernel_size, stride, padding, output_padding=missing
        )
    else:
        convolution = CONVOLUTIONS[dims](in_channels, out_channels, kernel_size, stride, padding)
    layers: OrderedDict[str, nn.Module] = OrderedDict(conv=convolution, norm=BATCH_NORMS[dims](out_channels))
    if dropout:
        layers["dropout"] = nn.Dropout(dropout)
    layers["act"] = nn.ReLU(inplace=True)
    return nn.Sequential(layers)


def _merge(dims: int, channels: int, dropout: float) -> nn.Sequential:
    """Convolution of skip and upsampled features, instance norm without parameters, dropout, PReLU."""
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        conv=CONVOLUTIONS[dims](2 * channels, channels, 3, padding=1),
        norm=InstanceNorm(channels, affine=False),
    )
    if dropout:
        layers["dropout"] = nn.Dropout(dropout)
    layers["act"] = nn.PReLU()
    return nn.Sequential(layers)
