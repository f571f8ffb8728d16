"""The MONAI form of the Attention U-Net against MONAI itself."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn

from lungkit.errors import CheckpointError, UsageError
from lungkit.nn import MonaiAttentionUNet, build_model

pytestmark = pytest.mark.usefixtures("one_thread")

# The same network in both vocabularies: (ours, MONAI's, input shape).
FORMS: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[int, ...]]] = {
    "2d": (
        {"dims": 2, "features": (8, 12, 16), "strides": 2},
        {"spatial_dims": 2, "channels": (8, 12, 16), "strides": (2, 2)},
        (2, 1, 16, 24),
    ),
    "3d": (
        {"dims": 3, "in_channels": 2, "out_channels": 3, "features": (4, 6, 8, 10), "strides": (2, 1, 2)},
        {
            "spatial_dims": 3,
            "in_channels": 2,
            "out_channels": 3,
            "channels": (4, 6, 8, 10),
            "strides": (2, 1, 2),
        },
        (2, 2, 8, 8, 12),
    ),
    "two levels, kernels per axis": (
        {"dims": 3, "features": (4, 6), "kernel_size": (1, 3, 3), "up_kernel_size": (1, 3, 5)},
        {
            "spatial_dims": 3,
            "channels": (4, 6),
            "strides": (2,),
            "kernel_size": (1, 3, 3),
            "up_kernel_size": (1, 3, 5),
        },
        (2, 1, 4, 6, 8),
    ),
}


def make_pair(form: str, **options: Any) -> tuple[MonaiAttentionUNet, nn.Module, torch.Tensor]:
    nets = pytest.importorskip("monai.networks.nets", reason="MONAI is not installed")
    ours, theirs, shape = FORMS[form]
    torch.manual_seed(0)
    reference = nets.AttentionUnet(**{"in_channels": 1, "out_channels": 2, **theirs, **options})
    for module in reference.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    network = MonaiAttentionUNet(**ours, **options)
    network.load_monai_state_dict(reference.state_dict())
    return network, reference, torch.randn(shape)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_logits_equal_monai(form, training):
    network, reference, x = make_pair(form)
    torch.testing.assert_close(network.train(training)(x), reference.train(training)(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("form", ["2d", "3d"])
def test_gradients_equal_monai(form):
    network, reference, x = make_pair(form)
    for net in (network, reference):
        net.double()(x.double()).square().mean().backward()
    expected = {name: parameter.grad for name, parameter in reference.named_parameters()}
    names = network._names()
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[names[name]], atol=1e-9, rtol=1e-6)


def test_running_statistics_equal_monai_after_a_training_step():
    network, reference, x = make_pair("2d")
    network(x), reference(x)
    updated = reference.state_dict()
    for name, tensor in network.monai_state_dict().items():
        torch.testing.assert_close(tensor, updated[name], atol=1e-5, rtol=1e-5)


def test_dropout_falls_where_monai_puts_it():
    network, reference, x = make_pair("2d", dropout=0.3)
    outputs = []
    for net in (network, reference):
        torch.manual_seed(1)
        outputs.append(net(x))
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)


def test_attention_maps_equal_monai():
    network, reference, x = make_pair("2d")
    maps = []
    for module in reference.modules():
        if type(module).__name__ == "AttentionBlock":
            module.psi.register_forward_hook(lambda module, inputs, alpha: maps.append(alpha))
    reference.eval()(x)
    _, ours = network.eval()(x, return_attention=True)
    # MONAI runs from the coarsest gate to the finest.
    for mine, expected in zip(ours, reversed(maps), strict=True):
        torch.testing.assert_close(mine, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_architecture_is_read_off_a_monai_state_dict(form):
    network, reference, x = make_pair(form)
    rebuilt = MonaiAttentionUNet.from_monai_state_dict(
        reference.state_dict(), strides=FORMS[form][0].get("strides", 2)
    )
    torch.testing.assert_close(rebuilt.eval()(x), network.eval()(x), atol=0, rtol=0)


def test_monai_loads_our_state_dict():
    _, reference, x = make_pair("2d")
    network = MonaiAttentionUNet(**FORMS["2d"][0], seed=3).eval()
    reference.load_state_dict(network.monai_state_dict())
    torch.testing.assert_close(reference.eval()(x), network(x), atol=1e-5, rtol=1e-5)


def small(**options: Any) -> MonaiAttentionUNet:
    return MonaiAttentionUNet(2, features=(4, 6, 8), **options)


def test_missing_and_unexpected_names_are_listed():
    network = small()
    state = network.monai_state_dict()
    state["model.7.conv.weight"] = state.pop("model.2.conv.weight")
    with pytest.raises(
        CheckpointError,
        match=r"missing \(1\): model\.2\.conv\.weight; unexpected \(1\): model\.7\.conv\.weight",
    ):
        network.load_monai_state_dict(state)


def test_differing_shapes_are_listed():
    state = small().monai_state_dict()
    state["model.2.conv.weight"] = torch.zeros(5, 4, 1, 1)
    with pytest.raises(
        CheckpointError, match=r"model\.2\.conv\.weight is \(5, 4, 1, 1\), the network has \(2, 4"
    ):
        small().load_monai_state_dict(state)


def test_a_state_dict_that_does_not_fit_changes_nothing():
    network = small()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    state = small().monai_state_dict()
    del state["model.2.conv.bias"]
    with pytest.raises(CheckpointError):
        network.load_monai_state_dict(state)
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


def test_another_networks_state_dict_is_refused_with_its_names():
    with pytest.raises(
        CheckpointError, match=r"not the state dict of a MONAI AttentionUnet.*got 0\.weight, 0\.bias"
    ):
        MonaiAttentionUNet.from_monai_state_dict(nn.Sequential(nn.Linear(2, 2)).state_dict())


def test_strides_that_do_not_fit_the_levels_are_refused():
    with pytest.raises(UsageError, match="strides must be an integer or a sequence of 2"):
        MonaiAttentionUNet.from_monai_state_dict(small().monai_state_dict(), strides=(2, 2, 2))


def test_odd_sizes_are_padded_at_the_end_and_cropped_back():
    network = small(seed=0).eval()
    x = torch.randn(1, 1, 13, 10)
    padded = nn.functional.pad(x, (0, 2, 0, 3), mode="replicate")
    torch.testing.assert_close(network(x), network(padded)[..., :13, :10])


def test_config_rebuilds_the_network_through_json():
    network = small(seed=4, dropout=0.1)
    rebuilt = build_model(**json.loads(json.dumps(network.config)))
    assert rebuilt.config == network.config
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), rebuilt.parameters(), strict=True))


def test_reference_gate_gives_the_numbers_of_auto():
    auto, twin = (small(gate=gate, seed=0).eval() for gate in ("auto", "reference"))
    x = torch.randn(1, 1, 16, 16)
    torch.testing.assert_close(auto(x), twin(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel_size": 2}, "kernel_size must be an odd integer along every axis; got 2"),
        (
            {"up_kernel_size": (3, 3, 3)},
            r"up_kernel_size must be an integer or 2 of them, one per axis; got \(3, 3, 3",
        ),
        ({"features": (1, 8)}, r"features must be 2 or more at every gate, got \(1, 8\)"),
        ({"dropout": 1.0}, r"dropout must be a number in \[0, 1\), got 1.0"),
        ({"gate": "fast"}, "gate must be one of 'auto', 'reference', got 'fast'"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(UsageError, match=message):
        MonaiAttentionUNet(2, **options)
