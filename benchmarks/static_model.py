"""What the compiled CUDA code says before a GPU has run it: predicted times of the headline configurations.

``python benchmarks/static_model.py`` from the checkout compiles csrc/<op>/cuda.cu for ``--architectures`` (default 80
and 90; ``--cubins`` keeps what it compiles) and prices each kernel: instructions that a warp issues for 32
voxels, by pipe; the time that the schedulers, the tensor cores and the memory pipe need at least (the floors); the
bytes; the warps that fit a multiprocessor and the bytes that these have on their way. It needs nvcc and
lungkit's extra ``cuda-dev`` or the CUDA toolkit's nvdisasm and cuobjdump. Writes
``results/h100-predicted.md`` and ``.json``, for the sizes of an H100 SXM.

``--check`` writes nothing and fails where a kernel spills registers to memory or is dearer than
``kernel-budgets.json`` allows; ``--tighten`` writes today's prices there.

None of these numbers is a measurement.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kernel_paths import MULTIPROCESSORS, Configuration, Launch, configurations
from sass import Function, executions, functions, listing, tool

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BUDGETS = ROOT / "benchmarks" / "kernel-budgets.json"

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
SHARED_OF_MULTIPROCESSOR, REGISTERS_OF_MULTIPROCESSOR = 228 << 10, 1 << 16


@dataclass(frozen=True)
class Resources:
    """What ptxas gave a kernel."""

    registers: int
    static_shared: int
    stack: int
    local: int


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
    def seconds(self) -> float:
        return max(self.limits.values()) / self.balance


def resources_of(cubin: Path) -> dict[str, Resources]:
    text = subprocess.run(
        [tool("cuobjdump"), "-res-usage", str(cubin)], capture_output=True, text=True, check=True
    ).stdout
    pattern = r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
    return {
        name: Resources(int(registers), int(shared), int(stack), int(local))
        for name, registers, stack, shared, local in re.findall(pattern, text)
    }


def resident_warps(launch: Launch, resources: Resources) -> int:
    per_block = launch.threads // 32
    registers = math.ceil(resources.registers * 32 / 256) * 256 * per_block
    shared = launch.shared_bytes + max(resources.static_shared, 1024)  # 1 KB is the system's
    blocks = min(
        REGISTERS_OF_MULTIPROCESSOR // registers, SHARED_OF_MULTIPROCESSOR // shared, 64 // per_block, 32
    )
    return min(blocks, math.ceil(launch.blocks / MULTIPROCESSORS)) * per_block


def price(launch: Launch, function: Function, resources: Resources) -> Price:
    counts = executions(function, launch.trips, launch.skipped)
    warps = launch.blocks * launch.threads / 32
    pipes: dict[str, float] = {}
    wavefronts = products = 0.0
    for count, instruction in zip(counts, function.code, strict=True):
        pipes[instruction.pipe] = pipes.get(instruction.pipe, 0.0) + count
        wavefronts += count * instruction.wavefronts
        products += count * (instruction.pipe == "tensor")
    resident = resident_warps(launch, resources)
    # Warps in turn take runs: the last round is full or not. Blocks of other kernels come in waves.
    rounds = launch.units / warps if any("run.valid" in line for line in launch.trips) else 0
    balance = rounds / math.ceil(rounds) if rounds else 1.0
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
        balance,
    )


def compiled(sources: Sequence[str], architecture: str, folder: Path) -> list[Path]:
    """Cubins of the ops, in ``folder``; one that is newer than its sources is not compiled again."""
    import torch

    include = Path(torch.__file__).parent / "include"
    made = []
    for source in sources:
        made.append(folder / f"{source}.sm_{architecture}.cubin")
        read = [*(ROOT / "csrc" / source).iterdir(), *(ROOT / "csrc" / "support").iterdir()]
        if made[-1].is_file() and made[-1].stat().st_mtime > max(path.stat().st_mtime for path in read):
            continue
        command = [
            shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc", f"-arch=sm_{architecture}",
            "-std=c++20", "-O3", "-cubin", "-lineinfo", "--expt-relaxed-constexpr", "--extended-lambda", "-DUSE_CUDA",
            "-DTORCH_TARGET_VERSION=0x020a000000000000ULL", "-isystem", str(include),
            str(ROOT / "csrc" / source / "cuda.cu"), "-o", str(made[-1]),
        ]  # fmt: skip
        subprocess.run(command, check=True)
    return made


@dataclass(frozen=True)
class Prediction:
    """A configuration with the prices of its launches."""

    configuration: Configuration
    prices: tuple[Price, ...]

    @property
    def seconds(self) -> float:
        return sum(price.seconds for price in self.prices) + LAUNCH_SECONDS * (len(self.prices) - 1)

    @property
    def share(self) -> float:
        return self.configuration.fewest_bytes / BYTES_PER_SECOND / self.seconds


def predictions(cubins: Sequence[Path]) -> tuple[list[Prediction], dict[str, Resources]]:
    wanted = configurations()
    names = {launch.kernel for configuration in wanted for launch in configuration.launches}
    found: dict[str, Function] = {}
    resources: dict[str, Resources] = {}
    for cubin in cubins:
        resources |= resources_of(cubin)
        found |= {function.name: function for function in functions(listing(cubin), sorted(names))}

    def of(launch: Launch) -> Price:
        matches = [name for name in found if launch.kernel in name]
        if len(matches) != 1:
            raise ValueError(f"{launch.kernel} names {len(matches)} kernels: {matches}")
        return price(launch, found[matches[0]], resources[matches[0]])

    return [Prediction(c, tuple(map(of, c.launches))) for c in wanted], resources


def table(found: Sequence[Prediction]) -> str:
    """Markdown: one row a kernel, and one for what a call of the op takes together."""
    header = (
        "configuration, kernel", "instructions for 32 voxels", "memory", "tensor", "multiply", "alu", "registers",
        "warps",
        "KB in flight", "issue us", "tensor us", "memory pipe us", "bytes us", "predicted us", "limit", "share",
    )  # fmt: skip
    rows: list[tuple[str, ...]] = []
    for prediction in found:
        for p in prediction.prices:
            pipes = [f"{p.per_unit.get(pipe, 0):.0f}" for pipe in ("memory", "tensor", "multiply", "alu")]
            floors = [f"{1e6 * t:.1f}" for t in (p.issue, p.tensor, p.memory_pipe, p.memory, p.seconds)]
            limit = max(p.limits, key=lambda name, p=p: p.limits[name])
            kernel = re.split(r"IN3c10|I[fd]E", p.launch.kernel)[0]
            rows.append((
                kernel, f"{p.instructions:.0f}", *pipes, str(p.resources.registers), str(p.warps),
                f"{p.in_flight / 1024:.0f}", *floors, limit, "",
            ))  # fmt: skip
        fewest = prediction.configuration.fewest_bytes / BYTES_PER_SECOND
        moved = sum(p.memory for p in prediction.prices)
        issue = sum(p.issue for p in prediction.prices)
        rows.append((
            f"**{prediction.configuration.name}**", "", "", "", "", "", "", "", "", f"**{1e6 * issue:.1f}**", "", "",
            f"**{1e6 * moved:.1f}** ({moved / fewest:.2f} x {1e6 * fewest:.1f})", f"**{1e6 * prediction.seconds:.0f}**",
            f"{len(prediction.prices)} launches", f"**{100 * prediction.share:.0f} %**",
        ))  # fmt: skip
    lines = ["| " + " | ".join(row) + " |" for row in (header, *rows)]
    lines.insert(1, "|" + " --- |" * len(header))
    return "\n".join(lines)


def report(found: Sequence[Prediction]) -> str:
    return f"""# Predicted, not measured: lungkit's attention gate on an H100

