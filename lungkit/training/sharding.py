"""Networks whose weights are shared out over processes (FSDP2), and their state as that of one process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def shard_network(network: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Share the weights of ``network`` out over ``mesh``: those of each block, and all others together.

    A process holds its part of every weight, gradient and moment, and gathers the weights of a block while it computes
    with them (Zhao et al., "PyTorch FSDP", 2023; ``torch.distributed.fsdp.fully_shard``).
    """
    from torch.distributed.fsdp import fully_shard

    data = mesh["data_parallel"]
    for name in ("encoder", "decoder"):
        blocks = getattr(network, name, None)
        for block in blocks if isinstance(blocks, nn.ModuleList) else ():
            fully_shard(block, mesh=data)
    fully_shard(network, mesh=data)
    return network


def gathered(state: Any) -> Any:
    """``state`` (of a network or an optimiser) with whole tensors, in the memory of the CPU, for shards; every process
    must call it."""
    from torch.distributed.tensor import DTensor

    if isinstance(state, DTensor):
        return state.full_tensor().cpu()
    if isinstance(state, dict):
        return {name: gathered(value) for name, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(gathered(value) for value in state)
    return state


def shared_out(whole: Tensor, like: Tensor) -> Tensor:
    """This process's part of ``whole``, as ``like`` is shared out; ``whole`` itself where ``like`` is no shard."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(like, DTensor) or whole.shape != like.shape:
        return whole
    # Each process cuts its part from the whole: the first one loads alone, and must not wait for the others.
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def load_whole(network: nn.Module, state: dict[str, Tensor]) -> None:
    """Load the state of one process into a network that is shared out."""
    own = network.state_dict()
    network.load_state_dict({name: shared_out(value, own.get(name, value)) for name, value in state.items()})


def shared_out_moments(optimiser: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """The state of an optimiser of one process as one of shards takes it."""
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    moments = {
        index: {name: shared_out(value, parameters[index]) for name, value in entry.items()}
        for index, entry in state["state"].items()
    }
    return {**state, "state": moments}


class ShardedWeightAverage:
    """:class:`~lungkit.training.schedule.WeightAverage` of a network that is shared out: of its shards.

    Args:
        network: shared out; updates follow it.
        whole: a copy of it from before.
        decay: as there.

    ``network`` is ``whole``, with the averaged weights as of the last :meth:`gather`.
    """

    def __init__(self, network: nn.Module, whole: nn.Module, *, decay: float) -> None:
        self.decay = decay
        self.network = whole
        self._trained = network
        self._averages = [parameter.detach().clone() for parameter in network.parameters()]

    @torch.no_grad()
    def update(self, *, updates: int) -> None:
        """Move the average towards the weights; ``updates`` counts the updates before this one."""
        decay = min(self.decay, (1 + updates) / (10 + updates))
        averages = [_local(value) for value in self._averages]
        weights = [_local(value.detach()) for value in self._trained.parameters()]
        torch._foreach_lerp_(averages, weights, 1 - decay)

    @torch.no_grad()
    def gather(self) -> None:
        """Bring :attr:`network` up to date; every process must call it."""
        for whole, average in zip(self.network.parameters(), self._averages, strict=True):
            whole.copy_(gathered(average))
        for copied, value in zip(self.network.buffers(), self._trained.buffers(), strict=True):
            copied.copy_(value)

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """Take averaged weights, those of a checkpoint."""
        self.network.load_state_dict(state)
        for average, whole in zip(self._averages, self.network.parameters(), strict=True):
            _local(average).copy_(_local(shared_out(whole.detach(), average)))


def _local(value: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor

    return value.to_local() if isinstance(value, DTensor) else value
