"""What one rank of the tests of synchronised losses does; a module of its own: a spawned process imports it by name."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lungkit.losses import (
    CodedLabelsLoss,
    DeepSupervisionLoss,
    DiceCELoss,
    DiceFocalLoss,
    FocalTverskyLoss,
    LesionDiceLoss,
    SoftDiceCELoss,
)

_IGNORED = 255
_WEIGHT = torch.tensor([0.2, 1.0, 3.0])
_VECTORS = torch.tensor([[0.7, 0.2, 0.1], [0.0, 1.0, 0.0], [0.25, 0.25, 0.5]])


class _TwoLevels(nn.Module):
    """Logits on the grid and on one half as fine, as a network with deep supervision gives them."""

    def __init__(self) -> None:
        super().__init__()
        self.fine, self.coarse = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(1, 3, 3, stride=2, padding=1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.fine(images), self.coarse(images)


def _dice_ce(*, synchronise: bool, **options: object) -> nn.Module:
    return DiceCELoss(
        softmax=True,
        weight=_WEIGHT,
        label_smoothing=0.1,
        ignore_index=_IGNORED,
        synchronise=synchronise,
        **options,
    )


def _soft(*, synchronise: bool, **options: object) -> nn.Module:
    return CodedLabelsLoss(SoftDiceCELoss(synchronise=synchronise, **options), _VECTORS)


def _regions(*, synchronise: bool, **options: object) -> nn.Module:
    return CodedLabelsLoss(DiceFocalLoss(sigmoid=True, synchronise=synchronise, **options), _VECTORS.round())


def _focal_tversky(*, synchronise: bool, **options: object) -> nn.Module:
    return FocalTverskyLoss(softmax=True, ignore_index=_IGNORED, synchronise=synchronise, **options)


class _OneLesion(LesionDiceLoss):
    """Of what is class 1 in an image."""

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return super().forward(logits, labels[:, 0], (labels[:, 0] == 1).to(torch.int32))


_KINDS: dict[str, Callable[..., nn.Module]] = {
    "Dice + CE": _dice_ce,
    "soft": _soft,
    "regions": _regions,
    "focal Tversky": _focal_tversky,
}

CRITERIA: dict[str, Callable[..., nn.Module]] = {
    f"{kind}, {'batch' if batch else 'image'}, {reduction}": (
        lambda synchronise, build=build, batch=batch, reduction=reduction: DeepSupervisionLoss(
            build(synchronise=synchronise, batch=batch, reduction=reduction)
        )
    )
    for kind, build in _KINDS.items()
    for batch in (True, False)
    for reduction in ("mean", "sum")
} | {"lesions": lambda synchronise: DeepSupervisionLoss(_OneLesion(synchronise=synchronise))}
"""Losses that training uses, by their options; of every output of a network with deep supervision."""


def run_rank(rank: int, ranks: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", RANK=str(rank), WORLD_SIZE=str(ranks))
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks
    )
    share = slice(*{2: [(0, 1), (1, 4)], 3: [(0, 1), (1, 3), (3, 4)]}[ranks][rank])
    torch.save({name: _on_share(build, share) for name, build in CRITERIA.items()}, f"{folder}/rank{rank}.pt")
    gc.collect()  # models keep the group, whose threads must not outlive the interpreter
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _on_share(build: Callable[..., nn.Module], share: slice) -> tuple[Tensor, list[Tensor | None]]:
    network, images, labels = network_and_batch()
    model = nn.parallel.DistributedDataParallel(network)
    loss = build(synchronise=True)(model(images[share]), labels[share])
    loss.backward()
    return loss.detach(), [parameter.grad for parameter in network.parameters()]


def network_and_batch() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    network = _TwoLevels().double()
    labels = torch.randint(0, 3, (4, 1, 8, 8), dtype=torch.uint8)
    labels[0] = _IGNORED  # the first rank has no voxel that counts
    labels[3, 0, :5] = _IGNORED
    return network, torch.randn(4, 1, 8, 8, dtype=torch.float64), labels
