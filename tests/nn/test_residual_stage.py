"""Levels of a residual encoder, and the U-Net that has one."""

from __future__ import annotations

import pytest
import torch

from lungkit.errors import UsageError
from lungkit.nn import AttentionUNet, UNet, build_model
from lungkit.nn.residual_stage import ResidualStage


def test_a_shortcut_projects_where_channels_change_only() -> None:
    pooled = ResidualStage(2, 4, 4, blocks=1, kernel_size=(3, 3), stride=(2, 2))
    projected = ResidualStage(2, 4, 8, blocks=2, kernel_size=(3, 3), stride=(2, 2))
    assert not any("shortcut" in name for name in pooled.state_dict())
    assert {name.split(".")[1] for name in projected.state_dict() if "shortcut" in name} == {"0"}


@pytest.mark.parametrize("dims", [2, 3])
def test_the_network_is_rebuilt_from_its_config(dims: int) -> None:
    network = UNet(dims, features=(4, 8, 8), residual_encoder=(1, 2, 1), decoder_convolutions=(1, 2), seed=0)
    other = build_model(**network.config)
    other.load_state_dict(network.state_dict())
    x = torch.randn(1, 1, *[8, 12, 16][-dims:])
    assert torch.equal(network(x), other(x))
    assert [len(level.blocks) for level in network.encoder] == [1, 2, 1]
    assert [len(level.units) for level in network.decoder] == [1, 2]


def test_gates_and_input_pyramid_work_on_a_residual_encoder() -> None:
    network = AttentionUNet(2, features=(4, 8, 8), residual_encoder=1, input_pyramid=True, seed=0)
    logits, maps = network(torch.randn(1, 1, 16, 16), return_attention=True)
    logits.sum().backward()
    assert len(maps) == 2
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_blocks_are_counted_per_level() -> None:
    with pytest.raises(UsageError, match="residual_encoder must be an integer or 3"):
        UNet(2, features=(4, 8, 8), residual_encoder=(1, 2))
