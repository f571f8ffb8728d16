"""Weights of nnU-Net's PlainConvUNet and ResidualEncoderUNet in a :class:`lungkit.nn.UNet`."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from lungkit.nn._foreign_weights import check_fits
from lungkit.nn.unet import UNet


def load_nnunet_state_dict(network: UNet, state_dict: Mapping[str, Tensor]) -> None:
    """Load the state dict of an nnU-Net network of the same shape; the logits are nnU-Net's to rounding.

    nnU-Net's convolutions have biases that the norm behind them subtracts again: of an instance norm nothing is left of
    them, with a batch norm they go into its mean.

    Args:
        network: of ``deep_supervision=True``, since nnU-Net keeps the logits of every decoder level.
        state_dict: names and tensors as nnU-Net saves them, each of its several names for one tensor at most once.

    Raises:
        CheckpointError: names are missing or unexpected, or shapes differ; the message lists them. Nothing is loaded
            then.

    Example:
        Load one fold into a network of the same channels, strides and kernel sizes::

            network = UNet(2, features=(32, 64), deep_supervision=True)
            load_nnunet_state_dict(network, torch.load("checkpoint_final.pth")["network_weights"])
    """
    own = network.state_dict()
    names = {ours: _their_name(ours, len(network.features)) for ours in own}
    theirs = {}
    for key, value in state_dict.items():
        key = key.removeprefix("module.").removeprefix("_orig_mod.")
        # The decoder of nnU-Net holds the encoder too, and a block its layers a second time.
        if not key.startswith("decoder.encoder.") and ".all_modules." not in key:
            theirs[key] = value
    biases = {
        key: value
        for key, value in theirs.items()
        if key.endswith(".conv.bias") and key.replace(".conv.bias", ".norm.weight") in theirs
    }
    weights = {key: value for key, value in theirs.items() if key not in biases}
    for name in [key for key in names.values() if re.fullmatch(r"decoder\.transpconvs\.\d+\.bias", key)]:
        if name not in weights and name.replace("bias", "weight") in weights:  # trained without
            weights[name] = weights[name.replace("bias", "weight")].new_zeros(
                weights[name.replace("bias", "weight")].shape[1]
            )
    for key, bias in biases.items():
        mean = key.replace(".conv.bias", ".norm.running_mean")
        if mean in weights:
            weights[mean] = weights[mean] - bias
    check_fits(
        own, names, weights, "of nnU-Net does not fit this UNet", "Another trainer may have built the network"
    )
    network.load_state_dict({ours: weights[name] for ours, name in names.items()})


def _their_name(ours: str, levels: int) -> str:
    """nnU-Net counts decoder levels from the coarsest."""
    part, level, rest = re.fullmatch(r"(\w+)\.(\d+)\.(.+)", ours).groups()  # type: ignore[union-attr]
    decoder_stage = levels - 2 - int(level)
    if part == "heads":
        return f"decoder.seg_layers.{decoder_stage}.{rest}"
    if part == "upsample":
        return f"decoder.transpconvs.{decoder_stage}.{rest.removeprefix('conv.')}"
    if part == "decoder":
        return f"decoder.stages.{decoder_stage}.{rest.replace('units.', 'convs.', 1)}"
    if rest.startswith("units."):
        return f"encoder.stages.{level}.0.{rest.replace('units.', 'convs.', 1)}"
    if rest.startswith("stem."):
        return f"encoder.stem.convs.0.{rest.removeprefix('stem.')}"
    rest = re.sub(r"units\.(\d)", lambda unit: f"conv{int(unit[1]) + 1}", rest).replace("shortcut.", "skip.")
    return f"encoder.stages.{level}.{rest}"
