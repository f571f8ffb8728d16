"""Convolutions on a CPU: the same numbers as torch's, by the fast library."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from lungkit.nn import build_model, convolution
from lungkit.nn.convolution import CHANNELS_LAST, CONVOLUTIONS, TRANSPOSED_CONVOLUTIONS

OPTIONS = [
    {},
    {"stride": 2},
    {"stride": (2, 1, 1), "bias": False},
    {"dilation": 2, "padding": 2},
    {"groups": 2},
    {"padding": "same"},
    {"padding_mode": "reflect"},
]

needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this build of torch has no oneDNN"
)


def operators(function):
    """Names of the torch operators that a call uses."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    return {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_values_and_gradients_are_torchs(dims, batch, options):
    options = {"kernel_size": 3, "padding": 1, **options}
    if isinstance(options.get("stride"), tuple):
        options["stride"] = options["stride"][:dims]
    torch.manual_seed(0)
    ours = CONVOLUTIONS[dims](4, 6, **options)
    theirs = {2: nn.Conv2d, 3: nn.Conv3d}[dims](4, 6, **options)
    compare(ours, theirs, torch.randn(batch, 4, *(9, 7, 8)[:dims]))


@pytest.fixture
def parts(monkeypatch):
    """Shapes of what conv3d of the module gives, one by one."""
    shapes, conv3d = [], F.conv3d

    def recorded(*arguments):
        out = conv3d(*arguments)
        shapes.append(tuple(out.shape))
        return out

    monkeypatch.setattr(convolution.F, "conv3d", recorded)
    return shapes


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ({"padding": 1}, [45, 45, 6]),
        ({"padding": (0, 2, 1), "stride": (1, 1, 2), "bias": False}, [91, 7]),
        ({"padding": 1, "dilation": (1, 2, 1), "groups": 2}, [45, 45, 4]),
    ],
    ids=str,
)
def test_few_large_slices_in_bf16_are_convolved_in_parts(options, rows, channels_last, parts, monkeypatch):
    """oneDNN with AMX writes past its workspace otherwise."""
    torch.manual_seed(0)
    layer = CONVOLUTIONS[3](4, 8, 3, **options)
    x = torch.randn(2, 4, 3, 96, 90)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last_3d)
    x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    assert [shape[3] for shape in parts] == rows
    assert all(shape[3] * shape[4] <= 4096 for shape in parts) and out.dtype == torch.bfloat16
    grad = torch.randn_like(out)
    found = torch.autograd.grad(out, (x, *layer.parameters()), grad)
    monkeypatch.undo()
    exact = layer.double()
    wanted_x = x.detach().double().requires_grad_()
    wanted = exact(wanted_x)
    gradients = torch.autograd.grad(wanted, (wanted_x, *exact.parameters()), grad.double())
    for one, other in zip((out, *found), (wanted, *gradients), strict=True):
        assert one.shape == other.shape
        assert (one.double() - other).norm() < 0.01 * other.norm()


@pytest.mark.parametrize(
    ("size", "trains", "dtype"),
    [
        ((16, 70, 70), True, torch.bfloat16),  # deep
        ((12, 64, 64), True, torch.bfloat16),
        ((3, 64, 64), True, torch.bfloat16),  # small
        ((3, 70, 70), False, torch.bfloat16),
        ((3, 70, 70), True, torch.float32),
    ],
    ids=str,
)
def test_other_volumes_are_convolved_at_once(size, trains, dtype, parts):
    layer = CONVOLUTIONS[3](1, 2, 3, padding=1).requires_grad_(trains).to(dtype)
    layer(torch.zeros(1, 1, *size, dtype=dtype))
    assert len(parts) <= 1


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("stride", [1, 2, (1, 2, 3)], ids=str)
def test_products_of_channels_last_features_are_torchs_convolutions(
    dims, transposed, bias, stride, one_thread
):
    steps = stride[:dims] if isinstance(stride, tuple) else (stride,) * dims
    torch.manual_seed(0)
    kinds = (TRANSPOSED_CONVOLUTIONS if transposed else CONVOLUTIONS)[dims], *PLAIN[transposed, dims]
    ours, theirs = (kind(4, 6, steps if transposed else 1, steps, bias=bias) for kind in kinds)
    x = torch.randn(2, 4, *(9, 7, 8)[:dims]).to(memory_format=CHANNELS_LAST[dims])
    compare(ours, theirs, x)
    used = operators(lambda: ours(x))
    assert ("aten::convolution" not in used) == (transposed or steps == (1,) * dims)
    assert ours(x).is_contiguous(memory_format=CHANNELS_LAST[dims])
    assert "aten::convolution" in operators(lambda: ours(x.contiguous()))
    with torch.no_grad():
        assert ("aten::convolution" in operators(lambda: ours(x))) == (transposed or steps != (1,) * dims)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("autocast", [False, True])
