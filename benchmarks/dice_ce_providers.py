"""Ways to compute the mean soft Dice + cross-entropy loss of logits against class indices, or against shares.

All take logits (B, C, *S) of any float dtype and labels (B, *S) of any integer dtype, or float32 shares (B, C, *S), and
return a scalar in float32.
``eager`` and ``compiled`` run the fastest of eight written forms that were tried for any number of classes. The forms
for two classes use that one sigmoid is enough there, which a user would have to know and write.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from harness import OURS, Case, Provider
from torch import Tensor

from lungkit.losses import DiceCELoss, SoftDiceCELoss

_SMOOTH = 1e-5
Loss = Callable[[Tensor, Tensor], Tensor]


def gather_form(logits: Tensor, labels: Tensor) -> Tensor:
    """One log-softmax; the overlap and the label volume by gather and scatter, without a one-hot tensor."""
    batch, classes = logits.shape[:2]
    log_p = logits.log_softmax(1, dtype=torch.float32)
    index = labels.long().unsqueeze(1)
    log_p_label = log_p.gather(1, index).reshape(batch, -1)
    p_label = log_p_label.exp()
    index = index.reshape(batch, -1)
    sums = torch.zeros(batch, classes, device=logits.device)
    overlap = sums.scatter_add(1, index, p_label)
    volume = sums.scatter_add(1, index, torch.ones_like(p_label))
    return _dice(overlap, log_p.exp().flatten(2).sum(2), volume) - log_p_label.mean()


def two_class_form(logits: Tensor, labels: Tensor) -> Tensor:
    """Two classes: the softmax is the sigmoid of the difference of the logits, and class 0 follows from class 1."""
    difference = (logits[:, 1].float() - logits[:, 0].float()).flatten(1)
    target = labels.flatten(1).float()
    p = torch.sigmoid(difference)
    voxels = difference.shape[1]
    overlap, prediction, volume = (p * target).sum(1), p.sum(1), target.sum(1)
    overlap_0 = voxels - prediction - volume + overlap
    return _dice(
        torch.stack((overlap_0, overlap), 1),
        torch.stack((voxels - prediction, prediction), 1),
        torch.stack((voxels - volume, volume), 1),
    ) + F.binary_cross_entropy_with_logits(difference, target)


def nnunet_formula(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy minus the soft Dice coefficient of the batch without background, as nnU-Net defines it.

    The memory-efficient way: the label vectors are boolean and need no gradient. Its value is that of
    ``DiceCELoss.nnunet()`` minus 1.
    """
    p = logits.softmax(1, dtype=torch.float32)[:, 1:]
    axes = (0, *range(2, logits.dim()))
    index = labels.long()
    with torch.no_grad():
        label = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device).scatter_(
            1, index.unsqueeze(1), True
        )[:, 1:]
        volume = label.sum(axes)
    overlap, prediction = (p * label).sum(axes), p.sum(axes)
    coefficient = (2 * overlap + _SMOOTH) / (prediction + volume + _SMOOTH).clamp_min(1e-8)
    return F.cross_entropy(logits.float(), index) - coefficient.mean()


def shares_form(logits: Tensor, shares: Tensor) -> Tensor:
    """Soft labels (B, C, *S): Dice with the minimum of p and y (Wang et al., 2023) and cross-entropy."""
    log_p = logits.log_softmax(1, dtype=torch.float32)
    p = log_p.exp()
    axes = tuple(range(2, logits.dim()))
    overlap = torch.minimum(p, shares).sum(axes)
    entropy = (shares * log_p).sum() / log_p[:, 0].numel()
    return _dice(overlap, p.sum(axes), shares.sum(axes)) - entropy


def _dice(overlap: Tensor, prediction: Tensor, volume: Tensor) -> Tensor:
    return (1 - (2 * overlap + _SMOOTH) / (prediction + volume + _SMOOTH)).mean()


def _monai() -> Loss:
    from monai.losses import DiceCELoss as MonaiLoss

    loss = MonaiLoss(softmax=True, to_onehot_y=True)
    return lambda logits, labels: loss(logits, labels.unsqueeze(1))


