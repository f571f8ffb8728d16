"""One training step (forward, Dice + cross-entropy, backward, optimiser) of whole networks of equal widths.

Plain U-Nets: lungkit's ``UNet``, MONAI's ``BasicUNet`` and ``DynUNet``, nnU-Net's ``PlainConvUNet``. With attention
gates: lungkit's ``AttentionUNet``, with its gates fused, in plain PyTorch and in MONAI's form, and MONAI's
``AttentionUnet``. Each in both memory layouts and, in the full selection, compiled. Loss and optimiser are the same for
all: what differs is the network.

``lungkit, graph``, on a GPU, is lungkit's step as one CUDA graph, as ``lungkit-train`` runs it but with the optimiser
inside: what is left where the host is no limit.

``convolutions alone`` runs the convolutions of lungkit's network, each forward and backward on an input of its own,
with nothing between them: what no norm, activation, gate or loss can get below.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from harness import COMPILED, OURS, Case, Provider
from torch import Tensor, nn

from lungkit.losses import DiceCELoss
from lungkit.nn import AttentionUNet, MonaiAttentionUNet, UNet
from lungkit.training.captured_step import REHEARSALS, CudaRecorder

CONVOLUTIONS = "convolutions alone"
GRAPH = f"{OURS}, graph"
LAYOUTS = {"channels-last": True, "channels-first": False}
_MEMORY_FORMAT = {2: torch.channels_last, 3: torch.channels_last_3d}

Build = Callable[["TrainingStepCase"], nn.Module]


def _monai_basic(case: TrainingStepCase) -> nn.Module:
    from monai.networks.nets import BasicUNet

    features = (*case.features, case.features[0])
    return BasicUNet(case.dims, case.channels, 2, features, norm=("instance", {"affine": True}))


def _monai_dyn(case: TrainingStepCase) -> nn.Module:
    from monai.networks.nets import DynUNet

    levels = len(case.features)
    strides = [1, *(2,) * (levels - 1)]
    return DynUNet(case.dims, case.channels, 2, [3] * levels, strides, strides[1:], case.features)


def _nnunet_plain(case: TrainingStepCase) -> nn.Module:
    from dynamic_network_architectures.architectures.unet import PlainConvUNet

    levels, dims = len(case.features), case.dims
    return PlainConvUNet(
        case.channels,
        levels,
        case.features,
        {2: nn.Conv2d, 3: nn.Conv3d}[dims],
        3,
        [1, *(2,) * (levels - 1)],
        2,
        2,
        2,
        conv_bias=True,
        norm_op={2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}[dims],
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
    )


def _monai_attention(case: TrainingStepCase) -> nn.Module:
    from monai.networks.nets import AttentionUnet

    return AttentionUnet(case.dims, case.channels, 2, case.features, (2,) * (len(case.features) - 1))


def _attention(gate: str) -> Build:
    return lambda case: AttentionUNet(case.dims, case.channels, 2, features=case.features, gate=gate, seed=0)


FAMILIES: dict[str, dict[str, Build]] = {
    "U-Net": {
        OURS: lambda case: UNet(case.dims, case.channels, 2, features=case.features, seed=0),
        "MONAI DynUNet": _monai_dyn,
        "MONAI BasicUNet": _monai_basic,
        "nnU-Net PlainConvUNet": _nnunet_plain,
    },
    "attention U-Net": {
        OURS: _attention("auto"),
        "eager gates": _attention("reference"),
        "lungkit, MONAI's form": lambda case: MonaiAttentionUNet(
            case.dims, case.channels, 2, features=case.features
        ),
        "MONAI AttentionUnet": _monai_attention,
    },
}


@dataclass(frozen=True)
class TrainingStepCase(Case):
    """Networks of one family on one batch; the ratios are to lungkit's in channels-last."""

    family: str
    size: tuple[int, ...]
    features: tuple[int, ...]
    channels: int = 1
    batch: int = 1
    autocast: bool = False
    compiled: bool = False

    op = "training_step"
    modes = ("both",)

    @property
    def dims(self) -> int:
        return len(self.size)

    @property
    def label(self) -> str:
        shape = "x".join(map(str, (self.batch, self.channels, *self.size)))
        widths = "-".join(map(str, self.features))
        return f"{self.family} {shape} features {widths} {'bf16' if self.autocast else 'fp32'}"

    @property
    def providers(self) -> tuple[str, ...]:
        names = [
            name if (name, layout) == (OURS, "channels-last") else f"{name}, {layout}"
            for name in FAMILIES[self.family]
            for layout in LAYOUTS
        ]
        if self.device == "cuda":
            names.append(GRAPH)
        if self.compiled:
            names += [f"{name}, channels-last, {COMPILED}" for name in FAMILIES[self.family]]
        return (*names, CONVOLUTIONS)

    def inputs(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator(self.device).manual_seed(0)
        image = torch.randn(self.batch, self.channels, *self.size, generator=generator, device=self.device)
        labels = torch.randint(2, (self.batch, 1, *self.size), generator=generator, device=self.device)
        return image, labels.to(torch.uint8)

    def build(self, provider: str, inputs: tuple[Tensor, Tensor]) -> Provider:
        image, labels = inputs
        if provider == CONVOLUTIONS:
            return _convolutions_alone(self, self._network(OURS, channels_last=True), image)
        if provider == GRAPH:
            return _as_graph(self.build(OURS, inputs))
        name, compiled = provider.removesuffix(f", {COMPILED}"), provider.endswith(f", {COMPILED}")
        layout = next((known for known in LAYOUTS if name.endswith(f", {known}")), "channels-last")
        channels_last = LAYOUTS[layout]
        network = self._network(name.removesuffix(f", {layout}"), channels_last=channels_last)
        image = _in_layout(image, channels_last)
        forward = torch.compile(network) if compiled else network
        loss = DiceCELoss(softmax=True, to_onehot_y=True)
        optimiser = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9)

        def step(value: Any) -> None:
            value.backward()
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)

        def compute() -> Tensor:
            with torch.autocast(self.device, torch.bfloat16, enabled=self.autocast):
                output = forward(image)
            return loss(output, labels)

        return Provider(compute, step)

    def _network(self, name: str, *, channels_last: bool) -> nn.Module:
        network = FAMILIES[self.family][name](self).to(self.device).train()
        return network.to(memory_format=_MEMORY_FORMAT[self.dims]) if channels_last else network


