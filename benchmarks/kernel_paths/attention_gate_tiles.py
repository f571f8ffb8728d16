"""The attention gate in float32, forward: a block takes tiles of 128 voxels of all channels."""

from __future__ import annotations

from .attention_gate import Gate
from .declarations import Configuration, HostCalls, Launch

THREADS = TILE = 128
PIECES = TILE // 4  # of 16 bytes, of a channel's tile


def tiles_forward(gate: Gate) -> Configuration:
    """Of a gate whose channels are multiples of 16, channels-first."""
    tiles = -(-gate.voxels // TILE)
    weights = gate.inner * (gate.channels + 4)
    fewest = 4 * (gate.voxels * (2 * gate.channels + 1) + gate.inner * gate.coarse_voxels + gate.parameters())
    launch = Launch(
        source="attention_gate",
        kernel="gate_tiles_forward_kernelIfE",
        blocks=min(tiles, 1 << 16),
        threads=THREADS,
        shared_bytes=20 * TILE + 4 * (gate.inner + TILE + weights + gate.channels * (TILE + 4)),
        trips={
            "for (int tile = blockIdx.x": max(1, tiles / (1 << 16)),
            # What is left of four, and fours.
            "for (int k = threadIdx.x; k < padded16(inner) * stride": (
                weights / THREADS % 4,
                weights // THREADS // 4,
            ),
            "for (int i = threadIdx.x; i < padded16(inner)": (gate.inner / THREADS, 0),
            "for (int k = threadIdx.x; k < rows * pieces": gate.channels * PIECES / THREADS,
            "for (int v = warp_first": 4,
            "for (int i = 0; i < inner; i += 16": gate.inner / 16,
            "for (int k = 0; k < depth; ++k) {": gate.channels / 2,  # unrolled twice
            "for (int k = threadIdx.x; k < channels * pieces": gate.channels * PIECES / THREADS,
            # Features that lie by voxel.
            "for (int k = threadIdx.x; k < rows * tile_voxels": 0,
            "for (int k = threadIdx.x; k < channels * count": 0,
        },
        # Tiles that do not start on 16 bytes.
        skipped=("to[i] = c < channels && v + i < count", "for (int i = 0; i < width && v + i < count"),
        moved_bytes=fewest,
        in_flight_bytes=16 * 32,
        units=gate.voxels / 32,
    )
    name = gate.label.replace("bfloat16", "float32")
    return Configuration(f"gate forward {name}", fewest, (launch,), None, HostCalls(allocations=2))


def tile_configurations() -> list[Configuration]:
    return [tiles_forward(Gate(1, 32, 16, (96, 96, 96)))]