LOSSES: dict[str, Callable[[], Loss]] = {
    OURS: lambda: DiceCELoss(softmax=True, to_onehot_y=True),
    "eager": lambda: gather_form,
    "compiled": lambda: torch.compile(gather_form, dynamic=False),
    "eager, 2 classes": lambda: two_class_form,
    "compiled, 2 classes": lambda: torch.compile(two_class_form, dynamic=False),
    "MONAI": _monai,
    "nnU-Net's formula": lambda: nnunet_formula,
}


LOSSES_OF_SHARES: dict[str, Callable[[], Loss]] = {
    OURS: SoftDiceCELoss,
    "eager": lambda: shares_form,
    "compiled": lambda: torch.compile(shares_form, dynamic=False),
}


@dataclass(frozen=True)
class DiceCECase(Case):
    """Loss and logit gradient of random logits and labels."""

    shape: tuple[int, ...]
    logits_dtype: torch.dtype = torch.float32
    labels_dtype: torch.dtype = torch.uint8
    channels_last: bool = False

    op = "dice_ce"

    @property
    def label(self) -> str:
        size = "x".join(map(str, self.shape))
        order = " channels-last" if self.channels_last else ""
        return f"{size} {_name(self.logits_dtype)} {_name(self.labels_dtype)}{order}"

    @property
    def providers(self) -> tuple[str, ...]:
        return tuple(name for name in LOSSES if self.shape[1] == 2 or "2 classes" not in name)

    @property
    def dtype(self) -> torch.dtype:
        return self.logits_dtype

    def main_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.logits_dtype.itemsize

    def fewest_bytes(self) -> Mapping[str, int]:
        """Forward reads logits and labels; backward reads them again and writes the gradient."""
        logits = self.main_bytes()
        labels = torch.Size(self.shape).numel() // self.shape[1] * self.labels_dtype.itemsize
        return {"forward": logits + labels, "backward": 2 * logits + labels}

    def inputs(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator(self.device).manual_seed(0)
        logits = torch.randn(self.shape, generator=generator, device=self.device).to(self.logits_dtype)
        if self.channels_last:
            order = torch.channels_last if len(self.shape) == 4 else torch.channels_last_3d
            logits = logits.contiguous(memory_format=order)
        grid = (self.shape[0], *self.shape[2:])
        labels = torch.randint(self.shape[1], grid, generator=generator, device=self.device)
        return logits.requires_grad_(), labels.to(self.labels_dtype)

    def build(self, provider: str, inputs: tuple[Tensor, Tensor]) -> Provider:
        return self._provider(LOSSES[provider](), *inputs)

    def _provider(self, loss: Loss, logits: Tensor, labels: Tensor) -> Provider:
        def backward(value: Any) -> tuple[Tensor, ...]:
            return torch.autograd.grad(value, logits)

        return Provider(lambda: loss(logits, labels), backward)


@dataclass(frozen=True)
class SharesCase(DiceCECase):
    """The same of soft labels, one float32 vector a voxel."""

    labels_dtype: torch.dtype = torch.float32

    @property
    def label(self) -> str:
        return f"{super().label} shares"

    @property
    def providers(self) -> tuple[str, ...]:
        return tuple(LOSSES_OF_SHARES)

    def fewest_bytes(self) -> Mapping[str, int]:
        logits, labels = self.main_bytes(), torch.Size(self.shape).numel() * self.labels_dtype.itemsize
        return {"forward": logits + labels, "backward": 2 * logits + labels}

    def inputs(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator(self.device).manual_seed(0)
        drawn = [torch.randn(self.shape, generator=generator, device=self.device) for _ in range(2)]
        return drawn[0].to(self.logits_dtype).requires_grad_(), drawn[1].softmax(1)

    def build(self, provider: str, inputs: tuple[Tensor, Tensor]) -> Provider:
        return self._provider(LOSSES_OF_SHARES[provider](), *inputs)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
