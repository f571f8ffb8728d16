"""U-Net: shapes over its options, padding, supervision, layouts, compilation, configuration and errors."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lungkit.errors import UsageError
from lungkit.nn import MODELS, UNet, build_model
from lungkit.nn.norms import InstanceNorm

pytestmark = pytest.mark.usefixtures("one_thread")

FEATURES = (4, 6, 8)


def small(dims: int = 2, **options: Any) -> UNet:
    return UNet(dims, **{"features": FEATURES, "seed": 0, **options})


def image(dims: int = 2, channels: int = 1, size: tuple[int, ...] | None = None) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(2, channels, *(size or (8, 16, 12)[:dims]))


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("upsampling", ["transposed", "interpolate"])
@pytest.mark.parametrize("norm", ["instance", "batch", "group", "none"])
@pytest.mark.parametrize("dims", [2, 3])
def test_every_option_trains_every_parameter(dims, norm, upsampling, residual):
    network = small(
        dims, norm=norm, groups=2, upsampling=upsampling, residual=residual, deep_supervision=True
    )
    logits = network(image(dims))
    torch.manual_seed(0)
    sum((level * torch.randn_like(level)).sum() for level in logits).backward()
    silent = [n for n, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert silent == []


@pytest.mark.parametrize(
    ("dims", "options", "size"),
    [
        (2, {"strides": (2, 4)}, (16, 24)),
        (2, {"strides": ((1, 2), (2, 2))}, (4, 16)),
        (2, {"features": (4, 8)}, (8, 8)),
        (2, {"features": (2, 4, 6, 8, 10)}, (32, 32)),
        (2, {"kernel_size": (5, 3, 1)}, (16, 16)),
        (2, {"convolutions": 1}, (16, 16)),
        (2, {"convolutions": (1, 2, 3)}, (16, 16)),
        (3, {"strides": ((1, 2, 2), 2), "kernel_size": ((1, 3, 3), 3, 3)}, (4, 16, 16)),
        (3, {"strides": ((1, 2, 2), (1, 2, 2))}, (1, 16, 16)),
        (3, {"strides": ((2, 3, 1), 1)}, (4, 9, 5)),
    ],
)
def test_logits_have_the_size_of_the_image(dims, options, size):
    network = small(dims, in_channels=2, out_channels=3, **options)
    assert network(image(dims, 2, size)).shape == (2, 3, *size)


@pytest.mark.parametrize("activation", ["leaky_relu", "relu", "elu", "gelu", "silu"])
def test_activation_is_the_one_asked_for(activation):
    names = {"leaky_relu": "LeakyReLU", "relu": "ReLU", "elu": "ELU", "gelu": "GELU", "silu": "SiLU"}
    network = small(activation=activation)
    kinds = {type(m).__name__ for m in network.modules()} & set(names.values())
    assert kinds == {names[activation]}
    assert network(image()).isfinite().all()


def test_strides_give_the_sizes_of_the_encoder():
    network = small(3, strides=((1, 2, 2), (2, 2, 1)))
    x = image(3, size=(4, 8, 8))
    sizes = []
    for block in network.encoder:
        x = block(x)
        sizes.append(tuple(x.shape[2:]))
    assert sizes == [(4, 8, 8), (4, 4, 4), (2, 2, 4)]


@pytest.mark.parametrize("size", [(13, 10), (16, 9), (3, 5), (1, 5)])
def test_padding_equals_padding_by_hand_and_cropping(size):
    network = small().eval()
    x = image(size=size)
    missing = [-n % 4 for n in size]
    by_hand = network(F.pad(x, (0, missing[1], 0, missing[0]), mode="replicate"))
    torch.testing.assert_close(network(x), by_hand[..., : size[0], : size[1]])


def test_padding_in_three_dimensions_equals_padding_by_hand():
    network = small(3).eval()
    x = image(3, size=(5, 6, 7))
    by_hand = network(F.pad(x, (0, 1, 0, 2, 0, 3), mode="replicate"))
    torch.testing.assert_close(network(x), by_hand[..., :5, :6, :7])


def test_padding_error_refuses_a_size_that_does_not_divide():
    with pytest.raises(
        UsageError, match=r"size of x must be a multiple of \(4, 4\) along \(Y, X\), got \(13, 16\)"
    ):
        small(padding="error")(image(size=(13, 16)))


def test_padding_error_takes_a_size_that_divides():
    x = image()
    assert torch.equal(small(padding="error")(x), small()(x))


def test_deep_supervision_gives_every_decoder_level_finest_first():
    network = small(features=(4, 6, 8, 10), strides=(2, (1, 2), 2), deep_supervision=True, out_channels=3)
    shapes = [tuple(logits.shape) for logits in network(image(size=(16, 16)))]
    assert shapes == [(2, 3, 16, 16), (2, 3, 8, 8), (2, 3, 8, 4)]


def test_deep_supervision_of_padded_sizes_covers_the_image():
    network = small(deep_supervision=True)
    assert [tuple(z.shape[2:]) for z in network(image(size=(13, 10)))] == [(13, 10), (7, 5)]


def test_deep_supervision_in_evaluation_gives_the_finest_logits_alone():
    network = small(deep_supervision=True)
    finest = network(image())[0]
    torch.testing.assert_close(network.eval()(image()), finest)


def test_unet_has_no_attention_maps():
    logits, maps = small()(image(), return_attention=True)
    assert maps == ()
    assert logits.shape == (2, 2, 8, 16)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("name", ["unet", "attention-unet"])
def test_channels_last_gives_the_same_numbers(name, dims):
    layout = {2: torch.channels_last, 3: torch.channels_last_3d}[dims]
    network = build_model(name, dims=dims, features=FEATURES, seed=0).double()
    x = image(dims, size=(8, 16, 12)[:dims]).double()
    expected = network(x)
    gradients = torch.autograd.grad(expected.square().sum(), list(network.parameters()))
    network = network.to(memory_format=layout)
    logits = network(x.to(memory_format=layout))
    torch.testing.assert_close(logits, expected, atol=1e-10, rtol=1e-8, check_stride=False)
    again = torch.autograd.grad(logits.square().sum(), list(network.parameters()))
    for got, want in zip(again, gradients, strict=True):
        torch.testing.assert_close(got, want, atol=1e-8, rtol=1e-6, check_stride=False)


@pytest.mark.parametrize("name", MODELS)
def test_channels_last_stays_in_every_layer(name):
    # In 2D: for 3D PyTorch chooses some of its CPU convolutions by size, and those give channels-first.
    network = build_model(name, features=FEATURES, seed=0).to(memory_format=torch.channels_last)
    layouts = {}
    for path, module in network.named_modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, InstanceNorm, nn.BatchNorm2d)):
            module.register_forward_hook(
                lambda module, inputs, out, path=path: layouts.update(
                    {path: out.is_contiguous(memory_format=torch.channels_last)}
                )
            )
    network(image().to(memory_format=torch.channels_last))
    assert layouts
    assert [path for path, stays in layouts.items() if not stays] == []


@pytest.mark.parametrize("name", MODELS)
def test_compiles_whole_and_trains_to_the_same_gradients(name):
    network = build_model(name, features=(4, 8), seed=0)
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    x = image(size=(8, 10))
    results = []
    for net in (compiled, network):
        loss = net(x).square().mean()
        results.append((loss, *torch.autograd.grad(loss, list(network.parameters()))))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


EXTRAS: dict[str, Any] = {"input_pyramid": True, "decoder_scse": True}


@pytest.mark.parametrize("dims", [2, 3])
def test_what_is_added_to_a_network_leaves_its_other_weights_as_they_were(dims):
    plain, extended = small(dims).state_dict(), small(dims, **EXTRAS).state_dict()
    assert plain.keys() < extended.keys()
    assert all(torch.equal(value, extended[name]) for name, value in plain.items())
    added = {name.partition(".")[0] for name in extended.keys() - plain.keys()}
    assert added == {"pyramid", "recalibration"}


@pytest.mark.parametrize("dims", [2, 3])
def test_what_is_added_to_a_network_works_in_half_precision_and_exported(dims):
    network = build_model(
        "attention-unet",
        dims=dims,
        features=(4, 8),
        gate_signal="both",
        deep_supervision=True,
        seed=0,
        **EXTRAS,
    )
    x = image(dims, size=(8, 10, 6)[:dims])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = network(x)
    assert logits[0].dtype == torch.bfloat16
    torch.testing.assert_close(logits[0].float(), network(x)[0], atol=0.2, rtol=0.1)
    network.eval()
    program = torch.export.export(network, (x,))
    torch.testing.assert_close(program.module()(x), network(x))


@pytest.mark.parametrize("name", MODELS)
def test_exported_program_gives_the_same_logits(name):
    network = build_model(name, features=(4, 8), seed=0).eval()
    x = image(size=(7, 9))
    program = torch.export.export(network, (x,))
    torch.testing.assert_close(program.module()(x), network(x))


@pytest.mark.parametrize("name", MODELS)
def test_autocast_gives_half_precision_logits_near_the_full_ones(name):
    network = build_model(name, features=(4, 8), seed=0).eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = network(image())
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), network(image()), atol=0.15, rtol=0.1)


def test_seed_fixes_the_weights_and_leaves_the_random_state():
    before = torch.get_rng_state()
    first, second, third = small(seed=5), small(seed=5), small(seed=6)
    assert torch.equal(torch.get_rng_state(), before)
    same = [torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True)]
    assert all(same)
    assert not torch.equal(first.encoder[0].units[0].conv.weight, third.encoder[0].units[0].conv.weight)


def test_initial_activations_neither_vanish_nor_explode():
    network = UNet(2, features=(16, 32, 64), norm="none", seed=0)
    assert 0.1 < network(image(size=(32, 32))).std() < 10


def test_dropout_acts_in_training_only():
    network, x = small(dropout=0.5), image()
    assert not torch.equal(network(x), network(x))
    network.eval()
    assert torch.equal(network(x), network(x))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dims", [2, 3])
def test_config_rebuilds_the_network_through_json(name, dims):
    network = build_model(name, dims=dims, features=(4, 8), strides=((1, 2, 2)[-dims:],), seed=3)
    rebuilt = build_model(**json.loads(json.dumps(network.config)))
    assert rebuilt.config == network.config
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), rebuilt.parameters(), strict=True))


def test_config_holds_every_option_that_was_given():
    options: dict[str, Any] = {
        "in_channels": 2,
        "out_channels": 3,
        "convolutions": [1, 2, 1],
        "norm": "group",
        "groups": 2,
        "activation": "elu",
        "residual": True,
        "deep_supervision": True,
        "dropout": 0.1,
        "input_pyramid": True,
        "decoder_scse": True,
        "upsampling": "interpolate",
        "padding": "error",
    }
    config = small(**options).config
    assert {key: config[key] for key in options} == options


def test_changing_the_config_leaves_the_network_alone():
    network = small()
    network.config["features"].append(99)
    assert network.config["features"] == [4, 6, 8]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dims": 4}, "dims must be 2 or 3, got 4"),
        ({"in_channels": 0}, "in_channels must be an integer of at least 1, got 0"),
        ({"out_channels": 2.5}, "out_channels must be an integer of at least 1, got 2.5"),
        ({"features": (16,)}, r"features must hold the channels of two levels or more, .* got \(16,\)"),
        ({"features": 16}, "features must hold .* got 16"),
        ({"strides": (2, 2, 2)}, r"strides must be an integer or a sequence of 2, .* got \(2, 2, 2\)"),
        (
            {"strides": ((2, 2, 2), 2)},
            r"strides\[0\] must be an integer or 2 of them, one per axis; got \(2, 2, 2\)",
        ),
        ({"strides": (2, 0)}, r"strides\[1\] must be an integer of at least 1 along every axis; got 0"),
        ({"kernel_size": 4}, r"kernel_size\[0\] must be an odd integer along every axis; got 4"),
        ({"convolutions": 0}, r"convolutions\[0\] must be an integer of at least 1, got 0"),
        (
            {"convolutions": (2, 2)},
            r"convolutions must be an integer or 3 of them, one per level; got \(2, 2\)",
        ),
        ({"norm": "layer"}, "norm must be one of 'instance', 'batch', 'group', 'none', got 'layer'"),
        ({"norm": "group"}, "groups must divide the channels of every level, got 8 for 4 channels"),
        ({"activation": "tanh"}, r"activation must be one of 'leaky_relu', .* got 'tanh'"),
        ({"dropout": 1}, r"dropout must be a number in \[0, 1\), got 1"),
        ({"upsampling": "nearest"}, "upsampling must be one of 'transposed', 'interpolate', got 'nearest'"),
        ({"padding": "same"}, "padding must be one of 'auto', 'error', got 'same'"),
        ({"seed": -1}, "seed must be an integer of at least 0, got -1"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(UsageError, match=message):
        UNet(**{"features": FEATURES, **options})


@pytest.mark.parametrize(
    ("dims", "shape", "message"),
    [
        (
            2,
            (1, 2, 8, 8),
            r"x must have shape \(B, 1, Y, X\) for a 2D network of 1 input channels, got \(1, 2, 8, 8\)",
        ),
        (2, (1, 1, 4, 8, 8), r"x must have shape \(B, 1, Y, X\) .* got \(1, 1, 4, 8, 8\)"),
        (3, (1, 8, 8), r"x must have shape \(B, 1, Z, Y, X\) .* got \(1, 8, 8\)"),
        (2, (1, 1, 0, 8), r"x must have one voxel or more along each of \(Y, X\), got size \(0, 8\)"),
        (2, (1, 1, 4, 3), r"x of size \(4, 3\) leaves one voxel at the coarsest level \(stride \(4, 4\)\)"),
    ],
)
def test_bad_inputs_are_named(dims, shape, message):
    with pytest.raises(UsageError, match=message):
        small(dims)(torch.zeros(shape))


def test_an_empty_batch_gives_empty_logits():
    assert small()(torch.zeros(0, 1, 8, 8)).shape == (0, 2, 8, 8)


def test_one_image_overfits():
    torch.manual_seed(0)
    network = small()
    x = torch.randn(1, 1, 16, 16)
    labels = (x[:, 0] > 0).long()
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-2)
    for _ in range(40):
        optimiser.zero_grad()
        F.cross_entropy(network(x), labels).backward()
        optimiser.step()
    assert (network(x).argmax(1) == labels).float().mean() > 0.97


def test_instance_norm_makes_the_encoder_blind_to_intensity_scale():
    network = small().eval()
    x = image()
    torch.testing.assert_close(network(100 * x), network(x), atol=1e-2, rtol=1e-2)


def test_network_survives_a_state_dict_round_trip():
    network, other = small(seed=1), small(seed=2)
    other.load_state_dict(network.state_dict())
    assert torch.equal(other(image()), network(image()))
    assert isinstance(other, nn.Module)
