"""What one rank of the synchronised Dice test does; a module of its own, since a spawned process imports it by name."""

from __future__ import annotations

import os

import torch

from lungkit.losses import DiceCELoss

WEIGHT = torch.tensor([0.2, 1.0, 3.0])


def run_rank(rank: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", RANK=str(rank), WORLD_SIZE="2")
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    network, images, labels = network_and_batch()
    model = torch.nn.parallel.DistributedDataParallel(network)
    share = slice(0, 1) if rank == 0 else slice(1, 3)
    loss = criterion(synchronise=True)(model(images[share]), labels[share])
    loss.backward()
    gradients = [parameter.grad for parameter in network.parameters()]
    torch.save((loss.detach(), gradients), f"{folder}/rank{rank}.pt")
    torch.distributed.destroy_process_group()


def network_and_batch():
    torch.manual_seed(0)
    network = torch.nn.Conv2d(1, 3, 3, padding=1).double()
    labels = torch.randint(0, 3, (3, 1, 8, 8))
    labels[2, 0, :5] = 255  # the ranks have different numbers of voxels
    return network, torch.randn(3, 1, 8, 8, dtype=torch.float64), labels


def criterion(*, synchronise: bool) -> DiceCELoss:
    return DiceCELoss(
        softmax=True,
        batch=True,
        weight=WEIGHT,
        label_smoothing=0.1,
        ignore_index=255,
        synchronise=synchronise,
    )