def test_transposed_products_in_bfloat16_are_torchs_convolutions(dims, autocast):
    torch.manual_seed(0)
    layer = TRANSPOSED_CONVOLUTIONS[dims](4, 6, 2, 2)
    exact = PLAIN[True, dims][0](4, 6, 2, 2)
    x = torch.randn(2, 4, *(9, 7, 8)[:dims]).bfloat16().to(memory_format=CHANNELS_LAST[dims])
    if not autocast:
        layer = layer.bfloat16()
    exact.load_state_dict({name: value.float() for name, value in layer.state_dict().items()})
    inputs = x.clone().requires_grad_(), x.float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert "aten::convolution" not in operators(lambda: layer(inputs[0]))
        found = layer(inputs[0])
    expected = exact(inputs[1])
    assert found.dtype == torch.bfloat16 and found.is_contiguous(memory_format=CHANNELS_LAST[dims])
    torch.testing.assert_close(found.float(), expected, rtol=2e-2, atol=2e-2)
    found.float().sum().backward()
    expected.sum().backward()
    for ours, theirs in [(inputs[0].grad, inputs[1].grad), (layer.weight.grad, exact.weight.grad)]:
        torch.testing.assert_close(ours.float(), theirs, rtol=2e-2, atol=5e-2)


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "options", [{"padding": 1}, {"output_padding": 1}, {"groups": 2}, {"kernel_size": 3}], ids=str
)
def test_other_transposed_convolutions_are_torchs_own(options):
    options = {"kernel_size": 2, "stride": 2, **options}
    torch.manual_seed(0)
    x = torch.randn(2, 4, 6, 5).to(memory_format=torch.channels_last)
    ours, theirs = TRANSPOSED_CONVOLUTIONS[2](4, 6, **options), nn.ConvTranspose2d(4, 6, **options)
    compare(ours, theirs, x)
    assert "aten::convolution" in operators(lambda: ours(x))
    layer = TRANSPOSED_CONVOLUTIONS[2](4, 6, 2, 2)
    assert layer(x, output_size=[13, 11]).shape == (2, 6, 13, 11)
    with pytest.raises(RuntimeError, match="to have 4 channels"):
        layer(torch.zeros(1, 3, 4, 4).to(memory_format=torch.channels_last))
    with pytest.raises(RuntimeError, match="to have 4 channels"):
        CONVOLUTIONS[2](4, 6, 1)(torch.zeros(1, 3, 4, 4).to(memory_format=torch.channels_last))


PLAIN = {
    (False, 2): [nn.Conv2d],
    (False, 3): [nn.Conv3d],
    (True, 2): [nn.ConvTranspose2d],
    (True, 3): [nn.ConvTranspose3d],
}


def compare(ours, theirs, x):
    theirs.load_state_dict(ours.state_dict())
    gradients = []
    outputs = []
    for layer in (ours, theirs):
        image = x.clone().requires_grad_()
        outputs.append(layer(image))
        outputs[-1].square().sum().backward()
        gradients.append([image.grad, *(p.grad for p in layer.parameters())])
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-4)


@needs_onednn
@pytest.mark.parametrize("batch", [1, 2])
def test_no_convolution_of_a_3d_network_takes_the_slow_loop(batch):
    network = build_model("attention-unet", dims=3, features=(4, 8), deep_supervision=False, seed=0).eval()
    kernels = {m.kernel_size for m in network.modules() if isinstance(m, nn.Conv3d)}
    assert (3, 3, 3) in kernels
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv3d) and max(module.kernel_size) > 1:
            x = torch.randn(batch, module.in_channels, 8, 8, 8)
            with torch.no_grad():
                assert "aten::slow_conv3d_forward" not in operators(lambda m=module, x=x: m(x)), name


