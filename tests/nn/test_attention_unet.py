"""Attention U-Net: its maps, its gates and their options."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lungkit.errors import UsageError
from lungkit.nn import AttentionUNet, UNet, build_model

pytestmark = pytest.mark.usefixtures("one_thread")

FEATURES = (4, 6, 8)


def small(dims: int = 2, **options: Any) -> AttentionUNet:
    return AttentionUNet(dims, **{"features": FEATURES, "seed": 0, **options})


def image(dims: int = 2, size: tuple[int, ...] | None = None) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(2, 1, *(size or (8, 16, 12)[:dims]))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gate_output_norm": "instance"},
        {"gate_output_norm": "batch", "norm": "batch"},
        {"gate_heads": 2},
        {"gate_heads": 2, "gate_combine": "concat"},
        {"gate_signal": "global", "input_pyramid": True, "residual": True},
        {"gate_signal": "both", "decoder_scse": True, "input_pyramid": True, "norm": "group", "groups": 2},
        {"inter_channels": 3, "residual": True},
        {"gate_finest": False, "upsampling": "interpolate"},
    ],
)
@pytest.mark.parametrize("dims", [2, 3])
def test_every_gate_option_trains_every_parameter(dims, options):
    network = small(dims, **options)
    logits = network(image(dims))
    torch.manual_seed(0)
    (logits * torch.randn_like(logits)).sum().backward()
    silent = [n for n, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # Instance norm subtracts the bias of the convolution before it: rounding alone is left of that gradient.
    assert [name for name in silent if not name.endswith("output.0.bias")] == []


@pytest.mark.parametrize("dims", [2, 3])
def test_maps_come_finest_first_at_the_size_of_their_level(dims):
    network = small(dims, strides=((1, 2, 2)[-dims:], 2))
    _, maps = network(image(dims), return_attention=True)
    sizes = {2: [(8, 16), (4, 8)], 3: [(8, 16, 12), (8, 8, 6)]}[dims]
    assert [tuple(alpha.shape) for alpha in maps] == [(2, 1, *size) for size in sizes]


def test_maps_lie_between_zero_and_one():
    _, maps = small()(image(), return_attention=True)
    assert all(alpha.min() > 0 and alpha.max() < 1 for alpha in maps)


def test_gates_start_nearly_open():
    _, maps = small(features=(16, 32, 64))(image(size=(32, 32)), return_attention=True)
    assert all(0.7 < alpha.mean() < 0.99 for alpha in maps)


def test_maps_of_a_padded_image_cover_the_image():
    _, maps = small()(image(size=(13, 10)), return_attention=True)
    assert [tuple(alpha.shape[2:]) for alpha in maps] == [(13, 10), (7, 5)]


def test_asking_for_the_maps_does_not_change_the_logits():
    network = small().eval()
    assert torch.equal(network(image()), network(image(), return_attention=True)[0])


def test_maps_come_beside_the_logits_of_deep_supervision():
    logits, maps = small(deep_supervision=True)(image(), return_attention=True)
    assert [tuple(z.shape[2:]) for z in logits] == [(8, 16), (4, 8)]
    assert len(maps) == 2


def test_the_finest_skip_may_go_ungated():
    network = small(gate_finest=False)
    _, maps = network(image(), return_attention=True)
    assert [tuple(alpha.shape[2:]) for alpha in maps] == [(4, 8)]
    assert len(network.gates) == 1


def test_heads_give_a_map_each():
    _, maps = small(gate_heads=3)(image(), return_attention=True)
    assert [alpha.shape[1] for alpha in maps] == [3, 3]


@pytest.mark.parametrize(("inter_channels", "expected"), [(None, [2, 3]), (5, [5, 5]), ((1, 7), [1, 7])])
def test_inner_width_of_the_gates(inter_channels, expected):
    network = small(inter_channels=inter_channels)
    assert [gate.W_x.out_channels for gate in network.gates] == expected


def test_a_closed_gate_hides_its_skip():
    network = small(norm="batch").eval()
    with torch.no_grad():
        for gate in network.gates:
            gate.psi.bias.fill_(-1e4)
    x = image()
    for level in range(2):
        gated, alpha = network._gate(
            level, torch.ones(1, FEATURES[level], 4, 4), torch.ones(1, FEATURES[level + 1], 2, 2)
        )
        # A kernel may give the smallest of floats in place of zero.
        assert gated.abs().max() < 1e-37 and alpha.max() < 1e-37
    assert network(x).isfinite().all()


def test_open_gates_give_the_unet_of_the_same_seed():
    network = small().eval()
    with torch.no_grad():
        for gate in network.gates:
            gate.psi.bias.fill_(1e4)
    torch.testing.assert_close(network(image()), UNet(2, features=FEATURES, seed=0).eval()(image()))


@pytest.mark.parametrize("dims", [2, 3])
def test_reference_gate_gives_the_numbers_and_gradients_of_auto(dims):
    results = []
    for gate in ("auto", "reference"):
        network = small(dims, gate=gate).double()
        logits, maps = network(image(dims).double(), return_attention=True)
        loss = logits.square().mean() + sum(alpha.square().mean() for alpha in maps)
        results.append((logits, *maps, *torch.autograd.grad(loss, list(network.parameters()))))
    for auto, reference in zip(*results, strict=True):
        torch.testing.assert_close(auto, reference, atol=1e-9, rtol=1e-7)


def test_gradient_flows_through_the_maps_alone():
    network = small()
    _, maps = network(image(), return_attention=True)
    sum(alpha.sum() for alpha in maps).backward()
    assert all(gate.W_g.weight.grad.abs().sum() > 0 for gate in network.gates)


def test_config_holds_the_options_of_the_gates():
    options: dict[str, Any] = {
        "inter_channels": [2, 3],
        "gate_finest": True,
        "gate_heads": 2,
        "gate_combine": "concat",
        "gate_output_norm": "instance",
        "gate_signal": "both",
        "gate": "reference",
    }
    config = small(**options).config
    assert {key: config[key] for key in options} == options
    assert build_model(**config).config == config


def test_options_of_the_unet_are_known_by_name():
    assert build_model("attention-unet", features=FEATURES, norm="batch").norm == "batch"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inter_channels": 0}, r"inter_channels\[0\] must be an integer of at least 1, got 0"),
        (
            {"inter_channels": (4, 4, 4)},
            r"inter_channels must be an integer or 2 of them, .* got \(4, 4, 4\)",
        ),
        ({"gate_heads": 0}, "gate_heads must be an integer of at least 1, got 0"),
        ({"gate_combine": "max"}, "gate_combine must be one of 'mean', 'concat', got 'max'"),
        (
            {"gate_output_norm": "group"},
            "gate_output_norm must be one of None, 'batch', 'instance', got 'group'",
        ),
        ({"gate_signal": "mean"}, "gate_signal must be one of 'local', 'global', 'both', got 'mean'"),
        ({"gate": "fused"}, "gate must be one of 'auto', 'reference', got 'fused'"),
        ({"norm": "layer"}, "norm must be one of"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(UsageError, match=message):
        small(**options)
