"""What is declared of a call of an op, and of the kernels that it launches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

MULTIPROCESSORS = 132  # of an H100 SXM


class ElementType(NamedTuple):
    """Of a tensor."""

    bytes: int
    mangled: str  # as kernels' names spell it


TYPES = {
    "bfloat16": ElementType(2, "N3c108BFloat16E"),
    "float32": ElementType(4, "f"),
    "int64": ElementType(8, "l"),
    "uint8": ElementType(1, "h"),
}


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
    loaded_bytes: float = 0  # from global memory into registers, of all threads; most of them out of caches
    stored_bytes: float = 0
    working: float = 1  # share of the warps that go the way which is priced
    # Of a kernel too small to hide them: loads that wait for one another on the longest way through it.
    waits: float = 0


@dataclass(frozen=True)
class HostCalls:
    """What an op's launch code asks of torch for one call, besides its launches."""

    allocations: int
    fills: int = 0  # of memory, each a launch of its own
    copies: int = 0  # of a tensor into another dtype or order, likewise
    checks: int = 0  # calls of to() and contiguous() that return what they are given


@dataclass(frozen=True)
class Configuration:
    """A call of an op."""

    name: str
    fewest_bytes: float
    launches: tuple[Launch, ...]
    timed_as: str | None = None  # its name in kernel_times.py
    host: HostCalls | None = None