@needs_onednn
def test_a_1x1_kernel_and_double_precision_stay_with_torch():
    for layer, x in [
        (CONVOLUTIONS[3](2, 3, 1), torch.randn(1, 2, 4, 4, 4)),
        (CONVOLUTIONS[3](2, 3, 3).double(), torch.randn(1, 2, 4, 4, 4).double()),
    ]:
        assert "aten::slow_conv3d_forward" in operators(lambda m=layer, x=x: m(x))


@needs_onednn
def test_autocast_decides_the_format():
    layer, x = CONVOLUTIONS[3](2, 3, 3), torch.randn(1, 2, 4, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


def test_onednn_switched_off_is_not_used():
    layer, x = CONVOLUTIONS[3](2, 3, 3), torch.randn(1, 2, 4, 4, 4)
    with torch.backends.mkldnn.flags(enabled=False):
        assert "aten::mkldnn_convolution" not in operators(lambda: layer(x))


@pytest.mark.parametrize(
    ("shape", "message"), [((1, 3, 4, 4, 4), "to have 2 channels"), ((1, 2, 2, 2, 2), "Kernel size can't")]
)
def test_wrong_input_is_torchs_error(shape, message):
    with pytest.raises(RuntimeError, match=message):
        CONVOLUTIONS[3](2, 4, 3)(torch.zeros(shape))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compilers_see_the_ordinary_convolution(dynamic):
    layer = CONVOLUTIONS[3](2, 3, 3, padding=1)
    x = torch.randn(1, 2, 4, 5, 6)
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend="eager")
    torch.testing.assert_close(compiled(x), F.conv3d(x, layer.weight, layer.bias, padding=1))
    program = torch.export.export(layer, (x,))
    assert any("aten.conv3d" in str(node.target) for node in program.graph.nodes)


def small_networks(device="cpu"):
    options = {"dims": 2, "in_channels": 1, "out_channels": 2, "features": (4, 8, 16)}
    return [build_model(name, seed=0, **options).to(device).eval() for name in ("unet", "attention-unet")]


@pytest.mark.parametrize("batch", [1, 2])
def test_operations_are_counted_as_those_of_torchs_own_convolution_and_gate(batch):
    for network, name in zip(small_networks(), ("unet", "attention-unet"), strict=True):
        reference = build_model(
            name, seed=0, dims=2, in_channels=1, out_channels=2, features=(4, 8, 16), **REFERENCE[name]
        )
        counted = []
        for each, device in ((network, "cpu"), (reference, "meta")):
            with FlopCounterMode(display=False) as counter:
                each.to(device)(torch.empty(batch, 1, 16, 16, device=device)).sum().backward()
            counted.append(counter.get_total_flops())
        assert counted[0] == counted[1] > 0


REFERENCE = {"unet": {}, "attention-unet": {"gate": "reference"}}


def test_networks_run_on_fake_tensors():
    for network in small_networks():
        with FakeTensorMode(allow_non_fake_inputs=True):
            assert network(torch.empty(1, 1, 16, 16)).shape == (1, 2, 16, 16)


@pytest.mark.parametrize("autocast", [False, True])
def test_networks_run_on_the_meta_device(autocast):
    for network in small_networks("meta"):
        with torch.autocast("cpu", enabled=autocast):
            out = network(torch.empty(1, 1, 16, 16, device="meta"))
        assert out.shape == (1, 2, 16, 16) and out.is_meta


def test_networks_are_differentiated_forward():
    torch.manual_seed(0)
    x, along = torch.randn(2, 1, 1, 16, 16, dtype=torch.float64).float().unbind()
    for network in small_networks():
        _, tangent = torch.func.jvp(network, (x,), (along,))
        x.requires_grad_()
        out = network(x)
        torch.testing.assert_close(
            tangent.sum(), (torch.autograd.grad(out.sum(), x)[0] * along).sum(), rtol=1e-3, atol=1e-4
        )
        x.requires_grad_(False)
        with forward_ad.dual_level():
            dual = network(forward_ad.make_dual(x, along))
            torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, tangent)


def test_networks_are_mapped_over_scans():
    scans = torch.randn(3, 1, 1, 16, 16)
    for network in small_networks():
        with torch.no_grad():
            mapped = torch.func.vmap(network)(scans)
            torch.testing.assert_close(mapped, torch.stack([network(scan) for scan in scans]))
