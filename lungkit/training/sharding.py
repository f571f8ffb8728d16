"""Networks whose weights are shared out over processes (FSDP2), and their state as that of one process."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed
from torch import Tensor, nn

from lungkit.training.schedule import average_buffers

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

_LARGEST_BUNDLE = 64 << 20


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
    must call it.

    Shards travel together, up to 64 MiB of a process at a time, and not one by one as hundreds of messages of a few
    bytes (``DTensor.full_tensor``), in which gloo of torch 2.13 has been seen to damage its heap and abort.
    """
    from torch.distributed.tensor import DTensor

    def visit(value: Any, of_shard: Callable[[DTensor], Any]) -> Any:
        if isinstance(value, DTensor):
            return of_shard(value)
        if isinstance(value, dict):
            return {name: visit(entry, of_shard) for name, entry in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(visit(entry, of_shard) for entry in value)
        return value

    shards: list[DTensor] = []
    visit(state, shards.append)
    whole = chain.from_iterable(map(_gathered_together, _bundles(shards)))
    return visit(state, lambda _: next(whole))


def _bundles(shards: list[DTensor]) -> Iterator[list[DTensor]]:
    """Neighbours of one number format, of some MiB together."""
    bundle: list[DTensor] = []
    size = 0
    for shard in shards:
        own = _padded_size(shard) * shard.dtype.itemsize
        if bundle and (shard.dtype != bundle[0].dtype or size + own > _LARGEST_BUNDLE):
            yield bundle
            bundle, size = [], 0
        bundle.append(shard)
        size += own
    if bundle:
        yield bundle


def _gathered_together(bundle: list[DTensor]) -> list[Tensor]:
    """Whole tensors of shards along their first axis, by one message of each process."""
    mesh = bundle[0].device_mesh
    own = [_padded_size(shard) for shard in bundle]
    sent = torch.zeros(sum(own), dtype=bundle[0].dtype, device=bundle[0].device)
    for part, shard in zip(sent.split(own), bundle, strict=True):
        local = shard.to_local().detach()
        part[: local.numel()] = local.reshape(-1)  # the last shards may be shorter, or empty
    received = sent.new_empty(mesh.size(), len(sent))
    torch.distributed.all_gather(list(received), sent, group=mesh.get_group())
    parts = received.cpu().split(own, dim=1)
    return [
        part.reshape(-1, *shard.shape[1:])[: shard.shape[0]].clone()
        for part, shard in zip(parts, bundle, strict=True)
    ]


def _padded_size(shard: DTensor) -> int:
    """Elements of the first process's part, which no other's exceeds (``torch.chunk``)."""
    return math.ceil(shard.shape[0] / shard.device_mesh.size()) * math.prod(shard.shape[1:])


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
        self._buffers = list(zip(whole.buffers(), network.buffers(), strict=True))

    @torch.no_grad()
    def update(self, *, updates: int) -> None:
        """Move the average towards the weights; ``updates`` counts the updates before this one."""
        decay = min(self.decay, (1 + updates) / (10 + updates))
        averages = [_local(value) for value in self._averages]
        weights = [_local(value.detach()) for value in self._trained.parameters()]
        torch._foreach_lerp_(averages, weights, 1 - decay)
        average_buffers(self._buffers, decay)

    @torch.no_grad()
    def gather(self) -> None:
        """Bring :attr:`network` up to date; every process must call it."""
        for whole, average in zip(self.network.parameters(), gathered(self._averages), strict=True):
            whole.copy_(average)

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """Take averaged weights, those of a checkpoint."""
        self.network.load_state_dict(state)
        for average, whole in zip(self._averages, self.network.parameters(), strict=True):
            _local(average).copy_(_local(shared_out(whole.detach(), average)))


def _local(value: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor

    return value.to_local() if isinstance(value, DTensor) else value
