"""The attention gate in the half types: persistent warps that take runs of 32 voxels of a row."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .declarations import MULTIPROCESSORS, Configuration, HostCalls, Launch


@dataclass(frozen=True)
class Gate:
    """Sizes of an attention gate in bfloat16 whose grids differ by 2 along every axis."""

    images: int
    channels: int
    inner: int
    fine: tuple[int, ...]
    by_voxel: bool = False

    @property
    def voxels(self) -> int:
        return self.images * math.prod(self.fine)

    @property
    def coarse_voxels(self) -> int:
        return self.images * math.prod(size // 2 for size in self.fine)

    @property
    def size(self) -> int:
        return 1 if self.channels <= 32 and self.inner <= 16 else 2

    @property
    def runs(self) -> int:
        return self.voxels // self.fine[-1] * -(-self.fine[-1] // 32)

    @property
    def label(self) -> str:
        grid = "x".join(map(str, self.fine))
        order = ", channels-last" if self.by_voxel else ""
        return f"({self.images}, {self.channels}, {grid}) Ci {self.inner} bfloat16{order}"

    def timed_as(self, mode: str) -> str | None:
        """Its name in kernel_times.py, which times channels-first gates alone."""
        shape = "x".join(map(str, (self.images, self.channels, *self.fine)))
        return None if self.by_voxel else f"attention_gate {mode} {shape} Ci={self.inner} bfloat16"

    def tile_bytes(self) -> int:
        rows, columns = (32, 32 * self.size) if self.by_voxel else (32 * self.size, 32)
        return 2 * rows * (columns + 8)

    def weight_bytes(self) -> int:
        return 2 * 16 * self.size * (32 * self.size + 8)

    def phi_tile_bytes(self) -> int:
        return 0 if self.by_voxel else 2 * 16 * self.size * (56 if self.size == 1 else 52)

    def theta_products(self) -> int:
        """Of a run: inner blocks x blocks of 8 voxels x blocks of 16 channels."""
        return self.size * 4 * 2 * self.size

    def interpolation_products(self) -> float:
        """Of a run: by channel one product with rows that are interpolated along z and y before; by voxel two rows of
        phi a product."""
        if not self.by_voxel:
            return self.size * 4
        return self.size * 4 * self.planes_of_phi()

    def planes_of_phi(self) -> float:
        """That a run interpolates between: in 3D two but for the first and the last plane of x."""
        return 1.0 if len(self.fine) == 2 else 2 - 2 / self.fine[0]

    def parameters(self) -> int:
        """Of the weights: w_x, w_psi and b_psi."""
        return self.inner * self.channels + self.inner + 1

    def loaded_bytes(self, blocks: int) -> float:
        """Of the kernels that take runs: phi's columns, by channel 24 of two rows a plane, by voxel 8 of each for 4
        blocks of voxels; w_x once a block, w_psi by the 4 lanes of a row in each warp, b_psi by each thread."""
        of_run = 2 * 2 * 16 * self.size * (4 * 8 if self.by_voxel else 24) * self.planes_of_phi()
        of_block = 4 * (self.inner * self.channels + 4 * 4 * self.inner + 128)
        return self.runs * of_run + blocks * of_block


# Rows that do not start on 16 bytes, ratios of the grids other than 2.
SLOW_ROWS = (
    "for (int r = 0; r < Tile::rows; ++r) {",
    "for (int row = first_row; row < rows; row += step",
    "for (int i = row; i < in_.inner(); i += 8",
)
GENERAL = ("Products::template interpolate<false>", "min(column + 2 * j, ax.coarse - 2)")


def _mangled(name: str, gate: Gate) -> str:
    return f"{name}IN3c108BFloat16ELi{gate.size}ELb{int(gate.by_voxel)}E"


def gate_forward(gate: Gate, multiprocessors: int = MULTIPROCESSORS) -> Configuration:
    blocks = min(-(-gate.runs // 4), multiprocessors * (5 - gate.size))
    warps = 4 * blocks
    phi_bytes = 2 * gate.inner * gate.coarse_voxels
    stored_bytes = 2 * gate.voxels * (gate.channels + 1)
    fewest = 2 * gate.voxels * gate.channels + phi_bytes + 4 * gate.parameters() + stored_bytes
    launch = Launch(
        source="attention_gate",
        kernel=_mangled("gate_rows_forward_kernel", gate),
        blocks=blocks,
        threads=128,
        shared_bytes=gate.weight_bytes() + 4 * (2 * gate.tile_bytes() + (gate.phi_tile_bytes() or 16) + 128),
        trips={
            "while (run.valid)": gate.runs / warps,
            "for (int k = threadIdx.x; k < elements": 16 * gate.size * (32 * gate.size + 8) / 128,
        },
        skipped=(*SLOW_ROWS, *GENERAL),
        moved_bytes=fewest,
        in_flight_bytes=2 * 32 * gate.channels,
        units=gate.runs,
        products=gate.runs * (gate.theta_products() + gate.interpolation_products()),
        copied_bytes=2 * gate.voxels * gate.channels,
        loaded_bytes=gate.loaded_bytes(blocks),
        stored_bytes=stored_bytes,
    )
    return Configuration(
        f"gate forward {gate.label}",
        fewest,
        (launch,),
        gate.timed_as("forward"),
        HostCalls(allocations=2),  # out, alpha
    )


def gate_backward(gate: Gate) -> Configuration:
    blocks = 528
    warps = 4 * blocks
    phi_bytes = 2 * gate.inner * gate.coarse_voxels
    theta_bytes = 2 * gate.inner * gate.voxels
    width = gate.parameters()
    fewest = 2 * gate.voxels * (3 * gate.channels + 1) + 2 * (phi_bytes + 4 * width)
    stored_bytes = 2 * gate.voxels * gate.channels + theta_bytes + 4 * blocks * width
    main = Launch(
        source="attention_gate",
        kernel=_mangled("gate_rows_backward_kernel", gate),
        blocks=blocks,
        threads=128,
        shared_bytes=gate.weight_bytes()
        + 4 * (4 * gate.tile_bytes() + (gate.phi_tile_bytes() or 2 * 16 * gate.size * 40) + 384),
        trips={
            "while (run.valid)": gate.runs / warps,
            "for (int k = threadIdx.x; k < elements": 16 * gate.size * (32 * gate.size + 8) / 128,
            "for (int k = threadIdx.x; k < inner * used": gate.inner * gate.channels / 128,
            "for (int i = threadIdx.x; i <= inner": 1,
        },
        skipped=(*SLOW_ROWS, *GENERAL, "if (out.grad_out == nullptr) {"),
        moved_bytes=2 * gate.voxels * (2 * gate.channels + 1) + phi_bytes + 4 * width + stored_bytes,
        in_flight_bytes=2 * 2 * 32 * gate.channels,
        units=gate.runs,
        products=gate.runs
        * (
            gate.theta_products()
            + gate.interpolation_products()
            + 4 * 2 * gate.size  # x times grad_out
            + 2 * 4 * gate.size * gate.size  # grad_w_x: blocks of 16 voxels x 8 channels x inner blocks
            + 2 * gate.size * 4 * gate.size  # grad_x: 16 channels x 8 voxels x inner blocks
        ),
        copied_bytes=2 * 2 * gate.voxels * gate.channels,
        loaded_bytes=gate.loaded_bytes(blocks) + 2 * gate.voxels,
        stored_bytes=stored_bytes,
    )
    adjoint = _adjoint(gate, theta_bytes, phi_bytes)
    weights = Launch(
        source="attention_gate",
        kernel="gate_weights_kernelIfE",
        blocks=-(-width // 32),
        threads=512,
        shared_bytes=0,
        trips={
            "for (int b = slice; b < blocks": (blocks // 16 % 8, blocks // 16 // 8)
        },  # what is left of 8, and 8
        skipped=(),
        moved_bytes=4 * (blocks + 1) * width,
        in_flight_bytes=8 * 4 * 32,
        units=-(-width // 32) * 16,
        waits=5,
        loaded_bytes=4 * blocks * width,
        stored_bytes=4 * width,
    )
    return Configuration(
        f"gate backward {gate.label}",
        fewest,
        (main, adjoint, weights),
        gate.timed_as("backward"),
        HostCalls(allocations=7),  # gradients, that of up(phi), sums of blocks
    )


def _adjoint(gate: Gate, theta_bytes: float, phi_bytes: float) -> Launch:
    """phi's gradient from that of up(phi), for grids that differ by 2."""
    planes = gate.fine[0] // 2
    rows_and_columns = gate.coarse_voxels // planes // gate.images
    groups = gate.inner / 8 if gate.by_voxel else gate.inner / 4  # of channels, or of columns
    for taken in (8, 4, 2):
        segments = -(-planes // taken)
        threads = int(gate.images * groups * rows_and_columns * segments)
        if threads >= 50_000:
            break
    read = (2 * planes + 2 * segments) / segments  # planes of up(phi), of a thread
    flags = (gate.by_voxel, True, len(gate.fine) == 3)
    rows = 4 if len(gate.fine) == 3 else 1
    return Launch(
        source="attention_gate",
        kernel="gate_halving_adjoint_kernelIN3c108BFloat16E" + "".join(f"Lb{int(flag)}E" for flag in flags),
        blocks=-(-threads // 256),
        threads=256,
        shared_bytes=0,
        trips={"for (int z = part.begin; z <= part.end; ++z)": read / 2},
        skipped=(
            "if (first + 8 > ax.fine) {",
            *(["for (int i = 0; i < width; ++i) {"] if gate.by_voxel else []),
        ),
        moved_bytes=theta_bytes + phi_bytes,
        in_flight_bytes=16
        * 32
        * 2
        * rows
        * (2 if gate.by_voxel else 1),  # pieces of two planes, or half of theirs
        units=gate.runs,
        loaded_bytes=threads * read * rows * (4 * 16 if gate.by_voxel else 16 + 2 * 2),
        stored_bytes=phi_bytes,
    )


GATES = (
    Gate(1, 32, 16, (96, 96, 96)),
    Gate(8, 64, 32, (512, 512)),
    Gate(1, 32, 16, (96, 96, 96), by_voxel=True),
    Gate(8, 64, 32, (512, 512), by_voxel=True),
)


def gate_configurations() -> list[Configuration]:
    return [make(gate) for gate in GATES for make in (gate_forward, gate_backward)]