`python benchmarks/static_model.py` read these numbers from the machine code for compute capability 9.0; what an H200
measured is in h200/measured.md. The floors are bounds: instructions issued, tensor products, passes of the memory pipe,
bytes at 3.35 TB/s. What a kernel is predicted to take rests on rules of thumb besides (\
{100 * REACHED_OF_BANDWIDTH:.0f} % of the bandwidth,
{100 * REACHED_OF_ISSUES:.0f} % of the issue slots, \
{1e6 * SECONDS_ON_THE_WAY:.1f} us of latency), and on uneven shares of the work; sectors of the caches, bank
conflicts and waits within a warp are not in it. `share`: time of the fewest bytes that must be read and written, at the
full bandwidth, over the predicted time. Blocks of code that a configuration may skip at run time count as executed
unless benchmarks/kernel_paths says why not.

## Predicted times

{table(found)}
"""


def prices_by_kernel(found: Sequence[Prediction]) -> dict[str, float]:
    return {
        f"{prediction.configuration.name}: {re.split('IN3c10|I[fd]E', p.launch.kernel)[0]}": math.ceil(
            p.instructions
        )
        for prediction in found
        for p in prediction.prices
    }


def seconds_by_name(found: Sequence[Prediction]) -> dict[str, float]:
    """Predicted seconds by the names of kernel_times.py, so that gpu_hour.py joins them to what was measured.

    There a backward pass is timed with its forward pass, as "both".
    """
    seconds: dict[str, float] = {}
    for prediction in found:
        name = prediction.configuration.timed_as
        if name is not None:
            seconds[name] = prediction.seconds
            if " backward " in name:
                forward = seconds[name.replace(" backward ", " forward ")]
                seconds[name.replace(" backward ", " both ")] = forward + prediction.seconds
    return seconds


def problems(
    found: Sequence[Prediction], resources: Mapping[str, Resources], budgets: Mapping[str, float]
) -> list[str]:
    """Kernels that spill, that lack products of the path which they are priced for, or that are over their budget."""
    spills = [
        f"{name} spills: {r.stack} bytes of stack" for name, r in resources.items() if r.stack or r.local
    ]
    wrong = [
        f"{prediction.configuration.name}: {p.products:.0f} products in the code, {p.launch.products:.0f} declared"
        for prediction in found
        for p in prediction.prices
        if p.launch.products and not 0.99 <= p.products / p.launch.products <= 2.0
    ]
    dear = [
        f"{name}: {instructions:.0f} instructions for 32 voxels, the budget is {budgets.get(name, 0):.0f}"
        for name, instructions in prices_by_kernel(found).items()
        if instructions > budgets.get(name, 0)
    ]
    return spills + wrong + dear


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--cubins", type=Path, help="folder that keeps the compiled code for the next run")
    parser.add_argument(
        "--architectures", nargs="+", default=["80", "90"], help="compute capabilities; prices are 90's"
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail on spills and on broken budgets"
    )
    parser.add_argument("--tighten", action="store_true", help="make today's prices the budgets")
    options = parser.parse_args(arguments)
    sources = sorted({launch.source for c in configurations() for launch in c.launches})
    spilling: list[str] = []
    for architecture in options.architectures:
        with tempfile.TemporaryDirectory() as folder:
            kept = Path(folder) if options.cubins is None else options.cubins
            kept.mkdir(parents=True, exist_ok=True)
            cubins = compiled(sources, architecture, kept)
            if architecture != "90":
                used = {name: r for cubin in cubins for name, r in resources_of(cubin).items()}
                spilling += problems([], used, {})
                continue
            found, resources = predictions(cubins)
    if options.tighten:
        BUDGETS.write_text(json.dumps(prices_by_kernel(found), indent=2) + "\n")
    budgets = json.loads(BUDGETS.read_text()) if BUDGETS.is_file() else {}
    broken = spilling + problems(found, resources, budgets)
    sys.stdout.write(table(found) + "\n" + "".join(f"{line}\n" for line in broken))
    if not options.check:
        RESULTS.joinpath("h100-predicted.md").write_text(report(found))
        seconds = seconds_by_name(found)
        RESULTS.joinpath("h100-predicted.json").write_text(json.dumps({"seconds": seconds}, indent=2) + "\n")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
