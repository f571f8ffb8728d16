"""The gate modules: their formulas written out, the norms of MONAI's block, what is kept for backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lungkit.errors import UsageError
from lungkit.nn import AttentionGate, MonaiAttentionGate
from lungkit.ops.attention_gate import reference

pytestmark = pytest.mark.usefixtures("one_thread")


def inputs(dims: int) -> tuple[Tensor, Tensor]:
    """x of 6 channels, g of 10 at half its size."""
    torch.manual_seed(0)
    fine, coarse = ((6, 7), (3, 4)) if dims == 2 else ((4, 6, 7), (2, 3, 4))
    return torch.randn(2, 6, *fine), torch.randn(2, 10, *coarse)


def maps_by_hand(gate: AttentionGate, x: Tensor, g: Tensor, inner: int) -> tuple[list[Tensor], list[Tensor]]:
    """Gated features and map of every head: head h has the h-th slice of each projection."""
    phi = gate.W_g(g)
    gated, maps = [], []
    for head in range(gate.heads):
        part = slice(head * inner, (head + 1) * inner)
        out, alpha = reference(
            x,
            phi[:, part],
            gate.W_x.weight[part].flatten(1),
            gate.psi.weight[head].flatten(),
            gate.psi.bias[head : head + 1],
        )
        gated.append(out)
        maps.append(alpha)
    return gated, maps


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("heads", [1, 3])
def test_heads_are_averaged(dims, heads):
    x, g = inputs(dims)
    gate = AttentionGate(dims, 6, 10, 4, heads=heads)
    gated, maps = maps_by_hand(gate, x, g, 4)
    out, alpha = gate(x, g, return_attention=True)
    torch.testing.assert_close(out, sum(gated) / heads)
    torch.testing.assert_close(out, x * alpha.mean(1, keepdim=True))
    torch.testing.assert_close(alpha, torch.cat(maps, dim=1))


@pytest.mark.parametrize("dims", [2, 3])
def test_heads_are_concatenated_and_projected_back(dims):
    x, g = inputs(dims)
    gate = AttentionGate(dims, 6, 10, 4, heads=2, combine="concat")
    gated, _ = maps_by_hand(gate, x, g, 4)
    torch.testing.assert_close(gate(x, g), gate.output[0](torch.cat(gated, dim=1)))


@pytest.mark.parametrize("signal", ["global", "both"])
@pytest.mark.parametrize("dims", [2, 3])
def test_a_global_signal_is_the_mean_of_g(dims, signal):
    x, g = inputs(dims)
    gate = AttentionGate(dims, 6, 10, 4, heads=2, signal=signal)
    pooled = g.mean(tuple(range(2, g.dim())), keepdim=True)
    phi = gate.W_g(pooled) if signal == "global" else gate.W_g(g) + gate.W_c(pooled)
    size = x.shape[2:]
    mode = "bilinear" if dims == 2 else "trilinear"
    up = F.interpolate(phi.expand(*phi.shape[:2], *g.shape[2:]), size, mode=mode, align_corners=False)
    alpha = gate.psi(torch.relu(gate.W_x(x) + up)).sigmoid()
    out, maps = gate(x, g, return_attention=True)
    torch.testing.assert_close(maps, alpha)
    torch.testing.assert_close(out, (x[:, None] * alpha[:, :, None]).mean(1))


@pytest.mark.parametrize(("name", "norm"), [("batch", nn.BatchNorm2d), ("instance", nn.InstanceNorm2d)])
def test_output_projection_is_a_convolution_and_its_norm(name, norm):
    """Oktay's grid gate: the gated features pass W, a 1x1 convolution with a norm."""
    x, g = inputs(2)
    gate = AttentionGate(2, 6, 10, 4, output_norm=name)
    (gated,), _ = maps_by_hand(gate, x, g, 4)
    convolution, normalisation = gate.output
    assert isinstance(normalisation, norm)
    assert tuple(convolution.weight.shape) == (6, 6, 1, 1)
    torch.testing.assert_close(gate(x, g), normalisation(convolution(gated)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dims": 4}, "dims must be 2 or 3, got 4"),
        ({"heads": 0}, "heads must be at least 1, got 0"),
        ({"combine": "sum"}, "combine must be 'mean' or 'concat', got 'sum'"),
        ({"output_norm": "group"}, "output_norm must be one of .*got 'group'"),
        ({"signal": "pooled"}, "signal must be one of 'local', 'global', 'both', got 'pooled'"),
        ({"implementation": "fast"}, "implementation must be one of .*got 'fast'"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(UsageError, match=message):
        AttentionGate(**{"dims": 2, "x_channels": 6, "g_channels": 10, **options})


def kept_for_backward(module: nn.Module, x: Tensor, g: Tensor) -> set[tuple[int, ...]]:
    """Shapes of all that forward keeps, but for the parameters."""
    parameters = {parameter.data_ptr() for parameter in module.parameters()}
    shapes = set()

    def keep(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in parameters:
            shapes.add(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        module(x=x.requires_grad_(), g=g.requires_grad_())
    return shapes


def test_the_gate_keeps_nothing_of_its_inner_width_at_the_fine_grid():
    x, g = inputs(3)
    kept = kept_for_backward(AttentionGate(3, 6, 10, 4), x, g)
    assert tuple(x.shape) in kept
    assert not any(shape[1:] == (4, *x.shape[2:]) for shape in kept if len(shape) == 5)


def monai_pair(dims: int, dtype: torch.dtype) -> tuple[MonaiAttentionGate, nn.Module, dict[str, Tensor]]:
    """Our block and MONAI's with the same weights and statistics, and its inputs."""
    module = pytest.importorskip("monai.networks.nets.attentionunet", reason="MONAI is not installed")
    torch.manual_seed(0)
    theirs = module.AttentionBlock(dims, f_int=4, f_g=10, f_l=6).to(dtype)
    for norm in theirs.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias)
            nn.init.normal_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.5, 1.5)
    ours = MonaiAttentionGate(dims, f_int=4, f_g=10, f_l=6).to(dtype)
    ours.load_state_dict(theirs.state_dict())
    size = (5, 7) if dims == 2 else (3, 5, 7)
    return ours, theirs, {"g": torch.randn(2, 10, *size).to(dtype), "x": torch.randn(2, 6, *size).to(dtype)}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dims", [2, 3])
def test_block_equals_monais(dims, training):
    ours, theirs, tensors = monai_pair(dims, torch.float32)
    found, expected = ours.train(training)(**tensors), theirs.train(training)(**tensors)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("training", [False, True])
def test_gradients_of_the_block_equal_monais(training):
    ours, theirs, tensors = monai_pair(3, torch.float64)
    found: list[Any] = []
    for block in (ours.train(training), theirs.train(training)):
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
        block(**leaves).square().sum().backward()
        found.append([leaf.grad for leaf in leaves.values()] + [p.grad for p in block.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-7)


def test_block_in_training_takes_the_fused_tail(monkeypatch):
    ours, _, tensors = monai_pair(2, torch.float32)
    calls = []
    for name in ("_psi", "_scale"):
        op = getattr(ours, name)
        monkeypatch.setattr(ours, name, lambda *a, op=op, name=name: calls.append(name) or op(*a))
    ours.train()(**tensors)
    assert calls == ["_psi", "_scale"]


def test_reference_block_gives_the_numbers_of_auto():
    ours, _, tensors = monai_pair(2, torch.float32)
    plain = MonaiAttentionGate(2, f_int=4, f_g=10, f_l=6, implementation="reference")
    plain.load_state_dict(ours.state_dict())
    for training in (False, True):
        torch.testing.assert_close(ours.train(training)(**tensors), plain.train(training)(**tensors))


def test_block_trains_under_autocast():
    ours, _, tensors = monai_pair(2, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = ours.train()(**tensors)
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16
    assert all(parameter.grad is not None for parameter in ours.parameters())
