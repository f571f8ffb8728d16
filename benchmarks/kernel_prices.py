"""What a kernel costs, from its machine code and what kernel_paths declares: floors, limits, predicted seconds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from cubins import Resources
from kernel_paths import MULTIPROCESSORS, Configuration, Launch
from sass import Function, executions

# An H100 SXM. Of the memory's 3.35 TB/s a copy reaches about 92 %; a request is on its way for about 0.8 us; a warp
# scheduler that never waits is a bound that no kernel reaches. The last three are rules of thumb.
CLOCK_HZ = 1.755e9
BYTES_PER_SECOND = 3.35e12
ISSUES_PER_SECOND = MULTIPROCESSORS * 4 * CLOCK_HZ
WAVEFRONTS_PER_SECOND = MULTIPROCESSORS * CLOCK_HZ
PRODUCTS_PER_SECOND = (
    MULTIPROCESSORS * 4 * CLOCK_HZ / 6.5
)  # 16 x 8 x 16 by mma, at 62 % of the tensor cores' peak
REACHED_OF_BANDWIDTH, REACHED_OF_ISSUES, SECONDS_ON_THE_WAY = 0.92, 0.75, 0.8e-6
LAUNCH_SECONDS = 1.5e-6  # of every launch after the first, on one stream
# Of a kernel too small to hide it: what an instruction takes that the next one needs, and a load from the second-level
# cache. So 4 kernels that ncu timed on an H200 come out within a third: 4.7, 4.0, 5.5 and 12 us.
STEP_CYCLES = {"memory": 24, "special": 20, "double": 10}
OTHER_STEP_CYCLES, WAIT_SECONDS = 5, 0.6e-6
SHARED_OF_MULTIPROCESSOR, REGISTERS_OF_MULTIPROCESSOR = 228 << 10, 1 << 16


@dataclass(frozen=True)
class Price:
    """A launch, in seconds and bytes."""

    launch: Launch
    resources: Resources
    per_unit: Mapping[str, float]  # instructions of a warp for 32 voxels, by pipe
    products: float
    issue: float
    tensor: float
    memory_pipe: float
    memory: float
    warps: int  # resident on a multiprocessor
    balance: float  # of the work over the multiprocessors
    latency: float  # of the longest way through a small kernel, else 0
    access_bytes: float  # that a lane reads or writes of global memory by one instruction, on average
    accessed: Mapping[
        str, float
    ]  # bytes of global memory, of all lanes, by LDG, STG and LDGSTS: loads, stores, copies

    @property
    def instructions(self) -> float:
        return sum(self.per_unit.values())

    @property
    def in_flight(self) -> float:
        """Bytes on their way to a multiprocessor."""
        return self.warps * self.launch.in_flight_bytes

    @property
    def limits(self) -> dict[str, float]:
        reach = min(
            REACHED_OF_BANDWIDTH, self.in_flight / SECONDS_ON_THE_WAY * MULTIPROCESSORS / BYTES_PER_SECOND
        )
        memory = "bandwidth" if reach == REACHED_OF_BANDWIDTH else "bytes in flight"
        return {
            memory: self.memory / reach,
            "issue": self.issue / REACHED_OF_ISSUES,
            "tensor cores": self.tensor / REACHED_OF_ISSUES,
            "memory pipe": self.memory_pipe / REACHED_OF_ISSUES,
        }

    @property
    def limit(self) -> str:
        limits = self.limits
        longest = max(limits, key=lambda name: limits[name])
        return longest if limits[longest] / self.balance >= self.latency else "latency"

    @property
    def seconds(self) -> float:
        return max(max(self.limits.values()) / self.balance, self.latency)


def resident_warps(launch: Launch, resources: Resources) -> int:
    per_block = launch.threads // 32
    registers = math.ceil(resources.registers * 32 / 256) * 256 * per_block
    shared = launch.shared_bytes + max(resources.static_shared, 1024)  # 1 KB is the system's
    blocks = min(
        REGISTERS_OF_MULTIPROCESSOR // registers, SHARED_OF_MULTIPROCESSOR // shared, 64 // per_block, 32
    )
    return min(blocks, math.ceil(launch.blocks / MULTIPROCESSORS)) * per_block


def balance(launch: Launch, resident: int) -> float:
    """How evenly the multiprocessors are used: 1 where each has as much to do as the others."""
    if any(
        "run.valid" in line for line in launch.trips
    ):  # warps take runs in turn: the last round is full or not
        rounds = launch.units / (launch.blocks * launch.threads / 32)
    elif (
        launch.blocks <= MULTIPROCESSORS * resident * 32 // launch.threads
    ):  # all blocks are resident at once
        rounds = launch.blocks / MULTIPROCESSORS
    else:
        return 1.0
    return rounds / math.ceil(rounds)


def price(launch: Launch, function: Function, resources: Resources) -> Price:
    counts = executions(function, launch.trips, launch.skipped)
    warps = launch.blocks * launch.threads / 32 * launch.working
    pipes: dict[str, float] = {}
    accessed: dict[str, float] = {}
    wavefronts = products = accesses = 0.0
    for count, instruction in zip(counts, function.code, strict=True):
        pipes[instruction.pipe] = pipes.get(instruction.pipe, 0.0) + count
        wavefronts += count * instruction.wavefronts
        products += count * (instruction.pipe == "tensor")
        accesses += count * (instruction.access_bytes > 0)
        kind = instruction.opcode.split(".")[0]
        accessed[kind] = accessed.get(kind, 0.0) + count * instruction.access_bytes
    resident = resident_warps(launch, resources)
    cycles = sum(count * STEP_CYCLES.get(pipe, OTHER_STEP_CYCLES) for pipe, count in pipes.items())
    return Price(
        launch,
        resources,
        {pipe: count * warps / launch.units for pipe, count in sorted(pipes.items())},
        products * warps,
        sum(pipes.values()) * warps / ISSUES_PER_SECOND,
        products * warps / PRODUCTS_PER_SECOND,
        wavefronts * warps / WAVEFRONTS_PER_SECOND,
        launch.moved_bytes / BYTES_PER_SECOND,
        resident,
        balance(launch, resident),
        launch.waits * WAIT_SECONDS + cycles / CLOCK_HZ if launch.waits else 0.0,
        sum(accessed.values()) / accesses if accesses else 0.0,
        {kind: 32 * warps * size for kind, size in accessed.items() if size},
    )


@dataclass(frozen=True)
class Prediction:
    """A configuration with the prices of its launches."""

    configuration: Configuration
    prices: tuple[Price, ...]

    @property
    def seconds(self) -> float:
        return sum(price.seconds for price in self.prices) + LAUNCH_SECONDS * (len(self.prices) - 1)

    @property
    def issue(self) -> float:
        return sum(price.issue for price in self.prices)

    @property
    def moved(self) -> float:
        """Seconds of the bytes that its kernels move."""
        return sum(price.memory for price in self.prices)

    @property
    def share(self) -> float:
        return self.configuration.fewest_bytes / BYTES_PER_SECOND / self.seconds