def _as_graph(step: Provider) -> Provider:
    """Forward and backward of ``step``, with whatever belongs to them, as one graph."""
    backward = step.backward
    assert backward is not None

    def work() -> Tensor:
        loss: Tensor = step.forward()
        backward(loss)
        return loss.detach()

    recorder = CudaRecorder(torch.device("cuda"))
    for _ in range(REHEARSALS):
        recorder.rehearse(work)
    recording = recorder.record(work)

    def replay() -> Tensor:
        recording.replay()
        return recording.result

    return Provider(replay)


def _in_layout(image: Tensor, channels_last: bool) -> Tensor:
    return image.contiguous(memory_format=_MEMORY_FORMAT[image.dim() - 2]) if channels_last else image


def _convolutions_alone(case: TrainingStepCase, network: nn.Module, image: Tensor) -> Provider:
    """Every convolution of the network on an input of the shape and type that it gets there."""
    calls: list[tuple[nn.Module, Tensor]] = []
    modules = [m for m in network.modules() if isinstance(m, nn.modules.conv._ConvNd)]
    hooks = [
        m.register_forward_pre_hook(lambda m, args: calls.append((m, args[0].detach()))) for m in modules
    ]
    with torch.no_grad(), torch.autocast(case.device, torch.bfloat16, enabled=case.autocast):
        network(_in_layout(image, True))
    for hook in hooks:
        hook.remove()
    # The image itself needs no gradient, as in training.
    calls = [
        (m, x.clone(memory_format=torch.preserve_format).requires_grad_(i > 0))
        for i, (m, x) in enumerate(calls)
    ]

    def forward() -> list[Tensor]:
        with torch.autocast(case.device, torch.bfloat16, enabled=case.autocast):
            return [module(x) for module, x in calls]

    def backward(outputs: list[Tensor]) -> None:
        torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
        network.zero_grad(set_to_none=True)
        for _, x in calls:
            x.grad = None

    return Provider(forward, backward)
