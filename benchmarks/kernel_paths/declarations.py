"""What is declared of a call of an op, and of the kernels that it launches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

MULTIPROCESSORS = 132  # of an H100 SXM


@dataclass(frozen=True)
class Launch:
    """One kernel of a configuration."""

    source: str  # the op's folder in csrc
    kernel: str  # piece of the mangled name
    blocks: int
    threads: int
    shared_bytes: int  # dynamic
    # By a piece of their source line: how often a loop turns, or each of several loops that the compiler made of it.
    trips: Mapping[str, float | tuple[float, ...]]
    skipped: Sequence[str]
    moved_bytes: float
    in_flight_bytes: float  # loads of a warp that are on their way while it computes
    units: float  # runs of 32 voxels that all warps take together; of 32 elements in gate_tail and norm_act
    products: float = 0  # 16 x 8 x 16 blocks on the tensor cores, of all warps
    copied_bytes: float = 0  # from global to shared memory, asynchronously
    waits: float = (
        0  # of a kernel too small to hide it: loads that wait for one another on the longest way through
    )


@dataclass(frozen=True)
class HostCalls:
    """What an op's launch code asks of torch for one call, besides its launches."""

    allocations: int
    fills: int = 0  # of memory, each a launch of its own
    copies: int = 0  # of a tensor into another dtype or order, likewise


@dataclass(frozen=True)
class Configuration:
    """A call of an op."""

    name: str
    fewest_bytes: float
    launches: tuple[Launch, ...]
    timed_as: str | None = None  # its name in kernel_times.py
    host: HostCalls | None = None
